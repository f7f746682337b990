"""Write complete CogVideoX models with random weights, and what they can be trained on.

    python benchmarks/make_model.py FOLDER 2b 5b-i2v

writes FOLDER/2b and FOLDER/5b-i2v in the layout of `save_pretrained`, two clips of 49 x 480 x 720 to FOLDER/clips, and
a first frame to FOLDER/start.png. Names of models are those of models.py. Tiny models need a folder of their own, as
they get small clips.

The models differ in their transformers and in the config of the VAE. The weights of the VAE and of the text encoder,
T5-XXL with 2 of its 24 layers, are written to FOLDER/shared once, in bf16, and each model links to them. A model that
is there already is not written again.
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import models
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from PIL import Image
from transformers import T5Config, T5EncoderModel

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))
import tiny  # noqa: E402

TEXT_LAYERS = 2


@contextlib.contextmanager
def new_weights(dtype: torch.dtype) -> Iterator[None]:
    """Models that are made inside have random weights of this dtype, on the GPU if there is one: it is faster."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def write_whole(model: torch.nn.Module, folder: Path) -> None:
    """Save a model or, if the process is stopped meanwhile, nothing that looks like one."""
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_transformer(name: str, folder: Path) -> None:
    """Write the transformer of model `name` to `folder`, unless its weights are there."""
    if any(folder.glob("*.safetensors")):
        return
    with new_weights(getattr(torch, models.dtype_name(name))):
        transformer = CogVideoXTransformer3DModel.from_config(models.transformer_config(name))
    write_whole(transformer, folder)


def write_shared(name: str, folder: Path) -> None:
    """Write folder/vae and folder/text_encoder for model `name`, unless they are there."""
    if not (folder / "vae").is_dir():
        with new_weights(torch.bfloat16):
            vae = AutoencoderKLCogVideoX.from_config(models.vae_config(name))
        write_whole(vae, folder / "vae")
    if not (folder / "text_encoder").is_dir():
        config = models.text_encoder_config(name) | {"num_layers": TEXT_LAYERS}
        with new_weights(torch.bfloat16):
            text_encoder = T5EncoderModel(T5Config(**config))
        write_whole(text_encoder, folder / "text_encoder")


def write_model(name: str, folder: Path, shared: Path) -> Path:
    """Write model `name` to `folder`, unless it is there. The weights of its VAE and text encoder are in `shared`."""
    if (folder / "model_index.json").is_file():
        return folder
    shared = shared.resolve()
    write_shared(name, shared)
    shutil.rmtree(folder, ignore_errors=True)
    models.write_configs(name, folder)
    write_transformer(name, folder / "transformer")
    for weights in (shared / "vae").glob("*.safetensors"):
        (folder / "vae" / weights.name).symlink_to(weights)
    shutil.rmtree(folder / "text_encoder")
    (folder / "text_encoder").symlink_to(shared / "text_encoder")
    tiny.make_tokenizer(folder / "tokenizer")
    tiny.make_scheduler().save_pretrained(folder / "scheduler")
    tiny.write_index(folder, "i2v" if name.endswith("i2v") else "t2v")  # last: it says that the model is complete
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", choices=models.NAMES, metavar="model")
    args = parser.parse_args(argv)
    for name in args.models:
        started = time.perf_counter()
        write_model(name, args.folder / name, args.folder / "shared")
        print(f"{name}: written in {time.perf_counter() - started:.0f} s", flush=True)
    frames, height, width = models.clip_size("tiny-5b" if models.is_tiny(args.models[0]) else "5b")
    tiny.make_clips(args.folder / "clips", 2, frames, height, width)
    Image.new("RGB", (width, height), "red").save(args.folder / "start.png")


if __name__ == "__main__":
    main()
