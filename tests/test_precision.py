"""Mixed precision: the LoRA learns in fp32 over a frozen base in half precision."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Watch:
    """Looks into one training run at its optimizer steps and its calls of add_noise."""

    def __init__(self, script, monkeypatch):
        self.noise_dtypes, self.gradient_dtypes = set(), set()
        add_noise, add_lora = script.CogVideoXDPMScheduler.add_noise, script.add_lora
        get_optimizer = script.get_optimizer

        def watched_add_noise(scheduler, latents, noise, timesteps):
            self.noise_dtypes |= {latents.dtype, noise.dtype}
            return add_noise(scheduler, latents, noise, timesteps)

        def watched_add_lora(transformer, *args):
            self.transformer = transformer
            trainable = add_lora(transformer, *args)
            self.before = {name: tensor.detach().clone() for name, tensor in transformer.state_dict().items()}
            return trainable

        def watched_get_optimizer(*args, **kwargs):
            self.optimizer = get_optimizer(*args, **kwargs)

            def look(optimizer, *_):
                for group in optimizer.param_groups:
                    self.gradient_dtypes |= {parameter.grad.dtype for parameter in group["params"]}

            self.optimizer.register_step_pre_hook(look)
            return self.optimizer

        monkeypatch.setattr(script.CogVideoXDPMScheduler, "add_noise", watched_add_noise)
        monkeypatch.setattr(script, "add_lora", watched_add_lora)
        monkeypatch.setattr(script, "get_optimizer", watched_get_optimizer)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_dtypes_and_what_changes(script, run, monkeypatch, precision):
    watch = Watch(script, monkeypatch)
    run(mixed_precision=precision, max_train_steps=3, gradient_accumulation_steps=2, gradient_checkpointing=True)

    assert watch.noise_dtypes == {torch.float32}
    assert watch.gradient_dtypes == {torch.float32}
    states = [tensor for state in watch.optimizer.state.values() for tensor in state.values()]
    assert states and {tensor.dtype for tensor in states} == {torch.float32}

    base_dtype = HALF.get(precision, torch.float32)
    changed = set()
    for name, parameter in watch.transformer.named_parameters():
        is_lora = "lora_" in name
        assert parameter.requires_grad == is_lora
        assert parameter.dtype == (torch.float32 if is_lora else base_dtype), name
        if not torch.equal(parameter, watch.before[name]):
            changed.add(name)
    assert changed == {name for name, _ in watch.transformer.named_parameters() if "lora_" in name}
    for name, buffer in watch.transformer.named_buffers():
        if name in watch.before:
            assert torch.equal(buffer, watch.before[name]), name


def test_precision_comes_from_accelerate_unless_given(script, run, monkeypatch):
    watch = Watch(script, monkeypatch)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(mixed_precision=None, max_train_steps=1)
    assert watch.transformer.dtype == torch.bfloat16


def test_weights_load_straight_into_the_compute_dtype(run, monkeypatch):
    asked = []
    original = CogVideoXTransformer3DModel.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        asked.append(kwargs["dtype"])
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "from_pretrained", classmethod(spy))
    run(mixed_precision="bf16", max_train_steps=1)
    assert asked == [torch.bfloat16]


def test_the_revision_reaches_every_component(script, flags, monkeypatch):
    asked = {}
    args = script.get_args(flags(revision="v7", cache_dir="c"))

    def spy(name):
        def from_pretrained(_cls, *_args, **kwargs):
            asked[name] = kwargs
            raise LookupError

        return classmethod(from_pretrained)

    classes = ("T5Tokenizer", "T5EncoderModel", "AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel")
    for name in classes:
        monkeypatch.setattr(getattr(script, name), "from_pretrained", spy(name))
    with pytest.raises(LookupError):
        script.load_vae(args, torch.float32)
    with pytest.raises(LookupError):
        script.load_transformer(args, torch.float32)
    accelerator, _ = script.get_accelerator(args)
    prompts = ["a prompt that no other test has encoded"]
    with pytest.raises(LookupError):
        script.precompute_prompts(args, accelerator, prompts, 226)
    tokenizer = classmethod(lambda *_, **kwargs: asked.update(t=kwargs))
    monkeypatch.setattr(script.T5Tokenizer, "from_pretrained", tokenizer)
    with pytest.raises(LookupError):
        script.precompute_prompts(args, accelerator, prompts, 226)
    assert asked["t"] == asked["T5Tokenizer"] == script.pretrained_source(args, "tokenizer")
    for name, kwargs in asked.items():  # --cache_dir is that of data sets
        assert kwargs["revision"] == "v7" and "cache_dir" not in kwargs, name
