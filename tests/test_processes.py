"""Two processes over gloo: what they share out, what each draws for itself, how they wait for each other, and what is
left when one of them is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, SHARED
from safetensors.torch import load_file
from test_training import read_metrics, same_tensors

TWO = {"train_batch_size": 1, "max_train_steps": 4}


def note(module, name: str, row) -> None:
    """Append a line to a file of this process, in the folder above its output."""
    folder = os.path.dirname(module.get_args().output_dir)
    with open(os.path.join(folder, f"{name}-{os.environ.get('RANK', 0)}.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")


def notes(tmp_path, name: str, rank: int) -> list:
    path = tmp_path / f"{name}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(children, codes=(0, 0), seconds: float = 120) -> list[str]:
    """Wait for all; what they said."""
    found = tuple(child.wait(seconds) for child in children)
    assert found == tuple(codes), [child.said()[-3000:] for child in children]
    return [child.said() for child in children]


# ---- one step learned together -------------------------------------------------------------------------------------


def draw_by_clip(module) -> None:
    """What is random in a step depends on the clip alone: not on its process, nor on its place in the batch."""

    def seeded(function):
        def call(first, *rest):
            made = []
            for item in first:
                with torch.random.fork_rng():
                    torch.manual_seed(int(item.double().abs().sum() * 1e3))
                    made.append(function(item[None], *rest))
            return torch.cat(made)

        return call

    diffusion_loss = module.diffusion_loss
    noise = seeded(torch.randn_like)
    timesteps = seeded(lambda item: torch.randint(0, 1000, (len(item),)))

    def loss(transformer, scheduler, latents, *rest):
        return diffusion_loss(
            transformer, scheduler, latents, *rest, noise=noise(latents), timesteps=timesteps(latents)
        )

    module.diffusion_loss = loss
    module.sample_latents = seeded(module.sample_latents)
    if module.KIND == "image-to-video":
        module.sample_image_latents = seeded(module.sample_image_latents)


def test_two_processes_learn_what_one_learns_from_twice_the_batch(script, launch, tmp_path):
    """On the same clips, noise and timesteps; the optimizer's epsilon keeps rounding from being blown up where a
    gradient is all but zero."""
    settings = {"prepare": draw_by_clip, "max_train_steps": 6, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    one = launch(output_dir=tmp_path / "one", train_batch_size=2, **settings)
    finish([one], [0])
    finish(launch(2, output_dir=tmp_path / "two", train_batch_size=1, **settings))
    one, two = (load_file(tmp_path / name / script.LORA_FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-7, msg=name)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 6


def note_what_is_drawn(module) -> None:
    diffusion_loss, getitem = module.diffusion_loss, module.LatentDataset.__getitem__

    def loss(transformer, scheduler, latents, *rest):
        dropped = bool((rest[0] == 0).all()) if module.KIND == "image-to-video" else None
        timesteps = torch.randint(0, 1000, (len(latents),))
        noise = torch.randn_like(latents)
        note(module, "drawn", [timesteps.tolist(), noise.sum().item(), latents.sum().item(), dropped])
        return diffusion_loss(transformer, scheduler, latents, *rest, noise=noise, timesteps=timesteps)

    def item(self, key):
        note(module, "keys", key)
        return getitem(self, key)

    module.diffusion_loss, module.LatentDataset.__getitem__ = loss, item


def test_each_process_draws_its_own_and_one_seed_repeats_it_all(script, kind, launch, tmp_path):
    settings = TWO | {"random_flip": True, "max_train_steps": 12, "prepare": note_what_is_drawn}
    if kind == "i2v":
        settings["noised_image_dropout"] = 0.5
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        finish(launch(2, output_dir=tmp_path / name / "output", **settings))
    drawn = [notes(tmp_path / "first", "drawn", rank) for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 12
    for ours, theirs in zip(*drawn, strict=True):
        assert ours[1] != theirs[1] and ours[2] != theirs[2]
    assert [row[0] for row in drawn[0]] != [row[0] for row in drawn[1]]
    flips = [[flipped for _, flipped in notes(tmp_path / "first", "keys", rank)] for rank in (0, 1)]
    assert set(flips[0]) == set(flips[1]) == {True, False} and flips[0] != flips[1]
    if kind == "i2v":
        dropped = [[row[3] for row in rows] for rows in drawn]
        assert set(dropped[0]) == set(dropped[1]) == {True, False} and dropped[0] != dropped[1]
    assert drawn == [notes(tmp_path / "again", "drawn", rank) for rank in (0, 1)]
    first, again = (load_file(tmp_path / name / "output" / script.LORA_FILE) for name in ("first", "again"))
    assert same_tensors(first, again)


@SHARED
def test_a_process_that_a_checkpoint_knows_nothing_of_draws_new_noise(run, launch, tmp_path):
    """Two processes go on from what one has left: the second one does not begin with the noise of a run's start."""
    run(**TWO | {"max_train_steps": 2}, checkpointing_steps=2)
    settings = TWO | {"max_train_steps": 4, "prepare": note_what_is_drawn}
    finish(launch(2, resume_from_checkpoint="latest", **settings))
    resumed = [row[1] for row in notes(tmp_path, "drawn", 1)]
    (tmp_path / "fresh").mkdir()
    finish(launch(2, output_dir=tmp_path / "fresh" / "output", **settings))
    fresh = [row[1] for row in notes(tmp_path / "fresh", "drawn", 1)]
    assert len(resumed) == 2 and len(fresh) == 4 and not set(resumed) & set(fresh)


