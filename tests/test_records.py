"""No work is lost and no record is false: what stands in checkpoints, metrics.jsonl, run.json, state.json and logs."""

import json
import logging
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from conftest import ONLY_I2V
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load, load_file
from test_interruptions import ENDLESS, at_call, checkpoints, signal_at_step_3
from test_resume import content
from test_training import read_metrics, same_tensors


def only(clips: Path, count: int) -> Path:
    """The first `count` clips of a folder alone."""
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()[:count]
        (clips / name).write_text("\n".join(lines) + "\n")
    return clips


# ---- Gradients ------------------------------------------------------------------------------------------------------


def test_a_short_group_of_micro_batches_has_whole_gradients(script, run, clips, caplog):
    """One clip with accumulation 4 had a quarter of the gradient."""
    settings = {"instance_data_root": only(clips, 1), "precompute_dir": None, "max_train_steps": 3}
    plain, accumulated = run(**settings), run(**settings, gradient_accumulation_steps=4)
    numbers = [[(row["loss"], row["grad_norm"]) for row in read_metrics(output)] for output in (plain, accumulated)]
    assert numbers[0] == numbers[1]
    assert same_tensors(*(load_file(output / script.LORA_FILE) for output in (plain, accumulated)))
    assert "An epoch has 1 micro-batches, fewer than --gradient_accumulation_steps 4 asks for" in caplog.text


def test_each_step_is_divided_by_its_own_micro_batches(script, run, clips, monkeypatch):
    """Three micro-batches an epoch with accumulation 2: groups of 2 and 1."""
    sizes, step = [], script.train_step

    def spy(run, batch, num_micro_batches):
        sizes.append(num_micro_batches)
        return step(run, batch, num_micro_batches)

    monkeypatch.setattr(script, "train_step", spy)
    run(
        instance_data_root=only(clips, 3), precompute_dir=None, train_batch_size=1, gradient_accumulation_steps=2,
        max_train_steps=4,
    )  # fmt: skip
    assert sizes == [2, 2, 1, 2, 2, 1]


def test_a_resumed_run_begins_with_a_whole_group(script, run, monkeypatch):
    """accelerate's counter of micro-batches came back from the checkpoint."""
    settings = {"train_batch_size": 1, "checkpointing_steps": 1}
    run(**settings, gradient_accumulation_steps=1, max_train_steps=1)
    norms, step = [], script.train_step

    def spy(run, batch, num_micro_batches):
        loss, norm = step(run, batch, num_micro_batches)
        norms.append((num_micro_batches, norm is None))
        return loss, norm

    monkeypatch.setattr(script, "train_step", spy)
    run(**settings, gradient_accumulation_steps=2, max_train_steps=3, resume_from_checkpoint="latest")
    assert norms == [(2, True), (2, False), (1, False)]


# ---- The files of the LoRA ------------------------------------------------------------------------------------------


def test_a_dynamo_backend_of_accelerate_is_refused(script, run, monkeypatch):
    """It would give every name of the LoRA a part `_orig_mod`."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(script.RunError, match="asks for the dynamo backend eager: leave it out, and give --compile"):
        run()


def test_a_lora_of_other_names_is_never_written(script, model, tmp_path):
    transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
    script.add_lora(transformer, 4, 4)
    weights = {f"_orig_mod.{name}": weight for name, weight in script.lora_weights(transformer).items()}
    with pytest.raises(script.RunError, match="its layers would have other names"):
        script.save_lora(transformer, tmp_path / script.LORA_FILE, weights)
    assert list(tmp_path.iterdir()) == []


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints_are_in_the_order_of_saving_whatever_the_clock_says(script, run, monkeypatch, caplog):
    """The clock goes back by an hour with each look at it."""
    caplog.set_level("INFO")
    hours = iter(range(10**6, 0, -1))
    with monkeypatch.context() as patch:
        patch.setattr(script.time, "time", lambda: 3600.0 * next(hours))
        output = run(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
        assert checkpoints(output) == ["checkpoint-4", "checkpoint-5"]
    run(max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    assert f"Resumed {output / 'checkpoint-5'}" in caplog.text
    assert checkpoints(output) == ["checkpoint-5", "checkpoint-6"]


def test_file_systems_without_access_rights_and_without_fsync_of_folders(script, run, monkeypatch):
    fsync = os.fsync

    def no_folder(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", no_folder)
    monkeypatch.setattr(Path, "chmod", refuse)
    output = run()
    assert checkpoints(output) == ["checkpoint-2"] and (output / script.LORA_FILE).is_file()


def test_a_disk_that_loses_what_is_written_is_an_error(script, tmp_path, monkeypatch):
    """Unlike a folder's, the fsync of a file must succeed."""
    (tmp_path / "file").write_text("x")

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        script.flush(tmp_path / "file")


