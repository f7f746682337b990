"""What a step computes: to rounding the numbers of diffusers' and peft's own forward passes."""

import importlib

import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import SCRIPTS
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors.torch import load_file
from test_training import same_tensors
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

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


def loss_and_gradients(
    script, model, dtype=torch.float32, is_plain=False, seed=0, num_latent_frames=3, **changes
) -> dict:
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
    batch = {"prompt_embeds": embeds.to(dtype)}
    batch["moments"] = torch.randn(2, 8, num_latent_frames, 8, 12, generator=generator)
    batch["image_moments"] = torch.randn(2, 8, 1, 8, 12, generator=generator)
    torch.manual_seed(seed)
    latents, conditions = script.prepare_batch(batch, config, vae_config, args)
    scheduler = script.CogVideoXDPMScheduler.from_pretrained(**script.pretrained_source(args, "scheduler"))
    transformer.train()
    with script.saving_activations(args):
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
    """Mean distances over 5 steps. Between machines, whose kernels add in other orders, they differ by 2 %."""
    script = importlib.import_module(name)
    distances = {True: [], False: []}
    for seed in range(5):
        exact = loss_and_gradients(script, models[kind], is_plain=True, seed=seed)
        for is_plain, found in distances.items():
            half = loss_and_gradients(script, models[kind], torch.bfloat16, is_plain, seed)
            assert half["loss"] == pytest.approx(exact["loss"], rel=0.01)
            found.append(distance(half, exact))
    ours, plain = (sum(distances[is_plain]) / 5 for is_plain in (False, True))
    assert ours <= 1.02 * plain and plain < 0.1


# ---- levers of memory and speed: the same loss and gradients -----------------------------------------------------

RECOMPUTE = {"gradient_checkpointing": True}
LEVERS = {
    "attention kept": RECOMPUTE | {"checkpoint_policy": "attention"},
    "offloaded": RECOMPUTE | {"offload_activations": True},
    "offloaded, attention kept": RECOMPUTE | {"offload_activations": True, "checkpoint_policy": "attention"},
    "compiled": RECOMPUTE | {"compile": True},
    "compiled, offloaded, attention kept": RECOMPUTE
    | {"compile": True, "offload_activations": True, "checkpoint_policy": "attention"},
}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A tiny text-to-video model with three blocks that do something."""
    folder = tmp_path_factory.mktemp("larger")
    return tiny.make_model(folder / "model", num_attention_heads=4, num_layers=3, time_embed_dim=64)


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
def test_levers_change_no_number(script, larger, levers, monkeypatch):
    """To 1e-5 in fp32, as above. In place of inductor, a backend that compiles faster."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)
    compare(script, larger, levers)


@pytest.mark.slow
@pytest.mark.parametrize("levers", [levers for levers in LEVERS.values() if levers.get("compile")])
def test_inductor_changes_no_number(script, larger, levers):
    compare(script, larger, levers)


def compare(script, larger, levers) -> None:
    torch._dynamo.reset()
    counters.clear()
    expected, found = loss_and_gradients(script, larger), loss_and_gradients(script, larger, **levers)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert distance(found, expected) < 1e-5
    # Two for the blocks, and one where attention is kept. Parts of a block that cannot be compiled would be others.
    assert counters["stats"]["unique_graphs"] in ((2, 3) if levers.get("compile") else (0,))


