"""Validation writes videos as asked, and sends them to trackers; the token goes nowhere."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import BOTH, ROOT
from safetensors.torch import load_file

TOKEN = "hf_thisMustNotBeSeenAnywhere"
ASK = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 2}


@pytest.mark.parametrize("frames", [5, 9])  # an even and an odd number of latent frames
def test_videos_have_the_asked_frames_size_and_rate(script, run, frames):
    shape = {"fps": 12, "height": 48, "width": 80, "max_num_frames": frames}
    output = run(**ASK, **shape, num_validation_videos=2, use_dynamic_cfg=True)
    files = sorted((output / "validation").iterdir())
    numbers = [f"prompt-{prompt}_video-{video}.mp4" for prompt in (0, 1) for video in (0, 1)]
    names = [f"{phase}_{number}" for phase in ("test_step-000002", "validation_step-000000") for number in numbers]
    assert [file.name for file in files] == names
    for file in files:
        clip = script.open_clip(script.VideoRecord("", str(file)))
        assert len(clip.times) == frames + 1 and clip.read([0]).shape == (1, 48, 80, 3)
        assert clip.times[-1] == pytest.approx(frames / 12)


def test_every_n_epochs_and_at_the_end(run):
    # 4 clips at batch size 2: 2 steps an epoch
    output = run(**ASK, max_train_steps=None, num_train_epochs=3, validation_epochs=1)
    steps = sorted({file.name.split("_prompt")[0] for file in (output / "validation").iterdir()})
    assert steps == ["test_step-000006", *(f"validation_step-00000{step}" for step in (0, 2, 4))]


def test_every_n_steps_in_place_of_epochs(run):
    output = run(**ASK, max_train_steps=7, validation_epochs=1, validation_steps=3)
    steps = sorted({file.name.split("_prompt")[0] for file in (output / "validation").iterdir()})
    assert steps == ["test_step-000007", *(f"validation_step-00000{step}" for step in (0, 3, 6))]


def test_the_process_that_forks_the_loading_workers_decodes_no_video(script, run, monkeypatch):
    """A worker would inherit PyAV's objects without their threads, and wait forever for them when it frees them."""
    opened = []  # in this process: those that decode the clips have a list of their own
    open_video = script.VideoFile.open
    monkeypatch.setattr(script.VideoFile, "open", lambda video: opened.append(video.source) or open_video(video))
    run(**ASK, report_to="tensorboard", dataloader_num_workers=2)
    assert opened == []


def sampled(script, run, monkeypatch, **changes):
    """The pixels of a run's validation videos, as the pipeline returns them."""
    videos = []
    sample = script.PIPELINE.__call__

    def spy(self, *args, **kwargs):
        output = sample(self, *args, **kwargs)
        video = output.frames[0]
        if isinstance(video, list):  # pictures, of 8 bits
            video = np.stack(video).astype(np.float32) / 255
        videos.append(torch.from_numpy(video))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(script.PIPELINE, "__call__", spy)
        run(**ASK, **changes)
    return torch.stack(videos)


