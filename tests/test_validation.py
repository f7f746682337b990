"""Validation writes videos as asked, and sends them to trackers; the token goes nowhere."""

import decord
import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file

TOKEN = "hf_thisMustNotBeSeenAnywhere"
ASK = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 2}


@pytest.mark.parametrize("frames", [5, 9])  # an even and an odd number of latent frames
def test_videos_have_the_asked_frames_size_and_rate(run, frames):
    shape = {"fps": 12, "height": 48, "width": 80, "max_num_frames": frames}
    output = run(**ASK, **shape, num_validation_videos=2, use_dynamic_cfg=True)
    files = sorted((output / "validation").iterdir())
    names = [f"test_step-000002_prompt-{prompt}_video-{video}.mp4" for prompt in (0, 1) for video in (0, 1)]
    assert [file.name for file in files] == names
    for file in files:
        reader = decord.VideoReader(str(file))
        assert len(reader) == frames and reader[0].shape == (48, 80, 3)
        assert reader.get_avg_fps() == pytest.approx(12)


@SHARED
def test_every_n_epochs_and_at_the_end(run):
    # 4 clips at batch size 2: 2 steps an epoch
    output = run(**ASK, max_train_steps=None, num_train_epochs=3, validation_epochs=1)
    steps = sorted({file.name.split("_prompt")[0] for file in (output / "validation").iterdir()})
    assert steps == ["test_step-000006", "validation_step-000002", "validation_step-000004"]


@SHARED
def test_every_n_steps_in_place_of_epochs(run):
    output = run(**ASK, max_train_steps=7, validation_epochs=1, validation_steps=3)
    steps = sorted({file.name.split("_prompt")[0] for file in (output / "validation").iterdir()})
    assert steps == ["test_step-000007", "validation_step-000003", "validation_step-000006"]


def sampled(script, run, monkeypatch, **changes):
    """The final latents-to-pixels of a run's last validation."""
    videos = []
    log_validation = script.log_validation
    monkeypatch.setattr(
        script, "log_validation", lambda *args, **kwargs: videos.append(log_validation(*args, **kwargs)) or videos[-1]
    )
    run(**ASK, **changes)
    monkeypatch.setattr(script, "log_validation", log_validation)
    return torch.stack([torch.from_numpy(video) for group in videos for video in group])


def test_seed_zero_is_a_seed_and_samples_repeat(script, run, monkeypatch):
    first = sampled(script, run, monkeypatch, seed=0, num_validation_videos=2)
    again = sampled(script, run, monkeypatch, seed=0, num_validation_videos=2)
    other = sampled(script, run, monkeypatch, seed=1, num_validation_videos=2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # two videos of one prompt differ


def test_it_is_what_the_saved_lora_gives(script, run, kind, model, start_images, monkeypatch):
    """The final validation equals a fresh pipeline that loads the LoRA from the output folder."""
    from diffusers import CogVideoXDPMScheduler, DiffusionPipeline
    from PIL import Image

    ours = sampled(script, run, monkeypatch, learning_rate=1e-2)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights("output")
    size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    ask = {"prompt": "a red square"} | ({"image": Image.open(start_images[0])} if kind == "i2v" else {})
    theirs = pipe(**ask, **size, generator=torch.Generator().manual_seed(0), output_type="np").frames
    torch.testing.assert_close(ours[0], torch.from_numpy(theirs[0]), rtol=1e-3, atol=1e-3)


def test_sampling_leaves_the_training_as_it_is(script, run, tmp_path):
    plain = run(output_dir=tmp_path / "plain", max_train_steps=4)
    sampled_between = run(output_dir=tmp_path / "sampled", max_train_steps=4, validation_steps=1, **ASK)
    a, b = (load_file(output / script.LORA_FILE) for output in (plain, sampled_between))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_failed_validation_does_not_end_the_run(script, run, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise torch.OutOfMemoryError("no memory for this video")

    monkeypatch.setattr(script, "log_validation", broken)
    output = run(**ASK, max_train_steps=4, validation_steps=1)
    assert (output / script.LORA_FILE).is_file()
    assert "Validation failed" in caplog.text and "no memory for this video" in caplog.text


def files_with(folder, text: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("tracker", [None, "tensorboard", "wandb", "all"])
def test_trackers_get_scalars_and_videos_and_never_the_token(script, flags, monkeypatch, capfd, tmp_path, tracker):
    words = flags(**ASK, report_to=tracker, hub_token=TOKEN, tracker_name="my-project", validation_steps=1)
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *words])
    script.main(script.get_args())
    output = tmp_path / "output"

    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert files_with(tmp_path, TOKEN) == []
    assert len(list((output / "validation").iterdir())) == 4
    if tracker in ("tensorboard", "all"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(output / "logs" / "my-project"), {"images": 0, "scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2]
        assert {"loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
        gif = events.Images("validation/validation_step-000001_prompt-0_video-0")[0]
        assert (gif.width, gif.height, gif.encoded_image_string[:6]) == (96, 64, b"GIF89a")
    if tracker in ("wandb", "all"):
        runs = list((output / "logs" / "wandb").glob("offline-run-*"))
        assert len(runs) == 1 and list(runs[0].glob("run-*.wandb"))
        assert len(list(runs[0].glob("files/media/videos/*.mp4"))) == 4


def test_settings_for_trackers_have_no_token(script):
    args = script.get_args(["--pretrained_model_name_or_path", "m", "--hub_token", TOKEN])
    config = script.tracker_config(args)
    assert TOKEN not in str(config) and config["rank"] == 128
    assert set(config) == set(vars(args)) - {"hub_token"}
    assert all(isinstance(value, (bool, int, float, str)) for value in config.values())
