"""Choosing a LoRA: one of each validation, the best one, warnings of odd settings, and the lines at the end."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import word_list
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

ASK = {"validation_prompt": "a red square", "num_inference_steps": 1, "validation_steps": 2}
HELD_OUT = {"eval_split": 1, "validation_steps": 2, "train_batch_size": 1, "max_train_steps": 6}


def kept(output) -> list[str]:
    return sorted(path.name for path in (output / "loras").glob("*"))


def with_held_out_losses(script, monkeypatch, losses: dict[int, float]) -> None:
    """The loss of held-out clips at these steps."""
    monkeypatch.setattr(
        script, "log_held_out_loss", lambda run: script.log_metrics(run, {"validation/loss": losses[run.step]}, {})
    )


def test_the_lora_of_each_validation_is_kept(script, run, model):
    """Ready for use: alpha / rank, here a half, is in its matrices. None is kept of the base model at step 0."""
    output = run(**ASK, max_train_steps=4, checkpointing_steps=2)
    assert kept(output) == ["step-000002.safetensors", "step-000004.safetensors"]
    trained = load_file(output / "checkpoint-2" / script.LORA_FILE)
    for name, weight in load_file(output / "loras" / "step-000002.safetensors").items():
        assert torch.equal(weight, trained[name] * (0.5 if ".lora_B." in name else 1)), name
    final = load_file(output / script.LORA_FILE)
    last = load_file(output / "loras" / "step-000004.safetensors")
    assert last.keys() == final.keys() and all(torch.equal(last[name], final[name]) for name in final)
    pipe = CogVideoXPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(output / "loras" / "step-000002.safetensors"))
    assert pipe.get_active_adapters() == ["default_0"]


def test_a_run_that_nobody_asked_to_validate_keeps_none(run):
    assert not (run(num_train_epochs=2, max_train_steps=None, validation_epochs=1) / "loras").exists()
    output = run(max_train_steps=2, validation_steps=1)
    assert kept(output) == ["step-000001.safetensors", "step-000002.safetensors"]


def test_the_newest_and_the_best_are_kept(script, run, monkeypatch):
    with_held_out_losses(script, monkeypatch, {0: 0.1, 2: 0.3, 4: 0.4, 6: 0.5})
    output = run(**HELD_OUT, loras_total_limit=1)
    assert kept(output) == ["step-000002.safetensors", "step-000006.safetensors"]


def test_the_best_lora_can_be_the_final_one(script, run, monkeypatch, caplog):
    """With its videos in the card, and its step."""
    with_held_out_losses(script, monkeypatch, {0: 0.1, 2: 0.4, 4: 0.3, 6: 0.5})
    caplog.set_level(logging.INFO)
    asked = ASK | HELD_OUT | {"final_lora": "best", "checkpointing_steps": 4}
    output = run(**asked)
    best = output / "loras" / "step-000004.safetensors"
    assert (output / script.LORA_FILE).read_bytes() == best.read_bytes()
    assert best.read_bytes() != (output / "loras" / "step-000006.safetensors").read_bytes()
    video = output / "validation" / "validation_step-000004_prompt-0_video-0.mp4"
    assert (output / "final_video_0.mp4").read_bytes() == video.read_bytes()
    assert "\n| steps | 4 |\n" in (output / "README.md").read_text()
    last_line = f"To use the LoRA of step 4, with the lowest held-out loss: pipe.load_lora_weights('{output}')"
    assert caplog.messages[-1] == last_line
    assert json.loads((output / "state.json").read_text()) == {"state": "finished", "step": 6, "lora_step": 4}


def test_the_last_lines_say_what_one_needs_next(script, run, monkeypatch, caplog):
    with_held_out_losses(script, monkeypatch, {0: 0.1, 2: 0.3, 4: 0.4, 6: 0.5})
    caplog.set_level(logging.INFO)
    output = run(**HELD_OUT)
    best = output / "loras" / "step-000002.safetensors"
    assert caplog.messages[-3:] == [
        f"To look at the run: python tools/report.py {output}",
        f"To use the LoRA of step 6: pipe.load_lora_weights('{output}')",
        f"To use the one with the lowest held-out loss, of step 2: pipe.load_lora_weights('{best}')",
    ]


def test_no_room_for_a_kept_lora_does_not_end_the_run(script, run, monkeypatch, caplog):
    save = script.save_lora

    def fail(transformer, path, weights, is_for_use=False):
        if path.parent.name == "loras":
            raise script.RunError(f"{path} cannot be written: No space left on device", exit_code=1)
        save(transformer, path, weights, is_for_use)

    monkeypatch.setattr(script, "save_lora", fail)
    output = run(**HELD_OUT | {"max_train_steps": 2})
    assert kept(output) == [] and (output / script.LORA_FILE).is_file()
    assert "step-000002.safetensors cannot be written: No space left on device" in caplog.text


def test_best_without_held_out_clips_is_refused(script, run):
    with pytest.raises(script.RunError, match="--final_lora best needs --eval_split"):
        run(final_lora="best")


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ({"rank": 8, "lora_alpha": None}, "--rank 8 with --lora_alpha 128: the LoRA is applied at 16"),
        ({"rank": 64, "lora_alpha": 4}, "--rank 64 with --lora_alpha 4: the LoRA is applied at 0.0625"),
        ({"validation_prompt": "T a:::t b", "id_token": "T"}, "--id_token T is not in the validation prompt 't b'"),
        (ASK | {"id_token": "TOK"}, "--id_token TOK is not in the validation prompt 'a red square': write it into"),
        ({"max_train_steps": 1}, "The number of steps, 1, is too low to learn from"),
    ],
)
def test_settings_that_hardly_work_are_a_warning(script, flags, warning, caplog):
    args = script.get_args(["--pretrained_model_name_or_path", "m", *word_list(flags)])
    script.warn_of_settings(args, args.max_train_steps or 100)
    assert [record.getMessage()[: len(warning)] for record in caplog.records] == [warning]


def test_usual_settings_are_no_warning(script, run, caplog):
    args = script.get_args(
        ["--pretrained_model_name_or_path", "m", "--rank", "64", "--lora_alpha", "32", "--id_token", "TOK"]
        + ["--validation_prompt", "TOK a boat"]
    )
    script.warn_of_settings(args, 100)
    assert caplog.records == []
    run()  # of two steps: each run is checked
    assert "The number of steps, 2, is too low" in caplog.text


def test_the_whole_command_is_recorded(script, monkeypatch):
    """That of the launcher, whose process has the token in its own command line."""
    words = ["/x/bin/accelerate", "launch", "--config_file", "a b.yaml", "t.py", "--hub_token", "hf_x", "--seed", "1"]
    waiting = "import time; print('on', flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-S", "-c", waiting, *words], stdout=subprocess.PIPE)
    parent.stdout.readline()
    monkeypatch.setattr(sys, "argv", ["t.py", "--hub_token", "***", "--seed", "1"])
    assert script.whole_command() == "python t.py --hub_token '***' --seed 1"
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    expected = "accelerate launch --config_file 'a b.yaml' t.py --hub_token '***' --seed 1"
    assert script.whole_command() == expected
    parent.kill()
    parent.wait()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_log_file_has_steps_and_losses_beside_a_bar(script, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    script.logger.handlers = [logging.FileHandler(tmp_path / "train.log")]
    progress = script.progress_bar(total=2, desc="Training", unit="step", ncols=40)
    for loss in (0.25, 0.125):
        progress.set_postfix(loss=loss, refresh=False)
        progress.update()
    progress.close()
    assert "Training: 100%" in terminal.getvalue() and "INFO" not in terminal.getvalue()
    last = (tmp_path / "train.log").read_text().splitlines()[-1]
    assert last.startswith("Training: 2 of 2, ") and last.endswith("loss=0.125")


def test_folder_of_the_trackers_only_with_one(run):
    assert not (run() / "logs").exists() and (run(report_to="tensorboard") / "logs").is_dir()


def test_a_log_without_a_terminal_says_that_it_samples(run, caplog):
    caplog.set_level(logging.INFO)
    run(**ASK | {"validation_prompt": "a red square:::a blue square"}, max_train_steps=1)
    said = [message for message in caplog.messages if message.startswith("Sampling")]
    expected = [f"Sampling prompt {prompt} of 2 at step {step}" for step in (0, 1) for prompt in (1, 2)]
    assert said == expected
