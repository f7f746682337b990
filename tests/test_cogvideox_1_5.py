"""CogVideoX 1.5: padded latent frames, its own rotary grid, and image latents that are divided. What its transformer
is fed is compared with the pipelines in test_objective and test_image_conditioning."""

import numpy as np
import pytest
import tiny
import torch
from conftest import BOTH, ONLY_I2V, SCRIPTS
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from test_objective import loss_of
from test_training import same_tensors
from test_validation import sampled

T2V, I2V = SCRIPTS


@pytest.fixture
def model(models, kind):
    return models[f"{kind} 1.5"]


@BOTH
def test_train_resume_and_sample(script, run, model, kind, start_images, monkeypatch, tmp_path):
    """A resumed run ends with the weights of one never stopped, and its last sample is what the LoRA gives."""
    settings = {"checkpointing_steps": 2, "fps": 16, "learning_rate": 1e-2}
    never_stopped = run(**settings, max_train_steps=4, output_dir=tmp_path / "never")
    output = run(**settings, max_train_steps=2)
    (output / script.LORA_FILE).unlink()
    more = settings | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    validated = sampled(script, run, monkeypatch, **more)
    lora = load_file(output / script.LORA_FILE)
    assert same_tensors(lora, load_file(never_stopped / script.LORA_FILE))
    assert all(tensor.abs().sum() > 0 for tensor in lora.values())

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = script.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    ask = {"image": Image.open(start_images[0])} if kind == "i2v" else {}
    ask |= {"prompt": "a red square", "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    videos = []
    for weights in (None, output):
        if weights is not None:
            pipe.load_lora_weights(weights)
        videos.append(pipe(**ask, generator=torch.Generator().manual_seed(0), output_type="np").frames[0])
    without, expected = videos
    torch.testing.assert_close(validated[0], torch.from_numpy(expected), rtol=1e-3, atol=3e-3)  # pictures have 8 bits
    assert np.abs(without - expected).max() > 1e-2


@BOTH
def test_loss_is_that_of_the_clips_own_frames(script, kind):
    """The prediction for padding changes nothing; that for a frame of the clip does."""
    scheduler = tiny.make_scheduler()
    torch.manual_seed(0)
    latents, noise, guess = torch.randn(3, 2, 4, 4, 8, 12).unbind()  # each [B, f, C, h, w]
    drawn = {"noise": noise, "timesteps": torch.tensor([100, 900])}

    def loss(guess, **extra):
        return loss_of(script, kind, lambda **_: (guess,), scheduler, latents, **extra | drawn)

    padding, frame = guess.clone(), guess.clone()
    padding[:, 0] += 1
    frame[:, 1] += 1
    assert torch.equal(loss(guess, num_padding=1), loss(padding, num_padding=1))
    assert not torch.equal(loss(guess, num_padding=1), loss(frame, num_padding=1))
    assert not torch.equal(loss(guess), loss(padding))
    short = {"noise": noise[:, 1:], "timesteps": drawn["timesteps"]}
    without = loss_of(script, kind, lambda **_: (guess[:, 1:],), scheduler, latents[:, 1:], **short)
    torch.testing.assert_close(loss(guess, num_padding=1), without)


@pytest.mark.parametrize(("frames", "num_padding"), [(1, 1), (5, 0), (9, 1), (13, 0), (17, 1)])
def test_padding_is_a_copy_of_the_first_latent_frame(script, flags, model, frames, num_padding):
    pipe = DiffusionPipeline.from_pretrained(model)
    moments = torch.randn(2, 8, (frames - 1) // 4 + 1, 8, 12)
    batch = {"moments": moments, "prompt_embeds": torch.zeros(2, 226, 32)}
    args = script.get_args(flags())
    latents, conditions = script.prepare_batch(batch, pipe.transformer.config, dict(pipe.vae.config), args)
    assert conditions["num_padding"] == num_padding and latents.shape[1] == moments.shape[2] + num_padding
    assert torch.equal(latents[:, 0], latents[:, 1]) == (num_padding == 1)


def test_size_beyond_its_positions_is_refused_with_the_nearest(script, run):
    with pytest.raises(script.RunError, match="works up to 128 x 128: --height 128 --width 96, not 192 x 96") as error:
        run(height=192, max_train_steps=1)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("frames", "fps", "said"), [
    (9, 16, "9 frames are 3 latent frames, with 1 of padding before them, as in the pipeline; 13 frames would need"),
    (13, 16, None), (13, 8, "CogVideoX 1.5 makes 16 frames a second: give --fps 16 in place of 8"),
])  # fmt: skip
def test_what_is_said_of_frames(run, caplog, frames, fps, said):
    caplog.set_level("INFO")
    run(max_num_frames=frames, fps=fps, max_train_steps=1)
    assert said is None or said in caplog.text
    assert ("of padding" in caplog.text, "16 frames a second" in caplog.text) == (frames == 9, fps == 8)


@pytest.mark.long
@ONLY_I2V
def test_a_bright_clip_is_sampled_as_bright(script, run, tmp_path):
    """A base that continues an image, then a LoRA of one clip. With image latents that are multiplied by the VAE's
    scale in training, and not divided as in the pipeline, the sample would be 6 % darker than the clip."""
    sizes = {"num_attention_heads": 4, "num_layers": 3, "time_embed_dim": 64, "max_text_seq_length": 32}
    base = tiny.make_model(tmp_path / "base", "i2v", version="1.5", **sizes)
    colors = np.random.default_rng(0).integers(0, 256, (64, 3), dtype=np.uint8)
    tiny.pretrain(base, 300, videos=[("a color", np.broadcast_to(color, (9, 32, 64, 3)).copy()) for color in colors])
    frames = np.broadcast_to(np.array([240, 200, 160], dtype=np.uint8), (9, 32, 64, 3))
    clip = tiny.write_clip(tmp_path / "clips" / "0.mp4", frames)
    (tmp_path / "clips" / "prompts.txt").write_text("a color\n")
    (tmp_path / "clips" / "videos.txt").write_text("0.mp4\n")
    output = run(
        pretrained_model_name_or_path=base, instance_data_root=tmp_path / "clips", precompute_dir=None, rank=32,
        lora_alpha=32, learning_rate=2e-3, optimizer="adamw", train_batch_size=1, max_train_steps=150, fps=16,
        noised_image_dropout=0, height=32, width=64,
    )  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(output)
    decoded = script.VideoFile(str(clip)).read(list(range(9)))  # [F, H, W, C]
    ask = {"prompt": "a color", "height": 32, "width": 64, "num_frames": 9, "max_sequence_length": 32}
    ask |= {"num_inference_steps": 20, "guidance_scale": 1, "generator": torch.Generator().manual_seed(0)}
    video = pipe(Image.fromarray(decoded[0]), output_type="np", **ask).frames[0] * 255  # [F, H, W, C]
    assert video.shape == decoded.shape
    assert video.mean() == pytest.approx(decoded.mean(), rel=0.02)
    for channel in range(3):
        assert video[..., channel].mean() == pytest.approx(decoded[..., channel].mean(), rel=0.06)
