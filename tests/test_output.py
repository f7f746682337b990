"""What a run says while it goes on, on a terminal and in a file, and at its end."""

import os
import pty
import re
import struct
import termios
import threading
import time
from fcntl import ioctl

import pytest
from conftest import SHARED
from test_processes import draw_bars
from test_training import read_metrics

ASK = {"validation_prompt": "a red square", "validation_steps": 2, "num_inference_steps": 2}


def slow(name: str, seconds: float, bars: float | None = None):
    """Makes a run in which a function takes longer, and a log that tells of progress more often."""

    def prepare(module):
        function, bar_style = getattr(module, name), module.bar_style

        def sleep_before(*arguments, **keywords):
            time.sleep(seconds)
            return function(*arguments, **keywords)

        setattr(module, name, sleep_before)
        if bars is not None:
            often = {"mininterval": bars, "maxinterval": bars, "delay": 0.01}
            module.bar_style = lambda shown: bar_style(shown) | (often if shown else {})

    return prepare


LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) .+")
OF_LIBRARIES = re.compile(r"\[.*real_accelerator.py.*|.*gloo.*")  # DeepSpeed, where there is no GPU


def test_log_in_a_file_is_lines(launch, clips):
    settings = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 6} | ASK
    child = launch(prepare=slow("diffusion_loss", 0.3, bars=0.5), **settings)
    assert child.wait() == 0
    said = child.said()
    assert "\r" not in said and "\x1b" not in said and "it/s" not in said
    assert [line for line in said.splitlines() if not LINE.fullmatch(line) and not OF_LIBRARIES.fullmatch(line)] == []
    assert re.search(r"INFO Encoding videos: 4 of 4, 00:\d\d gone, 00:00 left, +\d.*video", said)
    steps = re.findall(r"Training: (\d) of 6, 00:\d\d gone, [\d:?]+ left, .*step.*, loss=[\d.]+, lr=[\d.e-]+", said)
    assert steps == sorted(steps) and 2 <= len(steps) <= 5 and steps[-1] == "6"


@SHARED
def test_a_line_of_progress_comes_once_a_minute(script, monkeypatch):
    monkeypatch.setattr(script.sys.stderr, "isatty", lambda: False, raising=False)
    style = script.bar_style(True)
    assert style["mininterval"] == style["maxinterval"] == 60 and isinstance(style["file"], script.LogLines)


@SHARED
def test_bars_on_a_terminal(script, launch, tmp_path, clips):
    """They have a rate and the time that is left, and the lines of the log stand above them."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    shown = []

    def read():
        while True:
            try:
                shown.append(os.read(ours, 65536))
            except OSError:
                return

    def prepare(module):
        os.dup2(theirs, 2)
        slow("diffusion_loss", 0.2)(module)

    threading.Thread(target=read, daemon=True).start()
    settings = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 6} | ASK
    assert launch(prepare=prepare, **settings).wait() == 0
    os.close(theirs)
    text = b"".join(shown).decode()
    for what in ("Encoding prompts", "Encoding videos", "Sampling prompt 1 of 1", "Training"):
        assert re.search(rf"\r{what}: +\d+%\|.*\| \d/\d \[\d\d:\d\d<[\d:?]+, .*(/s|s/)", text), what
    assert all(LINE.fullmatch(line.strip()) for line in text.splitlines() if " INFO " in line)
    assert script.list_checkpoints(tmp_path / "output") == []


@SHARED
def test_bars_are_of_the_first_process_alone(launch, clips):
    settings = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 4, "train_batch_size": 1} | ASK
    settings["validation_prompt"] = "a red square:::a blue square"  # one each
    first, second = launch(2, prepare=draw_bars, **settings)
    assert (first.wait(), second.wait()) == (0, 0)
    bars = {"Training", "Sampling", "Encoding prompts", "Encoding videos"}
    assert {bar for bar in bars if bar in first.said()} == bars
    assert [line for line in second.said().splitlines() if not OF_LIBRARIES.fullmatch(line)] == []


@pytest.mark.parametrize("steps", [500, 2])
def test_the_last_lines_say_where_how_and_how_to_go_on(run, caplog, steps):
    caplog.set_level("INFO")
    output = run(max_train_steps=3, checkpointing_steps=steps)
    where, use, go_on = (record.message for record in caplog.records[-3:])
    assert where.startswith(f"Done. {output} has the LoRA and its card, README.md")
    assert use == f'To use it: pipe.load_lora_weights("{output}"); README.md has the whole code'
    how = "the same command with --resume_from_checkpoint latest (checkpoint-2) and more steps or epochs"
    none = "no checkpoint was written (--checkpointing_steps)"
    assert go_on == f"To train on: {how if steps == 2 else none}"


@SHARED
def test_time_of_a_step_is_its_own(run, monkeypatch, script):
    """And not that of the sampling or saving before it."""
    for name in ("log_validation", "publish_checkpoint"):
        monkeypatch.setattr(script, name, getattr(script, name))  # to be put back
        slow(name, 3)(script)
    output = run(**ASK, max_train_steps=4, checkpointing_steps=3)
    assert all(row["seconds"] < 3 for row in read_metrics(output))


def test_files_are_open_to_who_may_read_new_files(run, clips):
    before = os.umask(0o027)
    try:
        output = run(instance_data_root=clips, precompute_dir=None, checkpointing_steps=2)
    finally:
        os.umask(before)
    written = [output, clips / ".cogvideox_precomputed"]
    files = [path for folder in written for path in folder.rglob("*.safetensors")]
    assert len(files) >= 2 + 8 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
