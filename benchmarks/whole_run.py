"""Wall time and host memory of a whole run, from the command line to the saved LoRA, beside another trainer's.

    python benchmarks/whole_run.py DIFFUSERS/examples/cogvideo/train_cogvideox_lora.py [--dtype bf16] [--rounds 3]

The other trainer must take the original script's flags. Both encode 16 generated clips of 17 x 192 x 288, train for 60
steps with recomputation, and sample nothing. The model has random weights: a transformer of 8 layers and 512 channels
in the real architecture, and the real VAE at a quarter of its width. This project runs twice a round, the second time
with --checkpoint_policy attention, which the other does not have. The runs alternate, and each round begins with
another one. Each run has a process, an output folder and a data folder of its own, so that nothing is encoded already.
Before them, each trainer runs once for two steps, which reads all files from the disk. Prints the seconds and the peak
resident memory of every run, and a table.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median

import models

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
LAYERS, HEADS, CLIPS = 8, 8, 16  # heads of 64 channels
SIZE = (17, 192, 288)  # frames, height, width
VAE_WIDTHS = [32, 64, 64, 128]


def make_inputs(folder: Path, layers: int, clips: int, size: tuple[int, int, int]) -> None:
    """folder/model-5b and folder/clips. (The original script takes the dtype that it loads from the path.)"""
    import tiny
    from diffusers import AutoencoderKLCogVideoX

    transformer = {"num_attention_heads": HEADS, "attention_head_dim": 64, "num_layers": layers, "time_embed_dim": 512}
    channels = {"in_channels": 16, "out_channels": 16}
    tiny.make_model(folder / "model-5b", **transformer, **channels)
    vae = AutoencoderKLCogVideoX.from_config(models.vae_config("5b") | {"block_out_channels": VAE_WIDTHS})
    vae.save_pretrained(folder / "model-5b" / "vae")
    tiny.make_clips(folder / "clips", clips, *size)


def measure(
    trainer: Path, extra: list[str], folder: Path, args: argparse.Namespace, steps: int
) -> tuple[float, float]:
    """Seconds of a run of `steps`, from the start of its process to its end, and MB at its peak (the largest process).
    Ends the benchmark if the run fails."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        shutil.copytree(folder / "clips", Path(run, "clips"))
        frames, height, width = args.size
        flags = {
            "pretrained_model_name_or_path": folder / "model-5b", "instance_data_root": f"{run}/clips",
            "caption_column": "prompts.txt", "video_column": "videos.txt", "output_dir": f"{run}/lora",
            "max_num_frames": frames, "height": height, "width": width, "rank": 64, "lora_alpha": 64,
            "mixed_precision": args.dtype, "train_batch_size": 1, "max_train_steps": steps, "lr_warmup_steps": 0,
            "seed": 0,
        }  # fmt: skip
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(trainer), *words, "--gradient_checkpointing", "--enable_slicing", *extra]
        with Path(run, "output").open("w") as output:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        if status or not Path(run, "lora", "pytorch_lora_weights.safetensors").is_file():
            sys.exit(f"{trainer} failed:\n{Path(run, 'output').read_text()[-3000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other trainer's script")
    parser.add_argument("--dtype", choices=["no", "bf16"], default="bf16", help="--mixed_precision of all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("F", "H", "W"))
    args = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    own = ROOT / "train_cogvideox_lora.py"
    trainers = {
        "the other": (args.other, []),
        "this project": (own, []),
        "this project, attention kept": (own, ["--checkpoint_policy", "attention"]),
    }
    found, order = {name: [] for name in trainers}, deque(trainers)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.layers, args.clips, args.size)
        for trainer in trainers.values():
            measure(*trainer, Path(folder), args, steps=2)
        for number in range(1, args.rounds + 1):
            order.rotate(-1)  # each is first in turn: the machine's speed may change during a round
            for name in order:
                found[name].append(measure(*trainers[name], Path(folder), args, args.steps))
                seconds, peak = found[name][-1]
                print(f"round {number}, {name}: {seconds:.1f} s, {peak:.0f} MB", flush=True)
    print("\n| trainer | seconds, median (min to max) | of the other's, pair by pair | MB at the peak |")
    print("|---|---|---|---|")
    for name, runs in found.items():
        seconds = [run[0] for run in runs]
        parts = [own / other for own, (other, _) in zip(seconds, found["the other"], strict=True)]
        spread = f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        share = f"{median(parts):.2f} ({min(parts):.2f} to {max(parts):.2f})"
        print(f"| {name} | {spread} | {share} | {max(peak for _, peak in runs):.0f} |")


if __name__ == "__main__":
    main()
