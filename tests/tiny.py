"""Tiny CogVideoX models and clips, made from configs and arrays: what the tests and the demo train on.

    python tests/tiny.py FOLDER        writes FOLDER/model and FOLDER/clips (with prompts.txt and videos.txt)
"""

import argparse
import io
import json
from pathlib import Path

import imageio
import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
SENTENCES = [f"a {color} square moves {way}" for color in COLORS for way in ("left", "right", "up", "down")]


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


def make_vae(seed: int = 0) -> AutoencoderKLCogVideoX:
    torch.manual_seed(seed)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=96,  # tiles of 48 x 80 pixels: sizes that --enable_tiling puts together without a seam
        sample_width=160,
        scaling_factor=0.7,
    )


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


def make_model(folder: Path, rotary: bool = True, **transformer_overrides) -> Path:
    """A whole CogVideoX in `folder`, as `save_pretrained` lays it out, small enough to train on a CPU in seconds."""
    make_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    text_config = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(text_config).save_pretrained(folder / "text_encoder")
    make_vae().save_pretrained(folder / "vae")
    make_transformer(rotary=rotary, **transformer_overrides).save_pretrained(folder / "transformer")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogVideoXPipeline",
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def moving_square(num_frames: int, height: int, width: int, color=(220, 40, 40), way: str = "right") -> np.ndarray:
    """A square that crosses a dark frame once: uint8 [F, H, W, C]."""
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


def write_clip(path: Path, frames: np.ndarray, fps: float = 8) -> Path:
    """Write uint8 [F, H, W, C] as H.264. (Lossy, 4:2:0: pixels come back close, not equal.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(str(path), fps=fps, macro_block_size=1, quality=9, ffmpeg_log_level="error") as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def make_clips(folder: Path, count: int = 4, num_frames: int = 9, height: int = 64, width: int = 96) -> Path:
    """`count` captioned clips in the layout of two line files, prompts.txt and videos.txt."""
    captions, videos = [], []
    for index in range(count):
        color = list(COLORS)[index % len(COLORS)]
        way = ("right", "left", "down", "up")[index // len(COLORS) % 4]
        name = f"videos/{index:02d}.mp4"
        write_clip(folder / name, moving_square(num_frames, height, width, COLORS[color], way))
        captions.append(f"a {color} square moves {way}")
        videos.append(name)
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n")
    (folder / "videos.txt").write_text("\n".join(videos) + "\n")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make_model(arguments.folder / "model")
    make_clips(arguments.folder / "clips")
