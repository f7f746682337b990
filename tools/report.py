"""Write one page about training runs, going, stopped or finished: report.html, which works offline and on a phone.

    python tools/report.py OUTPUT_DIR [OUTPUT_DIR ...] [--watch] [--page FILE.html]

Reads what the runs left in their output folders; needs no GPU and loads no model. The page has the validation videos
by step with the LoRA of each, the samples of tools/sample.py as a grid, the curves (they need plotly), the time by
stage, the warnings of the log, the settings, and the commands that use, resume and share the LoRA. Several folders are
compared: their curves in one plot, the settings that differ in a table. --watch waits until the runs have begun, and
writes the page again and again until they have ended.
"""

import argparse
import base64
import dataclasses
import datetime
import fcntl
import functools
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

TEMPLATE = Path(__file__).with_name("report_template.html")
LORA_FILE = "pytorch_lora_weights.safetensors"
WRITTEN = (
    "run.json", "metrics.jsonl", "stages.jsonl", "train.log", "state.json", LORA_FILE, "checkpoint-*", "validation"
)  # fmt: skip
PIPELINES = {"text-to-video": "CogVideoXPipeline", "image-to-video": "CogVideoXImageToVideoPipeline"}
STAGES = ("encoding prompts", "encoding videos", "training", "sampling", "saving")
VIDEO_LIMIT = 80 * 10**6  # bytes of videos in a page: more than this takes a browser long to open
POINT_LIMIT = 4000  # of a curve; a browser draws more of them slowly
QUIET_SECONDS = 900  # without a word, after which a run counts as ended; no stage but the sampling is silent for long
UNLOCKED_SECONDS = 60  # the same, where no process of this machine holds the run's lock: it may be of another machine
NOT_SETTINGS = {"output_dir", "resume_from_checkpoint", "hub_token"}
COLORS = ("#3b7dd8", "#e07b39", "#2f9e6e", "#b4559f", "#c29a1c", "#5f6bd4", "#c94f4f", "#3a9fb5")  # on white and black
BARS = "▁▂▃▄▅▆▇█"
NO_PLOTLY = "The page has no curves: they need plotly (pip install plotly)."


# ---- What a run left ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainingRun:
    """What a folder tells of a run. Each part may be empty: runs are also read while they write, or after a crash."""

    folder: Path
    name: str
    kind: str
    command: str
    args: dict
    settings: dict
    metrics: list[dict]
    stages: list[dict]
    log: list[list[str]]  # time, level, message
    ended: dict  # what state.json says
    max_step: int | None
    prompts: list[tuple[str, str | None]]  # of the videos, each with the path of its start image
    videos: dict[tuple[int, int, int], Path]  # by step, index in `prompts` and number
    samples: list[dict]  # lines of samples/index.jsonl, the newest last

    def column(self, name: str) -> tuple[list[int], np.ndarray]:
        """Steps and values of the lines of metrics.jsonl that have a finite number `name`."""
        rows = [row for row in self.metrics if is_number(row.get(name))]
        return [row["step"] for row in rows], np.array([row[name] for row in rows], dtype=float)

    @functools.cached_property
    def has_lora(self) -> bool:
        return (self.folder / LORA_FILE).is_file()

    @functools.cached_property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder)

    @functools.cached_property
    def step(self) -> int:
        saved = [int(path.name.split("-")[1]) for path in self.checkpoints]
        return max([0, *saved, *(row["step"] for row in self.metrics)])

    @functools.cached_property
    def is_trained(self) -> bool:
        """Return whether no step is left. Else a finished LoRA is that of a run which is now trained further."""
        return self.state == "finished" or self.step >= (self.max_step or 0)

    @functools.cached_property
    def finished_step(self) -> int:
        """Return the step of the finished LoRA. With --final_lora best that may be an earlier one than the last."""
        step = self.ended.get("lora_step")
        return step if isinstance(step, int) else self.step

    @functools.cached_property
    def kept_loras(self) -> dict[int, Path]:
        """Return what load_lora_weights takes of each step whose LoRA was kept."""
        kept = {int(path.name.split("-")[1]): path for path in self.checkpoints}
        if self.has_lora and self.is_trained:
            kept[self.finished_step] = self.folder / LORA_FILE
        for path in self.folder.glob("loras/step-*.safetensors"):
            number = path.stem.split("-", 1)[1]
            if number.isdecimal():
                kept[int(number)] = path
        return kept

    @functools.cached_property
    def last_lora(self) -> tuple[int, Path] | None:
        """Return the step of the last LoRA, and what load_lora_weights takes: of a finished LoRA the whole folder."""
        is_finished = self.is_trained and self.finished_step == self.step
        if self.has_lora and (is_finished or not self.kept_loras):
            return self.step, self.folder
        return max(self.kept_loras.items(), default=None)

    @functools.cached_property
    def best(self) -> tuple[int, float] | None:
        """Return the step after which the loss of the held-out clips was lowest, and that loss."""
        steps, losses = self.column("validation/loss")
        trained = [(float(loss), step) for step, loss in zip(steps, losses, strict=True) if step > 0]
        if not trained:
            return None
        loss, step = min(trained)
        return step, loss

    @functools.cached_property
    def stop(self) -> str | None:
        """Return the problem or the signal that ended the run."""
        if self.state not in ("failed", "stopped"):
            return None
        message = str(self.ended.get("message"))
        # A signal during the encoding ends Python with 128 plus its number.
        match = re.fullmatch(r"SystemExit: (\d+)", message)
        names = {str(128 + number): number.name for number in signal.Signals}
        return f"stopped by {names[match[1]]}" if match and match[1] in names else message

    @functools.cached_property
    def problems(self) -> list[list[str]]:
        """Return the warnings and errors of the log. A stop that was asked for is none, though older versions of the
        scripts log it as an error."""
        asked = self.stop.strip() if self.state == "stopped" else None
        return [entry for entry in self.log if entry[1] not in ("INFO", "DEBUG") and entry[2].strip() != asked]

    @functools.cached_property
    def state(self) -> str:
        """finished, failed, stopped by a signal, going, or silent: killed, perhaps."""
        if self.ended.get("state") in ("finished", "failed", "stopped"):
            return self.ended["state"]
        if not self.ended and self.has_lora and self.step >= (self.max_step or 0):  # of an older version
            return "finished"
        written = [path.stat().st_mtime for name in WRITTEN[:5] for path in self.folder.glob(name)]
        most = QUIET_SECONDS if is_locked(self.folder) else UNLOCKED_SECONDS
        return "going" if written and time.time() - max(written) < most else "silent"

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Of each stage; the training's are those of its steps."""
        found = Counter({"training": float(self.column("seconds")[1].sum())})
        for row in self.stages:
            if is_number(row.get("seconds")):
                found[str(row.get("stage"))] += row["seconds"]
        order = [*STAGES, *(found.keys() - set(STAGES))]
        return {name: found[name] for name in order if found[name]}


