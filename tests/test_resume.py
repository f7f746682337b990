"""A resumed run is the run that was stopped, to the bit. Checkpoints are complete, or are not used."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import BOTH
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file
from test_interruptions import at_call, checkpoints
from test_objective import record_inputs
from test_training import read_metrics, same_tensors

# 5 clips at batch size 1 and accumulation 2: steps end after batches 2, 4 and 5 of an epoch.
SETTINGS = {
    "train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 7, "checkpointing_steps": 1,
    "random_flip": True, "video_reshape_mode": "random", "lr_scheduler": "cosine", "lr_warmup_steps": 2,
}  # fmt: skip
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1},
    "8bit": {"use_8bit_adam": True, "rank": 128, "dataloader_num_workers": 2},
}
STOPS = {"adamw": [1, 2, 3, 4, 5, 6, 7], "prodigy": [3], "8bit": [3]}


@pytest.fixture
def five_clips(clips):
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join([*lines, lines[0]]) + "\n")
    return clips


def equal(a, b) -> bool:
    """Two loaded states, tensors compared bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same_run(script, a: Path, b: Path, last: str) -> bool:
    """LoRA, logged numbers, and all that the last checkpoint holds but the time."""
    names = ("step", "loss", "lr", "grad_norm")
    rows = [[[row[name] for name in names] for row in read_metrics(output)] for output in (a, b)]
    folders = [output / last for output in (a, b)]
    loaded = [
        {path.name: torch.load(path, weights_only=False) for path in sorted(folder.iterdir()) if path.suffix == ".bin"}
        for folder in folders
    ]
    assert rows[0] and loaded[0].keys() >= {"optimizer.bin", "scheduler.bin"}
    states = [json.loads((folder / "training_state.json").read_text()) for folder in folders]
    return (
        rows[0] == rows[1] and equal(*loaded)
        and same_tensors(*(load_file(output / script.LORA_FILE) for output in (a, b)))
        and same_tensors(*(load_file(folder / script.LORA_FILE) for folder in folders))
        and states[0]["settings"] == states[1]["settings"] and states[0]["state"] == states[1]["state"]
    )  # fmt: skip


