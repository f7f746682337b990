"""Image-to-video: the first frame reaches the transformer as in inference, and a LoRA learns to continue from it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import ONLY_I2V
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from test_objective import PROMPT, record_inputs
from transformers import T5EncoderModel

pytestmark = ONLY_I2V


@pytest.fixture
def one_clip(clips):
    """A red square that moves right."""
    (clips / "prompts.txt").write_text(f"{PROMPT}\n")
    (clips / "videos.txt").write_text("videos/00.mp4\n")
    return clips


@pytest.fixture
def no_noise(script, monkeypatch):
    """No noise on the image, and no draw from the latent distributions: what is left must be equal."""
    monkeypatch.setattr(script, "IMAGE_LOG_SIGMA", (-math.inf, 0.5))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())  # noqa: ARG005


def first_frame(script, clip) -> Image.Image:
    return Image.fromarray(script.VideoFile(str(clip)).read([0])[0])


@pytest.mark.parametrize(("name", "frames"), [("i2v", 9), ("i2v learned", 9), ("i2v 1.5", 9), ("i2v 1.5", 5)])
@pytest.mark.usefixtures("no_noise")
def test_image_latents_are_the_pipelines(script, run, models, one_clip, monkeypatch, name, frames):
    """CogVideoX 1.5 divides by the VAE's scale. Its 3 latent frames are padded to 4, and the image is in the first."""
    folder = models[name]
    calls = record_inputs(monkeypatch)
    run(
        pretrained_model_name_or_path=folder, instance_data_root=one_clip, precompute_dir=None, max_train_steps=1,
        noised_image_dropout=0, max_num_frames=frames, seed=2,
    )  # fmt: skip
    trained = calls.pop()["hidden_states"]  # [1, f, 2c, h, w]
    pipe = DiffusionPipeline.from_pretrained(folder)
    image = first_frame(script, one_clip / "videos" / "00.mp4")
    pipe(image, PROMPT, height=64, width=96, num_frames=frames, num_inference_steps=1, output_type="latent")
    sampled = calls.pop()["hidden_states"][1:]  # the half with the prompt

    latent_frames = {9: 4 if "1.5" in name else 3, 5: 2}[frames]
    assert trained.shape == sampled.shape == (1, latent_frames, 8, 8, 12)
    torch.testing.assert_close(trained[:, :, 4:], sampled[:, :, 4:], rtol=1e-5, atol=1e-6)
    for states in (trained, sampled):
        noisy_latents, image_latents = states[:, :, :4], states[:, :, 4:]
        assert image_latents[:, 0].abs().max() > 0.1 and not image_latents[:, 1:].any()
        assert all(frame.std() > 0.5 for frame in noisy_latents[0])  # at sampling's first step, and by the seed's draw
    scale = 1 / 1.15258426 if "1.5" in name else 1.15258426
    red = np.asarray(image)[:8, 40:48].mean() / 127.5 - 1  # a latent pixel is the mean of 8 x 8 pixels
    assert trained[0, 0, 7, 0, 5].item() == pytest.approx(red * scale, abs=1e-3)


def test_noise_is_added_to_the_image(script, models, monkeypatch):
    """An encoder that returns the pixels shows the noise itself; the VAE shows that it is added to the frame."""
    video = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    pixels.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(parameters=x))
    seen = [script.encode_clip(pixels, video, seed)["image_moments"][:, 0] for seed in range(400)]
    noise = torch.stack(seen) - video[0]  # [400, C, H, W]
    log_sigmas = noise.flatten(1).std(dim=1).log()  # [400]
    assert log_sigmas.mean().item() == pytest.approx(-3, abs=0.1)
    assert log_sigmas.std().item() == pytest.approx(0.5, abs=0.1)
    assert noise.mean().abs() < 1e-3 and not torch.equal(noise[0], noise[1])

    vae = DiffusionPipeline.from_pretrained(models["i2v"]).vae
    clean = script.encode_video(vae, video)
    far = (script.encode_clip(vae, video, 0)["image_moments"] - clean).abs().max()
    monkeypatch.setattr(script, "IMAGE_LOG_SIGMA", (math.log(1e-4), 0))
    near = (script.encode_clip(vae, video, 0)["image_moments"] - clean).abs().max()
    monkeypatch.setattr(script, "IMAGE_LOG_SIGMA", (-math.inf, 0))
    assert torch.equal(script.encode_clip(vae, video, 0)["image_moments"], clean)
    assert far > 0.01 > near > 0


def precomputed(folder) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((folder / ".cogvideox_precomputed" / "videos").iterdir())]


