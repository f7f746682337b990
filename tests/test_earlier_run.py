"""A run that an earlier state of the script wrote is continued to the bit, and its LoRA is read, by every later state.

tests/earlier_run.zip was written by commit 0f696be, by running this file: a tiny model, clips (pictures, which every
decoder reads alike), the flags, the output folder of a run of four steps with a checkpoint after each second one, and
what this machine's arithmetic gave. It is never written again: files of users do not change either.
"""

import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

ARCHIVE = Path(__file__).parent / "earlier_run.zip"
FLAGS = {
    "caption_column": "prompts.txt", "video_column": "videos.txt", "height": 64, "width": 96, "max_num_frames": 9,
    "rank": 4, "lora_alpha": 2, "optimizer": "adamw", "learning_rate": 1e-2, "lr_scheduler": "cosine",
    "lr_warmup_steps": 1, "train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "random_flip": True,
    "caption_dropout": 0.3, "seed": 7, "mixed_precision": "no", "report_to": None,
}  # fmt: skip


def arithmetic(model: Path) -> str:
    """A hash of what the libraries compute here with this model. Processors and versions of torch differ in the last
    bits; where the hash is that of the archive, nothing but the script can change a bit of a run."""
    torch.manual_seed(0)
    pipe = CogVideoXPipeline.from_pretrained(model)
    latents = pipe.vae.encode(torch.rand(1, 3, 1, 64, 96) * 2 - 1).latent_dist.mode().permute(0, 2, 1, 3, 4)
    embeds, _ = pipe.encode_prompt("a red square", do_classifier_free_guidance=False)
    rotary = pipe._prepare_rotary_positional_embeddings(64, 96, 1, latents.device)
    velocity = pipe.transformer(latents, embeds, torch.tensor([500]), image_rotary_emb=rotary).sample
    velocity.square().mean().backward()
    digest = hashlib.sha256()
    for tensor in (latents, embeds, velocity, pipe.transformer.transformer_blocks[0].attn1.to_q.weight.grad):
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def continued(earlier, run, tmp_path) -> Path:
    """The output folder of the run, continued from step 2 to step 4 by the script as it is now."""
    output = Path(shutil.copytree(earlier / "output", tmp_path / "output"))
    shutil.rmtree(output / "checkpoint-4")
    (output / "pytorch_lora_weights.safetensors").unlink()
    places = {"pretrained_model_name_or_path": earlier / "model", "instance_data_root": earlier / "clips"}
    return run(**FLAGS | places, precompute_dir=tmp_path / "encoded", resume_from_checkpoint="latest")


def test_its_continuation_is_the_same_run(earlier, continued):
    """To the bit where this machine computes as that one did; elsewhere to rounding."""
    is_same_machine = arithmetic(earlier / "model") == (earlier / "arithmetic.txt").read_text()
    tolerance = {"rtol": 0, "atol": 0} if is_same_machine else {"rtol": 1e-3, "atol": 1e-5}
    for name in ("checkpoint-2", "checkpoint-4"):
        found, expected = (
            load_file(output / name / "pytorch_lora_weights.safetensors") for output in (continued, earlier / "output")
        )
        assert found.keys() == expected.keys() and any(tensor.any() for tensor in expected.values())
        for layer, tensor in expected.items():
            torch.testing.assert_close(found[layer], tensor, **tolerance, msg=f"{name}: {layer}")
    states = [
        torch.load(output / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"]
        for output in (continued, earlier / "output")
    ]
    torch.testing.assert_close(*states, **tolerance)
    rows = [
        [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (continued, earlier / "output")
    ]
    for name in ("step", "loss", "lr", "grad_norm"):
        found, expected = ([row[name] for row in each] for each in rows)
        assert len(expected) == 4
        assert found == (expected if is_same_machine else pytest.approx(expected, rel=1e-3)), name


def test_its_lora_is_read_to_start_from(script, earlier, run, tmp_path):
    """With --init_lora: what a run of no learning saves has the strength of what it read."""
    lora = earlier / "output" / "pytorch_lora_weights.safetensors"
    places = {"pretrained_model_name_or_path": earlier / "model", "instance_data_root": earlier / "clips"}
    more = {"init_lora": lora, "rank": None, "lora_alpha": None, "learning_rate": 1e-12, "max_train_steps": 1}
    output = run(**FLAGS | places | more | {"precompute_dir": tmp_path / "encoded"})
    given, saved = (script.open_lora(str(source))[1] for source in (lora, output))
    strengths = [each["lora_alpha"] / each["rank"] for each in (given, saved)]
    before, after = load_file(lora), load_file(output / "pytorch_lora_weights.safetensors")
    assert given["rank"] == saved["rank"] == 4 and before.keys() == after.keys()
    for up in (name for name in before if "lora_B" in name):
        down = up.replace("lora_B", "lora_A")
        expected = strengths[0] * before[up] @ before[down]
        assert expected.any()
        torch.testing.assert_close(strengths[1] * after[up] @ after[down], expected, rtol=1e-5, atol=1e-8)


def make() -> None:
    """Write the archive with the script as it is now."""
    import tempfile

    import tiny
    from conftest import word_list
    from PIL import Image

    import train_cogvideox_lora as script

    folder = Path(tempfile.mkdtemp())
    model, clips = tiny.make_model(folder / "model"), folder / "clips"
    clips.mkdir()
    pictures = {f"{color}.png": tiny.moving_square(1, 64, 96, rgb)[0] for color, rgb in tiny.COLORS.items()}
    pictures["ramp.png"] = np.indices((64, 96, 3)).sum(axis=0).astype(np.uint8)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(clips / name)
    (clips / "prompts.txt").write_text("".join(f"a {name.removesuffix('.png')} square\n" for name in pictures))
    (clips / "videos.txt").write_text("".join(f"{name}\n" for name in pictures))
    places = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": folder / "output"}
    script.main(script.get_args(word_list(FLAGS | places | {"precompute_dir": folder / "encoded"})))
    (folder / "arithmetic.txt").write_text(arithmetic(model))
    names = ["arithmetic.txt", "model/*/*", "model/*.json", "clips/*", "output/checkpoint-*/*"]
    names += ["output/metrics.jsonl", "output/*.safetensors"]
    with zipfile.ZipFile(ARCHIVE, "x", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in (path for pattern in names for path in sorted(folder.glob(pattern)) if path.is_file()):
            archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    root = ARCHIVE.parent.parent
    sys.path[:0] = [str(root), str(root / "demo"), str(root / "tests")]
    torch.set_num_threads(1)
    make()
