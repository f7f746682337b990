"""Try both scripts from end to end in under a minute on two cores, with tiny models and two clips: for CI.

    python demo/smoke.py FOLDER

Each is launched as a user launches it: two steps and a checkpoint, then a resume to the third step, with a sample.
Then diffusers' pipeline loads the LoRA and samples with it. Exit code 1 and the output of what failed, else 0.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"t2v": "train_cogvideox_lora.py", "i2v": "train_cogvideox_image_to_video_lora.py"}


def launch(folder: Path, kind: str, *more: str) -> subprocess.Popen:
    """Start a training. Its output goes to a file, to be shown if it fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet",
        "--config_file", str(ROOT / "accelerate_configs/cpu.yaml"), str(ROOT / SCRIPTS[kind]),
        "--pretrained_model_name_or_path", str(folder / kind), "--instance_data_root", str(folder / "clips"),
        "--precompute_dir", str(folder / f"{kind} encoded"), "--caption_column", "prompts.txt",
        "--video_column", "videos.txt", "--height", "64", "--width", "96", "--max_num_frames", "9", "--rank", "4",
        "--lora_alpha", "4", "--train_batch_size", "1", "--checkpointing_steps", "2", "--num_inference_steps", "2",
        "--mixed_precision", "no", "--seed", "0", "--output_dir", str(folder / f"{kind} lora"), *more,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / f"{kind}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run_both(folder: Path, *more: str, **more_of_kind: list[str]) -> None:
    """Train with both scripts at the same time. Raises SystemExit with the output of one that fails."""
    started = {kind: launch(folder, kind, *more, *more_of_kind.get(kind, [])) for kind in SCRIPTS}
    for kind, process in started.items():
        if process.wait() != 0:
            said = (folder / f"{kind}.log").read_text()
            sys.exit(f"{SCRIPTS[kind]} ended with exit code {process.returncode}:\n{said}")


def check(folder: Path, kind: str) -> None:
    """Sample with the LoRA that was trained. Raises AssertionError where something is missing."""
    output = folder / f"{kind} lora"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3, "three steps are logged"
    assert len(list(output.glob("checkpoint-*"))) == 2, "checkpoints of steps 2 and 3"
    assert list((output / "validation").glob("test_step-000003*.mp4")), "a sample of the last step"
    assert f"Resumed {output / 'checkpoint-2'}" in (folder / f"{kind}.log").read_text(), "it was resumed"
    pipe = DiffusionPipeline.from_pretrained(folder / kind)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(output)
    given = {"prompt": "a red square", "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    if kind == "i2v":
        given["image"] = torch.rand(3, 64, 96)
    frames = pipe(**given, output_type="np").frames[0]
    assert frames.shape == (9, 64, 96, 3), "the pipeline samples with the LoRA"


def main(folder: Path) -> None:
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    tiny.make_clips(folder / "clips", count=2)
    for kind in SCRIPTS:
        tiny.make_model(folder / kind, kind)
    run_both(folder, "--max_train_steps", "2")
    image = folder / "start.png"
    Image.fromarray(tiny.moving_square(1, 64, 96)[0]).save(image)
    sample = ["--max_train_steps", "3", "--resume_from_checkpoint", "latest", "--validation_prompt", "a red square"]
    run_both(folder, *sample, i2v=["--validation_images", str(image)])
    for kind in SCRIPTS:
        check(folder, kind)
    print(f"Both scripts trained, resumed, sampled, and their LoRAs load: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
