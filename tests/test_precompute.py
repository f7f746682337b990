"""Prompts and videos are encoded once, into files. After a change, only what it changes is encoded again."""

import gc
import importlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import BOTH, SCRIPTS, reset_accelerate
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file
from transformers import T5EncoderModel, T5Tokenizer


@pytest.fixture
def encoded(monkeypatch):
    """Counts what the encoders are given, and how often they are loaded."""
    counts = {}
    encode, tokenize = AutoencoderKLCogVideoX.encode, T5Tokenizer.__call__

    def counting_encode(self, pixels):  # [1, C, F, H, W]
        counts["videos" if pixels.shape[2] > 1 else "images"] += 1
        return encode(self, pixels)

    def counting_tokenize(self, prompt, **keywords):
        if "padding" in keywords:
            counts["prompts"] += [prompt] if isinstance(prompt, str) else prompt
        return tokenize(self, prompt, **keywords)

    def counting_load(name, load):
        def from_pretrained(cls, *args, **keywords):
            counts[name] += 1
            return load(cls, *args, **keywords)

        return classmethod(from_pretrained)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "encode", counting_encode)
    monkeypatch.setattr(T5Tokenizer, "__call__", counting_tokenize)
    for name, encoder in (("t5", T5EncoderModel), ("vae", AutoencoderKLCogVideoX)):
        load = encoder.from_pretrained.__func__
        monkeypatch.setattr(encoder, "from_pretrained", counting_load(name, load))

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


@BOTH
def test_second_run_loads_neither_encoder(rerun, kind, clips):
    first = rerun()
    assert (first["t5"], first["vae"], first["videos"], first["images"]) == (1, 1, 4, {"t2v": 0, "i2v": 4}[kind])
    assert sorted(first["prompts"]) == sorted([*(clips / "prompts.txt").read_text().split("\n")[:4], ""])
    second = rerun()
    assert (second["t5"], second["vae"], second["videos"], second["images"], second["prompts"]) == (0, 0, 0, 0, [])
    assert (clips / ".cogvideox_precomputed").is_dir()


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


def test_a_replaced_clip_encodes_one_video_and_a_touched_one_none(rerun, clips):
    rerun()
    os.utime(clips / "videos" / "02.mp4", (1, 1))
    assert rerun()["videos"] == 0
    with (clips / "videos" / "02.mp4").open("ab") as file:
        file.write(bytes(8))  # some other clip
    counts = rerun()
    assert counts["videos"] == 1 and counts["prompts"] == []


@pytest.mark.parametrize("mode", ["center", "random"])
def test_a_moved_or_copied_folder_encodes_nothing_again(rerun, clips, tmp_path, mode):
    """The clips are known by their content, and so is where a random crop is."""
    own = {"precompute_dir": tmp_path / "encoded", "video_reshape_mode": mode, "width": 48}
    assert rerun(**own)["videos"] == 4
    shutil.copytree(clips, tmp_path / "copy", ignore=lambda *_: [".cogvideox_precomputed"])
    clips.rename(tmp_path / "moved")
    for folder in ("copy", "moved"):
        counts = rerun(instance_data_root=tmp_path / folder, **own)
        assert counts["videos"] == 0 and counts["prompts"] == [], folder


def test_older_files_are_counted_and_unfinished_ones_go(rerun, clips, caplog):
    caplog.set_level("INFO")
    rerun()
    assert "may be deleted" not in caplog.text
    folder = clips / ".cogvideox_precomputed" / "videos"
    old, new = folder / ".a.host.1.partial", folder / ".b.host.2.partial"
    for path in (old, new, folder / "0123.safetensors"):
        path.write_bytes(bytes(20_000_000))
    os.utime(old, (1, 1))
    rerun()
    assert f"{folder}: 0.02 GB in 1 files of an older version may be deleted" in caplog.text
    assert not old.exists() and new.exists()  # another run may be writing that one


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


def test_changed_setting_encodes_all_videos(rerun, clips):
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).write_text("".join((clips / name).read_text().splitlines(keepends=True)[:1]))
    rerun()
    for name, change in (CHANGES | {"buckets": {"buckets": ["9x64x96", "5x96x64"]}}).items():
        assert (rerun(**change)["videos"], rerun(**change)["videos"]) == (1, 0), name


def test_settings_that_change_nothing_encode_nothing(rerun):
    rerun()
    counts = rerun(seed=7, fps=12, rank=2, train_batch_size=1, enable_slicing=True)
    assert counts["videos"] == 0 and counts["prompts"] == []


def test_seed_matters_to_random_crops_only(rerun):
    rerun(video_reshape_mode="random")
    assert rerun(video_reshape_mode="none", seed=1)["videos"] == 4


