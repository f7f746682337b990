"""The LoRA file alone gives at inference what was trained: strength alpha / rank, once."""

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file


def transformer_inputs(config) -> dict:
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(1, 3, config.in_channels, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(1, 226, 32, generator=generator),
        "timestep": torch.tensor([400]),
        "return_dict": False,
    }


def randomised_lora(script, model, folder, is_for_use: bool = False):
    """A transformer whose LoRA (rank 4, alpha 2) is far from zero, saved to `folder`."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
    trainable = script.add_lora(transformer, 4, 2.0)
    torch.manual_seed(1)
    for parameter in trainable:
        torch.nn.init.normal_(parameter, std=0.3)
    script.save_lora(transformer, folder / script.LORA_FILE, script.lora_weights(transformer), is_for_use)
    return transformer.eval()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("is_for_use", [False, True])
def test_file_alone_gives_the_trained_outputs(script, model, tmp_path, is_for_use):
    trained = randomised_lora(script, model, tmp_path, is_for_use)
    pipe = DiffusionPipeline.from_pretrained(model)
    inputs = transformer_inputs(trained.config)
    with torch.no_grad():
        base = pipe.transformer(**inputs)[0]
        pipe.load_lora_weights(tmp_path)
        loaded, expected = pipe.transformer(**inputs)[0], trained(**inputs)[0]
    assert relative_difference(loaded, expected) < 1e-5
    assert relative_difference(base, expected) > 0.01  # the LoRA is not negligible here


@pytest.mark.parametrize(("is_for_use", "scale"), [(False, 2 / 4), (True, 1)])
def test_equals_weights_merged_by_hand(script, model, tmp_path, is_for_use, scale):
    """Programs that take the matrices alone, without the metadata's alpha, get the trained strength from the file that
    is for use."""
    trained = randomised_lora(script, model, tmp_path, is_for_use)
    merged = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer").eval()
    lora = load_file(tmp_path / script.LORA_FILE)
    merged_layers = 0
    with torch.no_grad():
        for name, module in merged.named_modules():
            key = f"transformer.{name}.lora_A.weight"
            if key in lora:
                module.weight += scale * lora[key.replace("lora_A", "lora_B")] @ lora[key]
                merged_layers += 1
        inputs = transformer_inputs(merged.config)
        assert relative_difference(trained(**inputs)[0], merged(**inputs)[0]) < 1e-5
    assert merged_layers == 2 * 4 == len(lora) // 2


def test_metadata_holds_rank_and_alpha(script, run):
    """A checkpoint has the matrices as they train. The finished LoRA has alpha / rank multiplied into B."""
    output = run(rank=4, lora_alpha=2)
    for folder, alpha in ((output / "checkpoint-2", 2), (output, 4)):
        with safe_open(folder / script.LORA_FILE, framework="pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}
        # Older versions of peft refuse a file with a field that they do not know.
        assert metadata.keys() == {f"transformer.{name}" for name in ("r", "lora_alpha", "target_modules")}
        assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == alpha
        # In one order in all runs.
        assert metadata["transformer.target_modules"] == ["to_k", "to_q", "to_v", "to_out.0"]
    trained, finished = (load_file(folder / script.LORA_FILE) for folder in (output / "checkpoint-2", output))
    for name, tensor in trained.items():
        assert torch.equal(finished[name], tensor * 0.5 if "lora_B" in name else tensor), name


def test_training_moves_the_lora(script, run):
    lora = load_file(run(learning_rate=1e-2) / script.LORA_FILE)
    assert all(tensor.abs().sum() > 0 for name, tensor in lora.items() if "lora_B" in name)
