"""Two processes over gloo: what they share out, what each draws for itself, how they wait for each other, and what
happens when one of them is lost."""

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
from accelerate import Accelerator
from conftest import BOTH, ROOT
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from test_interruptions import at_call, checkpoints
from test_training import read_metrics, same_tensors
from transformers import T5EncoderModel

TWO = {"train_batch_size": 1, "max_train_steps": 4}


def note(folder: Path, name: str, row) -> None:
    """Append a line to a file of this process."""
    with (folder / f"{name}-{os.environ.get('RANK', 0)}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def notes(folder: Path, name: str, rank: int) -> list:
    path = folder / f"{name}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(children, codes=(0, 0), seconds: float = 120) -> list[str]:
    """Wait for all; what they printed."""
    found = tuple(child.wait(seconds) for child in children)
    assert found == tuple(codes), [child.said()[-3000:] for child in children]
    return [child.said() for child in children]


def in_rank(rank: int, owner: type, method: str, number: int, action):
    """For `launch(prepare=...)`: one process does `action` before the `number`-th call of a library's method."""
    return lambda _: at_call(owner, method, number, action) if os.environ["RANK"] == str(rank) else None


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- one step learned together -------------------------------------------------------------------------------------


def draw_by_clip(_script) -> None:
    """What is random in a step depends on the clip alone: not on its process, nor on its place in the batch."""
    randn = torch.randn

    def randn_like(latents):
        seeds = [int(item.double().abs().sum() * 1e3) for item in latents]
        return torch.stack([randn(latents.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])

    torch.randn_like = randn_like
    torch.randint = lambda low, high, size, **_: torch.full(size, (low + high) // 2)
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()  # noqa: ARG005


def test_two_processes_learn_what_one_learns_from_twice_the_batch(script, launch, tmp_path):
    """On the same clips, noise and timesteps. A large epsilon of the optimizer keeps rounding small."""
    settings = {"prepare": draw_by_clip, "max_train_steps": 6, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    finish([launch(output_dir=tmp_path / "one", train_batch_size=2, **settings)], [0])
    finish(launch(2, output_dir=tmp_path / "two", train_batch_size=1, **settings))
    one, two = (load_file(tmp_path / name / script.LORA_FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-7, msg=name)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 6


def note_inputs(folder: Path):
    """Notes what the transformer is given: timesteps, sum of the latents, and whether image latents are zero."""

    def prepare(_script) -> None:
        forward = CogVideoXTransformer3DModel.forward

        def spy(self, **inputs):
            states = inputs["hidden_states"]
            row = [inputs["timestep"].tolist(), states[:, :, :4].sum().item(), not states[:, :, 4:].any()]
            note(folder, "inputs", row)
            return forward(self, **inputs)

        CogVideoXTransformer3DModel.forward = spy

    return prepare


@BOTH
def test_each_process_draws_its_own_and_one_seed_repeats_all(script, kind, launch, tmp_path):
    settings = TWO | {"random_flip": True, "max_train_steps": 12}
    if kind == "i2v":
        settings["noised_image_dropout"] = 0.5
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        finish(launch(2, output_dir=tmp_path / name / "out", prepare=note_inputs(tmp_path / name), **settings))
    drawn = [notes(tmp_path / "first", "inputs", rank) for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 12
    assert all(first[1] != second[1] for first, second in zip(*drawn, strict=True))
    assert [row[0] for row in drawn[0]] != [row[0] for row in drawn[1]]
    if kind == "i2v":
        dropped = [[row[2] for row in rows] for rows in drawn]
        assert set(dropped[0]) == set(dropped[1]) == {True, False} and dropped[0] != dropped[1]
    assert drawn == [notes(tmp_path / "again", "inputs", rank) for rank in (0, 1)]
    assert same_tensors(*(load_file(tmp_path / name / "out" / script.LORA_FILE) for name in ("first", "again")))


def test_a_process_without_random_state_in_the_checkpoint_draws_new_noise(run, launch, tmp_path):
    """Two processes resume what one process left: the second one does not draw the noise of the run's start again."""
    run(**TWO | {"max_train_steps": 2})
    settings = TWO | {"max_train_steps": 4}
    finish(launch(2, resume_from_checkpoint="latest", prepare=note_inputs(tmp_path), **settings))
    (tmp_path / "fresh").mkdir()
    prepare = note_inputs(tmp_path / "fresh")
    finish(launch(2, output_dir=tmp_path / "fresh" / "output", prepare=prepare, **settings))
    resumed, fresh = ([row[1] for row in notes(folder, "inputs", 1)] for folder in (tmp_path, tmp_path / "fresh"))
    assert len(resumed) == 2 and len(fresh) == 4 and not set(resumed) & set(fresh)


def note_reductions(folder: Path):
    """Notes each time that gradients are sent between the processes."""

    def prepare(_script) -> None:
        original = Accelerator.prepare

        def counting(self, *arguments, **keywords):
            ddp, *others = original(self, *arguments, **keywords)
            assert ddp.find_unused_parameters is False and ddp.broadcast_buffers is False

            def hook(_state, bucket):
                note(folder, "reduced", bucket.buffer().numel())
                future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
                return future.then(lambda done: done.value()[0])

            ddp.register_comm_hook(None, hook)
            return ddp, *others

        Accelerator.prepare = counting

    return prepare


def test_accumulation_synchronises_once_a_step(script, launch, tmp_path):
    """9 micro-batches in 3 steps: the gradients of the LoRA, and nothing else, are sent 3 times."""
    settings = TWO | {"max_train_steps": 3, "gradient_accumulation_steps": 3, "gradient_checkpointing": True}
    settings["instance_data_root"] = tiny.make_clips(tmp_path / "clips", count=6)
    said = finish(launch(2, prepare=note_reductions(tmp_path), **settings))
    lora = load_file(tmp_path / "output" / script.LORA_FILE)
    for rank in (0, 1):
        assert sum(notes(tmp_path, "reduced", rank)) == 3 * sum(weight.numel() for weight in lora.values())
    assert not any("unused" in text for text in said)


@pytest.mark.parametrize("length", [{"max_train_steps": 5}, {"max_train_steps": None, "num_train_epochs": 2}])
def test_rate_ends_at_the_last_step(launch, tmp_path, length):
    """5 clips and two processes: 3 batches an epoch in each, in 2 steps."""
    clips = tiny.make_clips(tmp_path / "clips", count=5)
    schedule = {"lr_scheduler": "linear", "lr_warmup_steps": 1, "train_batch_size": 1, "precompute_dir": None}
    finish(launch(2, **length, **schedule, gradient_accumulation_steps=2, instance_data_root=clips))
    rows = read_metrics(tmp_path / "output")
    assert len(rows) == (5 if length["max_train_steps"] else 4)
    assert rows[0]["lr"] == pytest.approx(1e-3) and rows[-1]["lr"] == 0
    assert all(row["lr"] > 0 for row in rows[:-1])


# ---- shares of what is encoded and sampled -------------------------------------------------------------------------


def note_encoding(folder: Path):
    def prepare(_script) -> None:
        encode, forward = AutoencoderKLCogVideoX.encode, T5EncoderModel.forward

        def encode_and_note(self, pixels):
            note(folder, "videos", pixels.double().sum().item())
            return encode(self, pixels)

        def forward_and_note(self, ids, **keywords):
            note(folder, "prompts", ids.tolist())
            return forward(self, ids, **keywords)

        AutoencoderKLCogVideoX.encode, T5EncoderModel.forward = encode_and_note, forward_and_note

    return prepare


@pytest.mark.parametrize("count", [1, 5])
def test_each_item_is_encoded_once_in_all(launch, tmp_path, count):
    """Uneven counts, and fewer items than processes; a caption and a clip that come twice are one item each."""
    clips = tiny.make_clips(tmp_path / "clips", count=count)
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join([*lines, lines[0]]) + "\n")
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None, "max_train_steps": 1}
    finish(launch(2, prepare=note_encoding(tmp_path), random_flip=True, **settings))
    for name, files, most in (("prompts", count + 1, 1), ("videos", 2 * count, 2)):  # a clip and its mirror image
        shares = [notes(tmp_path, name, rank) for rank in (0, 1)]
        assert len(shares[0] + shares[1]) == files, name
        assert abs(len(shares[0]) - len(shares[1])) <= most, name
    assert len(list((clips / ".cogvideox_precomputed" / "videos").iterdir())) == 2 * count


def test_waiting_for_a_process_that_encodes_has_no_timeout(launch, tmp_path):
    """It takes longer than any collective of a training step may."""
    clips = tiny.make_clips(tmp_path / "clips", count=2)
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None, "nccl_timeout": 3}
    finish(launch(2, prepare=in_rank(1, AutoencoderKLCogVideoX, "encode", 1, lambda: time.sleep(5)), **settings))


def test_waiting_for_a_process_that_samples_has_no_timeout(launch, tmp_path):
    ask = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 1, "nccl_timeout": 3}
    finish(launch(2, prepare=in_rank(1, CogVideoXDPMScheduler, "step", 1, lambda: time.sleep(5)), **TWO | ask))
    assert len(list((tmp_path / "output" / "validation").iterdir())) == 4


def test_validation_is_shared_out_and_complete(run, launch):
    """Three prompts: the videos are those that one process alone makes, and the tracker and the card have them all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = "a red square:::a blue square:::a green square"
    ask = {"validation_prompt": prompts, "num_inference_steps": 2, "num_validation_videos": 2}
    output = run(**TWO, **ask)
    alone = {file.name: file.read_bytes() for file in (output / "validation").glob("test_*")}
    for file in (*(output / "validation").iterdir(), *output.glob("final_video_*"), *output.glob("*.safetensors")):
        file.unlink()  # without its LoRA, the run goes on to its end
    said = finish(launch(2, **TWO, **ask, resume_from_checkpoint="latest", report_to="tensorboard"))
    assert {file.name: file.read_bytes() for file in (output / "validation").iterdir()} == alone and len(alone) == 6
    assert re.findall(r"Sampled prompt (\d)", said[0]) == ["1", "3"]
    for index, file in enumerate(sorted(alone)):
        assert (output / f"final_video_{index}.mp4").read_bytes() == alone[file]
    (events,) = output.glob("logs/*/events*")
    shown = EventAccumulator(str(events)).Reload().Tags()["images"]
    assert sorted(shown) == sorted(f"validation/{name.split('_', 2)[2][:-4]}" for name in alone)


def test_a_process_that_cannot_sample_does_not_stop_the_others(launch, tmp_path):
    def fail() -> None:
        raise MemoryError("no memory to sample")

    ask = {"validation_prompt": "a red square:::a blue square", "num_inference_steps": 1}
    said = finish(launch(2, prepare=in_rank(0, CogVideoXDPMScheduler, "step", 1, fail), **TWO | ask))
    assert "Validation failed; training does not depend on it: MemoryError: no memory to sample" in said[0]
    names = sorted(video.name for video in (tmp_path / "output" / "validation").iterdir())
    assert names == [  # it fails before the first step, and samples at the end
        *(f"test_step-000004_prompt-{index}_video-0.mp4" for index in (0, 1)),
        "validation_step-000000_prompt-1_video-0.mp4",
    ]
    assert (tmp_path / "output" / "final_video_0.mp4").is_file()


# ---- a process that fails, or is lost ------------------------------------------------------------------------------


def test_a_wrong_input_of_one_process_ends_all_with_its_message(launch, tmp_path):
    """The second process decodes clips 1 and 3."""
    clips = tiny.make_clips(tmp_path / "clips", count=4)
    (clips / "videos" / "01.mp4").write_bytes(b"no video")
    settings = TWO | {"instance_data_root": clips, "precompute_dir": None}
    for text in finish(launch(2, machines=2, **settings), [2, 2]):
        assert "1 of 4 videos cannot be decoded" in text and "01.mp4" in text and "Traceback" not in text
    (clips / "videos" / "01.mp4").write_bytes((clips / "videos" / "00.mp4").read_bytes() + bytes(8))  # not encoded yet
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, -1))"
    prepare = in_rank(0, AutoencoderKLCogVideoX, "encode", 1, lambda: exec(limit))
    for text in finish(launch(2, machines=2, prepare=prepare, **settings), [2, 2]):
        assert "cannot be written" in text and "--precompute_dir" in text and "Traceback" not in text


LOST = {  # and which of the two processes it is
    "encoding": (1, AutoencoderKLCogVideoX, "encode", {}),
    "in a step": (0, Accelerator, "backward", {}),
    "in a step, the second": (1, Accelerator, "backward", {}),
    "sampling": (0, CogVideoXDPMScheduler, "step", {"validation_prompt": "a:::b", "validation_steps": 1}),
}


@pytest.mark.parametrize("where", LOST)
def test_a_lost_process_ends_the_others(launch, tmp_path, where):
    rank, owner, method, more = LOST[where]
    settings = TWO | {"instance_data_root": tiny.make_clips(tmp_path / "clips"), "precompute_dir": None} | more
    children = launch(2, prepare=in_rank(rank, owner, method, 2, kill_itself), num_inference_steps=3, **settings)
    codes = [5, 5]
    codes[rank] = -signal.SIGKILL
    said = finish(children, codes, seconds=60)[1 - rank]
    assert "error: another process of this run was lost" in said and "Traceback" not in said
    assert "--resume_from_checkpoint latest" in said


def test_processes_that_see_no_gpu_are_refused(launch):
    """accelerate takes each of them for the only one, and all would write to one folder."""
    for child in launch(2, prepare=lambda _: os.environ.pop("ACCELERATE_USE_CPU"), **TWO):
        assert child.wait() == 2
        assert ("torch sees no GPU" in child.said()) == (child.log.name == "log-0")


def lack_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("where", ["encoding", "in a step", "in a step, the second"])
def test_who_alone_runs_out_of_memory_says_so(launch, tmp_path, where):
    """On its own line and in its own log; the others say which one has ended, and of what."""
    rank, owner, method, more = LOST[where]
    settings = TWO | {"instance_data_root": tiny.make_clips(tmp_path / "clips"), "precompute_dir": None} | more
    children = launch(2, prepare=in_rank(rank, owner, method, 2, lack_memory), **settings)
    codes = [5, 5]
    codes[rank] = 6
    said = finish(children, codes, seconds=60)
    problem = "the device has too little memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert f"rank {rank}: error: {problem}" in said[rank] and "--gradient_checkpointing" in said[rank]
    assert f"rank {rank} ended: {problem}" in said[1 - rank] and "was lost" in said[1 - rank]
    log = (tmp_path / "output" / ("train.rank1.log" if rank else "train.log")).read_text()
    assert f" ERROR {problem}" in log.splitlines()[-1]
    assert "Traceback" not in "".join(said)


def test_processes_that_only_noticed_an_end_are_not_named_as_its_cause(script, monkeypatch, tmp_path):
    """Of four: the third one has failed, the second one has noticed that first, the last one's log is of an earlier
    run."""
    line = "2026-11-28 07:00:00,123"
    (tmp_path / "train.rank3.log").write_text(f"{line} ERROR of an earlier run\n")
    os.utime(tmp_path / "train.rank3.log", (1, 1))
    (tmp_path / ".lock").write_text("")
    (tmp_path / "train.log").write_text(f"{line} ERROR a sample failed\n{line} INFO Saved checkpoint-1\n")
    (tmp_path / "train.rank1.log").write_text(f"{line} ERROR {script.OTHER_LOST}, or did not start (closed).\n")
    (tmp_path / "train.rank2.log").write_text(f"{line} ERROR the first\n{line} ERROR the last:\n  - ERROR of a clip\n")
    for name, value in {"WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    expected = f"rank 2 ended: the last:\n  - ERROR of a clip ({tmp_path / 'train.rank2.log'})"
    assert script.last_errors(tmp_path) == [expected]


def test_what_ends_all_processes_is_said_once(launch, tmp_path):
    """By the first process of the machine; the other one leaves no log."""
    first, second = finish(launch(2, **TWO, learning_rate=1e30, max_grad_norm=1e30), [3, 3])
    assert first.count("error: step ") == 1 and "error" not in second
    assert not list((tmp_path / "output").glob("train.rank*.log"))


@pytest.mark.slow
def test_launcher_restarts_after_a_lost_process(script, flags, launch, tmp_path):
    """The run ends with the weights of a run without a loss."""
    settings = TWO | {"max_train_steps": 60, "checkpointing_steps": 10}
    finish(launch(2, output_dir=tmp_path / "never", **settings))
    words = flags(**settings, resume_from_checkpoint="latest", output_dir=tmp_path / "killed")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1",
        "--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file", str(ROOT / f"{script.__name__}.py"), *words,
    ]  # fmt: skip
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 150
        while not checkpoints(tmp_path / "killed"):
            assert time.monotonic() < deadline and launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert launcher.wait(150) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert "Resumed" in (tmp_path / "log").read_text()
    assert same_tensors(*(load_file(tmp_path / name / script.LORA_FILE) for name in ("never", "killed")))


def test_a_folder_that_is_not_shared_is_refused(launch, tmp_path):
    """The second machine has a folder of its own by the same name."""

    def elsewhere(_script) -> None:
        if os.environ["RANK"] == "1":
            (tmp_path / "other").mkdir()
            os.chdir(tmp_path / "other")

    for text in finish(launch(2, machines=2, prepare=elsewhere, output_dir="mine", **TWO), [2, 2]):
        assert "--output_dir and --precompute_dir must be folders that all machines share" in text
        assert "Traceback" not in text


def test_processes_that_do_not_find_each_other(launch):
    """The second one is never started."""
    first, second = launch(2, nccl_timeout=3, prepare=lambda _: os.environ["RANK"] == "1" and os._exit(9))
    assert (first.wait(60), second.wait(60)) == (5, 9)
    assert "was lost, or did not start" in first.said() and "Traceback" not in first.said()
