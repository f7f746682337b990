"""--offload_base: the base waits in host memory, and every number stays what it is."""

import json
import weakref
from types import SimpleNamespace

import models as published
import pytest
import tiny
import torch
from conftest import BOTH
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DiffusionPipeline
from safetensors.torch import load_file
from test_processes import finish
from test_training import read_metrics, same_tensors
from transformers import T5Config, T5EncoderModel

SETTINGS = {"gradient_checkpointing": True, "max_train_steps": 4, "train_batch_size": 1, "max_grad_norm": 1e-3}
SAMPLES = {
    "validation_prompt": "a red square", "validation_steps": 2, "num_inference_steps": 2, "num_validation_videos": 2,
    "eval_split": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def five_blocks(tmp_path_factory):
    """A text-to-video model with an odd number of blocks, whose weights differ."""
    folder = tmp_path_factory.mktemp("five")
    return tiny.make_model(folder / "model", num_attention_heads=4, num_layers=5, time_embed_dim=64)


# ---- the same numbers -----------------------------------------------------------------------------------------------


def two_steps(script, model, between=None, **changes) -> list[torch.Tensor]:
    """The losses and gradients of two steps of the script on random latents. `between` is done with the transformer
    before the second one."""
    args = script.get_args(["--pretrained_model_name_or_path", str(model)])
    vars(args).update(gradient_checkpointing=True, **changes)
    transformer = script.load_transformer(args, torch.float32)
    lora = script.add_lora(transformer, 8, 12, blocks=args.lora_blocks)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    script.place_transformer(args, transformer, torch.device("cpu"))
    config, vae_config = transformer.config, script.read_config(args, "vae")[0]
    scheduler = script.CogVideoXDPMScheduler.from_pretrained(**script.pretrained_source(args, "scheduler"))
    found = []
    for step in range(2):
        torch.manual_seed(step)
        embeds = torch.randn(2, config.max_text_seq_length, config.text_embed_dim)
        batch = {"prompt_embeds": embeds, "moments": torch.randn(2, 8, 3, 8, 12)}
        latents, conditions = script.prepare_batch(batch, config, vae_config, args)
        if step and between:
            between(transformer, latents, conditions)
        with script.saving_activations(args):
            loss = script.diffusion_loss(transformer, scheduler, latents, conditions)
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in lora)]
    return found


def forward_only(transformer, latents, conditions) -> None:
    conditions = {name: value for name, value in conditions.items() if name != "num_padding"}
    with torch.no_grad():
        for _ in range(2):
            transformer(latents, timestep=torch.tensor([500, 500]), **conditions)


def stop_in_the_middle(transformer, latents, conditions) -> None:
    """As a step does that runs out of memory."""

    def fail(*_):
        raise torch.OutOfMemoryError

    handle = transformer.transformer_blocks[2].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        forward_only(transformer, latents, conditions)
    handle.remove()


LEVERS = {
    "full": {},
    "attention kept": {"checkpoint_policy": "attention"},
    "activations offloaded": {"offload_activations": True},
    "both": {"checkpoint_policy": "attention", "offload_activations": True},
    "blocks without a LoRA": {"lora_blocks": "2-3"},
}


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
@pytest.mark.parametrize("between", [None, forward_only, stop_in_the_middle])
def test_losses_and_gradients_are_the_same_to_the_bit(script, five_blocks, levers, between):
    expected = two_steps(script, five_blocks, **levers)
    found = two_steps(script, five_blocks, between, offload_base=True, **levers)
    assert all(gradient.any() for gradient in expected[1:])
    assert all(map(torch.equal, found, expected))


@BOTH
def test_a_run_is_the_same_to_the_bit(script, run, five_blocks, model, kind, tmp_path):
    """Losses, gradient norms, held-out losses, samples and weights; with accumulation; stopped and resumed, too."""
    settings = SETTINGS | SAMPLES | {"gradient_accumulation_steps": 2, "enable_tiling": True}
    settings["pretrained_model_name_or_path"] = five_blocks if kind == "t2v" else model
    settings["precompute_dir"] = tmp_path / "encoded"
    plain = run(output_dir=tmp_path / "plain", **settings)
    settings["offload_base"] = True
    run(output_dir=tmp_path / "offloaded", **settings | {"max_train_steps": 2})
    offloaded = run(output_dir=tmp_path / "offloaded", resume_from_checkpoint="latest", **settings)
    weights = [load_file(output / script.LORA_FILE) for output in (plain, offloaded)]
    assert same_tensors(*weights)
    for name in ("loss", "grad_norm", "validation/loss"):
        expected, found = (
            [(row["step"], row[name]) for row in read_metrics(output, name)] for output in (plain, offloaded)
        )
        assert set(expected) <= set(found) and expected, name
        assert all(value > 0 for _, value in expected)


