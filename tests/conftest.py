"""Fixtures: the scripts as modules, tiny models and clips, and a way to run a whole training in this process."""

import atexit
import functools
import gc
import importlib
import itertools
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
# A shell starts a job in the background with SIGINT ignored, nohup one with SIGHUP, and programs inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "demo", "tests", "tools", "benchmarks")]

import pytest  # noqa: E402

SCRIPTS = {"train_cogvideox_lora": "t2v", "train_cogvideox_image_to_video_lora": "i2v"}
# What the two scripts share is one text (tests/test_shared_code.py), so most tests run the text-to-video script alone.
BOTH = pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPTS.values(), indirect=True)
ONLY_I2V = pytest.mark.parametrize("script", ["train_cogvideox_image_to_video_lora"], ids=["i2v"], indirect=True)

# With `pytest -n`, the process that only hands out the tests needs none of the libraries, which take 14 s to import.
if "PYTEST_XDIST_WORKER" in os.environ or not any(word.startswith("-n") for word in sys.argv):
    import diffusers
    import huggingface_hub
    import tiny
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from huggingface_hub import constants
    from PIL import Image
    from tqdm import tqdm

    # tqdm's own lock is a semaphore that forked processes share: one that is killed could keep it.
    tqdm.set_lock(threading.RLock())

    # A run collects garbage after each encoder. Without this, each collection takes 0.4 s for the libraries' objects,
    # and copies them in a forked process.
    for name in SCRIPTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups after it
def pytest_collection_modifyitems(config, items):
    """Tests that share a slow fixture run in one process. The longest tests start first."""
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-slow"))
        for name in {"finished", "deepspeed", "pretrained", "two_lengths", "many"} & set(item.fixturenames):
            script = getattr(item, "callspec", None) and item.callspec.params.get("script")
            item.add_marker(pytest.mark.xdist_group(f"{name} {script or 'train_cogvideox_lora'}"))
    items.sort(key=lambda item: "long" not in item.keywords)


@pytest.fixture
def script(request):
    """A training script as a module: text-to-video, or those that BOTH or ONLY_I2V name."""
    return importlib.import_module(getattr(request, "param", "train_cogvideox_lora"))


@pytest.fixture
def kind(script) -> str:
    """t2v or i2v: which script the test runs."""
    return SCRIPTS[script.__name__]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each kind that the tests train: 5B (rotary positions), 2B (sincos), I2V of any size, 5B-I2V, and
    both of 1.5."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "t2v": tiny.make_model(folder / "cogvideox-tiny"),
        "t2v sincos": tiny.make_model(folder / "cogvideox-tiny-plain", rotary=False),
        "i2v": tiny.make_model(folder / "cogvideox-tiny-i2v", "i2v"),
        "i2v learned": tiny.make_model(
            folder / "cogvideox-tiny-i2v-learned", "i2v", use_learned_positional_embeddings=True
        ),
        "t2v 1.5": tiny.make_model(folder / "cogvideox-1.5-tiny", version="1.5"),
        "i2v 1.5": tiny.make_model(folder / "cogvideox-1.5-tiny-i2v", "i2v", version="1.5"),
    }


@pytest.fixture
def model(models, kind) -> Path:
    """The tiny model that the script trains, of any size."""
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
    """What a new process would start with: accelerate's singletons, a working folder, handlers of signals and logs."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in SCRIPTS:  # the log file of a run
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    reset_accelerate()
    # What is alive now (a library that the test imported) costs the collections of the next tests no more time.
    gc.collect()
    gc.freeze()


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
        return word_list(values)

    return make


@pytest.fixture
def run(script, flags, tmp_path):
    """Train in this process; returns the output folder, a new one for each run that names none and resumes none."""
    numbers = itertools.count(1)

    def train(**changes) -> Path:
        reset_accelerate()
        is_new = not changes.keys() & {"output_dir", "resume_from_checkpoint"}
        if is_new and (tmp_path / "output").exists():
            changes["output_dir"] = tmp_path / f"output-{next(numbers)}"
        args = script.get_args(flags(**changes))
        script.main(args)
        return Path(args.output_dir)

    return train


def run_on_the_cpu(code: str, monkeypatch) -> None:
    """Run code that samples, which is written for a GPU."""
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: pipe.to("cpu"))
    assert "pipe.enable_model_cpu_offload()" in code
    exec(compile(code.replace('Generator("cuda")', 'Generator("cpu")'), "code", "exec"), {})


def word_list(values: dict) -> list[str]:
    """A command line's words; True is a flag without a value, None and False leave it out."""
    words = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *value]
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


FINISHED = {  # the run of the fixture `finished`: steps, checkpoints, videos, all that a run can leave
    "max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2, "num_inference_steps": 2, "fps": 12,
    "validation_prompt": "TOK a red square:::TOK a blue square", "id_token": "TOK", "train_batch_size": 1,
    "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "report_to": "tensorboard",
    "num_validation_videos": 2, "random_flip": True, "learning_rate": 1e-3, "rank": 4, "lora_alpha": 2, "seed": 7,
    "height": 64, "width": 96, "max_num_frames": 9, "mixed_precision": "no", "caption_column": "prompts.txt",
    "video_column": "videos.txt",
}  # fmt: skip


@functools.cache
def finished_run(name: str, model: Path, clips: Path, images: str | None, folder: Path) -> Path:
    module = importlib.import_module(name)
    places = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": folder / "output"}
    places |= {"precompute_dir": folder / "precomputed", "validation_images": images}
    reset_accelerate()
    module.main(module.get_args(word_list(FINISHED | places)))
    return folder


@pytest.fixture
def finished(script, kind, model, shared_clips, start_images, finished_folder) -> Path:
    """A folder with a finished run of FINISHED: output/ and precomputed/. It is made once a script: read it only."""
    images = ":::".join(map(str, start_images[:2])) if kind == "i2v" else None
    return finished_run(script.__name__, model, shared_clips, images, finished_folder / kind)


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def hub(monkeypatch):
    """A Hub of its own for this process, reached by Git LFS. It refuses what comes without its token."""
    from hub import Hub

    server = Hub()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    huggingface_hub.utils.close_session()
    yield server
    server.close()
    huggingface_hub.utils.close_session()


@pytest.fixture(scope="module")
def chromium():
    """A real browser. Without one, tests of pages are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not (program := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


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
        words, port = flags(**changes), str(20000 + (os.getpid() * 97 + len(started)) % 12000)
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
