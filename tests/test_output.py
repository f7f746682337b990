"""The log of a run, on a terminal and in a file, and its last lines."""

import json
import os
import pty
import re
import struct
import termios
import threading
from fcntl import ioctl

ASK = {"validation_prompt": "a red square", "validation_steps": 2, "num_inference_steps": 2}
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) .+")
OF_LIBRARIES = re.compile(r"\[.*real_accelerator.py.*|.*gloo.*")  # DeepSpeed without a GPU


def progress(said: str, what: str) -> list[str]:
    return [line.split(" INFO ")[1] for line in said.splitlines() if f"INFO {what}: " in line]


def test_log_in_a_file_has_first_and_last_step_and_no_line_twice(launch, clips):
    child = launch(instance_data_root=clips, precompute_dir=None, max_train_steps=6, **ASK)
    assert child.wait() == 0
    said = child.said()
    assert "\r" not in said and "\x1b" not in said and "it/s" not in said
    assert [line for line in said.splitlines() if not LINE.fullmatch(line) and not OF_LIBRARIES.fullmatch(line)] == []
    steps = progress(said, "Training")
    numbers = r"\d\d:\d\d elapsed, [\d:?]+ remaining, .*step.*, loss=[\d.]+, lr=[\d.e-]+"
    assert re.fullmatch(rf"Training: 1 of 6, {numbers}", steps[0]) and len(steps) == 2  # 10 seconds apart at least
    assert re.fullmatch(rf"Training: 6 of 6, {numbers}", steps[-1])
    assert [line.split(",")[0] for line in progress(said, "Encoding videos")] == [
        "Encoding videos: 1 of 4", "Encoding videos: 4 of 4"
    ]  # fmt: skip
    lines = [line.split(" ", 1)[1] for line in said.splitlines()]
    assert len(lines) == len(set(lines)), said


def test_one_clip_is_counted_right(launch, clips):
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).write_text((clips / name).read_text().splitlines()[0] + "\n")
    child = launch(instance_data_root=clips, precompute_dir=None, max_train_steps=1)
    assert child.wait() == 0
    assert "prompts: 2 of 2 to encode" in child.said()  # the caption and the empty prompt
    assert "videos: 1 of 1 to encode" in child.said() and "Clips: 1 of 9 x 64 x 96" in child.said()
    assert not re.search(r"\b1 (video|clip|prompt|item)s", child.said())


def test_bars_on_a_terminal(launch, clips):
    """They have a rate and the remaining time, and the lines of the log stand above them."""
    reader, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    shown = []

    def read():
        while True:
            try:
                shown.append(os.read(reader, 65536))
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()
    settings = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 6} | ASK
    assert launch(prepare=lambda _: os.dup2(terminal, 2), **settings).wait() == 0
    os.close(terminal)
    text = b"".join(shown).decode()
    for what in ("Encoding prompts", "Encoding videos", "Training"):
        assert re.search(rf"\r{what}: +\d+%\|.*\| \d/\d \[\d\d:\d\d<[\d:?]+, .*(/s|s/)", text), what
    assert all(LINE.fullmatch(line.strip("\r\x1b[AK ")) for line in text.splitlines() if " INFO " in line)


def test_log_is_of_the_first_process(launch, clips):
    settings = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 4, "train_batch_size": 1} | ASK
    settings["validation_prompt"] = "a red square:::a blue square"  # one for each process
    first, second = launch(2, **settings)
    assert (first.wait(), second.wait()) == (0, 0)
    for what in ("Training: 4 of 4", "Encoding prompts", "Encoding videos", "Sampled prompt 1 of 2"):
        assert what in first.said()
    assert [line for line in second.said().splitlines() if not OF_LIBRARIES.fullmatch(line)] == []