def test_a_file_system_that_cannot_hold_checkpoints_is_known_before_anything_is_encoded(
    script, run, clips, monkeypatch
):
    replace = os.replace

    def no_folders(source, target):
        if Path(source).is_dir():
            raise OSError(95, "Operation not supported")
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_folders)
    with pytest.raises(script.RunError, match="cannot be written: .*Operation not supported"):
        run(instance_data_root=clips, precompute_dir=None)
    assert not list((clips / ".cogvideox_precomputed").rglob("*.safetensors"))


# ---- Errors while reading the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "advice"), [
    (FileNotFoundError("No such file: a.safetensors"), "the same command encodes again what is missing"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)"), "--shm-size 8g"),
])  # fmt: skip
def test_an_error_of_the_loader_keeps_the_steps_before_it(script, run, monkeypatch, error, advice):
    get, calls = script.LatentDataset.__getitem__, []

    def fail_at_7(self, key):
        calls.append(key)
        if len(calls) == 7:
            raise error
        return get(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(script.LatentDataset, "__getitem__", fail_at_7)
        with pytest.raises(script.RunError) as raised:
            run(max_train_steps=8, train_batch_size=1, output_dir="stopped")
    assert advice in str(raised.value) and str(error) in str(raised.value) and raised.value.exit_code == 2
    (saved,) = checkpoints(Path("stopped"))
    run(max_train_steps=8, train_batch_size=1, output_dir="stopped", resume_from_checkpoint="latest")
    at_once = run(max_train_steps=8, train_batch_size=1, output_dir="at once")
    assert int(saved.split("-")[1]) >= 4
    assert same_tensors(*(load_file(Path(name, script.LORA_FILE)) for name in ("stopped", at_once)))


def test_an_error_of_a_worker_is_told_without_its_traceback(script, run, clips):
    """An encoded clip vanishes before the workers read it."""
    settings = {"instance_data_root": clips, "precompute_dir": None, "dataloader_num_workers": 1}
    run(**settings)
    make, folder = script.get_dataloader, clips / ".cogvideox_precomputed" / "videos"

    def vanish(*arguments):
        shutil.rmtree(folder)
        return make(*arguments)

    script.get_dataloader = vanish
    try:
        with pytest.raises(script.RunError, match=r"^the next clips cannot be read: .*No such file.*encodes again"):
            run(**settings)
    finally:
        script.get_dataloader = make


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_torn_lines_of_the_metrics_do_not_stop_a_resume(run, caplog):
    """A full disk cuts a line short, and the next one is appended to it."""
    caplog.set_level("INFO")
    output = run(max_train_steps=3, checkpointing_steps=2)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    torn = ['{"step": 1, "lo' + lines[0], *lines, '{"step"', "[1]", '{"loss": 1}']
    (output / "metrics.jsonl").write_text("\n".join(torn))
    shutil.rmtree(output / "checkpoint-3")
    run(max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3, 4]
    assert f"5 lines of {output / 'metrics.jsonl'} are removed: those after step 2" in caplog.text


def test_a_full_disk_at_a_resume_keeps_the_metrics(script, run, monkeypatch):
    output = run(max_train_steps=2, checkpointing_steps=1)
    before = (output / "metrics.jsonl").read_bytes()
    write = Path.write_text

    def full(self, text, *arguments, **keywords):
        if "metrics" in self.name:
            write(self, text[:10])
            raise OSError(28, "No space left on device")
        return write(self, text, *arguments, **keywords)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(script.RunError, match="No space left on device"):
        run(max_train_steps=3, resume_from_checkpoint="latest")
    assert (output / "metrics.jsonl").read_bytes() == before


# ---- Settings that change on resume ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, True])
def test_a_new_learning_rate_counts_from_the_resumed_step_on(run, caplog, scale):
    output = run(max_train_steps=2, learning_rate=1e-3, scale_lr=scale)
    factor = 2 if scale else 1  # of batch size
    run(max_train_steps=4, learning_rate=1e-4, scale_lr=scale, resume_from_checkpoint="latest")
    rates = [row["lr"] for row in read_metrics(output)]
    assert rates == pytest.approx([1e-3 * factor] * 2 + [1e-4 * factor] * 2)
    state = torch.load(output / "checkpoint-4" / "optimizer.bin", weights_only=False)
    assert state["param_groups"][0]["lr"] == pytest.approx(1e-4 * factor)
    assert "From step 2 of" in caplog.text and "learning_rate was 0.001, is 0.0001" in caplog.text
    change = "step 2: learning_rate was 0.001, is 0.0001"
    assert f"| changes | {change} |" in (output / "README.md").read_text()
    assert json.loads((output / "run.json").read_text())["settings"]["changes"] == [change]
    run(max_train_steps=5, learning_rate=1e-5, scale_lr=scale, resume_from_checkpoint="latest")
    second = "step 4: learning_rate was 0.0001, is 1e-05"
    assert f"| changes | {change}; {second} |" in (output / "README.md").read_text()


def test_the_new_rate_is_the_one_that_the_next_step_is_taken_with(script, run):
    """Not only the one that is logged: a step with a tiny rate changes nothing."""
    output = run(max_train_steps=2, learning_rate=1e-2)
    before = load_file(output / script.LORA_FILE)
    run(max_train_steps=3, learning_rate=1e-12, resume_from_checkpoint="latest")
    after = load_file(output / script.LORA_FILE)
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_a_finished_schedule_that_goes_on_is_a_warning_with_numbers(run, caplog):
    settings = {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "learning_rate": 1e-3}
    run(**settings, max_train_steps=4)
    assert "The learning rate after step" not in caplog.text
    run(**settings, max_train_steps=8, resume_from_checkpoint="latest")
    assert "The learning rate after step 4 was 0, and is 0.0005: " in caplog.text


def test_another_seed_is_refused(script, run):
    """The order of the clips would stay that of the first one."""
    output = run(seed=1)
    logging.getLogger(script.__name__).handlers.clear()  # else what is said next is in this run's log
    before = content(output)
    with pytest.raises(script.RunError, match="does not fit these flags:\n  - seed was 1, is 2"):
        run(seed=2, max_train_steps=4, resume_from_checkpoint="latest")
    assert content(output) == before


# ---- The end of a run -----------------------------------------------------------------------------------------------


def test_nothing_is_written_where_nothing_is_left_to_train(run, caplog):
    caplog.set_level("INFO")
    asked = {"validation_prompt": "a red square", "num_inference_steps": 1}
    output = run(**asked)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.rglob("*") if path.is_file()}
    for steps in (2, 1):
        caplog.clear()
        run(**asked, max_train_steps=steps, resume_from_checkpoint="latest")
        assert "Nothing is left to train" in caplog.text and "Sampled" not in caplog.text
        assert f"checkpoint-2 is of step 2, and {steps} are asked for" in caplog.text
    changed = {
        path.name for path in output.rglob("*")
        if path.is_file() and before.get(path) != (path.stat().st_mtime_ns, path.read_bytes())
    }  # fmt: skip
    assert changed <= {"train.log", "stages.jsonl", "state.json", ".lock", "metrics.jsonl"}
    assert all(before[path][1] == path.read_bytes() for path in before if path.name == "metrics.jsonl")