class CountAttention(TorchDispatchMode):
    """Counts forward passes of attention."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += "scaled_dot_product" in func.__name__ and "backward" not in func.__name__
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("policy", "number"), [("full", 6), ("attention", 3)])
def test_attention_is_recomputed_or_kept(script, larger, policy, number):
    with CountAttention() as count:
        loss_and_gradients(script, larger, checkpoint_policy=policy, **RECOMPUTE)
    assert count.number == number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_are_the_inputs_of_the_blocks(script, larger, dtype, monkeypatch):
    """Outside of the recomputed blocks little is saved, and that is given to the host's memory, too."""
    saved, to_host = [], script.to_host
    monkeypatch.setattr(script, "to_host", lambda tensor: saved.append(tensor) or to_host(tensor))
    loss_and_gradients(script, larger, dtype, offload_activations=True, **RECOMPUTE)
    packed = [tensor for tensor in saved if tensor.numel()]  # torch 2.11 saves an empty tensor with each block
    config = CogVideoXTransformer3DModel.load_config(larger, subfolder="transformer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inputs = [tensor for tensor in packed if tensor.shape[1:] == (3 * 4 * 6, width)]
    assert len(inputs) >= 3 and all(tensor.dtype == dtype for tensor in inputs[:3])
    block_input = packed[0].nbytes + packed[1].nbytes  # video and text
    assert sum(tensor.nbytes for tensor in packed) < 4 * block_input  # of 3 blocks and what follows them


def test_one_compilation_a_shape_serves_all_blocks(script, larger, monkeypatch):
    """One more is for the first block, whose input needs no gradient. The second step of a shape compiles nothing."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)  # which compiles faster
    torch._dynamo.reset()
    counters.clear()
    numbers = []
    for frames in (3, 3, 2, 3):
        loss_and_gradients(script, larger, compile=True, num_latent_frames=frames, **RECOMPUTE)
        numbers.append(counters["stats"]["unique_graphs"])
    assert numbers == [2, 2, 4, 4] and not counters["graph_break"]


def check_not_compiled(script, larger, caplog, reason: str) -> None:
    """The numbers are the same, and torch says once of the blocks what failed."""
    torch._dynamo.reset()
    expected = loss_and_gradients(script, larger)
    for _ in range(2):
        found = loss_and_gradients(script, larger, compile=True, **RECOMPUTE)
        assert distance(found, expected) < 1e-5
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("torch._dynamo")]
    line = script.CogVideoXBlock.forward.__code__.co_firstlineno
    (of_blocks,) = [message for message in messages if f"{script.__name__}.py line {line} " in message]
    assert reason in of_blocks


def test_what_cannot_be_compiled_runs_as_it_is(script, larger, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no such operation")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    check_not_compiled(script, larger, caplog, "no such operation")


@pytest.mark.slow
def test_without_a_compiler_blocks_run_as_they_are(script, larger, caplog):
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent"), "force_disable_caches": True}):
        check_not_compiled(script, larger, caplog, "No working C++ compiler found")


# ---- quantized base. diffusers asks for a GPU; bitsandbytes computes on the CPU, too ------------------------------


@pytest.fixture
def quantize_on_cpu(monkeypatch):
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})


@pytest.mark.usefixtures("quantize_on_cpu")
def test_quantized_base(script, larger):
    """nf4 rounds by about 1/10 of the weights' size; a gradient passes all of a tiny model's layers. Half the measured
    distance is a bug."""
    exact = loss_and_gradients(script, larger)
    found = loss_and_gradients(script, larger, torch.bfloat16, quantize_base="nf4", **RECOMPUTE)
    assert found["loss"] == pytest.approx(exact["loss"], rel=0.01)
    assert 0.3 / 4 < distance(found, exact) < 0.3


def test_quantization_without_a_gpu_is_one_message(script, larger, run):
    with pytest.raises(script.RunError, match="--quantize_base nf4: No GPU found"):
        run(pretrained_model_name_or_path=larger, quantize_base="nf4", max_train_steps=1)


@pytest.mark.usefixtures("quantize_on_cpu")
def test_quantized_run_resumes_and_saves_a_plain_lora(script, run, model):
    settings = {"quantize_base": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": True}
    whole = run(**settings, max_train_steps=4)
    halves = run(**settings, max_train_steps=2)
    run(**settings, max_train_steps=4, output_dir=halves, resume_from_checkpoint="latest")
    assert same_tensors(*(load_file(folder / script.LORA_FILE) for folder in (whole, halves)))
    DiffusionPipeline.from_pretrained(model).load_lora_weights(whole)


# ---- refusals and advice --------------------------------------------------------------------------------------------


def test_levers_that_need_recomputation(script, flags):
    for lever in ({"offload_activations": True}, {"checkpoint_policy": "attention"}, {"offload_base": True}):
        with pytest.raises(script.RunError, match="need --gradient_checkpointing"):
            script.check_args(script.get_args(flags(**lever)))
        script.check_args(script.get_args(flags(**lever, gradient_checkpointing=True)))


def test_out_of_memory_names_what_helps(launch):
    def fail(_script) -> None:
        def backward(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

        Accelerator.backward = backward

    child = launch(prepare=fail, gradient_checkpointing=True)
    assert child.wait() == 6 and "Traceback" not in child.said()
    advice = "the cheapest first: --train_batch_size 1, --offload_base, --offload_activations, --use_8bit_adam"
    assert advice in child.said() and "Tried to allocate 20.00 GiB." in child.said()
