"""tools/sample.py: what it samples is what the training sampled, and what the pipeline samples with the LoRA."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sample
import torch
from conftest import BOTH, SCRIPTS, reset_accelerate


@pytest.fixture
def output(finished, tmp_path) -> Path:
    """The output folder of a finished run, whose clips are gone."""
    folder = Path(shutil.copytree(finished / "output", tmp_path / "moved"))
    about = json.loads((folder / "run.json").read_text())
    about["args"] |= {"instance_data_root": str(tmp_path / "gone"), "precompute_dir": None}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(autouse=True)
def imported_scripts(monkeypatch):
    """The scripts as the tests have imported them, and pytest's own log."""
    monkeypatch.setattr(sample, "load_script", lambda path: importlib.import_module(path.stem))
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "set_up_logging", lambda: None)


def sampled(output: Path, *words: str) -> list[dict]:
    """Run the tool; return the lines that it adds to the index."""
    index = output / "samples" / "index.jsonl"
    before = index.read_text().splitlines() if index.exists() else []
    reset_accelerate()
    sample.main([str(output), *words])
    return [json.loads(line) for line in index.read_text().splitlines()[len(before) :]]


def read_video(script, path: Path) -> np.ndarray:
    clip = script.open_clip(script.VideoRecord("", str(path)))
    return clip.read(list(range(len(clip.times) - 1)))  # [F, H, W, C]


@BOTH
def test_samples_are_those_of_the_training(script, output, kind):  # noqa: ARG001
    """Without flags: the finished LoRA, the run's prompts, images and seed. At strength 0 it is the base model."""
    rows = sampled(output, "--strengths", "1", "0")
    assert [(row["lora"], row["step"], row["strength"], row["seed"]) for row in rows] == [
        ("final", 4, strength, 7) for strength in (1, 1, 0, 0)
    ]
    assert [row["prompt"] for row in rows] == ["TOK a red square", "TOK a blue square"] * 2
    assert all(bool(row["image"]) == (kind == "i2v") for row in rows)
    for row, name in zip(rows, ["test_step-000004"] * 2 + ["validation_step-000000"] * 2, strict=True):
        number = 0 if "red" in row["prompt"] else 1
        expected = output / "validation" / f"{name}_prompt-{number}_video-0.mp4"
        assert (output / "samples" / row["file"]).read_bytes() == expected.read_bytes(), row
    assert (output / ".cogvideox_precomputed").is_dir()  # the clips' folder is gone, and is not made again


def test_strength_is_that_of_set_adapters(script, output, model):
    (row,) = sampled(output, "--strength", "0.5", "--prompt", "a cat", "--seed", "3", "--num_inf", "1")
    pipe = script.PIPELINE.from_pretrained(model)
    pipe.load_lora_weights(str(output))
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    pipe.scheduler = script.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    settings = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 1, "guidance_scale": 6.0}
    generator = torch.Generator().manual_seed(3)
    video = pipe("a cat", **settings, generator=generator, output_type="np", max_sequence_length=226).frames[0]
    script.export_to_video(list(video[-9:]), str(output / "expected.mp4"), fps=12)
    found = read_video(script, output / "samples" / row["file"]).astype(int)
    assert np.abs(found - read_video(script, output / "expected.mp4")).max() <= 2
    assert row["image"] is None and row["prompt"] == "a cat"


def test_loras_of_steps_and_of_checkpoints(script, output):
    """A checkpoint's LoRA has its alpha beside it, a kept one in its matrices: they are the same. With --offload_base,
    whose flag needs the recomputation of a training, too."""
    rows = sampled(output, "--steps", "2", "4", "--prompts", "a cat")
    assert [(row["lora"], row["step"]) for row in rows] == [("step-000002", 2), ("step-000004", 4)]
    kept = [(output / "samples" / row["file"]).read_bytes() for row in rows]
    assert kept[0] != kept[1]
    (output / "loras" / "step-000002.safetensors").unlink()
    offloading = ["--offload_base", "--gradient_checkpointing"]
    (row,) = sampled(output, "--steps", "2", "--prompts", "a cat", *offloading)
    difference = read_video(script, output / "samples" / row["file"]).astype(int)
    (output / "kept.mp4").write_bytes(kept[0])
    assert np.abs(difference - read_video(script, output / "kept.mp4")).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "loras/step-000003.safetensors. The run has kept:\n  - "),
        (["--ofload_base"], "unrecognized arguments: --ofload_base (did you mean --offload_base?)"),
        (["--height", "50"], "--height must be a multiple of 16, not 50 (nearest: 48)"),
    ],
)
def test_what_cannot_be_sampled_is_one_message(output, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        sampled(output, *words)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (output / "samples").exists()


def test_another_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main([str(tmp_path)])
    assert end.value.code == 2 and "run.json is missing" in capsys.readouterr().err
