"""The names that code written against the originals imports: the encoders' helpers, the card, the upload."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from conftest import BOTH, ROOT, run_on_the_cpu
from diffusers import DiffusionPipeline
from hub import TOKEN, Repository
from huggingface_hub import ModelCard, constants
from PIL import Image

EXPORTED = {
    "get_args": "argv",
    "VideoDataset": "instance_data_root dataset_name dataset_config_name caption_column video_column height width "
    "{mode}fps max_num_frames skip_frames_start skip_frames_end cache_dir id_token",
    "_get_t5_prompt_embeds": "tokenizer text_encoder prompt num_videos_per_prompt max_sequence_length device dtype "
    "text_input_ids",
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


@BOTH
@pytest.mark.parametrize("name", EXPORTED)
def test_names_and_parameters_stay(script, kind, name):
    parameters = list(script.inspect.signature(getattr(script, name)).parameters.values())
    expected = EXPORTED[name].format(mode="video_reshape_mode " if kind == "i2v" else "").split()
    assert [parameter.name for parameter in parameters[: len(expected)]] == expected
    assert all(parameter.default is not parameter.empty for parameter in parameters[len(expected) :])


def test_prompts_are_encoded_as_the_pipeline_does(script, model):
    pipe = DiffusionPipeline.from_pretrained(model)
    prompts = ["a red square moves left", "a blue square"]
    with torch.no_grad():  # as the pipeline's own call is
        expected, _ = pipe.encode_prompt(prompts, None, False, num_videos_per_prompt=2)
        embeds = script.encode_prompt(pipe.tokenizer, pipe.text_encoder, prompts, 2, 226, torch.device("cpu"))
    assert torch.equal(embeds, expected) and embeds.shape == (4, 226, 32)
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=226, return_tensors="pt").input_ids
    with torch.no_grad():
        from_ids = script.encode_prompt(None, pipe.text_encoder, prompts, text_input_ids=ids)
    assert torch.equal(from_ids, embeds[::2])
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


@BOTH
@pytest.mark.parametrize("form", ["arrays", "images", "none"])
def test_model_card(script, kind, tmp_path, form):
    """As code written against the originals calls it."""
    frames = np.random.default_rng(0).random((5, 64, 96, 3))
    images = [Image.fromarray((frame * 255).astype(np.uint8)) for frame in frames]
    videos = {"arrays": [frames, frames], "images": [images], "none": None}[form]
    prompt = 'a "red" square, 赤'
    script.save_model_card("me/lora", videos, "THUDM/CogVideoX-2b", prompt, str(tmp_path), fps=12)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "THUDM/CogVideoX-2b"
    widget = card.data.to_dict().get("widget") or []
    assert [entry["output"]["url"] for entry in widget] == [f"final_video_{i}.mp4" for i in range(len(videos or []))]
    assert all(entry["text"] == prompt and (tmp_path / entry["output"]["url"]).stat().st_size for entry in widget)
    (code,) = re.findall(r"```py\n(.*?)```", card.text, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert ({"t2v": "text-to-video", "i2v": "image-to-video"}[kind]) == card.data.pipeline_tag
    assert {"t2v": "CogVideoXPipeline", "i2v": "CogVideoXImageToVideoPipeline"}[kind] + ".from_pretrained" in code
    assert "load_lora_weights" in code and "set_adapters" not in card.text and repr(prompt) in code


@pytest.mark.parametrize(("trained_in", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("no", "bfloat16")])
def test_code_of_the_card_loads_what_was_trained(script, tmp_path, trained_in, dtype):
    script.save_model_card("me/lora", repo_folder=str(tmp_path), settings={"mixed_precision": trained_in})
    assert f"dtype=torch.{dtype})" in (tmp_path / "README.md").read_text()


def check_front_matter(card):
    """As ModelCard.validate does, which asks the Hub; its older versions ask the real one, whatever HF_ENDPOINT is."""
    ask = {"content": card.content, "repoType": "model"}
    answer = huggingface_hub.utils.get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=ask)
    assert answer.status_code == 200 and answer.json()["errors"] == []


COGVIDEOX = {"license": "other", "license_name": "cogvideox"}
COGVIDEOX["license_link"] = "https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE"
BASES = {
    "THUDM/CogVideoX-2b": ("THUDM/CogVideoX-2b", {"license": "apache-2.0"}),
    "zai-org/CogVideoX-5b": ("zai-org/CogVideoX-5b", COGVIDEOX),
    "THUDM/CogVideoX-5b-I2V": ("THUDM/CogVideoX-5b-I2V", COGVIDEOX),
    "someone/anything": ("someone/anything", {"license": "other"}),
    "./model": (None, {"license": "other"}),  # local folders, the second one in the Hub's cache
    "hub/models--THUDM--CogVideoX-2b/snapshots/1137dacf": ("THUDM/CogVideoX-2b", {"license": "apache-2.0"}),
}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("base_model", BASES)
def test_base_model_and_licence(script, tmp_path, base_model):
    if "./" in base_model or "snapshots" in base_model:
        Path(base_model).mkdir(parents=True)
    script.save_model_card("me/lora", base_model=base_model, repo_folder=str(tmp_path), id_token="TOK")
    card = ModelCard.load(tmp_path / "README.md")
    name, licence = BASES[base_model]
    said = {key: value for key, value in card.data.to_dict().items() if key.startswith("license")}
    assert (card.data.to_dict().get("base_model"), said) == (name, licence)
    assert card.data.instance_prompt == "TOK" and "`TOK`" in card.text
    assert str(tmp_path) not in card.content and "1137dacf" not in card.content
    assert f"from_pretrained({name or base_model!r}" in card.content
    check_front_matter(card)


@BOTH
@pytest.mark.usefixtures("hub")
def test_card_of_a_finished_run(finished, kind, models, tmp_path, monkeypatch):
    """Its widget, table and code. The code runs as it is, beside the files of the output folder."""
    output = finished / "output"
    card = ModelCard.load(output / "README.md")
    check_front_matter(card)
    shown = [(entry["text"], entry["output"]["url"]) for entry in card.data.to_dict()["widget"]]
    prompts = ["TOK a red square"] * 2 + ["TOK a blue square"] * 2
    assert shown == [(prompt, f"final_video_{index}.mp4") for index, prompt in enumerate(prompts)]
    sampled = sorted((output / "validation").glob("test_*"))
    assert [(output / url).read_bytes() for _, url in shown] == [video.read_bytes() for video in sampled]
    for row in ("rank | 4", "seed | 7", "steps | 4", "num clips | 4", "learning rate | 0.001", "lr warmup steps | 2"):
        assert f"\n| {row} |\n" in card.text, row
    (code,) = re.findall(r"```py\n(.*?)```", card.text, flags=re.DOTALL)
    for part in ("num_frames=9,", "guidance_scale=6,", "num_inference_steps=2,"):
        assert part in code, part
    assert f"from_pretrained({str(models[kind])!r}" in code
    assert "manual_seed(7)" in code and "set_adapters" not in card.text and "max_sequence_length=226," in code
    assert (output / "first_frame.png").exists() == (kind == "i2v") == ('load_image("first_frame.png")' in code)
    shutil.copytree(output, tmp_path / "output")
    monkeypatch.chdir(tmp_path / "output")
    run_on_the_cpu(code.replace("load_lora_weights('output')", "load_lora_weights('.')"), monkeypatch)
    assert Path("video.mp4").stat().st_size > 0


def test_card_of_a_model_with_short_prompts(run, tmp_path, monkeypatch):
    """The pipeline's default length would not fit the model. The card names no warm-up of a constant schedule."""
    base = tiny.make_model(tmp_path / "base", max_text_seq_length=32)
    output = run(pretrained_model_name_or_path=base, max_train_steps=1, precompute_dir=tmp_path / "pre")
    text = (output / "README.md").read_text()
    assert "max_sequence_length=32," in text and "warmup" not in text
    (code,) = re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(output.parent)
    code = code.replace("num_inference_steps=50", "num_inference_steps=1").replace("=49,", "=9,")
    run_on_the_cpu(code, monkeypatch)


