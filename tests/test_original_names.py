"""Code that was written against the original scripts: what it imports, calls and reads."""

import itertools
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import BOTH
from diffusers import DiffusionPipeline
from PIL import Image
from test_command_line import ORIGINALS

SHAPE = {"height": 64, "width": 96, "fps": 8, "max_num_frames": 9}


@BOTH
def test_a_data_set_made_by_position(script, kind, clips):
    """Of text-to-video there is no reshape mode between width and frame rate."""
    mode = ["stretch"] if kind == "i2v" else []
    names = ["prompts.txt", "videos.txt"]
    dataset = script.VideoDataset(str(clips), None, None, *names, 64, 96, *mode, 8, 5, 1, 2, None, "TOK ")
    assert dataset[0]["instance_video"].shape == (5, 3, 64, 96)
    found = {name: getattr(dataset, name) for name in ("height", "width", "fps", "max_num_frames")}
    assert found == SHAPE | {"max_num_frames": 5}
    assert (dataset.skip_frames_start, dataset.skip_frames_end) == (1, 2) and dataset.id_token == "TOK"
    assert dataset.instance_data_root == clips and dataset.cache_dir is None
    assert dataset.dataset_name is None and dataset.dataset_config_name is None
    assert (dataset.caption_column, dataset.video_column) == ("prompts.txt", "videos.txt")
    assert dataset.instance_prompts[0] == ("TOK " if kind == "i2v" else "") + "a red square moves right"
    assert dataset[0]["instance_prompt"] == dataset.prompt(0) == "TOK a red square moves right"


def test_the_videos_of_a_data_set_are_a_sequence(script, clips):
    columns = {"caption_column": "prompts.txt", "video_column": "videos.txt"}
    dataset = script.VideoDataset(str(clips), **columns, **SHAPE)
    videos = dataset.instance_videos
    assert len(videos) == dataset.num_instance_videos == 4
    for index, same in ((1, 1), (-1, 3)):
        assert torch.equal(videos[index], dataset[same]["instance_video"])
    assert [video.shape for video in videos] == [(9, 3, 64, 96)] * 4
    with pytest.raises(IndexError):
        videos[4]


def test_a_problem_with_the_data_is_a_value_error(script, tmp_path):
    with pytest.raises(ValueError, match="has no clips, and no file text"):
        script.VideoDataset(str(tmp_path))


def test_positions_may_be_changed_by_their_caller(script):
    size = {"height": 64, "width": 96, "num_frames": 3}
    cos, _ = script.prepare_rotary_positional_embeddings(**size)
    before = cos.clone()
    cos.zero_()
    assert torch.equal(script.prepare_rotary_positional_embeddings(**size)[0], before)


def test_prompts_within_no_grad_have_no_gradients(script, model):
    pipe = DiffusionPipeline.from_pretrained(model)
    arguments = (pipe.tokenizer, pipe.text_encoder, ["a red square"], 226, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert not script.compute_prompt_embeddings(*arguments, requires_grad=True).requires_grad
    assert script._get_t5_prompt_embeds is script.encode_prompt


@pytest.mark.parametrize(("name", "kind", "warns"), [
    ("AdamW", torch.optim.AdamW, False), ("adam", torch.optim.Adam, False), ("Lion", torch.optim.AdamW, True),
])  # fmt: skip
def test_optimizers_by_the_names_that_code_gives(script, caplog, name, kind, warns):
    args = script.get_args(["--pretrained_model_name_or_path", "m"])
    args.optimizer = name
    assert type(script.get_optimizer(args, [torch.nn.Parameter(torch.zeros(1))])) is kind
    assert (f"There is no optimizer {name}: AdamW is taken" in caplog.text) == warns


def original_args(script, column: str, **changes) -> Namespace:
    """A Namespace with the original script's flags and defaults, and no other."""
    defaults = vars(script.get_args(["--pretrained_model_name_or_path", "m"]))
    names = [row["flag"].removeprefix("--") for row in ORIGINALS if row[column]]
    return Namespace(**{name: defaults[name] for name in names} | changes)


@BOTH
def test_main_takes_a_namespace_with_the_originals_flags(script, kind, model, clips, tmp_path):
    from conftest import SCRIPTS, reset_accelerate

    reset_accelerate()
    args = original_args(
        script, SCRIPTS[script.__name__], pretrained_model_name_or_path=str(model), instance_data_root=str(clips),
        caption_column="prompts.txt", video_column="videos.txt", output_dir=str(tmp_path / "output"), rank=4,
        lora_alpha=4, optimizer="AdamW", max_train_steps=1, train_batch_size=1, mixed_precision="no", **SHAPE,
    )  # fmt: skip
    assert not hasattr(args, "init_lora") and not hasattr(args, "precompute_dir")
    script.main(args)
    assert (tmp_path / "output" / script.LORA_FILE).is_file()
    assert kind in ("t2v", "i2v")


@BOTH
def test_the_originals_loop_keeps_the_videos_of_each_prompt(script, kind, model, start_images, tmp_path):
    """It calls `log_validation` once a prompt, with one epoch."""
    pipe = DiffusionPipeline.from_pretrained(model)
    args = Namespace(seed=0, num_validation_videos=1, fps=8, output_dir=str(tmp_path))
    made = []
    for prompt in ("a red square", "a blue square"):
        given = {"prompt": prompt, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 1}
        if kind == "i2v":
            given["image"] = Image.open(start_images[0]).convert("RGB").resize((96, 64))
        made.append(script.log_validation(pipe, args, Accelerator(), given, 3))
    files = sorted(Path(tmp_path, "validation").glob("*.mp4"))
    assert len(files) == 2 and files[0].read_bytes() != files[1].read_bytes()
    for videos in made:
        (video,) = videos
        assert len(video) == 9
        assert all(isinstance(frame, Image.Image if kind == "i2v" else np.ndarray) for frame in itertools.chain(video))


def test_a_line_that_is_blank_in_both_files_is_left_out(script, clips):
    """The original scripts drop the blank lines of each file."""
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join([lines[0], " ", *lines[1:], "", ""]))
    dataset = script.VideoDataset(str(clips), None, None, "prompts.txt", "videos.txt")
    assert len(dataset) == 4 and dataset.instance_prompts[1] == "a green square moves right"
