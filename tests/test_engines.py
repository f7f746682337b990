"""DeepSpeed and FSDP2 train what the plain engine trains: the same weights, files, schedule and clipping.

What a configuration file means is left to accelerate's own launcher, which makes environment variables of it.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_processes import finish, note, notes
from test_training import read_metrics, same_tensors

CONFIGS = ROOT / "accelerate_configs"
# Clipping that bites, a warm-up, and steps of more than one micro-batch.
SETTINGS = {
    "train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 6, "checkpointing_steps": 3,
    "max_grad_norm": 0.02, "lr_scheduler": "linear", "lr_warmup_steps": 3, "mixed_precision": "bf16",
    "gradient_checkpointing": True,
}  # fmt: skip


def launched_with(config: Path, processes: int) -> dict[str, str]:
    """The environment that `accelerate launch` gives a script under a configuration file."""
    words = ["--config_file", str(config), "--num_processes", str(processes), "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in environment.items() if os.environ.get(key) != value}


@pytest.fixture(scope="session")
def deepspeed_on_the_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It is for many processes, and takes a minute to compile. (`deepspeed.comm.torch` by name is torch itself.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch computes in it here, too


def note_prepared(folder: Path):
    """Notes the dtypes of the base, of what is computed with and of what learns; the wrapped units, their shards."""

    def prepare(_script) -> None:
        original = Accelerator.prepare

        def noting(self, *arguments, **keywords):
            transformer, optimizer, schedule = original(self, *arguments, **keywords)
            parameters = dict(self.unwrap_model(transformer).named_parameters())
            dtypes = {"lora" if "lora" in name else "base": str(p.dtype) for name, p in parameters.items()}
            learns = {str(p.dtype) for group in optimizer.param_groups for p in group["params"]}
            note(folder, "dtypes", dtypes | {"learns": sorted(learns)})
            block = self.unwrap_model(transformer).transformer_blocks[0]
            note(folder, "units", [type(transformer).__name__, type(block).__name__])
            local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters.values())
            note(folder, "sharded", [local, sum(p.numel() for p in parameters.values())])
            return transformer, optimizer, schedule

        Accelerator.prepare = noting

    return prepare


@pytest.fixture
def deepspeed(launch, deepspeed_on_the_cpu, tmp_path):  # noqa: ARG001
    """Run under a DeepSpeed configuration; returns what was said."""

    def start(config: Path, **changes) -> str:
        environment = launched_with(config, 1) | {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
        child = launch(environment=environment, prepare=note_prepared(tmp_path), **SETTINGS | changes)
        return finish([child], [0])[0]

    return start


def lora_file(output: Path) -> tuple[dict, dict]:
    with safe_open(output / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    return load_file(output / "pytorch_lora_weights.safetensors"), metadata


def rates(output: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(output)]


@pytest.fixture
def plain(run, tmp_path):
    """The run without an engine, to hold others against."""
    return run(output_dir=tmp_path / "plain", **SETTINGS)


@pytest.mark.parametrize("config", ["deepspeed_zero2.yaml", "deepspeed_zero2_offload.yaml"])
def test_zero2_in_bf16_is_the_plain_run(script, plain, deepspeed, config, tmp_path):
    """To fp32 rounding (it divides by the norm where torch multiplies): clipped once, with the same warm-up. Resumed
    it is the run never stopped, to the bit."""
    said = deepspeed(CONFIGS / config)
    output = tmp_path / "output"
    weights, metadata = lora_file(output)
    expected, expected_metadata = lora_file(plain)
    assert weights.keys() == expected.keys() and metadata == expected_metadata
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7, msg=name)  # dtypes, too
    assert rates(output) == rates(plain) and rates(output)[0] == pytest.approx(1e-3 / 3)
    norms = [[row["grad_norm"] for row in read_metrics(folder)] for folder in (output, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[1]) > SETTINGS["max_grad_norm"]
    (dtypes,) = notes(tmp_path, "dtypes", 0)
    assert dtypes == {"base": "torch.bfloat16", "lora": "torch.bfloat16", "learns": ["torch.float32"]}
    checkpoint = output / "checkpoint-3"
    (states,) = checkpoint.rglob("*model_states.pt")
    assert all("lora" in name for name in torch.load(states, weights_only=False)["module"])  # the base is not in it

    shutil.rmtree(output / "checkpoint-6")
    (output / script.LORA_FILE).unlink()
    deepspeed(CONFIGS / config, resume_from_checkpoint="latest")
    assert same_tensors(lora_file(output)[0], weights) and rates(output) == rates(plain)
    assert "Traceback" not in said


def test_zero2_in_fp16(plain, deepspeed, tmp_path):
    """Its loss scaling may skip steps; the base and what computes are fp16, what learns is not."""
    longer = {"max_train_steps": 20, "gradient_accumulation_steps": 1}
    deepspeed(CONFIGS / "deepspeed_zero2.yaml", mixed_precision="fp16", **longer)
    (dtypes,) = notes(tmp_path, "dtypes", 0)
    assert dtypes == {"base": "torch.float16", "lora": "torch.float16", "learns": ["torch.float32"]}
    weights, metadata = lora_file(tmp_path / "output")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert metadata == lora_file(plain)[1] and weights.keys() == lora_file(plain)[0].keys()
    learned = [weight.abs().max() for name, weight in weights.items() if "lora_B" in name]
    assert min(learned) > 0 and all(weight.isfinite().all() for weight in weights.values())


def test_zero3_gathers_the_lora(plain, deepspeed, tmp_path):
    """Its own linear layer rounds in another way: the weights are near those of the plain run, not the same."""
    ask = {"validation_prompt": "a red square", "num_inference_steps": 1}
    deepspeed(CONFIGS / "deepspeed_zero3.yaml", **ask)
    output = tmp_path / "output"
    weights, metadata = lora_file(output)
    expected, expected_metadata = lora_file(plain)
    assert metadata == expected_metadata and rates(output) == rates(plain)
    for name, weight in expected.items():
        assert weights[name].shape == weight.shape and weights[name].dtype == torch.float32
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-3, msg=name)  # 4 whole steps are 4e-3
    losses = [[row["loss"] for row in read_metrics(folder)] for folder in (output, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert len(list((output / "validation").iterdir())) == 2  # before the first step, and at the end
    shutil.rmtree(output / "checkpoint-6")
    deepspeed(CONFIGS / "deepspeed_zero3.yaml", resume_from_checkpoint="latest")
    assert same_tensors(lora_file(output)[0], weights)


@pytest.mark.parametrize("defined", ["optimizer", "optimizer and scheduler"])
def test_what_deepspeed_defines_is_not_defined_twice(plain, deepspeed, tmp_path, defined):
    """The optimizer of a DeepSpeed file takes the place of --optimizer's; the schedule, with its warm-up, is the
    flags', or the file's where it has one."""
    content = {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.95], "torch_adam": True},
        },
    }
    if "scheduler" in defined:
        params = {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
        content["scheduler"] = {"type": "WarmupDecayLR", "params": params | {"warmup_type": "linear"}}
    (tmp_path / "deepspeed.json").write_text(json.dumps(content))
    config = tmp_path / "config.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 1\n"
        f"deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'deepspeed.json'}\n  zero3_init_flag: false\n"
    )
    deepspeed(config, checkpointing_steps=100)
    expected = rates(plain)
    if "scheduler" in defined:  # DeepSpeed's warm-ups take their first step at zero
        expected = [0.0, *expected[:-1]]
    assert rates(tmp_path / "output") == pytest.approx(expected, abs=1e-9)
    assert min(w.abs().max() for n, w in lora_file(tmp_path / "output")[0].items() if "lora_B" in n) > 0


def test_a_checkpoint_of_another_engine_is_refused(script, run, deepspeed):
    deepspeed(CONFIGS / "deepspeed_zero2.yaml")
    with pytest.raises(script.RunError, match="engine was deepspeed zero2, is replicated") as error:
        run(**SETTINGS, resume_from_checkpoint="latest")
    assert error.value.exit_code == 2


def test_a_sharded_checkpoint_is_refused_to_another_number_of_processes(script, tmp_path, caplog):
    words = ["--pretrained_model_name_or_path", "m", "--resume_from_checkpoint", str(tmp_path)]
    args, content = script.get_args(words), {"saved_at": 1, "state": {}, "sizes": {}}
    for engine in ("fsdp2", "replicated"):
        settings = {"engine": engine, "num_processes": 2}
        (tmp_path / "training_state.json").write_text(json.dumps(content | {"settings": settings}))
        assert script.find_checkpoint(args, settings) == tmp_path and caplog.text == ""
        if engine == "fsdp2":
            with pytest.raises(script.RunError, match="num_processes was 2, is 4"):
                script.find_checkpoint(args, settings | {"num_processes": 4})
    assert script.find_checkpoint(args, settings | {"num_processes": 4}) == tmp_path
    assert "num_processes was 2, is 4" in caplog.text


def test_two_values_for_accumulation_are_refused(launch):
    child = launch(environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert child.wait() == 2
    assert "accelerate's configuration says 4: give the same --gradient_accumulation_steps" in child.said()


# ---- FSDP2. accelerate starts it on accelerators only, so the tests set its state on CPU processes ---------------


def pretend_fsdp2(folder: Path):
    """The engine and plugin that accelerate takes from the configuration file, on CPU processes."""

    def prepare(_script) -> None:
        original = Accelerator.__init__

        def init(self, *arguments, **keywords):
            original(self, *arguments, **keywords)
            self.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()

        Accelerator.__init__ = init
        note_prepared(folder)(_script)

    return prepare


@pytest.mark.long
def test_fsdp2_is_the_plain_run_of_two_processes(script, launch, tmp_path):
    """To the bit in bf16; resumed it is the run never stopped. The block is the unit, the base is spread."""
    ask = {"validation_prompt": "a red square:::a blue square:::a green square", "num_inference_steps": 1}
    small = {"height": 32, "width": 48, "max_num_frames": 5}  # bf16 is slow on CPUs
    settings = SETTINGS | ask | small | {"max_grad_norm": 1.0, "eval_split": 1}
    finish(launch(2, output_dir=tmp_path / "plain", **settings))
    environment = launched_with(CONFIGS / "fsdp2.yaml", 2) | {"ACCELERATE_USE_CPU": "true"}
    fsdp2 = {"environment": environment, "prepare": pretend_fsdp2(tmp_path)}
    finish(launch(2, **fsdp2, **settings))
    output = tmp_path / "output"
    weights, metadata = lora_file(output)
    expected, expected_metadata = lora_file(tmp_path / "plain")
    assert same_tensors(weights, expected) and metadata == expected_metadata
    assert rates(output) == rates(tmp_path / "plain")
    names = [sorted(path.name for path in folder.glob("validation/*")) for folder in (output, tmp_path / "plain")]
    assert names[0] == names[1] and len(names[0]) == 6
    held_out = [
        {row["step"]: row["validation/loss"] for row in read_metrics(folder, "validation/loss")}
        for folder in (output, tmp_path / "plain")
    ]
    assert held_out[0] == held_out[1] and list(held_out[0]) == [0, 6]
    for rank in (0, 1):
        assert notes(tmp_path, "units", rank) == [["FSDPCogVideoXTransformer3DModel", "FSDPCogVideoXBlock"]]
        assert notes(tmp_path, "dtypes", rank)[0]["base"] == "torch.bfloat16"
        assert notes(tmp_path, "dtypes", rank)[0]["lora"] == "torch.float32"
        ((local, total),) = notes(tmp_path, "sharded", rank)
        assert local < 0.6 * total
    for name in ("checkpoint-3", "checkpoint-6"):
        assert same_tensors(lora_file(output / name)[0], lora_file(tmp_path / "plain" / name)[0])
        assert not list((output / name).glob("*model*"))  # the base is not in it

    shutil.rmtree(output / "checkpoint-6")
    (output / script.LORA_FILE).unlink()
    finish(launch(2, **fsdp2, **settings, resume_from_checkpoint="latest"))
    assert same_tensors(lora_file(output)[0], expected)


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
@pytest.mark.parametrize("lever", [{"quantize_base": "nf4"}, {"compile": True}])
def test_levers_that_an_engine_does_not_take_are_refused(script, flags, monkeypatch, engine, lever):
    accelerator = SimpleNamespace(mixed_precision="bf16", gradient_accumulation_steps=1, distributed_type=engine)
    monkeypatch.setattr(script, "Accelerator", lambda **_: accelerator)
    with pytest.raises(script.RunError, match=f"do not work with {engine.value}") as error:
        script.get_accelerator(script.get_args(flags(**lever)))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("is_fsdp2", "dtype", "advice"), [(False, "bf16", "fsdp_version: 2"), (True, "fp16", "bf16")])
def test_fsdp_that_cannot_train_is_refused(script, flags, monkeypatch, is_fsdp2, dtype, advice):
    fsdp = {"distributed_type": DistributedType.FSDP, "is_fsdp2": is_fsdp2}
    accelerator = SimpleNamespace(mixed_precision=dtype, gradient_accumulation_steps=1, **fsdp)
    monkeypatch.setattr(script, "Accelerator", lambda **_: accelerator)
    with pytest.raises(script.RunError, match=advice) as error:
        script.get_accelerator(script.get_args(flags()))
    assert error.value.exit_code == 2
