"""Whole runs: what clips, optimizers and schedules train, what the loop costs, and what it leaves."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_objective import record_inputs


def read_metrics(output, name: str = "loss") -> list[dict]:
    """The lines of metrics.jsonl that have `name`: those of the steps, or of "validation/loss"."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if name in row]


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def mixed_clips(tmp_path):
    """1, 2, 5 and 12 frames, portrait, other rates; captions alike but for a number."""
    folder = tmp_path / "mixed"
    shapes = [(1, 64, 96, 8), (2, 64, 96, 8), (5, 64, 96, 24), (12, 64, 96, 8), (9, 160, 96, 30), (9, 90, 160, 29.97)]
    for index, (frames, height, width, fps) in enumerate(shapes):
        tiny.write_clip(folder / f"{index}.mp4", tiny.moving_square(frames, height, width), fps)
    (folder / "videos.txt").write_text("".join(f"{index}.mp4\n" for index in range(len(shapes))))
    (folder / "prompts.txt").write_text("".join(f"a red square {index}\n" for index in range(len(shapes))))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_of_all_lengths_train_together(run, mixed_clips, monkeypatch, workers):
    calls = record_inputs(monkeypatch)
    run(
        instance_data_root=mixed_clips, precompute_dir=None, dataloader_num_workers=workers, max_train_steps=None,
        num_train_epochs=2,
    )  # fmt: skip
    shapes = [tuple(call["hidden_states"].shape[:2]) for call in calls]
    # latent frames: 1, 1 | 2 | 3 (12 frames are cut to 9), 3, 3 -> at batch size 2: (2, 1), (1, 2), (2, 3), (1, 3)
    assert sorted(shapes) == sorted([(2, 1), (1, 2), (2, 3), (1, 3)] * 2)


OPTIMIZERS = [(name, use_8bit) for name in ("adam", "adamw", "prodigy") for use_8bit in (False, True)]


@pytest.mark.parametrize(("optimizer", "use_8bit_adam"), OPTIMIZERS)
def test_optimizers_step(script, flags, optimizer, use_8bit_adam):
    args = script.get_args(flags(optimizer=optimizer, use_8bit_adam=use_8bit_adam, learning_rate=1.0))
    parameter = torch.nn.Parameter(torch.ones(64, 64))  # 8-bit states begin at 4096 elements
    made = script.get_optimizer(args, [{"params": [parameter]}])
    name = {"adam": "Adam", "adamw": "AdamW", "prodigy": "Prodigy"}[optimizer]
    name += "8bit" if use_8bit_adam and optimizer != "prodigy" else ""
    assert type(made).__name__ == name
    parameter.square().sum().backward()
    made.step()
    assert parameter.isfinite().all() and not torch.equal(parameter, torch.ones(64, 64))
    dtypes = {state.dtype for state in made.state[parameter].values() if isinstance(state, torch.Tensor)}
    assert (torch.uint8 in dtypes) == name.endswith("8bit")


def test_optimizer_settings_reach_it(script, flags):
    words = flags(optimizer="adamw", adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5, adam_weight_decay=0.3)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = script.get_optimizer(script.get_args(words), parameters)
    settings = {key: optimizer.defaults[key] for key in ("betas", "eps", "weight_decay", "lr")}
    assert settings == {"betas": (0.8, 0.7), "eps": 1e-5, "weight_decay": 0.3, "lr": 1e-3}
    words = flags(
        optimizer="prodigy", prodigy_beta3=0.6, prodigy_decouple=True, prodigy_use_bias_correction=True,
        prodigy_safeguard_warmup=True,
    )  # fmt: skip
    group = script.get_optimizer(script.get_args(words), parameters).param_groups[0]
    assert (group["beta3"], group["use_bias_correction"], group["safeguard_warmup"]) == (0.6, True, True)
    assert group["decouple"]


SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_warm_up_and_reach_their_end(script, flags, schedule):
    args = script.get_args(flags(lr_scheduler=schedule, lr_warmup_steps=2, learning_rate=1e-3))
    _, optimizer, lr_scheduler = script.prepare(args, Accelerator(), torch.nn.Linear(1, 1), 6)
    rates = []
    for _ in range(6):
        optimizer.step()
        lr_scheduler.step()
        rates.append(lr_scheduler.get_last_lr()[0])
    if schedule == "constant":
        assert rates == [1e-3] * 6
    else:
        assert rates[:2] == pytest.approx([5e-4, 1e-3])  # after step 1 of 2, after step 2
        end = {"constant_with_warmup": 1e-3, "polynomial": 1e-7}.get(schedule, 0)
        assert rates[-1] == pytest.approx(end, abs=1e-9)


