"""What tools/plan.py counts: the goals for the real models, and that the counts are those of real runs."""

import importlib
import json

import models as published
import plan
import pytest
import torch
from conftest import BOTH, ROOT, SCRIPTS

SMALLEST = {"quantize_base": "nf4", "offload_activations": True, "rank": 64, "use_8bit_adam": True}
GOALS = [  # model, flags, what is counted, and its bound: GiB or TFLOP
    ("5b", {"rank": 128}, {"traffic": 1500 * 2**30, "peak": 19.2 * 2**30}),
    ("5b", {"rank": 128, "checkpoint_policy": "attention"}, {"flop": 1100e12, "peak": 24 * 2**30}),
    ("5b", {"rank": 128, "offload_activations": True}, {"peak": 14 * 2**30}),
    ("5b", SMALLEST, {"peak": 6.5 * 2**30}),
    ("2b", SMALLEST, {"peak": 4 * 2**30}),
    ("1.5-5b", SMALLEST, {"peak": 10 * 2**30}),
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
    assert "No flags make it fit; with --train_batch_size 1 " in capsys.readouterr().out


def test_advice_has_the_flags_that_help_the_stages_that_do_not_fit(script, flags):
    """Sampling gains nothing from a smaller batch, and is offloaded only with recomputation."""

    def costs_of(args) -> dict:
        training = 3 + args.train_batch_size - args.gradient_checkpointing
        sampling = 9 - 3 * args.offload_activations - 2 * (args.quantize_base == "nf4")
        return {"a training step": plan.Cost(training * 2**30), "sampling a video": plan.Cost(sampling * 2**30)}

    args = script.get_args(flags(train_batch_size=2))
    said = plan.what_fits(args, script.memory_flags(args), costs_of, 6 * 2**30)
    wanted = "--gradient_checkpointing --offload_activations"
    assert said == f"What fits: {wanted} (a training step 4.0 GiB, sampling a video 6.0 GiB)"
    said = plan.what_fits(args, script.memory_flags(args), costs_of, 5 * 2**30)
    assert f"{wanted} --quantize_base nf4 (" in said
    assert plan.what_fits(args, script.memory_flags(args), costs_of, 2**30).startswith("No flags make it fit; with ")


@pytest.mark.parametrize("changes", [{}, {"quantize_base": "nf4", "rank": 32}])
def test_memory_flags_are_those_that_a_run_lacks(script, flags, changes):
    args = script.get_args(flags(**{"rank": 128, "train_batch_size": 1} | changes))
    found = script.memory_flags(args)
    assert ("gradient_checkpointing", True) in found and ("train_batch_size", 1) not in found
    assert [value for name, value in found if name == "quantize_base"] == ([] if args.quantize_base else ["nf4"])
    assert [value for name, value in found if name == "rank"] == [rank for rank in (64, 16) if rank < args.rank]


def test_coders_of_equal_shapes_count_as_often_as_they_run(monkeypatch):
    """In tiles and parts of a clip, one call of a shape tells what the others take."""
    config = published.VAE | {"block_out_channels": [32, 32, 32, 64], "norm_num_groups": 4, "layers_per_block": 1}
    vae = plan.on_meta(lambda: plan.AutoencoderKLCogVideoX.from_config(config), torch.bfloat16)
    vae.enable_tiling(144, 200)
    latents = torch.zeros(1, 16, 7, 30, 60, dtype=torch.bfloat16, device="meta")
    remembered = plan.count([vae], lambda: vae.decode(latents))
    monkeypatch.setattr(plan, "once_a_shape", lambda function, _counter: function)
    assert remembered == plan.count([vae], lambda: vae.decode(latents)) and remembered.flop > 0


def smallest_stages(name: str, num_layers: int, limit: float) -> dict[str, plan.Cost]:
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
    costs = plan.encoding_costs(script, args, configs, shape, dtype, limit)
    return costs | plan.training_costs(script, args, configs, shape, dtype, limit)[0]


@pytest.mark.parametrize("name", ["5b", "1.5-5b-i2v"])
def test_encoding_and_sampling_take_no_more_than_8_gib(name):
    """On a card of 8 GB, without a flag for it: clips are encoded and decoded in tiles, and the transformer is not on
    the device while a sample is decoded. T5-XXL does not fit; it runs on the CPU."""
    two, four = (smallest_stages(name, num_layers, 7.4 * 2**30) for num_layers in (2, 4))
    assert two["encoding a prompt"].peak > 7.4 * 2**30 > two["encoding a clip"].peak
    whole = of_all_blocks(name, two["sampling a video"], four["sampling a video"])["peak"]
    assert 2**30 < whole <= 8 * 2**30, whole / 2**30


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
