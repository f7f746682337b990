"""What tools/plan.py counts: the goals for the real models, and that the counts are those of real runs."""

import importlib
import json
import math

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
    plan.main([str(ROOT / f"{script.__name__}.py"), *flags(**settings), "--json"])
    found = json.loads(capsys.readouterr().out)
    caplog.set_level("INFO")
    output = run(**settings)
    assert f"Clips: {', '.join(f'{n} of {size}' for size, n in found['clips'].items())}" in caplog.text
    assert f"Steps: {found['steps']}, {found['steps an epoch']} an epoch" in caplog.text
    assert f"LoRA: {found['trained parameters']:,} parameters" in caplog.text
    assert len((output / "metrics.jsonl").read_text().splitlines()) == found["steps"] == 8
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
    monkeypatch.setitem(plan.GPUS, "t4", (plan.CUDA_CONTEXT + 0.99 * peaks[0] / 2**30, *plan.GPUS["t4"][1:]))
    plan.main(words)
    said = capsys.readouterr().out
    assert "a training step: does not fit (t4" in said and "What fits: --train_batch_size 1 (a training" in said
    monkeypatch.setitem(plan.GPUS, "t4", (plan.CUDA_CONTEXT, *plan.GPUS["t4"][1:]))
    plan.main(words)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("No flags make it fit; with --") and " --train_batch_size 1 " in said


def costs_by_flags(args) -> dict:
    """Sampling gains nothing from a smaller batch, and is offloaded only with recomputation."""
    training = 3 + args.train_batch_size - args.gradient_checkpointing + (args.checkpoint_policy == "attention")
    training -= 2 * (args.quantize_base == "nf4")
    sampling = 8 - 3 * args.offload_base - 2 * args.offload_activations
    pinned = int(10.5 * 2**30) * args.offload_base
    training_cost, sampling_cost = plan.Cost(training * 2**30, pinned), plan.Cost(sampling * 2**30)
    return {"a training step": training_cost, "sampling a video": sampling_cost}


def test_advice_has_the_flags_that_help_the_stages_that_do_not_fit(script, flags):
    args = script.get_args(flags(train_batch_size=2))
    said = plan.what_fits(script, args, costs_by_flags, 6 * 2**30)
    peaks = "a training step 5.0 GiB, sampling a video 5.0 GiB; 10.5 GiB of pinned host memory for each process"
    assert said == f"What fits: --gradient_checkpointing --checkpoint_policy attention --offload_base ({peaks})"
    said = plan.what_fits(script, args, costs_by_flags, 3.5 * 2**30)  # no room for what attention would keep
    wanted = "--gradient_checkpointing --offload_base --offload_activations --train_batch_size 1"
    assert said.startswith(f"What fits: {wanted} (")
    assert plan.what_fits(script, args, costs_by_flags, 2**30).startswith("No flags make it fit; with ")


def test_an_exact_flag_comes_before_one_that_is_not(script, flags):
    """And no flags are advised that the script refuses together."""
    said = plan.what_fits(script, script.get_args(flags(train_batch_size=2)), costs_by_flags, 2.5 * 2**30)
    assert "--offload_base --offload_activations" in said and "nf4" not in said
    said = plan.what_fits(script, script.get_args(flags(train_batch_size=1, compile=True)), costs_by_flags, 2**30)
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
