"""Show what training will see of the data, as a page: each clip's frames, crop and caption, and what to worry about.

    python tools/preview_data.py my_clips [flags of the script] [--page FILE.html]
    python tools/preview_data.py train_cogvideox_lora.py [the flags of the run] [--page FILE.html]

The first form takes a folder, which has prompts.txt and videos.txt, or a .txt file beside each clip. Without
--pretrained_model_name_or_path, the captions are not checked for length. The page is my_clips/preview.html. The second
form previews a run, with all its flags. The page is preview.html in its --output_dir.

The script's own functions choose the frames, the crop, the size and the tokens; no model is loaded. The page is one
file that needs no network. The validation prompts come first, and then the clips with the gravest warnings. Of each
clip some frames are shown, with what is cropped away in grey stripes, and a small moving picture that plays at the
speed at which the model is taught. Only these frames are decoded, so damage between them is found by the training
alone.
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
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from training_script import ending_as, load_script, open_dataset, open_run  # noqa: E402

TEMPLATE = Path(__file__).with_name("preview_template.html")
SCRIPT = Path(__file__).resolve().parent.parent / "train_cogvideox_lora.py"  # what a folder is previewed with

KINDS = {  # of warnings, the gravest first, as the page and the terminal name them
    "broken": "cannot be decoded", "single": "trained as a picture", "time": "little of the time used",
    "area": "much cropped away", "turned": "between portrait and landscape", "stretched": "stretched out of shape",
    "speed": "too fast or too slow", "enlarged": "scaled up", "double": "same content", "dark": "very dark",
    "static": "nothing moves",
    "trigger": "trigger word missing or twice", "cut": "caption cut off", "unknown": "caption with unknown characters",
    "caption": "same caption", "converted": "converted, look at the frames",
    "prompt-trigger": "validation prompt without the trigger word", "prompt-cut": "validation prompt cut off",
    "prompt-unknown": "validation prompt with unknown characters",
    "prompt-length": "validation prompt much shorter or longer than the captions",
    "prompt-image": "start image much cropped or scaled up",
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
OTHER_LENGTH = 3  # times as many words as most captions, or a third of them: no such text was trained on
SHOWN = 6  # still frames a clip at most
THUMBNAIL = 24_000  # pixels of a still frame
MOVING = 25  # frames of a moving picture at most: every second one of 49
MOVING_PIXELS = 16_000  # of each of its frames
MOVING_BYTES = 45_000  # of a moving picture; one that has more is compressed more strongly
NO_LIMIT = "captions are not checked for length, because no --pretrained_model_name_or_path was given"

Warnings = list[tuple[str, float, str]]  # kind, how grave within its kind, text


class Caption(NamedTuple):
    """A text as the text encoder is given it. Without a model, only `text` is known."""

    text: str
    cut: str = ""  # what is cut off
    num_tokens: int | None = None
    has_unknown: bool = False  # characters


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
    pictures: list[bytes]  # WebP, as all pictures
    moving: bytes  # frames side by side; empty for a single frame
    brightness: float
    motion: float
    signature: np.ndarray  # the shown frames in 8 x 8 cells: [SHOWN, 8, 8, C]

    @property
    def num_frames(self) -> int:
        return len(self.times) - 1

    @property
    def used_seconds(self) -> float:
        """Return the time from the first frame that is used to the end of the last one."""
        return self.times[self.indices[-1] + 1] - self.times[self.indices[0]]

    def speed(self, fps: float) -> float:
        """Return how many times as fast it plays at `fps` frames a second as it was recorded."""
        span = self.times[self.indices[-1]] - self.times[self.indices[0]]
        return span * fps / (len(self.indices) - 1) if len(self.indices) > 1 else 1.0


def trained_box(dataset, index: int, chosen: tuple, source: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return what is left of a frame of the clip: the dataset crops a frame whose red is the column, whose green the
    row."""
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
    """Return the frame [H0, W0, C], small and in the shape that training gives it, with the cropped part in grey
    stripes."""
    (height, width), (left, top, right, bottom) = frame.shape[:2], box
    shape = np.array([height * size[0] / (bottom - top), width * size[1] / (right - left)])
    h, w = np.maximum(1, (shape * math.sqrt(THUMBNAIL / shape.prod())).round().astype(int)).tolist()
    # With a gap, PIL first takes means of whole blocks of pixels, which halves the time for large frames.
    small = np.array(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR, reducing_gap=1.5))  # [h, w, C]
    stripes = np.add.outer(range(h), range(w)) // 4 % 2 * 40  # [h, w]
    picture = np.repeat((small.mean(-1) * 0.4 + 60 + stripes)[..., None], 3, axis=-1).astype(np.uint8)  # [h, w, C]
    rows = slice(round(top * h / height), round(bottom * h / height))
    columns = slice(round(left * w / width), round(right * w / width))
    picture[rows, columns] = small[rows, columns]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=60, method=2)
    return file.getvalue()


