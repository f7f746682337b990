"""What tools/plan.py counts: the goals for the real models, and that the counts are those of real runs."""

import argparse
import importlib
import json
import logging
import math
from argparse import Namespace
from pathlib import Path

import budget
import cards
import models as published
import plan
import pytest
import torch
from conftest import BOTH, ROOT, SCRIPTS

SMALLEST = {"offload_base": True, "offload_activations": True, "rank": 64, "use_8bit_adam": True}
NF4 = {"quantize_base": "nf4", "offload_activations": True, "rank": 64, "use_8bit_adam": True}
GOALS = [  # model, flags, what is counted, and its bound: GiB or TFLOP
    ("5b", {"rank": 128}, {"traffic": 1500 * 2**30, "peak": 19.2 * 2**30}),
    ("5b", {"rank": 128, "checkpoint_policy": "attention"}, {"flop": 1100e12, "peak": 24 * 2**30}),
    ("5b", {"rank": 128, "offload_activations": True}, {"peak": 14 * 2**30}),
    ("5b", NF4, {"peak": 6.5 * 2**30}),
    ("2b", NF4, {"peak": 4 * 2**30}),
    ("1.5-5b", NF4, {"peak": 10 * 2**30}),
    ("5b", {"rank": 64, "offload_base": True}, {"peak": 7.8 * 2**30}),
    ("5b", {"rank": 64, "offload_base": True, "offload_activations": True}, {"peak": 3.1 * 2**30}),
]


def published_cost(name: str, num_layers: int, **changes) -> plan.Cost:
    """Of a step of the published model with so many blocks."""
    script = importlib.import_module(published.script_name(name))
    args = script.get_args(["--pretrained_model_name_or_path", "none", "--train_batch_size", "1"])
    vars(args).update({"gradient_checkpointing": True} | changes)
    shape, dtype = published.latent_shape(*published.clip_size(name)), getattr(torch, published.dtype_name(name))
    configs = (published.transformer_config(name) | {"num_layers": num_layers}, published.vae_config(name))
    return plan.training_cost(script, args, *configs, shape, dtype)[0]


def of_all_blocks(name: str, two: plan.Cost, four: plan.Cost, num_layers: int | None = None) -> dict[str, float]:
    """What each further block adds is the same, so that two blocks and four tell what all of them take."""
    further = (num_layers or published.transformer_config(name)["num_layers"]) - 2
    two, four = vars(two), vars(four)
    return {each: two[each] + (four[each] - two[each]) / 2 * further for each in ("peak", "traffic", "casts", "flop")}


def whole_cost(name: str, num_layers: int | None = None, **changes) -> dict[str, float]:
    return of_all_blocks(name, *(published_cost(name, layers, **changes) for layers in (2, 4)), num_layers)


@pytest.mark.parametrize(("name", "changes", "bounds"), GOALS)
def test_step_of_the_real_model_is_within_its_goal(name, changes, bounds):
    found = whole_cost(name, **changes)
    for counted, bound in bounds.items():
        assert 0.5 * bound < found[counted] <= bound, (counted, found[counted])


def test_blocks_add_up():
    cost, found = published_cost("5b", 9, rank=128), whole_cost("5b", 9, rank=128)
    for counted in ("peak", "traffic", "casts", "flop"):
        assert found[counted] == pytest.approx(getattr(cost, counted), rel=1e-3), counted


def test_blocks_before_the_first_lora_cost_a_forward_pass_alone():
    """1,250 TFLOP a step of the 5B become 790 with the LoRA in its last half, and 6.2 GiB of activations 4.2."""
    six, three = (published_cost("5b", num_layers, rank=64) for num_layers in (6, 3))
    plain = published_cost("5b", 6, rank=64, gradient_checkpointing=False)
    late = published_cost("5b", 6, rank=64, lora_blocks="3-5")
    forward = (six.flop - plain.flop) / 2  # of three blocks: recomputation is a second forward pass
    assert late.flop == pytest.approx(three.flop + forward, rel=0.01)
    assert late.flop < 0.65 * six.flop
    assert late.parts["LoRA"] == three.parts["LoRA"] == six.parts["LoRA"] / 2
    assert late.parts["activations"] == pytest.approx(three.parts["activations"], rel=0.01)
    copied = [published_cost("5b", 6, rank=64, offload_base=True, lora_blocks=b).copied for b in ("0-5", "3-5")]
    assert copied[1] == pytest.approx(0.8 * copied[0], rel=1e-3)  # 6 + 2 blocks in place of 6 + 4