def is_locked(folder: Path) -> bool:
    """Return whether a run holds the lock of its output folder, or may hold it: older runs and some file systems have
    none."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def list_checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_json(text: str) -> dict:
    """An object, or {} where the text is something else, such as half a line."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_rows(path: Path) -> list[dict]:
    rows = map(read_json, read_text(path).splitlines())
    return [row for row in rows if isinstance(row.get("step"), int)]


def read_videos(folder: Path, args: dict) -> tuple[list, dict]:
    """Prompts with the paths of their start images, and videos by step, index in the prompts and number. Videos of
    other prompts than those of the flags, as before a resume, are told apart by samples.jsonl."""
    separator = args.get("validation_prompt_separator") or ":::"
    given = (args.get("validation_prompt"), args.get("validation_images"))
    texts, images = (str(value).split(separator) if value else [] for value in given)
    prompts = list(itertools.zip_longest(texts, images[: len(texts)]))
    text_of = {name: row.get("prompt") for row in read_rows(folder / "samples.jsonl") for name in row.get("files", [])}
    videos = {}
    for path in sorted(folder.glob("validation/*.mp4")):  # of one step, test_ is before validation_
        if match := re.search(r"_step-(\d+)_prompt-(\d+)_video-(\d+)$", path.stem):
            step, index, number = map(int, match.groups())
            text = text_of.get(path.name)
            while len(prompts) <= index:
                prompts.append((f"prompt {len(prompts) + 1}", None))
            if text and prompts[index][0] != text:
                others = [position for position, (known, _) in enumerate(prompts) if known == text]
                index = others[0] if others else len(prompts)
                prompts += [] if others else [(text, None)]
            videos.setdefault((step, index, number), path)
    return prompts, videos


def read_samples(folder: Path) -> list[dict]:
    """Return the lines of samples/index.jsonl. A later line of the same file replaces the earlier one."""
    found = {}
    for row in map(read_json, read_text(folder / "samples" / "index.jsonl").splitlines()):
        name = row.get("file")
        # A path could name any file of this machine, which the page would then have in it.
        if isinstance(name, str) and name and Path(name).name == name:
            found.pop(name, None)
            found[name] = row
    return list(found.values())


def read_log(path: Path) -> list[list[str]]:
    """Time, level and message of each entry; a message may have several lines."""
    entries = []
    for line in read_text(path).splitlines():
        if match := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)", line):
            entries.append(list(match.groups()))
        elif entries:
            entries[-1][2] += f"\n{line}"
    return entries


def has_run(folder: Path) -> bool:
    return any(path for pattern in WRITTEN for path in folder.glob(pattern))