def change_a_weight(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_other_weights_encode_again(rerun, model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    rerun(pretrained_model_name_or_path=copy)
    change_a_weight(copy / "vae" / "diffusion_pytorch_model.safetensors")
    counts = rerun(pretrained_model_name_or_path=copy)
    assert (counts["videos"], counts["prompts"]) == (4, [])
    change_a_weight(copy / "text_encoder" / "model.safetensors")
    counts = rerun(pretrained_model_name_or_path=copy)
    assert (counts["videos"], len(counts["prompts"])) == (0, 5)


def test_encoders_and_transformer_are_never_loaded_together(run, clips, monkeypatch):
    """T5, VAE and transformer are in memory one after the other."""
    kinds = (T5EncoderModel, AutoencoderKLCogVideoX, CogVideoXTransformer3DModel)
    gc.collect()
    known = {id(thing) for thing in gc.get_objects() if isinstance(thing, kinds)}

    def alive() -> list[str]:
        gc.collect()
        return [type(x).__name__ for x in gc.get_objects() if isinstance(x, kinds) and id(x) not in known]

    seen = {}
    encode, load = AutoencoderKLCogVideoX.encode, CogVideoXTransformer3DModel.from_pretrained.__func__

    def spy_encode(*args):
        seen["videos"] = alive()
        return encode(*args)

    def spy_load(*args, **keywords):
        seen["before transformer"] = alive()
        return load(*args, **keywords)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "encode", spy_encode)
    monkeypatch.setattr(CogVideoXTransformer3DModel, "from_pretrained", classmethod(spy_load))
    run(instance_data_root=clips, precompute_dir=None)
    assert seen == {"videos": ["AutoencoderKLCogVideoX"], "before transformer": []}


def test_the_scripts_may_share_a_folder(models, clips, tmp_path):
    """Even if their models have the same VAE: what they need of a clip differs."""
    for number, (name, kind) in enumerate([*SCRIPTS.items(), next(iter(SCRIPTS.items()))]):
        script = importlib.import_module(name)
        reset_accelerate()
        folder = tmp_path / kind
        if not folder.exists():
            shutil.copytree(models[kind], folder)
            shutil.rmtree(folder / "vae")
            (folder / "vae").symlink_to(models["t2v"] / "vae")
        words = f"--instance_data_root {clips} --caption_column prompts.txt --video_column videos.txt --height 64 "
        words += f"--width 96 --max_num_frames 9 --rank 2 --max_train_steps 1 --output_dir {tmp_path}/output-{number}"
        script.main(script.get_args(["--pretrained_model_name_or_path", str(folder), *words.split()]))
    sizes = [len(load_file(path)) for path in (clips / ".cogvideox_precomputed" / "videos").iterdir()]
    assert sorted(sizes) == [2] * 4 + [3] * 4  # moments, kept, and those of the image


def stop_half_way_through_the_third_video(_script) -> None:
    """Writes two videos, then half of the third one, says so, and waits to be killed."""
    fsync, synced = os.fsync, []

    def half(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.parent.name == "videos" and path.name.endswith(".partial"):
            synced.append(path)
            if len(synced) == 3:
                os.truncate(path, path.stat().st_size // 2)
                print("NOW", flush=True)
                time.sleep(60)
        fsync(descriptor)

    os.fsync = half


def test_killed_run_leaves_complete_files_and_the_next_one_encodes_the_rest(launch, rerun, clips):
    """SIGKILL while the third video's file is half written."""
    settings = {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 1}
    child = launch(prepare=stop_half_way_through_the_third_video, **settings)
    child.wait_for(lambda: "NOW" in child.said())
    child.process.kill()
    assert child.wait() == -signal.SIGKILL
    folder = clips / ".cogvideox_precomputed" / "videos"
    complete = list(folder.glob("*.safetensors"))
    assert len(complete) == 2 and len(list(folder.iterdir())) == 3
    assert all(load_file(path)["moments"].shape == (8, 3, 8, 12) for path in complete)
    counts = rerun()
    assert counts["videos"] == 2 and counts["prompts"] == []
    assert len(list(folder.glob("*.safetensors"))) == 4


def test_stored_files_hold_what_training_needs(rerun, clips):
    rerun(mixed_precision="bf16", random_flip=True)
    folder = clips / ".cogvideox_precomputed"
    videos = [load_file(path) for path in folder.glob("videos/*")]
    assert all(item.pop("kept").tolist() == [1, 1] for item in videos)
    prompts = [load_file(path) for path in folder.glob("prompts/*")]
    assert len(videos) == 8 and {tuple(item["moments"].shape) for item in videos} == {(8, 3, 8, 12)}
    assert {tuple(item["prompt_embeds"].shape) for item in prompts} == {(226, 32)}
    assert {str(x.dtype) for item in videos + prompts for x in item.values()} == {"torch.bfloat16"}
    assert not list(folder.rglob("*.partial"))


def test_clips_are_encoded_in_tiles_where_memory_is_short(script, rerun, monkeypatch, caplog):
    """Encoding takes up to 12,000 values a pixel of a frame: 295 MB of 64 x 96 in fp32. What is stored counts as made
    with --enable_tiling, and not as made without. What other programs hold of the card changes nothing."""
    caplog.set_level("INFO")
    monkeypatch.setattr(script, "free_memory", lambda _device: 2**40)
    monkeypatch.setattr(script, "device_memory", lambda _device: script.OTHER_MEMORY + 2**28)
    rerun()
    assert "Clips are encoded in tiles, as with --enable_tiling" in caplog.text
    monkeypatch.setattr(script, "device_memory", lambda _device: script.OTHER_MEMORY + 2**29)
    monkeypatch.setattr(script, "free_memory", lambda _device: 2**20)
    encoded = []
    encode = script.AutoencoderKLCogVideoX.encode
    spy = lambda self, *arguments: encoded.append(self.use_tiling) or encode(self, *arguments)  # noqa: E731
    monkeypatch.setattr(script.AutoencoderKLCogVideoX, "encode", spy)
    rerun(enable_tiling=True)
    assert not encoded
    rerun()
    assert encoded and not any(encoded)


def test_what_torch_keeps_for_later_counts_as_free(script, monkeypatch):
    kept = [2**30]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**31 - sum(kept), 2**31))
    assert script.free_memory(torch.device("cuda")) == 2**31
