"""The command line: every original flag as it was, every declared flag with an effect."""

import argparse
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS
from hub import TOKEN

ORIGINALS = list(csv.DictReader((Path(__file__).parent / "original_flags.csv").open()))
REQUIRED = ["--pretrained_model_name_or_path", "m"]


def parser_actions(script) -> dict[str, argparse.Action]:
    """The declared flags, as argparse holds them."""
    found = {}
    original = argparse.ArgumentParser.parse_args

    def spy(self, *args, **kwargs):
        found.update({option: action for action in self._actions for option in action.option_strings})
        return original(self, *args, **kwargs)

    argparse.ArgumentParser.parse_args = spy
    try:
        script.get_args(REQUIRED)
    finally:
        argparse.ArgumentParser.parse_args = original
    return found


@pytest.mark.parametrize("row", ORIGINALS, ids=lambda row: row["flag"])
def test_original_flag_has_its_type_and_default(script, row):
    column = SCRIPTS[script.__name__]
    newly_in_both = row["flag"] in ("--video_reshape_mode", "--nccl_timeout")
    if not row[column] and not newly_in_both:
        assert row["flag"] not in parser_actions(script)
        return
    action = parser_actions(script)[row["flag"]]
    if row["default"] == "required":
        assert action.required
        return
    samples = {"int": ("7", 7), "float": ("0.5", 0.5), "str": ("x", "x"), "str (lower-cased)": ("ADAMW", "adamw")}
    default = row["default"]
    match = re.search(rf"{column} '([^']*)'", default)
    expected = match[1] if match else {"None": None, "False": False}.get(default, default.strip("'"))
    if row["type"] == "flag":
        assert action.default is False and action.nargs == 0
        return
    text, value = samples[row["type"]]
    if action.choices:
        text = value = list(action.choices)[-1]
        assert set(re.findall(r"\w+", row["choices"])) <= set(action.choices)
    parsed = script.get_args([*REQUIRED, row["flag"], text])
    assert getattr(parsed, row["flag"][2:]) == value and type(getattr(parsed, row["flag"][2:])) is type(value)
    if expected is None or expected is False:
        assert action.default is expected
    else:
        assert action.default == type(value)(expected)


def test_new_flags_are_those_agreed_on(script):
    new = {"--precompute_dir", "--skip_bad_videos", "--frame_sampling", "--validation_steps", "--num_inference_steps"}
    new |= {"--hub_private_repo"}
    known = {row["flag"] for row in ORIGINALS} | new | {"-h", "--help"}
    assert set(parser_actions(script)) <= known


class Recorder(argparse.Namespace):
    """Remembers which flags were read."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)


def test_every_declared_flag_is_read(script, flags, clips, hub, monkeypatch):
    """Read by the stages themselves: what check_args reads does not count."""
    (clips / "videos" / "03.mp4").write_text("no video")
    check_args = script.check_args
    monkeypatch.setattr(script, "check_args", lambda args: check_args(argparse.Namespace(**vars(args))))
    monkeypatch.setattr(script, "tracker_config", lambda _: {})

    changes = {
        "instance_data_root": clips,
        "precompute_dir": None,
        "skip_bad_videos": True,
        "optimizer": "prodigy",
        "report_to": "tensorboard",
        "validation_prompt": "a red square",
        "num_inference_steps": 2,
        "push_to_hub": True,
        "hub_token": TOKEN,
        "max_train_steps": None,
        "num_train_epochs": 2,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
    }
    args = script.get_args(flags(**changes))
    recorder = Recorder(**vars(args))
    script.main(recorder)
    unread = set(vars(args)) - recorder._read
    assert not unread and hub.repositories["me/output"].commits


def original_command(kind, model, clips, output) -> list[str]:
    """The originals' published command, at a size for the tiny model; {images} stands for the start images."""
    command = (
        f"--gradient_checkpointing --pretrained_model_name_or_path {model} --cache_dir {output}/cache --enable_tiling "
        f"--enable_slicing --instance_data_root {clips} --caption_column prompts.txt --video_column videos.txt "
        "--validation_prompt a:::b --validation_prompt_separator ::: --num_validation_videos 1 "
        "--validation_epochs 100 --seed 42 --rank 128 --lora_alpha 64 --mixed_precision no "
        f"--output_dir {output} --height 64 --width 96 --fps 8 --max_num_frames 9 --skip_frames_start 0 "
        "--skip_frames_end 0 --train_batch_size 1 --num_train_epochs 30 --checkpointing_steps 1000 "
        "--gradient_accumulation_steps 1 --learning_rate 1e-3 --lr_scheduler cosine_with_restarts "
        "--lr_warmup_steps 200 --lr_num_cycles 1 --optimizer AdamW --adam_beta1 0.9 --adam_beta2 0.95 "
        "--max_grad_norm 1.0 --allow_tf32 --report_to wandb"
    )
    if kind == "i2v":
        command += " --validation_images {images} --noised_image_dropout 0.05 --video_reshape_mode center"
    return command.split()


def test_originals_command_line_trains(script, kind, models, clips, start_images, tmp_path):
    """Launched as a user launches it, 50 denoising steps of validation and all."""
    output = tmp_path / "output"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", str(ROOT / "accelerate_configs/cpu.yaml"), str(ROOT / f"{script.__name__}.py")]
    words = original_command(kind, models[{"t2v": "t2v", "i2v": "i2v learned"}[kind]], clips, output)
    words = [word.format(images=":::".join(map(str, start_images[:2]))) for word in words]
    done = subprocess.run(launch + words, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / script.LORA_FILE).is_file()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 30 * 4
    assert sorted(path.name for path in (output / "validation").iterdir()) == [
        f"test_step-000120_prompt-{index}_video-0.mp4" for index in (0, 1)
    ]
    assert list((output / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_published_bf16_command_line_parses(script, kind):
    words = original_command(kind, "m", "d", "o")
    words[words.index("--mixed_precision") + 1] = "bf16"
    args = script.get_args(words)
    assert (args.mixed_precision, args.optimizer, args.rank, args.lora_alpha) == ("bf16", "adamw", 128, 64)
