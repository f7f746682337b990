"""A resumed run is the run that was stopped, to the bit; checkpoints are complete or not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_training import read_metrics, same_tensors

# 5 clips at batch size 1 and accumulation 2: steps end after batches 2, 4 and 5 of an epoch.
SETTINGS = {
    "train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 7, "checkpointing_steps": 1,
    "random_flip": True, "video_reshape_mode": "random", "lr_scheduler": "cosine", "lr_warmup_steps": 2,
}  # fmt: skip
OPTIMIZERS = {
    "adam": {"optimizer": "adam", "dataloader_num_workers": 2},
    "adamw": {"optimizer": "adamw"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1},
    "8bit": {"optimizer": "adamw", "use_8bit_adam": True, "rank": 128},
}
STOPS = {"adam": [2, 3], "adamw": [1, 2, 3, 4, 5, 6, 7], "prodigy": [2, 3], "8bit": [2, 3]}


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


def same_run(script, a: Path, b: Path) -> bool:
    """LoRA, logged numbers, and all that the last checkpoint holds but the time."""
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(output)] for output in (a, b)]
    last = [script.list_checkpoints(output)[-1] for output in (a, b)]
    assert last[0].name == last[1].name and rows[0]
    loaded = [
        {path.name: torch.load(path, weights_only=False) for path in sorted(folder.iterdir()) if path.suffix == ".bin"}
        for folder in last
    ]
    assert loaded[0].keys() >= {"optimizer.bin", "scheduler.bin"}
    return (
        rows[0] == rows[1] and equal(*loaded)
        and same_tensors(*(load_file(output / script.LORA_FILE) for output in (a, b)))
        and same_tensors(*(load_file(folder / script.LORA_FILE) for folder in last))
        and script.read_training_state(last[0])[1:] == script.read_training_state(last[1])[1:]
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_after_any_step_and_resumed(script, kind, run, five_clips, tmp_path, name):
    settings = SETTINGS | OPTIMIZERS[name] | {"instance_data_root": five_clips, "precompute_dir": None}
    if kind == "i2v":
        settings["noised_image_dropout"] = 0.5
    whole = run(output_dir=tmp_path / "whole", **settings)
    for step in STOPS[name]:
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        shutil.copy(whole / "metrics.jsonl", resumed)  # with the lines of steps that are to be taken again
        run(output_dir=resumed, resume_from_checkpoint="latest", **settings)
        assert same_run(script, whole, resumed), step


def test_resuming_reads_only_what_is_still_to_come(script, run, five_clips, tmp_path, monkeypatch):
    """Each clip that the whole run reads after the checkpoint, with its flip; nothing is decoded."""
    keys = []
    getitem = script.LatentDataset.__getitem__
    monkeypatch.setattr(script.LatentDataset, "__getitem__", lambda self, key: keys.append(key) or getitem(self, key))
    settings = SETTINGS | {"instance_data_root": five_clips, "precompute_dir": None}
    whole = run(output_dir=tmp_path / "whole", **settings)
    read = keys[:]
    assert len(read) == 13  # 7 steps are 2 epochs of 5 and 2 batches; accelerate looks one ahead
    monkeypatch.setattr(script, "decode_videos", None)
    for step, seen in ((1, 2), (3, 5), (5, 9)):
        keys.clear()
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        run(output_dir=resumed, resume_from_checkpoint="latest", **settings)
        assert keys == read[seen:]


def test_two_processes_stopped_and_resumed(script, kind, launch, run, five_clips, tmp_path):
    """One of the two is told to stop, in the middle of an epoch; the run that goes on is the run never stopped."""
    settings = SETTINGS | {"instance_data_root": five_clips, "precompute_dir": None, "max_train_steps": 5}
    if kind == "i2v":
        settings["noised_image_dropout"] = 0.5
    run(**settings | {"output_dir": tmp_path / "first", "max_train_steps": 1})  # encodes the clips
    for child in (children := launch(2, output_dir=tmp_path / "whole", **settings)):
        assert child.wait() == 0, child.said()[-3000:]

    def stop_one_at_step_2(module):
        original = module.check_finite

        def check_finite(args, step, *numbers):
            original(args, step, *numbers)
            if step == 2 and module.os.environ["RANK"] == {"t2v": "1", "i2v": "0"}[kind]:
                module.os.kill(module.os.getpid(), module.signal.SIGTERM)

        module.check_finite = check_finite

    children = launch(2, prepare=stop_one_at_step_2, output_dir=tmp_path / "stopped", **settings)
    assert [child.wait() for child in children] == [143, 143]
    assert "stopped by SIGTERM after step 3" in children[0].said()  # known to both at the end of the step after
    assert script.list_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-3"
    children = launch(2, output_dir=tmp_path / "stopped", resume_from_checkpoint="latest", **settings)
    for child in children:
        assert child.wait() == 0, child.said()[-3000:]
    assert same_run(script, tmp_path / "whole", tmp_path / "stopped")
    assert len(list((tmp_path / "stopped" / "checkpoint-5").glob("random_states_*.pkl"))) == 2


@pytest.fixture
def saved(run, tmp_path):
    return run(output_dir=tmp_path / "saved", max_train_steps=2, checkpointing_steps=1)


REFUSED = {
    "rank": ({"rank": 8}, "rank was 4, is 8"),
    "optimizer": ({"optimizer": "adamw"}, "optimizer was adam, is adamw"),
    "8bit": ({"use_8bit_adam": True}, "use_8bit_adam was False, is True"),
}
WARNED = {
    "alpha": ({"lora_alpha": 4}, "lora_alpha was 2.0, is 4.0: the LoRA is applied at another strength"),
    "batch": ({"train_batch_size": 1}, "train_batch_size was 2, is 1: the place in the epoch is kept"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1, is 2: a step learns"),
    "size": ({"height": 48}, "height was 64, is 48: the clips have another size"),
    "frames": ({"max_num_frames": 5}, "max_num_frames was 9, is 5"),
    "rate": ({"learning_rate": 1e-2}, "learning_rate was 0.001, is 0.01: the checkpoint's stays"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_checkpoint_that_cannot_be_continued_is_refused(script, run, saved, changes, said, monkeypatch):
    monkeypatch.setattr(script, "precompute_prompts", None)  # it is refused before that
    with pytest.raises(script.RunError, match=said) as error:
        run(output_dir=saved, max_train_steps=3, resume_from_checkpoint="latest", **changes)
    assert error.value.exit_code == 2 and "checkpoint-2" in str(error.value)


def test_other_target_modules_are_refused(script, run, saved, monkeypatch):
    monkeypatch.setattr(script, "LORA_TARGETS", ["to_q"])
    with pytest.raises(script.RunError, match="lora_targets was"):
        run(output_dir=saved, max_train_steps=3, resume_from_checkpoint="latest")


@pytest.mark.parametrize(("changes", "said"), WARNED.values(), ids=WARNED)
def test_checkpoint_that_changes_the_run_is_warned_of(run, saved, changes, said, caplog):
    output = run(output_dir=saved, max_train_steps=3, resume_from_checkpoint="latest", **changes)
    assert said in caplog.text
    assert [row["step"] for row in read_metrics(output)] == [1, 2, 3]


def test_another_number_of_processes_is_warned_of(launch, saved):
    children = launch(2, output_dir=saved, max_train_steps=3, resume_from_checkpoint="latest")
    for child in children:
        assert child.wait() == 0, child.said()[-3000:]
    assert "num_processes was 1, is 2: the place in the epoch is kept" in children[0].said()
    assert [row["step"] for row in read_metrics(saved)] == [1, 2, 3]


def test_settings_that_fit_are_not_warned_of(run, saved, caplog):
    run(output_dir=saved, max_train_steps=3, resume_from_checkpoint="checkpoint-1", checkpointing_steps=2)
    assert "in another way" not in caplog.text


def test_place_in_the_epoch_is_kept_for_another_batch_size(script, monkeypatch, tmp_path):
    """8 clips seen, in 4 batches of 2: 8 batches of 1, or 2 of 2 processes with 2 each."""
    settings = {"train_batch_size": 2, "num_processes": 1}
    state = {"seed": 0, "step": 4, "epoch": 1, "batch": 4}
    (tmp_path / "training_state.json").write_text(json.dumps({"saved_at": 0, "settings": settings, "state": state}))

    read = []
    monkeypatch.setattr(script, "read_state", lambda *arguments: read.append(arguments))
    Accelerator()  # random generators are seeded by its process
    for size, processes, batch in ((1, 1, 8), (2, 2, 2), (3, 1, 2), (2, 1, 4)):
        now = {"train_batch_size": size, "num_processes": processes}
        state = script.resume("accelerator", "prepared", tmp_path, now)
        assert (state.step, state.epoch, state.batch) == (4, 1, batch)
    assert read == 4 * [("accelerator", "prepared", tmp_path)]


class Kill(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up after it."""