def moving_frame(frame: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """Return what training sees of the frame [H0, W0, C], small."""
    scale = math.sqrt(MOVING_PIXELS / math.prod(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=1.5)


def frame_step(num_frames: int) -> int:
    """Return n, if a moving picture has every n-th of so many frames."""
    return math.ceil(num_frames / MOVING)


def moving_picture(frames: list[Image.Image]) -> bytes:
    """Return the frames side by side, as one picture: the page shows one after the other. An animated WebP would leave
    out frames that differ little, such as those of a dark clip."""
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for position, frame in enumerate(frames):
        strip.paste(frame, (position * width, 0))
    for quality in (40, 15, 0):
        file = io.BytesIO()
        strip.save(file, "WEBP", quality=quality, method=2)
        if file.tell() <= MOVING_BYTES:
            break
    return file.getvalue()


def cells(frame: np.ndarray, count: int, box: tuple | None = None) -> np.ndarray:
    """Return the means of count x count cells of a frame, or of a part of it: [count, count, C] from 0 to 1."""
    small = Image.fromarray(frame).resize((count, count), Image.Resampling.BOX, box)
    return np.asarray(small, np.float32) / 255


class Views:
    """A View of each clip, pickled, in the form in which the script's `decode_videos` takes a clip."""

    def __init__(self, script: ModuleType, dataset):
        self.script = script
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict:
        """Return what the dataset does, with a View in place of the video. Raises what the dataset does."""
        try:
            return self.view(index)
        except self.script.TimesDiffer:
            return self.view(index, is_in_order=True)

    def view(self, index: int, is_in_order: bool = False) -> dict:
        chosen = clip, indices, size, kept = self.dataset.choose(index, is_in_order)
        box = trained_box(self.dataset, index, chosen, clip.size)
        spread = np.linspace(0, len(indices) - 1, SHOWN).round().astype(int).tolist()
        shown = [indices[position] for position in dict.fromkeys(spread)]
        moving = indices[:: frame_step(len(indices))] if len(indices) > 1 else []
        pictures = {}  # by index of the frame, as the next three
        areas = {}
        signatures = {}
        small = {}
        wanted = sorted({*shown, *moving})
        # A few frames at a time: 25 frames of 4K would take 600 MB.
        for start in range(0, len(wanted), 8):
            some = wanted[start : start + 8]
            for number, frame in zip(some, clip.read(some), strict=True):  # [H0, W0, C]
                if number in shown:
                    pictures[number] = thumbnail(frame, box, size)
                    areas[number] = cells(frame, 16, box)
                    signatures[number] = cells(frame, 8)
                if number in moving:
                    small[number] = moving_frame(frame, box, size)
        seen = np.stack([areas[number] for number in shown])  # [F, 16, 16, C]
        view = View(
            times=clip.times,
            notes=clip.notes,
            source=clip.size,
            indices=indices,
            size=size,
            box=box,
            kept=tuple(kept.tolist()),
            shown=shown,
            pictures=[pictures[number] for number in shown],
            moving=moving_picture([small[number] for number in moving]) if moving else b"",
            brightness=float(seen.mean()),
            motion=float(np.abs(seen - seen[0]).mean(-1).max()),
            signature=np.stack([signatures[indices[position]] for position in spread]),
        )
        return {"instance_video": torch.frombuffer(bytearray(pickle.dumps(view)), dtype=torch.uint8), "kept": kept}


def look_at(script: ModuleType, args: Namespace, dataset) -> list[View | str]:
    """Return a View of each clip, or what is wrong with it."""
    gc.collect()
    gc.freeze()  # else each forked process collects, and so copies, the libraries' objects
    found: dict[int, View | str] = {}
    workers = max(2, args.dataloader_num_workers)
    answers = script.decode_videos(Views(script, dataset), list(range(len(dataset))), torch.uint8, workers)
    for index, answer in script.progress_bar(iterable=answers, total=len(dataset), desc="Previewing", unit="clip"):
        found[index] = answer if isinstance(answer, str) else pickle.loads(answer["video"].numpy().tobytes())
    gc.unfreeze()
    return [found[index] for index in range(len(dataset))]


def read_captions(script: ModuleType, args: Namespace, prompts: list[str], limit: int | None) -> list[Caption]:
    """Return each prompt as the script's tokenizer and the model's limit make it. Raises the script's RunError."""
    if limit is None:
        return [Caption(prompt) for prompt in prompts]
    with script.explain("the tokenizer of --pretrained_model_name_or_path cannot be read"):
        tokenizer = script.T5Tokenizer.from_pretrained(**script.pretrained_source(args, "tokenizer"))
    captions = []
    for prompt in prompts:
        # What would be given to the encoder comes back.
        ids = script.encode_prompt(tokenizer, lambda ids: [ids], prompt, max_sequence_length=limit)[0].tolist()
        every = tokenizer(prompt, verbose=False).input_ids
        kept = min(limit, len(every)) - 1  # the last token, </s>, is there in any case
        parts = (tokenizer.convert_ids_to_tokens(part) for part in (ids[:kept], every[kept:-1]))
        text, cut = ("".join(part).replace("▁", " ") for part in parts)
        captions.append(Caption(text.lstrip(), cut, len(every), tokenizer.unk_token_id in every))
    return captions


def frame_warnings(view: View, mode: str, fps: float) -> Warnings:
    """Return what of the clip itself is not as one would want it."""
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


def caption_warnings(caption: Caption, limit: int | None, what: str = "caption") -> Warnings:
    """Return what of a text the text encoder cannot read; `what` is the text's name."""
    warnings = []
    if limit is not None and caption.num_tokens > limit:
        text = f"the {what} is cut off: {caption.num_tokens} tokens, the model takes {limit}"
        warnings.append(("cut", float(caption.num_tokens), text))
    if caption.has_unknown:
        warnings.append(("unknown", 0.0, "the text encoder does not know all characters"))
    return warnings


def first_words(texts: list[str]) -> list[str]:
    """Return the word with which each text begins."""
    words = [re.search(r"\w[\w-]*", text) for text in texts]
    return [word[0] if word else "" for word in words]


def common_word(texts: list[str]) -> str:
    """Return the word with which nearly all captions begin, a trigger word perhaps; else an empty text."""
    word, count = Counter(first_words(texts)).most_common(1)[0]
    if word.lower() in ORDINARY or count < COMMON_WORD * len(texts):
        return ""
    return word


def has_word(text: str, word: str, flags: int = 0) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags) is not None


def trigger_warnings(texts: list[str], id_token: str) -> dict[int, str]:
    """Return a warning by clip. With --id_token, the captions that have it already get one. Else those do that lack
    the word with which nearly all begin."""
    if id_token:
        text = f"“{id_token}” twice: in the caption, and before it by --id_token"
        return {i: text for i, caption in enumerate(texts) if has_word(caption, id_token, re.IGNORECASE)}
    word = common_word(texts)
    if not word:
        return {}
    count = first_words(texts).count(word)
    text = f"no “{word}”, with which {count} of {len(texts)} captions begin"
    return {index: text for index, caption in enumerate(texts) if not has_word(caption, word)}


class ValidationPrompt(NamedTuple):
    """A validation prompt on the page."""

    caption: Caption
    image: str  # HTML
    warnings: Warnings


def validation_prompts(
    script: ModuleType, args: Namespace, dataset, captions: list[Caption], limit: int | None
) -> list[ValidationPrompt]:
    """Return the validation prompts with what is wrong with them; `captions` are the same prompts as the text encoder
    gets them. Raises the script's RunError."""
    trigger = dataset.id_token
    reason = "training captions get it by --id_token, validation prompts do not"
    if not trigger:
        trigger = common_word([record.caption for record in dataset.records])
        reason = "nearly all training captions begin with it"
    lengths = sorted(len(dataset.prompt(index).split()) for index in range(len(dataset)))
    # Most captions: without a tenth at each end.
    shortest = lengths[len(lengths) // 10]
    longest = lengths[-1 - len(lengths) // 10]
    images = start_images(script, args)
    prompts = []
    for number, (inputs, caption) in enumerate(zip(script.validation_inputs(args), captions, strict=True)):
        prompt = inputs["prompt"]
        found = caption_warnings(caption, limit, "prompt")
        if trigger and not has_word(prompt, trigger):
            found.append(("trigger", 0.0, f"no “{trigger}”: {reason}"))
        words = len(prompt.split())
        if not shortest / OTHER_LENGTH <= words <= longest * OTHER_LENGTH:
            usual = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
            found.append(("length", 0.0, f"{words} words, and most training captions have {usual}"))
        image = ""
        if images:
            image, more = images[number]
            found += more
        found = in_order([(f"prompt-{kind}", amount, text) for kind, amount, text in found])
        prompts.append(ValidationPrompt(caption, image, found))
    return prompts


def start_images(script: ModuleType, args: Namespace) -> list[tuple[str, Warnings]]:
    """Return each start image of --validation_images as HTML, with what is wrong with it."""
    if not getattr(args, "validation_images", None):
        return []
    images = []
    for path in args.validation_images.split(args.validation_prompt_separator):
        frame = np.asarray(script.open_image(path))  # [H0, W0, C]
        height, width = frame.shape[:2]
        box = (0, 0, width, height)
        if args.video_reshape_mode != "stretch":
            box = centered_box(width, height, args.width / args.height)
        part = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
        scale = max(args.width / (box[2] - box[0]), args.height / (box[3] - box[1]))
        found = []
        if part < LEAST_AREA:
            found.append(("image", 1 - part, f"{1 - part:.0%} of the start image is cropped away"))
        if scale > MOST_SCALE:
            found.append(("image", scale, f"the start image is {width} x {height}, scaled up by {scale:.1f}"))
        words = f"start image · {width} x {height} → {args.width} x {args.height}"
        words += f", {part:.0%} of it" if part < 0.995 else ""
        images.append((still(thumbnail(frame, box, (args.height, args.width)), words), found))
    return images


def centered_box(width: int, height: int, aspect: float) -> tuple[int, int, int, int]:
    """Return the largest box of this aspect in the middle of a picture: left, top, right and bottom."""
    left = max(0, round((width - height * aspect) / 2))
    top = max(0, round((height - width / aspect) / 2))
    return left, top, width - left, height - top


def doubles(views: list[View | str]) -> list[list[int]]:
    """Return groups of clips that show the same."""
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
    dataset, views: list[View | str], captions: list[Caption], limit: int | None, fps: float
) -> list[Warnings]:
    """Return the warnings of each clip, the gravest first."""
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
    return [in_order(own) for own in found]


def in_order(warnings: Warnings) -> Warnings:
    """Return the warnings of a clip, the gravest first."""
    order = list(KINDS)
    return sorted(warnings, key=lambda warning: (order.index(warning[0]), -warning[1]))


def count_kinds(found: list[Warnings]) -> dict[str, int]:
    """Return the number of clips and prompts that have a warning of each kind, the gravest kind first."""
    counts = Counter(kind for own in found for kind in {kind for kind, *_ in own})
    return {kind: counts[kind] for kind in KINDS if kind in counts}


def totals(views: list[View | str], prompts: list[ValidationPrompt]) -> dict[str, str]:
    """Return what the page and the terminal say of all clips together, by name."""
    known = [view for view in views if isinstance(view, View)]
    sizes = Counter((len(view.indices), *view.size) for view in known)
    shapes = [f"{number} of {' x '.join(map(str, size))}" for size, number in sorted(sizes.items())]
    found = {"clips": f"{len(views)}: {', '.join(shapes) or 'none can be decoded'}"}
    videos = [view for view in known if view.num_frames > 1]
    if videos:
        used = sum(view.used_seconds for view in videos)
        found["footage"] = f"{used:.1f} s of {sum(view.times[-1] for view in videos):.1f} s are used"
    if prompts:
        found["prompts"] = f"{len(prompts)} to validate with"
    return found


def facts(view: View) -> str:
    """Return how the clip becomes what is trained on, in a line."""
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


def data_url(picture: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"


def still(picture: bytes, words: str) -> str:
    """Return a picture with the words below it, as HTML."""
    return f'<figure><img alt="" src="{data_url(picture)}"><figcaption>{words}</figcaption></figure>'


def player(view: View, fps: float) -> str:
    """Return the moving picture of a clip, as HTML. All frames that are trained on take len / fps seconds."""
    used = len(view.indices)
    step = frame_step(used)
    words = f"as it is taught: {used} frames in {used / fps:.1f} s"
    speed = view.speed(fps)
    if abs(speed - 1) > 0.1:
        words += f", at {speed:.1f} times its speed"
    words += f" (1 of {step} is shown)" if step > 1 else ""
    style = f"--frames: {math.ceil(used / step)}; --seconds: {used / fps:.3f}s; "
    style += f"--aspect: {view.size[1] / view.size[0]:.4f}; background-image: url({data_url(view.moving)})"
    return f'<figure class="moving"><div style="{style}"></div><figcaption>{words}</figcaption></figure>'


def frames(view: View, fps: float) -> str:
    """Return the moving picture of a clip and its still frames, as HTML."""
    found = [player(view, fps)] if view.moving else []
    for number, picture in zip(view.shown, view.pictures, strict=True):
        time = f"{view.times[number]:.2f} s · " if view.num_frames > 1 else ""
        found.append(still(picture, f"{time}frame {number}"))
    return f'<div class="frames">{"".join(found)}</div>'


def card(heading: str, content: str, caption: Caption, warnings: Warnings) -> str:
    """Return one clip or one validation prompt on the page; `heading` and `content` are HTML."""
    kinds = " ".join(["all", *["any"] * bool(warnings), *(kind for kind, *_ in warnings)])
    chips = "".join(f"<li>{html.escape(text)}</li>" for *_, text in warnings)
    text = html.escape(caption.text)
    if caption.cut:
        text += f"<del>{html.escape(caption.cut)}</del>"
    if caption.num_tokens is not None:
        text += f" <small>{caption.num_tokens} tokens</small>"
    text = f'<p dir="auto">{text}</p>'
    return f'<article data-kinds="{kinds}"><h2>{heading}</h2><ul>{chips}</ul>{content}{text}</article>'


def make_page(
    args: Namespace, names: list[str], clips: list[tuple], prompts: list[ValidationPrompt], limit: int | None
) -> str:
    """Return the whole page, the clips with the gravest warnings first. A clip is a View, a Caption and Warnings."""
    cards = []
    for number, prompt in enumerate(prompts, start=1):
        image = f'<div class="frames">{prompt.image}</div>' if prompt.image else ""
        cards.append(card(f"<span>validation prompt</span> {number}", image, prompt.caption, prompt.warnings))
    kinds = list(KINDS)
    found = [warnings for *_, warnings in clips]
    grave = [(kinds.index(own[0][0]), -own[0][1]) if own else (len(kinds), 0.0) for own in found]
    for i in sorted(range(len(clips)), key=grave.__getitem__):
        view, caption, warnings = clips[i]
        pictures = ""
        if isinstance(view, View):
            pictures = f'<p class="facts">{facts(view)}</p>{frames(view, args.fps)}'
        cards.append(card(f"<span>#{i + 1}</span> {html.escape(names[i])}", pictures, caption, warnings))
    found += [prompt.warnings for prompt in prompts]
    about = f"{args.frame_sampling} sampling · {args.video_reshape_mode} · "
    about += f"the model takes {limit} tokens" if limit is not None else NO_LIMIT
    about += " · each clip is also trained mirrored" if args.random_flip else ""
    counts = {"all": ("everything", len(cards)), "any": ("with warnings", sum(map(bool, found)))}
    counts |= {kind: (KINDS[kind], number) for kind, number in count_kinds(found).items()}
    buttons = []
    for kind, (name, number) in counts.items():
        pressed = "true" if kind == "all" else "false"
        buttons.append(f'<button type="button" value="{kind}" aria-pressed="{pressed}">{name} ({number})</button>')
    rows = []
    for name, text in totals([view for view, *_ in clips], prompts).items():
        rows.append(f"<div><dt>{name}</dt><dd>{text}</dd></div>")
    parts = {
        "title": html.escape(f"What training sees of {args.instance_data_root or args.dataset_name}"),
        "about": about,
        "totals": "".join(rows),
        "buttons": "".join(buttons),
        "cards": "\n".join(cards),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def preview(script: ModuleType, args: Namespace, page: Path) -> str:
    """Write the page. Returns what the terminal says. Raises the script's RunError for what cannot work."""
    limit = None
    if args.pretrained_model_name_or_path:
        transformer_config, _, dataset = open_run(script, args)
        limit = transformer_config["max_text_seq_length"]
    else:
        script.check_args(args)
        dataset = open_dataset(script, args)
    texts = [dataset.prompt(index) for index in range(len(dataset))]
    texts += [inputs["prompt"] for inputs in script.validation_inputs(args)]
    captions = read_captions(script, args, texts, limit)
    prompts = validation_prompts(script, args, dataset, captions[len(dataset) :], limit)
    captions = captions[: len(dataset)]
    views = look_at(script, args, dataset)
    found = find_warnings(dataset, views, captions, limit, args.fps)
    names = [record.path.removeprefix(f"{Path(args.instance_data_root or '.')}/") for record in dataset.records]
    content = make_page(args, names, list(zip(views, captions, found, strict=True)), prompts, limit)
    content = content.encode(errors="backslashreplace")  # a file's name may hold bytes that are no UTF-8
    with script.explain(f"--page: {page} cannot be written", OSError):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(content)
    lines = [f"{name:10} {text}" for name, text in totals(views, prompts).items()]
    counts = count_kinds(found + [prompt.warnings for prompt in prompts])
    lines += [f"warning    {number} {KINDS[kind]}" for kind, number in counts.items()]
    if limit is None:
        lines.append(f"note       {NO_LIMIT}")
    return "\n".join([*lines, f"page       {page} ({len(content) / 1e6:.1f} MB)"])


def folder_flags(folder: Path) -> list[str]:
    """Return the flags of a folder of clips. They stand before those of the user, which override them. A folder
    without prompts.txt has captions beside its clips, for the script; the empty model means that none is given."""
    return [
        f"--instance_data_root={folder}", "--caption_column=prompts.txt", "--video_column=videos.txt",
        f"--output_dir={folder}", "--pretrained_model_name_or_path=",
    ]  # fmt: skip


def end_with(problem: str) -> None:
    """End as argparse does for a wrong flag."""
    print(f"preview_data.py: error: {problem}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    usage = "preview_data.py FOLDER|SCRIPT [flags of the script] [--page FILE.html]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("source", type=Path, help="folder of clips, or the script of a run; its flags follow")
    parser.add_argument("--page", type=Path, help="file to write; default: preview.html in --output_dir")
    own, flags = parser.parse_known_args(argv)
    path = own.source
    if path.is_dir():
        flags = [*folder_flags(path), *flags]
        path = SCRIPT
    if not path.exists():
        end_with(f"there is no file or folder {path}: first give a folder of clips or a training script, then flags")
    if path.suffix != ".py" or "class VideoDataset" not in path.read_text(errors="replace"):
        end_with(f"{path} is neither a folder of clips nor a training script")
    script = load_script(path)
    args = script.get_args(flags)
    script.set_up_logging()
    with ending_as(script, "preview_data.py"):
        print(preview(script, args, own.page or Path(args.output_dir, "preview.html")))


if __name__ == "__main__":
    main()
