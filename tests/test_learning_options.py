"""Caption dropout, held-out clips, a LoRA to start from, and the layers that get one."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from conftest import BOTH
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_objective import record_inputs
from test_training import read_metrics, same_tensors

FOUR = ["to_k", "to_q", "to_v", "to_out.0"]


def all_rows(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ---- caption dropout ------------------------------------------------------------------------------------------------


def test_captions_are_dropped_clip_by_clip_and_step_by_step(script):
    shapes = dict.fromkeys(range(100), (8, 3, 8, 12))
    sampler = script.ShapeBatchSampler(shapes, 4, seed=0, random_flip=True, caption_dropout=0.3)
    epochs = []
    for sampler.epoch in range(10):
        epochs.append({index: dropped for batch in sampler for index, _, dropped in batch})
    drops = [dropped for epoch in epochs for dropped in epoch.values()]
    assert len(drops) == 1000 and 250 < sum(drops) < 350
    assert any(epoch[0] for epoch in epochs) and not all(epoch[0] for epoch in epochs)
    without = script.ShapeBatchSampler(shapes, 4, seed=0, random_flip=True)
    assert not any(dropped for batch in without for *_, dropped in batch)


@pytest.mark.parametrize(("probability", "expected"), [(0, 0), (1, 1)])
def test_a_dropped_caption_is_the_empty_prompt(run, model, monkeypatch, probability, expected):
    empty = DiffusionPipeline.from_pretrained(model).encode_prompt("", None, False)[0]  # [1, S, D]
    calls = record_inputs(monkeypatch)
    run(caption_dropout=probability, max_train_steps=4)
    embeds = torch.cat([call["encoder_hidden_states"] for call in calls])  # [8, S, D]
    assert [torch.allclose(clip, empty[0], atol=1e-4) for clip in embeds] == [bool(expected)] * 8


# ---- held-out clips -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_lengths(tmp_path_factory):
    """Six clips of 9 frames and three of 5: the flags of a run on them, which are encoded once."""
    root = tiny.make_clips(tmp_path_factory.mktemp("two_lengths") / "clips", count=6)
    for number in range(6, 9):
        tiny.write_clip(root / "videos" / f"0{number}.mp4", tiny.moving_square(5, 64, 96))
    with (root / "prompts.txt").open("a") as prompts, (root / "videos.txt").open("a") as videos:
        prompts.write("a short clip\n" * 3)
        videos.write("".join(f"videos/0{number}.mp4\n" for number in range(6, 9)))
    return {"instance_data_root": root, "precompute_dir": root / "pre", "caption_column": "prompts.txt"}


def latents_of(script, shapes, num_held_out, seed, folder):
    clips = []
    for number, frames in enumerate(shapes):
        path = folder / f"{number}.safetensors"
        save_file({"moments": torch.zeros(8, frames, 2, 2)}, path)
        clips.append(((path,), path, str(number)))
    return script.LatentDataset(clips, clips[0][1], num_held_out, seed)


def test_held_out_clips_are_of_every_shape_in_turn_and_of_the_seed(script, tmp_path):
    shapes = [3] * 6 + [2] * 3 + [1]
    chosen = [latents_of(script, shapes, 5, seed, tmp_path).held_out for seed in range(20)]
    assert len(set(map(tuple, chosen))) > 10 and chosen[3] == latents_of(script, shapes, 5, 3, tmp_path).held_out
    for held_out in chosen:
        assert len(set(held_out)) == 5 and sorted(shapes[index] for index in held_out) == [1, 2, 2, 3, 3]
    assert latents_of(script, shapes, 0, 0, tmp_path).held_out == []
    assert len(latents_of(script, shapes, 9, 0, tmp_path).held_out) == 9
    with pytest.raises(script.RunError, match="--eval_split 10 leaves nothing of 10 clips to train on"):
        latents_of(script, shapes, 10, 0, tmp_path)


def loss_by_hand(script, model, output, item, kind) -> float:
    """Plain v-prediction of the saved LoRA for one encoded clip, with the noise that the script draws for it."""
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(output)
    latents = script.sample_latents(item["moments"][None], pipe.vae.config.scaling_factor)  # [1, f, C, h, w]
    image = []
    if kind == "i2v":
        image_latents = torch.zeros_like(latents)
        image_latents[:, :1] = script.sample_latents(item["image_moments"][None], pipe.vae.config.scaling_factor)
        torch.rand(1)  # the draw of the dropout
        image = [image_latents]
    rotary = pipe._prepare_rotary_positional_embeddings(64, 96, latents.shape[1], latents.device)
    losses = []
    for level in range(0, 1000, 111):
        timestep, noise = torch.tensor([level]), torch.randn_like(latents)
        noisy = pipe.scheduler.add_noise(latents, noise, timestep)
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=torch.cat([noisy, *image], dim=2), encoder_hidden_states=item["prompt_embeds"][None],
                timestep=timestep, image_rotary_emb=rotary,
            ).sample  # fmt: skip
        losses.append((velocity - pipe.scheduler.get_velocity(latents, noise, timestep)).square().mean().item())
    return sum(losses) / 10


@BOTH
def test_held_out_clips_are_not_trained_on_and_their_loss_is_logged(
    script, run, kind, model, two_lengths, monkeypatch, caplog
):
    caplog.set_level("INFO")
    items = []
    get = script.LatentDataset.__getitem__
    monkeypatch.setattr(script.LatentDataset, "__getitem__", lambda self, key: items.append(key[0]) or get(self, key))
    made = []
    init = script.LatentDataset.__init__
    monkeypatch.setattr(script.LatentDataset, "__init__", lambda self, *a: init(self, *a) or made.append(self))
    steps = {"max_train_steps": None, "num_train_epochs": 2, "validation_epochs": 1, "train_batch_size": 1}
    output = run(**two_lengths, eval_split=2, learning_rate=1e-2, **steps)
    held_out = made[0].held_out
    assert len(held_out) == 2 and sorted(len(made[0].shapes[i]) and made[0].shapes[i][1] for i in held_out) == [2, 3]
    assert items.count(held_out[0]) == items.count(held_out[1]) == 3  # before the first step and after each epoch
    assert {index: items.count(index) for index in range(9) if index not in held_out} == dict.fromkeys(
        set(range(9)) - set(held_out), 2
    )
    rows = all_rows(output)
    losses = {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert list(losses) == [0, 7, 14] and len(set(losses.values())) == 3
    assert f"Loss of 2 held-out clips at step 14: {losses[14]:.4f}" in caplog.text
    by_hand = []
    for index in held_out:
        torch.manual_seed(index)
        by_hand.append(loss_by_hand(script, model, output, made[0][index, False, False], kind))
    assert losses[14] == pytest.approx(sum(by_hand) / 2, rel=1e-3)


def test_the_split_costs_nothing_and_changes_no_training_number(script, run, two_lengths):
    """Logging the loss draws from no generator of the training."""
    source = two_lengths | {"eval_split": 3}
    often = run(**source, max_train_steps=4, validation_steps=1)
    once = run(**source, max_train_steps=4)
    assert [row for row in all_rows(once)][-1].keys() == {"step", "validation/loss", "memory"}
    assert same_tensors(*(load_file(output / script.LORA_FILE) for output in (often, once)))
    assert all_rows(often)[-1]["validation/loss"] == all_rows(once)[-1]["validation/loss"]
    without = all_rows(run(**source | {"eval_split": 0}, max_train_steps=2))
    assert not any("validation/loss" in row for row in without)


def test_resumed_with_the_same_clips_held_out_though_no_seed_is_given(script, run, two_lengths, monkeypatch, tmp_path):
    made = []
    init = script.LatentDataset.__init__
    monkeypatch.setattr(script.LatentDataset, "__init__", lambda self, *a: init(self, *a) or made.append(self))
    source = two_lengths | {"eval_split": 4, "seed": None}
    run(**source, max_train_steps=2, output_dir=tmp_path / "output")
    run(**source, max_train_steps=4, resume_from_checkpoint="latest")
    assert made[0].held_out == made[1].held_out


def test_two_processes_share_the_held_out_clips(launch, run, two_lengths, tmp_path):
    source = two_lengths | {"eval_split": 3, "max_train_steps": 2, "learning_rate": 1e-9}  # it stays as it starts
    one = run(**source, output_dir=tmp_path / "one")
    children = launch(2, **source, output_dir=tmp_path / "two")
    assert [child.wait() for child in children] == [0, 0], children[0].said()[-2000:]
    losses = [all_rows(output)[-1]["validation/loss"] for output in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_survives_a_held_out_clip_that_fails(script, run, two_lengths, monkeypatch, caplog):
    def fail_for_one(self, key):
        if key[0] == self.held_out[1]:
            raise torch.OutOfMemoryError("no memory for this clip")
        return get(self, key)

    get = script.LatentDataset.__getitem__
    monkeypatch.setattr(script.LatentDataset, "__getitem__", fail_for_one)
    output = run(**two_lengths, eval_split=2, max_train_steps=2, validation_steps=1)
    assert (output / script.LORA_FILE).is_file() and "no memory for this clip" in caplog.text
    assert [row["step"] for row in all_rows(output)] == [1, 2]  # and no mean of the other clip alone
    assert not any("validation/loss" in row for row in all_rows(output))


# ---- a LoRA to start from -------------------------------------------------------------------------------------------


def test_it_starts_from_a_lora(script, run):
    earlier = run(rank=3, lora_alpha=6, lora_target_modules=["to_v", "ff.net.2"], learning_rate=1e-2)
    weights = load_file(earlier / script.LORA_FILE)
    for source in (earlier, earlier / script.LORA_FILE):
        flags = {"init_lora": source, "rank": None, "lora_alpha": None, "learning_rate": 1e-12, "optimizer": "adamw"}
        output = run(**flags, max_train_steps=1)
        continued = load_file(output / script.LORA_FILE)
        assert continued.keys() == weights.keys()
        for name, tensor in continued.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-8)
        with safe_open(output / script.LORA_FILE, framework="pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (3, 3)
        assert metadata["transformer.target_modules"] == ["to_v", "ff.net.2"]


def test_a_lora_without_metadata_has_strength_1(script, run, flags, tmp_path):
    weights = load_file(run(rank=4, lora_alpha=2) / script.LORA_FILE)
    save_file(weights, tmp_path / "bare.safetensors")
    args = script.get_args(flags(init_lora=tmp_path / "bare.safetensors", rank=None, lora_alpha=None))
    assert (args.rank, args.lora_alpha, args.lora_target_modules) == (4, 4, FOUR)


def test_a_lora_on_the_hub(script, run, flags, monkeypatch):
    output = run(rank=4, lora_alpha=2)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: {"me/lora": output}[repo] / name)
    args = script.get_args(flags(init_lora="me/lora", rank=None, lora_alpha=None))
    assert (args.rank, args.lora_alpha, args.lora_target_modules) == (4, 4, FOUR)


@pytest.mark.parametrize("source", ["", "checkpoint-2"])
def test_another_alpha_leaves_the_lora_as_strong_as_it_is(script, run, source):
    """Given with --init_lora, alpha decides how the LoRA learns from then on: B is divided by what it adds."""
    earlier = run(rank=4, lora_alpha=2, learning_rate=1e-2)
    output = run(init_lora=earlier / source, rank=None, lora_alpha=16, learning_rate=1e-12, max_train_steps=1)
    before, after = (load_file(folder / script.LORA_FILE) for folder in (earlier, output))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-8)
    trained = load_file(output / "checkpoint-1" / script.LORA_FILE)
    for name in filter(lambda name: "lora_B" in name, trained):
        torch.testing.assert_close(trained[name] * (16 / 4), before[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("field", "value", "alpha"), [("use_rslora", True, 4), ("use_rslora", False, 2)])
def test_the_strength_of_a_lora_is_the_one_that_its_file_says(script, run, flags, tmp_path, field, value, alpha):
    """rsLoRA divides alpha by the square root of the rank, here 2."""
    path = with_metadata(script, run, tmp_path, {field: value})
    args = script.get_args(flags(init_lora=path, rank=None, lora_alpha=None))
    assert (args.rank, args.lora_alpha) == (4, alpha)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_a_lora_whose_layers_differ_is_refused(script, run, flags, tmp_path, capsys, field):
    path = with_metadata(script, run, tmp_path, {field: {"transformer_blocks.0.attn1.to_k": 8}})
    with pytest.raises(SystemExit) as error:
        script.get_args(flags(init_lora=path, rank=None, lora_alpha=None))
    assert error.value.code == 2 and "its layers differ in rank or alpha" in capsys.readouterr().err


FORMS = {
    "peft": lambda name: f"base_model.model.{name.removeprefix('transformer.')}",
    "peft with the adapter": lambda name: name.replace("transformer.", "base_model.model.", 1).replace(
        ".weight", ".default.weight"
    ),
    "ComfyUI": lambda name: name.replace("transformer.", "diffusion_model.", 1),
    "bare": lambda name: name.removeprefix("transformer."),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_another_program_is_read_whatever_its_prefix(script, run, tmp_path, form):
    """Its alpha stands in a tensor a layer. Here it is half the rank."""
    earlier = run(rank=4, lora_alpha=4, learning_rate=1e-2)
    weights = load_file(earlier / script.LORA_FILE)
    named = {FORMS[form](name): tensor for name, tensor in weights.items()}
    for name in list(named):
        if "lora_A" in name:
            named[name.split(".lora_A")[0] + ".alpha"] = torch.tensor(2.0)
    save_file(named, tmp_path / "other.safetensors")
    output = run(
        init_lora=tmp_path / "other.safetensors", rank=None, lora_alpha=None, learning_rate=1e-12, max_train_steps=1
    )
    for name, tensor in load_file(output / script.LORA_FILE).items():  # where it has its strength in its matrices
        expected = weights[name] * (0.5 if "lora_B" in name else 1)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-8)


def test_a_lora_that_says_no_alpha_has_strength_1_and_a_warning(script, run, tmp_path, caplog):
    """As the original scripts' own files, of rank 128 and alpha 64."""
    source = tmp_path / "bare.safetensors"
    save_file(load_file(run(rank=4, lora_alpha=4) / script.LORA_FILE), source)
    run(init_lora=source, rank=None, lora_alpha=None, max_train_steps=1)
    assert f"--init_lora {source} says no alpha: it is taken at strength 1" in caplog.text
    caplog.clear()
    output = run(init_lora=source, rank=None, lora_alpha=2, learning_rate=1e-12, max_train_steps=1)
    assert "says no alpha" not in caplog.text
    trained = load_file(output / "checkpoint-1" / script.LORA_FILE)
    for name, tensor in load_file(source).items():  # with the alpha that is given, its matrices are as they are
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-8)