def test_two_processes_are_the_same_to_the_bit(script, launch, five_blocks, tmp_path):
    settings = SETTINGS | {"pretrained_model_name_or_path": five_blocks, "precompute_dir": tmp_path / "encoded"}
    settings["enable_tiling"] = True  # as --offload_base implies
    finish(launch(2, output_dir=tmp_path / "plain", **settings))
    finish(launch(2, output_dir=tmp_path / "offloaded", offload_base=True, **settings))
    weights = [load_file(tmp_path / name / script.LORA_FILE) for name in ("plain", "offloaded")]
    assert same_tensors(*weights)
    rows = [
        [(row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name)] for name in ("plain", "offloaded")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4 and all(norm > 0 for _, norm in rows[0])


# ---- copies beside the computation ----------------------------------------------------------------------------------


class Copies:
    """In place of a GPU's streams: a copy is done at the last moment that the events allow. Until then its slot holds
    what is no number. That a slot is not needed any more is looked up when its copy starts."""

    def __init__(self, script, monkeypatch):
        self.waiting, self.begun, self.seen, self.number = [], [], 0, 0
        streams = SimpleNamespace(
            Stream=lambda: SimpleNamespace(wait_stream=self.wait_stream), Event=self.event, stream=lambda _: self,
            current_stream=lambda: SimpleNamespace(wait_event=lambda event: event.wait()),
        )  # fmt: skip
        monkeypatch.setattr(torch, "get_device_module", lambda _device: streams)
        begin, transfer = script.HostBlocks.begin, script.HostBlocks.transfer

        def note(blocks, block):
            begin(blocks, block)
            self.begun.append(blocks.blocks.index(block) % 2)

        def start(blocks, slot, buffer):
            number = [s is slot for s in blocks.slots].index(True)
            assert number not in self.begun[self.seen :], "the slot may still be read"
            slot.fill_(0xFF)
            self.waiting.append(lambda: transfer(blocks, slot, buffer))
            self.number += 1

        monkeypatch.setattr(script.HostBlocks, "begin", note)
        monkeypatch.setattr(script.HostBlocks, "transfer", start)

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass

    def wait_stream(self, _stream) -> None:
        self.seen = len(self.begun)

    def event(self):
        recorded = []

        def record():
            recorded[:] = self.waiting
            self.waiting.clear()

        def wait():
            for copy in recorded:
                copy()
            recorded.clear()

        return SimpleNamespace(record=record, wait=wait)


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
@pytest.mark.parametrize("between", [None, forward_only, stop_in_the_middle])
def test_copies_that_come_as_late_as_they_may_change_nothing(script, five_blocks, levers, between, monkeypatch):
    expected = two_steps(script, five_blocks, **levers)
    copies = Copies(script, monkeypatch)
    found = two_steps(script, five_blocks, between, offload_base=True, **levers)
    assert all(map(torch.equal, found, expected))
    if between is None:  # a step: 5 blocks up, 3 down, as the last two are there; the second one finds the first two
        assert copies.number == (5 + 2 + 4 + 2 if "lora_blocks" in levers else 5 + 3 + 3 + 3)


def test_weights_that_were_moved_are_noticed(script, five_blocks):
    """`.to` makes copies of them, which nothing would be copied into any more."""

    def move(transformer, _latents, _conditions):
        transformer.to(torch.float64).to(torch.float32)

    with pytest.raises(RuntimeError, match="--offload_base: the weights of block 0 are not where they are copied to"):
        two_steps(script, five_blocks, move, offload_base=True)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_base_is_never_twice_on_the_host(script, monkeypatch):
    """Each block's own weights are freed before the next one's buffer is made."""
    transformer = tiny.make_transformer(num_layers=5).requires_grad_(False)
    alive, counts, host_memory = set(), [], script.host_memory
    for number, block in enumerate(transformer.transformer_blocks):
        for name, parameter in block.named_parameters():
            alive.add((number, name))
            weakref.finalize(parameter.untyped_storage(), alive.discard, (number, name))
    of_a_block = len(alive) // 5

    def spy(*arguments):
        counts.append(len(alive) / of_a_block)
        return host_memory(*arguments)

    monkeypatch.setattr(script, "host_memory", spy)
    script.HostBlocks(transformer.transformer_blocks, torch.device("cpu"))
    assert counts == [5, 4, 3, 2, 1] and not alive


def test_memory_that_cannot_be_pinned_is_one_warning(script, monkeypatch, caplog):
    """Copies are made all the same."""
    empty = torch.empty

    def refuse(*arguments, pin_memory=False, **keywords):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", refuse)
    script.log_warning_once.cache_clear()
    for _ in range(2):
        found = script.host_memory((2, 3), torch.float16, torch.device("cuda"))
        assert found.shape == (2, 3) and found.dtype == torch.float16 and found.device.type == "cpu"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["Host memory cannot be pinned, so copies take longer: CUDA error: out of memory"]


def test_prompts_are_encoded_the_same_with_the_text_encoder_on_the_host(script, run, tmp_path, monkeypatch):
    places, from_pretrained = [], T5EncoderModel.from_pretrained

    def three_layers(_class, *arguments, **keywords):
        encoder = from_pretrained(*arguments, **keywords)
        torch.manual_seed(0)
        config = T5Config(**encoder.config.to_dict() | {"num_layers": 3})
        return T5EncoderModel(config).to(encoder.dtype).eval()

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", classmethod(three_layers))
    place = script.place_text_encoder
    monkeypatch.setattr(script, "place_text_encoder", lambda *a: places.append(a[1]) or place(*a))
    for name, changes in (("plain", {}), ("offloaded", {"offload_base": True})):
        run(**SETTINGS, precompute_dir=tmp_path / name, mixed_precision="bf16", **changes)
    assert len(places) == 1
    files = [sorted((tmp_path / name / "prompts").iterdir()) for name in ("plain", "offloaded")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 5
    for plain, offloaded in zip(*files, strict=True):
        assert same_tensors(load_file(plain), load_file(offloaded))


@pytest.mark.parametrize("free", [1.1, 0.9])
def test_a_text_encoder_that_does_not_fit_waits_on_the_host(script, run, tmp_path, monkeypatch, caplog, free):
    """Free memory is given as a part of what the encoder takes."""
    caplog.set_level("INFO")
    sizes, size_of = [], T5EncoderModel.get_memory_footprint

    def note(self) -> int:
        sizes.append(size_of(self))
        return sizes[-1]

    monkeypatch.setattr(T5EncoderModel, "get_memory_footprint", note)
    monkeypatch.setattr(script, "free_memory", lambda _device: free * sizes[-1])
    run(precompute_dir=tmp_path / "encoded")
    assert ("two of its blocks at a time are on cpu" in caplog.text) == (free < 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_text_encoder_of_the_published_models_takes_little_of_the_device(script, dtype):
    """transformers keeps one of T5's matrices in fp32 under fp16."""
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**published.TEXT_ENCODER)).to(dtype)
        for block in encoder.encoder.block if dtype == torch.float16 else []:
            block.layer[1].DenseReluDense.wo.float()
    script.place_text_encoder(encoder, torch.device("meta"))
    on_device = {
        parameter.untyped_storage()._cdata: parameter.untyped_storage().nbytes()
        for name, parameter in encoder.named_parameters()
        if "shared" not in name and "embed_tokens" not in name
    }
    assert len(on_device) == 3  # two slots, and the last norm
    assert 0.5 * 2**30 < sum(on_device.values()) < 0.95 * 2**30


def test_clips_and_samples_are_coded_in_tiles(run, monkeypatch, tmp_path):
    tiled = []

    def spied(method: str):
        original = getattr(AutoencoderKLCogVideoX, method)

        def spy(self, *arguments, **keywords):
            tiled.append((method, self.use_tiling))
            return original(self, *arguments, **keywords)

        return spy

    for method in ("encode", "decode"):
        monkeypatch.setattr(AutoencoderKLCogVideoX, method, spied(method))
    run(**SETTINGS | SAMPLES, offload_base=True, precompute_dir=tmp_path / "encoded")
    assert set(tiled) == {("encode", True), ("decode", True)}


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "without recomputation": ({"gradient_checkpointing": False}, "need --gradient_checkpointing"),
    "nf4": ({"quantize_base": "nf4"}, "--offload_base does not work with --quantize_base or --compile"),
    "compile": ({"compile": True}, "--offload_base does not work with --quantize_base or --compile"),
}


@pytest.mark.parametrize(("changes", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_work_with_is_refused(script, flags, changes, problem):
    args = script.get_args(flags(**{"gradient_checkpointing": True, "offload_base": True} | changes))
    with pytest.raises(script.RunError, match=problem) as error:
        script.check_args(args)
    assert error.value.exit_code == 2


def test_the_lora_is_one_like_any_other(run, five_blocks):
    output = run(**SETTINGS, offload_base=True, pretrained_model_name_or_path=five_blocks)
    DiffusionPipeline.from_pretrained(five_blocks).load_lora_weights(output)
    assert json.loads((output / "run.json").read_text())["args"]["offload_base"]
    assert isinstance(DiffusionPipeline.from_pretrained(five_blocks).transformer, CogVideoXTransformer3DModel)
