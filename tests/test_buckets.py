"""Clips as people have them: captions in files beside the clips, pictures, and sizes of many kinds."""

import random

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file
from test_objective import record_inputs
from test_training import same_tensors


@pytest.fixture
def beside(tmp_path):
    """Two clips and two pictures in folders, with captions beside them."""
    root = tmp_path / "beside"
    tiny.write_clip(root / "b" / "long.mp4", tiny.moving_square(9, 64, 96))
    tiny.write_clip(root / "a.b.MP4", tiny.moving_square(5, 64, 96))
    (root / ".hidden").mkdir()
    (root / ".hidden" / "no_caption.mp4").write_bytes(b"")
    Image.new("RGB", (96, 64), "red").save(root / "b" / "one.png")
    Image.new("RGB", (96, 64), "blue").save(root / "two.jpeg")
    for name, text in {"b/long": "a red\n square \n", "a.b": "\ufeffshort", "b/one": "red", "two": "blue\r\n"}.items():
        (root / f"{name}.txt").write_text(text)
    return root


def test_captions_beside_clips_and_pictures(script, run, beside, monkeypatch, caplog):
    caplog.set_level("INFO")
    dataset = script.VideoDataset(str(beside), caption_column="text", height=64, width=96, max_num_frames=9)
    assert [path.name for path in dataset.instance_video_paths] == ["a.b.MP4", "long.mp4", "one.png", "two.jpeg"]
    assert dataset.instance_prompts == ["short", "a red square", "red", "blue"]
    assert [len(dataset[index]["instance_video"]) for index in range(4)] == [5, 9, 1, 1]
    calls = record_inputs(monkeypatch)
    run(
        instance_data_root=beside, caption_column=None, video_column=None, precompute_dir=None, max_train_steps=None,
        num_train_epochs=1,
    )  # fmt: skip
    shapes = sorted(call["hidden_states"].shape[:2] for call in calls)
    assert shapes == [(1, 2), (1, 3), (2, 1)]  # batch, latent frames
    assert "Clips: 2 of 1 x 64 x 96, 1 of 5 x 64 x 96, 1 of 9 x 64 x 96" in caplog.text


def test_names_in_upper_case_and_two_clips_of_one_caption(script, beside):
    (beside / "two.txt").rename(beside / "two.TXT")
    dataset = script.VideoDataset(str(beside), caption_column="text", height=64, width=96, max_num_frames=9)
    assert dataset.instance_prompts == ["short", "a red square", "red", "blue"]
    (beside / "two.png").write_bytes((beside / "b" / "one.png").read_bytes())
    (beside / "phone.heic").write_bytes(b"a picture")
    (beside / "phone.txt").write_text("from a phone")
    with pytest.raises(script.RunError) as error:
        script.VideoDataset(str(beside))
    assert "two.png: two.TXT is the caption of another clip, too" in str(error.value)
    (beside / "two.png").unlink()
    dataset = script.VideoDataset(str(beside))
    with pytest.raises(ValueError, match="HEIC pictures cannot be read: magick"):
        dataset[dataset.instance_prompts.index("from a phone")]


def test_a_clip_or_a_caption_alone_is_refused(script, beside):
    (beside / "two.txt").unlink()
    (beside / "b" / "one.txt").write_text(" \n")
    (beside / "notes.txt").write_text("not a caption")
    with pytest.raises(script.RunError, match="has no file text") as error:
        script.VideoDataset(str(beside))
    for line in ("two.jpeg: it has no caption", "one.png: it has no caption", "notes.txt: it has no clip"):
        assert line in str(error.value)
    assert "long.mp4" not in str(error.value)
    (beside / "empty").mkdir()
    with pytest.raises(script.RunError, match="has no clips, and no file"):
        script.VideoDataset(str(beside / "empty"))
    (beside / "two.txt").write_bytes(b"caf\xe9")  # Latin-1
    with pytest.raises(script.RunError, match="two.txt cannot be read as UTF-8"):
        script.VideoDataset(str(beside))


def test_an_output_folder_in_the_data_folder_is_no_data(script, beside):
    """Its samples are videos without captions."""
    (beside / "my_lora" / "validation").mkdir(parents=True)
    (beside / "my_lora" / "run.json").write_text("{}")
    for name in ("final_video_0.mp4", "validation/test_step-000002_prompt-0_video-0.mp4"):
        (beside / "my_lora" / name).write_bytes(b"mp4")
    records = script.VideoDataset(str(beside)).records
    assert records and not any("my_lora" in record.path for record in records)