LEVERS = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "attention kept": {"gradient_checkpointing": True, "checkpoint_policy": "attention"},
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}


@BOTH
@pytest.mark.parametrize("changes", LEVERS.values(), ids=LEVERS)
def test_counts_without_weights_are_those_of_a_real_step(script, flags, changes):
    args = script.get_args(flags(**changes))
    configs = [script.read_config(args, name)[0] for name in ("transformer", "vae")]
    costs = [plan.training_cost(script, args, *configs, (3, 8, 12), torch.float32, on) for on in ("meta", "cpu")]
    (counted, without_values), (real, transformer) = costs
    sizes = [sum(p.numel() for p in script.lora_parameters(model).values()) for model in (without_values, transformer)]
    assert sizes[0] == sizes[1] > 0 and counted.flop == real.flop > 0
    # Flash attention on the CPU returns some bytes less: it draws no dropout.
    assert (counted.peak, counted.traffic) == pytest.approx((real.peak, real.traffic), rel=0.01)
    for part in ("base", "LoRA", "gradients", "optimizer"):
        assert counted.parts[part] == real.parts[part]


@BOTH
def test_plan_is_the_run(script, flags, run, capsys, caplog):
    settings = {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 1, "random_flip": True}
    settings |= {"buckets": ["9x64x96", "5x32x64"], "validation_prompt": "a red square", "num_inference_steps": 1}
    settings["validation_epochs"] = 1
    plan.main([str(ROOT / f"{script.__name__}.py"), *flags(**settings), "--json"])
    found = json.loads(capsys.readouterr().out)
    caplog.set_level("INFO")
    output = run(**settings)
    assert f"Clips: {', '.join(f'{n} of {size}' for size, n in found['clips'].items())}" in caplog.text
    assert f"Steps: {found['steps']}, {found['steps an epoch']} an epoch" in caplog.text
    assert f"LoRA: {found['trained parameters']:,} parameters" in caplog.text
    assert len((output / "metrics.jsonl").read_text().splitlines()) == found["steps"] == 8
    assert len((output / "samples.jsonl").read_text().splitlines()) == found["samples"] == 3
    assert list(found["stages"]) == ["encoding a prompt", "encoding a clip", "a training step", "sampling a video"]


def test_disk_is_that_of_the_encoded_clips(script, flags, run, capsys, tmp_path):
    settings = {"precompute_dir": tmp_path / "pre"}
    plan.main([str(ROOT / f"{script.__name__}.py"), *flags(**settings), "--json"])
    found = json.loads(capsys.readouterr().out)
    run(**settings)
    files = sum(path.stat().st_size for path in (tmp_path / "pre").rglob("*.safetensors"))
    assert files - 300 * 9 < found["disk for encoded clips"] < files  # a header for each of 4 clips and 5 prompts


def test_what_does_not_fit_is_said_with_the_flags_that_help(script, flags, monkeypatch, capsys):
    words = [str(ROOT / f"{script.__name__}.py"), *flags(train_batch_size=2), "--gpu", "t4"]
    peaks = []
    cost = plan.training_cost

    def remember(*arguments):
        result = cost(*arguments)
        peaks.append(result[0].peak)
        return result

    monkeypatch.setattr(plan, "training_cost", remember)
    plan.main(words)
    assert "a training step: fits (t4" in capsys.readouterr().out
    # 1 % less than what the run takes: the first flag that saves memory is named.
    card = plan.GPUS["t4"]
    monkeypatch.setitem(plan.GPUS, "t4", card._replace(memory=plan.CUDA_CONTEXT + 0.99 * peaks[0] / 2**30))
    plan.main(words)
    said = capsys.readouterr().out
    assert "a training step: does not fit (t4" in said and "What fits: --train_batch_size 1\n  a training" in said
    assert "The whole run on t4 with --train_batch_size 1, estimated:" in said
    monkeypatch.setitem(plan.GPUS, "t4", card._replace(memory=plan.CUDA_CONTEXT))
    plan.main(words)
    said = capsys.readouterr().out
    assert "No flags make it fit." in said and "The least is with --" in said
    assert " --train_batch_size 1 " in said