def test_last_lines_say_where_the_lora_is_and_how_to_use_and_continue_it(run, caplog):
    caplog.set_level("INFO")
    output = run(max_train_steps=3)
    messages = [record.message for record in caplog.records]
    assert f"LoRA: {output / 'pytorch_lora_weights.safetensors'}" in messages
    assert messages[-4].startswith(f"Done. {output} has the LoRA, its card (README.md)")
    assert messages[-3].startswith("To train longer: the same command with --resume_from_checkpoint latest and")
    assert messages[-2:] == [
        f"To look at the run: python tools/report.py {output}",
        f"To use the LoRA of step 3: pipe.load_lora_weights({str(output)!r})",
    ]


def test_files_are_open_to_who_may_read_new_files(run, clips):
    before = os.umask(0o027)
    try:
        output = run(instance_data_root=clips, precompute_dir=None, checkpointing_steps=2)
    finally:
        os.umask(before)
    written = [output, clips / ".cogvideox_precomputed"]
    files = [path for folder in written for path in folder.rglob("*.safetensors")]
    assert len(files) >= 2 + 8 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


DEVICE = r"Device: CPU, \d+\.\d GiB, fp32, flash attention"


def test_log_begins_with_the_device(launch, tmp_path):
    """On the terminal and in the file, which has all later lines too, the warnings before it existed included."""
    child = launch(max_num_frames=8)
    assert child.wait() == 0
    lines = [line for line in child.said().splitlines() if LINE.fullmatch(line)]
    assert re.fullmatch(rf"\d\d:\d\d:\d\d INFO {DEVICE}", lines[0])
    written = (tmp_path / "output" / "train.log").read_text().splitlines()
    assert re.fullmatch(rf"\S+ \S+ INFO {DEVICE}", written[0])
    assert "--max_num_frames 8 is not 4k+1: 5 frames are used" in written[1]
    assert "built for" not in child.said()  # the tests ask for the CPU


def test_training_on_a_cpu_that_nobody_asked_for_is_warned_of(launch):
    child = launch(prepare=lambda _: os.environ.pop("ACCELERATE_USE_CPU"))
    assert child.wait() == 0
    warning, _ = [line for line in child.said().splitlines() if " WARNING " in line]  # the other is of so few steps
    for words in ("torch sees no GPU", "on the CPU", "nvidia-smi", "CUDA_VISIBLE_DEVICES", "is built for"):
        assert words in warning


def test_what_a_run_leaves_for_its_report(launch, clips, tmp_path):
    """Its settings, how long each stage took, and its log, with the message that it ended with."""
    settings = {"instance_data_root": clips, "max_train_steps": 2, "hub_token": "hf_secret"} | ASK
    (clips / "videos" / "00.mp4").write_bytes(b"no video")
    child = launch(**settings)
    assert child.wait() == 2
    output = tmp_path / "output"
    assert f"1 of 4 videos cannot be decoded:\n  - {clips / 'videos/00.mp4'}" in (output / "train.log").read_text()
    assert launch(**settings, skip_bad_videos=True).wait() == 0
    stages = [json.loads(line) for line in (output / "stages.jsonl").read_text().splitlines()]
    encoding = [(0, "encoding prompts"), (0, "encoding videos")]
    assert [(row["step"], row["stage"]) for row in stages] == [
        *encoding, *encoding, (0, "sampling"), (2, "saving"), (2, "sampling")
    ]  # fmt: skip
    assert all(0 <= row["seconds"] < 60 and 1e8 < row["memory"] < 1e10 for row in stages)
    run = json.loads((output / "run.json").read_text())
    assert run["kind"] == "text-to-video" and run["args"]["rank"] == run["settings"]["rank"] == 4
    assert run["args"]["validation_prompt"] == ASK["validation_prompt"] and run["settings"]["engine"] == "replicated"
    assert " --max_train_steps 2 " in run["command"] and "hf_secret" not in (output / "run.json").read_text()
    log = (output / "train.log").read_text()
    assert " WARNING 1 of 4 videos cannot be decoded" in log and " INFO Saved " in log and " INFO Done. " in log