@pytest.mark.parametrize("layout", ["lines", "table", "embedded"])
def test_a_picture_is_upright_and_on_white(script, tmp_path, layout):
    """Stored on its side, as cameras do, and transparent in its lower half."""
    import datasets

    pixels = np.zeros((32, 64, 4), dtype=np.uint8)
    pixels[:16] = (200, 0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = tmp_path / "camera.png"
    Image.fromarray(pixels).rotate(90, expand=True).save(path, exif=exif)
    names = {"caption_column": "c", "video_column": "v"}
    if layout == "lines":
        (tmp_path / "c").write_text("a picture\n")
        (tmp_path / "v").write_text("camera.png\n")
        source = {"instance_data_root": str(tmp_path)}
    else:
        row = {"c": ["a picture"], "v": [str(path)]}
        features = None
        if layout == "embedded":
            row["v"] = [{"bytes": path.read_bytes(), "path": "camera.png"}]
            features = datasets.Features({"c": datasets.Value("string"), "v": datasets.Image()})
        datasets.Dataset.from_dict(row, features=features).to_parquet(str(tmp_path / "t.parquet"))
        source = {"dataset_name": str(tmp_path / "t.parquet"), "cache_dir": str(tmp_path / "cache")}
    for sampling in ("stride", "uniform", "fps"):
        dataset = script.VideoDataset(**source, **names, height=32, width=64, frame_sampling=sampling)
        video = dataset[0]["instance_video"]
        assert video.shape == (1, 3, 32, 64)
        rgb = ((video[0] + 1) * 127.5).round().permute(1, 2, 0)  # [H, W, C]
        assert rgb[:14].unique(dim=0).flatten(0, 1).unique(dim=0).tolist() == [[200, 0, 0]]
        assert rgb[18:].flatten(0, 1).unique(dim=0).tolist() == [[255, 255, 255]]


BUCKETS = [(49, 480, 720), (25, 480, 720), (81, 480, 720), (49, 720, 480), (1, 512, 512), (1, 480, 720)]


@pytest.mark.parametrize(("clip", "expected"), [
    ((200, 1080, 1620), (81, 480, 720)), ((80, 1080, 1620), (49, 480, 720)), ((49, 100, 150), (49, 480, 720)),
    ((48, 1080, 1620), (25, 480, 720)), ((9, 1080, 1620), (25, 480, 720)),  # never upsampled in time: 9 frames of it
    ((200, 1920, 1080), (49, 720, 480)), ((5, 1920, 1080), (49, 720, 480)),  # the aspect is first
    ((1, 500, 500), (1, 512, 512)), ((1, 1080, 1920), (1, 480, 720)), ((2, 500, 500), (25, 480, 720)),
])  # fmt: skip
def test_the_bucket_keeps_most_of_a_clip(script, clip, expected):
    draw = random.Random(0)
    for _ in range(5):
        assert script.choose_bucket(draw.sample(BUCKETS, len(BUCKETS)), *clip) == expected
    assert script.choose_bucket([(49, 480, 720), (9, 480, 480)], 1, 64, 64) == (9, 480, 480)  # a picture among clips
    assert script.choose_bucket([(1, 480, 720)], 30, 64, 64) == (1, 480, 720)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine clips of other lengths and shapes, and a picture. They are encoded once."""
    root, captions, videos = tmp_path_factory.mktemp("many"), [], []
    sizes = [(9, 64, 96)] * 3 + [(20, 64, 96), (20, 96, 64), (5, 96, 64), (9, 96, 64), (3, 64, 96), (9, 64, 300)]
    for number, (frames, height, width) in enumerate(sizes):
        tiny.write_clip(root / f"{number}.mp4", tiny.moving_square(frames, height, width))
    Image.new("RGB", (96, 64), "red").save(root / "picture.png")
    videos = [f"{number}.mp4" for number in range(len(sizes))] + ["picture.png"]
    captions = [f"clip {number}" for number in range(len(videos))]
    (root / "prompts.txt").write_text("\n".join(captions) + "\n")
    (root / "videos.txt").write_text("\n".join(videos) + "\n")
    return root


ASK = {"buckets": "9x64x96 17x64x96 9x96x64".split(), "train_batch_size": 2, "max_train_steps": None}


def with_buckets(run, root, **changes):
    settings = {"instance_data_root": root, "precompute_dir": root / "pre", "num_train_epochs": 2} | ASK
    return run(**settings | changes)


def test_batches_are_of_one_bucket_and_have_each_clip_once_an_epoch(run, many, monkeypatch, caplog):
    caplog.set_level("INFO")
    calls = record_inputs(monkeypatch)
    with_buckets(run, many)
    text = caplog.text
    counts = "2 of 1 x 64 x 96, 1 of 17 x 64 x 96, 1 of 5 x 96 x 64, 4 of 9 x 64 x 96, 2 of 9 x 96 x 64"
    assert f"Clips: {counts}" in text
    shapes = [tuple(call["hidden_states"].shape) for call in calls]  # [B, f, C, h, w]
    shapes = [(batch, frames, height, width) for batch, frames, _, height, width in shapes]
    one_epoch = [(2, 1, 8, 12), (1, 5, 8, 12), (1, 2, 12, 8), (2, 3, 8, 12), (2, 3, 8, 12), (2, 3, 12, 8)]
    assert sorted(shapes) == sorted(one_epoch * 2)
    assert "More than half of the frames or of the pixels is cut off:\n  - " in text
    warned = text.split("cut off:")[1].split(" INFO ")[0].split("WARNING")[0]
    cut = [f"{many / name}" for name in ("7.mp4", "8.mp4")]  # one frame of three, and 300 x 64 pixels in 96 x 64
    assert all(name in warned for name in cut) and warned.count(".mp4") == 2


def test_buckets_are_encoded_once_and_resumed_exactly(script, run, many, caplog, tmp_path):
    settings = {"checkpointing_steps": 5, "random_flip": True, "caption_dropout": 0.3, "num_train_epochs": 2}
    never_stopped = with_buckets(run, many, **settings, output_dir=tmp_path / "never")
    caplog.set_level("INFO")
    caplog.clear()
    output = with_buckets(run, many, **settings | {"num_train_epochs": None, "max_train_steps": 5})
    assert f"{many / 'pre' / 'videos'}: 0 of 10 to encode" in caplog.text
    (output / script.LORA_FILE).unlink()
    with_buckets(run, many, **settings, resume_from_checkpoint="latest")
    assert same_tensors(*(load_file(folder / script.LORA_FILE) for folder in (never_stopped, output)))


def test_every_process_gets_as_many_batches(script):
    shapes = dict(enumerate([(8, 3, 8, 12)] * 5 + [(8, 5, 8, 12)] * 2 + [(8, 3, 12, 8)]))
    samplers = [script.ShapeBatchSampler(shapes, 2, 0, process_index=rank, num_processes=3) for rank in range(3)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(part) for part in batches} == {2}
    assert {key[0] for part in batches for batch in part for key in batch} == set(shapes)


def test_frames_cut_off_are_warned_of(run, tmp_path, caplog):
    """97 frames of which the first 17 are taken; spread over all of them they are not cut off."""
    tiny.write_clip(tmp_path / "clip" / "long.mp4", tiny.moving_square(97, 64, 96))
    (tmp_path / "clip" / "long.txt").write_text("a long clip")
    source = {"instance_data_root": tmp_path / "clip", "caption_column": None, "precompute_dir": None, "fps": 8}
    size = {"height": 16, "width": 32, "max_num_frames": 17, "max_train_steps": 1, "train_batch_size": 1}
    for sampling, is_cut in (("fps", True), ("uniform", False), ("stride", False)):
        caplog.clear()
        run(**source, **size, frame_sampling=sampling)
        assert ("cut off" in caplog.text) == is_cut


@pytest.mark.parametrize(("text", "said"), [
    ("50x64x96", "4k+1 frames x height x width, such as 49x480x720, not 50x64x96"), ("9x64", "not 9x64"),
    ("9x60x96", "a multiple of 16, not 60 (nearest: 64)"), ("0x64x96", "a whole number, 1 or more, not 0"),
    ("axbxc", "a whole number, 1 or more, not a"),
])  # fmt: skip
def test_what_is_no_bucket_is_refused(script, flags, capsys, text, said):
    with pytest.raises(SystemExit) as error:
        script.get_args(flags(buckets=["9x64x96", text]))
    assert error.value.code == 2
    written = capsys.readouterr().err
    assert "--buckets must be " in written and said in written


def test_a_bucket_that_the_model_cannot_do_is_refused(script, run, models):
    with pytest.raises(script.RunError, match="up to 128 x 128: --height 64 --width 128, not 64 x 256"):
        run(pretrained_model_name_or_path=models["t2v 1.5"], buckets=["9x64x96", "9x64x256"])
