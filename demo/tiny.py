"""Tiny CogVideoX models and clips, made from configs and arrays: what the tests and the demo train on.

    python demo/tiny.py FOLDER [--kind i2v]

writes what the demo needs: FOLDER/model, whose transformer was trained for a minute to make squares that move right or
left, and FOLDER/clips, of a smiley, which it has never seen, that also moves up and down; for image-to-video also
FOLDER/images, with first frames.
"""

import argparse
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# bitsandbytes, which diffusers imports, warns of a kernel for CPUs that is needed nowhere here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, DiffusionPipeline
from PIL import Image
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
WHITE = {"white": (235, 235, 235)}
WAYS = ("right", "left", "down", "up")
THINGS = [*(f"{color} square" for color in COLORS | WHITE), "smiley"]
SENTENCES = [f"a {thing} moves {way}" for thing in THINGS for way in WAYS]
SMILEY = ("..####..", ".######.", "##.##.##", "##.##.##", "########", "#.####.#", ".#....#.", "..####..")
SQUARE = ("#####",) * 5


def make_tokenizer(folder: Path) -> None:
    """A SentencePiece model in the Hub's layout of CogVideoX: spiece.model beside tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 226,
        "extra_ids": 0,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_vae(**overrides) -> AutoencoderKLCogVideoX:
    """A VAE that works without training: a latent pixel is the mean of its 4 x 8 x 8 pixels, decoding repeats it.

    The first three latent channels are red, green and blue, the fourth is their mean. The weights of the real
    architecture are set so that it computes this. In the encoder, groups of four channels (x, -x, K, -K) pass the
    group norm almost unchanged, since the large K determines its variance; silu(x) - silu(-x) = x undoes the
    activation. In the decoder, the last norm is conditioned on the latents themselves; only it and the last
    convolution matter.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(12, 12, 12, 12),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=0,  # the fewest convolutions, which are most of the time of a short run
        norm_num_groups=3,
        sample_height=96,  # tiles of 48 x 80 pixels: sizes that --enable_tiling puts together without a seam
        sample_width=160,
        **overrides,
    )
    encoder, decoder = vae.encoder, vae.decoder
    large = 30.0
    with torch.no_grad():
        for name, module in encoder.named_modules():
            if name.endswith("conv2.conv"):  # a residual block (of the middle) adds nothing
                module.weight.zero_(), module.bias.zero_()
            if name.endswith("downsamplers.0.conv"):  # mean of 2 x 2
                module.weight.zero_(), module.bias.zero_()
                module.weight[range(12), range(12), :2, :2] = 0.25
        for convolution in (encoder.conv_in.conv, encoder.conv_out.conv, decoder.conv_out.conv):
            convolution.weight.zero_(), convolution.bias.zero_()
        encoder.norm_out.weight.fill_(large / 2**0.5)
        encoder.conv_out.conv.bias[4:] = -8.0  # log variance
        decoder.norm_out.conv_y.conv.weight.zero_(), decoder.norm_out.conv_y.conv.bias.zero_()
        decoder.norm_out.conv_b.conv.weight.zero_(), decoder.norm_out.conv_b.conv.bias.zero_()
        for color in range(3):
            for sign, channel in ((1, 4 * color), (-1, 4 * color + 1)):
                encoder.conv_in.conv.weight[channel, color, -1, 1, 1] = sign
                encoder.conv_in.conv.bias[channel + 2] = sign * large
                encoder.conv_out.conv.weight[color, channel, -1, 1, 1] = sign
                encoder.conv_out.conv.weight[3, channel, -1, 1, 1] = sign / 3
                decoder.norm_out.conv_b.conv.weight[channel, color] = sign
                decoder.conv_out.conv.weight[color, channel, -1, 1, 1] = sign
    return vae


def make_transformer(seed: int = 0, rotary: bool = True, **overrides) -> CogVideoXTransformer3DModel:
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": rotary,
    }
    return CogVideoXTransformer3DModel(**config | overrides)