def costs_by_flags(args) -> dict:
    """Sampling gains nothing from a smaller batch, and is offloaded only with recomputation."""
    training = 3 + args.train_batch_size - args.gradient_checkpointing + (args.checkpoint_policy == "attention")
    training -= 2 * (args.quantize_base == "nf4")
    sampling = 8 - 3 * args.offload_base - 2 * args.offload_activations
    pinned = int(10.5 * 2**30) * args.offload_base
    training_cost, sampling_cost = plan.Cost(training * 2**30, pinned), plan.Cost(sampling * 2**30)
    return {"a training step": training_cost, "sampling a video": sampling_cost}


def advised(script, args, limit: float) -> str:
    return plan.advice(args, *plan.what_fits(script, args, costs_by_flags, limit), limit)


def test_advice_has_the_flags_that_help_the_stages_that_do_not_fit(script, flags):
    args = script.get_args(flags(train_batch_size=2))
    assert advised(script, args, 6 * 2**30).splitlines() == [
        "What fits: --gradient_checkpointing --checkpoint_policy attention --offload_base",
        "  a training step: 5.0 GiB",
        "  sampling a video: 5.0 GiB",
        "  10.5 GiB of pinned host memory for each process",
    ]
    said = advised(script, args, 3.5 * 2**30)  # no room for what attention would keep
    wanted = "--gradient_checkpointing --offload_base --offload_activations --train_batch_size 1"
    assert said.startswith(f"What fits: {wanted}\n")
    assert advised(script, args, 2**30).startswith("No flags make it fit.")


def test_an_exact_flag_comes_before_one_that_is_not(script, flags):
    """And no flags are advised that the script refuses together."""
    said = advised(script, script.get_args(flags(train_batch_size=2)), 2.5 * 2**30)
    assert "--offload_base --offload_activations" in said and "nf4" not in said
    said = advised(script, script.get_args(flags(train_batch_size=1, compile=True)), 2**30)
    assert "--quantize_base nf4" in said and "--offload_base" not in said


def test_pinned_host_memory_is_counted_as_torch_rounds_it():
    """A buffer a block, and what recomputation starts from: 10.5 and 5.6 GiB for the 5B."""
    assert [plan.pinned_size(n) for n in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]
    for flag, expected in (("offload_base", 10.5), ("offload_activations", 5.59)):
        two, four = (published_cost("5b", layers, rank=64, **{flag: True}).pinned for layers in (2, 4))
        assert (two + (four - two) / 2 * 40) / 2**30 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("changes", [{}, {"quantize_base": "nf4", "rank": 32}])
def test_memory_flags_are_those_that_a_run_lacks(script, flags, changes):
    args = script.get_args(flags(**{"rank": 128, "train_batch_size": 1} | changes))
    found = script.memory_flags(args)
    assert ("gradient_checkpointing", True) in found and ("train_batch_size", 1) not in found
    assert [value for name, value in found if name == "quantize_base"] == ([] if args.quantize_base else ["nf4"])
    assert [value for name, value in found if name == "rank"] == [rank for rank in (64, 16) if rank < args.rank]


def test_coders_of_equal_shapes_count_as_often_as_they_run(script, monkeypatch):
    """In tiles and parts of a clip, one call of a shape tells what the others take."""
    config = published.VAE | {"block_out_channels": [32, 32, 32, 64], "norm_num_groups": 4, "layers_per_block": 1}
    vae = plan.on_meta(lambda: plan.AutoencoderKLCogVideoX.from_config(config), torch.bfloat16)
    vae.enable_tiling(144, 200)
    latents = torch.zeros(1, 16, 7, 30, 60, dtype=torch.bfloat16, device="meta")
    remembered = plan.count(script, [vae], lambda: vae.decode(latents))
    monkeypatch.setattr(plan, "once_a_shape", lambda function, _counter: function)
    assert remembered == plan.count(script, [vae], lambda: vae.decode(latents)) and remembered.flop > 0