def count_reductions(module) -> None:
    """Note each time that gradients go from process to process."""
    prepare = module.prepare

    def counting(*arguments):
        prepared = prepare(*arguments)
        ddp = prepared.transformer
        assert ddp.find_unused_parameters is False and ddp.broadcast_buffers is False

        def hook(_state, bucket):
            note(module, "reduced", bucket.buffer().numel())
            future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        ddp.register_comm_hook(None, hook)
        return prepared

    module.prepare = counting


def test_accumulation_synchronises_once_a_step(script, launch, tmp_path):
    """9 micro-batches in 3 steps: the gradients of the LoRA, and nothing else, are sent 3 times."""
    settings = TWO | {"max_train_steps": 3, "gradient_accumulation_steps": 3, "prepare": count_reductions}
    settings["gradient_checkpointing"] = True
    said = finish(launch(2, **settings | {"instance_data_root": tiny.make_clips(tmp_path / "clips", count=6)}))
    lora = load_file(tmp_path / "output" / script.LORA_FILE)
    for rank in (0, 1):
        assert sum(notes(tmp_path, "reduced", rank)) == 3 * sum(weight.numel() for weight in lora.values())
    assert not any("unused" in text for text in said)


def lengths(steps: int | None, epochs: int | None, accumulation: int) -> dict:
    return {"max_train_steps": steps, "num_train_epochs": epochs, "gradient_accumulation_steps": accumulation}


