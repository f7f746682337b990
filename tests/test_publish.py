"""The names that code written against the originals imports: the encoders' helpers, the card, the upload."""

import argparse
import ast
import fnmatch
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

EXPORTED = {
    "get_args": "argv",
    "VideoDataset": "instance_data_root dataset_name dataset_config_name caption_column video_column height width "
    "video_reshape_mode fps max_num_frames skip_frames_start skip_frames_end cache_dir id_token",
    "encode_prompt": "tokenizer text_encoder prompt num_videos_per_prompt max_sequence_length device dtype "
    "text_input_ids",
    "compute_prompt_embeddings": "tokenizer text_encoder prompt max_sequence_length device dtype requires_grad",
    "prepare_rotary_positional_embeddings": "height width num_frames vae_scale_factor_spatial patch_size "
    "attention_head_dim device base_height base_width",
    "get_optimizer": "args params_to_optimize use_deepspeed",
    "log_validation": "pipe args accelerator pipeline_args epoch is_final_validation",
    "save_model_card": "repo_id videos base_model validation_prompt repo_folder fps",
    "main": "args",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_names_and_parameters_stay(script, name):
    parameters = list(script.inspect.signature(getattr(script, name)).parameters.values())
    expected = EXPORTED[name].split()
    assert [parameter.name for parameter in parameters[: len(expected)]] == expected
    assert all(parameter.default is not parameter.empty for parameter in parameters[len(expected) :])


def test_prompts_are_encoded_as_the_pipeline_does(script, model):
    pipe = DiffusionPipeline.from_pretrained(model)
    prompts = ["a red square moves left", "a blue square"]
    with torch.no_grad():  # as the pipeline's own call is
        theirs, _ = pipe.encode_prompt(prompts, None, False, num_videos_per_prompt=2)
        ours = script.encode_prompt(pipe.tokenizer, pipe.text_encoder, prompts, 2, 226, torch.device("cpu"))
    assert torch.equal(ours, theirs) and ours.shape == (4, 226, 32)
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=226, return_tensors="pt").input_ids
    with torch.no_grad():
        from_ids = script.encode_prompt(None, pipe.text_encoder, prompts, text_input_ids=ids)
    assert torch.equal(from_ids, ours[::2])
    with pytest.raises(ValueError):
        script.encode_prompt(None, pipe.text_encoder, prompts)
    arguments = (pipe.tokenizer, pipe.text_encoder, prompts, 226, torch.device("cpu"), torch.float32)
    assert not script.compute_prompt_embeddings(*arguments).requires_grad
    assert script.compute_prompt_embeddings(*arguments, requires_grad=True).requires_grad


def test_deepspeed_gets_a_placeholder(script, flags):
    from accelerate.utils.deepspeed import DummyOptim

    args = script.get_args(flags())
    optimizer = script.get_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], use_deepspeed=True)
    assert isinstance(optimizer, DummyOptim)


@pytest.mark.parametrize("form", ["arrays", "images", "none"])
def test_model_card(script, kind, tmp_path, form):
    frames = np.random.default_rng(0).random((5, 64, 96, 3))
    images = [Image.fromarray((frame * 255).astype(np.uint8)) for frame in frames]
    videos = {"arrays": [frames, frames], "images": [images], "none": None}[form]
    prompt = 'a "red" square'
    script.save_model_card("me/lora", videos, "THUDM/CogVideoX-2b", prompt, str(tmp_path), fps=12)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "THUDM/CogVideoX-2b"
    shown = [entry["output"]["url"] for entry in (card.data.to_dict().get("widget") or [])]
    assert shown == [f"final_video_{index}.mp4" for index in range(len(videos or []))]
    assert all((tmp_path / name).stat().st_size > 0 for name in shown)
    (code,) = re.findall(r"```py\n(.*?)```", card.text, flags=re.DOTALL)
    ast.parse(code)
    assert ({"t2v": "text-to-video", "i2v": "image-to-video"}[kind]) in card.data.tags
    assert {"t2v": "CogVideoXPipeline", "i2v": "CogVideoXImageToVideoPipeline"}[kind] + ".from_pretrained" in code
    assert "load_lora_weights" in code and "set_adapters" not in card.text and prompt.replace('"', '\\"') in code


class Hub:
    """Stands in for huggingface_hub's HfApi, and fails on demand."""

    uploads, fail = [], False

    def __init__(self, token):
        self.token = token

    def create_repo(self, repo_id, exist_ok):
        assert exist_ok and self.token == "hf_t"
        return argparse.Namespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, **kwargs):
        assert self.token == "hf_t"
        if Hub.fail:
            raise ConnectionError("the Hub is down")
        Hub.uploads.append(kwargs)


def test_upload_is_the_lora_its_card_and_videos(script, run, monkeypatch):
    monkeypatch.setattr(script, "HfApi", Hub)
    ask = {"validation_prompt": "a red square", "num_inference_steps": 1, "report_to": "tensorboard"}
    output = run(push_to_hub=True, hub_token="hf_t", hub_model_id="style", checkpointing_steps=1, **ask)
    upload = Hub.uploads.pop()
    assert upload["repo_id"] == "me/style" and upload["folder_path"] == str(output)
    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    sent = {file for file in files for pattern in upload["allow_patterns"] if fnmatch.fnmatch(file, pattern)}
    assert sent == {"README.md", script.LORA_FILE, "final_video_0.mp4"}


def test_failed_upload_keeps_everything_and_says_what_to_do(script, run, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "HfApi", Hub)
    monkeypatch.setattr(Hub, "fail", True)
    with pytest.raises(script.RunError) as error:
        run(push_to_hub=True, hub_token="hf_t")
    assert error.value.exit_code == 4 and "hf upload me/output" in str(error.value)
    assert (tmp_path / "output" / script.LORA_FILE).is_file()
