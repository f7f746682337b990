"""A user's mistake ends in one clear message, exit code 2, no traceback, and nothing half-written."""

import importlib.util
import os
import shutil
import sys

import pytest
import tiny
from conftest import BOTH, ONLY_I2V


@pytest.fixture
def fail(script, flags, clips, capsys, monkeypatch, tmp_path):
    """Run the script as from a shell and expect it to end; returns what it said."""

    def end(code: int = 2, wrote_nothing: bool = True, **changes) -> str:
        words = flags(**{"instance_data_root": clips, "precompute_dir": tmp_path / "pre"} | changes)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            script.command_line()
        said = capsys.readouterr().err
        assert exit_.value.code == code
        assert "Traceback" not in said and "usage:" not in said
        assert said.count(f"{script.__name__}.py: error:") == 1
        if wrote_nothing:
            assert not (tmp_path / "output").exists() and not (tmp_path / "pre").exists()
        return said

    return end


NUMBERS = {
    "height": (60, "--height must be a multiple of 16, not 60 (nearest: 64)"),
    "width": (0, "--width must be a whole number, 1 or more, not 0"),
    "rank": (0, "--rank must be a whole number, 1 or more, not 0"),
    "lora_alpha": (0, "--lora_alpha must be a number, more than 0, not 0"),
    "learning_rate": (-1e-4, "--learning_rate must be a number, 0 or more"),
    "train_batch_size": (1.5, "--train_batch_size must be a whole number, 1 or more, not 1.5"),
    "max_train_steps": (-1, "--max_train_steps must be a whole number, 0 or more"),
    "guidance_scale": ("inf", "--guidance_scale must be a number, not inf"),
    "max_num_frames": ("many", "--max_num_frames must be a whole number, 1 or more, not many"),
    "checkpointing_steps": (0, "--checkpointing_steps must be a whole number, 1 or more"),
    "skip_frames_start": (-1, "--skip_frames_start must be a whole number, 0 or more"),
    "adam_beta2": (1.0, "--adam_beta2 must be a number, at least 0 and less than 1"),
    "max_grad_norm": ("nan", "--max_grad_norm must be a number, more than 0"),
    "seed": (-1, "--seed must be from 0 to 4294967295, not -1"),
    "optimizer": ("sgd", "--optimizer invalid choice: 'sgd'"),
    "lr_scheduler": ("cosin", "--lr_scheduler invalid choice: 'cosin'"),
    "mixed_precision": ("fp8", "--mixed_precision invalid choice: 'fp8'"),
    "report_to": ("notes", "--report_to invalid choice: 'notes'"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_wrong_value(fail, name):
    value, message = NUMBERS[name]
    said = fail(**{name: value})
    assert f"  - {message}" in said and said.count("  - ") == 1


def test_flags_that_do_not_exist_or_are_missing_come_in_one_message(fail):
    said = fail(lerning_rate=1, pretrained_model_name_or_path=None, init_lora="nowhere")
    assert "  - unrecognized arguments: --lerning_rate 1 (did you mean --learning_rate?)" in said
    assert "  - --pretrained_model_name_or_path is missing" in said and "  - --init_lora nowhere is no LoRA" in said
    assert said.count("  - ") == 3


@BOTH
@pytest.mark.parametrize("value", ["int8", "fp8"])
def test_a_value_that_is_gone_is_answered_with_what_to_take(fail, value):
    instead = "--offload_base takes less memory and is exact (nf4 is left for hosts with little memory)"
    said = fail(quantize_base=value)
    assert f"  - --quantize_base {value} is gone: {instead}\n" in said and said.count("  - ") == 1


def test_a_value_that_never_was_is_answered_with_the_choice(fail):
    assert "--quantize_base invalid choice: 'int4'" in fail(quantize_base="int4")


def test_unknown_flag(fail):
    assert "--lerning_rate" in fail(lerning_rate=1)


NEEDED_BY = {
    "bitsandbytes": ("--use_8bit_adam", {"use_8bit_adam": True}),
    "prodigyopt": ("--optimizer prodigy", {"optimizer": "prodigy"}),
    "datasets": ("--dataset_name", {"dataset_name": "clips.csv"}),
    "tensorboard": ("--report_to tensorboard", {"report_to": "tensorboard"}),
    "wandb": ("--report_to wandb", {"report_to": "wandb"}),
    "comet_ml": ("--report_to comet_ml", {"report_to": "comet_ml"}),
}


@pytest.mark.parametrize("package", NEEDED_BY)
def test_missing_package(fail, monkeypatch, package):
    flag, changes = NEEDED_BY[package]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    assert f"{flag} needs {package}: pip install {package}\n" in fail(**changes)


def test_missing_deepspeed(fail, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    said = fail()
    assert "accelerate's configuration and these flags do not fit: DeepSpeed is not installed" in said


def test_no_such_root(fail, tmp_path):
    assert f"--instance_data_root: there is no folder {tmp_path / 'nowhere'}" in fail(
        instance_data_root=tmp_path / "nowhere"
    )


def test_missing_line_file(fail, clips):
    (clips / "videos.txt").unlink()
    assert f"{clips / 'videos.txt'} is missing: --caption_column and --video_column name" in fail()
    (clips / "prompts.txt").unlink()
    assert f"{clips} has no file prompts.txt, and is no folder of clips with a .txt file beside each:" in fail()


def test_line_file_that_is_not_text(fail, clips):
    (clips / "prompts.txt").write_bytes(b"caf\xe9\n")
    assert "prompts.txt cannot be read as UTF-8 text" in fail()


def test_line_files_that_are_swapped(fail, clips):
    assert "--caption_column and --video_column are swapped" in fail(
        caption_column="videos.txt", video_column="prompts.txt"
    )
    (clips / "prompts.txt").write_text("a long caption " * 100)
    assert "--caption_column and --video_column are swapped" in fail(
        caption_column="videos.txt", video_column="prompts.txt"
    )


def test_line_files_that_are_there_and_not_named(fail):
    hint = "(--caption_column prompts.txt --video_column videos.txt names the two files of lines there)"
    assert hint in fail(caption_column=None, video_column=None)


def test_more_held_out_clips_than_there_are(fail):
    assert "--eval_split 4 leaves nothing of 4 clips to train on" in fail(eval_split=4)


def test_prompts_and_videos_that_do_not_pair_up(fail, clips):
    (clips / "prompts.txt").write_text("one\ntwo\n")
    said = fail()
    assert "prompts.txt has 2 lines" in said and "videos.txt has 4" in said


def test_blank_line_in_the_middle(fail, clips):
    captions = (clips / "prompts.txt").read_text().splitlines()
    (clips / "prompts.txt").write_text("\n".join([captions[0], "", *captions[2:]]) + "\n\n \n")
    assert f"  - line 2 of {clips / 'prompts.txt'}" in fail()


def test_no_clips(fail, clips):
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).write_text("\n\n")
    assert "no clips" in fail()


def test_missing_videos_are_listed_together(fail, clips):
    (clips / "videos" / "01.mp4").unlink()
    (clips / "videos" / "03.mp4").unlink()
    said = fail()
    assert "2 of 4 videos are missing" in said and "01.mp4" in said and "03.mp4" in said and "00.mp4" not in said


def test_videos_that_cannot_be_decoded_are_listed_together(fail, script, clips, tmp_path):
    (clips / "videos" / "00.mp4").write_bytes(b"")
    (clips / "videos" / "01.mp4").write_text("no video")
    good = (clips / "videos" / "02.mp4").read_bytes()
    (clips / "videos" / "02.mp4").write_bytes(good[: len(good) // 2])  # no moov box
    said = fail(wrote_nothing=False)
    assert "3 of 4 videos cannot be decoded" in said
    assert all(f"0{index}.mp4" in said for index in range(3)) and "03.mp4" not in said
    assert len(list((tmp_path / "pre" / "videos").iterdir())) == 1  # the good one stays encoded
    assert not (tmp_path / "output" / script.LORA_FILE).exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_video_in_a_worker(fail, clips, workers):
    (clips / "videos" / "01.mp4").write_text("no video")
    assert "1 of 4 videos cannot be decoded" in fail(wrote_nothing=False, dataloader_num_workers=workers)


def test_table_errors(fail, tmp_path):
    table = tmp_path / "meta.csv"
    table.write_text("caption,path\na,b\n")
    columns = {"instance_data_root": None, "dataset_name": table, "cache_dir": tmp_path / "cache"}
    said = fail(**columns, caption_column="caption", video_column="clip")
    assert "--video_column" in said and "'clip'" in said and "caption, path" in said
    said = fail(**columns, caption_column="caption", video_column="path")
    assert "1 of 1 videos are missing" in said
    table.write_text("caption,path\n ,b\n")
    assert "has ' ' in row 0, and no text" in fail(**columns, caption_column="caption", video_column="path")
    assert "--dataset_name" in fail(**columns | {"dataset_name": tmp_path / "none.csv"})
    rows = tmp_path / "meta.jsonl"
    columns |= {"dataset_name": rows, "caption_column": "caption", "video_column": "path"}
    rows.write_text('{"caption": ["a", "b"], "path": "b.mp4"}\n')
    assert "--caption_column" in (said := fail(**columns)) and "has ['a', 'b'] in row 0, and no text" in said
    rows.write_text('{"caption": "a", "path": "b.mp4"}\n{"caption": "b", "path": null}\n')
    assert "--video_column" in (said := fail(**columns)) and "has no video in row 1" in said


@BOTH
def test_model_of_the_other_kind_is_refused_by_name(fail, kind, models):
    """Nothing is decoded or encoded before, as `fail` looks."""
    if kind == "t2v":
        said = fail(pretrained_model_name_or_path=models["i2v learned"])
        assert "image-to-video" in said and "train it with train_cogvideox_image_to_video_lora.py" in said
    else:
        said = fail(pretrained_model_name_or_path=models["t2v"])
        assert "text-to-video" in said and "train it with train_cogvideox_lora.py" in said


@BOTH
def test_transformer_and_vae_that_are_not_of_one_model(fail, kind, tmp_path):
    other = tiny.make_model(tmp_path / "other", kind, in_channels=12)
    assert "its transformer takes 12 channels, its VAE makes 4" in fail(pretrained_model_name_or_path=other)


@BOTH
def test_size_of_a_model_with_learned_positions(fail, kind, tmp_path):
    other = tiny.make_model(tmp_path / "learned", kind, use_learned_positional_embeddings=True)
    said = fail(pretrained_model_name_or_path=other, height=96)
    assert "--height 64 --width 96" in said and "not 96 x 96" in said


@ONLY_I2V
@pytest.mark.parametrize("images", [None, "one.png", "one.png:::one.png:::one.png"])
def test_prompts_and_images_that_do_not_pair_up(fail, start_images, images):
    if images:
        images = images.replace("one.png", str(start_images[0]))
    said = fail(validation_prompt="a:::b", validation_images=images)
    count = len(images.split(":::")) if images else 0
    assert f"2 in --validation_prompt, {count} in --validation_images" in said


@ONLY_I2V
def test_images_that_do_not_open_are_listed_together(fail, start_images, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = start_images[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    bad = [tmp_path / name for name in ("none.png", "text.png", "half.png")]
    said = fail(validation_prompt="a:::b:::c:::d", validation_images=":::".join(map(str, [start_images[0], *bad])))
    assert all(f"--validation_images: {path} cannot be opened" in said for path in bad)
    assert str(start_images[0]) not in said


@ONLY_I2V
@pytest.mark.parametrize("dropout", [-0.1, 1.1, "nan"])
def test_dropout_that_is_no_probability(fail, dropout):
    assert "--noised_image_dropout must be from 0 to 1" in fail(noised_image_dropout=dropout)


def test_empty_separator(fail):
    said = fail(validation_prompt="a", validation_images=None, validation_prompt_separator="")
    assert "--validation_prompt_separator must not be empty" in said


def test_models_that_are_none(fail, model, tmp_path):
    for model_name in (tmp_path, "nobody/nothing"):
        said = fail(pretrained_model_name_or_path=model_name)
        assert f"{model_name} is no diffusers-format model, in a local folder or on the Hub" in said
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "transformer" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "is not a CogVideoX" in fail(pretrained_model_name_or_path=other)


def test_output_that_is_a_file(fail, tmp_path):
    (tmp_path / "file").write_text("")
    for flag, folder in (("output_dir", "file"), ("output_dir", "file/below"), ("precompute_dir", "file")):
        said = fail(**{flag: tmp_path / folder}, wrote_nothing=False)
        assert f"--{flag}" in said and f"{tmp_path}/file" in said and "cannot be written" in said


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that even root cannot write")
def test_output_that_cannot_be_written(fail):
    said = fail(output_dir="/proc/nowhere", wrote_nothing=False)
    assert "--output_dir" in said and "cannot be written" in said and "/proc/nowhere" in said


def test_no_such_checkpoint(fail):
    said = fail(resume_from_checkpoint="checkpoint-7")
    assert "--resume_from_checkpoint checkpoint-7: no complete checkpoint" in said


def test_hub_that_is_not_reachable(fail):
    assert "--push_to_hub" in fail(push_to_hub=True, hub_token="hf_secret_x", hub_model_id="nobody/x")