PUSH = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "style"}
SHOW = {"validation_prompt": "a red square", "num_inference_steps": 1}


def check_what_arrived(repository, output, names):
    assert repository.files.keys() == set(names) and repository.commits == [sorted(names)]
    for name in names:
        assert repository.files[name] == (output / name).read_bytes(), name


UPLOADED = ["README.md", "final_video_0.mp4", "final_video_1.mp4", "pytorch_lora_weights.safetensors"]


@BOTH
def test_upload_is_one_commit_of_the_lora_and_what_shows_it(run, hub, kind, tmp_path):
    """And nothing else of an output folder that holds more."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "final_video_7.mp4").write_bytes(b"earlier")
    tracker = {"report_to": "tensorboard", "checkpointing_steps": 1}
    output = run(**PUSH, **SHOW | {"validation_prompt": "a red square:::a blue square"}, **tracker)
    names = UPLOADED + (["first_frame.png"] if kind == "i2v" else [])
    check_what_arrived(hub.repositories["me/style"], output, names)
    assert not hub.repositories["me/style"].private


def test_private_repository_is_made_private(run, hub):
    run(**PUSH, hub_private_repo=True)
    assert hub.repositories["me/style"].private and hub.repositories["me/style"].commits


def test_repository_is_named_after_the_output_folder(run, hub):
    run(**PUSH | {"hub_model_id": None})
    assert set(hub.repositories) == {"me/output"}


def test_existing_repository_is_committed_to(run, hub):
    hub.repositories["me/style"] = Repository()
    run(**PUSH)
    assert len(hub.repositories["me/style"].commits) == 1


REFUSED = {
    "no such user": ({"hub_token": "hf_wrong"}, "401"),
    "namespace of others": ({"hub_model_id": "others/style"}, "403"),
    "may read only": ({"hub_model_id": "team/style"}, "403"),
    "public": ({"hub_model_id": "me/public", "hub_private_repo": True}, "--hub_private_repo: me/public exists and is"),
    "no such name": ({"hub_model_id": "a//b"}, "a//b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_access_is_checked_before_anything_is_encoded(script, run, hub, clips, case):
    changes, why = REFUSED[case]
    hub.repositories |= {"team/style": Repository(writers=("them",)), "me/public": Repository()}
    with pytest.raises(script.RunError, match=re.escape(why)) as error:
        run(**PUSH | changes, instance_data_root=clips, precompute_dir=None)
    assert error.value.exit_code == 2 and not (clips / ".cogvideox_precomputed").exists()
    assert not (clips.parent / "output").exists()


COMMIT, UPLOAD = "POST .*/commit/", "PUT /lfs/"


@pytest.mark.parametrize("fault", [403, 409, 500, "drop"])
def test_failed_upload_keeps_everything_on_disk(script, run, hub, tmp_path, fault):
    hub.faults += [(COMMIT, fault)] * 5
    with pytest.raises(script.RunError, match="the upload to me/style failed: (?s:.)*by hand") as error:
        run(**PUSH)
    assert error.value.exit_code == 4 and not hub.repositories["me/style"].commits
    assert all((tmp_path / "output" / name).stat().st_size for name in ("README.md", script.LORA_FILE))


def test_upload_by_hand_is_as_the_message_says(script, run, hub, tmp_path):
    hub.faults += [(COMMIT, 500)]
    with pytest.raises(script.RunError) as error:
        run(**PUSH, **SHOW, output_dir=tmp_path / "my output")
    assert error.value.exit_code == 4 and not hub.repositories["me/style"].commits
    output = tmp_path / "my output"
    assert all((output / name).is_file() for name in UPLOADED if "_1" not in name)
    command = re.search(r"by hand, after `hf auth login`: (hf upload .*)", str(error.value))[1]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    words = [str(Path(sys.executable).with_name("hf")), *shlex.split(command)[1:]]
    subprocess.run(words, check=True, env=os.environ | environment | {"HF_HOME": str(tmp_path)})
    check_what_arrived(hub.repositories["me/style"], output, [name for name in UPLOADED if "_1" not in name])


@pytest.mark.long
def test_a_run_from_the_command_line_publishes(script, flags, hub, tmp_path):
    """The Hub as HF_ENDPOINT names it, through Xet, which is how huggingface_hub uploads where it can."""
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags(**PUSH, **SHOW)]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [name for name in UPLOADED if "_1" not in name]
    check_what_arrived(hub.repositories["me/style"], tmp_path / "output", names)
    assert hub.chunks and TOKEN not in done.stdout + done.stderr
