"""Training feeds the transformer what inference feeds it, and the loss is the one written down."""

import pytest
import tiny
import torch
from conftest import BOTH, SCRIPTS
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

PROMPT = "a red square moves right"  # the caption of the first clip


def record_inputs(monkeypatch) -> list[dict]:
    """What every CogVideoX transformer is called with from now on."""
    calls = []
    forward = CogVideoXTransformer3DModel.forward

    def spy(self, *args, **kwargs):
        assert not args
        calls.append(kwargs)
        return forward(self, **kwargs)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", spy)
    return calls


OWN, OTHER = (64, 96, 9), (96, 64, 5)
T2V, I2V = SCRIPTS
INPUTS = [
    (T2V, "t2v", OWN), (T2V, "t2v", OTHER), (T2V, "t2v sincos", OWN), (T2V, "t2v sincos", OTHER),
    (I2V, "i2v", OWN), (I2V, "i2v", OTHER), (I2V, "i2v learned", OWN),
    # CogVideoX 1.5 with latent frames of odd number, which are padded, and of even number.
    *[(T2V, "t2v 1.5", size) for size in (OWN, (96, 64, 13), (128, 128, 17), (64, 64, 1))],
    *[(I2V, "i2v 1.5", size) for size in (OWN, (96, 64, 13), (128, 128, 17))],
]  # fmt: skip


@pytest.mark.parametrize(("script", "name", "size"), INPUTS, indirect=["script"])
def test_inputs_are_the_pipelines(run, kind, models, name, size, clips, monkeypatch):
    height, width, frames = size
    folder = models[name]
    (clips / "prompts.txt").write_text(f"{PROMPT}\n")
    (clips / "videos.txt").write_text("videos/00.mp4\n")
    tiny.write_clip(clips / "videos" / "00.mp4", tiny.moving_square(frames, 64, 96))
    calls = record_inputs(monkeypatch)
    changes = {"pretrained_model_name_or_path": folder, "instance_data_root": clips, "max_train_steps": 1}
    run(**changes, height=height, width=width, max_num_frames=frames)
    trained = calls.pop()
    pipe = DiffusionPipeline.from_pretrained(folder)
    ask = {"prompt": PROMPT} | ({"image": Image.new("RGB", (width, height))} if kind == "i2v" else {})
    pipe(**ask, height=height, width=width, num_frames=frames, num_inference_steps=1, output_type="latent")
    sampled = calls.pop()  # batch: without and with the prompt

    assert sampled.pop("attention_kwargs") is None
    ofs = sampled.pop("ofs", None)
    assert trained.pop("ofs", None) == ofs and (ofs is not None) == (name == "i2v 1.5")
    assert set(trained) == set(sampled)
    assert trained["hidden_states"].shape == (1, *sampled["hidden_states"].shape[1:])
    assert trained["hidden_states"].dtype == sampled["hidden_states"].dtype
    assert torch.equal(trained["encoder_hidden_states"][0], sampled["encoder_hidden_states"][1])
    assert trained["timestep"].dtype == sampled["timestep"].dtype == torch.int64
    assert trained["timestep"].shape == (1,)
    if "sincos" not in name:
        for in_training, at_inference in zip(trained["image_rotary_emb"], sampled["image_rotary_emb"], strict=True):
            assert torch.equal(in_training, at_inference)
    else:
        assert trained["image_rotary_emb"] is sampled["image_rotary_emb"] is None


def test_latents_have_the_pipelines_layout_and_scale(script, model):
    """The pipeline's own decoding undoes what training does to the VAE's output."""
    pipe = DiffusionPipeline.from_pretrained(model)
    video = torch.rand(9, 3, 64, 96) * 2 - 1  # [F, C, H, W]
    moments = script.encode_video(pipe.vae, video)  # [2c, f, h, w]
    torch.manual_seed(3)
    latents = script.sample_latents(moments[None], pipe.vae.config.scaling_factor)
    torch.manual_seed(3)
    direct = pipe.vae.encode(video.permute(1, 0, 2, 3)[None]).latent_dist.sample()  # [1, c, f, h, w]
    assert latents.shape == (1, 3, 4, 8, 12)
    with torch.no_grad():
        decoded, expected = pipe.decode_latents(latents), pipe.vae.decode(direct).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def loss_of(script, kind, transformer, scheduler, latents, num_padding: int = 0, **drawn) -> torch.Tensor:
    """`diffusion_loss` on `latents`, with no prompt and no image."""
    conditions = {"encoder_hidden_states": torch.zeros(len(latents), 226, 32), "image_rotary_emb": None}
    conditions["num_padding"] = num_padding
    if kind == "i2v":
        conditions["image_latents"] = torch.zeros_like(latents)
    return script.diffusion_loss(transformer, scheduler, latents, conditions, **drawn)


@BOTH
@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_loss_is_the_one_written_by_hand(script, kind, scheduler_class):
    scheduler = scheduler_class(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    torch.manual_seed(0)
    latents, noise, guess = torch.randn(3, 2, 5, 4, 8, 12).unbind()  # each [B, f, C, h, w]
    latents, noise, guess = (x[:, :3] for x in (latents, noise, guess))
    timesteps = torch.tensor([0, 999])
    seen = {}

    def transformer(hidden_states, timestep, **_):
        seen.update(noisy=hidden_states, timestep=timestep)
        return (guess,)

    loss = loss_of(script, kind, transformer, scheduler, latents, noise=noise, timesteps=timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps].double().view(2, 1, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noisy = signal * latents.double() + sigma * noise.double()
    torch.testing.assert_close(seen["noisy"][:, :, :4].double(), noisy, rtol=1e-5, atol=1e-5)
    x0 = signal * noisy - sigma * guess.double()
    by_hand = sum(((x0[i] - latents[i].double()) ** 2 / (1 - alpha_bar[i])).mean() for i in range(2)) / 2
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-3, atol=0)
    velocity = signal * noise.double() - sigma * latents.double()
    torch.testing.assert_close(loss.double(), ((guess.double() - velocity) ** 2).mean(), rtol=1e-3, atol=0)


def test_timesteps_cover_all_noise_levels_and_differ_in_a_batch(script, kind):
    drawn = []

    def transformer(hidden_states, timestep, **_):
        drawn.append(timestep)
        return (hidden_states[:, :, :1],)

    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction")
    torch.manual_seed(0)
    for _ in range(200):
        loss_of(script, kind, transformer, scheduler, torch.zeros(64, 1, 1, 1, 1))
    counts = torch.bincount(torch.cat(drawn), minlength=1000)
    assert len(counts) == 1000 and counts.min() >= 1  # 12800 draws: the probability that one level is missing is 3e-3


def test_a_fresh_latent_sample_each_step(script):
    moments = torch.zeros(1, 8, 2, 4, 4)  # mean 0, log variance 0
    first, second = (script.sample_latents(moments, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    sample = torch.cat([script.sample_latents(moments, 0.5).flatten() for _ in range(100)])
    assert abs(sample.std().item() - 0.5) < 0.02


def test_stored_moments_are_the_vaes(script, model):
    vae = DiffusionPipeline.from_pretrained(model).vae
    video = torch.rand(5, 3, 64, 96) * 2 - 1
    stored = DiagonalGaussianDistribution(script.encode_video(vae, video)[None])
    direct = vae.encode(video.permute(1, 0, 2, 3)[None]).latent_dist
    assert torch.equal(stored.mean, direct.mean) and torch.equal(stored.std, direct.std)
