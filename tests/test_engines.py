"""DeepSpeed ZeRO-2 trains what the plain engine trains: the same weights, files, schedule and clipping. ZeRO-3 and
FSDP are refused.

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
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, DynamoBackend
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
    """Notes the dtypes of the base, of what is computed with and of what learns."""

    def prepare(_script) -> None:
        original = Accelerator.prepare

        def noting(self, *arguments, **keywords):
            transformer, optimizer, schedule = original(self, *arguments, **keywords)
            parameters = dict(self.unwrap_model(transformer).named_parameters())
            dtypes = {"lora" if "lora" in name else "base": str(p.dtype) for name, p in parameters.items()}
            learns = {str(p.dtype) for group in optimizer.param_groups for p in group["params"]}
            note(folder, "dtypes", dtypes | {"learns": sorted(learns)})
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
            "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "torch_adam": True},
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
    hyper = {"adam_weight_decay": 0.03, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-7}
    deepspeed(config, checkpointing_steps=100, **hyper)
    (states,) = (tmp_path / "output").glob("checkpoint-*/pytorch_model/*optim_states.pt")
    group = torch.load(states, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.03, (0.8, 0.9), 1e-7)
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


def test_a_checkpoint_of_deepspeed_is_refused_to_another_number_of_processes(script, tmp_path, caplog):
    words = ["--pretrained_model_name_or_path", "m", "--resume_from_checkpoint", str(tmp_path)]
    args, content = script.get_args(words), {"saved_at": 1, "state": {"step": 3}, "sizes": {}}
    for engine in ("deepspeed zero2", "replicated"):
        settings = {"engine": engine, "num_processes": 2}
        (tmp_path / "training_state.json").write_text(json.dumps(content | {"settings": settings}))
        assert script.find_checkpoint(args, settings) == tmp_path and caplog.text == ""
        if engine == "deepspeed zero2":
            with pytest.raises(script.RunError, match="num_processes was 2, is 4"):
                script.find_checkpoint(args, settings | {"num_processes": 4})
    assert script.find_checkpoint(args, settings | {"num_processes": 4}) == tmp_path
    assert "num_processes was 2, is 4" in caplog.text


def test_two_values_for_accumulation_are_refused(launch):
    child = launch(environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert child.wait() == 2
    assert "accelerate's configuration says 4: give the same --gradient_accumulation_steps" in child.said()


@pytest.mark.parametrize("lever", [{"quantize_base": "nf4"}, {"compile": True}, {"offload_base": True}])
def test_levers_that_deepspeed_does_not_take_are_refused(script, flags, monkeypatch, lever):
    accelerator = SimpleNamespace(
        mixed_precision="bf16", gradient_accumulation_steps=1, distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(
            deepspeed_plugin=SimpleNamespace(zero_stage=2), dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)
        ),
        num_processes=1,
    )  # fmt: skip
    monkeypatch.setattr(script, "Accelerator", lambda **_: accelerator)
    with pytest.raises(script.RunError, match="do not work with DeepSpeed") as error:
        script.get_accelerator(script.get_args(flags(**lever)))
    assert error.value.exit_code == 2


# ---- engines that are gone: a configuration of accelerate, a file of DeepSpeed, a checkpoint ----------------------

INSTEAD = "which is gone: take accelerate_configs/multi_gpu.yaml with --offload_base"


def configuration(folder: Path, engine: str, content: str) -> Path:
    """A configuration of accelerate for this engine, as a user may have it."""
    path = folder / "config.yaml"
    common = "compute_environment: LOCAL_MACHINE\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: -1\n"
    path.write_text(f"{common}distributed_type: {engine}\n{content}\n")
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_is_refused(launch, tmp_path, version):
    """Of both versions, with one message for all processes of a machine."""
    config = configuration(tmp_path, "FSDP", f"fsdp_config:\n  fsdp_version: {version}")
    said = "".join(finish(launch(2, environment=launched_with(config, 2)), [2, 2]))
    assert said.count(f"error: accelerate's configuration asks for FSDP, {INSTEAD}\n") == 1
    assert said.count("error:") == 1 and "Traceback" not in said and not (tmp_path / "output").exists()


@pytest.mark.parametrize("is_in_a_file", [False, True], ids=["of accelerate", "of DeepSpeed"])
@pytest.mark.usefixtures("deepspeed_on_the_cpu")
def test_zero3_is_refused(launch, tmp_path, is_in_a_file):
    content = "zero_stage: 3"
    if is_in_a_file:
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}))
        content = f"deepspeed_config_file: {file}"
    content = f"deepspeed_config:\n  {content}\n  zero3_init_flag: false"
    environment = launched_with(configuration(tmp_path, "DEEPSPEED", content), 1)
    child = launch(environment=environment | {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"})
    (said,) = finish([child], [2])
    assert said.count(f"error: accelerate's configuration asks for DeepSpeed ZeRO-3, {INSTEAD}\n") == 1
    assert "Traceback" not in said and not (tmp_path / "output").exists()


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed zero3"])
def test_a_checkpoint_of_an_engine_that_is_gone_is_refused_with_the_way_on(script, run, tmp_path, engine):
    output = run()
    state = output / "checkpoint-2" / "training_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"settings": content["settings"] | {"engine": engine}}))
    way = f"start a new run from its LoRA: --init_lora {state.parent} and another --output_dir"
    for wanted in ("latest", "checkpoint-2"):
        with pytest.raises(script.RunError) as error:
            run(max_train_steps=3, resume_from_checkpoint=wanted)
        assert str(error.value).endswith(f"checkpoint-2 was written with {engine}, which is gone: {way}")
        assert error.value.exit_code == 2
    own = {"rank": None, "lora_alpha": None, "learning_rate": 1e-12, "max_train_steps": 1}
    begun = run(init_lora=state.parent, output_dir=tmp_path / "another", **own)
    weights, expected = (lora_file(folder)[0] for folder in (begun, output))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-8, msg=name)
