"""Fixtures: the scripts as modules, tiny models and clips, and a way to run a whole training in this process."""

import atexit
import gc
import importlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Before the libraries are imported: no network, no GPU, no chatter from forked tokenizers, no more threads than cores.
os.environ |= {
    "OMP_NUM_THREADS": "1" if "PYTEST_XDIST_WORKER" in os.environ else "2",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from hub import Hub  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

SCRIPTS = {"train_cogvideox_lora": "t2v", "train_cogvideox_image_to_video_lora": "i2v"}
# For what the two scripts have word for word, where a test takes long: tests/test_shared_code.py says that they do.
SHARED = pytest.mark.parametrize("script", ["train_cogvideox_lora"], ids=["t2v"], indirect=True)

# Each process's own: tqdm's is a semaphore that forked ones share, and a killed one would keep it for ever.
tqdm.set_lock(threading.RLock())

# A run collects garbage after each encoder: to look through all objects of the libraries takes 0.4 s each time, and
# touching them in a forked process copies the memory that they share.
for name in SCRIPTS:
    importlib.import_module(name)
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-slow"))


@pytest.fixture(params=SCRIPTS, ids=SCRIPTS.values())
def script(request):
    """Each training script as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def t2v():
    return importlib.import_module("train_cogvideox_lora")


@pytest.fixture
def i2v():
    return importlib.import_module("train_cogvideox_image_to_video_lora")


@pytest.fixture
def kind(script) -> str:
    """t2v or i2v, as the script in hand."""
    return SCRIPTS[script.__name__]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each kind that the tests train: 5B (rotary positions), 2B (sincos), I2V of any size, 5B-I2V."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "t2v": tiny.make_model(folder / "cogvideox-tiny"),
        "t2v sincos": tiny.make_model(folder / "cogvideox-tiny-plain", rotary=False),
        "i2v": tiny.make_model(folder / "cogvideox-tiny-i2v", "i2v"),
        "i2v learned": tiny.make_model(
            folder / "cogvideox-tiny-i2v-learned", "i2v", use_learned_positional_embeddings=True
        ),
    }


@pytest.fixture
def model(models, kind) -> Path:
    """The tiny model that the script in hand trains, of any size."""
    return models[kind]


@pytest.fixture(scope="session")
def start_images(tmp_path_factory) -> list[Path]:
    """First frames to validate with, of the tests' size."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{color}.png" for color in tiny.COLORS]
    for path in paths:
        Image.fromarray(tiny.moving_square(1, 64, 96, tiny.COLORS[path.stem])[0]).save(path)
    return paths


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


def reset_accelerate() -> None:
    """Its singletons as in a new process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_process_state(tmp_path, monkeypatch):
    """What a new process would start with: accelerate's singletons, a working folder, Python's signal handlers."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset_accelerate()


@pytest.fixture
def flags(kind, model, shared_clips, shared_precomputed, start_images, tmp_path):
    """The flags of a short run; `flags(rank=2, random_flip=True, seed=None)` adds to them, or leaves out.

    For image-to-video, validation prompts without images get some.
    """

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
        if kind == "i2v" and values.get("validation_prompt"):
            prompts = values["validation_prompt"].split(":::")
            values.setdefault("validation_images", ":::".join(str(path) for path in start_images[: len(prompts)]))
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
        reset_accelerate()
        args = script.get_args(flags(**changes))
        script.main(args)
        return Path(args.output_dir)

    return train


@pytest.fixture
def hub(script, monkeypatch):
    """A Hub of its own for this process, reached by Git LFS. It refuses what comes without its token."""
    server = Hub()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(script, "UPLOAD_WAITS", (0, 0, 0))
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    huggingface_hub.utils.close_session()
    yield server
    server.close()
    huggingface_hub.utils.close_session()


def child_main(script, words: list[str], log: Path, environment: dict[str, str], prepare: Callable | None) -> None:
    os.environ.update(environment)
    os.setpgrp()  # a process group of its own, with its workers, as a shell gives it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    logging.root.handlers.clear()  # pytest's
    torch.set_num_threads(1)  # the threads of the process that this one was forked from are not here
    reset_accelerate()
    sys.argv = [f"{script.__name__}.py", *words]
    if prepare is not None:
        prepare(script)
    script.command_line()


class Child:
    """The script's command line in a process of its own, forked from this one: the libraries are loaded already."""

    def __init__(self, script, words, log: Path, environment: dict | None = None, prepare: Callable | None = None):
        self.log = log
        log.touch()
        arguments = (script, words, log, environment or {}, prepare)
        self.process = multiprocessing.get_context("fork").Process(target=child_main, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, negative where a signal ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running:\n{self.said()[-3000:]}"
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.is_alive(), self.said()[-3000:]
            time.sleep(0.005)


@pytest.fixture
def launch(script, flags, tmp_path):
    """Start a run as a process: `launch(prepare=..., **flags)`; with `processes=2` a list of two, joined by gloo, that
    take themselves, with `machines=2`, for the only process of their machine."""
    started = []

    def start(
        processes: int = 1, prepare: Callable | None = None, machines: int = 1, environment: dict | None = None,
        **changes,
    ):  # fmt: skip
        words, port = flags(**changes), str(20000 + (os.getpid() * 97 + len(started)) % 20000)
        children, on_one, common = [], processes // machines, environment or {}
        for rank in range(processes):
            environment = common
            if processes > 1 or common:
                environment = common | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank % on_one), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(on_one), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                }  # fmt: skip
            log = tmp_path / f"log-{len(started)}"
            children.append(Child(script, words, log, environment, prepare))
            started.append(children[-1])
        return children if processes > 1 else children[0]

    yield start
    for child in started:
        child.process.kill()
        child.process.join()
