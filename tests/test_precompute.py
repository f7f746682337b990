"""Prompts and videos are encoded once, into files; a change encodes anew just what it changes."""

import os
import shutil
import signal
import time

import pytest
from conftest import SHARED, reset_accelerate
from safetensors.torch import load_file
from transformers import T5EncoderModel


@pytest.fixture
def encoded(script, monkeypatch):
    """Counts what a run encodes and loads: {"prompts": [...], "videos": n, "images": n, "t5": n, "vae": n}."""
    counts = {}
    encode_prompt, encode_video, load_vae = script.encode_prompt, script.encode_video, script.load_vae
    load_t5 = T5EncoderModel.from_pretrained.__func__

    def counting_encode_prompt(tokenizer, text_encoder, prompt, *args):
        counts["prompts"].append(prompt)
        return encode_prompt(tokenizer, text_encoder, prompt, *args)

    def counting_encode_video(vae, video):
        counts["videos" if len(video) > 1 else "images"] += 1
        return encode_video(vae, video)

    def counting_load_vae(*args):
        counts["vae"] += 1
        return load_vae(*args)

    def counting_load_t5(cls, *args, **kwargs):
        counts["t5"] += 1
        return load_t5(cls, *args, **kwargs)

    monkeypatch.setattr(script, "encode_prompt", counting_encode_prompt)
    monkeypatch.setattr(script, "encode_video", counting_encode_video)
    monkeypatch.setattr(script, "load_vae", counting_load_vae)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", classmethod(counting_load_t5))

    def reset():
        counts.update(prompts=[], videos=0, images=0, t5=0, vae=0)
        return counts

    reset()
    counts["reset"] = reset
    return counts


