"""What training will see of the data, as a page: each clip's frames and crop, its caption, and what to worry about.

    python tools/preview_data.py train_cogvideox_lora.py [the flags of the run] [--page FILE.html]

The script's own functions choose the frames, the crop, the size and the tokens; no model is loaded. The page
(OUTPUT_DIR/preview.html, if --page names no other) is one file that needs no network. The clips with the gravest
warnings come first. Of each clip some frames are shown, with what is cropped away in grey stripes; only these are
decoded, so damage between them is found by the training alone.
"""

import argparse
import base64
import copy
import dataclasses
import gc
import html
import io
import math
import os
import pickle
import re
import string
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from training_script import ending_as, load_script, open_run  # noqa: E402

KINDS = {  # of warnings, the gravest first, as the page and the terminal name them
    "broken": "cannot be decoded", "single": "trained as a picture", "time": "little of the time used",
    "area": "much cropped away", "turned": "between portrait and landscape", "stretched": "stretched out of shape",
    "speed": "too fast or too slow", "enlarged": "scaled up", "double": "same content", "dark": "very dark",
    "static": "nothing moves",
    "trigger": "trigger word missing or twice", "cut": "caption cut off", "unknown": "caption with unknown characters",
    "caption": "same caption", "converted": "converted, look at the frames",
}  # fmt: skip
LEAST_TIME = 0.5  # the training logs a warning below it, too
LEAST_AREA = 0.7  # 16:9 and 4:3 brought to 3:2 keep 84 and 89 %; a square clip keeps 67 %, and may lose a head
MOST_STRETCH = 1.25  # 16:9 brought to 3:2 is 1.19, which hardly shows; 4:3 brought to 16:9 is 1.33, which does
MOST_SCALE = 1.1  # up to it the blur hardly shows; above it the LoRA learns blurred clips
LEAST_BRIGHTNESS = 0.1  # of white, on average; at that level little can be recognised
LEAST_MOTION = 0.03  # of white, in any of 16 x 16 cells; noise and strong compression changed none by more than 0.013
SAME = (0.03, 0.003)  # part of a clip's contrast, and of white: twice what small size and strong compression changed
COMMON_WORD = 0.8  # of the captions begin with a trigger word, if there is one; sentences begin in more ways
ORDINARY = "a an the this that these those in on at there it video two three close close-up we he she".split()
SHOWN = 6  # frames a clip at most
THUMBNAIL = 24_000  # pixels of a shown frame; 6 frames are then about 30 KB

Warnings = list[tuple[str, float, str]]  # kind, how grave within its kind, text


class Caption(NamedTuple):
    """What the text encoder is given, what is cut off, the number of tokens, and whether some are unknown to it."""

    text: str
    cut: str
    num_tokens: int
    has_unknown: bool


@dataclasses.dataclass
class View:
    """A clip as training sees it. Sizes are height and width; `box` is left, top, right and bottom of what is kept."""

    times: list[float]  # seconds: when each frame is shown, and when the last one ends
    notes: list[str]  # what was converted
    source: tuple[int, int]
    indices: list[int]
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    kept: tuple[float, float]  # parts of its time and of its area
    shown: list[int]
    pictures: list[bytes]  # JPEG
    brightness: float
    motion: float
    signature: np.ndarray  # the shown frames in 8 x 8 cells: [SHOWN, 8, 8, C]

    @property
    def num_frames(self) -> int:
        return len(self.times) - 1

    @property
    def used_seconds(self) -> float:
        """From the first frame that is used to the end of the last one."""
        return self.times[self.indices[-1] + 1] - self.times[self.indices[0]]

    def speed(self, fps: float) -> float:
        """How many times as fast it plays at `fps` frames a second as it was recorded."""
        span = self.times[self.indices[-1]] - self.times[self.indices[0]]
        return span * fps / (len(self.indices) - 1) if len(self.indices) > 1 else 1.0