def test_a_run_that_was_killed_before_its_lora_was_written_goes_on_to_the_end(script, run):
    """Even where the folder has the LoRA of fewer steps."""
    output = run(max_train_steps=2)
    shorter = load((output / script.LORA_FILE).read_bytes())
    run(max_train_steps=4, resume_from_checkpoint="latest")
    whole = load((output / script.LORA_FILE).read_bytes())
    (output / "state.json").write_text('{"state": "going"}')
    shutil.copy(output / "checkpoint-2" / script.LORA_FILE, output)
    run(max_train_steps=4, resume_from_checkpoint="latest")
    assert same_tensors(whole, load_file(output / script.LORA_FILE)) and not same_tensors(whole, shorter)


def state(output: Path) -> dict:
    return json.loads((output / "state.json").read_text())


def test_state_of_a_run_that_ends_well(run):
    output = run(num_train_epochs=1, max_train_steps=None)
    assert state(output) == {"state": "finished", "step": 2, "lora_step": 2}
    assert json.loads((output / "run.json").read_text())["max_train_steps"] == 2


def test_state_of_a_run_that_fails(script, run):
    with pytest.raises(script.RunError):
        run(learning_rate=1e30, max_train_steps=20)
    found = state(Path("output"))
    assert found["state"] == "failed" and "the loss is nan" in found["message"]