@SHARED
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("steps", "epochs"), [(5, None), (None, 2)])
def test_the_rate_ends_at_the_last_step_and_each_clip_comes_once_an_epoch(
    launch, tmp_path, processes, accumulation, steps, epochs
):
    """5 clips: 5 batches of one process, 3 of two, for which one clip comes twice."""
    clips = tiny.make_clips(tmp_path / "clips", count=5)
    schedule = {"lr_scheduler": "linear", "lr_warmup_steps": 1, "train_batch_size": 1, "precompute_dir": None}
    settings = lengths(steps, epochs, accumulation) | schedule | {"instance_data_root": clips}
    children = launch(processes, prepare=note_what_is_drawn, **settings)
    finish(children if processes > 1 else [children], [0] * processes)
    rows = read_metrics(tmp_path / "output")
    an_epoch = -(-5 // processes)  # batches of one process
    assert len(rows) == (steps or epochs * -(-an_epoch // accumulation))
    assert rows[0]["lr"] == pytest.approx(1e-3) and rows[-1]["lr"] == 0
    assert all(row["lr"] > 0 for row in rows[:-1])
    keys = [notes(tmp_path, "keys", rank)[:an_epoch] for rank in range(processes)]
    seen = [index for key in keys for index, _ in key]
    assert sorted(set(seen)) == list(range(5)) and len(seen) == an_epoch * processes


# ---- shares of what is encoded and sampled -------------------------------------------------------------------------


def draw_bars(module) -> None:
    """As on a terminal."""
    module.bar_style = lambda shown: {"disable": not shown}


def note_what_is_encoded(module) -> None:
    encode_video, encode_prompt = module.encode_video, module.encode_prompt

    def noting_video(vae, video):
        note(module, "videos" if len(video) > 1 else "images", video.double().sum().item())
        return encode_video(vae, video)

    def noting_prompt(tokenizer, text_encoder, prompt, *rest):
        note(module, "prompts", prompt)
        return encode_prompt(tokenizer, text_encoder, prompt, *rest)

    module.encode_video, module.encode_prompt = noting_video, noting_prompt
    draw_bars(module)


@pytest.mark.parametrize("count", [1, 5])
def test_each_item_is_encoded_once_in_all(launch, tmp_path, count):
    """Uneven counts, and fewer items than processes; a caption and a clip that come twice are one item each."""
    clips = tiny.make_clips(tmp_path / "clips", count=count)
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join([*lines, lines[0]]) + "\n")
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 1}
    said = finish(launch(2, prepare=note_what_is_encoded, random_flip=True, **settings))
    for name, items, files in [("prompts", count + 1, count + 1), ("videos", count, 2 * count)]:
        shares = [notes(tmp_path, name, rank) for rank in (0, 1)]
        assert len(shares[0] + shares[1]) == files, name
        assert abs(len(shares[0]) - len(shares[1])) <= files // items, name  # a clip and its mirror image go together
        if name == "prompts":
            assert sorted(shares[0] + shares[1]) == sorted({*(clips / "prompts.txt").read_text().splitlines(), ""})
        assert re.search(rf"Encoding {name}: 100%\|█+\| {items}/{items}", said[0])  # the bar is of both
        assert f"Encoding {name}" not in said[1]
    assert len(list((clips / ".cogvideox_precomputed" / "videos").iterdir())) == 2 * count
    assert not list((clips / ".cogvideox_precomputed").glob(".*"))


def slow_second(module, what: str) -> None:
    """Process 1 takes its time, the first time that it does `what`, a function of the script."""
    original, slept = getattr(module, what), []
    draw_bars(module)

    def slow(*arguments, **keywords):
        if os.environ["RANK"] == "1" and not slept:
            slept.append(time.sleep(5))
        return original(*arguments, **keywords)

    setattr(module, what, slow)


@SHARED
def test_no_collective_is_waited_in_while_another_process_encodes(launch, tmp_path):
    """It takes longer than any collective may."""
    clips = tiny.make_clips(tmp_path / "clips", count=2)
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None, "nccl_timeout": 3}
    for child in (children := launch(2, prepare=lambda module: slow_second(module, "encode_video"), **settings)):
        child.wait_for(lambda: "Encoding videos" in children[0].said())
    finish(children)


@SHARED
def test_no_collective_is_waited_in_while_another_process_samples(launch, tmp_path):
    ask = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 1, "validation_steps": 2}
    finish(launch(2, prepare=lambda module: slow_second(module, "log_validation"), nccl_timeout=3, **TWO | ask))
    assert len(list((tmp_path / "output" / "validation").iterdir())) == 4


def note_what_is_sampled(module) -> None:
    log_validation = module.log_validation

    def noting(*arguments):
        note(module, "sampled", arguments[8])
        return log_validation(*arguments)

    module.log_validation = noting