REFUSED = {
    "lora_unet_blocks_0_attn.lora_down.weight": "its names are those of kohya's scripts",
    "text_encoder.layers.0.lora_A.weight": "it has a LoRA of the text encoder, too",
    "transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": "it is a DoRA",
    "transformer.transformer_blocks.0.attn1.to_q.diff": "is no matrix of a LoRA",
    None: "it is empty",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_to_start_from_is_refused_by_what_it_is(script, flags, capsys, tmp_path, name):
    save_file({name: torch.zeros(4, 4)} if name else {}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit) as error:
        script.get_args(flags(init_lora=tmp_path / "other.safetensors", rank=None, lora_alpha=None))
    assert error.value.code == 2 and REFUSED[name] in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused_before_anything_is_encoded(script, run, clips, tmp_path):
    other = tiny.make_model(tmp_path / "other", num_layers=3)
    source = run(pretrained_model_name_or_path=other, precompute_dir=tmp_path / "pre", rank=4, lora_alpha=4)
    layer = r"transformer.transformer_blocks.2.attn1.to_k.lora_A.weight is \[4, \d+\], not needed"
    with pytest.raises(script.RunError, match=f"does not fit the layers and the rank of this run: {layer}") as error:
        run(init_lora=source, rank=None, lora_alpha=None, instance_data_root=clips, precompute_dir=None)
    assert error.value.exit_code == 2 and not (clips / ".cogvideox_precomputed").exists()


def with_metadata(script, run, folder: Path, changes: dict) -> Path:
    """A LoRA of rank 4 and alpha 2 whose metadata has other fields."""
    source = run(rank=4, lora_alpha=2) / "checkpoint-2" / script.LORA_FILE
    with safe_open(source, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata |= {f"transformer.{name}": value for name, value in changes.items()}
    text = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(load_file(source), folder / "changed.safetensors", text)
    return folder / "changed.safetensors"


def test_flags_that_contradict_the_lora_are_refused_with_both_values(script, run, flags, capsys, tmp_path):
    output = run(rank=4, lora_alpha=2)
    agrees = flags(init_lora=output, rank=4, lora_alpha=4, lora_target_modules=["to_out.0", "to_q", "to_k", "to_v"])
    assert script.get_args(agrees).lora_target_modules == FOUR
    with pytest.raises(SystemExit) as error:
        script.get_args(flags(init_lora=output, rank=8, lora_alpha=3, lora_target_modules=["to_q"]))
    said = capsys.readouterr().err
    assert error.value.code == 2 and f"--rank is 8, but 4 in --init_lora {output}" in said
    assert "--lora_alpha" not in said and f"--lora_target_modules is ['to_q'], but {FOUR}" in said
    (tmp_path / "bad.safetensors").write_bytes(b"no LoRA")
    for source in (tmp_path / "bad.safetensors", tmp_path, "no/where"):
        with pytest.raises(SystemExit) as error:
            script.get_args(flags(init_lora=source))
        said = capsys.readouterr().err
        assert error.value.code == 2 and f"--init_lora {source} is no LoRA" in said


def test_defaults_of_the_lora(script):
    args = script.get_args(["--pretrained_model_name_or_path", "m"])
    assert (args.rank, args.lora_alpha, args.lora_target_modules, args.init_lora) == (128, 128, FOUR, None)


# ---- layers ---------------------------------------------------------------------------------------------------------


@BOTH
def test_other_layers_are_trained_saved_and_loaded_by_the_pipeline(script, run, model):
    layers = ["ff.net.0.proj", "ff.net.2", "to_q"]
    output = run(lora_target_modules=layers, learning_rate=1e-2)
    weights = load_file(output / script.LORA_FILE)
    assert len(weights) == 2 * 3 * 2 and all(tensor.abs().sum() > 0 for tensor in weights.values())
    # What ComfyUI's wrapper (kijai) asks for.
    assert all(name.startswith("transformer.") for name in weights)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(output)
    assert set(pipe.transformer.peft_config["default_0"].target_modules) == set(layers)
    trained = {n: p for n, p in pipe.transformer.named_parameters() if "lora_" in n}
    assert len(trained) == len(weights)
    for name, tensor in weights.items():
        loaded = trained[name.removeprefix("transformer.").replace(".weight", ".default_0.weight")]
        assert torch.equal(loaded, tensor)


def test_an_unknown_layer_is_refused_with_the_nearest(script, run):
    with pytest.raises(script.RunError, match=r"no layer ff.net.9 \(nearest: .*ff.net.2") as error:
        run(lora_target_modules=["to_q", "ff.net.9"])
    assert error.value.exit_code == 2


def test_a_name_that_is_also_no_linear_layer_is_refused_before_anything_is_encoded(script, run, clips):
    """`proj` is the convolution that makes patches, too: whoever loads the LoRA would look for it there."""
    said = r"proj names patch_embed.proj, which is no linear layer \(nearest: .*ff.net.0.proj"
    with pytest.raises(script.RunError, match=said):
        run(lora_target_modules=["proj"], instance_data_root=clips, precompute_dir=None)
    assert not (clips / ".cogvideox_precomputed").exists()


def test_resuming_with_other_layers_is_refused(script, run):
    run(lora_target_modules=["to_q"])
    with pytest.raises(script.RunError, match="lora_targets was"):
        run(lora_target_modules=["to_q", "to_k"], resume_from_checkpoint="latest")


# ---- blocks ---------------------------------------------------------------------------------------------------------


@BOTH
def test_a_lora_of_some_blocks_is_saved_and_loaded_by_the_pipeline(script, run, model):
    output = run(lora_blocks="1-1", lora_target_modules=["to_q", "ff.net.2"], learning_rate=1e-2)
    weights = load_file(output / script.LORA_FILE)
    names = {f"transformer_blocks.1.{layer}" for layer in ("attn1.to_q", "ff.net.2")}
    assert {name.removeprefix("transformer.").split(".lora_")[0] for name in weights} == names
    assert len(weights) == 2 * 2 and all(tensor.abs().sum() > 0 for tensor in weights.values())
    with safe_open(output / script.LORA_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.layers_to_transform"] == [1]
    # peft before 0.21 finds no block of a model by its number alone: the layers have their full names.
    assert metadata["transformer.target_modules"] == sorted(names)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(output)
    trained = {n: p for n, p in pipe.transformer.named_parameters() if "lora_" in n}
    loaded = {f"transformer.{n.replace('.default_0', '')}": tensor for n, tensor in trained.items()}
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[n], weights[n]) for n in weights)


def test_gradients_of_some_blocks_are_those_of_all(script, flags):
    """With a LoRA in the other blocks that does nothing, and without one."""
    args = script.get_args(flags(gradient_checkpointing=True))
    found = []
    for blocks in (None, "1-1"):
        transformer = script.load_transformer(args, torch.float32)
        script.add_lora(transformer, 4, 4, blocks=blocks)
        parameters = script.lora_parameters(transformer)
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(len(name) + 100 * ("lora_B" in name))
            if "blocks.1." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        torch.manual_seed(0)
        latents, config = torch.randn(1, 3, 4, 8, 12), transformer.config
        embeds = torch.randn(1, config.max_text_seq_length, config.text_embed_dim)
        rotary = script.rotary_for(config, script.read_config(args, "vae")[0], latents)
        result = transformer(latents, embeds, torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)[0]
        result.square().sum().backward()
        found.append({name: parameter.grad for name, parameter in parameters.items() if "blocks.1." in name})
    everywhere, late = found
    assert everywhere.keys() == late.keys() == parameters.keys() and len(late) == 8
    assert all(late[name].any() and torch.equal(late[name], everywhere[name]) for name in late)


def test_blocks_are_read_from_a_lora_and_stay_on_resume(script, run, flags, capsys):
    output = run(lora_blocks="1-1", learning_rate=1e-2)
    weights = load_file(output / script.LORA_FILE)
    own = {"rank": None, "lora_alpha": None}
    assert script.get_args(flags(init_lora=output, **own)).lora_blocks == "1-1"
    continued = run(init_lora=output, **own, learning_rate=1e-12, max_train_steps=1)
    assert load_file(continued / script.LORA_FILE).keys() == weights.keys()
    with pytest.raises(SystemExit):
        script.get_args(flags(init_lora=output, lora_blocks="0-1", **own))
    assert "--lora_blocks is 0-1, but 1-1 in --init_lora" in capsys.readouterr().err
    with pytest.raises(script.RunError, match="lora_blocks was 1-1, is None"):
        run(output_dir=output, resume_from_checkpoint="latest")
    resumed = run(output_dir=output, lora_blocks="01-1", resume_from_checkpoint="latest", max_train_steps=3)
    assert [row["step"] for row in read_metrics(resumed)] == [1, 2, 3]


@pytest.mark.parametrize("text", ["1", "2-1", "a-b", "-1-1", "1-"])
def test_blocks_that_are_no_range_are_refused(script, flags, capsys, text):
    with pytest.raises(SystemExit):
        script.get_args([*flags(), f"--lora_blocks={text}"])
    assert f"--lora_blocks must be the first and the last block, such as 21-41, not {text}" in capsys.readouterr().err


def test_blocks_that_the_model_does_not_have_are_refused(script, run):
    with pytest.raises(script.RunError, match=r"--lora_blocks 1-2: .* has the blocks 0-1") as error:
        run(lora_blocks="1-2")
    assert error.value.exit_code == 2
    with pytest.raises(script.RunError, match="no layer proj_out"):  # it is in no block
        run(lora_blocks="1-1", lora_target_modules=["to_q", "proj_out"])


def test_rows_of_the_training_are_as_before(run):
    names = {"step", "loss", "lr", "grad_norm", "seconds", "memory"}
    assert [row.keys() for row in read_metrics(run())] == [names] * 2