def may_get_run(folder: Path) -> bool:
    """Return whether a run may yet begin in a folder: it is missing, or has at most hidden files, the pages of tools,
    and the empty folder of the trackers, which is made first."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    others = [path for path in folder.iterdir() if path.name[0] != "." and path.suffix != ".html"]
    return not any(path.is_file() or any(path.iterdir()) for path in others)


def read_run(folder: Path, name: str) -> TrainingRun:
    """Raises SystemExit where nothing of a run is found."""
    if not has_run(folder):
        sys.exit(f"report.py: error: {folder} is not the output folder of a run: it has none of {', '.join(WRITTEN)}")
    about, card = read_json(read_text(folder / "run.json")), read_text(folder / "README.md")
    args, settings = (about.get(part) if isinstance(about.get(part), dict) else {} for part in ("args", "settings"))
    for checkpoint in list_checkpoints(folder) if not settings else []:  # of a run before run.json was written
        settings = read_json(read_text(checkpoint / "training_state.json")).get("settings") or settings
    if not args and (match := re.search(r"^A LoRA for \S+ with (\S+)\.$", card, re.M)):
        args = {"pretrained_model_name_or_path": match[1]}
    kind = about.get("kind") or "".join(re.findall(r"^pipeline_tag: (\S+)$", card, re.M)[:1])
    prompts, videos = read_videos(folder, args)
    max_step = about.get("max_train_steps") or args.get("max_train_steps")
    max_step = int(max_step) if is_number(max_step) else None
    ended = read_json(read_text(folder / "state.json"))
    rows, stages = read_rows(folder / "metrics.jsonl"), read_rows(folder / "stages.jsonl")
    command, log = str(about.get("command") or ""), read_log(folder / "train.log")
    return TrainingRun(
        folder, name, kind, command, args, settings, rows, stages, log, ended, max_step, prompts, videos,
        read_samples(folder),
    )


def names_of(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# ---- Numbers and words ----------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def first_and_last(losses: np.ndarray) -> tuple[float, float]:
    """Mean loss of the first and of the last fifth of the run; a single loss depends on its noise level."""
    part = max(1, len(losses) // 5)
    return float(losses[:part].mean()), float(losses[-part:].mean())


def loss_change(run: TrainingRun) -> str:
    losses = run.column("loss")[1]
    if not len(losses):
        return "–"
    first, last = first_and_last(losses)
    return f"{first:.4f} → {last:.4f} ({last / first - 1:+.1%})" if first else f"{first:.4f} → {last:.4f}"


def held_out_words(run: TrainingRun) -> str:
    steps, losses = run.column("validation/loss")
    if not steps:
        return "–"
    lowest = int(losses.argmin())
    shown = [f"{losses[i]:.4f} at step {steps[i]}" for i in (0, lowest, -1)]
    return "first {}, lowest {}, last {}".format(*shown)


def state_words(run: TrainingRun) -> str:
    steps = f"step {run.step}" + (f" of {run.max_step}" if run.max_step else "")
    if run.state == "finished":
        return f"finished after {run.step} steps" if run.step else "finished"
    if run.state == "going":
        seconds = run.column("seconds")[1]
        left = duration(float(np.median(seconds)) * (run.max_step - run.step)) if len(seconds) and run.max_step else ""
        return f"going: {steps}" + (f", about {left} of training left" if left and run.step < run.max_step else "")
    silent = f"silent since {steps}: killed, or sampling for long"
    return f"{run.state} at {steps}" if run.state in ("stopped", "failed") else silent


def facts(run: TrainingRun) -> dict[str, str]:
    """The numbers that one asks for first."""
    seconds, memory = run.column("seconds")[1], [row["memory"] for row in run.metrics + run.stages if "memory" in row]
    peak, total = max(filter(is_number, memory), default=0), sum(run.seconds.values())
    return {
        "loss": loss_change(run),
        "loss of held-out clips": held_out_words(run),
        "time": duration(total) if total else "–",
        "a step takes": duration(float(np.median(seconds))) if len(seconds) else "–",
        "memory, peak": f"{peak / 2**30:.2f} GiB" if peak else "–",
    }


def load_line(path: Path) -> str:
    """Return the Python that loads a LoRA into the pipeline."""
    return f"pipe.load_lora_weights({json.dumps(str(path), ensure_ascii=False)})"


def lora_of_step(run: TrainingRun, step: int) -> tuple[str, str]:
    """Return words about the LoRA of a step, and the line that loads it, or "" where there is none."""
    if step in run.kept_loras:
        path = run.kept_loras[step]
        return f"LoRA of step {step}: {path}", load_line(path)
    if step > 0:
        return f"The LoRA of step {step} was not kept.", ""
    if run.args.get("init_lora"):
        return f"Before the training, with --init_lora {run.args['init_lora']}.", ""
    return "Before the training: the base model without a LoRA.", ""


def last_and_best(run: TrainingRun) -> dict[str, str]:
    """Return words about the last LoRA and about the one with the lowest loss of held-out clips, each with the line
    that loads it, or "" where it was not kept."""
    last_step = run.last_lora[0] if run.last_lora else None
    found = {}
    if run.last_lora:
        found[f"Last LoRA: step {last_step}"] = load_line(run.last_lora[1])
    if run.best is None:
        return found
    step, loss = run.best
    words = f"Best LoRA: step {step}, with the lowest loss of held-out clips, {loss:.4f}"
    steps, losses = run.column("validation/loss")
    if steps[0] == 0 and losses[0] < loss:
        words += f" (before the training it was lower, {losses[0]:.4f})"
    if step == last_step:
        return {words.replace("Best LoRA", "Last and best LoRA"): load_line(run.last_lora[1])}
    line = load_line(run.kept_loras[step]) if step in run.kept_loras else ""
    found[words if line else f"{words}. It was not kept"] = line
    return found


def use_command(run: TrainingRun) -> str:
    """Return Python that samples with the finished LoRA, or with the last one."""
    if run.last_lora is None:
        return ""
    lora = run.folder if run.has_lora and run.is_trained else run.last_lora[1]
    args, prompts = run.args, [text for text, _ in run.prompts]
    pipeline, base = PIPELINES.get(run.kind, PIPELINES["text-to-video"]), args.get("pretrained_model_name_or_path")
    dtype = "float16" if run.settings.get("mixed_precision") == "fp16" else "bfloat16"
    names = ("height", "width", "num_inference_steps", "guidance_scale")
    sampling = {"prompt": prompts[0] if prompts else f"{args.get('id_token') or ''} your prompt".strip()}
    sampling |= {name: args[name] for name in names if args.get(name) is not None}
    if is_number(args.get("max_num_frames")):
        sampling["num_frames"] = (int(args["max_num_frames"]) - 1) // 4 * 4 + 1
    call = "".join(f"    {name}={value!r},\n" for name, value in sampling.items())
    has_image, image = run.kind == "image-to-video", run.folder / "first_frame.png"
    if has_image:
        call += f"    image=load_image({(str(image) if image.is_file() else 'your_image.png')!r}),\n"
    return (
        f"import torch\nfrom diffusers import {pipeline}\n"
        f"from diffusers.utils import export_to_video{', load_image' * has_image}\n\n"
        f"pipe = {pipeline}.from_pretrained({base or 'the base model'!r}, dtype=torch.{dtype})\n"
        f"{load_line(lora)}\npipe.enable_model_cpu_offload()\npipe.vae.enable_tiling()\n"
        f'video = pipe(\n{call}).frames[0]\nexport_to_video(video, "video.mp4", fps={args.get("fps") or 8})'
    )


def words_of(command: str) -> list[str]:
    """Split a command as a shell does; where it has been cut short within a quotation, at its spaces."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def names_launcher(run: TrainingRun) -> bool:
    """Return whether run.json has the whole command. Older versions noted it from the script's name on."""
    words = words_of(run.command)
    return bool(words) and not words[0].endswith(".py")


