"""An incomplete model is one message with exit code 2, before anything is encoded."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import BOTH
from diffusers import CogVideoXTransformer3DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def refuse(script, run, clips):
    """Run, and expect one message before anything is encoded; returns it."""

    def refuse(model, **changes) -> str:
        script.model_folder.cache_clear()
        with pytest.raises(script.RunError) as error:
            run(pretrained_model_name_or_path=model, instance_data_root=clips, precompute_dir=None, **changes)
        assert error.value.exit_code == 2 and not (clips / ".cogvideox_precomputed").exists()
        assert not Path("output").exists()
        return str(error.value)

    return refuse


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 11\n"
DAMAGES = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is truncated or damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated or damaged"),
    "pointer": (lambda path: path.write_bytes(POINTER), "is a git-lfs pointer in place of the file: run git lfs pull"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_of_each_component(refuse, copied, damage):
    """All of them in one message."""
    spoil, said = DAMAGES[damage]
    names = [f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"]
    for name in names:
        spoil(copied / name)
    message = refuse(copied)
    assert message.startswith(f"--pretrained_model_name_or_path {copied} is incomplete:\n")
    for name in names:
        assert f"  - {name} {said}" in message


@BOTH
def test_parts_without_weights(refuse, copied):
    (copied / "scheduler" / "scheduler_config.json").unlink()
    (copied / "tokenizer" / "spiece.model").unlink()
    message = refuse(copied)
    assert "  - scheduler/scheduler_config.json is missing\n  - tokenizer/spiece.model is missing" in message


@pytest.fixture
def sharded(copied) -> Path:
    """Its transformer has two files and an index."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(copied, subfolder="transformer")
    (copied / "transformer" / WEIGHTS).unlink()
    transformer.save_pretrained(copied / "transformer", max_shard_size="100KB")
    assert len(list((copied / "transformer").glob("*-of-*.safetensors"))) > 1
    return copied


def test_a_shard_that_is_missing(refuse, run, sharded, tmp_path):
    assert list(run(pretrained_model_name_or_path=sharded, precompute_dir=tmp_path / "pre").glob("*.safetensors"))
    first = sorted((sharded / "transformer").glob("*-of-*.safetensors"))[0]
    first.unlink()
    shutil.rmtree("output")
    assert f"  - transformer/{first.name} is missing" in refuse(sharded)
    (sharded / "transformer" / f"{WEIGHTS}.index.json").write_text('{"weight')
    assert f"  - transformer/{WEIGHTS}.index.json is damaged" in refuse(sharded)


def test_a_variant_that_some_components_have(run, copied, refuse, tmp_path):
    for name in (f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}"):
        (copied / name).rename((copied / name).with_suffix(".fp16.safetensors"))
    assert f"  - transformer/{WEIGHTS} is missing" in refuse(copied)
    output = run(pretrained_model_name_or_path=copied, variant="fp16", precompute_dir=tmp_path / "pre")
    assert list(output.glob("*.safetensors"))
    shutil.rmtree("output")
    assert "  - no file is of --variant bf16" in refuse(copied, variant="bf16")


def test_paths_that_are_no_model(refuse, copied, tmp_path):
    for path in ("/no/such/folder", "./nowhere", "../nowhere", "a/b/c"):
        assert f"  - --pretrained_model_name_or_path {path}: there is no such folder" in refuse(path)
    part = copied / "transformer"
    assert refuse(part) == f"--pretrained_model_name_or_path {part} is one part of a model: give {copied}"
    cache = tmp_path / "hub" / "models--THUDM--CogVideoX-2b"
    snapshot = cache / "snapshots" / "1137dacf"
    snapshot.mkdir(parents=True)
    assert refuse(cache).endswith(f"is a folder of the Hub's cache: give its snapshot, {snapshot}")


def test_a_model_on_the_hub_while_offline(refuse):
    message = refuse("nobody/nothing")
    assert "nobody/nothing is no diffusers-format model" in message
    assert message.endswith("(HF_HUB_OFFLINE is set, so it must be in the Hub's cache)")


def test_a_model_on_the_hub_is_downloaded_before_anything_is_encoded(script, refuse, copied, monkeypatch):
    """What is missing there is told, too."""
    asked = []

    def download(name, **keywords):
        asked.append((name, keywords))
        return str(copied)

    def read_config(_args, subfolder):
        return json.loads((copied / subfolder / "config.json").read_text()), "commit"

    monkeypatch.setattr(script.DiffusionPipeline, "download", download)
    monkeypatch.setattr(script, "read_config", read_config)
    (copied / "transformer" / WEIGHTS).unlink()
    message = refuse("someone/model", revision="v7")
    assert message.startswith("--pretrained_model_name_or_path someone/model is incomplete:\n  - transformer/")
    assert asked == [("someone/model", {"revision": "v7", "variant": None})]


def test_weights_of_another_model_are_one_message(script, run, copied, tmp_path):
    """Found when they are loaded."""
    other = tiny.make_model(tmp_path / "other", num_layers=1, attention_head_dim=32)
    shutil.copy(other / "transformer" / WEIGHTS, copied / "transformer")
    with pytest.raises(script.RunError, match="its transformer cannot be loaded"):
        run(pretrained_model_name_or_path=copied, precompute_dir=tmp_path / "pre")
