"""What a step computes: to rounding the numbers of diffusers' and peft's own forward passes."""

import importlib

import pytest
import torch
from conftest import SCRIPTS
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

T2V, I2V = SCRIPTS
KINDS = [(T2V, "t2v"), (T2V, "t2v sincos"), (T2V, "t2v 1.5"), (I2V, "i2v"), (I2V, "i2v learned"), (I2V, "i2v 1.5")]
LAYERS = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.2"]


def plain_transformer(model, dtype) -> CogVideoXTransformer3DModel:
    """diffusers' transformer with peft's layers; in half precision with an fp32 LoRA under autocast."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)
    transformer.requires_grad_(False).add_adapter(LoraConfig(r=8, lora_alpha=12, target_modules=LAYERS))
    cast_training_params(transformer, dtype=torch.float32)
    transformer.forward = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)(transformer.forward)
    return transformer


def loss_and_gradients(script, model, dtype=torch.float32, is_plain=False, seed=0, **changes) -> dict:
    """The loss, and by name the gradients of the LoRA, of one step of the script on random latents."""
    args = script.get_args(["--pretrained_model_name_or_path", str(model)])
    vars(args).update(noised_image_dropout=0, **changes)
    if is_plain:
        transformer = plain_transformer(model, dtype)
    else:
        transformer = script.load_transformer(args, dtype)
        script.add_lora(transformer, 8, 12, LAYERS)
    generator = torch.Generator().manual_seed(seed)
    lora = script.lora_parameters(transformer)
    for name in sorted(lora):
        lora[name].data = torch.randn(lora[name].shape, generator=generator) * 0.1
    config, vae_config = transformer.config, script.read_config(args, "vae")[0]
    embeds = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    batch = {"prompt_embeds": embeds.to(dtype), "moments": torch.randn(2, 8, 3, 8, 12, generator=generator)}
    batch["image_moments"] = torch.randn(2, 8, 1, 8, 12, generator=generator)
    torch.manual_seed(seed)
    latents, conditions = script.prepare_batch(batch, config, vae_config, args)
    scheduler = script.CogVideoXDPMScheduler.from_pretrained(**script.pretrained_source(args, "scheduler"))
    transformer.train()
    loss = script.diffusion_loss(transformer, scheduler, latents, conditions)
    loss.backward()
    return {"loss": loss.item()} | {name: parameter.grad for name, parameter in lora.items()}


def distance(found: dict, expected: dict) -> float:
    """Between all gradients, relative to the size of the expected ones."""
    names = expected.keys() - {"loss"}
    difference = sum((found[name] - expected[name]).square().sum() for name in names)
    return float((difference / sum(expected[name].square().sum() for name in names)).sqrt())


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[kind for _, kind in KINDS])
@pytest.mark.parametrize("recompute", [False, True])
def test_fp32_step_is_that_of_diffusers_and_peft(models, name, kind, recompute):
    """To 1e-5: fp32 rounds by 6e-8, and a step adds up some thousand products."""
    script = importlib.import_module(name)
    expected = loss_and_gradients(script, models[kind], is_plain=True)
    found = loss_and_gradients(script, models[kind], gradient_checkpointing=recompute)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found.keys() == expected.keys() and distance(found, expected) < 1e-5


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_bf16_step_is_at_least_as_near_to_fp32_as_under_autocast(models, name, kind):
    """Mean distances over 8 steps. Between machines, whose kernels add in other orders, they differ by 2 %."""
    script = importlib.import_module(name)
    distances = {True: [], False: []}
    for seed in range(8):
        exact = loss_and_gradients(script, models[kind], is_plain=True, seed=seed)
        for is_plain, found in distances.items():
            half = loss_and_gradients(script, models[kind], torch.bfloat16, is_plain, seed)
            assert half["loss"] == pytest.approx(exact["loss"], rel=0.01)
            found.append(distance(half, exact))
    ours, plain = (sum(distances[is_plain]) / 8 for is_plain in (False, True))
    assert ours <= 1.02 * plain and plain < 0.1