def test_seed_zero_is_a_seed_and_samples_repeat(script, run, monkeypatch):
    first = sampled(script, run, monkeypatch, seed=0, num_validation_videos=2)
    again = sampled(script, run, monkeypatch, seed=0, num_validation_videos=2)
    other = sampled(script, run, monkeypatch, seed=1, num_validation_videos=2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # two videos of one prompt differ


@BOTH
def test_it_is_what_the_saved_lora_gives(script, run, kind, model, start_images, monkeypatch):
    """The first validation equals a fresh pipeline, the final one a pipeline with the LoRA of the output folder."""
    from diffusers import CogVideoXDPMScheduler, DiffusionPipeline
    from PIL import Image

    before, validated = sampled(script, run, monkeypatch, learning_rate=1e-2).split(2)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    ask = {"prompt": "a red square"} | ({"image": Image.open(start_images[0])} if kind == "i2v" else {})
    for video in (before[0], validated[0]):
        expected = pipe(**ask, **size, generator=torch.Generator().manual_seed(0), output_type="np").frames
        torch.testing.assert_close(video, torch.from_numpy(expected[0]), rtol=1e-3, atol=3e-3)
        pipe.load_lora_weights("output")


def test_sampling_leaves_the_training_as_it_is(script, run, tmp_path):
    plain = run(output_dir=tmp_path / "plain", max_train_steps=4)
    sampled_between = run(output_dir=tmp_path / "sampled", max_train_steps=4, validation_steps=1, **ASK)
    a, b = (load_file(output / script.LORA_FILE) for output in (plain, sampled_between))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_failed_validation_does_not_end_the_run(script, run, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise torch.OutOfMemoryError("no memory for this video")

    monkeypatch.setattr(script.PIPELINE, "__call__", broken)
    output = run(**ASK, max_train_steps=4, validation_steps=1)
    assert (output / script.LORA_FILE).is_file()
    assert "Validation failed" in caplog.text and "no memory for this video" in caplog.text


def files_with(folder, text: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


NAMES = {"train/loss", "train/lr", "train/grad_norm", "train/step_time", "loss", "lr"}
TAGS = [f"validation/prompt-{prompt}_video-0" for prompt in (0, 1)]


def check_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()
    scalars = {name: [event.step for event in events.Scalars(name)] for name in NAMES}
    assert scalars == dict.fromkeys(NAMES, [1, 2]) and NAMES == set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == [event.value for event in events.Scalars("train/loss")]
    for tag in TAGS:  # all validations under one name, for its slider
        images = events.Images(tag)
        assert [image.step for image in images] == [0, 1, 2]
        assert all((grid.width, grid.height) == (8 * 96, 2 * 64) for grid in images)  # 9 frames


def wandb_history(file) -> list[dict]:
    """What a run's file says of each step. Its records are those of a LevelDB log: blocks of 32 KiB, in which each
    piece of a record has 7 bytes before it: checksum, length, and whether it is the last piece (1, 4) or not."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, content, rows = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, last = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6] in (1, 4)
        if position + 7 + length > len(data):
            break  # not written whole yet
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if last:
            record, content = Record.FromString(content), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def check_wandb(folder, output):
    (run,) = folder.glob("offline-run-*")
    deadline = time.monotonic() + 20  # wandb's own process writes it, and may be a little behind
    while len(rows := wandb_history(next(run.glob("run-*.wandb")))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["_step"] for row in rows] == [0, 1, 2] and all(NAMES <= row.keys() for row in rows[1:])
    for row, phase in zip(rows, ("validation", "validation", "test"), strict=True):
        for index, tag in enumerate(TAGS):
            file = output / "validation" / f"{phase}_step-{row['_step']:06}_prompt-{index}_video-0.mp4"
            assert (run / "files" / row[f"{tag}/path"]).read_bytes() == file.read_bytes()
            assert row[f"{tag}/caption"] == ASK["validation_prompt"].split(":::")[index]


def check_comet(archive, output):
    """Its offline archive: a message a line, and the videos."""
    archive.extractall(output / "comet")
    text = (output / "comet" / "messages.json").read_text()
    assert all(json.dumps(name) in text for name in NAMES | set(TAGS))
    videos = {file.read_bytes() for file in (output / "validation").iterdir()}
    assert videos <= {file.read_bytes() for file in (output / "comet").iterdir()}


@pytest.mark.parametrize("tracker", [None, "all"])
def test_trackers_get_scalars_and_videos_and_never_the_token(script, flags, monkeypatch, capfd, tmp_path, tracker):
    words = flags(**ASK, report_to=tracker, hub_token=TOKEN, tracker_name="my-project", validation_steps=1)
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *words])
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    script.main(script.get_args())
    output = tmp_path / "output"

    assert len(list((output / "validation").iterdir())) == 6
    if tracker == "all":
        check_tensorboard(output / "logs" / "my-project")
        check_wandb(output / "logs" / "wandb", output)
        (archive,) = (tmp_path / "comet").glob("*.zip")
        check_comet(zipfile.ZipFile(archive), output)
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert files_with(tmp_path, TOKEN) == []


@pytest.mark.long
def test_tracker_without_login_ends_the_run_before_encoding(script, flags, run, tmp_path, monkeypatch):
    monkeypatch.setenv("COMET_CONFIG", "none")
    with pytest.raises(script.RunError, match="--report_to comet_ml: .*API key") as error:
        run(report_to="comet_ml", precompute_dir=tmp_path / "pre")
    assert error.value.exit_code == 2 and not list((tmp_path / "pre").glob("*/*"))
    # wandb keeps the settings that it has read in this process
    words = flags(report_to="wandb", precompute_dir=tmp_path / "pre")
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": "none", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script.__name__}.py"), *words], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 2 and "error: --report_to wandb: " in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not list((tmp_path / "pre").glob("*/*"))


@pytest.fixture
def tiled(script, monkeypatch) -> list:
    """Grows at each decoding of a sample, by whether it is done in small tiles."""
    found = []
    decode = script.AutoencoderKLCogVideoX.decode

    def spy(self, *arguments, **keywords):
        found.append(self.use_tiling and self.tile_sample_min_height == script.SMALL_TILES[0])
        return decode(self, *arguments, **keywords)

    monkeypatch.setattr(script.AutoencoderKLCogVideoX, "decode", spy)
    return found


@pytest.mark.parametrize("memory", [700e6, 500e6])
def test_samples_are_decoded_in_tiles_where_memory_is_short(script, run, monkeypatch, tiled, memory):
    """Decoding takes up to 25,000 values a pixel of a frame: 614 MB of 64 x 96 in fp32. What other programs and torch
    itself hold in the meantime changes nothing: all samples of a run are decoded alike."""
    free = itertools.cycle([1e4, 1e12])
    monkeypatch.setattr(script, "free_memory", lambda _device: next(free))
    monkeypatch.setattr(script, "device_memory", lambda _device: memory + script.OTHER_MEMORY)
    output = run(max_train_steps=2, validation_prompt="a red square", num_inference_steps=1, validation_steps=1)
    assert tiled == [memory < 600e6] * 3 and len(list(output.glob("validation/*.mp4"))) == 3


@pytest.mark.parametrize(("first", "then"), [(1e6, math.inf), (math.inf, 1e6)])
def test_a_resumed_run_keeps_its_tiles_on_another_card(script, run, monkeypatch, caplog, tmp_path, tiled, first, then):
    """Else it would encode all clips again, and its samples could not be compared with those before."""
    caplog.set_level("INFO")
    settings = {"validation_prompt": "a red square", "num_inference_steps": 1, "precompute_dir": tmp_path / "encoded"}
    monkeypatch.setattr(script, "device_memory", lambda _device: first)
    run(**settings, max_train_steps=1)
    caplog.clear()
    monkeypatch.setattr(script, "device_memory", lambda _device: then)
    run(**settings, max_train_steps=2, resume_from_checkpoint="latest")
    assert "videos: 0 of 4 to encode" in caplog.text
    assert tiled == [first < math.inf] * 3
