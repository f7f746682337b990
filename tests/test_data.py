"""From line files, tables and mp4 files to pixels."""

import json
import random

import numpy as np
import pytest
import tiny
import torch


def frames_by_the_book(n, limit, skip_start, skip_end):
    """The originals' rule, written as its specification reads."""
    a, b = min(skip_start, n - 1), n - skip_end
    if b <= a:
        taken = [a]
    elif b - a <= limit:
        taken = [i for i in range(n) if a <= i < b]
    else:
        taken, step = [], (b - a) // limit
        while a + step * len(taken) < b:
            taken.append(a + step * len(taken))
    taken = taken[:limit]
    while len(taken) % 4 != 1:
        taken.pop()
    return taken


def test_stride_is_the_originals_rule(script):
    draw = random.Random(0)
    for _ in range(3000):
        n, limit = draw.randint(1, 300), draw.randint(1, 60)
        skips = draw.choice([0, draw.randint(0, 320)]), draw.choice([0, draw.randint(0, 320)])
        assert script.select_frames(n, limit, *skips) == frames_by_the_book(n, limit, *skips), (n, limit, skips)


def test_uniform_spans_the_clip(script):
    assert script.select_frames(100, 5, frame_sampling="uniform") == [0, 25, 50, 74, 99]
    assert script.select_frames(100, 5, 10, 9, frame_sampling="uniform") == [10, 30, 50, 70, 90]
    assert script.select_frames(7, 49, frame_sampling="uniform") == [0, 2, 3, 4, 6]
    assert script.select_frames(1, 49, frame_sampling="uniform") == [0]


def test_fps_follows_the_clips_own_rate(script):
    def fps(n, source, target, limit=49, skip=0):
        times = [index / source for index in range(n + 1)]
        return script.select_frames(n, limit, skip, 0, "fps", times, target)

    assert fps(30, 30, 10) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert fps(195, 30, 8, limit=9, skip=3) == [3, 6, 10, 14, 18, 21, 25, 29, 33]
    assert fps(10, 5, 10, limit=9) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert fps(2, 30, 8) == [0]


@pytest.mark.parametrize("sampling", ["stride", "uniform", "fps"])
def test_indices_are_in_the_clip_and_4k_plus_1(script, sampling):
    draw = random.Random(1)
    for _ in range(2000):
        n, limit = draw.randint(1, 400), draw.randint(1, 60)
        skips = draw.randint(0, 20), draw.randint(0, 20)
        source, fps = draw.choice([8, 23.976, 30, 60]), draw.choice([1, 8, 16, 30])
        times = [index / source for index in range(n + 1)]
        indices = script.select_frames(n, limit, *skips, sampling, times, fps)
        assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < n
        assert 1 <= len(indices) <= limit and len(indices) % 4 == 1


def gradient(height, width) -> torch.Tensor:
    """Two frames whose channels are the row, the column and 0, each from -1 to 1."""
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(-1, 1, width)[None].expand(height, width)
    return torch.stack([rows, columns, torch.zeros(height, width)])[None].repeat(2, 1, 1, 1)


@pytest.mark.parametrize("source", [(90, 160), (160, 90), (64, 96), (65, 97), (31, 500)])
@pytest.mark.parametrize("mode", ["center", "random", "none", "stretch"])
def test_reshape_covers_crops_and_keeps_the_aspect(script, source, mode):
    position = (0.99, 0.0) if mode in ("random", "none") else None
    frames = script.resize_and_crop(gradient(*source), 64, 96, mode, position)
    assert frames.shape == (2, 3, 64, 96)
    rows, columns = frames[0, 0, :, 48], frames[0, 1, 32]
    height_seen, width_seen = (rows[-1] - rows[0]) / 2, (columns[-1] - columns[0]) / 2  # parts of the source
    if mode == "stretch":
        assert height_seen > 0.9 and width_seen > 0.9
    else:
        aspect = (width_seen * source[1]) / (height_seen * source[0])
        assert aspect == pytest.approx(96 / 64, rel=0.06)
        assert max(height_seen, width_seen) > 0.9
    if mode == "center":
        assert abs(rows.mean()) < 0.05 and abs(columns.mean()) < 0.05
    if mode == "random" and source != (64, 96):  # the lower left corner was asked for
        assert rows[-1] > 0.9 and columns[0] < -0.9


