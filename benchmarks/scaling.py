"""How the cost of a step grows with the number of processes: steps per second, and the bytes that a process sends.

    python benchmarks/scaling.py [--kind i2v] [--processes 1 2] [--rank 256]   measured, on a small model
    python benchmarks/scaling.py --paper                                       computed, for 2B and 5B on many GPUs

The first command runs the script with torchrun on a generated model and clips, with batch size 1 and one thread per
process. Bytes are what the kernel counts on the loopback interface; a ring all-reduce sends 2 (n - 1) / n times the
gradients from each of n processes. The tables are in benchmarks/README.md and in README.md.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import models
from host_memory import ROOT, SCRIPTS

FIRST, LAST = 20, 120  # the measurement is between these steps


def bytes_sent() -> int:
    """Bytes sent through the loopback interface since the machine started, from /proc/net/dev."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def measure(kind: str, processes: int, rank: int, model: Path, folder: Path) -> dict:
    """Runs until step LAST. Returns the seconds per step, bytes per step and process, and bytes of the gradients."""
    output = folder / f"output-{processes}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29641",
        str(ROOT / f"{SCRIPTS[kind]}.py"), "--pretrained_model_name_or_path", str(model),
        "--instance_data_root", str(folder / "clips"), "--caption_column", "prompts.txt",
        "--video_column", "videos.txt", "--precompute_dir", str(folder / "precomputed"),
        "--output_dir", str(output), "--height", "96", "--width", "128", "--max_num_frames", "17",
        "--rank", str(rank), "--train_batch_size", "1", "--max_train_steps", str(LAST), "--seed", "0",
    ]  # fmt: skip
    metrics, seen = output / "metrics.jsonl", []
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for step in (FIRST, LAST):
            while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
                if run.poll() not in (None, 0):
                    sys.exit(run.stderr.read().decode()[-2000:])
                time.sleep(0.002)
            seen.append(bytes_sent())
    finally:
        if len(seen) < 2:
            run.send_signal(signal.SIGTERM)
        run.communicate()
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()][FIRST:LAST]
    from safetensors.torch import load_file

    parameters = sum(weight.numel() for weight in load_file(output / "pytorch_lora_weights.safetensors").values())
    sent = (seen[1] - seen[0]) / (LAST - FIRST) / processes
    return {"seconds": median(seconds), "sent": sent, "gradients": 4 * parameters}


SIZES = {name: models.transformer_config(name.lower()) for name in ("2B", "5B")}
TOKENS = 226 + 13 * 30 * 45  # of a prompt and of a clip of 49 x 480 x 720
FLOPS = 4e14  # per second and GPU: an H100 in bf16 at 40 % of its peak
LINKS = {  # number of GPUs, and bytes per second of an all-reduce over the slowest link between them, one way
    "8 GPUs, NVLink": (8, 300e9), "8 GPUs, PCIe 4": (8, 20e9), "64 GPUs, 100 Gb/s Ethernet": (64, 10e9)
}  # fmt: skip


def step_flops(width: int, layers: int) -> float:
    """Operations of a step with recomputation: two forward passes, and a backward pass that computes no gradients of
    the frozen base's weights. Per layer, a token costs 12 width^2 multiplications in the linear layers and 2 tokens x
    width in attention."""
    linear = 2 * 12 * width**2 * layers * TOKENS
    attention = 4 * TOKENS**2 * width * layers
    return 2 * (linear + attention) + linear + 2.5 * attention


def on_paper() -> None:
    """The time of computation and of communication; the models are built without weights, the LoRA by the script."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(SCRIPTS["t2v"])
    print(f"| model, rank | base in bf16 | gradients | a step computes | {' | '.join(LINKS)} |\n" + "|---" * 7 + "|")
    for name, size in SIZES.items():
        for rank in (64, 128):
            with torch.device("meta"):
                transformer = CogVideoXTransformer3DModel.from_config(size)
                base = 2 * sum(weight.numel() for weight in transformer.parameters())
                trainable = script.add_lora(transformer.requires_grad_(False), rank, rank)
            gradients = 4 * sum(weight.numel() for weight in trainable)
            width = 64 * size["num_attention_heads"]
            seconds = step_flops(width, size["num_layers"]) / FLOPS
            sent = [2 * (count - 1) / count * gradients / speed for count, speed in LINKS.values()]  # seconds
            cells = [f"{1e3 * one:.0f} ms, {100 * one / seconds:.1f} %" for one in sent]
            sizes = f"{base / 1e9:.1f} GB | {gradients / 1e6:.0f} MB | {seconds:.2f} s"
            print(f"| {name}, {rank} | {sizes} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SCRIPTS, default="t2v")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--paper", action="store_true", help="compute the cost instead of measuring it")
    args = parser.parse_args()
    if args.paper:
        return on_paper()
    tiny = importlib.import_module("tiny")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = tiny.make_model(folder / "model", args.kind, num_layers=4)
        tiny.make_clips(folder / "clips", 8, num_frames=17, height=96, width=128)
        print("| processes | steps/s | clips/s | sent per step and process | LoRA's gradients |\n" + "|---" * 5 + "|")
        for processes in args.processes:
            found = measure(args.kind, processes, args.rank, model, folder)
            rate = 1 / found["seconds"]
            sizes = f"{found['sent'] / 1e6:.3f} MB | {found['gradients'] / 1e6:.3f} MB"
            print(f"| {processes} | {rate:.2f} | {rate * processes:.2f} | {sizes} |", flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    main()