FILES = ("a.bin", "b.bin", "c.bin")


def write_checkpoint(script, args, step: int) -> None:
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True)
    for name in FILES:
        (partial / name).write_text(str(step))
    script.publish_checkpoint(args, partial, folder, script.TrainingState(seed=0, step=step), {})


def complete_checkpoints(script, args) -> list[str]:
    """Those that the script takes for complete; each must be so."""
    found = script.list_checkpoints(Path(args.output_dir))
    assert all((folder / name).read_text() for folder in found for name in FILES)
    return [folder.name for folder in found]


def kill_after(calls: int, script, patch) -> None:
    """Let that many calls that change the file system pass, then raise Kill at each."""
    left = {"calls": calls}

    def deadly(original):
        def call(*arguments, **keywords):
            left["calls"] -= 1
            if left["calls"] < 0:
                raise Kill
            return original(*arguments, **keywords)

        return call

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(script.os, name, deadly(getattr(script.os, name)))


@pytest.mark.parametrize("last", [3, 4], ids=["replacing", "new"])
def test_killed_at_any_call_of_writing_or_pruning(script, flags, tmp_path, monkeypatch, last):
    """Checkpoints 1 to 3 were written, 2 are to be kept: whatever call the kill comes at, 2 complete ones stay, none
    is taken for one that is not whole, and the next start tidies up."""
    args = script.get_args(flags(checkpoints_total_limit=2, output_dir=tmp_path / "output"))
    for calls in range(30):
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        for step in (1, 2, 3):
            write_checkpoint(script, args, step)
        assert complete_checkpoints(script, args) == ["checkpoint-2", "checkpoint-3"]
        with monkeypatch.context() as patch:
            kill_after(calls, script, patch)
            try:
                write_checkpoint(script, args, last)
                break
            except Kill:
                pass
        assert len(complete_checkpoints(script, args)) >= 2
        script.clean_up(tmp_path / "output")
        found = complete_checkpoints(script, args)
        assert len(found) >= 2 and set(found) == {path.name for path in (tmp_path / "output").iterdir()}
        assert found[-1] in ("checkpoint-3", f"checkpoint-{last}")
    assert calls > 5