def test_pixels_and_attributes(script, clips):
    columns = {"caption_column": "prompts.txt", "video_column": "videos.txt"}
    dataset = script.VideoDataset(str(clips), **columns, height=64, width=96, max_num_frames=9, id_token="TOK")
    assert (len(dataset), dataset.num_instance_videos) == (4, 4)
    assert dataset.instance_prompts[0] == "a red square moves right"
    assert dataset.instance_video_paths[3] == clips / "videos" / "03.mp4"
    item = dataset[0]
    assert item["instance_prompt"] == "TOK a red square moves right"
    video = item["instance_video"]
    assert video.shape == (9, 3, 64, 96) and video.dtype == torch.float32
    assert -1 <= video.min() and video.max() <= 1
    expected = torch.from_numpy(tiny.moving_square(9, 64, 96)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (video - expected).abs().mean() < 0.05  # H.264 is lossy


def test_a_video_is_decoded_on_access_only(script, clips, monkeypatch):
    opened = []
    open_clip = script.open_clip
    monkeypatch.setattr(script, "open_clip", lambda *a: opened.append(a) or open_clip(*a))
    dataset = script.VideoDataset(str(clips), caption_column="prompts.txt", video_column="videos.txt")
    assert not opened
    dataset[0]
    assert len(opened) == 1


def one_clip(script, folder, name, **settings) -> torch.Tensor:
    """The pixels of one clip of `folder`, as a dataset of line files gives them."""
    (folder / "text").write_text("a caption\n")
    (folder / "video").write_text(f"{name}\n")
    return script.VideoDataset(str(folder), **settings)[0]["instance_video"]


def test_random_crop_is_one_offset_a_clip_drawn_from_the_seed(script, tmp_path):
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, None], (5, 16, 1, 3))  # each column has its own brightness
    tiny.write_clip(tmp_path / "wide.mp4", ramp)

    def load(mode, seed):
        shape = {"height": 16, "width": 32, "max_num_frames": 5}
        return one_clip(script, tmp_path, "wide.mp4", video_reshape_mode=mode, seed=seed, **shape)

    first = load("random", 0)
    assert torch.equal(first, load("none", 0))
    assert len({load("random", seed)[0, 0, 0, 0].item() for seed in range(8)}) > 3
    assert (first - first[:1]).abs().max() < 0.1  # the frames are equal, so their crops are the same place


def test_line_files(script, tmp_path):
    (tmp_path / "p").write_bytes("\ufeffone\r\n two\u2028still two\x0c \nthree\n\n \n".encode())
    assert script.read_lines(tmp_path / "p") == ["one", "two\u2028still two", "three"]


TABLES = ["csv", "json", "jsonl", "parquet", "videofolder", "embedded"]


@pytest.mark.parametrize("table", TABLES)
def test_tables(script, run, clips, tmp_path, table):
    import datasets

    captions = (clips / "prompts.txt").read_text().split("\n")[:4]
    paths = [f"videos/{i:02d}.mp4" for i in range(4)]
    rows = [{"text": caption, "video": path} for caption, path in zip(captions, paths, strict=True)]
    name = str(clips / f"meta.{table}")
    if table == "csv":
        (clips / "meta.csv").write_text("text,video\n" + "".join(f"{r['text']},{r['video']}\n" for r in rows))
    elif table == "json":
        (clips / "meta.json").write_text(json.dumps(rows))
    elif table == "jsonl":
        (clips / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif table == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(name)
    elif table == "videofolder":
        name = str(clips / "videos")
        lines = [f"{i:02d}.mp4,{caption}\n" for i, caption in enumerate(captions)]
        (clips / "videos" / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    else:
        name = str(clips / "meta.parquet")
        content = {"text": captions, "video": [{"bytes": (clips / p).read_bytes(), "path": p} for p in paths]}
        features = datasets.Features({"text": datasets.Value("string"), "video": datasets.Video(decode=False)})
        datasets.Dataset.from_dict(content, features=features).to_parquet(name)
        for path in paths:
            (clips / path).unlink()
    dataset = script.VideoDataset(dataset_name=name, cache_dir=str(tmp_path / "cache"), max_num_frames=9)
    assert dataset.instance_prompts == captions
    first = dataset[0]["instance_video"]
    assert first.shape == (9, 3, 480, 720)
    assert first[0, 0].max() > 0.5 and first[0, 2].max() < 0  # red
    if table != "embedded":  # the others give paths, as line files do
        return
    source = {"instance_data_root": None, "dataset_name": name, "caption_column": None, "video_column": None}
    folders = {"cache_dir": tmp_path / "cache", "precompute_dir": tmp_path / "pre"}
    output = run(**source, **folders, dataloader_num_workers=2, max_train_steps=1)
    assert (output / script.LORA_FILE).is_file()


def test_relative_paths_of_a_table_are_under_the_root(script, clips, tmp_path):
    table = tmp_path / "elsewhere" / "meta.csv"
    table.parent.mkdir()
    table.write_text("text,video\nred,videos/00.mp4\n")
    dataset = script.VideoDataset(str(clips), str(table), cache_dir=str(tmp_path / "cache"))
    assert dataset.instance_video_paths == [clips / "videos" / "00.mp4"]


def test_one_frame_is_a_video_and_an_empty_file_is_none(script, tmp_path):
    tiny.write_clip(tmp_path / "one.mp4", tiny.moving_square(1, 64, 96))
    assert one_clip(script, tmp_path, "one.mp4", height=16, width=16).shape == (1, 3, 16, 16)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        one_clip(script, tmp_path, "empty.mp4", height=16, width=16)