def resume_command(run: TrainingRun) -> str:
    words = words_of(run.command)
    if not words:
        return ""
    if not names_launcher(run):
        words = ["accelerate", "launch", "--num_processes", str(run.settings.get("num_processes") or 1), *words]
    flag = "--resume_from_checkpoint"
    if flag in words:  # the run was itself resumed, perhaps from an older checkpoint
        position = words.index(flag)
        del words[position : position + 2]
    words = [word for word in words if not word.startswith(f"{flag}=")]
    return shlex.join([*words, flag, "latest"])


def share_command(run: TrainingRun) -> str:
    """As the script says it when its own upload fails."""
    names = [LORA_FILE, "README.md", "first_frame.png", *sorted(p.name for p in run.folder.glob("final_video_*.mp4"))]
    names = [name for name in names if (run.folder / name).is_file()]
    repo_id = run.args.get("hub_model_id") or run.folder.resolve().name
    words = ["hf", "upload", str(repo_id), str(run.folder), *(f"--include={name}" for name in names)]
    return shlex.join(words) if run.has_lora else ""


# ---- The page -------------------------------------------------------------------------------------------------------


class Markup(str):
    """HTML that this file made; what runs wrote is escaped."""


def escape(value) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def table(heads: list[str], rows: list[list], css: str) -> str:
    """Cells are escaped; the first one of a row is its name."""
    lines = ["".join(f"<th scope=col>{escape(cell)}</th>" for cell in heads)]
    for first, *others in rows:
        lines.append(f"<th scope=row>{escape(first)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in others))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="{css}">{body}</table></div>'


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` steps around each step."""
    ones = np.ones(min(window, len(losses)))
    return np.convolve(losses, ones, "same") / np.convolve(np.ones(len(losses)), ones, "same")


def curve(steps: list[int], values: np.ndarray, **look) -> dict:
    every = math.ceil(len(steps) / POINT_LIMIT) or 1
    return {"x": steps[::every], "y": [float(f"{value:.7g}") for value in values[::every]]} | look


def plots(runs: list[TrainingRun]) -> list[dict]:
    """Return the plots: name, title and traces, as plotly takes them, and the range of an axis that does not start at
    0."""
    titles = {"loss": "Loss", "validation/loss": "Loss of held-out clips", "lr": "Learning rate"}
    titles |= {"grad_norm": "Gradient norm", "seconds": "Seconds a step"}
    found = []
    for column, title in titles.items():
        traces = [trace for index in range(len(runs)) for trace in traces_of(runs, index, column)]
        if not traces:
            continue
        plot = {"name": column.replace("validation/loss", "held_out"), "title": title, "traces": traces}
        if column == "validation/loss":
            plot["range"] = fitted_range([value for trace in traces for value in trace["y"]])
        found.append(plot)
    return found


def fitted_range(values: list[float]) -> list[float]:
    """Return the ends of an axis that shows how much the values differ. Below them is space for a label."""
    low = min(values)
    high = max(values)
    span = high - low or abs(low) / 100 or 1
    return [low - span / 4, high + span / 8]


def traces_of(runs: list[TrainingRun], index: int, column: str) -> list[dict]:
    """Return the curves of one run: each loss and its mean, or the held-out clips' loss with its lowest point."""
    run, color = runs[index], COLORS[index % len(COLORS)]
    steps, values = run.column(column)
    if not steps:
        return []
    name = f"{escape(run.name)} " if len(runs) > 1 else ""
    look = {"mode": "lines", "line": {"color": color, "width": 2}}
    look |= {"legendgroup": str(index)} if name else {}
    if column == "loss":
        window = max(5, len(steps) // 15)
        faint = {"opacity": 0.3, "line": {"color": color, "width": 1}, "showlegend": not name}
        each = curve(steps, values, **look | faint, name=f"{name}each step")
        return [each, curve(steps, smoothed(values, window), **look, name=f"{name}mean of {window} steps")]
    if column == "validation/loss":
        dots = {"mode": "lines+markers", "marker": {"size": 7, "symbol": "diamond"}}
        return [curve(steps, values, **look | dots, name=f"{name}held-out clips"), lowest_point(run, color, name)]
    return [curve(steps, values, **look, name=name or column)]


def lowest_point(run: TrainingRun, color: str, name: str) -> dict:
    """Return the mark of the lowest loss of held-out clips, with words where the plot has one run only."""
    steps, losses = run.column("validation/loss")
    lowest = int(losses.argmin())
    ring = {"size": 15, "symbol": "circle-open", "color": color, "line": {"width": 2}}
    mark = {"mode": "markers", "marker": ring, "hoverinfo": "skip", "showlegend": False}
    if not name:
        part = (steps[lowest] - steps[0]) / max(steps[-1] - steps[0], 1)
        side = "right" if part < 0.25 else "left" if part > 0.75 else "center"  # so that the words stay in the plot
        words = f"lowest: {losses[lowest]:.4f} at step {steps[lowest]}"
        mark |= {"mode": "markers+text", "text": [words], "textposition": f"bottom {side}"}
    return curve([steps[lowest]], losses[[lowest]], **mark, name=f"{name}lowest")


def is_whole(content: bytes) -> bool:
    """Return whether an MP4 file has its table of frames, which is written last."""
    return b"moov" in content


def chosen_videos(runs: list[TrainingRun]) -> tuple[dict[str, bytes], dict[str, bytes], list[int]]:
    """Return the videos of the page by run/step/prompt/number, the samples by run/file, and the steps that are left
    out. The first and the last step of each run are kept, then come the newest samples and the newest other steps, up
    to VIDEO_LIMIT."""
    files: dict[int, dict[str, bytes]] = {}
    kept = set()
    for index, run in enumerate(runs):
        for (step, prompt, number), path in run.videos.items():
            content = path.read_bytes() if path.is_file() else b""
            if is_whole(content):
                files.setdefault(step, {})[f"{index}/{step}/{prompt}/{number}"] = content
        own = [step for step, found in files.items() if any(key.startswith(f"{index}/") for key in found)]
        kept |= {min(own), max(own)} if own else set()
    sizes = {step: sum(map(len, found.values())) for step, found in files.items()}
    total = sum(sizes[step] for step in kept)
    samples = {}
    for index, run in enumerate(runs):
        for row in reversed(run.samples):
            path = run.folder / "samples" / row["file"]
            content = path.read_bytes() if path.is_file() else b""
            if is_whole(content) and total + len(content) <= VIDEO_LIMIT:
                samples[f"{index}/{row['file']}"] = content
                total += len(content)
    for step in sorted(files.keys() - kept, reverse=True):
        if (total := total + sizes[step]) > VIDEO_LIMIT:
            break
        kept.add(step)
    videos = {key: content for step in sorted(kept) for key, content in files[step].items()}
    return videos, samples, sorted(files.keys() - kept)


def start_image(run: TrainingRun, path: str | None, *copies: Path) -> str:
    """Return the start image of a prompt as a `figure`, cropped as the script crops it, if it or a copy is here."""
    if path is None:
        return ""
    shown = f'<p class="gone">not on this machine: {escape(path)}</p>'
    for candidate in (Path(path), *copies):
        try:
            image = ImageOps.exif_transpose(Image.open(candidate)).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        height, width = (size if is_number(size := run.args.get(name)) else 1 for name in ("height", "width"))
        if width > 1 and run.args.get("video_reshape_mode") != "stretch":
            image = ImageOps.fit(image, (int(width), int(height)), Image.Resampling.BICUBIC)
        image.thumbnail((720, 720))
        image.save(buffer := io.BytesIO(), "JPEG", quality=90)
        shown = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        break
    return f'<figure class="start">{shown}<figcaption>start image</figcaption></figure>'


def video_cells(runs: list[TrainingRun], members: list[tuple[int, int]], number: int, videos: dict) -> list[str]:
    """Of one prompt: first the videos before training (one, where the runs have the same), then one of each run that
    follows the slider."""
    before, after, seen = [], [], set()
    cell = '<figure><video muted playsinline preload="auto" {}></video><figcaption>{}</figcaption></figure>'
    for index, prompt in members:
        keys = [key for key in videos if re.fullmatch(rf"{index}/\d+/{prompt}/{number}", key)]
        if not keys:
            continue
        name, steps = runs[index].name if len(runs) > 1 else "", [int(key.split("/")[1]) for key in keys]
        color, path = COLORS[index % len(COLORS)], f'data-run="{index}" data-prompt="{prompt}" data-number="{number}"'
        if len(keys) > 1 and videos[keys[0]] not in seen:
            words = "before training" if steps[0] == 0 else f"step {steps[0]}, the first"
            before.append(cell.format(f'{path} data-steps="[{steps[0]}]"', words))
            seen.add(videos[keys[0]])
        words = f'<b style="color:{color}">{escape(name)}</b> <span class="step"></span>'
        after.append(cell.format(f'{path} data-steps="{steps}"', words))
    return before + after


def videos_section(runs: list[TrainingRun], videos: dict[str, bytes], left_out: list[int]) -> str:
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for index, run in enumerate(runs):
        for prompt, key in enumerate(run.prompts):
            groups.setdefault(key, []).append((index, prompt))
    shown = []
    for (text, _), members in groups.items():
        run, prompt = runs[members[0][0]], members[0][1]
        copies = [run.folder / "first_frame.png"] if prompt == 0 else []  # which the model card shows
        image, rows = start_image(run, run.prompts[prompt][1], *copies), []
        for number in sorted({int(key.split("/")[3]) for key in videos}):
            if cells := video_cells(runs, members, number, videos):
                rows.append(f'<div class="row">{image}{"".join(cells)}</div>')
        if rows:
            shown.append(f"<h3>“{escape(text)}”</h3>{''.join(rows)}")
    if not shown:
        return ""
    steps = sorted({int(key.split("/")[1]) for key in videos})
    note = ""
    if left_out:
        words = f"the videos of {len(left_out)} steps between {left_out[0]} and {left_out[-1]}"
        note = f"<p class=note>Left out, since the page would be too large: {words}. They are in validation/.</p>"
    slider = f'<input id="slider" type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" list="marks"'
    marks = "".join(f"<option value={index}></option>" for index in range(len(steps)))
    loras = "".join(
        f'<div class="lora" data-run="{index}"><small></small>{command_box("")}</div>'
        for index, own in enumerate(loras_of_videos(runs, videos))
        if own
    )
    return (
        f'<section id="videos"><h2>Videos</h2><div class="controls"><button class="play">Pause</button>'
        f'{slider} aria-label="step"><datalist id="marks">{marks}</datalist>'
        f'<output id="step"></output></div>{loras}{note}{"".join(shown)}</section>'
    )


def loras_of_videos(runs: list[TrainingRun], videos: dict[str, bytes]) -> list[dict[int, list[str]]]:
    """Return of each run, by the step of its videos in the page, words about the LoRA and the line that loads it."""
    found = [{} for _ in runs]
    for key in videos:
        index, step = map(int, key.split("/")[:2])
        words, line = lora_of_step(runs[index], step)
        found[index][step] = [f"{runs[index].name}: {words}" if len(runs) > 1 else words, line]
    return found


def number_words(value) -> str:
    """Return a number of samples/index.jsonl as words, or whatever else is there."""
    if is_number(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return plain(value)


def samples_section(runs: list[TrainingRun], samples: dict[str, bytes]) -> str:
    """Return the samples of tools/sample.py: for each prompt, image and seed a table of LoRAs and strengths."""
    grids: dict[tuple, list[tuple[int, dict]]] = {}
    for index, run in enumerate(runs):
        for row in run.samples:
            image = row.get("image")
            key = (str(row.get("prompt")), None if image is None else str(image), number_words(row.get("seed")))
            grids.setdefault(key, []).append((index, row))
    if not grids:
        return ""
    missing = sum(len(run.samples) for run in runs) - len(samples)
    note = ""
    if missing:
        note = f"<p class=note>{missing} of the samples are not in the page, since it would be too large, or since "
        note += "they are not whole files in samples/.</p>"
    shown = []
    for (prompt, image, seed), members in grids.items():
        start = start_image(runs[members[0][0]], image)
        title = f"<h3>“{escape(prompt)}” <small>seed {escape(seed)}</small></h3>"
        shown.append(f'{title}<div class="grid">{start}{sample_grid(runs, members, samples)}</div>')
    return (
        f'<section id="samples"><h2>Samples</h2><div class="controls"><button class="play">Pause</button></div>'
        f"{note}{''.join(shown)}</section>"
    )


def sample_grid(runs: list[TrainingRun], members: list[tuple[int, dict]], samples: dict[str, bytes]) -> str:
    """Return the samples of one prompt, image and seed as a table: a row for each LoRA, a column for each strength."""
    cells: dict[tuple, dict[str, str]] = {}
    strengths = {}
    for index, row in members:
        strength = number_words(row.get("strength"))
        strengths[strength] = row["strength"] if is_number(row.get("strength")) else math.inf
        step = row["step"] if is_number(row.get("step")) else -1
        own = cells.setdefault((index, step, row.get("lora") == "final", str(row.get("lora"))), {})
        own[strength] = own.get(strength, "") + sample_cell(index, row, samples)
    columns = sorted(strengths, key=strengths.get)
    rows = []
    for (index, step, is_final, lora), own in sorted(cells.items()):
        name = f"{runs[index].name}, " if len(runs) > 1 else ""
        name += f"step {step:g}" if step >= 0 else lora
        if is_final:
            name += ", last" if step == runs[index].step else ", finished"
        rows.append([name, *(Markup(own.get(strength, "")) for strength in columns)])
    return table(["", *(f"strength {strength}" for strength in columns)], rows, "samples")


def sample_cell(index: int, row: dict, samples: dict[str, bytes]) -> str:
    """Return one sample as a `figure`."""
    words = ", ".join(f"{name} {number_words(row.get(name))}" for name in ("step", "strength", "seed"))
    shown = f'<p class="gone">not in the page: {escape(row["file"])}</p>'
    key = f"{index}/{row['file']}"
    if key in samples:
        shown = f'<video muted playsinline preload="auto" data-sample="{escape(key)}"></video>'
    return f"<figure>{shown}<figcaption>{escape(words)}</figcaption></figure>"


def time_section(run: TrainingRun) -> str:
    total = sum(run.seconds.values())
    rows = []
    for name, seconds in run.seconds.items():
        own = [row for row in run.stages if row.get("stage") == name] if name != "training" else run.metrics
        peak = max((row["memory"] for row in own if is_number(row.get("memory"))), default=0)
        number = len(run.column("seconds")[0]) if name == "training" else len(own)
        times = f"{number} {'step' if name == 'training' else 'time'}{'s' * (number != 1)}"
        bar = Markup(f'<i class="bar" style="width:{seconds / total:.1%}"></i>')
        rows.append([name, bar, f"{seconds / total:.0%}", duration(seconds), times])
        rows[-1].append(f"{peak / 2**30:.2f} GiB" if peak else "–")
    if not rows:
        return ""
    note = "<p class=note>Memory is the device's; of a run on the CPU, the whole process's.</p>"
    heads = ["stage", "", "share", "time", "", "memory, peak"]
    return f"<h3>Time</h3>{table(heads, rows, 'numbers')}{note}"


def log_section(run: TrainingRun) -> str:
    found = Counter((level, message) for _, level, message in run.problems)
    last = {(level, message): moment for moment, level, message in run.problems}
    entries = [
        f'<li class="{escape(key[0].lower())}"><small>{escape(last[key])} {escape(key[0])}'
        f"{f', {times} times' if times > 1 else ''}</small><pre>{escape(key[1])}</pre></li>"
        for key, times in list(found.items())[-100:]
    ]
    words = f"<ul class=log>{''.join(entries)}</ul>" if entries else "<p>No warning and no error.</p>"
    return f"<h3>Warnings and errors of the log</h3>{words}" if run.log else ""


def command_box(text: str) -> str:
    """Return a command with a button that copies it."""
    return f'<div class="command"><button class="copy">Copy</button><pre>{escape(text)}</pre></div>'


def commands_section(run: TrainingRun) -> str:
    resume = "To resume it"
    if not names_launcher(run):
        resume += ", with the same --config_file, if there was one"
    resume += "; for more training, with a larger --max_train_steps or --num_train_epochs"
    commands = {"To use the LoRA": use_command(run), resume: resume_command(run)}
    commands["To share it, after hf auth login"] = share_command(run)
    shown = [f"<h4>{escape(title)}</h4>{command_box(text)}" for title, text in commands.items() if text]
    return f"<h3>Commands</h3>{''.join(shown)}" if shown else ""


def pairs(values: dict, css: str = "pairs") -> str:
    """Names and values side by side, without those that say nothing."""
    shown = {name: plain(value) for name, value in values.items() if value not in (None, False, "")}
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in shown.items())
    return f"<dl class={css}>{cells}</dl>"


def settings_section(run: TrainingRun) -> str:
    flags = f"<details><summary>All flags</summary>{pairs(run.args)}</details>" if run.args else ""
    settings = pairs(run.settings) if run.settings else ""
    return f"<h3>Settings</h3>{settings}{flags}" if settings or flags else ""


def plain(value) -> str:
    """Return a value of run.json in words. A list of sizes, as --buckets has it, is written as on the command line."""
    if isinstance(value, list):
        value = ["x".join(map(str, part)) if isinstance(part, list) else part for part in value]
        separator = "; " if any(" " in str(part) for part in value) else " "
        return separator.join(map(str, value))
    return "–" if value is None else str(value)


def comparison(runs: list[TrainingRun]) -> str:
    """A column a run: how it went, and the settings that differ."""
    figures = list(map(facts, runs))
    rows = [["state", *map(state_words, runs)]]
    rows += [[name, *(own[name] for own in figures)] for name in figures[0]]
    loras = ["\n".join(f"{words}\n{line}".strip() for words, line in last_and_best(run).items()) for run in runs]
    rows += [["to use it", *loras]] if any(loras) else []
    settings = [{n: v for n, v in (run.args | run.settings).items() if n not in NOT_SETTINGS} for run in runs]
    names = sorted({name for values in settings for name in values})
    differing = [[name, *(plain(values.get(name)) for values in settings)] for name in names]
    differing = [row for row in differing if len(set(row[1:])) > 1]
    same = "<p>The settings are the same.</p>"
    heads = ["", *(run.name for run in runs)]
    found = table(heads, differing, "differing") if differing else same
    return f"<h2>Results</h2>{table(heads, rows, 'results')}<h2>Settings that differ</h2>{found}"


def head(run: TrainingRun) -> str:
    base, token = run.args.get("pretrained_model_name_or_path"), run.args.get("id_token")
    clips, rank = (run.settings.get(name) for name in ("num_clips", "rank"))
    about = [f"Base model {escape(Path(base).name if Path(base).is_absolute() else base)}"] if base else []
    about += [f"{escape(clips)} clips"] if clips else []
    about += [f"rank {escape(rank)}"] if rank else []
    about += [f"trigger word <b>{escape(token)}</b>"] if token else []
    part = run.step / run.max_step if run.max_step else 0
    bar = f'<progress max="1" value="{min(part, 1):.4f}"></progress>' if part and run.state != "finished" else ""
    figures = {name: text for name, text in facts(run).items() if text != "–"}
    last = run.log[-1][2] if run.log and run.state != "finished" else ""
    why = f'<pre class="why">{escape(run.stop or last)}</pre>' if run.stop or last else ""
    use = "".join(
        f"<h4>{escape(words)}</h4>{command_box(line) if line else ''}" for words, line in last_and_best(run).items()
    )
    about = f"A LoRA for {escape(run.kind or 'CogVideoX')}." + (f" {', '.join(about)}." if about else "")
    return (
        f"<h1>{escape(run.name)}</h1><p class=about>{about}</p>"
        f'<p class="state {run.state}">{escape(state_words(run))}</p>{bar}{why}{pairs(figures, "figures")}{use}'
    )


def plotly_code() -> str:
    """Return the JavaScript that draws the curves, or "" where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return get_plotlyjs()


def page(runs: list[TrainingRun], reload_seconds: int | None) -> str:
    """The whole page. What the runs wrote is escaped, and the page's own policy forbids it every request."""
    videos, samples, left_out = chosen_videos(runs)
    drawn = plots(runs)
    details = []
    for run in runs:
        text = time_section(run) + log_section(run) + commands_section(run) + settings_section(run)
        many = f"<details class=run><summary>{escape(run.name)}</summary>{text}</details>"
        details.append(many if len(runs) > 1 else text)
    curves = ""
    if drawn and not plotly_code():
        curves = f"<section id=curves><h2>Curves</h2><p>{NO_PLOTLY}</p></section>"
        drawn = []
    elif drawn:
        log = '<label><input type="checkbox" id="log"> logarithmic loss</label>'
        boxes = "".join(f'<div class="plot" id="plot-{plot["name"]}"></div>' for plot in drawn)
        curves = f"<section id=curves><h2>Curves</h2>{log}<div class=plots>{boxes}</div></section>"
    title = " and ".join(run.name for run in runs)
    many = f"<h1>{len(runs)} runs</h1><p class=about>{escape(title)}</p>{comparison(runs)}"
    data = {"plots": drawn, "loras": loras_of_videos(runs, videos)}
    for name, files in (("videos", videos), ("samples", samples)):
        data[name] = {key: base64.b64encode(content).decode() for key, content in files.items()}
    parts = {
        "title": escape(title),
        "refresh": f'<meta http-equiv="refresh" content="{reload_seconds}">' if reload_seconds else "",
        "head": head(runs[0]) if len(runs) == 1 else many,
        "videos": videos_section(runs, videos, left_out),
        "samples": samples_section(runs, samples),
        "curves": curves,
        "details": "".join(details),
        "written": datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        "data": json.dumps(data).replace("<", "\\u003c"),
        "plotly": plotly_code() if drawn else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


# ---- The terminal ---------------------------------------------------------------------------------------------------


def loss_bars(losses: np.ndarray, width: int = 60) -> str:
    """The loss over the steps as a row of bars, from the lowest mean to the highest."""
    means = np.array([part.mean() for part in np.array_split(losses, min(width, len(losses)))])
    levels = (means - means.min()) / max(means.max() - means.min(), 1e-12) * (len(BARS) - 1)
    return "".join(BARS[level] for level in levels.round().astype(int))


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1024:,.0f} KiB"


def summary(run: TrainingRun) -> str:
    """What the terminal shows of a run."""
    lines, losses = [f"\n{run.folder}: {state_words(run)}"], run.column("loss")[1]
    if run.stop:
        lines.append(f"  {run.stop.splitlines()[0]}")
    if len(losses):
        first, last = first_and_last(losses)
        lines.append(f"Loss over {len(losses)} steps   {loss_bars(losses)}")
        lines.append(f"  first fifth {first:.4f}, last fifth {last:.4f} ({last / max(first, 1e-12) - 1:+.1%})")
    if run.column("validation/loss")[0]:
        lines.append(f"Loss of held-out clips: {held_out_words(run)}")
    if run.seconds:
        lines.append("Time          " + ", ".join(f"{name} {duration(s)}" for name, s in run.seconds.items()))
    for words, line in last_and_best(run).items():
        lines.append(f"{words}{': ' * bool(line)}{line}")
    if problems := Counter(level for _, level, _ in run.problems):
        lines.append("Log           " + ", ".join(f"{number} {level}" for level, number in problems.items()))
    named = {"Every step": [run.folder / "metrics.jsonl"], "LoRA": [run.folder / LORA_FILE]}
    last_step = max((step for step, _, _ in run.videos), default=0)
    named["Validation"] = [path for (step, _, _), path in sorted(run.videos.items()) if step == last_step]
    named["Model card"] = [run.folder / "README.md"]
    for name, paths in named.items():
        lines += [f"{name:14}{path} ({size(path)})" for path in paths if path.is_file()]
    return "\n".join(lines + [f"{'Checkpoint':14}{path}" for path in run.checkpoints])


def wait_for_runs(folders: list[Path], seconds: int) -> None:
    """Wait until runs have begun in all folders where they may yet begin."""
    waited_for = []
    while waiting := [str(folder) for folder in folders if not has_run(folder) and may_get_run(folder)]:
        if waiting != waited_for:
            print(f"Waiting for a run to write into {' and '.join(waiting)}", flush=True)
            waited_for = waiting
        time.sleep(seconds)


def have_ended(runs: list[TrainingRun]) -> bool:
    return all(run.state in ("finished", "stopped", "failed") for run in runs)


def write_page(folders: list[Path], path: Path, reload_seconds: int | None = None) -> list[TrainingRun]:
    """Read the runs and write the page, complete or not at all; it is reloaded while a run is going."""
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page(runs, None if have_ended(runs) else reload_seconds), encoding="utf-8")
    os.replace(partial, path)
    return runs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="OUTPUT_DIR", help="--output_dir of a run")
    every = "wait for the runs, then write the page every N seconds (30), and let it reload itself, until they end"
    parser.add_argument("--watch", type=int, nargs="?", const=30, metavar="N", help=every)
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: report.html in the first folder")
    args = parser.parse_args(argv)
    if not plotly_code():
        print(NO_PLOTLY, file=sys.stderr)
    path = args.page or args.folders[0] / "report.html"
    if args.watch:
        try:
            wait_for_runs(args.folders, args.watch)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
    runs = write_page(args.folders, path, args.watch)
    print("\n".join(map(summary, runs)))
    print(f"\nReport        {path} ({size(path)}): open it in a browser", flush=True)
    try:
        while args.watch and not have_ended(runs):
            time.sleep(args.watch)
            runs = write_page(args.folders, path, args.watch)
            moment = datetime.datetime.now().strftime("%H:%M:%S")
            print(f"{moment} " + "; ".join(f"{run.name} {state_words(run)}" for run in runs), flush=True)
            if have_ended(runs):
                print("\n".join(map(summary, runs)), flush=True)
    except KeyboardInterrupt:
        write_page(args.folders, path)


if __name__ == "__main__":
    main()