def trained_box(dataset, index: int, chosen: tuple, source: tuple[int, int]) -> tuple[int, int, int, int]:
    """What is left of a frame of the clip: the dataset crops a frame whose red is the column, whose green the row."""
    ramp = np.zeros((1, *source, 3), np.float32)  # [F, H0, W0, C]
    ramp[..., 0] = (np.arange(source[1]) + 0.5) / source[1] * 255
    ramp[..., 1] = (np.arange(source[0])[:, None] + 0.5) / source[0] * 255
    copied = copy.copy(dataset)
    copied.choose = lambda *_: (SimpleNamespace(read=lambda _indices: ramp, notes=[]), [0], *chosen[2:])
    columns, rows, _ = (copied[index]["instance_video"][0].numpy() + 1) / 2  # [H, W]
    box = []
    for line, length in ((columns[len(columns) // 2], source[1]), (rows[:, rows.shape[1] // 2], source[0])):
        # Two points away from the borders, where the filter sees the ramp alone, tell where the line starts and ends.
        first, last = len(line) // 4, len(line) * 3 // 4
        step = (line[last] - line[first]) / (last - first)
        start = line[first] - (first + 0.5) * step
        box.append([min(max(round(float(x * length)), 0), length) for x in (start, start + step * len(line))])
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def thumbnail(frame: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> bytes:
    """The frame [H0, W0, C], small and in the shape that training gives it, as a JPEG with the cropped part in grey
    stripes."""
    (height, width), (left, top, right, bottom) = frame.shape[:2], box
    shape = np.array([height * size[0] / (bottom - top), width * size[1] / (right - left)])
    h, w = np.maximum(1, (shape * math.sqrt(THUMBNAIL / shape.prod())).round().astype(int)).tolist()
    small = np.array(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))  # [h, w, C]
    stripes = np.add.outer(range(h), range(w)) // 4 % 2 * 40  # [h, w]
    picture = np.repeat((small.mean(-1) * 0.4 + 60 + stripes)[..., None], 3, axis=-1).astype(np.uint8)  # [h, w, C]
    rows = slice(round(top * h / height), round(bottom * h / height))
    columns = slice(round(left * w / width), round(right * w / width))
    picture[rows, columns] = small[rows, columns]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=72)
    return file.getvalue()


def cells(frames: np.ndarray, count: int, box: tuple | None = None) -> np.ndarray:
    """The means of count x count cells of each frame, or of a part of it: [F, count, count, C] from 0 to 1."""
    small = [Image.fromarray(frame).resize((count, count), Image.Resampling.BOX, box) for frame in frames]
    return np.stack([np.asarray(picture, np.float32) for picture in small]) / 255


class Views:
    """A View of each clip, pickled, in the form in which the script's `decode_videos` takes a clip."""

    def __init__(self, script: ModuleType, dataset):
        self.script, self.dataset = script, dataset

    def __getitem__(self, index: int) -> dict:
        """Raises what the dataset does."""
        try:
            return self.view(index)
        except self.script.TimesDiffer:
            return self.view(index, is_in_order=True)

    def view(self, index: int, is_in_order: bool = False) -> dict:
        chosen = clip, indices, size, kept = self.dataset.choose(index, is_in_order)
        spread = np.linspace(0, len(indices) - 1, SHOWN).round().astype(int).tolist()
        shown = [indices[position] for position in dict.fromkeys(spread)]
        frames = clip.read(shown)  # [F, H0, W0, C]
        box = trained_box(self.dataset, index, chosen, frames.shape[1:3])
        seen = cells(frames, 16, box)
        signature = cells(frames, 8)[np.linspace(0, len(shown) - 1, SHOWN).round().astype(int)]
        view = View(
            clip.times, clip.notes, frames.shape[1:3], indices, size, box, tuple(kept.tolist()), shown,
            [thumbnail(frame, box, size) for frame in frames], float(seen.mean()),
            float(np.abs(seen - seen[0]).mean(-1).max()), signature,
        )  # fmt: skip
        return {"instance_video": torch.frombuffer(bytearray(pickle.dumps(view)), dtype=torch.uint8), "kept": kept}


def look_at(script: ModuleType, args: Namespace, dataset) -> list[View | str]:
    """A View of each clip, or what is wrong with it."""
    gc.collect()
    gc.freeze()  # else each forked process collects, and so copies, the libraries' objects
    found: dict[int, View | str] = {}
    workers = max(2, args.dataloader_num_workers)
    answers = script.decode_videos(Views(script, dataset), list(range(len(dataset))), torch.uint8, workers)
    for index, answer in script.progress_bar(iterable=answers, total=len(dataset), desc="Previewing", unit="clip"):
        found[index] = answer if isinstance(answer, str) else pickle.loads(answer["video"].numpy().tobytes())
    gc.unfreeze()
    return [found[index] for index in range(len(dataset))]


def read_captions(script: ModuleType, args: Namespace, dataset, limit: int) -> list[Caption]:
    """Of each clip, by the script's tokenizer and the model's limit. Raises the script's RunError."""
    with script.explain("the tokenizer of --pretrained_model_name_or_path cannot be read"):
        tokenizer = script.T5Tokenizer.from_pretrained(**script.pretrained_source(args, "tokenizer"))
    captions = []
    for prompt in map(dataset.prompt, range(len(dataset))):
        # What would be given to the encoder comes back.
        ids = script.encode_prompt(tokenizer, lambda ids: [ids], prompt, max_sequence_length=limit)[0].tolist()
        every = tokenizer(prompt, verbose=False).input_ids
        kept = min(limit, len(every)) - 1  # the last token, </s>, is there in any case
        parts = (tokenizer.convert_ids_to_tokens(part) for part in (ids[:kept], every[kept:-1]))
        text, cut = ("".join(part).replace("▁", " ") for part in parts)
        captions.append(Caption(text.lstrip(), cut, len(every), tokenizer.unk_token_id in every))
    return captions


def frame_warnings(view: View, mode: str, fps: float) -> Warnings:
    """What of the clip itself is not as one would want it."""
    (height, width), (left, top, right, bottom), (time, area) = view.source, view.box, view.kept
    frames, used = view.num_frames, len(view.indices)
    sides = view.size[0] / (bottom - top), view.size[1] / (right - left)
    scale, stretch, turns = max(sides), max(sides) / min(sides), (height - width) * (view.size[0] - view.size[1]) < 0
    seconds, speed = f"{view.used_seconds:.1f} s of {view.times[-1]:.1f} s are used", view.speed(fps)
    before, after = ("portrait", "landscape") if height > width else ("landscape", "portrait")
    turned = f"a {before} clip, {'stretched' if mode == 'stretch' else 'cropped'} to {after}"
    faster = f"{speed:.1f} times too fast" if speed > 1 else f"{1 / max(speed, 1e-3):.1f} times too slow"
    checks = [
        ("single", used == 1 < frames, frames, f"a clip of {frames} frames, trained as a picture without motion"),
        ("time", used > 1 and time < LEAST_TIME, 1 - time, seconds),
        ("area", area < LEAST_AREA, 1 - area, f"{1 - area:.0%} of the frame is cropped away"),
        ("turned", turns, stretch / area, turned),
        ("stretched", mode == "stretch" and stretch > MOST_STRETCH, stretch, f"stretched by {stretch:.2f} one way"),
        ("enlarged", scale > MOST_SCALE, scale, f"{width} x {height}, scaled up by {scale:.1f}: it is blurred"),
        ("dark", view.brightness < LEAST_BRIGHTNESS, -view.brightness, f"dark: {view.brightness:.0%} of white"),
        ("speed", not 0.5 <= speed <= 2, abs(math.log(max(speed, 1e-3))), f"it is taught {faster} (at --fps {fps})"),
        ("converted", bool(view.notes), 0.0, f"converted: {', '.join(view.notes)}"),
        ("static", used > 1 and view.motion < LEAST_MOTION, -view.motion, "nothing moves in the frames that are used"),
    ]
    return [(kind, amount, text) for kind, is_so, amount, text in checks if is_so]


def caption_warnings(caption: Caption, limit: int) -> Warnings:
    text = f"the caption is cut off: {caption.num_tokens} tokens, the model takes {limit}"
    warnings = [("cut", float(caption.num_tokens), text)] if caption.num_tokens > limit else []
    return warnings + [("unknown", 0.0, "the text encoder does not know all characters")] * caption.has_unknown


def trigger_warnings(texts: list[str], id_token: str) -> dict[int, str]:
    """With --id_token, the captions that have it already. Else those without the word that nearly all begin with."""
    if id_token:
        is_there = re.compile(rf"(?<!\w){re.escape(id_token)}(?!\w)", re.IGNORECASE).search
        text = f"“{id_token}” twice: in the caption, and before it by --id_token"
        return {index: text for index, caption in enumerate(texts) if is_there(caption)}
    words = [re.findall(r"\w[\w-]*", caption) or [""] for caption in texts]
    word, count = Counter(first for first, *_ in words).most_common(1)[0]
    if word.lower() in ["", *ORDINARY] or count < COMMON_WORD * len(texts):
        return {}
    text = f"no “{word}”, with which {count} of {len(texts)} captions begin"
    return {index: text for index, caption in enumerate(words) if word not in caption}


def doubles(views: list[View | str]) -> list[list[int]]:
    """Groups of clips that show the same."""
    known = [index for index, view in enumerate(views) if isinstance(view, View)]
    signatures = np.stack([views[index].signature.ravel() for index in known]) if known else np.empty((0, 1))
    contrast = np.abs(signatures - signatures.mean(1, keepdims=True)).mean(1)
    groups: list[list[int]] = []
    for row, index in enumerate(known):
        difference = np.abs(signatures[:row] - signatures[row]).mean(1)
        like = {known[other] for other in np.flatnonzero(difference <= SAME[0] * contrast[row] + SAME[1])}
        group = next((group for group in groups if like.intersection(group)), [])
        if not group:
            groups.append(group)
        group.append(index)
    return groups


def find_warnings(
    dataset, views: list[View | str], captions: list[Caption], limit: int, fps: float
) -> list[Warnings]:
    """Of each clip, the gravest first."""
    found, texts, same = [], [record.caption for record in dataset.records], {}
    for index, view in enumerate(views):
        broken = [("broken", 0.0, f"cannot be decoded: {view}")] if isinstance(view, str) else []
        own = broken or frame_warnings(view, dataset.settings["video_reshape_mode"], fps)
        found.append(own + caption_warnings(captions[index], limit))
        same.setdefault(" ".join(texts[index].casefold().split()), []).append(index)
    groups = [("double", "looks like", group) for group in doubles(views)]
    groups += [("caption", "same caption as", group) for group in same.values()]
    for kind, what, group in groups:
        for index in group if len(group) > 1 else []:
            other, *more = (each for each in group if each != index)
            text = f"{what} #{other + 1} {Path(dataset.records[other].path).name}"
            # The clips of one group come one after the other.
            found[index].append((kind, -group[0], text + (f" and {len(more)} more" if more else "")))
    for index, text in trigger_warnings(texts, dataset.id_token).items():
        found[index].append(("trigger", 0.0, text))
    order = list(KINDS)
    return [sorted(own, key=lambda warning: (order.index(warning[0]), -warning[1])) for own in found]


def count_kinds(found: list[Warnings]) -> dict[str, int]:
    """The number of clips that have a warning of each kind, the gravest kind first."""
    counts = Counter(kind for own in found for kind in {kind for kind, *_ in own})
    return {kind: counts[kind] for kind in KINDS if kind in counts}


PAGE = string.Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --line: #d5d5d8; --card: #fff; --back: #f3f3f5; --text: #1c1c20; --soft: #62626a;
  --warn: #9a3412; --warn-back: #ffedd5 }
@media (prefers-color-scheme: dark) { :root { --line: #3a3a40; --card: #212125; --back: #17171a; --text: #ececf0;
  --soft: #a0a0aa; --warn: #fdba74; --warn-back: #43210c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1200px; padding: 16px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 16px; margin: 0 } p { margin: 6px 0 }
h2 span, .facts, figcaption, small { color: var(--soft); font-weight: normal; font-size: 13px }
select { font: inherit; max-width: 100%; padding: 6px; margin: 8px 0 16px }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  margin-bottom: 14px }
article[hidden] { display: none }
ul { list-style: none; padding: 0; margin: 6px 0; display: flex; flex-wrap: wrap; gap: 6px; font-size: 14px }
li { background: var(--warn-back); color: var(--warn); border-radius: 4px; padding: 1px 8px }
.strip { display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px; margin: 8px 0 }
@media (max-width: 700px) { .strip { grid-template-columns: repeat(3, 1fr) } }
figure { margin: 0 } img { display: block; max-width: 100%; max-height: 240px; border-radius: 3px }
figcaption { font-size: 12px } del { color: var(--warn); background: var(--warn-back) }
</style></head><body>
<h1>$title</h1><p class="facts">$about</p>
<select id="filter" aria-label="Which clips are shown" autocomplete="off">$options</select>
$cards
<script>
const filter = document.getElementById("filter");
filter.onchange = () => document.querySelectorAll("article").forEach(
  card => card.hidden = !card.dataset.kinds.split(" ").includes(filter.value));
</script></body></html>
""")


def facts(view: View) -> str:
    """How the clip becomes what is trained on, in a line."""
    (height, width), span, used = view.source, view.indices[-1] - view.indices[0], len(view.indices)
    text = f"trained as {used}x{view.size[0]}x{view.size[1]} · {width} x {height} → {view.size[1]} x {view.size[0]}"
    text += f", {view.kept[1]:.0%} of the frame" if view.kept[1] < 0.995 else ""
    if view.num_frames == 1:
        return f"{text} · a picture"
    text += f" · {used} of {view.num_frames} frames"
    text += f" · {view.used_seconds:.1f} s of {view.times[-1]:.1f} s"
    if span == 0:
        return text
    seconds = view.times[view.indices[-1]] - view.times[view.indices[0]]
    return f"{text} · {(used - 1) / seconds:.1f} of {view.num_frames / view.times[-1]:.1f} frames a second"


def figure(view: View, frame: int, picture: bytes) -> str:
    time = f"{view.times[frame]:.2f} s · " if view.num_frames > 1 else ""
    image = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
    return f"<figure>{image}<figcaption>{time}frame {frame}</figcaption></figure>"


def card(heading: str, view: View | str, caption: Caption, warnings: Warnings) -> str:
    """One clip on the page."""
    kinds = " ".join(["all", *["any"] * bool(warnings), *(kind for kind, *_ in warnings)])
    chips = "".join(f"<li>{html.escape(text)}</li>" for *_, text in warnings)
    frames = ""
    if isinstance(view, View):
        figures = [figure(view, *shown) for shown in zip(view.shown, view.pictures, strict=True)]
        frames = f'<p class="facts">{facts(view)}</p><div class="strip">{"".join(figures)}</div>'
    text = html.escape(caption.text) + (f"<del>{html.escape(caption.cut)}</del>" if caption.cut else "")
    text = f'<p dir="auto">{text} <small>{caption.num_tokens} tokens</small></p>'
    return f'<article data-kinds="{kinds}"><h2>{heading}</h2><ul>{chips}</ul>{frames}{text}</article>'


def make_page(args: Namespace, names: list[str], clips: list[tuple], limit: int) -> str:
    """The whole page, the clips with the gravest warnings first. A clip is a View, a Caption and Warnings."""
    kinds, found = list(KINDS), [warnings for *_, warnings in clips]
    grave = [(kinds.index(own[0][0]), -own[0][1]) if own else (len(kinds), 0.0) for own in found]
    order = sorted(range(len(clips)), key=grave.__getitem__)
    cards = [card(f"<span>#{i + 1}</span> {html.escape(names[i])}", *clips[i]) for i in order]
    about = f"{args.frame_sampling} sampling · {args.video_reshape_mode} · the model takes {limit} tokens"
    about += " · each clip is also trained mirrored" if args.random_flip else ""
    counts = {"all": ("all clips", len(clips)), "any": ("clips with warnings", sum(map(bool, found)))}
    counts |= {kind: (KINDS[kind], number) for kind, number in count_kinds(found).items()}
    options = "".join(f'<option value="{kind}">{name} ({number})</option>' for kind, (name, number) in counts.items())
    title = html.escape(f"What training sees of {args.instance_data_root or args.dataset_name}")
    return PAGE.substitute(title=title, about=about, options=options, cards="\n".join(cards))


def preview(script: ModuleType, args: Namespace, page: Path) -> str:
    """Write the page; returns what the terminal says. Raises the script's RunError for what cannot work."""
    transformer_config, _, dataset = open_run(script, args)
    limit = transformer_config["max_text_seq_length"]
    captions, views = read_captions(script, args, dataset, limit), look_at(script, args, dataset)
    found = find_warnings(dataset, views, captions, limit, args.fps)
    names = [record.path.removeprefix(f"{Path(args.instance_data_root or '.')}/") for record in dataset.records]
    content = make_page(args, names, list(zip(views, captions, found, strict=True)), limit)
    content = content.encode(errors="backslashreplace")  # a file's name may hold bytes that are no UTF-8
    with script.explain(f"--page: {page} cannot be written", OSError):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(content)
    sizes = Counter((len(view.indices), *view.size) for view in views if isinstance(view, View))
    shapes = [f"{number} of {' x '.join(map(str, size))}" for size, number in sorted(sizes.items())]
    lines = [f"clips      {len(views)}: {', '.join(shapes) or 'none can be decoded'}"]
    lines += [f"warning    {number} {KINDS[kind]}" for kind, number in count_kinds(found).items()]
    return "\n".join([*lines, f"page       {page} ({len(content) / 1e6:.1f} MB)"])


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("script", type=Path, help="the script of the run; its flags follow")
    parser.add_argument("--page", type=Path, help="file to write; default: preview.html in --output_dir")
    own, flags = parser.parse_known_args(argv)
    script = load_script(own.script)
    args = script.get_args(flags)
    script.set_up_logging()
    with ending_as(script, "preview_data.py"):
        print(preview(script, args, own.page or Path(args.output_dir, "preview.html")))


if __name__ == "__main__":
    main()