def check_stops(script, run, five_clips, tmp_path, name, **changes) -> None:
    settings = SETTINGS | OPTIMIZERS[name] | {"instance_data_root": five_clips, "precompute_dir": None} | changes
    never_stopped = run(output_dir=tmp_path / "never", **settings)
    for step in STOPS[name]:
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(never_stopped / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        shutil.copy(never_stopped / "metrics.jsonl", resumed)  # with the lines of steps that are taken again
        run(output_dir=resumed, resume_from_checkpoint="latest", **settings)
        assert same_run(script, never_stopped, resumed, "checkpoint-7"), step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_after_any_step_and_resumed(script, run, five_clips, tmp_path, name):
    check_stops(script, run, five_clips, tmp_path, name)


@pytest.mark.parametrize("script", ["train_cogvideox_image_to_video_lora"], indirect=True)
def test_stopped_with_image_dropout_and_resumed(script, run, five_clips, tmp_path):
    check_stops(script, run, five_clips, tmp_path, "adamw", noised_image_dropout=0.5)


def test_resuming_reads_only_what_is_still_to_come(run, five_clips, tmp_path, monkeypatch):
    """What the transformer is given after the checkpoint is what the run that was not stopped gave it."""
    calls = record_inputs(monkeypatch)
    settings = SETTINGS | {"instance_data_root": five_clips, "precompute_dir": None}
    never_stopped = run(output_dir=tmp_path / "never", **settings)
    given = [call["hidden_states"] for call in calls]
    assert len(given) == 12  # 7 steps are 2 epochs of 5 batches, and 2 batches
    for step, batches in ((1, 2), (3, 5), (5, 9)):
        calls.clear()
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(never_stopped / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        run(output_dir=resumed, resume_from_checkpoint="latest", **settings)
        assert equal([call["hidden_states"] for call in calls], given[batches:])


@BOTH
def test_two_processes_stopped_and_resumed(script, kind, launch, run, five_clips, tmp_path):
    """One of the two gets a signal, in the middle of an epoch; the resumed run is the run that was not stopped."""
    settings = SETTINGS | {"instance_data_root": five_clips, "precompute_dir": None, "max_train_steps": 5}
    if kind == "i2v":
        settings["noised_image_dropout"] = 0.5
    run(**settings | {"output_dir": tmp_path / "first", "max_train_steps": 1})  # encodes the clips
    for child in launch(2, output_dir=tmp_path / "never", **settings):
        assert child.wait() == 0, child.said()[-3000:]

    def stop_one(_script) -> None:
        if os.environ["RANK"] == {"t2v": "1", "i2v": "0"}[kind]:  # 3 batches an epoch: the fifth is of step 3
            send = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
            at_call(CogVideoXTransformer3DModel, "forward", 5, send)

    children = launch(2, prepare=stop_one, output_dir=tmp_path / "stopped", **settings)
    assert [child.wait() for child in children] == [143, 143]
    assert "stopped by SIGTERM after step 3" in children[0].said()
    assert checkpoints(tmp_path / "stopped")[-1] == "checkpoint-3"
    for child in launch(2, output_dir=tmp_path / "stopped", resume_from_checkpoint="latest", **settings):
        assert child.wait() == 0, child.said()[-3000:]
    assert same_run(script, tmp_path / "never", tmp_path / "stopped", "checkpoint-5")
    assert len(list((tmp_path / "stopped" / "checkpoint-5").glob("random_states_*.pkl"))) == 2


# ---- settings that changed ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(script, finished):
    """What resumes a finished run's last checkpoint, and its settings."""
    folder = finished / "output" / "checkpoint-4"
    args = script.get_args(["--pretrained_model_name_or_path", "m", "--resume_from_checkpoint", str(folder)])
    return args, json.loads((folder / "training_state.json").read_text())["settings"]


REFUSED = {"rank": 8, "optimizer": "adamw", "use_8bit_adam": True, "lora_targets": ["to_q"]}
REFUSED |= {"engine": "deepspeed zero2"}
WARNED = {
    "lora_alpha": 4.0, "train_batch_size": 2, "gradient_accumulation_steps": 1, "height": 48, "learning_rate": 1e-2,
    "num_clips": 5, "num_processes": 2, "mixed_precision": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_checkpoint_that_does_not_fit_is_refused(script, saved, name):
    args, settings = saved
    with pytest.raises(script.RunError, match=rf"checkpoint-4(.|\n)*{name} was .*, is ") as error:
        script.find_checkpoint(args, settings | {name: REFUSED[name]})
    assert error.value.exit_code == 2


def test_changed_settings_are_listed_in_one_warning(script, saved, caplog):
    args, settings = saved
    script.find_checkpoint(args, settings)
    assert caplog.records == []
    script.find_checkpoint(args, settings | WARNED)
    (record,) = caplog.records
    for name, value in WARNED.items():
        assert f"{name} was {settings[name]}, is {value}" in record.message


def test_refusal_and_warning_reach_the_command_line(script, run, tmp_path, caplog):
    output = run(max_train_steps=2, checkpointing_steps=1)
    with pytest.raises(script.RunError, match="rank was 4, is 8"):
        run(max_train_steps=3, resume_from_checkpoint="latest", rank=8, precompute_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()  # refused before anything is encoded
    run(max_train_steps=3, resume_from_checkpoint="latest", lora_alpha=4)
    assert "lora_alpha was 2.0, is 4.0" in caplog.text
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3]


def test_place_in_the_epoch_is_kept_for_another_batch_size(run, clips, caplog):
    """3 clips of 8 are seen; with 2 clips a batch, one batch of the epoch is taken."""
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).write_text((clips / name).read_text() * 2)
    own = {"instance_data_root": clips, "precompute_dir": None}
    run(**own, train_batch_size=1, max_train_steps=3)
    caplog.set_level("INFO")
    run(**own, train_batch_size=2, max_train_steps=4, resume_from_checkpoint="latest")
    assert "step 3, epoch 1, batch 1 of it" in caplog.text


# ---- complete, or not used ------------------------------------------------------------------------------------------


def test_the_last_step_writes_a_checkpoint_and_training_can_continue(script, run, tmp_path):
    output = run(max_train_steps=3)  # --checkpointing_steps is 500
    assert checkpoints(output) == ["checkpoint-3"]
    run(max_train_steps=5, resume_from_checkpoint="latest")
    at_once = run(max_train_steps=5, output_dir=tmp_path / "at once")
    assert checkpoints(output) == ["checkpoint-3", "checkpoint-5"]
    assert same_tensors(*(load_file(folder / script.LORA_FILE) for folder in (output, at_once)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["checkpoint-2", "metrics.jsonl"])
def test_folder_of_an_earlier_run_is_refused(script, run, finished, tmp_path, left):
    """Whatever is left of the run; nothing in the folder changes."""
    output = tmp_path / "earlier"
    output.mkdir()
    source = finished / "output" / left
    (shutil.copytree if source.is_dir() else shutil.copy)(source, output / left)
    before = content(output)
    with pytest.raises(script.RunError, match=f"has a run already .*{left}.*--resume_from_checkpoint latest") as error:
        run(output_dir=output, checkpoints_total_limit=1)
    assert error.value.exit_code == 2 and "another --output_dir" in str(error.value)
    assert content(output) == before


def test_latest_starts_where_there_is_no_checkpoint(script, run, tmp_path, caplog):
    caplog.set_level("INFO")
    output = run(output_dir=tmp_path / "new", max_train_steps=1, resume_from_checkpoint="latest")
    assert "so this is a fresh start" in caplog.text and checkpoints(output) == ["checkpoint-1"]
    shutil.rmtree(output / "checkpoint-1")
    (output / script.LORA_FILE).unlink()
    caplog.clear()  # what is left is of a run that was killed before its first checkpoint
    run(output_dir=output, max_train_steps=1, resume_from_checkpoint="latest")
    assert "metrics.jsonl is written anew" in caplog.text and len(read_metrics(output)) == 1


@pytest.mark.parametrize("flag", [None, "latest"])
@pytest.mark.parametrize("left", ["LoRA alone", "checkpoints of the original scripts", "damaged checkpoints"])
def test_a_run_that_cannot_be_resumed_is_never_overwritten(script, run, finished, tmp_path, left, flag):
    """The original scripts' checkpoints have no training_state.json. All scripts/ with several GPUs give `latest`."""
    output = tmp_path / "earlier"
    output.mkdir()
    if left == "LoRA alone":
        shutil.copy(finished / "output" / script.LORA_FILE, output)
    else:
        for number in (2, 4):
            shutil.copytree(finished / "output" / f"checkpoint-{number}", output / f"checkpoint-{number}")
            if left == "damaged checkpoints":
                (output / f"checkpoint-{number}" / "optimizer.bin").write_bytes(b"")
            else:
                (output / f"checkpoint-{number}" / "training_state.json").unlink()
    before = content(output)
    with pytest.raises(script.RunError, match="no checkpoint that can be resumed|has a run already") as error:
        run(output_dir=output, resume_from_checkpoint=flag)
    assert error.value.exit_code == 2 and content(output) == before
    if flag == "latest" or left != "damaged checkpoints":
        source = output if left == "LoRA alone" else output / "checkpoint-4"
        assert f"Give --init_lora {source}, to start from its LoRA, and another --output_dir" in str(error.value)
        assert "--resume_from_checkpoint latest" not in str(error.value)


DAMAGES = {"optimizer.bin": "empty", "scheduler.bin": "missing", "random_states_0.pkl": "empty"}


@pytest.mark.parametrize("name", DAMAGES)
def test_latest_passes_over_a_damaged_checkpoint(script, finished, tmp_path, caplog, name):
    output = tmp_path / "output"
    for number in (2, 4):
        shutil.copytree(finished / "output" / f"checkpoint-{number}", output / f"checkpoint-{number}")
    if DAMAGES[name] == "empty":
        (output / "checkpoint-4" / name).write_bytes(b"")
    else:
        (output / "checkpoint-4" / name).unlink()
    words = ["--pretrained_model_name_or_path", "m", "--output_dir", str(output), "--resume_from_checkpoint"]
    settings = {"engine": "replicated"}
    assert script.find_checkpoint(script.get_args([*words, "latest"]), settings) == output / "checkpoint-2"
    assert re.search(rf"checkpoint-4 is damaged and passed over: {name}", caplog.text)
    with pytest.raises(script.RunError, match="--resume_from_checkpoint checkpoint-4: no complete checkpoint"):
        script.find_checkpoint(script.get_args([*words, "checkpoint-4"]), settings)


def test_checkpoint_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    """Each file, training_state.json too, and the folder that names them are synchronised before the rename."""
    synced, fsync, replace, renamed = {}, os.fsync, os.replace, []

    def spy_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path] = path.stat().st_size
        fsync(descriptor)

    def spy_replace(source, target):
        if Path(target).name == "checkpoint-1":
            files = [path for path in Path(source).iterdir() if path.is_file()]
            assert len(files) > 4 and "training_state.json" in {path.name for path in files}
            assert Path(source).absolute() in synced
            for path in files:
                assert synced[path.absolute()] == path.stat().st_size, path
            renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    run(max_train_steps=1)
    assert len(renamed) == 1


class Kill(BaseException):
    """Stands for SIGKILL: nothing catches it, and every later call to the file system fails too."""


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_any_call_of_writing_replacing_or_pruning(script, run, flags, tmp_path, monkeypatch, step):
    """Checkpoints 2 and 3 are there, 2 is resumed and 3 is replaced, one is to be kept. Whatever call the kill comes
    at, `latest` finds a complete checkpoint, and the next start ends as if there had been no kill."""
    base = run(max_train_steps=3, checkpointing_steps=2, output_dir=tmp_path / "base")
    expected = load_file(base / script.LORA_FILE)
    (base / script.LORA_FILE).unlink()
    settings = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    for calls in range(0, 150, step):
        output = tmp_path / f"killed-{calls}"
        shutil.copytree(base, output)
        left = {"calls": calls}

        def deadly(original, left=left):
            def call(*arguments, **keywords):
                left["calls"] -= 1
                if left["calls"] < 0:
                    raise Kill
                return original(*arguments, **keywords)

            return call

        try:
            with monkeypatch.context() as patch:
                for name in ("replace", "unlink", "rmdir", "fsync"):
                    patch.setattr(os, name, deadly(getattr(os, name)))
                run(output_dir=output, resume_from_checkpoint="checkpoint-2", **settings)
            break
        except Kill:
            pass
        args = script.get_args(flags(output_dir=output, resume_from_checkpoint="latest"))
        found = script.find_checkpoint(args, {"engine": "replicated"})
        assert found in (output / "checkpoint-2", output / "checkpoint-3")
        if calls % 6 == 0:
            run(output_dir=output, resume_from_checkpoint="latest", **settings)
            assert same_tensors(load_file(output / script.LORA_FILE), expected)
            assert set(checkpoints(output)) == {path.name for path in output.glob("*checkpoint*")} >= {"checkpoint-3"}
    assert calls > 10


def test_metrics_continue_after_a_line_that_a_kill_cut_off(run):
    output = run(max_train_steps=2)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1}\n{"st')
    run(max_train_steps=4, resume_from_checkpoint="latest")
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3, 4]


def test_weights_that_are_not_finite_are_not_saved(script, run, monkeypatch):
    """The loss and gradients of step 2 are finite, what the optimizer makes of them is not."""
    step, counts = torch.optim.Adam.step, []

    def breaking(self, *arguments, **keywords):
        result = step(self, *arguments, **keywords)
        counts.append(None)
        if len(counts) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][3][0, 0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", breaking)
    with pytest.raises(script.RunError, match="step 2: weights of the LoRA are not finite") as error:
        run(max_train_steps=5, checkpointing_steps=1)
    assert error.value.exit_code == 3 and checkpoints(Path("output")) == ["checkpoint-1"]
    assert not (Path("output") / script.LORA_FILE).exists()
