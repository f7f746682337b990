"""Signals, kills, full disks and broken trackers: what was computed is kept, and the run says how to continue."""

import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_training import read_metrics, same_tensors
from tqdm.std import TqdmDefaultWriteLock

ENDLESS = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}


def at_call(owner: type, method: str, number: int, action) -> None:
    """Do `action` at the `number`-th call of a method of a library's class, before it."""
    original, calls = getattr(owner, method), []

    def spy(self, *args, **keywords):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(self, *args, **keywords)

    setattr(owner, method, spy)


def signal_at_step_3(*numbers):
    """Sends the process these signals while it computes its third step."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    return lambda _script: at_call(CogVideoXTransformer3DModel, "forward", 3, send)


def checkpoints(output: Path) -> list[str]:
    """Names of the complete checkpoints."""
    return sorted(path.parent.name for path in output.glob("checkpoint-*/training_state.json"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_writes_a_checkpoint(script, launch, run, tmp_path, number, code):
    """Trackers keep what was logged before."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "output"
    child = launch(prepare=signal_at_step_3(number), report_to="tensorboard", tracker_name="t", **ENDLESS)
    assert child.wait() == code
    hint = "To continue, give the same command with --resume_from_checkpoint latest."
    assert f"{script.__name__}.py: stopped by {number.name} after step 3. {hint}" in child.said()
    assert "Traceback" not in child.said() and "error:" not in child.said()
    name, again = ("Ctrl-C", "press again") if number == signal.SIGINT else ("SIGTERM", "a second one")
    log = (output / "train.log").read_text()
    for said in (child.said(), log):
        assert re.search(f"INFO {name}: finishing step 3, then saving; {again}", said), said
    assert f"INFO stopped by {number.name}" in log and "ERROR" not in log  # what the user asked for is no error
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3] and checkpoints(output) == ["checkpoint-3"]
    assert not (output / script.LORA_FILE).exists() and not list(output.glob(".*.partial"))
    events = EventAccumulator(str(output / "logs" / "t")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    run(max_train_steps=4, resume_from_checkpoint="latest")
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3, 4]


def test_signal_to_the_group_leaves_the_loading_workers_running(launch, tmp_path):
    """Terminals and schedulers signal the process group; the workers' batches are needed for the step."""
    child = launch(dataloader_num_workers=2, **ENDLESS)
    metrics = tmp_path / "output" / "metrics.jsonl"
    child.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait() == 143 and "Traceback" not in child.said()
    assert checkpoints(tmp_path / "output") == [f"checkpoint-{read_metrics(tmp_path / 'output')[-1]['step']}"]


def test_two_processes_signalled_as_a_group(launch, tmp_path):
    """All at once, and again at once, as launchers pass on what they get."""
    children = launch(2, **ENDLESS)
    metrics = tmp_path / "output" / "metrics.jsonl"
    children[0].wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    for child in children + children:
        os.killpg(child.pid, signal.SIGTERM)
    assert [child.wait() for child in children] == [143, 143]
    assert sum(child.said().count("stopped by SIGTERM") for child in children) == 1  # one line, of one process
    assert checkpoints(tmp_path / "output") == [f"checkpoint-{read_metrics(tmp_path / 'output')[-1]['step']}"]


def test_signal_within_a_second_is_the_same_one(launch, tmp_path):
    """The group's signal and the one that a launcher passes on."""
    assert launch(prepare=signal_at_step_3(signal.SIGTERM, signal.SIGTERM), **ENDLESS).wait() == 143
    assert checkpoints(tmp_path / "output") == ["checkpoint-3"]


def test_second_signal_ends_at_once(launch, tmp_path):
    def prepare(_script):
        signal_at_step_3(signal.SIGTERM)(_script)
        at_call(Accelerator, "save_state", 1, lambda: time.sleep(1.1) or os.kill(os.getpid(), signal.SIGTERM))

    assert launch(prepare=prepare, **ENDLESS).wait(40) == 143
    assert checkpoints(tmp_path / "output") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_while_encoding_keeps_what_is_encoded(launch, clips, number, code):
    settings = {"instance_data_root": clips, "precompute_dir": None, "dataloader_num_workers": 2}
    send = lambda: os.kill(os.getpid(), number)  # noqa: E731
    child = launch(prepare=lambda _: at_call(AutoencoderKLCogVideoX, "encode", 3, send), **settings)
    assert child.wait() == code and "Traceback" not in child.said()
    if number == signal.SIGINT:
        assert "interrupted; what is encoded is kept" in child.said()
    names = [path.name for path in (clips / ".cogvideox_precomputed" / "videos").iterdir()]
    assert len(names) == 2 and all(name.endswith(".safetensors") and name[0] != "." for name in names)


def test_signal_while_sampling_ends_the_sampling(launch, tmp_path):
    """The step after it, here the first one, is the last, since other processes may already compute it."""
    validation = {"validation_prompt": "a red square", "validation_steps": 2, "num_inference_steps": 500}
    send = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    child = launch(prepare=lambda _: at_call(CogVideoXDPMScheduler, "step", 2, send), **validation, **ENDLESS)
    assert child.wait(60) == 143
    assert "INFO Validation ends: a signal asks the run to stop" in child.said()
    assert "Traceback" not in child.said() and "ERROR" not in child.said()
    assert checkpoints(tmp_path / "output") == ["checkpoint-1"]
    assert list((tmp_path / "output" / "validation").glob("*")) == []


def test_a_decoder_killed_while_it_holds_the_lock_of_the_bars(script, run, clips, monkeypatch):
    """tqdm's own lock is a semaphore that forked processes share: one that is killed with it would keep it."""

    def lock_and_die(*_):
        script.tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(script.tqdm, "_lock", TqdmDefaultWriteLock(), raising=False)
    script.set_up_logging()
    monkeypatch.setattr(script, "open_clip", lock_and_die)
    with pytest.raises(script.RunError, match="4 of 4 videos cannot be decoded(.|\n)*the decoder crashed on it"):
        run(instance_data_root=clips, precompute_dir=None)


KILLED = {"max_train_steps": 12, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "random_flip": True}


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_random_times_and_resumed(script, launch, run, clips, tmp_path, kills):
    """SIGKILL during encoding, loading, training, writing and pruning. Each start has `latest`, and the run ends with
    the weights of a run never killed."""
    settings = KILLED | {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 2 * kills}
    never_killed = run(output_dir=tmp_path / "never", **settings)
    draw = random.Random(kills)
    phases = set()
    for number in range(kills):
        if number % 5 == 0:  # so that encoding is killed too
            shutil.rmtree(clips / ".cogvideox_precomputed")
        child = launch(output_dir=tmp_path / "killed", resume_from_checkpoint="latest", **settings)
        said = ("/prompts:", "/videos:", "Steps:", "Saved")[(number + draw.randrange(2)) % 4]
        child.wait_for(lambda said=said, child=child: said in child.said() or not child.process.is_alive())
        time.sleep(draw.random() / 4)
        phases.add(said if child.process.is_alive() else "ended")
        child.process.kill()
        child.wait()
        assert "Traceback" not in child.said(), child.said()[-3000:]
    child = launch(output_dir=tmp_path / "killed", resume_from_checkpoint="latest", **settings)
    assert child.wait() == 0, child.said()[-3000:]
    assert len(phases) > 1
    assert same_tensors(*(load_file(output / script.LORA_FILE) for output in (never_killed, tmp_path / "killed")))
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if "checkpoint" in path.name)
    assert left == sorted(f"checkpoint-{step}" for step in (2 * kills - 1, 2 * kills))


def limit_files(size: int) -> None:
    """The kernel refuses to write more into a file, as a full disk would. -1: no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited_again(monkeypatch):
    """Puts back what at_call changes, and lifts the limit."""
    for owner, method in (
        (CogVideoXTransformer3DModel, "forward"), (AutoencoderKLCogVideoX, "encode"), (TensorBoardTracker, "finish"),
        (TensorBoardTracker, "log_images"), (Accelerator, "log"), (ModelCard, "save"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, method, getattr(owner, method))
    yield
    limit_files(-1)


@pytest.mark.usefixtures("unlimited_again")
@pytest.mark.parametrize("size", [100, 13_000, 20_000])  # the LoRA, the random states, the optimizer do not fit
def test_full_disk_at_a_checkpoint(script, run, caplog, size):
    at_call(CogVideoXTransformer3DModel, "forward", 2, lambda: limit_files(size))
    at_call(CogVideoXTransformer3DModel, "forward", 3, lambda: limit_files(-1))
    output = run(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2)
    assert f"Writing {output / 'checkpoint-2'} failed; training does not depend on it" in caplog.text
    assert checkpoints(output) == ["checkpoint-1", "checkpoint-3"] and not (output / "checkpoint-2").exists()
    assert (output / script.LORA_FILE).is_file() and not list(output.glob(".*.partial"))


@pytest.mark.usefixtures("unlimited_again")
def test_full_disk_at_a_precomputed_file(script, run, clips):
    at_call(AutoencoderKLCogVideoX, "encode", 1, lambda: limit_files(100))
    with pytest.raises(script.RunError, match=r"videos/\w+\.2\.safetensors cannot be written: ") as error:
        run(instance_data_root=clips, precompute_dir=None)
    assert error.value.exit_code == 2 and "--precompute_dir" in str(error.value)
    assert list((clips / ".cogvideox_precomputed" / "videos").iterdir()) == []


def test_full_disk_at_the_lora(script, run, monkeypatch, tmp_path):
    save, calls = script.PIPELINE.save_lora_weights, []

    def full_at_the_second(*args, **keywords):
        calls.append(None)
        if len(calls) == 2:  # the first is the checkpoint's
            raise OSError(28, "No space left on device")
        save(*args, **keywords)

    monkeypatch.setattr(script.PIPELINE, "save_lora_weights", full_at_the_second)
    with pytest.raises(script.RunError, match=f"output/{script.LORA_FILE} cannot be written") as error:
        run(max_train_steps=2)
    assert error.value.exit_code == 1 and checkpoints(tmp_path / "output") == ["checkpoint-2"]


@pytest.mark.usefixtures("unlimited_again")
def test_metrics_that_cannot_be_written(script, run, caplog, tmp_path):
    metrics = tmp_path / "output" / "metrics.jsonl"
    at_call(CogVideoXTransformer3DModel, "forward", 1, lambda: metrics.unlink() or metrics.mkdir())
    output = run(max_train_steps=3)
    assert (output / script.LORA_FILE).is_file()
    assert caplog.text.count("Writing metrics.jsonl failed; training does not depend on it") == 1


@pytest.mark.usefixtures("unlimited_again")
def test_trackers_that_raise(script, run, monkeypatch, caplog):
    """At logging, at showing a video, at closing: each is logged, and the run ends well."""

    def fail(*_, **__):
        raise ConnectionError("the tracker is down")

    for owner, method in ((Accelerator, "log"), (TensorBoardTracker, "log_images"), (TensorBoardTracker, "finish")):
        monkeypatch.setattr(owner, method, fail)
    output = run(report_to="tensorboard", validation_prompt="a red square", num_inference_steps=1, max_train_steps=3)
    assert (output / script.LORA_FILE).is_file() and len(list((output / "validation").iterdir())) == 2
    assert len(read_metrics(output)) == 3
    for what in ("Logging to the trackers", "Showing videos in the trackers", "Closing tensorboard"):
        failed = f"{what} failed; training does not depend on it: ConnectionError: the tracker is down"
        assert caplog.text.count(failed) == 1


def test_card_that_cannot_be_written(script, run, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(ModelCard, "save", fail)
    assert (run() / script.LORA_FILE).is_file()
    assert "Writing the model card failed" in caplog.text


def test_out_of_memory_leaves_a_checkpoint_of_the_last_complete_step(script, launch, run, tmp_path):
    """What resumes from it is the run that did not fail, to the bit. Loading workers do not delay the end."""

    def fail() -> None:
        raise torch.OutOfMemoryError("no memory for this step")

    settings = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    prepare = lambda _: at_call(Accelerator, "backward", 6, fail)  # noqa: E731  (the second half of the third step)
    child = launch(prepare=prepare, dataloader_num_workers=2, **settings)
    assert child.wait(60) == 6
    assert "too little memory: no memory for this step" in child.said() and "Traceback" not in child.said()
    assert checkpoints(tmp_path / "output") == ["checkpoint-2"]
    assert "To continue, give the same command with --resume_from_checkpoint latest." in child.said()
    resumed = run(resume_from_checkpoint="latest", **settings)
    never_failed = run(output_dir=tmp_path / "never", **settings)
    assert same_tensors(load_file(resumed / script.LORA_FILE), load_file(never_failed / script.LORA_FILE))


def test_error_in_the_optimizer_leaves_no_checkpoint(launch, tmp_path):
    """The weights may then be of no step."""

    def fail() -> None:
        raise ZeroDivisionError("a fault in the optimizer")

    child = launch(prepare=lambda _: at_call(torch.optim.Adam, "step", 3, fail), max_train_steps=4)
    assert child.wait(60) == 1 and "a fault in the optimizer" in child.said()
    assert checkpoints(tmp_path / "output") == []