def test_schedule_ends_with_the_last_epoch(run):
    """4 clips at batch size 1 and accumulation 3: 2 steps an epoch, the second one of what is left."""
    steps = {"train_batch_size": 1, "gradient_accumulation_steps": 3, "max_train_steps": None, "num_train_epochs": 3}
    rates = [row["lr"] for row in read_metrics(run(lr_scheduler="linear", lr_warmup_steps=2, **steps))]
    assert rates == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0], abs=1e-9)


def test_scale_lr(run):
    rows = read_metrics(run(scale_lr=True, train_batch_size=2, gradient_accumulation_steps=2))
    assert rows[0]["lr"] == pytest.approx(4e-3)


def test_every_clip_once_an_epoch_in_a_new_order(script):
    shapes = [(8, 3, 4, 4)] * 7 + [(8, 1, 4, 4)] * 4
    sampler = script.ShapeBatchSampler(dict(enumerate(shapes)), 3, seed=0, random_flip=True)
    orders = []
    for epoch in range(3):
        sampler.epoch = epoch
        batches = list(sampler)
        assert len(batches) == len(sampler) == 5
        assert all(len({shapes[index] for index, *_ in batch}) == 1 for batch in batches)
        orders.append([index for batch in batches for index, *_ in batch])
        assert sorted(orders[-1]) == list(range(11))
        sampler.first_batch = 2
        assert list(sampler) == batches[2:]
        sampler.first_batch = 0
    assert len({tuple(order) for order in orders}) == 3


def test_flips_are_drawn_clip_by_clip_and_are_mirror_images(script, run, clips, tmp_path):
    run(instance_data_root=clips, precompute_dir=tmp_path / "pre", random_flip=True, max_train_steps=1)
    shapes = dict.fromkeys(range(100), (8, 3, 8, 12))
    sampler = script.ShapeBatchSampler(shapes, 1, seed=0, random_flip=True)
    flips = [flipped for ((_, flipped, _),) in sampler]
    assert 30 < sum(flips) < 70
    sampler = script.ShapeBatchSampler(shapes, 1, seed=0)
    assert not any(flipped for ((_, flipped, _),) in sampler)

    args = script.get_args(["--pretrained_model_name_or_path", "m", "--random_flip"])
    assert args.random_flip
    video = script.VideoDataset(str(clips), None, None, "prompts.txt", "videos.txt", 64, 96)[0]["instance_video"]
    vae = tiny.make_vae()
    stored = [load_file(file)["moments"] for file in (tmp_path / "pre" / "videos").iterdir()]
    for pixels in (video, video.flip(-1)):
        moments = script.encode_video(vae, pixels)
        assert min((moments - other).abs().max().item() for other in stored) < 1e-5


def test_text_encoder_runs_once_a_prompt_and_rotary_once_a_shape(script, run, clips, monkeypatch, tmp_path):
    from transformers import T5EncoderModel

    calls = {"t5": 0, "rotary": 0}
    forward, rotary = T5EncoderModel.forward, script.get_3d_rotary_pos_embed

    def spy_forward(self, *args, **kwargs):
        calls["t5"] += 1
        return forward(self, *args, **kwargs)

    def spy_rotary(*args, **kwargs):
        calls["rotary"] += 1
        return rotary(*args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", spy_forward)
    monkeypatch.setattr(script, "get_3d_rotary_pos_embed", spy_rotary)
    script.cached_rotary_positions.cache_clear()
    run(
        instance_data_root=clips, precompute_dir=tmp_path / "pre", max_train_steps=None, num_train_epochs=4,
        validation_prompt="a red square moves right:::a red square moves right", validation_epochs=2,
        num_inference_steps=1,
    )  # fmt: skip
    assert calls == {"t5": 5, "rotary": 1}  # four captions and the empty prompt; all clips have one shape


def test_nothing_waits_for_the_device_between_optimizer_steps(run, clips, monkeypatch):
    """As many host synchronisations in 3 steps of 4 micro-batches as in 3 steps of 1."""
    (clips / "prompts.txt").write_text("a red square\n" * 12)
    (clips / "videos.txt").write_text("videos/00.mp4\n" * 12)
    counts = {}
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)

    def count(accumulation) -> dict:
        counts.clear()
        run(
            instance_data_root=clips, precompute_dir=None, train_batch_size=1, max_train_steps=3, max_grad_norm=0.5,
            gradient_accumulation_steps=accumulation, gradient_checkpointing=True,
        )  # fmt: skip
        return dict(counts)

    count(1)  # precompute, first uses
    assert count(4) == count(1)
    assert counts["tolist"] >= 3  # the spy sees the loop's own reading of the loss