def smallest_stages(name: str, num_layers: int) -> dict[str, plan.Cost]:
    """Of the published model with so many blocks, in the setting that takes the least memory."""
    script = importlib.import_module(published.script_name(name))
    args = script.get_args(["--pretrained_model_name_or_path", "none", "--train_batch_size", "1"])
    frames, height, width = published.clip_size(name)
    size = {"max_num_frames": frames, "height": height, "width": width}
    vars(args).update({"gradient_checkpointing": True, "validation_prompt": "a"} | size | SMALLEST)
    transformer_config = published.transformer_config(name) | {"num_layers": num_layers}
    configs = {"transformer": transformer_config, "vae": published.vae_config(name)}
    configs["text_encoder"] = published.TEXT_ENCODER
    shape, dtype = published.latent_shape(frames, height, width), getattr(torch, published.dtype_name(name))
    costs = plan.training_costs(script, args, configs, shape, dtype, math.inf)[0]
    if num_layers == 2:  # the encoders have no such blocks
        costs |= plan.encoding_costs(script, args, configs, shape, dtype, math.inf)
    return costs


PEAKS = {"5b-i2v": 3.1, "5b": 3.1, "1.5-5b": 5.5, "1.5-5b-i2v": 5.5}  # GiB; slow, up to 40 seconds each
OTHERS = [pytest.param(name, most, marks=pytest.mark.slow) for name, most in PEAKS.items()]


@pytest.mark.long
@pytest.mark.parametrize(("name", "most"), [("2b", 2.1), *OTHERS])
def test_every_stage_is_small_with_the_base_in_host_memory(name, most):
    """On any card, without flags about tiles: the exact model, whole frames, rank 64. The models for text-to-video
    take no more than those for image-to-video."""
    two, four = (smallest_stages(name, num_layers) for num_layers in (2, 4))
    assert set(two) == {"encoding a prompt", "encoding a clip", "a training step", "sampling a video"}
    for stage, cost in two.items():
        peak = of_all_blocks(name, cost, four[stage])["peak"] if stage in four else cost.peak
        assert 0.7 < peak / 2**30 <= most, (stage, peak / 2**30)


def test_copies_of_the_base_are_counted_apart(monkeypatch):
    """Each block is copied once for the forward pass, and all but the last two again for the backward pass."""
    cost = published_cost("5b", 6, rank=64, offload_base=True)
    block = plan.build_transformer(published.transformer_config("5b") | {"num_layers": 1}, torch.bfloat16)
    size = sum(parameter.nbytes for parameter in block.transformer_blocks.parameters())
    assert cost.copied == pytest.approx((6 + 4) * size, rel=1e-3)
    assert cost.parts["base"] == pytest.approx(2 * size + sum(
        parameter.nbytes for name, parameter in block.named_parameters() if "transformer_blocks" not in name
    ), rel=1e-3)  # fmt: skip
    plain = published_cost("5b", 6, rank=64)
    assert (cost.flop, cost.traffic) == pytest.approx((plain.flop, plain.traffic), rel=1e-4)
    monkeypatch.setattr(plan, "HOST_LINK", 1e9)
    assert cost.seconds("h100") == cost.copied / 1e9 > plain.seconds("h100")


def test_a_text_encoder_in_fp16_has_fp32_matrices_as_transformers_loads_it():
    """8.9 GiB in bf16, 10.8 in fp16. On the host it takes two of its blocks."""
    script = importlib.import_module("train_cogvideox_lora")
    configs = {"text_encoder": published.TEXT_ENCODER, "transformer": published.transformer_config("2b")}
    whole, on_host = (
        {dtype: plan.prompt_cost(script, configs, dtype, is_on_host) for dtype in (torch.bfloat16, torch.float16)}
        for is_on_host in (False, True)
    )
    found = [cost.parts["weights"] / 2**30 for cost in whole.values()]
    assert found == pytest.approx([8.87, 10.74], abs=0.02)
    assert all(cost.peak < 1.2 * 2**30 and cost.copied > 8 * 2**30 for cost in on_host.values())
    assert all(cost.flop == whole[dtype].flop for dtype, cost in on_host.items())


