"""Show the result of a training run: the loss over the steps, the videos, the files.

    python tools/show_run.py OUTPUT_DIR [--picture FILE.png]

Needs no GPU and loads no model. The loss is printed as a row of bars. For each video of the last validation, a contact
sheet (PNG, frames from left to right) is written beside it. --picture draws the loss over the steps and puts these
sheets below it.
"""

import argparse
import json
import sys
from pathlib import Path

import decord
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BARS = "▁▂▃▄▅▆▇█"


def read_metrics(path: Path, name: str = "loss") -> list[dict]:
    """The lines that have a number `name`: "loss", of an optimizer step, or "validation/loss", of held-out clips."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row.get(name) is not None]


def mean_losses(rows: list[dict], count: int) -> np.ndarray:
    """Means over `count` equal parts of the run, or fewer if it has fewer steps."""
    losses = np.array([row["loss"] for row in rows], dtype=float)
    return np.array([part.mean() for part in np.array_split(losses, min(count, len(losses)))])


def loss_bars(rows: list[dict], width: int = 60) -> str:
    """The loss over the steps as a row of bars, from the lowest mean to the highest."""
    means = mean_losses(rows, width)
    low, high = means.min(), means.max()
    levels = ((means - low) / max(high - low, 1e-12) * (len(BARS) - 1)).round().astype(int)
    return "".join(BARS[level] for level in levels)


def first_and_last(rows: list[dict]) -> tuple[float, float]:
    """Mean loss of the first and of the last fifth of the run; a single loss depends on its noise level."""
    losses = [row["loss"] for row in rows]
    part = max(1, len(losses) // 5)
    return float(np.mean(losses[:part])), float(np.mean(losses[-part:]))


def draw_loss(rows: list[dict]) -> Image.Image:
    """The loss over the steps as a picture of 800 x 320."""
    means = mean_losses(rows, 100)
    low, high = means.min(), means.max()
    left, right, top, bottom = 70, 780, 30, 280
    x = np.linspace(left, right, len(means))
    y = bottom - (means - low) / max(high - low, 1e-12) * (bottom - top)
    picture = Image.new("RGB", (800, 320), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for height, value in ((top, high), (bottom, low)):
        draw.line([(left, height), (right, height)], "#cccccc")
        draw.text((left - 8, height), f"{value:.3g}", "black", font, anchor="rm")
    for side, row in ((left, rows[0]), (right, rows[-1])):
        draw.text((side, bottom + 18), f"step {row['step']}", "black", font, anchor="lm" if side == left else "rm")
    draw.text(((left + right) / 2, bottom + 18), "loss", "black", font, anchor="mm")
    draw.line(list(zip(x, y, strict=True)), "#1f77b4", width=3)
    return picture


def contact_sheet(video: Path, columns: int = 5) -> Path:
    """Write frames spread over the video, side by side, as a PNG beside it."""
    reader = decord.VideoReader(str(video))
    indices = np.linspace(0, len(reader) - 1, min(columns, len(reader))).round().astype(int).tolist()
    sheet = np.concatenate(list(reader.get_batch(indices).asnumpy()), axis=1)  # [H, W * columns, C]
    picture = Image.fromarray(sheet)
    if picture.width < 960:  # a video of a tiny model
        factor = 960 // picture.width
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    path = video.with_suffix(".png")
    picture.save(path)
    return path


def last_validation(folder: Path) -> list[Path]:
    """The videos of the last step that has any."""
    by_step: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_step-*.mp4")):
        by_step.setdefault(path.name.split("_step-")[1].split("_")[0], []).append(path)
    return by_step[max(by_step, key=int)] if by_step else []


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1024:,.0f} KiB"


def save_below_each_other(images: list[Image.Image], path: Path, width: int = 960) -> None:
    """Save the images as one picture, each below the one before, all scaled to `width`."""
    images = [image.resize((width, image.height * width // image.width)) for image in images]
    picture = Image.new("RGB", (width, sum(image.height + 8 for image in images)), "white")
    top = 0
    for image in images:
        picture.paste(image, (0, top))
        top += image.height + 8
    picture.quantize(128).save(path, optimize=True)


def main(folder: Path, picture: Path | None) -> None:
    metrics_file = folder / "metrics.jsonl"
    if not metrics_file.is_file():
        sys.exit(f"{folder} is not the output folder of a run: it has no metrics.jsonl")
    rows = read_metrics(metrics_file)
    if rows:
        first, last = first_and_last(rows)
        print(f"\nLoss over {len(rows)} steps   {loss_bars(rows)}")
        print(f"  first fifth {first:.4f}, last fifth {last:.4f} ({(last / first - 1):+.1%})")
    if held_out := read_metrics(metrics_file, "validation/loss"):
        lowest = min(held_out, key=lambda row: row["validation/loss"])
        shown = [f"{row['validation/loss']:.4f} at step {row['step']}" for row in (held_out[0], lowest, held_out[-1])]
        print("Loss of held-out clips: first {}, lowest {}, last {}".format(*shown))
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
    if picture is not None and (rows or sheets):
        images = [draw_loss(rows)] if rows else []
        save_below_each_other(images + [Image.open(sheet).convert("RGB") for _, sheet in sheets], picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--output_dir of the run")
    parser.add_argument("--picture", type=Path, help="file to write the loss and the sheets to, as one picture")
    args = parser.parse_args()
    main(args.folder, args.picture)