@pytest.fixture
def rerun(run, clips, encoded):
    """Run on this test's own clips; returns the counts of this run alone."""

    def once(**changes) -> dict:
        encoded["reset"]()
        run(**{"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 1} | changes)
        return encoded

    return once


def test_second_run_loads_neither_encoder(rerun, kind, clips):
    first = rerun()
    assert (first["t5"], first["vae"], first["videos"], first["images"]) == (1, 1, 4, {"t2v": 0, "i2v": 4}[kind])
    assert sorted(first["prompts"]) == sorted([*(clips / "prompts.txt").read_text().split("\n")[:4], ""])
    second = rerun()
    assert (second["t5"], second["vae"], second["videos"], second["images"], second["prompts"]) == (0, 0, 0, 0, [])
    assert (clips / ".cogvideox_precomputed").is_dir()


@SHARED
def test_each_distinct_prompt_once(rerun, clips):
    (clips / "prompts.txt").write_text("same\nsame\nother\nsame\n")
    counts = rerun(validation_prompt="other:::new", num_inference_steps=1, max_train_steps=3)
    assert sorted(counts["prompts"]) == ["", "new", "other", "same"] and counts["t5"] == 1


def test_changed_caption_encodes_one_prompt(rerun, clips):
    rerun()
    lines = (clips / "prompts.txt").read_text().split("\n")
    (clips / "prompts.txt").write_text("\n".join(["a purple square sleeps", *lines[1:]]))
    counts = rerun()
    assert counts["prompts"] == ["a purple square sleeps"] and counts["videos"] == 0


def test_id_token_goes_before_every_prompt(rerun, clips):
    rerun()
    counts = rerun(id_token="DISNEY")
    captions = (clips / "prompts.txt").read_text().split("\n")[:4]
    assert counts["prompts"] == [f"DISNEY {caption}" for caption in captions]


def test_touched_clip_encodes_one_video(rerun, clips):
    rerun()
    os.utime(clips / "videos" / "02.mp4", (1, 1))
    counts = rerun()
    assert counts["videos"] == 1 and counts["prompts"] == []


CHANGES = {
    "height": {"height": 48},
    "mode": {"video_reshape_mode": "stretch"},
    "random": {"video_reshape_mode": "random"},
    "frames": {"max_num_frames": 5},
    "skip": {"skip_frames_start": 1},
    "skip_end": {"skip_frames_end": 1},
    "sampling": {"frame_sampling": "uniform"},
    "sampling_fps": {"frame_sampling": "fps"},
    "flip": {"random_flip": True},
    "tiling": {"enable_tiling": True},
    "dtype": {"mixed_precision": "bf16"},
}


@SHARED
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_setting_encodes_all_videos(rerun, change):
    rerun()
    assert rerun(**change)["videos"] == 4
    assert rerun(**change)["videos"] == 0


def test_settings_that_change_nothing_encode_nothing(rerun):
    rerun()
    counts = rerun(seed=7, fps=12, rank=2, train_batch_size=1, enable_slicing=True)
    assert counts["videos"] == 0 and counts["prompts"] == []


def test_seed_matters_to_random_crops_only(rerun):
    rerun(video_reshape_mode="random")
    assert rerun(video_reshape_mode="none", seed=1)["videos"] == 4


@SHARED
def test_other_weights_encode_anew(rerun, model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    rerun(pretrained_model_name_or_path=copy)
    os.utime(copy / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
    counts = rerun(pretrained_model_name_or_path=copy)
    assert (counts["videos"], counts["prompts"]) == (4, [])
    os.utime(copy / "text_encoder" / "model.safetensors", (1, 1))
    counts = rerun(pretrained_model_name_or_path=copy)
    assert (counts["videos"], len(counts["prompts"])) == (0, 5)


def test_encoders_and_transformer_are_never_loaded_together(script, run, clips, monkeypatch):
    """Counted by what is alive: T5, VAE and transformer take turns."""
    import gc

    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    kinds = (T5EncoderModel, AutoencoderKLCogVideoX, CogVideoXTransformer3DModel)
    gc.collect()
    known = {id(thing) for thing in gc.get_objects() if isinstance(thing, kinds)}

    def alive() -> list[str]:
        gc.collect()
        return [type(x).__name__ for x in gc.get_objects() if isinstance(x, kinds) and id(x) not in known]

    seen = {}
    encode_video, load_transformer = script.encode_video, script.load_transformer

    def spy_encode_video(*args):
        seen["videos"] = alive()
        return encode_video(*args)

    def spy_load_transformer(*args):
        seen["before transformer"] = alive()
        return load_transformer(*args)

    monkeypatch.setattr(script, "encode_video", spy_encode_video)
    monkeypatch.setattr(script, "load_transformer", spy_load_transformer)
    run(instance_data_root=clips, precompute_dir=None)
    assert seen == {"videos": ["AutoencoderKLCogVideoX"], "before transformer": []}


def test_the_scripts_may_share_a_folder(t2v, i2v, models, clips, tmp_path):
    """Even where their models have one VAE: what they need of a clip is not the same."""
    for script, kind in ((t2v, "t2v"), (i2v, "i2v"), (t2v, "t2v")):
        reset_accelerate()
        folder = tmp_path / kind
        if not folder.exists():
            shutil.copytree(models[kind], folder)
            shutil.rmtree(folder / "vae")
            (folder / "vae").symlink_to(models["t2v"] / "vae")
        words = f"--instance_data_root {clips} --caption_column prompts.txt --video_column videos.txt --height 64 "
        words += f"--width 96 --max_num_frames 9 --rank 2 --max_train_steps 1 --output_dir {tmp_path / 'output'}"
        script.main(script.get_args(["--pretrained_model_name_or_path", str(folder), *words.split()]))
    sizes = [len(load_file(path)) for path in (clips / ".cogvideox_precomputed" / "videos").iterdir()]
    assert sorted(sizes) == [1] * 4 + [2] * 4


def save_half_of_the_third_video(script) -> None:
    """Write two videos, then half of the third one, and say so."""
    save_file, written = script.save_file, []

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if "moments" in tensors:
            written.append(path)
            if len(written) == 3:
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2])
                print("NOW", flush=True)
                time.sleep(60)

    script.save_file = save


def test_killed_precompute_leaves_whole_files_and_goes_on(launch, rerun, clips):
    """SIGKILL while the third video's file is half written."""
    child = launch(
        instance_data_root=clips, precompute_dir=None, max_train_steps=1, prepare=save_half_of_the_third_video
    )
    child.wait_for(lambda: "NOW" in child.said())
    child.process.kill()
    assert child.wait() == -signal.SIGKILL
    folder = clips / ".cogvideox_precomputed" / "videos"
    whole = list(folder.glob("*.safetensors"))
    assert len(whole) == 2 and len(list(folder.iterdir())) == 3
    assert all(load_file(path)["moments"].shape == (8, 3, 8, 12) for path in whole)
    counts = rerun()
    assert counts["videos"] == 2 and counts["prompts"] == []
    assert len(list(folder.iterdir())) == 4  # what the killed run left is gone


def test_stored_files_hold_what_training_needs(rerun, clips):
    rerun(mixed_precision="bf16", random_flip=True)
    folder = clips / ".cogvideox_precomputed"
    videos = [load_file(path) for path in folder.glob("videos/*")]
    prompts = [load_file(path) for path in folder.glob("prompts/*")]
    assert len(videos) == 8 and {tuple(item["moments"].shape) for item in videos} == {(8, 3, 8, 12)}
    assert {tuple(item["prompt_embeds"].shape) for item in prompts} == {(226, 32)}
    assert {str(x.dtype) for item in videos + prompts for x in item.values()} == {"torch.bfloat16"}
    assert not list(folder.rglob("*.partial"))
