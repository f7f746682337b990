"""The scripts on a GPU, with the real architectures and random weights: `pytest -m gpu tests/test_gpu.py`.

Each test starts a script as a user does, in a process of its own. The model of 5B with its text encoder takes 21 GB on
the disk. Not run yet: no GPU was at hand when this was written.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import models as published
import pytest
import tiny
import train_step
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

HAS_GPU = shutil.which("nvidia-smi") is not None  # the tests' own process is kept on the CPU
pytestmark = [
    pytest.mark.gpu, pytest.mark.timeout(3600), pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: pytest -m gpu tests/test_gpu.py"),
]  # fmt: skip
SMALLEST = "--gradient_checkpointing --offload_activations --use_8bit_adam --quantize_base nf4 --enable_tiling"


def environment() -> dict[str, str]:
    """Without what keeps the other tests on the CPU."""
    hidden = {"CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A whole model of a published size with random weights, made once for all tests."""
    made = {}

    def build_once(name: str) -> Path:
        if name not in made:
            folder = tiny.make_model(tmp_path_factory.mktemp("model") / name, "i2v" if "i2v" in name else "t2v")
            published.write_configs(name, folder)
            code = (
                "import sys, torch\n"
                "from diffusers import AutoencoderKLCogVideoX as V, CogVideoXTransformer3DModel as T\n"
                "from transformers import T5Config, T5EncoderModel as E\n"
                "folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])\n"
                "torch.set_default_dtype(dtype)\n"
                "with torch.device('cuda'):\n"
                "    for part, make in (('transformer', T), ('vae', V)):\n"
                "        model = make.from_config(make.load_config(folder, subfolder=part))\n"
                "        model.save_pretrained(f'{folder}/{part}')\n"
                "    config = T5Config.from_json_file(f'{folder}/text_encoder/config.json')\n"
                "    E(config).save_pretrained(f'{folder}/text_encoder')\n"
            )
            words = [sys.executable, "-c", code, folder, published.dtype_name(name)]
            subprocess.run(words, check=True, env=environment())
            made[name] = folder
        return made[name]

    return build_once


@pytest.fixture
def command(build, tmp_path):
    """The command of a run of a model, on two clips of its size."""

    def make(name: str, more: str, launcher: tuple[str, ...] = (sys.executable,)) -> list[str]:
        frames, height, width = published.clip_size(name)
        clips = tiny.make_clips(tmp_path / "clips", count=2, num_frames=frames, height=height, width=width)
        dtype = "fp16" if name == "2b" else "bf16"
        words = (
            f"--pretrained_model_name_or_path {build(name)} --instance_data_root {clips} --caption_column prompts.txt "
            f"--video_column videos.txt --output_dir {tmp_path / 'output'} --rank 16 --lora_alpha 16 "
            f"--height {height} --width {width} --max_num_frames {frames} --train_batch_size 1 "
            f"--mixed_precision {dtype} --seed 0 {more}"
        )
        return [*launcher, str(ROOT / f"{published.script_name(name)}.py"), *words.split()]

    return make


def finish(command: list[str], code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def check_lora(output: Path, steps: int) -> None:
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == steps


@pytest.mark.parametrize("name", published.TRANSFORMERS)
def test_a_whole_run_and_its_continuation(command, tmp_path, name):
    """Encoding with T5-XXL and the VAE, training (2B: the gradient scaler of fp16), sampling, resuming."""
    prompt = f"--validation_prompt a --num_inference_steps 2 {SMALLEST}"
    if "i2v" in name:
        Image.new("RGB", (720, 480), "red").save(tmp_path / "start.png")
        prompt += f" --validation_images {tmp_path / 'start.png'}"
    finish(command(name, f"--max_train_steps 2 {prompt}"))
    check_lora(tmp_path / "output", 2)
    finish(command(name, f"--max_train_steps 4 --resume_from_checkpoint latest {prompt}"))
    check_lora(tmp_path / "output", 4)
    samples = sorted(path.name for path in (tmp_path / "output" / "validation").glob("*.mp4"))
    assert [name.split("_prompt")[0] for name in samples] == [
        "test_step-000002", "test_step-000004", "validation_step-000000",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", ["", "--quantize_base int8", "--quantize_base fp8", "--compile"])
def test_levers(command, tmp_path, flags):
    finish(command("2b", f"--max_train_steps 2 --gradient_checkpointing --checkpoint_policy attention {flags}"))
    check_lora(tmp_path / "output", 2)


def test_offloaded_steps_are_the_plain_ones(command, tmp_path):
    """Copies run beside the computation: a race would change gradients. To what bf16 kernels differ by."""
    norms = []
    for flags in ("", "--offload_activations"):
        more = f"--max_train_steps 8 --learning_rate 1e-3 --gradient_checkpointing {flags}"
        finish(command("5b", f"{more} --output_dir {tmp_path / f'out{flags}'}"))
        rows = (tmp_path / f"out{flags}" / "metrics.jsonl").read_text().splitlines()
        norms.append([json.loads(row)["grad_norm"] for row in rows])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_cuda_is_up(command, tmp_path, workers):
    """Clips are decoded in forked processes; SIGTERM writes a checkpoint; the run resumes."""
    more = f"--gradient_checkpointing --dataloader_num_workers {workers} --max_train_steps"
    with subprocess.Popen(command("2b", f"{more} 500"), env=environment()) as process:
        metrics = tmp_path / "output" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    step = json.loads((checkpoint / "training_state.json").read_text())["state"]["step"]
    finish(command("2b", f"{more} {step + 1} --resume_from_checkpoint latest"))
    check_lora(tmp_path / "output", step + 1)


def test_nccl_with_one_process(command, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1")
    finish(command("2b", "--max_train_steps 2 --gradient_checkpointing", launcher))
    check_lora(tmp_path / "output", 2)


def test_fsdp2(command, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
    finish(command("5b", "--max_train_steps 2 --gradient_checkpointing", tuple(launcher)))
    check_lora(tmp_path / "output", 2)


@pytest.mark.parametrize("setting", ["recomputed", "attention kept", "offloaded, 8-bit Adam, nf4"])
def test_peak_is_the_one_that_was_counted(build, setting):
    """The allocator rounds, and 8-bit products take some room of their own: to 10 %."""
    words = ["5b", "--settings", setting, "--rank", "64", "--steps", "2", "--folder", str(build("5b"))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *words], capture_output=True, text=True,
        env=environment(), check=True,
    )  # fmt: skip
    measured = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    assert measured == pytest.approx(train_step.counted("5b", setting, 64).peak, rel=0.1)