def test_validation_is_shared_out_and_comes_out_whole(run, launch, tmp_path):
    """Three prompts: each is sampled by one process, to the videos that one process alone makes, and the first one's
    tracker and card have them all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = "a red square:::a blue square:::a green square"
    ask = {"validation_prompt": prompts, "num_inference_steps": 2, "num_validation_videos": 2}
    output = run(**TWO, **ask, checkpointing_steps=4)
    alone = {file.name: file.read_bytes() for file in (output / "validation").iterdir()}
    for file in (*(output / "validation").iterdir(), *output.glob("final_video_*")):
        file.unlink()
    more = {"resume_from_checkpoint": "latest", "report_to": "tensorboard", "prepare": note_what_is_sampled}
    finish(launch(2, **TWO, **ask, **more))
    assert [notes(tmp_path, "sampled", rank) for rank in (0, 1)] == [
        ["a red square", "a green square"], ["a blue square"]
    ]  # fmt: skip
    assert {file.name: file.read_bytes() for file in (output / "validation").iterdir()} == alone and len(alone) == 6
    for index, file in enumerate(sorted(alone)):
        assert (output / f"final_video_{index}.mp4").read_bytes() == alone[file]
    (events,) = output.glob("logs/*/events*")
    shown = EventAccumulator(str(events)).Reload().Tags()["images"]
    assert sorted(shown) == sorted(f"validation/{name.split('_', 2)[2][:-4]}" for name in alone)


@SHARED
def test_a_process_that_cannot_sample_keeps_nobody_else_from_it(launch, tmp_path):
    def fail_in_the_first(module):
        log_validation = module.log_validation

        def failing(*arguments):
            if os.environ["RANK"] == "0":
                raise MemoryError("no room to sample in")
            return log_validation(*arguments)

        module.log_validation = failing

    ask = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 1}
    said = finish(launch(2, prepare=fail_in_the_first, **TWO | ask))
    assert "Validation failed; training is not affected" in said[0] and "no room to sample in" in said[0]
    (video,) = (tmp_path / "output" / "validation").iterdir()
    assert "prompt-1" in video.name and (tmp_path / "output" / "final_video_0.mp4").is_file()


# ---- a process that fails, or is lost ------------------------------------------------------------------------------


def end_second(module, what: str, action) -> None:
    """Process 1 does `action` in place of `what`, a function of the script."""
    original = getattr(module, what)
    setattr(module, what, lambda *a, **k: action() if os.environ["RANK"] == "1" else original(*a, **k))


def fail() -> None:
    raise ZeroDivisionError("a fault of the second process")


@SHARED
def test_an_error_of_one_process_is_told_by_all(launch, tmp_path):
    """A clip that only the second process finds broken is told as ever; an error without a name by those who wait."""
    clips = tiny.make_clips(tmp_path / "clips", count=4)
    (clips / "videos" / "01.mp4").write_bytes(b"no video")
    (clips / "videos" / "02.mp4").write_bytes(b"no video")
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None}
    said = finish(launch(2, machines=2, **settings), [2, 2])
    for text in said:
        assert "2 of 4 videos cannot be decoded" in text and "01.mp4" in text and "02.mp4" in text
        assert "Traceback" not in text
    children = launch(2, prepare=lambda module: end_second(module, "encode_videos", fail), **settings)
    said = finish(children, [5, 1])
    assert "process 1 on" in said[0] and "ZeroDivisionError: a fault of the second process" in said[0]
    assert "Traceback" not in said[0] and "Traceback" in said[1]


@SHARED
def test_a_process_lost_while_encoding_is_missed(launch, tmp_path):
    clips = tiny.make_clips(tmp_path / "clips", count=4)
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None, "nccl_timeout": 4}
    kill = lambda module: end_second(module, "encode_videos", lambda: os.kill(os.getpid(), signal.SIGKILL))  # noqa: E731
    said = finish(launch(2, prepare=kill, **settings), [5, -9], seconds=60)
    assert "process 1 has given no sign of life for 4 seconds" in said[0] and "Traceback" not in said[0]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("where", ["in a step", "in a validation"])
def test_losing_a_machine_leaves_a_checkpoint(script, launch, tmp_path, lost, where):
    """Whichever of the two it is, the other one writes what all have learned, says what happened, and ends; the run
    goes on from there."""

    def lose(module):
        if os.environ["RANK"] != str(lost):
            return
        if where == "in a validation":
            module.log_validation = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            return
        diffusion_loss, calls = module.diffusion_loss, []

        def deadly(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return diffusion_loss(*arguments, **keywords)

        module.diffusion_loss = deadly

    settings = TWO | {"max_train_steps": 6, "nccl_timeout": 6}
    ask = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 1, "validation_steps": 3}
    if where == "in a step":
        ask = {}
    children = launch(2, machines=2, prepare=lose, **settings, **ask)
    codes = [5, 5]
    codes[lost] = -9
    said = finish(children, codes, seconds=60)[1 - lost]
    (checkpoint,) = script.list_checkpoints(tmp_path / "output")
    assert checkpoint.name == "checkpoint-3" and f"Saved {checkpoint}" in said
    assert "--resume_from_checkpoint latest (checkpoint-3)" in said and "Traceback" not in said
    assert ("a process of this run is gone" in said) or ("sign of life" in said) or ("the first process" in said)
    finish(launch(2, machines=2, **settings, resume_from_checkpoint="latest"))
    assert [row["step"] for row in read_metrics(tmp_path / "output")][-3:] == [4, 5, 6]
    assert not list((tmp_path / "output").glob(".*"))


def test_a_crash_leaves_a_checkpoint_of_the_last_whole_step(script, run, launch, tmp_path):
    """And what goes on from there is the run that did not crash, to the bit; loading processes keep nobody waiting."""

    def crash(module):
        backward, calls = module.Accelerator.backward, []

        def crashing(self, loss):
            calls.append(1)
            if len(calls) == 5:  # the first micro-batch of the third step
                raise torch.OutOfMemoryError("no room for this step")
            backward(self, loss)

        module.Accelerator.backward = crashing

    settings = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    child = launch(prepare=crash, dataloader_num_workers=2, **settings)
    assert child.wait(60) == 1
    assert "OutOfMemoryError: no room for this step" in child.said() and "Traceback" in child.said()
    (checkpoint,) = script.list_checkpoints(tmp_path / "output")
    assert checkpoint.name == "checkpoint-2" and "--resume_from_checkpoint latest (checkpoint-2)" in child.said()
    resumed = run(resume_from_checkpoint="latest", **settings)
    whole = run(output_dir=tmp_path / "whole", **settings)
    assert same_tensors(load_file(resumed / script.LORA_FILE), load_file(whole / script.LORA_FILE))


@SHARED
def test_an_error_while_the_weights_change_leaves_no_checkpoint(script, launch, tmp_path):
    """They are of no step then: the third step fails when a part of it may have been taken."""

    def crash(module):
        get_optimizer = module.get_optimizer

        def breaking(*arguments, **keywords):
            optimizer, steps = get_optimizer(*arguments, **keywords), []
            optimizer.register_step_pre_hook(lambda *_: steps.append(1) if len(steps) < 2 else fail())
            return optimizer

        module.get_optimizer = breaking

    child = launch(prepare=crash, max_train_steps=4)
    assert child.wait(60) == 1 and "a fault of the second process" in child.said()
    assert script.list_checkpoints(tmp_path / "output") == []


@SHARED
def test_a_folder_that_is_not_shared_is_said_at_once(launch, tmp_path):
    """The second machine looks into a folder of its own."""

    def elsewhere(module):
        module.SHARED_SECONDS = 1
        if os.environ["RANK"] == "1":
            get_args = module.get_args
            module.get_args = lambda *a: argparse_with(get_args(*a), output_dir=str(tmp_path / "own"))

    said = finish(launch(2, machines=2, prepare=elsewhere, **TWO), [2, 2])
    for text in said:
        assert "--output_dir must be one folder for all machines" in text and "Traceback" not in text


def argparse_with(args, **changes):
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@SHARED
def test_processes_that_do_not_find_each_other_say_so(launch):
    """The second one is never started."""
    first, second = launch(2, nccl_timeout=3, prepare=lambda _: os.environ["RANK"] == "1" and os._exit(9))
    assert (first.wait(60), second.wait(60)) == (5, 9)
    assert "did not find each other at 127.0.0.1:" in first.said() and "Traceback" not in first.said()


def processes_of(launcher: subprocess.Popen) -> list[int]:
    """A launcher and its processes, which have sessions of their own."""
    if launcher.poll() is not None:
        return []
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [launcher.pid, *map(int, children)]


@SHARED
def test_two_launchers_train_one_model_and_the_loss_of_one_ends_the_other(script, flags, tmp_path):
    """As on two machines: torchrun twice, each with one process; then one of them goes, launcher and all."""
    words = flags(**TWO | {"max_train_steps": 100_000, "nccl_timeout": 20})
    launchers = []
    for rank in (0, 1):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank),
            "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(40_000 + os.getpid() % 20_000),
            str(ROOT / f"{script.__name__}.py"), *words,
        ]  # fmt: skip
        log = (tmp_path / f"log-{rank}").open("wb")
        launchers.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
    try:
        metrics, deadline = tmp_path / "output" / "metrics.jsonl", time.monotonic() + 150
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
            assert time.monotonic() < deadline and [one.poll() for one in launchers] == [None, None], (
                (tmp_path / "log-0").read_text()[-3000:]
            )
            time.sleep(0.1)
        for pid in processes_of(launchers[1]):
            os.kill(pid, signal.SIGKILL)
        assert launchers[0].wait(60) == 1  # torchrun's own code
    finally:
        for launcher in launchers:
            for pid in processes_of(launcher):
                os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "log-0").read_text()
    assert "error: a process of this run is gone, or out of reach" in said and "exitcode  : 5" in said
    (checkpoint,) = script.list_checkpoints(tmp_path / "output")
    # The other may have gone after a step and before its losses were added up: that step is whole, and has no line.
    step = read_metrics(tmp_path / "output")[-1]["step"]
    assert checkpoint.name in (f"checkpoint-{step}", f"checkpoint-{step + 1}")
    assert f"--resume_from_checkpoint latest ({checkpoint.name})" in said
