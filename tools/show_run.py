"""Show what a training run left in its output folder: the files, the loss curve, the videos.

    python tools/show_run.py OUTPUT_DIR [--picture FILE.png]

Reads metrics.jsonl and lists the rest; needs no GPU and loads no model. For each video of the last validation it
writes a contact sheet beside it (PNG, frames from left to right), for a look without a player. --picture puts the loss
curve of the card and these sheets into one.
"""

import argparse
import json
import sys
from pathlib import Path

import decord
import numpy as np
from PIL import Image

BARS = "▁▂▃▄▅▆▇█"


def read_metrics(path: Path) -> list[dict]:
    """One dict an optimizer step: step, loss, lr, grad_norm, seconds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_curve(losses: list[float], width: int = 60) -> str:
    """Means of up to `width` equal stretches of the run, as a row of bars from its lowest to its highest."""
    stretches = np.array_split(np.array(losses, dtype=float), min(width, len(losses)))
    means = np.array([stretch.mean() for stretch in stretches])
    low, high = means.min(), means.max()
    levels = ((means - low) / max(high - low, 1e-12) * (len(BARS) - 1)).round().astype(int)
    return "".join(BARS[level] for level in levels)


def first_and_last(losses: list[float]) -> tuple[float, float]:
    """Mean loss of the run's first and last fifth: single steps differ by the noise level that they drew."""
    part = max(1, len(losses) // 5)
    return float(np.mean(losses[:part])), float(np.mean(losses[-part:]))


def contact_sheet(video: Path, columns: int = 5) -> Path:
    """Frames spread over the video, side by side, as a PNG beside it."""
    reader = decord.VideoReader(str(video))
    indices = np.linspace(0, len(reader) - 1, min(columns, len(reader))).round().astype(int).tolist()
    sheet = np.concatenate(list(reader.get_batch(indices).asnumpy()), axis=1)  # [H, W * columns, C]
    picture = Image.fromarray(sheet)
    if picture.width < 960:  # a tiny model's video
        factor = 960 // picture.width
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    path = video.with_suffix(".png")
    picture.save(path)
    return path


def last_validation(folder: Path) -> list[Path]:
    """The videos of the latest step that has any."""
    by_step: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_step-*.mp4")):
        by_step.setdefault(path.name.split("_step-")[1].split("_")[0], []).append(path)
    return by_step[max(by_step, key=int)] if by_step else []


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1024:,.0f} KiB"


def put_together(pictures: list[Path], path: Path, width: int = 960) -> None:
    """Pictures one below the other, each as wide."""
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    images = [image.resize((width, image.height * width // image.width)) for image in images]
    together = Image.new("RGB", (width, sum(image.height + 8 for image in images)), "white")
    top = 0
    for image in images:
        together.paste(image, (0, top))
        top += image.height + 8
    together.quantize(128).save(path, optimize=True)


def main(folder: Path, picture: Path | None) -> None:
    metrics_file = folder / "metrics.jsonl"
    if not metrics_file.is_file():
        sys.exit(f"{folder} is not the output folder of a run: it has no metrics.jsonl")
    losses = [row["loss"] for row in read_metrics(metrics_file) if row["loss"] is not None]
    if losses:
        first, last = first_and_last(losses)
        print(f"\nLoss over {len(losses)} steps   {loss_curve(losses)}")
        print(f"  first fifth {first:.4f}, last fifth {last:.4f} ({(last / first - 1):+.1%})")
    print(f"  every step: {metrics_file}")
    for lora in folder.glob("pytorch_lora_weights.safetensors"):
        print(f"\nLoRA          {lora} ({size(lora)})")
    sheets = [(video, contact_sheet(video)) for video in last_validation(folder / "validation")]
    for video, sheet in sheets:
        print(f"Validation    {video} ({size(video)}), as a picture: {sheet}")
    for checkpoint in sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1])):
        print(f"Checkpoint    {checkpoint}")
    for card in folder.glob("README.md"):
        print(f"Model card    {card}")
    if picture is not None:
        put_together([folder / "loss.png", *(sheet for _, sheet in sheets)], picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--output_dir of the run")
    parser.add_argument("--picture", type=Path, help="where to put the loss curve and the sheets in one")
    args = parser.parse_args()
    main(args.folder, args.picture)
