"""Peak host memory of training on few and on many clips of 49 x 480 x 720: it must not grow with their number.

    python benchmarks/host_memory.py [--kind i2v]

Runs the text-to-video or the image-to-video script on a tiny model, with 4 and with 24 generated clips, each run in a
process of its own. Prints the peak resident memory of both (as the kernel counts it, for the process and for its
decoding workers) and the growth per clip. Takes more than a quarter of an hour on 2 cores.
"""

import argparse
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
SCRIPTS = {"t2v": "train_cogvideox_lora", "i2v": "train_cogvideox_image_to_video_lora"}


def measure(kind: str, model: Path, clips: Path, output: Path, workers: int) -> tuple[float, float, float]:
    """Peak resident MB of a training process and of its largest worker, and the seconds that the run took."""
    command = [sys.executable, __file__, "--child", kind, str(model), str(clips), str(output), str(workers)]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    own, worker = done.stdout.strip().splitlines()[-1].split()
    return float(own), float(worker), time.perf_counter() - started


def child(kind: str, model: str, clips: str, output: str, workers: str) -> None:
    script = importlib.import_module(SCRIPTS[kind])
    script.main(
        script.get_args(
            f"--pretrained_model_name_or_path {model} --instance_data_root {clips} --caption_column prompts.txt "
            f"--video_column videos.txt --precompute_dir {output}/precomputed --output_dir {output} --height 480 "
            f"--width 720 --max_num_frames 49 --rank 4 --train_batch_size 1 --num_train_epochs 1 "
            f"--mixed_precision no --dataloader_num_workers {workers} --seed 0".split()
        )
    )
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print(*(resource.getrusage(kind).ru_maxrss / 1024 for kind in kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SCRIPTS, default="t2v")
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--many", type=int, default=24)
    parser.add_argument("--workers", type=int, default=0, help="--dataloader_num_workers of the runs")
    args = parser.parse_args()
    import tiny

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        size = {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
        model = tiny.make_model(folder / "model", args.kind, **size)
        peaks = {}
        for count in (args.few, args.many):
            clips = tiny.make_clips(folder / f"clips-{count}", count, num_frames=49, height=480, width=720)
            own, worker, seconds = measure(args.kind, model, clips, folder / f"output-{count}", args.workers)
            peaks[count] = own
            print(f"{count:3} clips: peak {own:.0f} MB, largest worker {worker:.0f} MB, {seconds:.0f} s", flush=True)
        growth = (peaks[args.many] - peaks[args.few]) / (args.many - args.few)
        print(f"growth: {growth:.1f} MB per clip")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