def test_wrong_flags_and_missing_clips_are_the_scripts_own_message(script, flags, capsys):
    words = [str(ROOT / f"{script.__name__}.py"), *flags(instance_data_root="nowhere")]
    with pytest.raises(SystemExit) as error:
        plan.main(words)
    assert error.value.code == 2 and "there is no folder nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main([*words, "--rank", "none"])
    assert "--rank must be a whole number" in capsys.readouterr().err


def test_published_models_have_their_number_of_parameters():
    """As the model cards say: 2B and 5B."""
    billions = {}
    for name in published.TRANSFORMERS:
        transformer = plan.build_transformer(published.transformer_config(name), torch.bfloat16)
        billions[name] = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert 1.6 < billions["2b"] < 2 and all(5.5 < billions[name] < 5.7 for name in billions if name != "2b")


def test_a_stages_script_is_known():
    assert {published.script_name(name) for name in published.TRANSFORMERS} == set(SCRIPTS)


def planned(script, words: list[str], capsys) -> dict:
    plan.main([str(ROOT / f"{script.__name__}.py"), *words, "--json"])
    return json.loads(capsys.readouterr().out)


def said_of(script, words: list[str], capsys) -> str:
    plan.main([str(ROOT / f"{script.__name__}.py"), *words])
    return capsys.readouterr().out


@pytest.mark.parametrize("validation_steps", [None, 1, 3])
@pytest.mark.parametrize("validation_epochs", [1, 2])
def test_validations_and_micro_batches_are_those_of_the_loop(validation_steps, validation_epochs):
    """The loop of `train`, written out."""
    settings = {"validation_steps": validation_steps, "validation_epochs": validation_epochs}
    for steps in range(13):
        for batches, accumulated in ((1, 1), (5, 2), (4, 1), (2, 4)):
            args = Namespace(**settings, gradient_accumulation_steps=accumulated)
            step = epoch = 0
            trained = 0
            validations = 2  # before the first step, and at the end
            while step < steps:
                for batch in range(1, batches + 1):
                    trained += 1
                    if batch % accumulated and batch < batches:
                        continue
                    step += 1
                    if step == steps:
                        break
                    if validation_steps and step % validation_steps == 0:
                        validations += 1
                else:
                    epoch += 1
                    if not validation_steps and epoch % validation_epochs == 0:
                        validations += 1
            found = budget.num_validations(args, steps, math.ceil(batches / accumulated))
            assert found == validations, (steps, batches, accumulated)
            assert budget.num_micro_batches(args, steps, batches) == trained, (steps, batches, accumulated)


