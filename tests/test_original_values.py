"""Values of flags that the original scripts take and act on."""

import json

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from conftest import ONLY_I2V
from safetensors.torch import load_file
from test_interruptions import checkpoints
from test_training import read_metrics, same_tensors

REQUIRED = ["--pretrained_model_name_or_path", "m"]


def test_no_validation_videos(run):
    output = run(validation_prompt="a red square", num_validation_videos=0, num_inference_steps=1)
    assert not (output / "validation").exists() and (output / "README.md").is_file()


def test_a_limit_of_no_checkpoints_keeps_the_newest(run):
    assert checkpoints(run(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=0)) == ["checkpoint-3"]


def test_gradients_that_are_not_clipped(run):
    """Their norm is logged all the same."""
    plain, unclipped = run(max_grad_norm=1e9), run(max_grad_norm="inf")
    rows = [[(row["loss"], row["grad_norm"]) for row in read_metrics(output)] for output in (plain, unclipped)]
    assert rows[0] == rows[1] and all(norm > 0 for _, norm in rows[0])


def test_a_learning_rate_of_zero_changes_nothing(script, run):
    output = run(learning_rate=0)
    lora = load_file(output / script.LORA_FILE)
    assert len(read_metrics(output)) == 2
    assert all(not tensor.any() for name, tensor in lora.items() if "lora_B" in name)


@pytest.mark.parametrize("length", [{"max_train_steps": 0}, {"max_train_steps": None, "num_train_epochs": 0}])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "polynomial"])
def test_no_steps_save_the_lora_as_it_starts(script, run, length, schedule):
    output = run(**length, lr_scheduler=schedule, lr_warmup_steps=0)
    started = run(max_train_steps=1, learning_rate=0)
    assert same_tensors(*(load_file(folder / script.LORA_FILE) for folder in (output, started)))
    assert read_metrics(output) == [] and json.loads((output / "state.json").read_text())["step"] == 0


def test_the_largest_seed(run):
    """numpy's limit; with it, the seeds of later processes and of resumed runs are still within."""
    seed = 2**32 - 1
    output = run(seed=seed, max_train_steps=1)
    run(seed=seed, max_train_steps=2, resume_from_checkpoint="latest")
    assert len(read_metrics(output)) == 2


def test_trackers_are_those_of_accelerate(script):
    for name in LOGGER_TYPE_TO_CLASS:
        assert script.get_args([*REQUIRED, "--report_to", name]).report_to == name
    assert set(script.TRACKERS) == {*LOGGER_TYPE_TO_CLASS, "all"}


@ONLY_I2V
def test_start_images_without_prompts_are_not_used(run, start_images):
    output = run(validation_images=str(start_images[0]), max_train_steps=1)
    assert not (output / "validation").exists()


def test_negative_guidance(script, run):
    assert script.get_args([*REQUIRED, "--guidance_scale", "-2"]).guidance_scale == -2
    output = run(validation_prompt="a red square", guidance_scale=-2, num_inference_steps=1, max_train_steps=1)
    assert len(list((output / "validation").glob("*.mp4"))) == 2


@pytest.mark.parametrize(("rate", "warns"), [(1e-4, True), (0.1, True), (1, False)])
def test_a_low_rate_for_prodigy_is_a_warning(script, caplog, rate, warns):
    args = script.get_args([*REQUIRED, "--optimizer", "prodigy", "--learning_rate", str(rate)])
    script.get_optimizer(args, [torch.nn.Parameter(torch.zeros(1))])
    assert ("is low for prodigy" in caplog.text) == warns


def test_card_has_the_gallery_and_the_tag_of_the_originals(script, tmp_path):
    script.save_model_card("me/lora", repo_folder=str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "\n<Gallery />\n" in text and "\n- cogvideox-diffusers\n" in text