def test_metrics_file_is_the_run(run):
    rows = read_metrics(run(max_train_steps=3, gradient_accumulation_steps=2, train_batch_size=1))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row.keys() == {"step", "loss", "lr", "grad_norm", "seconds", "memory"} for row in rows)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["seconds"] > 0 for row in rows)


def test_logged_loss_is_the_mean_over_the_micro_batches(script, run, monkeypatch):
    losses = []
    diffusion_loss = script.diffusion_loss
    monkeypatch.setattr(script, "diffusion_loss", lambda *args: losses.append(diffusion_loss(*args)) or losses[-1])
    rows = read_metrics(run(max_train_steps=2, gradient_accumulation_steps=2, train_batch_size=1))
    losses = [loss.item() for loss in losses]
    assert len(losses) == 4
    assert [row["loss"] for row in rows] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


def test_same_seed_same_weights_and_another_seed_others(script, run, tmp_path):
    settings = {"video_reshape_mode": "random", "random_flip": True}
    first, again, zero = (
        load_file(run(output_dir=tmp_path / name, seed=seed, **settings) / script.LORA_FILE)
        for name, seed in (("a", 5), ("b", 5), ("c", 0))
    )
    assert same_tensors(first, again) and not same_tensors(first, zero)


def test_training_lowers_the_loss(run, clips):
    """Overfitting one still clip: the mean loss of the last steps is clearly lower than that of the first."""
    (clips / "prompts.txt").write_text("a red square moves right\n")
    (clips / "videos.txt").write_text("videos/00.mp4\n")
    output = run(
        instance_data_root=clips, precompute_dir=None, rank=16, lora_alpha=32, learning_rate=2e-2, train_batch_size=1,
        max_train_steps=150, optimizer="adamw",
    )  # fmt: skip
    losses = [row["loss"] for row in read_metrics(output)]
    assert sum(losses[-40:]) / 40 < 0.97 * sum(losses[:20]) / 20, (losses[:20], losses[-40:])


def test_checkpoints_are_whole_pruned_and_found(script, run, tmp_path, caplog):
    output = run(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]
    assert not (output / "checkpoint-5" / "model.safetensors").exists()  # the LoRA, not the frozen base
    assert [path.name for path in output.glob(".*")] == [".lock"]

    args = script.get_args(["--pretrained_model_name_or_path", "m", "--output_dir", str(output)])
    for wanted, found in [
        ("latest", "checkpoint-5"), ("checkpoint-4", "checkpoint-4"), (f"{output}/checkpoint-4/", "checkpoint-4"),
    ]:  # fmt: skip
        args.resume_from_checkpoint = wanted
        assert script.find_checkpoint(args, {"engine": "replicated"}) == output / found
    (output / "checkpoint-9").mkdir()  # what a kill in the middle of a copy leaves
    args.resume_from_checkpoint = "latest"
    assert script.find_checkpoint(args, {"engine": "replicated"}) == output / "checkpoint-5"
    args.output_dir = str(tmp_path / "other")
    assert script.find_checkpoint(args, {"engine": "replicated"}) is None
    with caplog.at_level("INFO"):
        run(output_dir=tmp_path / "fresh", resume_from_checkpoint="latest")
    assert "fresh start" in caplog.text


def test_finished_run_resumes_to_a_clean_end(script, run):
    output = run(max_train_steps=2, checkpointing_steps=1)
    before = load_file(output / script.LORA_FILE)
    (output / script.LORA_FILE).unlink()
    run(max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert same_tensors(before, load_file(output / script.LORA_FILE))


def test_loss_that_is_not_finite_ends_the_run(script, run):
    with pytest.raises(script.RunError) as error:
        run(learning_rate=1e30, max_train_steps=20, checkpointing_steps=1)
    assert error.value.exit_code == 3
    assert "checkpoint-" in str(error.value) and "--learning_rate" in str(error.value)
    output = Path("output")
    assert not (output / script.LORA_FILE).exists()
    for checkpoint in output.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / script.LORA_FILE).values())


def test_frames_that_are_not_4k_plus_1_are_said(run, caplog):
    with caplog.at_level("WARNING"):
        run(max_num_frames=8, max_train_steps=1)
    assert "--max_num_frames 8 is not 4k+1: 5 frames are used." in caplog.text


def test_gradient_checkpointing_changes_nothing_but_memory(script, run, tmp_path):
    plain, recomputed = (
        load_file(run(output_dir=tmp_path / str(on), gradient_checkpointing=on) / script.LORA_FILE)
        for on in (False, True)
    )
    for key in plain:
        torch.testing.assert_close(plain[key], recomputed[key])
