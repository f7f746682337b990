"""Fixtures: the scripts as modules, tiny models and clips, and a way to run a whole training in this process."""

import importlib
import os
import shutil
import sys
from pathlib import Path

# Before the libraries are imported: no network, no GPU, no chatter from forked tokenizers.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(params=["train_cogvideox_lora"])
def script(request):
    """Each training script as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny text-to-video model with rotary positions, as 5B."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "cogvideox-tiny")


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> Path:
    """A tiny text-to-video model with sincos positions, as 2B."""
    return tiny.make_model(tmp_path_factory.mktemp("plain") / "cogvideox-tiny-plain", rotary=False)


@pytest.fixture(scope="session")
def shared_clips(tmp_path_factory) -> Path:
    return tiny.make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def shared_precomputed(tmp_path_factory) -> Path:
    """A precompute folder that tests which are not about precomputing share, to encode the clips once."""
    return tmp_path_factory.mktemp("precomputed")


@pytest.fixture
def clips(shared_clips, tmp_path) -> Path:
    """Clips of this test alone, to be changed at will."""
    return Path(shutil.copytree(shared_clips, tmp_path / "clips"))


@pytest.fixture(autouse=True)
def fresh_process_state(tmp_path, monkeypatch):
    """What a new process would start with: accelerate's singletons, the working folder."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def flags(model, shared_clips, shared_precomputed, tmp_path):
    """The flags of a short run; `flags(rank=2, random_flip=True, seed=None)` adds to them, or leaves out."""

    def make(**changes) -> list[str]:
        values = {
            "pretrained_model_name_or_path": model,
            "instance_data_root": shared_clips,
            "caption_column": "prompts.txt",
            "video_column": "videos.txt",
            "precompute_dir": shared_precomputed,
            "output_dir": tmp_path / "output",
            "height": 64,
            "width": 96,
            "max_num_frames": 9,
            "rank": 4,
            "lora_alpha": 2,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
            "seed": 0,
            "mixed_precision": "no",
        } | changes
        words = []
        for name, value in values.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words += [f"--{name}", str(value)]
        return words

    return make


@pytest.fixture
def run(script, flags):
    """Train in this process; returns the output folder."""

    def train(**changes) -> Path:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        args = script.get_args(flags(**changes))
        script.main(args)
        return Path(args.output_dir)

    return train