def test_times_and_files_are_those_of_a_run(script, flags, run, capsys, monkeypatch, models, kind):
    """Training passes, passes of held-out clips, checkpoints, and what they have in them."""
    settings = {"train_batch_size": 1, "eval_split": 1, "gradient_accumulation_steps": 2, "max_train_steps": 3}
    settings |= {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_steps": 2, "rank": 64}
    found = planned(script, flags(**settings), capsys)
    passes = {True: 0, False: 0}  # with gradients, and without
    loss = script.diffusion_loss

    def count(*arguments):
        passes[torch.is_grad_enabled()] += 1
        return loss(*arguments)

    monkeypatch.setattr(script, "diffusion_loss", count)
    output = run(**settings)
    assert found["times"][plan.TRAINING] == passes[True] == 5  # an epoch of 3 clips has steps of 2 and of 1
    assert found["times"][plan.HELD_OUT] == passes[False] == 3 * 10
    assert found["amounts"][plan.TRAINING] == pytest.approx(5)
    (checkpoint,) = output.glob("checkpoint-*")
    assert (found["kept"]["checkpoints"]["number"], found["kept"]["checkpoints"]["most"]) == (1, 2)
    files = sum((checkpoint / name).stat().st_size for name in (script.LORA_FILE, "optimizer.bin"))
    one = found["disk"]["checkpoints"] / 2
    assert one < files < one + 100_000  # names and sizes of the tensors
    weights = {part: 0 for part in ("text_encoder", "transformer")}
    for part in weights:
        for path in (models[kind] / part).glob("*.safetensors"):
            weights[part] += path.stat().st_size
    host = found["host memory"]
    assert 0 <= weights["text_encoder"] - host["text encoder"] < 20_000
    assert 0 <= weights["transformer"] - host["transformer, while it is loaded"] < 20_000
    assert host["most"] == max(host["text encoder"], host["transformer, while it is loaded"])


def test_loras_are_counted_where_the_run_validates(script, flags):
    args = script.get_args(flags())
    kept = {}
    for name, change in {
        "nothing is validated": {},
        "steps": {"validation_steps": 2},
        "prompts": {"validation_prompt": "a"},
        "limited": {"validation_steps": 2, "loras_total_limit": 1},
        "the best one is spared": {"validation_steps": 2, "loras_total_limit": 1, "eval_split": 1},
    }.items():
        changed = Namespace(**vars(args) | change)
        prompts = len(script.validation_inputs(changed))
        kept[name] = budget.loras(changed, 8, 5, prompts, 1000)
    assert {name: files.number for name, files in kept.items()} == {
        "nothing is validated": 1, "steps": 5, "prompts": 5, "limited": 2, "the best one is spared": 3
    }  # fmt: skip
    assert kept["steps"].size == 5 * 4000 and kept["limited"].size == 3 * 4000  # one more while it is written


@BOTH
def test_time_and_price_are_those_of_all_stages_and_processes(script, flags, capsys):
    settings = {"train_batch_size": 1, "random_flip": True, "eval_split": 1}
    settings |= {"validation_prompt": "a:::b:::c", "num_validation_videos": 2}
    found = planned(script, [*flags(**settings), "--num_processes", "2", "--price", "0.5"], capsys)
    # Three prompts for two processes, 4 clips both ways, 4 captions, 3 prompts and the empty one.
    assert found["times"] == {
        "encoding a prompt": 4, "encoding a clip": 4, plan.TRAINING: 2, plan.SAMPLING: 2 * 2 * 2, plan.HELD_OUT: 20
    }  # fmt: skip
    assert found["samples"] == 2 * 3 * 2
    for gpu, run in found["run"].items():
        seconds = found["seconds"][gpu]
        assert run["samples"] == pytest.approx(8 * seconds[plan.SAMPLING])
        assert run["training"] == pytest.approx(2 * seconds[plan.TRAINING])
        assert run["held-out losses"] == pytest.approx(20 * seconds[plan.HELD_OUT])
        assert 0 < 2 * seconds[plan.HELD_OUT] < seconds[plan.TRAINING]  # no backward pass
        assert run["total"] == pytest.approx(sum(run.values()) / 2)
        for stage, price in found["price"][gpu].items():
            assert price == pytest.approx(0.5 * 2 * run[stage] / 3600)


def test_smaller_clips_and_batches_take_less(script, flags):
    args = script.get_args(flags(train_batch_size=2, max_train_steps=None, num_train_epochs=1))
    found = plan.schedule(script, args, [(3, 8, 12)] * 3 + [(3, 8, 6)], 5, 1)
    # Batches of two and of one large clip, and one of a small clip, half as large.
    assert found["times"][plan.TRAINING] == 3
    assert found["amounts"][plan.TRAINING] == pytest.approx((2 + 1 + 0.5) / 2)
    assert found["amounts"]["encoding a clip"] == pytest.approx(3.5)
    # The second process waits for the first one.
    both = plan.schedule(script, args, [(3, 8, 12)] * 2 + [(3, 8, 6)], 5, 2)
    assert both["amounts"][plan.TRAINING] == pytest.approx(1)


def test_samples_that_take_long_are_named_with_the_flag_that_lowers_it(script, flags):
    args = script.get_args(flags(validation_prompt="a", validation_steps=10))
    assert plan.less_sampling(args, {"samples": 2, "total": 10}, 5) == []
    (said,) = plan.less_sampling(args, {"samples": 3, "total": 10}, 5)
    assert "30%" in said and "--validation_steps than 10" in said
    args = script.get_args(flags(validation_prompt="a"))
    assert "--validation_epochs than 50" in plan.less_sampling(args, {"samples": 3, "total": 10}, 5)[0]
    assert "--num_inference_steps than 50" in plan.less_sampling(args, {"samples": 3, "total": 10}, 2)[0]
    args.num_validation_videos = 4
    assert "--num_validation_videos than 4" in plan.less_sampling(args, {"samples": 3, "total": 10}, 2)[0]


def test_guidance_of_1_samples_without_the_empty_prompt(script, flags, capsys):
    flop = []
    for scale in (6, 1):
        words = flags(validation_prompt="a", guidance_scale=scale)
        flop.append(planned(script, words, capsys)["stages"][plan.SAMPLING]["flop"])
    assert flop[1] < 0.8 * flop[0]


def test_report_ends_with_time_and_price(script, flags, capsys):
    words = [*flags(validation_prompt="a", eval_split=1, gradient_checkpointing=True), "--gpu", "4090"]
    plan.decoding_cost.cache_clear()
    said = said_of(script, [*words, "--price", "2"], capsys)
    # Of these flags and of two faster ways: all decode in the same way, which takes the longest to count.
    assert (plan.decoding_cost.cache_info().misses, plan.decoding_cost.cache_info().hits) == (1, 2)
    table = said[said.index("The whole run on 4090, estimated:") :].splitlines()
    assert table[1].split() == ["stage", "times", "each", "time", "part", "price"]
    stages = ["encoding prompts", "encoding clips", "training", "samples", "held-out losses", "total"]
    assert [next(name for name in stages if line.startswith(name)) for line in table[2:8]] == stages
    assert max(len(line) for line in said.splitlines()) <= 100
    # What is faster where there is room.
    for better in ("--checkpoint_policy attention", "without --gradient_checkpointing"):
        assert f"Faster: {better} fits (" in said
    assert "price" not in said_of(script, words, capsys)


def test_report_without_a_card_has_all_of_them(script, flags, capsys):
    said = said_of(script, [*flags(), "--price", "2"], capsys)
    table = said[said.index("The whole run on each card") :].splitlines()
    assert [line.split()[0] for line in table[2:]] == list(plan.GPUS)
    assert table[1].split() == ["encoding", "prompts", "encoding", "clips", "training", "total", "price"]


def test_less_recomputation_is_advised_where_it_fits(script, flags):
    def costs_of(args) -> dict:
        kept = 2 if args.checkpoint_policy == "attention" else 0 if args.gradient_checkpointing else 10
        flop = {0: 4, 2: 3.5, 10: 3}[kept] * 1e15
        base = 1 if args.offload_base else 5
        return {plan.TRAINING: plan.Cost((base + kept) * 2**30, flop=flop)}

    args = script.get_args(flags(gradient_checkpointing=True, offload_base=True))
    attention, nothing = plan.what_is_faster(args, costs_of, 8 * 2**30, "4090")
    assert attention["fits"] and attention["flags"] == "--checkpoint_policy attention"
    assert attention["flop saved"] == 0.5e15
    assert attention["seconds saved"] == pytest.approx(0.5e15 / (0.8 * 165e12))
    assert nothing["flags"] == "without --gradient_checkpointing --offload_base"
    assert not nothing["fits"] and nothing["peak"] == 15 * 2**30
    assert "seconds saved" not in plan.what_is_faster(args, costs_of, 8 * 2**30, "16")[0]
    assert plan.what_is_faster(script.get_args(flags()), costs_of, 8 * 2**30, "4090") == []


def test_a_card_is_named_or_its_memory_is(script, flags, capsys):
    assert cards.gpu_name("NVIDIA GeForce RTX 4090") == "4090" and cards.gpu_name("RTX A6000") == "a6000"
    assert cards.gpu_name("4090") == "4090" and cards.gpu_name("2080Ti") == "2080ti" and cards.gpu_name("16GB") == "16"
    for wrong in ("9999", "gtx", "0", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="number of GB"):
            cards.gpu_name(wrong)
    for gigabytes, name in ((8, "4060"), (11, "2080ti"), (12, "4070"), (16, "4080"), (24, "4090"), (32, "5090")):
        memory = cards.card_of(str(gigabytes)).memory
        assert 0.9 * gigabytes < memory <= cards.GPUS[name].memory
        assert cards.GPUS[name].memory - memory < 0.025 * gigabytes
    said = said_of(script, [*flags(), "--gpu", "16"], capsys)
    assert "a training step: fits (16, 15.4 GiB)" in said and "Its speed is not known" in said
    assert "The whole run" not in said and "seconds on" not in said


def test_rates_are_those_with_sums_in_fp32():
    """Of GeForce cards since Ada 512 operations a multiprocessor and cycle: half of the rate with sums in fp16."""
    published_clocks = {  # multiprocessors, and the boost clock in GHz
        "5090": (170, 2.407), "5080": (84, 2.617), "5070": (48, 2.512), "4090": (128, 2.52), "4080": (76, 2.505),
        "4070": (46, 2.475), "4060": (24, 2.46),
    }  # fmt: skip
    for name, (multiprocessors, clock) in published_clocks.items():
        assert cards.GPUS[name].rate == pytest.approx(multiprocessors * clock * 1e9 * 512, rel=0.005), name


def test_what_a_turing_card_lacks_is_said():
    for name in ("t4", "2080ti"):
        notes = " ".join(plan.notes_on(name, torch.bfloat16))
        assert "no bf16" in notes and "no flash attention" in notes
        assert "no bf16" not in " ".join(plan.notes_on(name, torch.float16))
    assert plan.notes_on("4090", torch.bfloat16) == []
    assert "fp32" in " ".join(plan.notes_on("4090", torch.float32))


@pytest.mark.parametrize("changes", [{"checkpoint_policy": "attention"}, {"offload_base": True}])
def test_remembered_operations_count_as_those_that_run(script, flags, monkeypatch, changes):
    args = script.get_args(flags(gradient_checkpointing=True, **changes))
    configs = [script.read_config(args, name)[0] for name in ("transformer", "vae")]
    costs = []
    for is_remembered in (False, True, True):
        if not is_remembered:
            monkeypatch.setattr(plan, "has_new_results", lambda _operation: False)
        else:
            monkeypatch.undo()
        costs.append(plan.training_cost(script, args, *configs, (3, 8, 12), torch.bfloat16)[0])
    assert costs[0] == costs[1] == costs[2] and plan.CostCounter.remembered


def test_layouts_tell_kinds_of_numbers_and_orders_of_dimensions_apart():
    layouts = {plan.layout((value,)) for value in (1, 1.0, True)}
    assert len(layouts) == 3
    square = torch.zeros(2, 2, device="meta")
    assert plan.layout(square) != plan.layout(square.t()) != plan.layout(square.t().half())
    for tensor in (torch.zeros(2), torch.zeros((), device="meta")):
        with pytest.raises(TypeError):
            plan.layout([tensor])


def test_no_warning_of_bitsandbytes():
    """Its logger is set before the import, as in the scripts."""
    source = Path(plan.__file__).read_text()
    silenced = 'logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)'
    assert source.index(silenced) < source.index("import bitsandbytes")
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.ERROR


@pytest.mark.parametrize("wrong", [["--num_processes", "0"], ["--price", "-1"], ["--gpu", "9999"]])
def test_wrong_flags_of_the_tool_are_said(script, wrong, capsys):
    with pytest.raises(SystemExit) as error:
        plan.main([f"{script.__name__}.py", *wrong])
    assert error.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_no_clip_left_to_train_on_is_said(script, flags, capsys):
    with pytest.raises(SystemExit):
        plan.main([str(ROOT / f"{script.__name__}.py"), *flags(eval_split=4)])
    assert "leaves nothing of 4 clips" in capsys.readouterr().err