def test_limit_holds_though_the_clock_is_set_back(script, flags, tmp_path, monkeypatch):
    args = script.get_args(flags(checkpoints_total_limit=1, output_dir=tmp_path / "output"))
    clock = iter([1e9, 5e8, 4e8])
    monkeypatch.setattr(script.time, "time", lambda: next(clock))
    for step in (1, 2, 3):
        folder = tmp_path / "output" / f"checkpoint-{step}"
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True)
        script.publish_checkpoint(args, partial, folder, script.TrainingState(seed=0, step=step), {})
        assert script.list_checkpoints(tmp_path / "output") == [folder]


def test_weights_that_are_not_finite_are_not_saved(script, run, monkeypatch, tmp_path):
    """The loss and gradients of step 2 are finite, what the optimizer makes of them is not."""
    get_optimizer = script.get_optimizer

    def breaking(args, groups, **keywords):
        optimizer = get_optimizer(args, groups, **keywords)
        counts = {"steps": 0}

        def look(*_):
            counts["steps"] += 1
            if counts["steps"] == 2:
                with torch.no_grad():
                    groups[0]["params"][3][0, 0] = float("inf")

        optimizer.register_step_post_hook(look)
        return optimizer

    monkeypatch.setattr(script, "get_optimizer", breaking)
    for steps in (2, 5):
        with pytest.raises(script.RunError, match="step 2: weights of the LoRA are not finite") as error:
            run(output_dir=tmp_path / f"{steps}", max_train_steps=steps, checkpointing_steps=1)
        assert error.value.exit_code == 3
        assert [folder.name for folder in script.list_checkpoints(tmp_path / f"{steps}")] == ["checkpoint-1"]
        assert not (tmp_path / f"{steps}" / script.LORA_FILE).exists()
