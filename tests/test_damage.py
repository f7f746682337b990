"""Damaged clips, damaged precomputed files, any text: listed, left out or encoded again, and never a crash."""

import faulthandler
import os
import random
import re
import signal
import struct
import time

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_objective import record_inputs
from test_reader import ffmpeg


def boxes(data: bytes, start: int = 0, end: int | None = None):
    """(type, first byte, last byte + 1) of the boxes of an mp4, and of those inside."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, name = struct.unpack(">I4s", data[start : start + 8])
        if size < 8:
            return
        yield name, start, start + size
        if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            yield from boxes(data, start + 8, start + size)
        start += size


def patched(data: bytes, name: bytes, offset: int, content: bytes) -> bytes:
    """`data` with `content` at `offset` in the first box called `name`."""
    start = next(first for box, first, _ in boxes(data) if box == name) + offset
    return data[:start] + content + data[start + len(content) :]


def make_corpus(folder, good: list[bytes]) -> list:
    """Over 120 clips, most of them broken, made from good ones."""
    draw = random.Random(0)
    clips: dict[str, bytes] = {}
    for index in range(30):
        data = draw.choice(good)
        clips[f"truncated-{index}"] = data[: draw.randrange(len(data))]
    for index in range(50):
        data = bytearray(draw.choice(good))
        for _ in range(draw.choice([1, 4, 40])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        clips[f"flipped-{index}"] = bytes(data)
    for index in range(25):  # flips in the index of the frames alone
        data = bytearray(draw.choice(good))
        first, last = next((a, b) for name, a, b in boxes(bytes(data)) if name == b"moov")
        for _ in range(3):
            data[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        clips[f"index-{index}"] = bytes(data)
    for index in range(12):  # the index of one clip with the frames of another
        one, other = draw.sample(good, 2)
        moov = {data: next((a, b) for name, a, b in boxes(data) if name == b"moov") for data in (one, other)}
        clips[f"swapped-{index}"] = one[: moov[one][0]] + other[slice(*moov[other])] + one[moov[one][1] :]
    for index, count in enumerate((2**31 - 1, 2**32 - 1, 10**6)):
        huge = struct.pack(">I", count)
        clips[f"samples-{index}"] = patched(good[0], b"stsz", 16, huge)
        clips[f"times-{index}"] = patched(good[0], b"stts", 12, struct.pack(">I", 1) + huge)
        clips[f"chunks-{index}"] = patched(good[0], b"stsc", 12, huge)
    for index, side in enumerate((0, 1, 32767, 65535)):
        clips[f"size-{index}"] = patched(good[0], b"stsd", 48, struct.pack(">HH", side, side))
    clips["no-frames"] = patched(good[0], b"stsz", 16, struct.pack(">I", 0))
    clips |= {"empty": b"", "text": b"no video", "zeros": bytes(5000), "noise": draw.randbytes(5000)}
    paths = [folder / f"{name}.mp4" for name in clips]
    folder.mkdir(parents=True)
    for path, data in zip(paths, clips.values(), strict=True):
        path.write_bytes(data)
    Image.new("RGB", (96, 64)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", folder / "sound.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", folder / "sound.wav")
    (folder / "sound.wav").rename(folder / "wave.mp4")
    (folder / "folder.mp4").mkdir()
    return [*paths, *(folder / f"{name}.mp4" for name in ("picture", "sound", "wave", "folder"))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, shared_clips):
    good = [path.read_bytes() for path in sorted((shared_clips / "videos").iterdir())]
    return make_corpus(tmp_path_factory.mktemp("corpus") / "clips", good)


@pytest.fixture
def quiet_crashes():
    """pytest would print a page for each process that the decoder crashes."""
    was_on = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if was_on:
        faulthandler.enable()


@pytest.mark.usefixtures("quiet_crashes")
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_every_broken_clip_is_decoded_or_named(script, corpus, reader):
    assert len(corpus) > 120
    (corpus[0].parent / "text.txt").write_text("a caption\n" * len(corpus))
    (corpus[0].parent / "clips.txt").write_text("".join(f"{path.name}\n" for path in corpus))
    folder = corpus[-1]  # a folder by the name of a clip: the constructor would refuse it
    columns = {"caption_column": "text.txt", "video_column": "clips.txt", "height": 64, "width": 96}
    folder.rmdir()
    folder.touch()
    dataset = script.VideoDataset(str(folder.parent), **columns, max_num_frames=9, video_reader=reader)
    folder.unlink()
    folder.mkdir()
    memory = []
    good, bad = 0, {}
    for index, answer in script.decode_videos(dataset, list(range(len(corpus))), torch.float32, 2):
        memory.append(psutil.Process().memory_info().rss)
        if isinstance(answer, str):
            assert re.fullmatch(r"[^\n]+", answer) and not re.search(r"\d{9}|^\[\d\d:", answer), answer  # no raw codes
            bad[corpus[index].stem] = answer
        else:
            video = answer["video"]
            assert video.shape[1:] == (3, 64, 96) and len(video) % 4 == 1 and video.isfinite().all()
            good += 1
    assert good + len(bad) == len(corpus) and good > 10 and len(bad) > 50
    assert {"empty", "text", "zeros", "noise", "no-frames", "sound", "wave", "folder"} <= bad.keys()
    assert max(memory[50:]) - memory[50] < 50e6


def fake_decoder(script, monkeypatch):
    """Clip 00 crashes while it is decoded, 01 at once, 02 raises, 03 is decoded."""
    open_clip = script.open_clip

    def read(record, *arguments):
        name = os.path.basename(record.path)
        if name in ("00.mp4", "01.mp4"):
            time.sleep(0.5 if name == "00.mp4" else 0)
            os._exit(-6)
        if name == "02.mp4":
            raise ValueError("first line\n\nlast line")
        return open_clip(record, *arguments)

    monkeypatch.setattr(script, "open_clip", read)


def columns(script, clips):
    names = {"caption_column": "prompts.txt", "video_column": "videos.txt"}
    return script.VideoDataset(str(clips), **names, height=64, width=96, max_num_frames=9)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_clip_that_crashes_the_decoder_costs_itself_only(script, shared_clips, monkeypatch, workers):
    fake_decoder(script, monkeypatch)
    dataset = columns(script, shared_clips)
    found = dict(script.decode_videos(dataset, [0, 1, 2, 3], torch.float32, workers))
    assert found[0] == found[1] == "the decoder crashed on it" and found[2] == "last line"
    assert torch.equal(found[3]["video"], dataset[3]["instance_video"])
    assert not psutil.Process().children() or all(c.name() != "python" for c in psutil.Process().children())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_come_back_as_they_were_decoded(script, shared_clips, dtype):
    dataset = columns(script, shared_clips)
    for index, answer in script.decode_videos(dataset, [2, 0, 1], dtype, 2):
        video = answer["video"]
        assert answer["kept"].tolist() == [1, 1] and video.dtype == dtype
        assert torch.equal(video, dataset[index]["instance_video"].to(dtype))


def test_bad_videos_end_the_run_or_are_left_out(script, run, clips, monkeypatch, caplog):
    fake_decoder(script, monkeypatch)
    (clips / "prompts.txt").write_text("zero\none\ntwo\nthree\ntwo again\n")
    (clips / "videos.txt").write_text("".join(f"videos/0{index}.mp4\n" for index in (0, 1, 2, 3, 2)))
    own = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 2}
    with pytest.raises(script.RunError) as error:
        run(**own)
    said = str(error.value)
    assert "4 of 5 videos cannot be decoded" in said and all(f"0{index}.mp4: " in said for index in (0, 1, 2))
    assert "03.mp4" not in said
    calls = record_inputs(monkeypatch)
    output = run(**own, skip_bad_videos=True)
    assert "4 of 5 videos cannot be decoded and are left out" in caplog.text
    assert (output / script.LORA_FILE).is_file()
    (clips / "prompts.txt").write_text("three\n")
    (clips / "videos.txt").write_text("videos/03.mp4\n")
    run(**own)
    embeds = [call["encoder_hidden_states"] for call in calls]
    assert all(torch.equal(each, embeds[-1]) for each in embeds) and len(embeds) == 4  # the caption of clip 03


def test_all_bad_ends_the_run(script, run, clips):
    for path in (clips / "videos").iterdir():
        path.write_bytes(b"no video")
    with pytest.raises(script.RunError, match="4 of 4 videos cannot be decoded"):
        run(instance_data_root=clips, precompute_dir=None, skip_bad_videos=True)


DAMAGES = {
    "truncated": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "longer": lambda data: data + b"x",
    "header": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "foreign": lambda data: data.replace(b'"moments"', b'"momentr"').replace(b'"prompt_embeds"', b'"prompt_embedr"'),
}


@pytest.mark.parametrize("item", ["videos", "prompts"])
def test_damaged_item_is_encoded_again(run, clips, item):
    own = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 1}
    run(**own)
    files = sorted((clips / ".cogvideox_precomputed" / item).iterdir())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    for name, damage in DAMAGES.items():
        files[1].write_bytes(damage(before[1][0]))
        assert files[1].read_bytes() != before[1][0], name
        run(**own)
        after = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
        assert after[0] == before[0] and after[2:] == before[2:] and after[1][0] == before[1][0], name
        assert sorted((clips / ".cogvideox_precomputed" / item).iterdir()) == files, name


def test_two_runs_share_a_folder_at_the_same_time(launch, clips, tmp_path):
    own = {"instance_data_root": clips, "precompute_dir": None, "random_flip": True}
    children = [launch(output_dir=tmp_path / name, **own) for name in ("one", "two")]
    for child in children:
        assert child.wait() == 0, child.said()[-3000:]
    folder = clips / ".cogvideox_precomputed"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 8 + 5 and all(load_file(path) for path in files)
    loras = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two")]
    assert all(torch.equal(loras[0][key], loras[1][key]) for key in loras[0])


LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1).filter(str.strip)
FEW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
ENDS = st.sampled_from(["", "\n", "\r\n", "\n\n \n"])


@given(captions=st.lists(LINES, min_size=1, max_size=8), end=ENDS, token=st.text())
@FEW
def test_captions_never_shift_against_videos(script, tmp_path, captions, end, token):
    (tmp_path / "p").write_bytes(("\n".join(captions) + end).encode())
    (tmp_path / "v").write_text("".join(f"{index}.mp4\n" for index in range(len(captions))))
    for index in range(len(captions)):
        (tmp_path / f"{index}.mp4").touch()
    dataset = script.VideoDataset(str(tmp_path), caption_column="p", video_column="v", id_token=token)
    assert len(dataset) == len(captions)
    for index, caption in enumerate(captions):
        first = caption.lstrip("\ufeff") if index == 0 else caption  # a byte order mark belongs to the file
        assert dataset.instance_prompts[index] in (caption.strip(), first.strip())
        assert dataset.instance_video_paths[index].name == f"{index}.mp4"
        words = [token.strip(), dataset.instance_prompts[index]]
        assert dataset.prompt(index) == " ".join(word for word in words if word)


@given(data=st.binary(max_size=60))
@FEW
def test_any_bytes_are_lines_or_an_error(script, tmp_path, data):
    (tmp_path / "p").write_bytes(data)
    try:
        lines = script.read_lines(tmp_path / "p")
    except script.RunError as error:
        assert str(tmp_path / "p") in str(error)
    else:
        assert all(line == line.strip() and line and "\n" not in line for line in lines)


def test_a_decoder_that_is_killed_while_it_sends(script, monkeypatch):
    """Half a message has come: reading on is an OSError, not an end of file."""

    def send_half(connection, _dataset, _dtype) -> None:
        connection.recv()
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(script, "decode_clips", send_half)
    answers = list(script.decode_videos(None, [0, 1], torch.float32, 1))
    assert answers == [(0, "the decoder crashed on it"), (1, "the decoder crashed on it")]