def make_scheduler() -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def write_index(folder: Path, kind: str) -> None:
    """The file that tells diffusers the pipeline of a model of this kind, t2v or i2v, and the class of each part."""
    index = {
        "_class_name": {"t2v": "CogVideoXPipeline", "i2v": "CogVideoXImageToVideoPipeline"}[kind],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def make_model(
    folder: Path, kind: str = "t2v", rotary: bool = True, vae_overrides: dict | None = None, version: str = "1.0",
    **transformer_overrides,
) -> Path:
    """A complete CogVideoX in `folder`, in the layout of `save_pretrained`, small enough to train on a CPU in seconds.

    `kind` is t2v or i2v; 5B-I2V has use_learned_positional_embeddings=True; `version` is 1.0 or 1.5. The VAE works;
    the transformer and the text encoder have random weights.
    """
    if version == "1.5":
        vae_overrides = {"invert_scale_latents": kind == "i2v"} | (vae_overrides or {})
        size = {"patch_size_t": 2, "patch_bias": False, "sample_height": 16, "sample_width": 16}
        ofs = {"ofs_embed_dim": transformer_overrides.get("time_embed_dim", 8)} if kind == "i2v" else {}
        transformer_overrides = size | ofs | transformer_overrides
    make_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    text_config = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(text_config).save_pretrained(folder / "text_encoder")
    make_vae(**vae_overrides or {}).save_pretrained(folder / "vae")
    channels = {"in_channels": {"t2v": 4, "i2v": 8}[kind]}
    transformer = make_transformer(rotary=rotary, **channels | transformer_overrides)
    if transformer.config.use_learned_positional_embeddings:
        transformer.patch_embed.pos_embedding += torch.randn_like(transformer.patch_embed.pos_embedding) / 10
    transformer.save_pretrained(folder / "transformer")
    make_scheduler().save_pretrained(folder / "scheduler")
    write_index(folder, kind)
    return folder


def moving_square(num_frames: int, height: int, width: int, color=(220, 40, 40), way: str = "right") -> np.ndarray:
    """A square that moves once across a dark frame: uint8 [F, H, W, C]."""
    frames = np.full((num_frames, height, width, 3), 24, dtype=np.uint8)
    side = min(height, width) // 3
    for index, frame in enumerate(frames):
        part = index / max(num_frames - 1, 1)
        part = 1 - part if way in ("left", "up") else part
        top, left = (height - side) // 2, (width - side) // 2
        if way in ("left", "right"):
            left = round(part * (width - side))
        else:
            top = round(part * (height - side))
        frame[top : top + side, left : left + side] = color
    return frames


def moving_sprite(num_frames: int, way: str, sprite: tuple[str, ...] = SMILEY, color=(250, 210, 60)) -> np.ndarray:
    """Pixel art that moves once across a dark frame of 96 x 144: uint8 [F, H, W, C]. Its pixels are those of the tiny
    VAE's latents, 8 x 8, and it stands still within a latent frame: so nothing is lost in encoding."""
    frames, shape = np.full((num_frames, 12, 18, 3), 24, dtype=np.uint8), np.array([[*row] for row in sprite]) == "#"
    room = np.array([12, 18]) - shape.shape
    for index, frame in enumerate(frames):
        part = (index + 3) // 4 / ((num_frames - 1) // 4)
        part = 1 - part if way in ("left", "up") else part
        moves = np.array([way in ("down", "up"), way in ("left", "right")])
        top, left = np.where(moves, np.round(part * room), room // 2).astype(int)
        frame[top : top + len(shape), left : left + len(shape[0])][shape] = color
    return frames.repeat(8, axis=1).repeat(8, axis=2)


def write_clip(path: Path, frames: np.ndarray, fps: float = 8) -> Path:
    """Write uint8 [F, H, W, C] as H.264. (Lossy, 4:2:0: decoded pixels are close to these, not equal.)"""
    import imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(str(path), fps=fps, macro_block_size=1, quality=9, ffmpeg_log_level="error") as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def make_clips(
    folder: Path, count: int = 4, num_frames: int = 9, height: int = 64, width: int = 96, colors: dict = COLORS
) -> Path:
    """`count` captioned clips in the layout of two line files, prompts.txt and videos.txt."""
    captions, videos = [], []
    for index in range(count):
        color = list(colors)[index % len(colors)]
        way = WAYS[index // len(colors) % 4]
        name = f"videos/{index:02d}.mp4"
        write_clip(folder / name, moving_square(num_frames, height, width, colors[color], way))
        captions.append(f"a {color} square moves {way}")
        videos.append(name)
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n")
    (folder / "videos.txt").write_text("\n".join(videos) + "\n")
    return folder


def show_progress(steps: int, name: str, seconds: float = 10) -> Iterator[int]:
    """range(steps), with a bar on a terminal, else with a line every `seconds` seconds."""
    if sys.stderr.isatty():
        yield from tqdm(range(steps), desc=name, unit="step")
        return
    started = last = time.monotonic()
    for step in range(steps):
        yield step
        now = time.monotonic()
        if now - last >= seconds:
            left = (now - started) / (step + 1) * (steps - step - 1)
            print(f"{name}: step {step + 1} of {steps}, about {left:.0f} s left", file=sys.stderr, flush=True)
            last = now


def pretrain(
    folder: Path, steps: int, batch_size: int = 16, learning_rate: float = 2e-3, videos: list | None = None
) -> None:
    """Train the whole transformer of the model in `folder` on `videos`, pairs of caption and uint8 [F, H, W, C], so
    that a LoRA has a base that can do something: plain v-prediction on exact latents, with the captions' embeddings.
    Without `videos`, on squares in COLORS."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    transformer, config = pipe.transformer.train(), pipe.transformer.config
    takes_image = config.in_channels == 2 * pipe.vae.config.latent_channels
    latents, embeds, scale = [], [], pipe.vae.config.scaling_factor
    videos = videos or [
        (f"a {color} square moves {way}", moving_square(config.sample_frames, 64, 96, COLORS[color], way))
        for color in COLORS
        for way in WAYS
    ]
    with torch.no_grad():
        for caption, frames in videos:
            pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1  # [1, C, F, H, W]
            latents.append(pipe.vae.encode(pixels).latent_dist.mean.permute(0, 2, 1, 3, 4))  # [1, f, c, h, w]
            limit = {"max_sequence_length": config.max_text_seq_length}
            embeds.append(pipe.encode_prompt(caption, None, False, **limit)[0])  # [1, S, D]
        latents = torch.cat(latents)  # [16, f, c, h, w]
        images = latents[:, :1] / scale if pipe.vae.config.invert_scale_latents else latents[:, :1] * scale
        padding = -latents.shape[1] % (config.patch_size_t or 1)  # 1.5: copies of the first frame, before it
        latents = torch.cat([latents[:, :1]] * padding + [latents], dim=1) * scale
        embeds = torch.cat(embeds)  # [16, S, D]
        ofs = {"ofs": torch.tensor([2.0])} if config.ofs_embed_dim else {}
        height, width = videos[0][1].shape[1:3]
        rotary = pipe._prepare_rotary_positional_embeddings(height, width, latents.shape[1], latents.device)
    if not config.patch_size_t:  # it starts as a model that returns its input: half of the way
        into, out = transformer.patch_embed.proj.weight, transformer.proj_out.weight
        torch.nn.init.orthogonal_(into.view(len(into), -1))  # [D, channels * p * p]
        out.data.copy_(into.data[:, : config.out_channels].flatten(1).T / 2)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    torch.manual_seed(0)
    for _ in show_progress(steps, "Training the base model"):
        chosen = torch.randint(0, len(latents), (batch_size,))
        noise, timesteps = torch.randn_like(latents[chosen]), torch.randint(0, 1000, (batch_size,))
        velocity = pipe.scheduler.get_velocity(latents[chosen], noise, timesteps)
        noisy_latents = pipe.scheduler.add_noise(latents[chosen], noise, timesteps)  # [B, f, c, h, w]
        if takes_image:
            image_latents = torch.zeros_like(noisy_latents)
            image_latents[:, :1] = images[chosen]
            noisy_latents = torch.cat([noisy_latents, image_latents], dim=2)  # [B, f, 2c, h, w]
        velocity_pred = transformer(
            hidden_states=noisy_latents,
            encoder_hidden_states=embeds[chosen],
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
            **ofs,
        )[0]
        loss = (velocity_pred - velocity)[:, padding:].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    transformer.save_pretrained(folder / "transformer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["t2v", "i2v"], default="t2v")
    parser.add_argument("--steps", type=int, default=700, help="training steps of the base model")
    arguments = parser.parse_args()
    print(f"Making a tiny CogVideoX ({arguments.kind}) and four clips in {arguments.folder}", flush=True)
    size = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3, "time_embed_dim": 64}
    size |= {"patch_size": 3, "sample_height": 12, "sample_width": 18, "sample_frames": 17, "max_text_seq_length": 28}
    learned = {"use_learned_positional_embeddings": arguments.kind == "i2v"}
    model = make_model(arguments.folder / "model", arguments.kind, **size, **learned)
    squares = [
        (f"a {color} square moves {way}", moving_sprite(17, way, SQUARE, COLORS[color]))
        for color in COLORS
        for way in ("right", "left")
    ]
    pretrain(model, arguments.steps, batch_size=8, learning_rate=3e-3, videos=squares)
    for way in WAYS:
        frames = moving_sprite(17, way)
        write_clip(arguments.folder / "clips" / f"{way}.mp4", frames)
        (arguments.folder / "clips" / f"{way}.txt").write_text(f"a smiley moves {way}\n")
        if arguments.kind == "i2v":
            (arguments.folder / "images").mkdir(exist_ok=True)
            Image.fromarray(frames[0]).save(arguments.folder / "images" / f"{way}.png")
