"""Count what sampling with diffusers' pipeline and a LoRA takes on the device, in the ways that the README shows.

    python benchmarks/inference.py [--rank 64]

The published models are built on the meta device, with diffusers' own blocks and peft's LoRA, and counted as
tools/plan.py counts a training. Of group offloading, two of the largest layers are on the device beside the
activations: the one that computes, and the next one, which is being copied.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tools")]

import models  # noqa: E402
import plan  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel  # noqa: E402
from peft import LoraConfig  # noqa: E402

import train_cogvideox_lora as script  # noqa: E402


def largest_layer(model: torch.nn.Module) -> int:
    """Return the bytes of the largest module without submodules."""
    sizes = []
    for layer in model.modules():
        if not list(layer.children()):
            sizes.append(sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())))
    return max(sizes)


def denoising(name: str, dtype: torch.dtype, rank: int) -> tuple[plan.Cost, int]:
    """Return the cost of a call of the transformer with and without the prompt, and the bytes of its largest layer."""
    config = models.transformer_config(name)
    transformer = plan.on_meta(lambda: CogVideoXTransformer3DModel.from_config(config), dtype)
    with torch.device("meta"):
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=script.LORA_TARGETS))
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)  # load_lora_weights brings a LoRA to the pipeline's dtype
    frames, height, width = models.latent_shape(*models.clip_size(name))
    frames += -frames % (transformer.config.patch_size_t or 1)
    new = lambda *sizes: torch.zeros(2, *sizes, dtype=dtype, device="meta")  # noqa: E731
    inputs = {
        "hidden_states": new(frames, transformer.config.in_channels, height, width),
        "encoder_hidden_states": new(transformer.config.max_text_seq_length, transformer.config.text_embed_dim),
        "timestep": new().long(),
    }
    if transformer.config.use_rotary_positional_embeddings:
        latents = inputs["hidden_states"]
        inputs["image_rotary_emb"] = script.rotary_for(transformer.config, models.vae_config(name), latents)
    if transformer.config.ofs_embed_dim is not None:
        inputs["ofs"] = new()[:1]
    return plan.count(script, [transformer], lambda: transformer(**inputs)), largest_layer(transformer)


def text_encoding(name: str, dtype: torch.dtype) -> tuple[plan.Cost, int]:
    """Return the cost of encoding a prompt, and the bytes of T5's largest layer."""
    text_encoder = plan.new_text_encoder(models.text_encoder_config(name), dtype)
    tokens = torch.zeros(1, 226, dtype=torch.int64, device="meta")
    return plan.count(script, [text_encoder], lambda: text_encoder(tokens)), largest_layer(text_encoder)


def decoding(name: str, dtype: torch.dtype) -> tuple[plan.Cost, int]:
    """Return the cost of decoding a video in the pipeline's tiles, and the bytes of the VAE's largest layer."""
    vae = plan.on_meta(lambda: AutoencoderKLCogVideoX.from_config(models.vae_config(name)), dtype)
    vae.enable_tiling()
    latents = torch.zeros(1, 16, *models.latent_shape(*models.clip_size(name)), dtype=dtype, device="meta")
    return plan.count(script, [vae], lambda: vae.decode(latents)), largest_layer(vae)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args(argv)
    print("| model | all on the GPU | model offloading | group offloading |\n|---|---|---|---|")
    for name in models.TRANSFORMERS:
        dtype = getattr(torch, models.dtype_name(name))
        parts = [text_encoding(name, dtype), denoising(name, dtype, args.rank), decoding(name, dtype)]
        weights = sum(cost.parts["weights"] for cost, _ in parts)
        activations = [cost.peak - cost.parts["weights"] for cost, _ in parts]
        whole = weights + max(activations)
        by_model = max(cost.peak for cost, _ in parts)
        by_group = max(own + 2 * largest for own, (_, largest) in zip(activations, parts, strict=True))
        print(f"| {name} | " + " | ".join(f"{size / plan.GIB:.1f}" for size in (whole, by_model, by_group)) + " |")


if __name__ == "__main__":
    main()
