"""The command line: every original flag as it was, every declared flag with an effect."""

import argparse
import ast
import csv
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOTH, ROOT, SCRIPTS

ORIGINALS = list(csv.DictReader((Path(__file__).parent / "original_flags.csv").open()))
REQUIRED = ["--pretrained_model_name_or_path", "m"]


def parser_actions(script) -> dict[str, argparse.Action]:
    """The declared flags, as argparse holds them."""
    found = {}
    original = argparse.ArgumentParser.parse_known_args

    def spy(self, *args, **kwargs):
        found.update({option: action for action in self._actions for option in action.option_strings})
        return original(self, *args, **kwargs)

    argparse.ArgumentParser.parse_known_args = spy
    try:
        script.get_args(REQUIRED)
    finally:
        argparse.ArgumentParser.parse_known_args = original
    return found


@BOTH
@pytest.mark.parametrize("row", ORIGINALS, ids=lambda row: row["flag"])
def test_original_flag_has_its_type_and_default(script, row, capsys):
    column = SCRIPTS[script.__name__]
    newly_in_both = row["flag"] in ("--video_reshape_mode", "--nccl_timeout")
    if not row[column] and not newly_in_both:
        assert row["flag"] not in parser_actions(script)
        return
    action = parser_actions(script)[row["flag"]]
    if row["default"] == "required":
        with pytest.raises(SystemExit):
            script.get_args([])
        assert f"{row['flag']} is missing" in capsys.readouterr().err
        return
    samples = {"int": ("7", 7), "float": ("0.5", 0.5), "str": ("x", "x"), "str (lower-cased)": ("ADAMW", "adamw")}
    default = row["default"]
    match = re.search(rf"{column} '([^']*)'", default)
    expected = match[1] if match else {"None": None, "False": False}.get(default, default.strip("'"))
    if row["type"] == "flag":
        assert action.default is False and action.nargs == 0
        return
    text, value = ("64", 64) if row["flag"] in ("--height", "--width") else samples[row["type"]]
    if action.choices:
        text = value = list(action.choices)[-1]
        assert set(re.findall(r"\w+", row["choices"])) <= set(action.choices)
    parsed = script.get_args([*REQUIRED, row["flag"], text])
    assert getattr(parsed, row["flag"][2:]) == value and type(getattr(parsed, row["flag"][2:])) is type(value)
    if expected is None or expected is False:
        assert action.default is expected
    else:
        assert action.default == type(value)(expected)


@pytest.mark.parametrize(("word", "nearest"), [("--lora_alhpa", "--lora_alpha"), ("--rnak=8", "--rank")])
def test_wrong_flag_is_answered_with_the_nearest_one(script, capsys, word, nearest):
    with pytest.raises(SystemExit) as error:
        script.get_args([*REQUIRED, word, "3"])
    message = capsys.readouterr().err
    assert error.value.code == 2 and f"{word} 3 (did you mean {nearest}?)" in message


@BOTH
def test_help_has_each_default_and_no_mathematics(script, capsys):
    with pytest.raises(SystemExit):
        script.get_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, action in parser_actions(script).items():
        if name.startswith("--") and action.nargs != 0 and action.default is not None:
            assert f"(default: {action.default})" in text.split(f" {name} ")[-1][:300], name
    assert "alpha_bar" not in text and len(text.split("model:")[0]) < 1500


@BOTH
def test_command_line_is_read_before_the_libraries_load(script):
    """So --help and wrong flags take 0.2 s and not 7 to 14."""
    code = f"""
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_path({str(ROOT / f"{script.__name__}.py")!r}, run_name="__main__")
except SystemExit:
    print(sorted({{"torch", "diffusers", "transformers", "huggingface_hub"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr[-2000:]


def test_paths_are_checked_before_the_libraries_load(script, tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["x", "--pretrained_model_name_or_path", "./nowhere", "--instance_data_root", "{tmp_path}/nowhere"]
try:
    runpy.run_path({str(ROOT / f"{script.__name__}.py")!r}, run_name="__main__")
except SystemExit as end:
    print(end.code, sorted({{"torch", "diffusers", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("2 []\n"), done.stderr[-2000:]
    assert "  - --pretrained_model_name_or_path ./nowhere: there is no such folder\n" in done.stderr
    assert f"  - --instance_data_root: there is no folder {tmp_path}/nowhere\n" in done.stderr


@BOTH
def test_new_flags_are_those_agreed_on(script):
    new = {"--precompute_dir", "--skip_bad_videos", "--frame_sampling", "--validation_steps", "--num_inference_steps"}
    new |= {"--hub_private_repo", "--buckets", "--caption_dropout", "--eval_split", "--init_lora"}
    new |= {"--lora_target_modules", "--quantize_base", "--checkpoint_policy", "--offload_activations", "--compile"}
    new |= {"--offload_base", "--lora_blocks", "--video_reader", "--loras_total_limit", "--final_lora"}
    known = {row["flag"] for row in ORIGINALS} | new | {"-h", "--help"}
    assert set(parser_actions(script)) <= known


@BOTH
def test_every_declared_flag_is_read(script):
    """By a stage of the run: as args.NAME, or by its name in a list that getattr goes through."""
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    declaring = {"add_data_args", "add_validation_args", "add_training_args", "check_args", "get_args"}
    stages = [node for node in tree.body if getattr(node, "name", "") not in declaring]
    nodes = [node for stage in stages for node in ast.walk(stage)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"}
    read |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "run.args"}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    read |= {word for text in texts for word in text.split()}
    read |= set(inspect.signature(script.VideoDataset).parameters)  # main passes each by its name
    declared = {option.removeprefix("--") for option in parser_actions(script)} - {"help", "-h"}
    assert len(declared) > 70 and declared - read == set()


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


@BOTH
@pytest.mark.long
def test_originals_command_line_trains(script, kind, models, clips, start_images, tmp_path, monkeypatch):
    """50 denoising steps of validation and all; text-to-video launched as a user launches it."""
    output = tmp_path / "output"
    words = original_command(kind, models[{"t2v": "t2v", "i2v": "i2v learned"}[kind]], clips, output)
    words = [word.format(images=":::".join(map(str, start_images[:2]))) for word in words]
    words[words.index("--num_train_epochs") + 1] = "5"  # of 30
    if kind == "i2v":
        monkeypatch.setenv("WANDB_MODE", "offline")
        script.main(script.get_args(words))
    else:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        launch += ["--config_file", str(ROOT / "accelerate_configs/cpu.yaml"), str(ROOT / f"{script.__name__}.py")]
        done = subprocess.run(launch + words, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (output / script.LORA_FILE).is_file()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 5 * 4
    phases = ("test_step-000020", "validation_step-000000")
    assert sorted(path.name for path in (output / "validation").iterdir()) == [
        f"{phase}_prompt-{index}_video-0.mp4" for phase in phases for index in (0, 1)
    ]
    assert list((output / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_published_bf16_command_line_parses(script, kind):
    words = original_command(kind, "m", "d", "o")
    words[words.index("--mixed_precision") + 1] = "bf16"
    args = script.get_args(words)
    assert (args.mixed_precision, args.optimizer, args.rank, args.lora_alpha) == ("bf16", "adamw", 128, 64)