def test_wrong_flags_leave_the_state_of_a_folder_alone(script, run):
    output = run()
    with pytest.raises(script.RunError):
        run(rank=8, max_train_steps=3, resume_from_checkpoint="latest")
    assert state(output)["state"] == "finished"


def test_an_error_that_nobody_foresaw_is_in_the_log_with_its_traceback(launch, tmp_path):
    def fail():
        raise KeyError("unforeseen")

    child = launch(prepare=lambda _: at_call(CogVideoXTransformer3DModel, "forward", 2, fail), max_train_steps=4)
    assert child.wait() == 1
    log = (tmp_path / "output" / "train.log").read_text()
    assert "ERROR an error that nobody foresaw\nTraceback" in log and "KeyError: 'unforeseen'" in log
    assert child.said().count("Traceback") == 1
    assert state(tmp_path / "output") == {"state": "failed", "message": "KeyError: 'unforeseen'"}


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_stops_a_run_as_other_signals_do(launch, tmp_path, is_ignored):
    """Unless nohup ignores it."""

    def prepare(script):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        signal_at_step_3(signal.SIGHUP)(script)

    child = launch(prepare=prepare, **ENDLESS | {"max_train_steps": 6})
    assert child.wait() == (0 if is_ignored else 129)
    assert checkpoints(tmp_path / "output") == ["checkpoint-6" if is_ignored else "checkpoint-3"]
    assert state(tmp_path / "output")["state"] == ("finished" if is_ignored else "stopped")


def test_two_runs_do_not_write_to_one_folder(script, launch, run, tmp_path):
    child = launch(**ENDLESS | {"checkpointing_steps": 1, "checkpoints_total_limit": 2})
    output = tmp_path / "output"
    child.wait_for(lambda: checkpoints(output))
    with pytest.raises(script.RunError, match="another run writes there at this moment") as error:
        run(output_dir=output, resume_from_checkpoint="latest")
    assert error.value.exit_code == 2 and state(output) == {"state": "going"}
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 143
    run(output_dir=output, resume_from_checkpoint="latest", max_train_steps=1)  # the folder is free again


def test_signals_and_stages_are_undone_after_an_error(script, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), script.StopSignal(None).installed():
        assert signal.getsignal(signal.SIGTERM) != before
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ValueError), script.stage(script.Namespace(output_dir=str(tmp_path)), "sampling"):
        raise ValueError
    assert re.match(r'{"step": 0, "stage": "sampling", "seconds": ', (tmp_path / "stages.jsonl").read_text())


@ONLY_I2V
def test_positions_that_are_computed_are_a_warning(run, models, caplog):
    run(pretrained_model_name_or_path=models["i2v learned"], max_num_frames=5, max_train_steps=1)
    (record,) = [record for record in caplog.records if "train with computed positions" in record.message]
    assert record.levelname == "WARNING"