def test_each_clip_has_noise_of_its_own_and_the_same_in_every_run(run, clips, tmp_path):
    copies = [clips / "videos" / f"0{index}.mp4" for index in (1, 2, 3)]
    for number, copy in enumerate(copies):  # other files of the same frames
        copy.write_bytes((clips / "videos" / "00.mp4").read_bytes() + bytes(8 * (number + 1)))
    run(instance_data_root=clips, precompute_dir=None, random_flip=True, max_train_steps=1)
    items = precomputed(clips)
    assert len(items) == 8
    assert len({item["moments"].numpy().tobytes() for item in items}) == 2  # the clip, and its mirror image
    assert len({item["image_moments"].numpy().tobytes() for item in items}) == 8

    (clips / ".cogvideox_precomputed").rename(tmp_path / "before")
    run(instance_data_root=clips, precompute_dir=None, random_flip=True, max_train_steps=1, seed=5)
    for old, new in zip(sorted((tmp_path / "before" / "videos").iterdir()), precomputed(clips), strict=True):
        assert torch.equal(load_file(old)["image_moments"], new["image_moments"])


@pytest.mark.usefixtures("no_noise")
def test_first_frame_is_cropped_and_flipped_as_the_clip(run, one_clip):
    """The VAE is causal: the first latent frame of the clip is the first frame alone, so both must be equal."""
    columns = np.arange(160, dtype=np.uint8)[None, :, None] + np.arange(90, dtype=np.uint8)[:, None, None] // 2
    frames = np.stack([np.repeat(columns, 3, axis=2) + 4 * index for index in range(5)]).astype(np.uint8)
    tiny.write_clip(one_clip / "videos" / "00.mp4", frames)
    seen = set()
    for mode in ("center", "random", "none", "stretch"):
        # A relative path: the random crop is drawn from it, and must not be the centered one by chance.
        run(
            instance_data_root="clips", precompute_dir=one_clip / mode / ".cogvideox_precomputed", random_flip=True,
            video_reshape_mode=mode, max_train_steps=1, max_num_frames=5,
        )  # fmt: skip
        items = precomputed(one_clip / mode)
        assert len(items) == 2
        for item in items:
            assert item["image_moments"].shape == (8, 1, 8, 12)
            torch.testing.assert_close(item["image_moments"], item["moments"][:, :1], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(item["image_moments"], item["moments"][:, 1:], atol=1e-2)
            seen.add(item["image_moments"].numpy().tobytes())
    assert len(seen) == 6  # center, random (= none), stretch: each and its mirror image


def test_start_image_is_cropped_as_a_clip(script, flags, tmp_path):
    """For validation: a wide picture, red to the left and right; the middle is what a centered crop leaves."""
    picture = np.zeros((64, 192, 3), dtype=np.uint8)
    picture[:, :48, 0] = picture[:, 144:, 0] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    for mode, red in (("center", 0), ("random", 0), ("stretch", 0.5)):
        ask = {"validation_prompt": "a", "validation_images": tmp_path / "wide.png", "video_reshape_mode": mode}
        (inputs,) = script.validation_inputs(script.get_args(flags(**ask)))
        image = inputs["image"].resize((96, 64))
        assert (np.asarray(image)[..., 0] > 127).mean() == pytest.approx(red, abs=0.02)


def test_each_prompt_is_sampled_from_its_own_image(script, run, start_images, monkeypatch):
    asked = []
    sample = script.PIPELINE.__call__
    monkeypatch.setattr(script.PIPELINE, "__call__", lambda *a, **k: asked.append(k["image"]) or sample(*a, **k))
    run(validation_prompt="one:::two", num_inference_steps=1)
    assert len(asked) == 4  # before the first step, and at the end
    for image, path in zip(asked, [*start_images[:2], *start_images[:2]], strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


@pytest.mark.parametrize(("dropout", "low", "high"), [(0, 0, 0), (0.5, 0.45, 0.55), (1, 1, 1)])
def test_dropout_zeroes_whole_clips(script, dropout, low, high):
    torch.manual_seed(0)
    moments = torch.cat([torch.full((2000, 4, 1, 2, 2), 1.0), torch.full((2000, 4, 1, 2, 2), -30.0)], dim=1)
    image_latents = script.sample_image_latents(moments, 3, {"scaling_factor": 0.5}, dropout)
    assert image_latents.shape == (2000, 3, 4, 2, 2) and not image_latents[:, 1:].any()
    first = image_latents[:, 0].flatten(1)
    dropped = (first == 0).all(dim=1)
    assert low <= dropped.float().mean() <= high
    torch.testing.assert_close(first[~dropped], torch.full_like(first[~dropped], 0.5))


@pytest.mark.parametrize("dropout", [0, 1])
def test_dropout_reaches_the_training(run, monkeypatch, dropout):
    calls = record_inputs(monkeypatch)
    run(noised_image_dropout=dropout, max_train_steps=3)
    images = torch.cat([call["hidden_states"][:, 0, 4:].flatten(1) for call in calls])
    assert len(images) == 6
    assert images.any(dim=1).all() if dropout == 0 else not images.any()


@pytest.mark.parametrize(("frames", "is_warned"), [(9, False), (5, True)])
def test_clips_of_another_length_than_the_learned_positions_are_warned_of(run, models, caplog, frames, is_warned):
    run(pretrained_model_name_or_path=models["i2v learned"], max_num_frames=frames, max_train_steps=1)
    assert ("Clips that do not give 9 frames train with computed positions" in caplog.text) == is_warned


def test_start_images_are_opened_once(run, start_images, monkeypatch, tmp_path):
    """What was opened at the start is there at every validation, even if the file is not."""
    image = tmp_path / "start.png"
    image.write_bytes(start_images[0].read_bytes())
    encode = T5EncoderModel.forward

    def remove_first(*args, **keywords):
        image.unlink(missing_ok=True)
        return encode(*args, **keywords)

    monkeypatch.setattr(T5EncoderModel, "forward", remove_first)
    ask = {"validation_prompt": "a red square", "validation_images": image, "validation_steps": 1}
    output = run(**ask, num_inference_steps=1, precompute_dir=tmp_path / "pre")
    assert len(list((output / "validation").iterdir())) == 3 and not image.exists()


CAPTION = "a white square moves right"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small model that was trained for seconds to continue from an image, as 5B-I2V was for weeks."""
    sizes = {"num_attention_heads": 4, "num_layers": 3, "time_embed_dim": 64, "max_text_seq_length": 32}
    folder = tmp_path_factory.mktemp("pretrained")
    model = tiny.make_model(folder / "model", "i2v", use_learned_positional_embeddings=True, **sizes)
    tiny.pretrain(model, steps=150)
    return model


def losses_with_images(script, model, output, clips, weight: float = 1.0) -> list[float]:
    """Mean loss of the first of `clips`, under one noise, with the first frame of each of them as its image (times
    `weight`)."""
    args = script.get_args(["--pretrained_model_name_or_path", str(model)])
    transformer = script.load_transformer(args, torch.float32)
    script.add_lora(transformer, 16, 16)
    script.load_lora(transformer, output / script.LORA_FILE)
    pipe = DiffusionPipeline.from_pretrained(model)
    prompt_embeds = pipe.encode_prompt(CAPTION, None, False, max_sequence_length=32)[0].repeat(32, 1, 1)
    columns = {"caption_column": "all.txt", "video_column": "files.txt"}
    root = clips[0].parent
    (root / "all.txt").write_text("a caption\n" * len(clips))
    (root / "files.txt").write_text("".join(f"{clip.name}\n" for clip in clips))
    dataset = script.VideoDataset(str(root), **columns, height=64, width=96, max_num_frames=9)
    videos = [dataset[index]["instance_video"] for index in range(len(clips))]
    moments = script.encode_video(pipe.vae, videos[0])[None].repeat(32, 1, 1, 1, 1)
    losses = []
    for video in videos:
        torch.manual_seed(0)
        image_moments = script.encode_video(pipe.vae, video[:1])[None].repeat(32, 1, 1, 1, 1)
        batch = {"moments": moments, "image_moments": image_moments, "prompt_embeds": prompt_embeds}
        args.noised_image_dropout = 0.0
        latents, conditions = script.prepare_batch(batch, transformer.config, dict(pipe.vae.config), args)
        conditions["image_latents"] *= weight
        with torch.no_grad():
            losses.append(script.diffusion_loss(transformer, pipe.scheduler, latents, conditions).item())
    return losses


def test_overfitted_lora_continues_from_the_image(script, run, pretrained, tmp_path):
    clips = tiny.make_clips(tmp_path / "clips", colors=tiny.WHITE)
    (clips / "prompts.txt").write_text(f"{CAPTION}\n")
    (clips / "videos.txt").write_text("videos/00.mp4\n")
    output = run(
        pretrained_model_name_or_path=pretrained, instance_data_root=clips, precompute_dir=None, rank=16,
        lora_alpha=16, learning_rate=1e-2, optimizer="adamw", train_batch_size=1, max_train_steps=300,
        noised_image_dropout=0,
    )  # fmt: skip
    files = [clips / "videos" / f"{index:02d}.mp4" for index in range(4)]  # right, left, down, up: other first frames
    own, *others = losses_with_images(script, pretrained, output, files)
    assert own < 0.6 * min(others), (own, others)

    own, *others = losses_with_images(script, pretrained, output, files, weight=0)
    assert {own} == set(others)  # without image latents the images do not differ: the check above sees them alone
