"""The configurations of the five CogVideoX models, as published in their config.json files, and the clips that they
are made for. The counts build them without weights, the benchmarks with random ones.

A name with `tiny-` before it, as in `tiny-5b-i2v`, is the same kind of model with few and narrow layers, in fp32 and
for a small clip: a CPU takes a step of it in less than a second.
"""

import json
from pathlib import Path

TRANSFORMER = {
    "_class_name": "CogVideoXTransformer3DModel", "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
    "time_embed_dim": 512, "text_embed_dim": 4096, "max_text_seq_length": 226, "patch_size": 2, "sample_width": 90,
    "sample_height": 60, "sample_frames": 49, "num_attention_heads": 48, "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip
VERSION_1_5 = {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81, "sample_height": 96, "sample_width": 170}
TRANSFORMERS = {
    "2b": {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
    "5b": {},
    "5b-i2v": {"in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5b": VERSION_1_5,
    "1.5-5b-i2v": VERSION_1_5 | {"in_channels": 32, "ofs_embed_dim": 512},
}
VAE = {
    "_class_name": "AutoencoderKLCogVideoX", "latent_channels": 16, "layers_per_block": 3, "sample_height": 480,
    "sample_width": 720, "block_out_channels": [128, 256, 256, 512], "scaling_factor": 0.7,
    "down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4,
}  # fmt: skip
TEXT_ENCODER = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip

TINY = "tiny-"
TINY_TRANSFORMER = {
    "num_attention_heads": 4, "num_layers": 3, "time_embed_dim": 64, "text_embed_dim": 32, "sample_frames": 9,
    "sample_height": 8, "sample_width": 12,
}  # fmt: skip
TINY_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
TINY_TEXT_ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
NAMES = [*TRANSFORMERS, *(TINY + name for name in TRANSFORMERS)]


def is_tiny(name: str) -> bool:
    return name.startswith(TINY)


def clip_size(name: str) -> tuple[int, int, int]:
    """Frames, height and width that the model is made for."""
    if is_tiny(name):
        return 9, 64, 96
    return (81, 768, 1360) if name.startswith("1.5") else (49, 480, 720)


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip."""
    return (frames - 1) // 4 + 1, height // 8, width // 8


def dtype_name(name: str) -> str:
    """That of the published weights, as torch calls it. A tiny model has fp32: CPUs are slow in half precision."""
    if is_tiny(name):
        return "float32"
    return "float16" if name == "2b" else "bfloat16"


def transformer_config(name: str) -> dict:
    config = TRANSFORMER | TRANSFORMERS[name.removeprefix(TINY)]
    if is_tiny(name):
        config |= TINY_TRANSFORMER
        if "ofs_embed_dim" in config:
            config["ofs_embed_dim"] = config["time_embed_dim"]  # the two embeddings are added
    return config


def vae_config(name: str) -> dict:
    published = name.removeprefix(TINY)
    scaling_factor = {"2b": 1.15258426}.get(published, 0.7)
    config = VAE | {"scaling_factor": scaling_factor, "invert_scale_latents": published == "1.5-5b-i2v"}
    return config | TINY_VAE if is_tiny(name) else config


def text_encoder_config(name: str) -> dict:
    return TEXT_ENCODER | TINY_TEXT_ENCODER if is_tiny(name) else TEXT_ENCODER


def script_name(name: str) -> str:
    return "train_cogvideox_image_to_video_lora" if name.endswith("i2v") else "train_cogvideox_lora"


def write_configs(name: str, folder: Path) -> Path:
    """A model folder without weights, from which tools/plan.py can read."""
    configs = {
        "transformer": transformer_config(name), "vae": vae_config(name), "text_encoder": text_encoder_config(name),
    }  # fmt: skip
    for part, config in configs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder
