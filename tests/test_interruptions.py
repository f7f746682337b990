"""Signals, kills, full disks and broken trackers: what was computed stays, and the run says how to go on."""

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
from conftest import SHARED
from safetensors.torch import load_file
from test_training import read_metrics, same_tensors
from tqdm.std import TqdmDefaultWriteLock

ENDLESS = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}


def signal_at_the_third_loss(number):
    """Makes a run that is told to stop while it computes its third step."""

    def prepare(script):
        diffusion_loss, calls = script.diffusion_loss, []

        def loss(*args):
            calls.append(None)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return diffusion_loss(*args)

        script.diffusion_loss = loss

    return prepare


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_writes_a_checkpoint(script, launch, run, tmp_path, number, code):
    output = tmp_path / "output"
    child = launch(prepare=signal_at_the_third_loss(number), **ENDLESS)
    assert child.wait() == code
    said = child.said()
    how = "after step 3. To go on, give the same command with --resume_from_checkpoint latest (checkpoint-3)"
    assert f"{script.__name__}.py: stopped by {number.name} {how}" in said
    assert "Traceback" not in said and "error:" not in said
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3]
    assert [folder.name for folder in script.list_checkpoints(output)] == ["checkpoint-3"]
    assert not (output / script.LORA_FILE).exists() and not list(output.glob(".*"))
    run(max_train_steps=4, resume_from_checkpoint="latest")
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3, 4]


def test_trackers_keep_what_was_logged_before_a_signal(launch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = {"report_to": "tensorboard", "tracker_name": "t"}
    child = launch(prepare=signal_at_the_third_loss(signal.SIGTERM), **tracker, **ENDLESS)
    assert child.wait() == 143
    events = EventAccumulator(str(tmp_path / "output" / "logs" / "t")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_that_reach_the_workers_too(script, launch, tmp_path, number, code):
    """Terminals and schedulers signal the process group; the workers' batches are still needed for the step."""
    child = launch(dataloader_num_workers=2, **ENDLESS)
    metrics = tmp_path / "output" / "metrics.jsonl"
    child.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    os.killpg(child.pid, number)
    assert child.wait() == code
    assert "Traceback" not in child.said()
    (checkpoint,) = script.list_checkpoints(tmp_path / "output")
    assert checkpoint.name == f"checkpoint-{read_metrics(tmp_path / 'output')[-1]['step']}"


@SHARED
def test_two_processes_signalled_as_a_group(script, launch, tmp_path):
    """All at once, and again at once, as launchers hand on what they get."""
    children = launch(2, **ENDLESS)
    metrics = tmp_path / "output" / "metrics.jsonl"
    children[0].wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    for _ in range(2):
        for child in children:
            os.killpg(child.pid, signal.SIGTERM)
    assert [child.wait() for child in children] == [143, 143]
    assert sum(child.said().count("stopped by SIGTERM") for child in children) == 1  # one line, by one process
    (checkpoint,) = script.list_checkpoints(tmp_path / "output")
    assert checkpoint.name == f"checkpoint-{read_metrics(tmp_path / 'output')[-1]['step']}"


def test_the_same_signal_from_a_launcher_is_no_second_one(script, launch, tmp_path):
    """The group's signal and the one that the launcher hands on arrive a moment apart."""

    def prepare(module):
        diffusion_loss, calls = module.diffusion_loss, []

        def loss(*args):
            calls.append(None)
            for _ in range(3 if len(calls) == 3 else 0):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            return diffusion_loss(*args)

        module.diffusion_loss = loss

    assert launch(prepare=prepare, **ENDLESS).wait() == 143
    assert [folder.name for folder in script.list_checkpoints(tmp_path / "output")] == ["checkpoint-3"]


def test_second_signal_ends_at_once(script, launch, run, tmp_path):
    def prepare(module):
        signal_at_the_third_loss(signal.SIGTERM)(module)

        def save_checkpoint(*_):
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        module.save_checkpoint = save_checkpoint

    child = launch(prepare=prepare, **ENDLESS)
    started = time.monotonic()
    assert child.wait(40) == 143 and time.monotonic() - started < 40
    assert script.list_checkpoints(tmp_path / "output") == []
    run(max_train_steps=1)


def test_signal_while_encoding_keeps_what_is_encoded(launch, clips):
    def prepare(module):
        encode_video, calls = module.encode_video, []

        def encode(vae, video):
            calls.append(len(video) > 1)
            if sum(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return encode_video(vae, video)

        module.encode_video = encode

    child = launch(prepare=prepare, instance_data_root=clips, precompute_dir=None, dataloader_num_workers=2)
    assert child.wait() == 143
    assert "stopped by SIGTERM before the first step; what is encoded is kept. To go on, give the same" in child.said()
    assert "Traceback" not in child.said()
    names = [path.name for path in (clips / ".cogvideox_precomputed" / "videos").iterdir()]
    assert len(names) == 2 and all(name.endswith(".safetensors") and name[0] != "." for name in names)


def signal_while_sampling(number):
    def prepare(module):
        def log_validation(*_):
            os.kill(os.getpid(), number)
            time.sleep(60)

        module.log_validation = log_validation

    return prepare


def test_signal_while_sampling(script, launch, tmp_path):
    """Sampling is cut short; the step after it is the last one, since the other processes are at it already."""
    validation = {"validation_prompt": "a red square", "validation_steps": 2}
    child = launch(prepare=signal_while_sampling(signal.SIGTERM), **validation, **ENDLESS)
    assert child.wait() == 143
    assert "Validation is cut short" in child.said() and "Traceback" not in child.said()
    assert [folder.name for folder in script.list_checkpoints(tmp_path / "output")] == ["checkpoint-3"]


def test_signal_while_sampling_at_the_end(script, launch, tmp_path):
    child = launch(prepare=signal_while_sampling(signal.SIGINT), validation_prompt="a red square")
    assert child.wait() == 130
    assert "stopped by SIGINT after the last step, with the LoRA saved" in child.said()
    assert (tmp_path / "output" / script.LORA_FILE).is_file()


def test_a_decoder_killed_while_it_draws_a_bar(script, run, clips, monkeypatch):
    """tqdm's own lock is a semaphore that forked processes share: one that is killed with it keeps it for ever."""

    def draw_and_die(*_):
        script.tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(script.VideoDataset, "__getitem__", draw_and_die)
    monkeypatch.setattr(script.tqdm, "_lock", TqdmDefaultWriteLock(), raising=False)
    with pytest.raises(script.RunError, match="4 of 4 videos cannot be decoded(.|\\n)*the decoder crashed on it"):
        run(instance_data_root=clips, precompute_dir=None)


KILLED = {"max_train_steps": 12, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "random_flip": True}


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_times_and_resumed(script, launch, run, clips, tmp_path, kills):
    """SIGKILL during encoding, loading, training, writing and pruning; every start resumes with `latest`, and the run
    ends with the weights of the run never killed."""
    settings = KILLED | {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 2 * kills}
    whole = run(output_dir=tmp_path / "whole", **settings)
    draw = random.Random(kills)
    phases = set()
    for number in range(kills):
        if number % 5 == 0:  # encoding is to be killed, too
            shutil.rmtree(clips / ".cogvideox_precomputed")
        child = launch(output_dir=tmp_path / "killed", resume_from_checkpoint="latest", **settings)
        said = ("Prompts:", "Videos:", "Steps:", "Saved")[draw.randrange(4)]
        child.wait_for(lambda said=said, child=child: said in child.said() or not child.process.is_alive())
        time.sleep(draw.random() / 4)
        phases.add(said if child.process.is_alive() else "ended")
        child.process.kill()
        child.wait()
        assert "Traceback" not in child.said(), child.said()[-3000:]
    child = launch(output_dir=tmp_path / "killed", resume_from_checkpoint="latest", **settings)
    assert child.wait() == 0, child.said()[-3000:]
    assert len(phases) > 2
    assert same_tensors(*(load_file(output / script.LORA_FILE) for output in (whole, tmp_path / "killed")))
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if "checkpoint" in path.name)
    assert left == sorted(f"checkpoint-{step}" for step in (2 * kills - 1, 2 * kills))
    assert not list((clips / ".cogvideox_precomputed").rglob("*.partial"))


@contextmanager
def files_no_longer_than(size: int):
    """The kernel refuses to write more into a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 13_000, 20_000])  # stops the LoRA, the random states, the optimizer
def test_full_disk_at_a_checkpoint(script, run, monkeypatch, caplog, size):
    save_checkpoint = script.save_checkpoint

    def save(args, accelerator, prepared, state, settings):
        if state.step == 2:
            with files_no_longer_than(size):
                return save_checkpoint(args, accelerator, prepared, state, settings)
        return save_checkpoint(args, accelerator, prepared, state, settings)

    monkeypatch.setattr(script, "save_checkpoint", save)
    output = run(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2)
    assert f"Writing {output / 'checkpoint-2'} failed, the run goes on" in caplog.text
    assert [folder.name for folder in script.list_checkpoints(output)] == ["checkpoint-1", "checkpoint-3"]
    assert (output / script.LORA_FILE).is_file() and not list(output.glob(".*"))


def test_full_disk_at_a_precomputed_file(script, run, clips, monkeypatch):
    write_item = script.write_item

    def write(path, **tensors):
        if "moments" not in tensors:
            return write_item(path, **tensors)
        with files_no_longer_than(100):
            return write_item(path, **tensors)

    monkeypatch.setattr(script, "write_item", write)
    with pytest.raises(script.RunError, match=r"videos/\w+.safetensors cannot be written: ") as error:
        run(instance_data_root=clips, precompute_dir=None)
    assert error.value.exit_code == 2 and "--precompute_dir" in str(error.value)
    assert list((clips / ".cogvideox_precomputed" / "videos").iterdir()) == []


@SHARED
def test_full_disk_at_a_video(script, run, monkeypatch, caplog):
    export = script.export_to_video

    def export_to_video(*args, **keywords):
        with files_no_longer_than(100):
            return export(*args, **keywords)

    monkeypatch.setattr(script, "export_to_video", export_to_video)
    output = run(validation_prompt="a red square", validation_steps=1, num_inference_steps=1, max_train_steps=3)
    assert "Validation failed" in caplog.text and ".mp4" in caplog.text
    assert (output / script.LORA_FILE).is_file() and not list((output / "validation").glob("[!.]*"))


def test_full_disk_at_the_lora(script, run, monkeypatch, tmp_path):
    save_lora = script.save_lora

    def save(transformer, folder, weights):
        if folder.name != "output":  # a checkpoint
            return save_lora(transformer, folder, weights)
        with files_no_longer_than(100):
            return save_lora(transformer, folder, weights)

    monkeypatch.setattr(script, "save_lora", save)
    with pytest.raises(script.RunError, match=f"output/{script.LORA_FILE} cannot be written") as error:
        run(max_train_steps=2, checkpointing_steps=2)
    assert error.value.exit_code == 1
    assert [folder.name for folder in script.list_checkpoints(tmp_path / "output")] == ["checkpoint-2"]


def test_disk_that_takes_no_metrics(script, run, monkeypatch, caplog):
    def append_metrics(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "append_metrics", append_metrics)
    output = run(max_train_steps=3)
    assert (output / script.LORA_FILE).is_file()
    assert caplog.text.count("metrics.jsonl failed, the run goes on: OSError") == 1  # once, not once a step


def test_trackers_that_throw(script, run, monkeypatch, caplog):
    """At logging, at showing a video, at closing: each is said, and the run ends well."""

    def throw(*_, **__):
        raise ConnectionError("the tracker is down")

    monkeypatch.setattr(script.Accelerator, "log", throw)
    monkeypatch.setattr(script, "send_videos", throw)
    monkeypatch.setattr(script.Accelerator, "end_training", throw)
    output = run(report_to="tensorboard", validation_prompt="a red square", num_inference_steps=1, max_train_steps=3)
    assert (output / script.LORA_FILE).is_file() and len(list((output / "validation").iterdir())) == 1
    assert len(read_metrics(output)) == 3
    for what in ("Logging to the trackers", "Showing videos in the trackers", "Closing the trackers"):
        assert caplog.text.count(f"{what} failed, the run goes on: ConnectionError: the tracker is down") == 1


def test_card_that_cannot_be_written(script, run, monkeypatch, caplog):
    def throw(*_):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(script, "save_model_card", throw)
    assert (run() / script.LORA_FILE).is_file()
    assert "Writing the model card failed" in caplog.text


def test_metrics_of_a_killed_run_are_whole_lines(script, tmp_path):
    """A line that a kill cut off is dropped when the run goes on."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    script.start_metrics(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
