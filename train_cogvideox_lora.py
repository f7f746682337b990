"""Train a LoRA of the CogVideoX text-to-video transformer on your own clips.

One GPU (settings as published for CogVideoX-2B; for 5B take THUDM/CogVideoX-5b and --mixed_precision bf16). Each clip
has its caption beside it: my_clips/00.mp4 and my_clips/00.txt.

    python train_cogvideox_lora.py \\
        --pretrained_model_name_or_path THUDM/CogVideoX-2b --mixed_precision fp16 --instance_data_root my_clips \\
        --rank 64 --lora_alpha 64 --learning_rate 1e-3 --train_batch_size 1 --max_train_steps 2000 \\
        --gradient_checkpointing --enable_slicing --enable_tiling --seed 42 --output_dir my_lora

Eight GPUs: accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 in place of python; see
scripts/ for several machines. Tiny, on a CPU: `make demo`.

The objective, in six lines (x0: latents of a clip, e: prompt embeddings, alpha_bar: the scheduler's noise levels):

    t       ~ U{0..T-1},  noise ~ N(0, I)                            one of each per clip and step
    x_t     = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise      scheduler.add_noise
    v       = transformer(x_t, e, t)                                  velocity, in the compute dtype
    x0_pred = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v         scheduler.get_velocity
    loss    = mean((x0_pred - x0)^2 / (1 - alpha_bar_t))              in fp32; it equals plain MSE on the velocity
    only the LoRA matrices learn (beside to_q, to_k, to_v and to_out.0, unless flags say otherwise); the rest is frozen

Dimension key:  B batch · F pixel frames, 4k+1 · f latent frames = (F-1)/4+1 · C channels ·
H, W pixels · h, w = H/8, W/8 · S text tokens · D text width

Sections, the story first: Command line · Training · Objective · Model · Data · Precompute · Batches · Optimizer ·
Checkpoints · Validation · Card and Hub · Processes
"""

# The packages, as `uv run` installs them. requirements.txt says what each is for.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11.0,<3", "torchvision>=0.26.0", "diffusers>=0.40.0,<1", "transformers>=5.5.0",
#     "accelerate>=1.13.0,<2", "peft>=0.19.0", "huggingface_hub>=1.23.0", "safetensors>=0.8.0", "numpy>=2.1.3",
#     "pillow>=11.3.0", "tqdm>=4.67.1,<5", "av>=17.1.0", "decord>=0.6.0", "sentencepiece>=0.2.1", "protobuf>=6.33.0",
#     "imageio>=2.37.0", "imageio-ffmpeg>=0.6.0", "datasets>=4.8.0", "bitsandbytes>=0.50.0", "prodigyopt>=1.1.2",
#     "tensorboard>=2.20.0", "wandb>=0.25.0",
# ]
# ///

from __future__ import annotations

import argparse
import bisect
import codecs
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import logging.handlers
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

KIND = "text-to-video"
DEFAULT_OUTPUT_DIR = "cogvideox-lora"
TRAINERS = {"text-to-video": "train_cogvideox_lora.py", "image-to-video": "train_cogvideox_image_to_video_lora.py"}
TRACKERS = "tensorboard wandb comet_ml aim clearml dvclive mlflow swanlab trackio all".split()  # accelerate's
LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHT_FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
VIDEO_TYPES = set(
    ".mp4 .mov .m4v .mkv .webm .avi .gif .wmv .flv .3gp .mpg .mpeg .ts .m2ts .mts .ogv .apng".split()
)  # fmt: skip
PICTURE_TYPES = set(".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .avif".split())
# Pictures that neither PIL nor FFmpeg reads as a person sees them: they are refused.
HEIC_TYPES = {".heic", ".heif", ".hif"}
CONVERT = "ffmpeg -i FILE -c:v libx264 -pix_fmt yuv420p clip.mp4 may make a clip of it"
# The last file that is written into a checkpoint. A folder that has it is complete.
STATE_FILE = "training_state.json"
# Raise this when the content of a precomputed file changes for the same key: users' caches would be stale.
CACHE_FORMAT = 2
# Raise this when VideoFile or open_picture gives other frames, for the same reason.
READER_FORMAT = 1
# The values that the VAE holds at its peak for each pixel of a frame, where it does not work in tiles.
ENCODED_PIXEL = 12_000
DECODED_PIXEL = 25_000
# The bytes of a card that CUDA, the VAE's weights and a desktop may take.
OTHER_MEMORY = 1.5 * 2**30
# Height and width of small tiles in pixels. Tiles overlap by 1/6 of the height and 1/5 of the width, which must be
# whole latent pixels.
SMALL_TILES = (144, 160)
RESUME_HINT = "To continue, give the same command with --resume_from_checkpoint latest."
SEED_LIMIT = 2**32 - 10_000  # numpy takes seeds below 2**32, and accelerate adds the number of the process
OTHER_LOST = "another process of this run was lost"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a resumed run takes from its checkpoint: the position in the data, and what was decided by the card's memory.
RUN_STATE = ("seed", "step", "epoch", "batch", "is_encoded_in_tiles", "is_decoded_in_tiles")
# These settings are kept in a checkpoint, and shown in the card.
SETTINGS = (
    "rank lora_alpha optimizer use_8bit_adam learning_rate lr_scheduler lr_warmup_steps train_batch_size "
    "gradient_accumulation_steps height width max_num_frames buckets fps frame_sampling video_reshape_mode "
    "random_flip caption_dropout eval_split quantize_base lora_blocks seed"
).split()


# ---- Command line ---------------------------------------------------------------------------------------------------


def add_flag(group, name: str, **options) -> None:
    """Add a flag to a group of --help. Its default stands in its help; N is a number there, and X a text."""
    if options.get("default") is not None:
        options["help"] += " (default: %(default)s)"
    if not options.keys() & {"action", "choices", "metavar"}:
        options["metavar"] = "N" if "type" in options else "X"
    group.add_argument(name, **options)


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model and of the data."""
    add = functools.partial(add_flag, parser.add_argument_group("model"))
    add("--pretrained_model_name_or_path", help="Hub id or local folder of a CogVideoX; required")
    add("--revision", help="Hub revision of the model")
    add("--variant", help="weight file variant, such as fp16")
    add("--cache_dir", help="where downloaded data sets are kept; models are in the Hub's own cache")
    add("--rank", type=whole_from_1, default=128, help="LoRA rank")
    add("--lora_alpha", type=above_0, default=128, help="the LoRA is applied with strength alpha / rank")
    layers = f"layers that get a LoRA, named as in the model; default: {' '.join(LORA_TARGETS)}"
    add("--lora_target_modules", nargs="+", metavar="X", help=layers)
    blocks = "transformer blocks that get a LoRA, counted from 0; those before cost a forward pass alone; default: all"
    add("--lora_blocks", type=block_range, metavar="FIRST-LAST", help=blocks)
    add("--init_lora", help="LoRA to start from: file, folder or Hub id; it has rank, alpha, layers and blocks")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="compute dtype; default: accelerate's configuration")
    add("--enable_slicing", action="store_true", help="VAE slicing: a batch is coded one video at a time")
    add("--enable_tiling", action="store_true", help="VAE tiling: large frames in overlapping tiles, less memory")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: far less memory, slower")
    policy = "attention: its results are kept and not recomputed: faster, 0.1 GiB a block"
    add("--checkpoint_policy", choices=["full", "attention"], default="full", help=policy)
    base = "the frozen base waits in host memory, and two of its blocks are on the device: the same numbers"
    add("--offload_base", action="store_true", help=base)
    offload = "keep what recomputation starts from in host memory, and the feed-forward layers in 8 parts"
    add("--offload_activations", action="store_true", help=offload)
    quantize = "hold the frozen base in 4 bits: less memory, slower, and a base that is not quite the same"
    add("--quantize_base", type=quantization, choices=["nf4"], help=quantize)
    add("--compile", action="store_true", help="compile the transformer's blocks: a slow first step, then faster ones")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")

    add = functools.partial(add_flag, parser.add_argument_group("data"))
    add("--dataset_name", help="Hub data set, local folder, or .csv/.json/.jsonl/.parquet file")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add("--instance_data_root", help="folder of the clips and of the two line files")
    add("--video_column", default="video", help="column of the videos, or the line file of their paths")
    add("--caption_column", default="text", help="column of the captions, or the line file of them")
    add("--id_token", help="trigger word put before every training prompt")
    add("--height", type=side, default=480, help="pixels, a multiple of 16")
    add("--width", type=side, default=720, help="pixels, a multiple of 16")
    crop = "where to crop (none: as random), or stretch"
    add("--video_reshape_mode", choices=["center", "random", "none", "stretch"], default="center", help=crop)
    add("--fps", type=whole_from_1, default=8, help="rate of --frame_sampling fps and of written videos")
    add("--max_num_frames", type=whole_from_1, default=49, help="frames taken from a clip at most, 4k+1")
    sizes = "frames x height x width for clips of many lengths and shapes, such as 49x480x720 49x720x480"
    add("--buckets", nargs="+", type=bucket, metavar="FxHxW", help=sizes)
    add("--skip_frames_start", type=whole_from_0, default=0, help="frames left out at the start of each clip")
    add("--skip_frames_end", type=whole_from_0, default=0, help="frames left out at the end of each clip")
    add("--frame_sampling", choices=["stride", "uniform", "fps"], default="stride", help="frames taken of a long clip")
    add("--random_flip", action="store_true", help="horizontal flips: each clip is encoded both ways")
    add("--caption_dropout", type=from_0_to_1, default=0.0, help="probability of training a clip without its caption")
    add("--eval_split", type=whole_from_0, default=0, help="clips kept out of the training, whose loss is logged")
    reader = "pyav: what a person sees; decord: the frames that the original scripts trained on"
    add("--video_reader", choices=["pyav", "decord"], default="pyav", help=reader)
    workers = "processes that decode clips and read batches; 0: one process decodes"
    add("--dataloader_num_workers", type=whole_from_0, default=0, help=workers)
    add("--skip_bad_videos", action="store_true", help="train without the clips that cannot be decoded")
    add("--precompute_dir", help="default: .cogvideox_precomputed in --instance_data_root, else in --output_dir")


def add_validation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the samples."""
    add = functools.partial(add_flag, parser.add_argument_group("validation"))
    add("--validation_prompt", help="one or more prompts, joined by the separator")
    add("--validation_prompt_separator", default=":::", help="between prompts")
    add("--num_validation_videos", type=whole_from_0, default=1, help="videos a prompt; 0: none")
    add("--validation_epochs", type=whole_from_1, default=50, help="validate every N epochs")
    add("--validation_steps", type=whole_from_1, help="validate every N steps instead")
    add("--num_inference_steps", type=whole_from_1, default=50, help="denoising steps of a validation video")
    add("--guidance_scale", type=finite, default=6, help="strength of the prompt; 1: as in training")
    add("--use_dynamic_cfg", action="store_true", help="the pipeline's cosine guidance schedule")


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the training, of the optimizer and of what is written."""
    add = functools.partial(add_flag, parser.add_argument_group("training"))
    add("--seed", type=seed_number, help="makes the run repeatable")
    add("--train_batch_size", type=whole_from_1, default=4, help="clips a process and micro-batch")
    add("--num_train_epochs", type=whole_from_0, default=1, help="times that each clip is trained on")
    add("--max_train_steps", type=whole_from_0, help="optimizer steps; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=whole_from_1, default=1, help="micro-batches an optimizer step")
    add("--checkpointing_steps", type=whole_from_1, default=500, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=whole_from_0, help="checkpoints to keep, the newest at least; default: all")
    loras = "LoRAs of validations to keep in loras/: the newest, and beside them the one with the lowest held-out loss"
    add("--loras_total_limit", type=whole_from_1, help=f"{loras}; default: all")
    final = "the LoRA that the run ends with: of the last step, or of the lowest held-out loss (--eval_split)"
    add("--final_lora", choices=["last", "best"], default="last", help=final)
    add("--resume_from_checkpoint", help='"latest", or a checkpoint')
    add("--nccl_timeout", type=whole_from_1, default=600, help="seconds that a collective of a training step may take")

    add = functools.partial(add_flag, parser.add_argument_group("optimizer"))
    optimizers = ["adam", "adamw", "prodigy"]
    add("--optimizer", type=str.lower, choices=optimizers, default="adam", help="what changes the LoRA's weights")
    add("--use_8bit_adam", action="store_true", help="8-bit states of bitsandbytes, for adam and adamw")
    add("--learning_rate", type=from_0, default=1e-4, help="1 for prodigy, which finds its own scale")
    add("--scale_lr", action="store_true", help="learning rate times accumulation, batch size and processes")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="constant", help="the learning rate over the steps")
    add("--lr_warmup_steps", type=whole_from_0, default=500, help="optimizer steps")
    add("--lr_num_cycles", type=whole_from_1, default=1, help="cycles of cosine_with_restarts")
    add("--lr_power", type=above_0, default=1.0, help="exponent of polynomial")
    add("--adam_beta1", type=below_1, default=0.9, help="decay of the mean of the gradients")
    add("--adam_beta2", type=below_1, default=0.95, help="decay of the mean of their squares")
    add("--adam_weight_decay", type=from_0, default=1e-4, help="also of prodigy, as are the betas")
    add("--adam_epsilon", type=above_0, default=1e-8, help="added to the divisor of a step")
    add("--max_grad_norm", type=above_0_or_inf, default=1.0, help="gradients are clipped to this norm; or inf")
    add("--prodigy_beta3", type=below_1, help="default: square root of beta2")
    add("--prodigy_decouple", action="store_true", help="weight decay decoupled, as in AdamW")
    add("--prodigy_use_bias_correction", action="store_true", help="Adam's correction of its first steps")
    add("--prodigy_safeguard_warmup", action="store_true", help="keep the warm-up out of its estimate")

    add = functools.partial(add_flag, parser.add_argument_group("output"))
    add("--output_dir", default=DEFAULT_OUTPUT_DIR, help="for the LoRA, its card, checkpoints and videos")
    add("--logging_dir", default="logs", help="for the trackers' files, under the output dir")
    add("--report_to", choices=TRACKERS, help="default: no tracker")
    add("--tracker_name", help=f"project name at the tracker; default: {DEFAULT_OUTPUT_DIR}")
    add("--push_to_hub", action="store_true", help="upload the LoRA, its card and sample videos at the end")
    add("--hub_model_id", help="repository; default: name of the output dir")
    add("--hub_private_repo", action="store_true", help="make it private, if it does not exist yet")
    add("--hub_token", help="token for it; default: the one of `hf auth login`")


def get_args(argv: list[str] | None = None) -> Namespace:
    """Parse `argv`, or the process's command line. The token is blanked in `sys.argv`, which trackers record."""
    usage = "%(prog)s --pretrained_model_name_or_path X --instance_data_root X [flags as below]"
    about = __doc__.split("The objective")[0]
    parser = OneMessageParser(usage=usage, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_args(parser)
    add_validation_args(parser)
    add_training_args(parser)
    # argparse sets no default where the namespace has a value already: here None tells that a flag was not given.
    unset = {"rank": None, "lora_alpha": None, "lora_target_modules": None, "lora_blocks": None}
    args, unknown = parser.parse_known_args(argv, Namespace(**unset))
    problems = []
    if unknown:
        flags = [f"--{name}" for name in vars(args)]
        nearest = []
        for word in unknown:
            nearest += difflib.get_close_matches(word, flags, 1)
        hint = f" (did you mean {' '.join(nearest)}?)" if nearest else ""
        problems.append(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if args.pretrained_model_name_or_path is None:
        problems.append("--pretrained_model_name_or_path is missing")
    lora = {  # what the run will have
        "rank": parser.get_default("rank"),
        "lora_alpha": parser.get_default("lora_alpha"),
        "lora_target_modules": LORA_TARGETS,
        "lora_blocks": None,
    }
    if args.init_lora:
        try:
            lora = dict(open_lora(args.init_lora)[1])
        except RunError as error:
            parser.error(listing([*problems, str(error)]))
    for name, value in lora.items():
        given = getattr(args, name)
        if given is not None and name == "lora_target_modules":
            given = layer_names(given)
        # With another alpha, `load_lora` changes the matrices, so that the LoRA starts as strong as it is.
        if given is not None and (not args.init_lora or name == "lora_alpha"):
            lora[name] = given
        elif value is None and name == "lora_alpha":
            lora[name] = lora["rank"]
        elif given not in (None, value):
            problems.append(f"--{name} is {given}, but {value} in --init_lora {args.init_lora}")
    if argv is None:
        problems += missing_paths(args)
    if problems:
        parser.error(listing(problems))
    if argv is None and args.hub_token:
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    return Namespace(**vars(args) | lora)


def check_args(args: Namespace) -> None:
    """Check what several flags together say. Raises RunError with every problem found."""
    needed = []  # flags and the packages that they need
    if args.use_8bit_adam:
        needed.append(("--use_8bit_adam", "bitsandbytes"))
    if args.quantize_base:
        needed.append((f"--quantize_base {args.quantize_base}", "bitsandbytes"))
    if args.optimizer == "prodigy":
        needed.append(("--optimizer prodigy", "prodigyopt"))
    if args.dataset_name:
        needed.append(("--dataset_name", "datasets"))
    if args.report_to not in (None, "all"):
        needed.append((f"--report_to {args.report_to}", args.report_to))
    problems = []
    for flag, package in needed:
        if importlib.util.find_spec(package) is None:
            problems.append(f"{flag} needs {package}: pip install {package}")
    problems += missing_paths(args)
    if args.dataset_name is None and args.instance_data_root is None:
        problems.append("no data: give --instance_data_root (a folder of clips and captions) or --dataset_name")
    needs_recomputation = args.offload_base or args.offload_activations or args.checkpoint_policy != "full"
    if needs_recomputation and not args.gradient_checkpointing:
        problems.append("--checkpoint_policy, --offload_activations and --offload_base need --gradient_checkpointing")
    if args.offload_base and (args.quantize_base or args.compile):
        problems.append("--offload_base does not work with --quantize_base or --compile")
    if args.final_lora == "best" and not args.eval_split:
        problems.append("--final_lora best needs --eval_split: the best one has the lowest loss of held-out clips")
    if args.validation_prompt and not args.validation_prompt_separator:
        problems.append("--validation_prompt_separator must not be empty")
    else:
        try:
            validation_inputs(args)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError(f"these flags cannot work:\n{listing(problems)}")


def missing_paths(args: Namespace) -> list[str]:
    """Return which folders of the command line do not exist. It is called before the libraries are imported, too."""
    problems = []
    model = str(args.pretrained_model_name_or_path)
    is_path = model.startswith(("/", ".", "~")) or len(Path(model).parts) > 2
    if is_path and not Path(model).is_dir():
        problems.append(f"--pretrained_model_name_or_path {model}: there is no such folder")
    if args.instance_data_root is not None and not Path(args.instance_data_root).is_dir():
        problems.append(f"--instance_data_root: there is no folder {args.instance_data_root}")
    return problems


def validation_inputs(args: Namespace) -> list[dict]:
    """Return what each validation video is sampled from: its prompt."""
    prompts = args.validation_prompt.split(args.validation_prompt_separator) if args.validation_prompt else []
    return [{"prompt": prompt} for prompt in prompts]


def warn_of_settings(args: Namespace, max_train_steps: int) -> None:
    """Warn of flags that can be trained with, but hardly give a LoRA that one wants."""
    strength = args.lora_alpha / args.rank
    if not 1 / 8 <= strength <= 2:
        flags = f"--rank {args.rank} with --lora_alpha {args.lora_alpha:g}"
        advice = f"published settings have --lora_alpha {args.rank}, or half of it"
        logger.warning(f"{flags}: the LoRA is applied at {strength:g}, which is alpha / rank; {advice}.")
    for sampled_from in validation_inputs(args):
        prompt = sampled_from["prompt"]
        if args.id_token and args.id_token not in prompt:
            advice = "write it into --validation_prompt, or the samples do not show what is learned"
            logger.warning(f"--id_token {args.id_token} is not in the validation prompt {prompt!r}: {advice}.")
    if max_train_steps < 100:
        advice = "published settings have 2000 for 25 clips: give --max_train_steps or --num_train_epochs"
        logger.warning(f"The number of steps, {max_train_steps}, is too low to learn from; {advice}.")


def memory_flags(args: Namespace) -> list[tuple[str, object]]:
    """Return the flags that save device memory in training and are not in `args`, with values; the cheapest first."""
    flags = [
        ("train_batch_size", 1), ("gradient_checkpointing", True), ("checkpoint_policy", "full"),
        ("offload_base", True), ("offload_activations", True), ("use_8bit_adam", True),
    ]
    if not args.offload_base:
        flags.append(("quantize_base", "nf4"))  # in place of it, where the host has little memory
    for rank in (64, 16):
        if rank < args.rank:
            flags.append(("rank", rank))
    return [(name, value) for name, value in flags if getattr(args, name) != value]


def precompute_folder(args: Namespace) -> Path:
    """Return the folder of encoded prompts and videos, which are kept between runs."""
    return Path(args.precompute_dir or Path(args.instance_data_root or args.output_dir, ".cogvideox_precomputed"))


@functools.cache
def open_lora(source: str) -> tuple[Path, dict]:
    """Return the file of an existing LoRA, and its rank, alpha, layers and blocks by the flags' names. Alpha is None
    where the file does not say it. Raises RunError."""
    path = Path(source, LORA_FILE) if Path(source).is_dir() else Path(source)
    with explain(f"--init_lora {source} is no LoRA: a file, a folder or a Hub id"):
        if not path.is_file():
            # Here, since this import takes half a second.
            from huggingface_hub import hf_hub_download
            path = Path(hf_hub_download(source, LORA_FILE))
        ranks = set()
        alphas = set()
        layers = set()
        numbers = set()  # of blocks
        names = names_in_lora(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            for name, name_in_file in names.items():
                layer, kind = re.fullmatch(r"transformer\.(.+)\.(lora_A\.weight|lora_B\.weight|alpha)", name).groups()
                if kind == "alpha":
                    alphas.add(file.get_tensor(name_in_file).item())
                if kind == "lora_A.weight":
                    ranks.add(file.get_slice(name_in_file).get_shape()[0])
                    layers.add(re.sub(r"^transformer_blocks\.\d+\.(attn1\.)?", "", layer))
                    numbers.update(map(int, re.findall(r"transformer_blocks\.(\d+)\.", layer)))
        patterns = config.get("transformer.rank_pattern") or config.get("transformer.alpha_pattern")
        if len(ranks) > 1 or len(alphas) > 1 or patterns:
            raise ValueError("its layers differ in rank or alpha, which cannot be trained here")
        if config.get("transformer.use_dora"):
            raise ValueError("it is a DoRA")
        (rank,) = ranks
        alpha = config.get("transformer.lora_alpha", next(iter(alphas), None))
        if config.get("transformer.use_rslora"):
            alpha *= math.sqrt(rank)  # its strength is alpha / sqrt(rank)
    blocks = None
    if config.get("transformer.layers_to_transform"):
        blocks = f"{min(numbers)}-{max(numbers)}"
    return path, {
        "rank": rank, "lora_alpha": alpha, "lora_target_modules": layer_names(layers), "lora_blocks": blocks
    }


def names_in_lora(path: Path) -> dict[str, str]:
    """Return the names of the tensors in a LoRA's file, by the names that this script gives them. Raises ValueError
    for what is no LoRA of a transformer."""
    names = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            if "text_encoder" in name or name.startswith("lora_te"):
                raise ValueError(f"it has a LoRA of the text encoder, too ({name})")
            if name.startswith("lora_unet") or ".lora_down." in name or ".lora_up." in name:
                raise ValueError(f"its names are those of kohya's scripts ({name}): convert it to diffusers' names")
            if "dora_scale" in name or "lora_magnitude_vector" in name:
                raise ValueError(f"it is a DoRA ({name})")
            prefixes = r"(?:base_model\.model\.|diffusion_model\.|transformer\.)*"
            match = re.fullmatch(prefixes + r"(.+)\.(?:(lora_[AB])(?:\.default)?\.weight|(alpha))", name)
            if match is None:
                raise ValueError(f"{name} is no matrix of a LoRA")
            names[f"transformer.{match[1]}.{match[3] or f'{match[2]}.weight'}"] = name
    if not names:
        raise ValueError("it is empty")
    return names


def layer_names(names: Iterable[str]) -> list[str]:
    """Return names of layers in an order that is the same in all runs, so that they can be compared."""
    usual = [name for name in LORA_TARGETS if name in names]
    return usual + sorted(set(names) - set(LORA_TARGETS))


def flag_value(kind: type, limits: str, is_valid: Callable, text: str) -> float:
    """Return the number that a flag has. Raises argparse.ArgumentTypeError if it is not in `limits`."""
    with contextlib.suppress(ValueError, OverflowError):
        value = kind(text)
        if is_valid(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")


def side(text: str) -> int:
    """Return a height or width, which the VAE and the transformer's patches divide."""
    value = whole_from_1(text)
    if value % 16:
        nearest = max(16, round(value / 16) * 16)
        raise argparse.ArgumentTypeError(f"must be a multiple of 16, not {value} (nearest: {nearest})")
    return value


def bucket(text: str) -> tuple[int, int, int]:
    """Return frames, height and width of "49x480x720"."""
    sizes = text.split("x")
    if len(sizes) != 3 or whole_from_1(sizes[0]) % 4 != 1:
        raise argparse.ArgumentTypeError(f"must be 4k+1 frames x height x width, such as 49x480x720, not {text}")
    return int(sizes[0]), side(sizes[1]), side(sizes[2])


def block_range(text: str) -> str:
    """Return the value of --lora_blocks, such as "21-41", without spare zeros. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"must be the first and the last block, such as 21-41, not {text}")
    return f"{int(match[1])}-{int(match[2])}"


def quantization(text: str) -> str:
    """Return the value of --quantize_base. Raises argparse.ArgumentTypeError for the values that are gone."""
    if text in ("int8", "fp8"):
        instead = "--offload_base takes less memory and is exact (nf4 is left for hosts with little memory)"
        raise argparse.ArgumentTypeError(f"{text} is gone: {instead}")
    return text


whole_from_1 = functools.partial(flag_value, int, "a whole number, 1 or more", lambda value: value >= 1)
whole_from_0 = functools.partial(flag_value, int, "a whole number, 0 or more", lambda value: value >= 0)
finite = functools.partial(flag_value, float, "a number", math.isfinite)
above_0 = functools.partial(flag_value, float, "a number, more than 0", lambda value: 0 < value < math.inf)
above_0_or_inf = functools.partial(flag_value, float, "a number, more than 0", lambda value: value > 0)
from_0 = functools.partial(flag_value, float, "a number, 0 or more", lambda value: 0 <= value < math.inf)
below_1 = functools.partial(flag_value, float, "a number, at least 0 and less than 1", lambda value: 0 <= value < 1)
from_0_to_1 = functools.partial(flag_value, float, "from 0 to 1", lambda value: 0 <= value <= 1)
seed_number = functools.partial(flag_value, int, f"from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)


class OneMessageParser(argparse.ArgumentParser):
    """A parser whose errors are one message each, without the usage of all flags."""

    def error(self, message: str):
        problem = re.sub(r"^argument (\S+):", r"  - \1", message)
        self.exit(2, f"{self.prog}: error: this command line cannot work (--help lists all flags):\n{problem}\n")


class RunError(ValueError):
    """End the run with one message. It is a ValueError, which code written against the original scripts expects of a
    problem with the data. Exit code 1: the LoRA cannot be written, 2: wrong input, 3: loss or weights that
    are not finite, 4: failed upload, 5: another process was lost, 6: out of device memory, 128 + n: stopped by
    signal n. `is_shared`: all processes raise it together, so the first one of a machine prints it for all."""

    def __init__(self, message: str, exit_code: int = 2, is_shared: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.is_shared = is_shared


@contextlib.contextmanager
def explain(problem: str, kinds=Exception, exit_code: int = 2, advice: str = "") -> Iterator[None]:
    """End the run with one message for an error of these `kinds`: the `problem`, what the error says, and `advice`."""
    try:
        yield
    except kinds as error:
        raise RunError(f"{problem}: {error}{advice}", exit_code) from error


def listing(items: list[str], limit: int = 20) -> str:
    """Return `items` on a line each. Those beyond `limit` are counted."""
    lines = [f"  - {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  … and {len(items) - limit} more")
    return "\n".join(lines)


# The command line is read before the libraries are imported, which takes 7 to 14 seconds: --help and wrong flags are
# answered at once.
ARGS = get_args() if __name__ == "__main__" else None

# bitsandbytes warns at import that a kernel for 4-bit models on CPUs is missing: here they need a GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import av
import diffusers
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration, set_seed
from accelerate.utils.dataclasses import AutocastKwargs
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.memory import clear_device_cache
from av.stream import Disposition
from av.video.reformatter import ColorTrc
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers import cogvideox_transformer_3d as diffusers_cogvideox
from diffusers.optimization import get_scheduler
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.quantizers.quantization_config import BitsAndBytesConfig
from diffusers.utils import export_to_video
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, is_offline_mode
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import InterpolationMode, resize
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import T5EncoderModel, T5Tokenizer

PIPELINE = CogVideoXPipeline
OUTPUT_TYPE = "np"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- Training -------------------------------------------------------------------------------------------------------


def main(args: Namespace) -> None:
    """Check, precompute, train, save, publish: the stages in order. Raises RunError."""
    if not hasattr(args, "init_lora"):  # a Namespace with the original scripts' flags alone
        defaults = get_args(["--pretrained_model_name_or_path", args.pretrained_model_name_or_path])
        args = Namespace(**vars(defaults) | vars(args))
    check_args(args)
    # A problem of one process or machine ends all of them with its message.
    with shared_work():
        accelerator, engine = get_accelerator(args)
        log_device(accelerator)
        transformer_config, _ = read_config(args, "transformer")
        vae_config, _ = read_config(args, "vae")
        check_model(args, transformer_config, vae_config)
        names = inspect.signature(VideoDataset).parameters  # each is the name of a flag
        videos = VideoDataset(**{name: getattr(args, name) for name in names})
        if args.eval_split >= len(videos):
            raise RunError(f"--eval_split {args.eval_split} leaves nothing of {len(videos)} clips to train on")
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["num_clips"] = len(videos)
    settings["num_processes"] = accelerator.num_processes
    settings["engine"] = engine
    settings["mixed_precision"] = accelerator.mixed_precision
    settings["lora_targets"] = args.lora_target_modules
    # As a checkpoint has them, so that the two can be compared: a tuple is a list there.
    settings = json.loads(json.dumps(settings))
    checkpoint = in_first(find_checkpoint, args, settings)
    # A model on the Hub is downloaded here, after all that can be wrong without it, and before anything is encoded.
    with shared_work():
        check_model_files(args)
    content = gather(read_training_state(checkpoint) if checkpoint else {})[0]
    saved = content.get("state", {})
    if content:
        changes = content["settings"].get("changes", [])
        for change in changed_settings(content, settings).values():
            changes.append(f"step {saved['step']}: {change}")
        if changes:
            settings["changes"] = changes
    repo_id = in_first(check_hub_access, args)
    earlier = in_first(read_json, Path(args.output_dir, "state.json"))
    lock = in_first(make_output_folders, args, saved.get("step", -1))
    with recorded(args, lock) as end, closing(accelerator):
        log_to_file(Path(args.output_dir))
        in_first(start_trackers, args, accelerator)
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed
        seed = saved.get("seed", gather(seed)[0])

        # Each encoder is alone on the device, and freed before the transformer is loaded.
        captions = [videos.prompt(index) for index in range(len(videos))]
        prompts = captions + [sampled_from["prompt"] for sampled_from in validation_inputs(args)]
        # The empty prompt is that of guidance, and of --caption_dropout.
        prompts.append("")
        with stage(args, "encoding prompts"):
            prompt_files = precompute_prompts(args, accelerator, prompts, transformer_config["max_text_seq_length"])
        largest_frame = max(height * width for _, height, width in videos.buckets)  # pixels
        encoding = largest_frame * ENCODED_PIXEL * DTYPES[accelerator.mixed_precision].itemsize  # bytes
        is_in_tiles = saved.get("is_encoded_in_tiles", needs_tiles(args, accelerator, encoding))
        with stage(args, "encoding videos"):
            video_files = precompute_videos(args, accelerator, videos, is_in_tiles)
        clips = []
        for files, caption, record in zip(video_files, captions, videos.records, strict=True):
            # Clips that cannot be decoded have no files: --skip_bad_videos leaves them out.
            if files is not None:
                clips.append((files, prompt_files[caption], record.path))
        folders = "--output_dir and --precompute_dir must be folders that all machines share"
        with shared_work(), explain(folders, OSError):
            Path(args.output_dir, "metrics.jsonl").stat()
            dataset = LatentDataset(clips, prompt_files[""], args.eval_split, seed)
        loader, sampler = get_dataloader(args, accelerator, dataset, seed)
        steps_per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
        max_train_steps = args.max_train_steps
        if max_train_steps is None:
            max_train_steps = args.num_train_epochs * steps_per_epoch
        if len(sampler) < args.gradient_accumulation_steps:
            asked = f"--gradient_accumulation_steps {args.gradient_accumulation_steps} asks for"
            logger.warning(f"An epoch has {len(sampler)} micro-batches, fewer than {asked}: a step has those alone.")
        checkpoint_step = saved.get("step", -1)
        is_trained = checkpoint_step >= max_train_steps
        is_published = earlier.get("state") == "finished" and earlier["step"] >= checkpoint_step
        if is_trained and is_published and in_first(Path(args.output_dir, LORA_FILE).is_file):
            end["step"] = earlier["step"]
            end["lora_step"] = earlier.get("lora_step", earlier["step"])
            steps = f"{checkpoint} is of step {checkpoint_step}, and {max_train_steps} are asked for"
            logger.info(f"Nothing is left to train: {steps}. For more, raise --max_train_steps or --num_train_epochs.")
            return
        warn_of_settings(args, max_train_steps)
        in_first(write_run_json, args, settings, max_train_steps)

        # The LoRA starts the same in all processes.
        set_seed(seed)
        # The others wait here for a process with a slow disk, as long as it takes. Else its first collective would
        # time out.
        with shared_work():
            transformer = load_transformer(args, DTYPES[accelerator.mixed_precision])
            lora = add_lora(transformer, args.rank, args.lora_alpha, args.lora_target_modules, args.lora_blocks)
            if args.init_lora:
                file, own = open_lora(args.init_lora)
                if own["lora_alpha"] is None and args.lora_alpha == args.rank:
                    logger.warning(f"--init_lora {args.init_lora} says no alpha: it is taken at strength 1")
                load_lora(transformer, file, (own["lora_alpha"] or args.lora_alpha) / args.lora_alpha)
            noise_scheduler = load_component(CogVideoXDPMScheduler, pretrained_source(args, "scheduler"))
        trained = prepare(args, accelerator, transformer, max_train_steps)
        run = Run(
            args, accelerator, *trained, noise_scheduler, vae_config, prompt_files, dataset, max_train_steps, settings,
            seed, is_encoded_in_tiles=is_in_tiles,
        )
        # From here on each process draws its own noise.
        set_seed(seed % SEED_LIMIT, device_specific=True)
        if checkpoint is not None:
            resume(run, checkpoint, content)
        logger.info(f"Steps: {max_train_steps}, {steps_per_epoch} an epoch")
        num_trainable = sum(parameter.numel() for parameter in lora)
        strength = f"{args.lora_alpha / args.rank:g}"
        logger.info(f"LoRA: {num_trainable:,} parameters of rank {args.rank}, applied at {strength}")
        with run.stop.installed():
            if run.step == 0:
                # The base model's own videos, to compare with.
                run_validation(run)
            train(run, loader, sampler)
        in_first(save_lora, run.base, Path(args.output_dir, LORA_FILE), lora_weights(run.base), True)
        logger.info(f"LoRA: {args.output_dir}/{LORA_FILE}")
        videos = run_validation(run, is_final=True)
        step, videos = in_first(choose_final_lora, run, videos)
        in_first(publish, run, step, videos, repo_id)
        end["step"] = run.step
        end["lora_step"] = step


def train(run: Run, loader: DataLoader, sampler: ShapeBatchSampler) -> None:
    """Run the training loop, from wherever the run is to its last step. Raises RunError."""
    args = run.args
    progress = progress_bar(total=run.max_train_steps, initial=run.step, desc="Training", unit="step")
    num_batches = len(sampler)  # of a whole epoch
    losses = []  # of the micro-batches of this step
    started = time.perf_counter()
    run.transformer.train()
    while run.step < run.max_train_steps:
        sampler.epoch = run.epoch
        sampler.first_batch = run.batch
        begin_step(run)
        for batch in read_batches(run, loader):
            step_start = run.batch - len(losses)  # the first micro-batch of this step
            num_micro_batches = min(args.gradient_accumulation_steps, num_batches - step_start)
            try:
                loss, grad_norm = train_step(run, batch, num_micro_batches)
            except Exception:
                save_after_error(run)
                raise
            losses.append(loss)
            run.batch += 1
            if grad_norm is None:
                # Nothing waits for the GPU before the step is complete, so that work is queued for it without a gap.
                continue

            run.step += 1
            metrics, is_stopped = finish_step(run, losses, grad_norm, started)
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", lr=f"{metrics['lr']:.2e}", refresh=False)
            progress.update()
            is_last = run.step >= run.max_train_steps
            if run.step % args.checkpointing_steps == 0 or is_stopped or is_last:
                with stage(args, "saving", run.step):
                    save_checkpoint(run)
            if is_stopped:
                # A process without a number has only heard of it: another one got the signal.
                number = signal.Signals(run.stop.number or signal.SIGTERM)
                stopped = f"stopped by {number.name} after step {run.step}. {RESUME_HINT}"
                raise RunError(stopped, 128 + number, is_shared=True)
            if is_last:
                break
            if args.validation_steps and run.step % args.validation_steps == 0:
                run_validation(run)
            losses = []
            started = time.perf_counter()
            begin_step(run)
        else:
            run.epoch += 1
            run.batch = 0
            if not args.validation_steps and run.epoch % args.validation_epochs == 0:
                run_validation(run)
    progress.close()


def train_step(run: Run, batch: dict[str, Tensor], num_micro_batches: int) -> tuple[Tensor, Tensor | None]:
    """Train on one micro-batch. After `num_micro_batches` of them the LoRA changes: after
    --gradient_accumulation_steps, or what is left of an epoch. Return the loss, and the norm of the gradients: None,
    unless this micro-batch completes a step."""
    args = run.args
    accelerator = run.accelerator
    grad_norm = None
    with accelerator.accumulate(run.transformer):
        latents, conditions = prepare_batch(batch, run.base.config, run.vae_config, args)
        with saving_activations(args):
            loss = diffusion_loss(run.transformer, run.noise_scheduler, latents, conditions)
        # accelerate divides by --gradient_accumulation_steps, where the last step of an epoch may have fewer.
        accelerator.backward(loss * (args.gradient_accumulation_steps / num_micro_batches))
        # Only the last micro-batch of a step has the gradients of all.
        if accelerator.sync_gradients:
            grad_norm = accelerator.clip_grad_norm_(run.transformer.parameters(), args.max_grad_norm)
    run.is_updating = True
    # accelerate makes step() and zero_grad() do nothing before the last micro-batch of a step.
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.is_updating = False
    if accelerator.sync_gradients:
        run.lr_scheduler.step()
    return loss.detach(), grad_norm


def finish_step(run: Run, losses: list[Tensor], grad_norm: Tensor, started: float) -> tuple[dict, bool]:
    """Log the step that was just taken, since `started`. Return what was logged, and whether a process got a signal to
    stop: all processes learn of it here, so that they stop after the same step. Raises RunError for a loss or
    gradients that are not finite."""
    numbers = []
    for number in (sum(losses) / len(losses), grad_norm, run.stop.number):
        numbers.append(torch.as_tensor(number, dtype=torch.float32, device=losses[0].device))
    # The mean of the signals' numbers says nothing but this: it is not zero where some process got a signal.
    loss, norm, signal_number = run.accelerator.reduce(torch.stack(numbers), reduction="mean").tolist()
    seconds = round(time.perf_counter() - started, 4)
    run.step_seconds = seconds
    # An fp16 gradient may overflow: the gradient scaler then skips the step, and nothing is lost.
    if not math.isfinite(loss) or not (math.isfinite(norm) or run.accelerator.optimizer_step_was_skipped):
        raise not_finite(run, f"the loss is {loss}, the gradient norm {norm}")
    # The logged rate is that of the next step, as the originals logged it.
    metrics = {"loss": loss, "lr": run.lr_scheduler.get_last_lr()[0], "grad_norm": norm, "seconds": seconds}
    scalars = {
        "train/loss": loss, "train/lr": metrics["lr"], "train/grad_norm": norm, "train/step_time": seconds,
        "loss": loss, "lr": metrics["lr"],  # by the originals' names
    }  # fmt: skip
    log_metrics(run, metrics, scalars)
    return metrics, signal_number != 0


def choose_final_lora(run: Run, videos: list[tuple[str, Path]]) -> tuple[int, list[tuple[str, Path]]]:
    """With --final_lora best, put the LoRA with the lowest held-out loss in the place of the last one. Return the step
    of the LoRA that is there now, and its videos with their prompts: `videos` are those of the last step."""
    args = run.args
    output_dir = Path(args.output_dir)
    best = best_step(output_dir)
    if args.final_lora == "best" and best not in (None, run.step):
        with attempt("--final_lora best"):
            shutil.copyfile(lora_path(output_dir, best), partial_name(output_dir / LORA_FILE))
            put_in_place(partial_name(output_dir / LORA_FILE), output_dir / LORA_FILE)
            logger.info(f"{output_dir / LORA_FILE} is the LoRA of step {best} now, which has the lowest held-out loss")
            videos = []
            for index, sampled_from in enumerate(validation_inputs(args)):
                for file in validation_files(args, best, False, index):
                    if file.is_file():
                        videos.append((sampled_from["prompt"], file))
            return best, videos
    return run.step, videos


def publish(run: Run, step: int, videos: list[tuple[str, Path]], repo_id: str | None) -> None:
    """Write the model card of the LoRA of `step`, upload, and say how to go on. Raises RunError, code 4."""
    args = run.args
    output_dir = Path(args.output_dir)
    sampling = sampling_settings(args) | {"max_sequence_length": run.base.config.max_text_seq_length}
    prompts = []
    files = []
    for prompt, file in videos:
        prompts.append(prompt)
        files.append(file)
    inputs = validation_inputs(args)
    image = inputs[0].get("image") if inputs else None
    with attempt("Writing the model card"):
        save_model_card(
            repo_id or output_dir.resolve().name, files, args.pretrained_model_name_or_path, prompts,
            args.output_dir, args.fps, args.id_token, run.settings | {"steps": step}, sampling, image,
        )
    if repo_id is not None:
        shown = [f"final_video_{number}.mp4" for number in range(len(videos))]
        names = []
        uploads = []
        command = ["hf", "upload", repo_id, args.output_dir]  # what does the same by hand
        for name in (LORA_FILE, "README.md", "first_frame.png", *shown):
            if (output_dir / name).is_file():
                names.append(name)
                uploads.append(CommitOperationAdd(name, output_dir / name))
                command.append(f"--include={name}")
        by_hand = f"To upload them by hand, after `hf auth login`: {shlex.join(command)}"
        advice = f"\nAll files are in {output_dir}. {by_hand}"
        with explain(f"the upload to {repo_id} failed", exit_code=4, advice=advice):
            HfApi(token=args.hub_token).create_commit(repo_id, uploads, commit_message="LoRA, its card and samples")
        logger.info(f"Uploaded {', '.join(names)} to {repo_id}")
    logger.info(f"Done. {output_dir} has the LoRA, its card (README.md) and each step's loss (metrics.jsonl).")
    longer = "--resume_from_checkpoint latest and a larger --max_train_steps or --num_train_epochs"
    logger.info(f"To train longer: the same command with {longer}.")
    logger.info(f"To look at the run: python tools/report.py {shlex.quote(args.output_dir)}")
    best = best_step(output_dir)
    which = f"step {step}, with the lowest held-out loss" if best == step else f"step {step}"
    logger.info(f"To use the LoRA of {which}: pipe.load_lora_weights({args.output_dir!r})")
    if best not in (None, step):
        path = str(lora_path(output_dir, best))
        logger.info(f"To use the one with the lowest held-out loss, of step {best}: pipe.load_lora_weights({path!r})")


# ---- Objective ------------------------------------------------------------------------------------------------------


def diffusion_loss(
    transformer: torch.nn.Module, noise_scheduler: CogVideoXDPMScheduler, latents: Tensor,
    conditions: dict, noise: Tensor | None = None, timesteps: Tensor | None = None,
) -> Tensor:
    """Return the training loss of latents [B, f, C, h, w] (fp32): a scalar, fp32, over the frames after `num_padding`.
    Noise and timesteps [B] are drawn from the global generator unless given. All but the transformer computes in fp32:
    in bf16 the 1000 noise levels of the scheduler collapse to 193."""
    conditions = dict(conditions)
    num_padding = conditions.pop("num_padding", 0)
    if noise is None:
        noise = torch.randn_like(latents)  # [B, f, C, h, w]
    if timesteps is None:
        num_timesteps = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, num_timesteps, (len(latents),), device=latents.device)  # [B] int64
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)  # [B, f, C, h, w]
    hidden_states = noisy_latents.to(conditions["encoder_hidden_states"].dtype)  # [B, f, C, h, w]
    velocity_pred = transformer(
        hidden_states=hidden_states, timestep=timesteps, return_dict=False, **conditions
    )[0].float()  # [B, f, C, h, w]
    # Despite its name, it returns sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v: x0, where v is the velocity.
    x0_pred = noise_scheduler.get_velocity(velocity_pred, noisy_latents, timesteps)  # [B, f, C, h, w]
    # add_noise has moved this table to the device of the latents.
    alphas_cumprod = noise_scheduler.alphas_cumprod[timesteps].to(latents.dtype)  # [B]
    squared_error = (x0_pred - latents)[:, num_padding:].square().flatten(1).mean(dim=1)  # [B]
    return (squared_error / (1 - alphas_cumprod)).mean()


def prepare_batch(
    batch: dict[str, Tensor], transformer_config, vae_config: dict, args: Namespace  # noqa: ARG001
) -> tuple[Tensor, dict]:
    """Return the latents of a batch of `LatentDataset`, [B, f, C, h, w] (fp32), freshly sampled, and what the
    transformer is given beside them, by its keywords. CogVideoX 1.5 takes f / patch_size_t whole tokens: there
    `num_padding` frames stand before those of the clip, copies of the first, as it was trained (zai-org/CogVideo,
    issue 524)."""
    latents = sample_latents(batch["moments"], vae_config["scaling_factor"])  # [B, f, C, h, w]
    num_padding = -latents.shape[1] % (transformer_config.patch_size_t or 1)
    latents = torch.cat([latents[:, :1]] * num_padding + [latents], dim=1)  # [B, f, C, h, w], padding included
    conditions = {"encoder_hidden_states": batch["prompt_embeds"], "num_padding": num_padding}
    conditions["image_rotary_emb"] = rotary_for(transformer_config, vae_config, latents)
    return latents, conditions


def sample_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """Draw a fresh sample of the latent distribution [B, 2c, f, h, w], scaled for the transformer: [B, f, c, h, w]."""
    latents = DiagonalGaussianDistribution(moments.float()).sample() * scaling_factor  # [B, c, f, h, w]
    return latents.permute(0, 2, 1, 3, 4).contiguous()  # [B, f, c, h, w]


def rotary_for(transformer_config, vae_config: dict, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the `image_rotary_emb` that the pipeline feeds for latents [B, f, C, h, w]; None for a 2B, without it."""
    if not transformer_config.use_rotary_positional_embeddings:
        return None
    config = transformer_config
    num_frames, _, height, width = latents.shape[1:]
    scale = pixels_per_latent(vae_config)
    return cached_rotary_positions(
        height * scale, width * scale, num_frames, scale, config.patch_size, config.attention_head_dim,
        latents.device, config.sample_height * scale, config.sample_width * scale, config.patch_size_t,
    )


def prepare_rotary_positional_embeddings(
    height: int, width: int, num_frames: int, vae_scale_factor_spatial: int = 8, patch_size: int = 2,
    attention_head_dim: int = 64, device: torch.device | None = None, base_height: int = 480, base_width: int = 720,
    patch_size_t: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rotary positions (cos, sin) of all video tokens, each [f * h/p * w/p, head dim].
    `height`, `width` and the base size that the model was trained at are in pixels, `num_frames` in latent frames.
    With `patch_size_t` (CogVideoX 1.5), f / patch_size_t tokens along time, and the base size is the largest one.
    Source: CogVideoXPipeline._prepare_rotary_positional_embeddings."""
    token = vae_scale_factor_spatial * patch_size  # pixels along each side
    grid_size = (height // token, width // token)
    base_size = (base_height // token, base_width // token)
    if patch_size_t is not None:
        frames = math.ceil(num_frames / patch_size_t)
        return get_3d_rotary_pos_embed(
            attention_head_dim, None, grid_size, frames, device=device, grid_type="slice", max_size=base_size
        )
    crops_coords = get_resize_crop_region_for_grid(grid_size, base_size[1], base_size[0])
    return get_3d_rotary_pos_embed(attention_head_dim, crops_coords, grid_size, num_frames, device=device)


cached_rotary_positions = functools.lru_cache(maxsize=32)(prepare_rotary_positional_embeddings)  # made once a shape


def pixels_per_latent(vae_config: dict) -> int:
    """Return the pixels along each side of a frame that one latent pixel stands for."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


# ---- Model ----------------------------------------------------------------------------------------------------------


def read_config(args: Namespace, subfolder: str) -> tuple[dict, str | None]:
    """Return the config of one component of the model, and its commit if it is on the Hub. Raises RunError."""
    model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    folder = Path(args.pretrained_model_name_or_path)
    if (folder / "snapshots").is_dir():
        snapshots = [str(path) for path in sorted((folder / "snapshots").iterdir())]
        raise RunError(f"{model} is a folder of the Hub's cache: give its snapshot, {' or '.join(snapshots)}")
    if folder.is_dir() and not (folder / subfolder).is_dir() and (folder.parent / "model_index.json").is_file():
        raise RunError(f"{model} is one part of a model: give {folder.parent}")
    advice = ""
    if not folder.is_dir() and is_offline_mode():
        advice = "\n(HF_HUB_OFFLINE is set, so it must be in the Hub's cache)"
    problem = f"{model} is no diffusers-format model, in a local folder or on the Hub"
    with explain(problem, (OSError, ValueError), advice=advice):
        # Of any component: load_config only reads config.json.
        return AutoencoderKLCogVideoX.load_config(**pretrained_source(args, subfolder), return_commit_hash=True)


def check_model(args: Namespace, transformer_config: dict, vae_config: dict) -> None:
    """Refuse, by their configs, checkpoints that this script cannot train. Raises RunError."""
    config = transformer_config
    model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    if config.get("_class_name") != "CogVideoXTransformer3DModel":
        raise RunError(f"{model} is not a CogVideoX: its transformer is a {config.get('_class_name')}")
    in_channels = config["in_channels"]
    latent_channels = vae_config["latent_channels"]
    if in_channels == latent_channels:
        kind = "text-to-video"
    elif in_channels == 2 * latent_channels:  # the start image's latents beside the noisy ones
        kind = "image-to-video"
    else:
        raise RunError(f"{model}: its transformer takes {in_channels} channels, its VAE makes {latent_channels}")
    if kind != KIND:
        raise RunError(f"{model} is a model for {kind}: train it with {TRAINERS[kind]}")
    check_sizes(args, model, config, pixels_per_latent(vae_config))
    # The usual names need no check: every CogVideoX has these layers.
    if args.lora_target_modules != LORA_TARGETS:
        check_layers(args, config)
    if args.lora_blocks is not None and block_numbers(args.lora_blocks)[-1] >= config["num_layers"]:
        raise RunError(f"--lora_blocks {args.lora_blocks}: {model} has the blocks 0-{config['num_layers'] - 1}")
    if args.init_lora:
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel.from_config(config)
            add_lora(transformer, args.rank, args.lora_alpha, args.lora_target_modules, args.lora_blocks)
        check_lora(transformer, open_lora(args.init_lora)[0])
    frames = frames_4k_plus_1(args.max_num_frames)
    if frames != args.max_num_frames:
        logger.warning(f"--max_num_frames {args.max_num_frames} is not 4k+1: {frames} frames are used.")
    patch_size_t = config.get("patch_size_t")
    if patch_size_t and args.fps != 16:
        logger.warning(f"CogVideoX 1.5 makes 16 frames a second: give --fps 16 in place of {args.fps}.")
    latent_frames = (frames - 1) // 4 + 1
    if num_padding := -latent_frames % (patch_size_t or 1):
        padding = f"{latent_frames} latent frames, with {num_padding} of padding before them, as in the pipeline"
        logger.info(f"{frames} frames are {padding}; {frames + 4 * num_padding} frames would need none.")


@functools.cache
def model_folder(model: str, revision: str | None, variant: str | None) -> Path:
    """Return the folder of a model. One on the Hub is downloaded first. Raises RunError."""
    if Path(model).is_dir():
        return Path(model)
    with explain(f"--pretrained_model_name_or_path {model} cannot be downloaded", (OSError, ValueError)):
        return Path(DiffusionPipeline.download(model, revision=revision, variant=variant))


def check_model_files(args: Namespace) -> None:
    """Check that a model is complete, as far as headers tell. Raises RunError with every problem found."""
    model = args.pretrained_model_name_or_path
    folder = model_folder(model, args.revision, args.variant)
    problems = []
    for subfolder, stem in WEIGHT_FILES.items():
        variant = f".{args.variant}" if has_variant(args, subfolder) else ""
        index = folder / subfolder / f"{stem}.safetensors.index{variant}.json"
        names = {f"{stem}{variant}.safetensors"}
        if index.is_file():
            names = set(read_json(index).get("weight_map", {}).values())
        elif list((folder / subfolder).glob("*.bin")):
            continue  # the older format, which has no header
        if not names:
            problems.append(f"{subfolder}/{index.name} is damaged")
        for name in sorted(names):
            problem = weight_problem(folder / subfolder / name)
            if problem is not None:
                problems.append(f"{subfolder}/{name} {problem}")
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        problems.append("scheduler/scheduler_config.json is missing")
    if not ((folder / "tokenizer" / "spiece.model").is_file() or (folder / "tokenizer" / "tokenizer.json").is_file()):
        problems.append("tokenizer/spiece.model is missing")
    if args.variant and not list(folder.glob(f"*/*.{args.variant}.*")):
        problems.append(f"no file is of --variant {args.variant}")
    if problems:
        raise RunError(f"--pretrained_model_name_or_path {model} is incomplete:\n{listing(problems)}")


def weight_problem(path: Path) -> str | None:
    """Return what is wrong with a safetensors file, or None. Its header has the size that it must have."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except FileNotFoundError:
        return "is missing"
    except (OSError, SafetensorError):
        if start_and_end(str(path))[1].startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer in place of the file: run git lfs pull"
        return "is truncated or damaged"


def check_sizes(args: Namespace, model: str, config: dict, pixels: int) -> None:
    """Refuse heights and widths beyond the model's table of positions; `pixels` are those of a latent pixel's side.
    Raises RunError."""
    own_height = config["sample_height"] * pixels
    own_width = config["sample_width"] * pixels
    sizes = [(height, width) for _, height, width in args.buckets or []]
    for height, width in [(args.height, args.width), *sizes]:
        if config.get("use_learned_positional_embeddings"):
            nearest = (own_height, own_width)
            works = "works at"
        elif config.get("patch_size_t"):
            nearest = (min(height, own_height), min(width, own_width))
            works = "works up to"
        else:
            continue
        if (height, width) != nearest:
            instead = f"--height {nearest[0]} --width {nearest[1]}, not {height} x {width}"
            raise RunError(f"{model} {works} {own_height} x {own_width}: {instead}")


def check_layers(args: Namespace, transformer_config: dict) -> None:
    """Refuse names of --lora_target_modules that are no linear layers of the model. Raises RunError."""
    with torch.device("meta"):
        modules = dict(CogVideoXTransformer3DModel.from_config(transformer_config).named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    if args.lora_blocks is not None:
        linear = [name for name in linear if name.startswith("transformer_blocks.")]
    for name in args.lora_target_modules:
        named = [layer for layer in modules if f".{layer}".endswith(f".{name}")]
        others = [layer for layer in named if not isinstance(modules[layer], torch.nn.Linear)]
        if others or not set(named) & set(linear):
            layers = {re.sub(r"^transformer_blocks\.\d+\.(attn1\.)?", "", layer) for layer in linear}
            nearest = ", ".join(difflib.get_close_matches(name, layers, cutoff=0))
            model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
            problem = f"{model} has no layer {name}"
            if others:
                problem = f"{name} names {others[0]}, which is no linear layer"
            raise RunError(f"--lora_target_modules: {problem} (nearest: {nearest})")


def pretrained_source(args: Namespace, subfolder: str, dtype: torch.dtype | None = None) -> dict:
    """Return what `from_pretrained` takes for one component of the model; a `dtype` is for those with weights."""
    source = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "subfolder": subfolder,
    }
    if dtype is not None:
        source["dtype"] = dtype
        source["variant"] = args.variant if has_variant(args, subfolder) else None
    return source


def has_variant(args: Namespace, subfolder: str) -> bool:
    """Return whether a component of the model has weights of --variant: not all of them need to."""
    if args.variant is None:
        return False
    folder = model_folder(args.pretrained_model_name_or_path, args.revision, args.variant)
    return bool(list((folder / subfolder).glob(f"*.{args.variant}.*")))


def load_component(component: type, source: dict):
    """Load one component of the model from its `pretrained_source`. Raises RunError."""
    model = f"--pretrained_model_name_or_path {source['pretrained_model_name_or_path']}"
    with explain(f"{model}: its {source['subfolder']} cannot be loaded", (OSError, ValueError, SafetensorError)):
        return component.from_pretrained(**source)


def load_transformer(args: Namespace, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """Load the frozen base, straight in the compute dtype, or quantized file by file as it loads."""
    source = pretrained_source(args, "transformer", dtype)
    if args.quantize_base == "nf4":
        source["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        with explain("--quantize_base nf4", RuntimeError):
            transformer = load_component(CogVideoXTransformer3DModel, source)
    else:
        transformer = load_component(CogVideoXTransformer3DModel, source)
    recompute = functools.partial(checkpoint, use_reentrant=False)
    if args.gradient_checkpointing:
        contexts = recomputation_contexts(args)
        transformer.enable_gradient_checkpointing(functools.partial(recompute, context_fn=contexts))
    if args.compile:
        # A block is compiled anew for each size of clips, for training and for sampling. Beyond torch's limit of 8 it
        # would run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        # Without a compiler the blocks run as they are, and torch prints why.
        torch._dynamo.config.suppress_errors = True
    for block in transformer.transformer_blocks:
        # The block keeps its layers and weights, and computes in another way.
        block.__class__ = CogVideoXBlock
        block.recompute = recompute
        block.num_parts = 8 if args.offload_activations and not args.compile else 1
        # It is compiled twice for each shape: for the first block, whose input needs no gradient, and for all others.
        if args.compile:
            block.compile(dynamic=False)
    return transformer


def add_lora(
    transformer: CogVideoXTransformer3DModel, rank: int, lora_alpha: float, layers: list[str] = LORA_TARGETS,
    blocks: str | None = None,
) -> list[torch.nn.Parameter]:  # fmt: skip
    """Put a LoRA beside `layers`, in all blocks or in `blocks` such as "21-41". Return its matrices, the only
    parameters that train. No gradient is computed in the blocks before the first one that has them."""
    transformer.requires_grad_(False)
    ends = tuple(f".{layer}" for layer in layers)
    names = [name for name, _ in transformer.named_modules() if f".{name}".endswith(ends)]
    # peft's fields, and no more: a version that does not know one of them refuses the file.
    transformer.lora_metadata = {"r": rank, "lora_alpha": lora_alpha, "target_modules": layer_names(layers)}
    numbers = block_numbers(blocks) if blocks is not None else []
    # All blocks named are the same as none named.
    if 0 < len(numbers) < len(transformer.transformer_blocks):
        starts = tuple(f"transformer_blocks.{number}." for number in numbers)
        names = [name for name in names if name.startswith(starts)]
        # The layers have their full names, which peft looks for first: before 0.21 it found no block by its number.
        transformer.lora_metadata |= {"target_modules": sorted(names), "layers_to_transform": numbers}
    for name in names:
        layer = transformer.get_submodule(name)
        if isinstance(layer, torch.nn.Linear):
            transformer.set_submodule(name, LoraLinear(layer, rank, lora_alpha))
    transformer.lora_names = sorted(lora_parameters(transformer))
    return list(lora_parameters(transformer).values())


def block_numbers(blocks: str) -> list[int]:
    """Return the numbers of the blocks of --lora_blocks."""
    first, last = map(int, blocks.split("-"))
    return list(range(first, last + 1))


class LoraLinear(torch.nn.Module):
    """A frozen linear layer with a LoRA: base(x) + scale * B(A(x)). Its matrices A [rank, in] and B [out, rank] are
    kept in fp32, and applied in the dtype of the tokens x [B, S + V, in]. Source: arXiv 2106.09685."""

    def __init__(self, base_layer: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base_layer = base_layer
        self.scale = alpha / rank
        # Named as peft names them, which older checkpoints of DeepSpeed have.
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, base_layer.out_features, bias=False)})
        start = self.lora_A["default"].weight
        torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        # B is zero, so that the LoRA changes nothing at first.
        torch.nn.init.zeros_(self.lora_B["default"].weight)
        if base_layer.weight.is_floating_point():
            # Rounded as peft does it, so that a seed gives the same LoRA as before.
            start.data = start.to(base_layer.weight.dtype).float()
        self.lora_A.to(base_layer.weight.device)
        self.lora_B.to(base_layer.weight.device)

    def forward(self, tokens: Tensor) -> Tensor:
        down = self.lora_A["default"].weight.to(tokens.dtype)  # [rank, in]
        up = (self.scale * self.lora_B["default"].weight).to(tokens.dtype)  # [out, rank]
        hidden = F.linear(tokens, down)  # [B, S + V, rank]
        result = self.base_layer(tokens)  # [B, S + V, out]
        # Product and sum are one operation, which is rounded once.
        return torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), up.T).view_as(result)  # [B, S + V, out]


def lora_parameters(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.nn.Parameter]:
    """Return what trains, by the names of the saved file: peft's, without the adapter's name."""
    trained = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            trained[name.replace(".default.", ".")] = parameter
    return trained


def lora_weights(transformer: CogVideoXTransformer3DModel) -> dict[str, Tensor]:
    """Return the whole LoRA in fp32 on the CPU, by the names of the saved file. Collective."""
    weights = {}
    for name, parameter in lora_parameters(transformer).items():
        weight = parameter.detach()
        # DeepSpeed trains an fp32 copy, which is shared out over the processes. It marks its parameters with this
        # name, and has no public function that tells them.
        if hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param
            weight = safe_get_full_fp32_param(parameter)
        weights[name] = weight.float().cpu()
    return weights


def save_lora(
    transformer: CogVideoXTransformer3DModel, path: Path, weights: dict[str, Tensor], is_for_use: bool = False
) -> None:
    """Write `weights`, of `lora_weights`, as the file `path`, complete or not at all. Its metadata makes
    `pipe.load_lora_weights(path)` apply alpha / rank, once. `is_for_use`: alpha / rank is multiplied into B, and
    alpha becomes the rank, since some programs take the matrices alone. Raises RunError, code 1."""
    metadata = dict(transformer.lora_metadata)
    if sorted(weights) != transformer.lora_names:
        raise RunError(f"{path} cannot be written: its layers would have other names than the model's", exit_code=1)
    if is_for_use:
        strength = metadata["lora_alpha"] / metadata["r"]
        metadata["lora_alpha"] = metadata["r"]
        weights = {name: weight * strength if ".lora_B." in name else weight for name, weight in weights.items()}
    with explain(f"{path} cannot be written", (OSError, SafetensorError), exit_code=1):
        PIPELINE.save_lora_weights(
            path.parent, transformer_lora_layers=weights, weight_name=partial_name(path).name,
            transformer_lora_adapter_metadata=metadata,
        )
        put_in_place(partial_name(path), path)


def check_lora(transformer: CogVideoXTransformer3DModel, path: Path) -> dict[str, str]:
    """Compare the matrices in the file `path` with the LoRA of `transformer`. Return the names in the file, by those
    of this script. Raises RunError if they do not fit."""
    problem = f"{path} does not fit the layers and the rank of this run"
    with explain(problem, ValueError):
        names = names_in_lora(path)
    expected = {f"transformer.{name}": list(weight.shape) for name, weight in lora_parameters(transformer).items()}
    found = {}
    with safe_open(path, framework="pt") as file:
        for name, name_in_file in names.items():
            if not name.endswith(".alpha"):
                found[name] = file.get_slice(name_in_file).get_shape()
    differing = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if differing:
        shapes = f"{differing[0]} is {found.get(differing[0], 'missing')}, not {expected.get(differing[0], 'needed')}"
        raise RunError(f"{problem}: {shapes}")
    return names


def load_lora(transformer: CogVideoXTransformer3DModel, path: Path, factor: float = 1.0) -> None:
    """Read the file `path` into the LoRA of `transformer`. Its B are multiplied by `factor`, which makes up for
    another alpha. Raises RunError if file and LoRA do not fit."""
    names = check_lora(transformer, path)
    saved = load_file(path)
    for name, parameter in lora_parameters(transformer).items():
        parameter.data.copy_(saved[names[f"transformer.{name}"]])
        if ".lora_B." in name:
            parameter.data *= factor


class CogVideoXBlock(diffusers_cogvideox.CogVideoXBlock):
    """Compute what diffusers' block does, to rounding, for video [B, V, D] and text [B, S, D]. It moves 63 % of the
    bytes: theirs rotates fp32 copies, writes into slices that autograd clones, and has an operation for each sum."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None, attention_kwargs: dict | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        attention = self.attn1
        lengths = (encoder_hidden_states.shape[1], hidden_states.shape[1])  # S, V
        tokens, gate, text_gate = modulate(self.norm1, hidden_states, encoder_hidden_states, temb)  # [B, S + V, D]
        query = attention.to_q(tokens).unflatten(-1, (attention.heads, -1))  # [B, S + V, heads, d]
        key = attention.to_k(tokens).unflatten(-1, (attention.heads, -1))  # [B, S + V, heads, d]
        value = attention.to_v(tokens).unflatten(-1, (attention.heads, -1))  # [B, S + V, heads, d]
        if attention.norm_q is not None:
            query = attention.norm_q(query)
            key = attention.norm_k(key)
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb  # [V, d] each, with every angle twice
            query = Rotation.apply(query, cos[:, None, ::2], sin[:, None, ::2])
            key = Rotation.apply(key, cos[:, None, ::2], sin[:, None, ::2])
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        tokens = attended.transpose(1, 2).flatten(2)  # [B, S + V, D]
        # Without this, sampling would hold them in memory through the feed-forward layers.
        del query, key, value, attended
        for layer in attention.to_out:
            tokens = layer(tokens)  # [B, S + V, D]
        text, video = tokens.split(lengths, dim=1)
        hidden_states = torch.addcmul(hidden_states, gate, video)  # [B, V, D]
        encoder_hidden_states = torch.addcmul(encoder_hidden_states, text_gate, text)  # [B, S, D]

        tokens, gate, text_gate = modulate(self.norm2, hidden_states, encoder_hidden_states, temb)  # [B, S + V, D]
        if self.num_parts > 1:
            parts = tokens.chunk(self.num_parts, dim=1)
            tokens = torch.cat([self.recompute(self.ff, part) for part in parts], dim=1)
        else:
            tokens = self.ff(tokens)
        text, video = tokens.split(lengths, dim=1)
        return torch.addcmul(hidden_states, gate, video), torch.addcmul(encoder_hidden_states, text_gate, text)


def modulate(norm_zero: torch.nn.Module, hidden_states: Tensor, text: Tensor, temb: Tensor) -> tuple:
    """Apply diffusers' CogVideoXLayerNormZero to video [B, V, D] and text [B, S, D]. Return both as one tensor
    [B, S + V, D], and the gates [B, 1, D] of both."""
    modulation = norm_zero.linear(norm_zero.silu(temb))[:, None]  # [B, 1, 6D]
    shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=-1)  # [B, 1, D]
    text = torch.addcmul(text_shift, norm_zero.norm(text), 1 + text_scale)  # [B, S, D]
    hidden_states = torch.addcmul(shift, norm_zero.norm(hidden_states), 1 + scale)  # [B, V, D]
    return torch.cat([text, hidden_states], dim=1), gate, text_gate


class Rotation(torch.autograd.Function):
    """Rotary positions of queries or keys [B, S + V, heads, d], text tokens first: neighbors in d are turned by the
    angle of their token. cos, sin [V, 1, d/2] are fp32. Its backward pass turns the other way, and needs no input."""

    @staticmethod
    def forward(ctx, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        num_text = tensor.shape[1] - len(cos)
        turned = torch.empty_like(tensor)
        turned[:, :num_text] = tensor[:, :num_text]
        real, imaginary = tensor[:, num_text:].unflatten(-1, (-1, 2)).unbind(-1)  # [B, V, heads, d/2]
        targets = turned[:, num_text:].unflatten(-1, (-1, 2)).unbind(-1)  # [B, V, heads, d/2] each
        for first, second, sign, target in ((real, imaginary, -1, targets[0]), (imaginary, real, 1, targets[1])):
            # A compiled graph cannot write into every second element, and needs not to.
            if torch.compiler.is_compiling():
                target.copy_(torch.addcmul(first * cos, second, sin, value=sign))
            else:
                # The product and the sum are computed in fp32, and rounded once to the dtype of `target`.
                torch.addcmul(first * cos, second, sin, value=sign, out=target)
        return turned

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return Rotation.apply(grad, cos, -sin), None, None


def recomputation_contexts(args: Namespace) -> Callable:
    """Return what makes the contexts in which a block runs, and runs again in the backward pass."""
    if args.checkpoint_policy == "full":
        return noop_context_fn

    def keep_attention(_context, operation, *_arguments, **_keywords) -> CheckpointPolicy:
        # Attention's result is small for its cost. torch has no list of its kernels for attention: they are told by
        # their names, as _scaled_dot_product_… on a GPU.
        if "scaled_dot_product" in operation.__name__ or "_attention_forward" in operation.__name__:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    # What is kept stays on the device with --offload_activations, too; torch warns that this may change one day.
    warnings.filterwarnings("ignore", message="A saved_tensors_hooks context")
    return functools.partial(create_selective_checkpoint_contexts, keep_attention)


def place_transformer(args: Namespace, transformer: CogVideoXTransformer3DModel, device: torch.device) -> None:
    """Move a transformer with its LoRA to the device; with --offload_base all but the frozen weights of its blocks."""
    if not args.offload_base:
        transformer.to(device)
        return
    host_blocks = HostBlocks(transformer.transformer_blocks, device, recomputation_contexts(args))
    transformer.enable_gradient_checkpointing(host_blocks.recompute)
    for name, module in transformer.named_children():
        if name != "transformer_blocks":
            module.to(device)


def place_text_encoder(text_encoder: T5EncoderModel, device: torch.device) -> None:
    """Have T5 compute on the device with two of its blocks there. The table of embeddings stays on the host, and so do
    token ids: what is looked up in it is moved."""
    text_encoder.requires_grad_(False)
    HostBlocks(text_encoder.encoder.block, device, is_pinned=False)
    text_encoder.encoder.final_layer_norm.to(device)
    table = text_encoder.get_input_embeddings()
    table.register_forward_pre_hook(lambda table, inputs: tuple(ids.to(table.weight.device) for ids in inputs))
    table.register_forward_hook(lambda _table, _inputs, embeds: embeds.to(device))


class HostBlocks:
    """Frozen weights of a model's blocks, which wait in host memory while two blocks are on the device.

    Block i computes from slot i % 2 of the device: its neighbors on both sides are in the other slot. When a block
    begins, it waits for its weights, and the copy of the block after it starts, in the order of use: upwards in a
    forward pass, downwards where blocks are recomputed. Copies have a stream of their own. One starts after all that
    the computation has queued, so that a slot is read to its end before it is written again. Weights are only read:
    nothing is copied back. Without recomputation they would be overwritten before their backward pass.

    The parameters of the blocks become views of the slots. Whoever moves them (`.to`) breaks that in silence, with
    plausible losses and no gradients: so each block checks its own when it begins, and raises RuntimeError.
    """

    def __init__(
        self, blocks: torch.nn.ModuleList, device: torch.device, context_fn: Callable = noop_context_fn,
        is_pinned: bool = True,
    ):  # fmt: skip
        self.blocks = list(blocks)
        self.context_fn = context_fn
        self.streams = torch.get_device_module("cpu" if device.type == "meta" else device)
        self.copying = self.streams.Stream()
        self.copied = [self.streams.Event(), self.streams.Event()]  # by slot
        self.in_slot = [None, None]  # the blocks whose weights are there, or on their way
        self.current = None  # the block that began last
        largest = max(sum(self.padded(tensor.nbytes) for tensor in self.frozen(block)) for block in self.blocks)
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.on_host = []  # a buffer a block
        self.places = []  # of each block: its tensors, and where they are in the slot
        for index, block in enumerate(self.blocks):
            size = sum(self.padded(tensor.nbytes) for tensor in self.frozen(block))
            # torch rounds pinned memory up to a power of two: for a 5B 1 % more, tensor by tensor 76 %.
            buffer = host_memory((size,), torch.uint8, device, is_pinned)
            places = []
            start = 0
            for tensor in self.frozen(block):
                self.view(buffer, start, tensor).copy_(tensor)
                tensor.data = self.view(self.slots[index % 2], start, tensor)
                places.append((tensor, tensor.data_ptr()))
                start += self.padded(tensor.nbytes)
            for parameter in block.parameters():
                if parameter.requires_grad:  # the LoRA's
                    parameter.data = parameter.data.to(device)
            self.on_host.append(buffer)
            self.places.append(places)
            block.register_forward_pre_hook(lambda block, _inputs: self.begin(block))

    @staticmethod
    def frozen(block: torch.nn.Module) -> list[Tensor]:
        """Return the tensors of a block that do not train."""
        return [tensor for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad]

    @staticmethod
    def padded(size: int) -> int:
        """Return the room in bytes for `size` bytes: kernels read aligned weights faster."""
        return math.ceil(size / 256) * 256

    @staticmethod
    def view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
        """Return bytes of `buffer` as a tensor of another one's dtype and shape."""
        return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def transfer(self, slot: Tensor, buffer: Tensor) -> None:
        """Copy the weights of a block to the device."""
        slot[: len(buffer)].copy_(buffer, non_blocking=True)

    def fetch(self, index: int) -> None:
        """Start to copy the weights of block `index`, if it exists and they are not there or on their way."""
        number = index % 2
        if not 0 <= index < len(self.blocks) or self.in_slot[number] == index:
            return
        self.copying.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copying):
            self.transfer(self.slots[number], self.on_host[index])
            self.copied[number].record()
        self.in_slot[number] = index

    def begin(self, block: torch.nn.Module) -> None:
        """Have the weights of a block on the device, and those of the next one on their way."""
        index = self.blocks.index(block)
        if any(tensor.data_ptr() != place for tensor, place in self.places[index]):
            raise RuntimeError(f"--offload_base: the weights of block {index} are not where they are copied to")
        if index == self.current:
            return
        is_forward = self.current is None or index > self.current or index == 0
        self.fetch(index)
        self.streams.current_stream().wait_event(self.copied[index % 2])
        self.current = index
        self.fetch(index + 1 if is_forward else index - 1)

    @contextlib.contextmanager
    def begun(self, block: torch.nn.Module, context) -> Iterator[None]:
        """Begin a block before a context of its recomputation. The context records operations, so the copies of the
        weights must be outside it."""
        self.begin(block)
        with context:
            yield

    def contexts(self, block: torch.nn.Module) -> tuple:
        """Return the contexts in which a block runs, and runs again in the backward pass."""
        return tuple(self.begun(block, context) for context in self.context_fn())

    def recompute(self, block: torch.nn.Module, *inputs):
        """Run a block that is run again in the backward pass: for `enable_gradient_checkpointing`."""
        contexts = functools.partial(self.contexts, block)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def host_memory(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_pinned: bool = True) -> Tensor:
    """Return an empty tensor in host memory, for copies from and to `device`; the computation waits for them where it
    cannot be pinned. For the meta device it has no memory."""
    if device.type == "cuda" and is_pinned:
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            # Many containers limit locked memory (ulimit -l).
            log_warning_once(f"Host memory cannot be pinned, so copies take longer: {str(error).splitlines()[0]}")
    return torch.empty(size, dtype=dtype, device="meta" if device.type == "meta" else "cpu")


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Copy to host memory what the forward pass saves. The copy is queued with the computation, which is why the
    device's memory can be used again at once, and why nothing waits for it."""
    host = host_memory(tensor.shape, tensor.dtype, tensor.device)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def to_device(saved: tuple[torch.device, Tensor]) -> Tensor:
    """Copy what `to_host` returned back to its device."""
    device, host = saved
    return host.to(device, non_blocking=True)


def saving_activations(args: Namespace) -> contextlib.AbstractContextManager:
    """Return what a forward pass is run in: with --offload_activations, what it saves waits in host memory."""
    if args.offload_activations:
        return saved_tensors_hooks(to_host, to_device)
    return contextlib.nullcontext()


def load_vae(args: Namespace, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """Load the frozen VAE, in tiles and slices as the flags say."""
    vae = load_component(AutoencoderKLCogVideoX, pretrained_source(args, "vae", dtype))
    if args.enable_slicing:
        vae.enable_slicing()
    if args.enable_tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval()


def needs_tiles(args: Namespace, accelerator: Accelerator, size: float) -> bool:
    """Return whether the VAE works in tiles, where whole frames take `size` bytes with all else: with --offload_base,
    and where that is too much for the smallest card of all processes. What other programs hold at the moment does not
    count, since what depends on the answer must not change from one run to the next. Collective."""
    return args.offload_base or min(gather(device_memory(accelerator.device))) < size + OTHER_MEMORY


def device_memory(device: torch.device) -> float:
    """Return the bytes that a GPU has in all; infinity for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on a GPU, those that torch keeps for later included; infinity for the CPU."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


# ---- Data -----------------------------------------------------------------------------------------------------------


class VideoRecord(NamedTuple):
    """A training clip: caption, path and, for a video stored in a data set's own files, what reads its bytes."""

    caption: str
    path: str
    read_bytes: Callable[[], bytes] | None = None

    def source(self) -> str | io.BytesIO:
        """Return what the clip is read from."""
        return self.path if self.read_bytes is None else io.BytesIO(self.read_bytes())

    def content_hash(self) -> str:
        """Return what tells one clip from another, wherever it is: its size, beginning and end."""
        return content_hash(self.source())


class VideoDataset(Dataset):
    """Clips with captions, decoded on access.

    Items are {"instance_prompt": str, "instance_video": float32 [F, C, H, W] in [-1, 1] with F = 4k+1, "kept":
    float32 [2], the parts of its time and of its frames' area that are used, "notes": what was converted}. The
    constructor opens no video. It raises RunError for a data source that cannot work, with all missing files.
    """

    def __init__(
        self, instance_data_root: str | None = None, dataset_name: str | None = None,
        dataset_config_name: str | None = None, caption_column: str = "text", video_column: str = "video",
        height: int = 480, width: int = 720, fps: int = 8,
        max_num_frames: int = 49, skip_frames_start: int = 0, skip_frames_end: int = 0, cache_dir: str | None = None,
        id_token: str | None = None, frame_sampling: str = "stride", seed: int | None = None,
        buckets: list[tuple[int, int, int]] | None = None, video_reader: str = "pyav", video_reshape_mode="center",
    ):
        root = Path(instance_data_root or "")
        if dataset_name is not None:
            self.records = read_dataset(
                dataset_name, dataset_config_name, instance_data_root, caption_column, video_column, cache_dir
            )
        elif not (root / caption_column).is_file():
            self.records = read_captions_beside(root, caption_column)
        else:
            self.records = read_line_files(root, root / caption_column, root / video_column)
        if not self.records:
            raise RunError(f"no clips in {dataset_name or instance_data_root}: its captions and videos are empty")
        missing = []
        for record in self.records:
            if record.read_bytes is None and not Path(record.path).is_file():
                missing.append(record.path)
        if missing:
            raise RunError(f"{len(missing)} of {len(self.records)} videos are missing:\n{listing(missing)}")
        self.buckets = buckets or [(max_num_frames, height, width)]
        # These settings are part of the key of encoded clips. What changes no pixel is left out: it would encode them
        # anew.
        self.settings = {
            "video_reshape_mode": video_reshape_mode, "skip_frames_start": skip_frames_start,
            "skip_frames_end": skip_frames_end, "frame_sampling": frame_sampling, "video_reader": video_reader,
        }
        if buckets:
            self.settings["buckets"] = buckets
        else:
            self.settings |= {"height": height, "width": width, "max_num_frames": max_num_frames}
        if frame_sampling == "fps":
            self.settings["fps"] = fps
        if video_reshape_mode in ("random", "none"):
            self.settings["seed"] = seed
        # The names of the original scripts, for code that was written against them.
        self.instance_data_root = Path(instance_data_root) if instance_data_root is not None else None
        self.dataset_name = dataset_name
        self.dataset_config_name = dataset_config_name
        self.caption_column = caption_column
        self.video_column = video_column
        self.height = height
        self.width = width
        self.fps = fps
        self.max_num_frames = max_num_frames
        self.skip_frames_start = skip_frames_start
        self.skip_frames_end = skip_frames_end
        self.cache_dir = cache_dir
        self.id_token = (id_token or "").strip()
        self.instance_prompts = [record.caption for record in self.records]
        self.instance_video_paths = [Path(record.path) for record in self.records]
        self.num_instance_videos = len(self.records)
        self.instance_videos = DecodedVideos(self)

    def __len__(self) -> int:
        return self.num_instance_videos

    def prompt(self, index: int) -> str:
        """Return what the text encoder is given for clip `index`: the trigger word, one space, the caption."""
        return f"{self.id_token} {self.records[index].caption}".strip()

    def content_hashes(self) -> list[str]:
        """Return the hash of each clip's content."""
        return [record.content_hash() for record in self.records]

    def choose(self, index: int, is_in_order: bool = False) -> tuple[Clip, list[int], tuple[int, int], Tensor]:
        """Return what is used of clip `index`: the clip, the indices of its frames, H and W, and `kept`. Raises
        ValueError, TimesDiffer, and what decord and PIL raise."""
        settings = self.settings
        clip = open_clip(self.records[index], settings["video_reader"], is_in_order)
        num_frames = len(clip.times) - 1
        skipped = (settings["skip_frames_start"], settings["skip_frames_end"])
        sampling = settings["frame_sampling"] if num_frames > 1 else "stride"
        options = (*skipped, sampling, clip.times, settings.get("fps", 8))
        available = len(select_frames(num_frames, num_frames, *options))
        max_num_frames, height, width = choose_bucket(self.buckets, available, *clip.size)
        indices = select_frames(num_frames, max_num_frames, *options)
        time_kept = (indices[-1] - indices[0] + 1) / max(1, num_frames - sum(skipped))
        area_kept = 1.0
        if settings["video_reshape_mode"] != "stretch":
            smaller, larger = sorted((clip.size[0] / clip.size[1], height / width))
            area_kept = smaller / larger
        return clip, indices, (height, width), torch.tensor([time_kept, area_kept])  # [2]

    def __getitem__(self, index: int) -> dict:
        """Decode clip `index`. Raises ValueError, and what decord and PIL raise."""
        try:
            return self.item(index)
        except TimesDiffer:
            return self.item(index, is_in_order=True)

    def item(self, index: int, is_in_order: bool = False) -> dict:
        """Decode clip `index`, or raise what `choose` does."""
        clip, indices, (height, width), kept = self.choose(index, is_in_order)
        position = None
        if "seed" in self.settings:
            # Drawn from seed and content, not from a stream: the crop stays when clips are added, reordered or moved.
            draw = random.Random(f"{self.settings['seed']}:{self.records[index].content_hash()}")
            position = (draw.random(), draw.random())
        mode = self.settings["video_reshape_mode"]
        video = torch.empty(len(indices), 3, height, width)  # [F, C, H, W]
        # A few frames at a time: 49 frames of 4K as floats would take 5 GB.
        for start in range(0, len(indices), 8):
            frames = torch.from_numpy(clip.read(indices[start : start + 8]))  # [8, H0, W0, C] uint8
            frames = (frames.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # [8, C, H0, W0]
            video[start : start + 8] = resize_and_crop(frames, height, width, mode, position)
        return {"instance_prompt": self.prompt(index), "instance_video": video, "kept": kept, "notes": clip.notes}


class DecodedVideos(Sequence):
    """The videos [F, C, H, W] of a `VideoDataset` as a sequence: each is decoded when it is asked for."""

    def __init__(self, dataset: VideoDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.dataset[index % len(self)]["instance_video"]


def is_file_in(root: Path, names: list[str]) -> bool:
    """Return whether the first of these names is that of a file below `root`."""
    return bool(names) and os.path.isfile(root / names[0])  # unlike Path.is_file, it takes a long caption


def read_line_files(root: Path, caption_file: Path, video_file: Path) -> list[VideoRecord]:
    """Return records of two files of lines: line i of one belongs to line i of the other. A line that is blank in both
    is left out. Raises RunError where they do not pair up."""
    captions = read_lines(caption_file)
    videos = read_lines(video_file)
    if not is_file_in(root, videos) and is_file_in(root, captions):
        raise RunError("--caption_column and --video_column are swapped: the captions are paths of files")
    if len(captions) != len(videos):
        lengths = f"{caption_file} has {len(captions)} lines, {video_file} has {len(videos)}"
        raise RunError(f"captions and videos do not pair up: {lengths}")
    records = []
    blank = []
    for number, (caption, video) in enumerate(zip(captions, videos, strict=True), start=1):
        if caption and video:
            records.append(VideoRecord(caption, str(root / video)))
        elif caption or video:
            blank.append(f"line {number} of {video_file if caption else caption_file}")
    if blank:
        raise RunError(f"these lines are blank, and not in the other file: fill or remove them\n{listing(blank)}")
    return records


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, stripped, without the blank ones at its end. Raises RunError."""
    if not path.is_file():
        raise RunError(f"{path} is missing: --caption_column and --video_column name the two files of lines")
    with explain(f"{path} cannot be read as UTF-8 text", (OSError, UnicodeDecodeError)):
        text = path.read_bytes().decode("utf-8-sig").rstrip()
    if not text:
        return []
    # Only "\n" ends a line: str.splitlines would also cut at form feeds and Unicode separators within a caption.
    return [line.strip() for line in text.split("\n")]


def read_captions_beside(root: Path, missing_file: str) -> list[VideoRecord]:
    """Return records of all clips and pictures below `root`, by path; the caption of x.mp4 is the text of x.txt, as
    one line. Raises RunError with each clip that has no caption, and each text that has no clip."""
    # The output folders of earlier runs have videos of their own. A name that begins with a dot is hidden, as are
    # those that a Mac leaves beside each file (._clip.mp4).
    output_dirs = {path.parent for path in root.rglob("run.json")}
    files = []
    for path in sorted(root.rglob("*")):
        if "/." not in f"/{path.relative_to(root)}" and not output_dirs.intersection(path.parents):
            files.append(path)
    captions = {}  # by text file
    text_files = {}  # by path without suffix
    for path in files:
        if path.suffix.lower() == ".txt":
            with explain(f"{path} cannot be read as UTF-8 text", (OSError, UnicodeDecodeError)):
                captions[path] = " ".join(path.read_text("utf-8-sig").split())
            text_files[path.with_suffix("")] = path
    records = []
    used = set()  # text files
    alone = []
    for path in files:
        if path.suffix.lower() not in VIDEO_TYPES | PICTURE_TYPES | HEIC_TYPES:
            continue
        text_file = text_files.get(path.with_suffix(""))
        if not captions.get(text_file):
            alone.append(f"{path}: it has no caption")
        elif text_file in used:
            alone.append(f"{path}: {text_file.name} is the caption of another clip, too")
        else:
            records.append(VideoRecord(captions[text_file], str(path)))
        used.add(text_file)
    for text_file in captions:
        if text_file not in used:
            alone.append(f"{text_file}: it has no clip")
    if not alone and not records:
        raise RunError(f"{root} has no clips, and no file {missing_file}")
    if alone:
        layout = f"{root} has no file {missing_file}, and is no folder of clips with a .txt file beside each"
        if (root / "prompts.txt").is_file() and (root / "videos.txt").is_file():
            layout += " (--caption_column prompts.txt --video_column videos.txt names the two files of lines there)"
        raise RunError(f"{layout}:\n{listing(alone)}")
    return records


def read_dataset(
    dataset_name: str, config_name: str | None, root: str | None, caption_column: str, video_column: str,
    cache_dir: str | None,
) -> list[VideoRecord]:
    """Return records of the `train` split of a Hub data set or a local folder, or of a local table file. Videos are
    paths, relative to `root` or else to the table, or a `datasets.Video`. Raises RunError."""
    import datasets
    formats = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    local = Path(dataset_name)
    if local.is_file() and local.suffix.lower() in formats:
        source = {"path": formats[local.suffix.lower()], "data_files": dataset_name}
    else:
        source = {"path": dataset_name, "name": config_name}
    with explain(f"--dataset_name {dataset_name} cannot be read"):
        table = datasets.load_dataset(**source, split="train", cache_dir=cache_dir)
    for flag, column in (("--caption_column", caption_column), ("--video_column", video_column)):
        if column not in table.column_names:
            raise RunError(f"{flag}: {dataset_name} has no column {column!r}, only {', '.join(table.column_names)}")
    feature = table.features[video_column]
    if isinstance(feature, (datasets.Video, datasets.Image)):
        table = table.cast_column(video_column, type(feature)(decode=False))
    if root is None and local.exists():
        root = local if local.is_dir() else local.parent

    def stored_bytes(row: int) -> bytes:
        return table[row][video_column]["bytes"]

    records = []
    for row, (caption, video) in enumerate(zip(table[caption_column], table[video_column], strict=True)):
        if not isinstance(caption, str) or not caption.strip():
            raise RunError(f"--caption_column: {dataset_name} has {caption!r} in row {row}, and no text")
        if not video:
            raise RunError(f"--video_column: {dataset_name} has no video in row {row}")
        if not isinstance(video, dict):
            video = {"path": str(video)}
        path = str(Path(root or "") / video["path"])
        read_bytes = None
        if video.get("bytes") is not None:
            path = f"row {row} of {dataset_name} ({video['path']})"
            read_bytes = functools.partial(stored_bytes, row)
        records.append(VideoRecord(caption.strip(), path, read_bytes))
    return records


def select_frames(
    num_frames: int, max_num_frames: int, skip_frames_start: int = 0, skip_frames_end: int = 0,
    frame_sampling: str = "stride", times: list[float] | None = None, fps: float = 8,
) -> list[int]:  # fmt: skip
    """Return which frames of a clip of `num_frames` are trained on: ascending indices, 4k+1 of them. stride: every
    n-th frame, n as large as leaves max_num_frames of them; uniform: spread evenly from the first to the last; fps:
    those shown at the first one's time + i / fps, at most max_num_frames. `times` [num_frames + 1] are seconds: when
    each frame is shown, and when the last one ends."""
    first = min(skip_frames_start, num_frames - 1)
    end = max(num_frames - skip_frames_end, first + 1)  # all skipped: the first one alone
    available = end - first
    if frame_sampling == "uniform":
        count = frames_4k_plus_1(min(max_num_frames, available))
        return [first + round(i * (available - 1) / max(count - 1, 1)) for i in range(count)]
    if frame_sampling == "fps":
        # The small number makes 8 of 24 / 30 * 10, which is a little less in floating point.
        count = math.floor((times[end] - times[first]) * fps + 1e-6)
        indices = []
        for i in range(min(max_num_frames, max(1, count))):
            moment = times[first] + i / fps + 1e-6
            indices.append(bisect.bisect_right(times, moment, hi=end) - 1)
    else:
        indices = list(range(first, end, max(1, available // max_num_frames)))[:max_num_frames]
    return indices[: frames_4k_plus_1(len(indices))]


def frames_4k_plus_1(count: int) -> int:
    """Return the largest F = 4k+1 within `count` >= 1 frames: the VAE makes latent frames of 1, then of 4 each."""
    return (count - 1) // 4 * 4 + 1


def choose_bucket(buckets: list[tuple[int, int, int]], num_frames: int, height: int, width: int) -> tuple:
    """Return the bucket (F, H, W) that keeps most of a clip: of those with the nearest aspect, the one with the most
    frames that the clip fills, or the shortest one. One-frame buckets are for pictures, if there are others."""
    def distance(shape: tuple) -> float:
        return round(abs(math.log(shape[1] * width / (shape[2] * height))), 6)

    pool = [shape for shape in buckets if (shape[0] == 1) == (num_frames == 1)] or buckets
    smallest = min(map(distance, pool))
    nearest = [shape for shape in pool if distance(shape) == smallest]
    filled = [shape for shape in nearest if shape[0] <= num_frames]
    return max(filled, default=min(nearest))


def resize_and_crop(
    frames: Tensor, height: int, width: int, mode: str, position: tuple[float, float] | None = None
) -> Tensor:
    """Bring frames [F, C, H0, W0] in [-1, 1] to [F, C, H, W], bicubic with antialiasing. `stretch` ignores the aspect.
    Else the frame covers H x W with its aspect kept, and is cropped at `position`, the fractions of the surplus above
    and to the left, each in [0, 1); None is the center."""
    source_height, source_width = frames.shape[-2:]
    if mode == "stretch":
        size = [height, width]
    elif source_width * height > source_height * width:  # wider than the target
        size = [height, max(width, source_width * height // source_height)]
    else:
        size = [max(height, source_height * width // source_width), width]
    frames = resize(frames, size, InterpolationMode.BICUBIC, antialias=True)  # [F, C, >=H, >=W]
    spare_height = size[0] - height
    spare_width = size[1] - width
    if position is None:
        top = spare_height // 2
        left = spare_width // 2
    else:
        top = int(position[0] * (spare_height + 1))
        left = int(position[1] * (spare_width + 1))
    # Bicubic overshoots at hard edges; the VAE has only seen [-1, 1].
    return frames[..., top : top + height, left : left + width].clamp(-1, 1)  # [F, C, H, W]


@dataclasses.dataclass
class Clip:
    """A video, upright and with square pixels; a picture is a video of one frame.

    `times` [n + 1] are seconds: when each frame is shown, and when the last one ends. `size` is H0, W0. `read` takes
    indices of frames and returns the frames, uint8 [n, H0, W0, C]. `notes` say what was converted.
    """

    times: list[float]
    size: tuple[int, int]
    read: Callable[[list[int]], np.ndarray]
    notes: list[str]


def open_clip(record: VideoRecord, video_reader: str = "pyav", is_in_order: bool = False) -> Clip:
    """Open the clip of a record. `is_in_order` decodes a video from its start, and trusts no times of the container.
    Raises ValueError, TimesDiffer, and what decord and PIL raise."""
    # The path of a row of a data set ends with the file's name in brackets.
    suffix = Path(record.path.rstrip(")")).suffix.lower()
    if suffix in HEIC_TYPES:
        raise ValueError("HEIC pictures cannot be read: magick FILE picture.jpg converts one")
    source = record.source()
    if suffix in PICTURE_TYPES | {".apng"}:
        return open_picture(source)
    if video_reader == "decord":
        return open_with_decord(source)
    video = VideoFile(source, is_in_order)
    times = video.times()
    durations = sorted(np.diff(times[:-1]))
    few = len(durations) // 20
    if durations and durations[few] * 1.5 < durations[-1 - few]:
        video.notes.append("variable frame rate")
    return Clip(times, video.size, video.read, video.notes)


class VideoFile:
    """A video file, read by PyAV. Raises ValueError with what is wrong with the file.

    One pass over the packets tells the time of each frame. To read a frame, decoding starts at the last keyframe
    before it, and a frame of exactly that time must come: else TimesDiffer is raised. Where the container's times
    cannot be trusted, and where a video is interlaced, all frames are decoded in order, once to count them and once to
    take those that are wanted.
    """

    def __init__(self, source: str | io.BytesIO, is_in_order: bool = False):
        self.source = source
        self.is_interlaced = False
        self.graphs = {}  # that convert frames, by their layout
        self.open()
        self.formats = set(self.container.format.name.split(","))
        self.scan()
        self.open()
        first = next(self.frames, None)
        if first is None:
            raise ValueError("it has no frames that can be decoded")
        self.is_interlaced = first.interlaced_frame
        is_trusted = self.keyframes and self.formats & {"mov", "matroska", "gif"} and not self.is_interlaced
        self.is_in_order = is_in_order or not is_trusted
        if self.is_in_order:
            self.open()
            self.count()
            self.open()
        # The curves of HDR, PQ and HLG, look grey and washed out without conversion.
        self.is_hdr = first.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
        self.pixel_aspect = float(self.stream.sample_aspect_ratio or 1)  # width of a pixel / height
        if not 0.2 < self.pixel_aspect < 5:
            self.pixel_aspect = 1.0
        self.size = None  # H0, W0; `convert` brings later frames to it
        self.size = self.convert(first).shape[:2]
        self.notes = []
        if self.is_hdr:
            self.notes.append("HDR")
        if self.is_interlaced:
            self.notes.append("interlaced")
        if self.pixel_aspect != 1:
            self.notes.append("pixels that are not square")

    def open(self) -> None:
        """Open the file at its start."""
        # FFmpeg prints lines about odd but readable files, which a user can do nothing about.
        av.logging.set_level(None)
        if isinstance(self.source, io.BytesIO):
            self.source.seek(0)
        try:
            self.container = av.open(self.source, metadata_errors="ignore")
        except (av.error.InvalidDataError, av.error.EOFError) as error:
            raise ValueError(what_it_is(self.source)) from error
        self.stream = self.container.streams.best("video")
        if self.stream is None or Disposition.attached_pic in self.stream.disposition:  # the cover of a song
            raise ValueError("it has no video stream")
        if self.stream.codec_context is None:
            raise ValueError(f"there is no decoder for its video stream; {CONVERT}")
        self.stream.thread_type = "AUTO"
        self.frames = self.deinterlaced() if self.is_interlaced else self.decode()
        self.last_index = -1  # of the frame that `find` decoded last
        self.last_time = -math.inf

    def packets(self, *streams: av.stream.Stream) -> Iterator[av.Packet]:
        """Yield the packets of these streams, or of all."""
        # An error ends the packets here, since `scan` compares what could be read with the duration.
        with contextlib.suppress(av.error.FFmpegError):
            yield from self.container.demux(*streams)

    def scan(self) -> None:
        """Read the times of all frames and of the keyframes, in units of the stream, from the packets."""
        self.pts = []
        self.end = 0
        self.keyframes = []  # the time of each, and what to seek to for it
        readable = 0.0  # seconds, of any stream
        for packet in self.packets():
            if packet.pts is None:
                continue
            end = packet.pts + (packet.duration or 0)
            readable = max(readable, float(end * packet.time_base))
            if packet.stream_index != self.stream.index:
                continue
            if packet.is_keyframe:
                is_by_dts = "mov" in self.formats and packet.dts is not None
                self.keyframes.append((packet.pts, packet.dts if is_by_dts else packet.pts))
            # An edit list may cut packets off that are needed to decode others: they are decoded, and not shown.
            if not packet.is_discard:
                self.pts.append(packet.pts)
                self.end = max(self.end, end)
        self.pts.sort()
        self.keyframes.sort()
        if len(set(self.pts)) < len(self.pts):
            self.keyframes = []  # such times cannot be trusted
        # Other containers estimate their duration, and would be taken for truncated.
        if self.container.duration and self.formats & {"mov", "matroska", "avi", "asf"}:
            duration = self.container.duration / av.time_base
            readable -= (self.container.start_time or 0) / av.time_base
            if readable < 0.95 * duration - 0.5:
                raise ValueError(f"it is truncated: {readable:.1f} of {duration:.1f} s can be read")

    def decode(self, start: float = -math.inf) -> Iterator[av.VideoFrame]:
        """Yield the frames from here on, not those before the time `start`. What is damaged at the beginning or at the
        end, as where a broadcast was cut, is left out. Raises ValueError for damage in the middle."""
        damaged = None  # the time of damage since the last good frame
        has_begun = False
        for packet in self.packets(self.stream):
            frames = []
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                damaged = packet.pts or packet.dts or 0
            for frame in frames:
                if frame.pts is not None and frame.pts < start:
                    # Such a frame may refer to frames before the keyframe, which were not decoded.
                    continue
                if frame.is_corrupt:
                    damaged = frame.pts or packet.dts or 0
                    continue
                if has_begun and damaged is not None:
                    seconds = float((damaged - (self.stream.start_time or 0)) * self.stream.time_base)
                    raise ValueError(f"it is damaged at {seconds:.1f} s")
                damaged = None
                has_begun = True
                yield frame

    def count(self) -> None:
        """Find the times of all frames by decoding them. Where they have none that ascend, as in .avi, they are shown
        at the stream's rate."""
        unit = self.stream.time_base
        num_frames = 0
        self.pts = []
        for frame in self.frames:
            num_frames += 1
            if frame.pts is not None:
                self.pts.append(round(frame.pts * frame.time_base / unit))
        if len(set(self.pts)) < num_frames or self.pts != sorted(self.pts):
            rate = self.stream.average_rate or self.stream.guessed_rate or 25
            self.pts = [round(index / (rate * unit)) for index in range(num_frames + 1)]
            self.end = self.pts.pop()

    def deinterlaced(self) -> Iterator[av.VideoFrame]:
        """Yield whole frames in place of interlaced ones. Each is made with those before and after it."""
        graph = None
        for frame in itertools.chain(self.decode(), [None]):  # None: the end
            if graph is None:
                graph = self.linked(frame, ("bwdif", "mode=send_frame"))
            graph.push(frame)
            with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
                while True:
                    yield graph.pull()

    def linked(self, frame: av.VideoFrame, *filters: tuple[str, str]) -> av.filter.Graph:
        """Return a graph of filters, one after the other, for frames like this one."""
        graph = av.filter.Graph()
        layout = {"width": frame.width, "height": frame.height, "format": frame.format}
        nodes = [graph.add_buffer(**layout, time_base=frame.time_base)]
        for name, options in filters:
            nodes.append(graph.add(name, options))
        nodes.append(graph.add("buffersink"))
        graph.link_nodes(*nodes).configure()
        return graph

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """Return a frame as a person sees it: uint8 [H0, W0, C]."""
        has_alpha = any(component.is_alpha for component in frame.format.components)
        layout = (frame.width, frame.height, frame.format.name)
        if layout not in self.graphs:
            width = round(frame.width * max(1, self.pixel_aspect))
            height = round(frame.height / min(1, self.pixel_aspect))
            scale = f"w={width}:h={height}"
            if self.is_hdr:
                scale += ":out_primaries=bt709:out_transfer=bt709:out_color_matrix=bt709"
            pixel_format = "rgba" if has_alpha else "rgb24"
            self.graphs[layout] = self.linked(frame, ("scale", scale), ("format", pixel_format))
        graph = self.graphs[layout]
        graph.push(frame)
        image = self.upright(graph.pull().to_ndarray(), frame)  # [H0, W0, 3 or 4]
        if has_alpha:
            image = np.asarray(upright_rgb(Image.fromarray(image)))  # [H0, W0, C]
        if self.size not in (None, image.shape[:2]):  # it changes within the video
            image = np.asarray(Image.fromarray(image).resize(self.size[::-1], Image.Resampling.BICUBIC))
        return image  # [H0, W0, C]

    def upright(self, image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
        """Turn and mirror a frame as its display matrix says, which cameras write: [H0, W0, 3 or 4]."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return image
        # On the screen, a pixel of (x, y) is at (a x + c y, b x + d y).
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(int)
        if abs(b) > abs(a):
            image = image.transpose(1, 0, 2)  # x and y change places
            a = c
            d = b
        if a < 0:
            image = image[:, ::-1]
        if d < 0:
            image = image[::-1]
        return image

    def find(self, index: int) -> av.VideoFrame:
        """Return frame `index`. Raises TimesDiffer."""
        if self.is_in_order:
            if index <= self.last_index:
                self.open()
            for frame in self.frames:
                self.last_index += 1
                if self.last_index == index:
                    return frame
            raise ValueError("it gave more frames when they were counted")
        time = self.pts[index]
        before = bisect.bisect_right(self.keyframes, (time, math.inf))
        start, target = self.keyframes[max(0, before - 1)]
        if not start <= self.last_time < time:
            try:
                self.container.seek(target, stream=self.stream)
            except av.error.FFmpegError as error:
                raise TimesDiffer from error
            self.frames = self.decode(start)
        for frame in self.frames:
            if frame.pts is None or frame.pts > time:
                break
            self.last_time = frame.pts
            if frame.pts == time:
                return frame
        raise TimesDiffer

    def read(self, indices: list[int]) -> np.ndarray:
        """Return frames: uint8 [n, H0, W0, C]. Raises TimesDiffer."""
        frames = {index: self.convert(self.find(index)) for index in sorted(set(indices))}
        return np.stack([frames[index] for index in indices])

    def times(self) -> list[float]:
        """Return the seconds at which each frame is shown, and at which the last one ends."""
        first = self.pts[0]
        last = self.pts[-1]
        end = self.end
        # The last frame has no duration, so it gets the mean one.
        if end <= last:
            end = last + max(1, (last - first) // max(1, len(self.pts) - 1))
        return [float((time - first) * self.stream.time_base) for time in [*self.pts, end]]


class TimesDiffer(Exception):
    """The decoder gives frames at other times than their container tells."""


def open_with_decord(source: str | io.BytesIO) -> Clip:
    """Open a video as the original scripts did, with all that decord gets wrong."""
    import decord
    # FFmpeg warns of odd but readable files, which a user can do nothing about.
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(source)
    rate = reader.get_avg_fps()
    if len(reader) == 0:
        raise ValueError("it has no frames")
    if not 0 < rate < math.inf:
        raise ValueError(f"its frame rate is {rate}")

    def read(indices: list[int]) -> np.ndarray:
        frames = reader.get_batch(indices)
        # decord.bridge, set by others, changes the kind of array.
        return frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)

    times = [index / rate for index in range(len(reader) + 1)]
    return Clip(times, read([0]).shape[1:3], read, [])


def open_picture(source: str | io.BytesIO) -> Clip:
    """Open a picture, or an animated one (WebP, PNG, AVIF). Raises ValueError."""
    try:
        image = Image.open(source)
    except UnidentifiedImageError as error:
        raise ValueError(what_it_is(source)) from error
    if image.format not in ("WEBP", "PNG", "AVIF") or not image.is_animated:
        frames = np.asarray(upright_rgb(image))[None]  # [1, H0, W0, C]
        return Clip([0.0, 1.0], frames.shape[1:3], lambda indices: frames[indices], [])
    # The default image of an animated PNG is for programs that cannot show the animation.
    first = 1 if image.info.get("default_image") else 0
    times = [0.0]
    for index in range(first, image.n_frames):
        image.seek(index)
        image.load()
        times.append(times[-1] + (image.info.get("duration") or 100) / 1000)

    def read(indices: list[int]) -> np.ndarray:
        frames = {}
        # The file is opened again, because PIL cannot go back in every animated PNG.
        with Image.open(source) as image:
            for index in sorted(set(indices)):
                image.seek(first + index)
                frames[index] = np.asarray(upright_rgb(image))
        return np.stack([frames[index] for index in indices])

    return Clip(times, read([0]).shape[1:3], read, ["animated picture"])


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: upright, and on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip to 8
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def what_it_is(source: str | io.BytesIO) -> str:
    """Say by its content what a file is that cannot be read, and what to do about it."""
    size, start, _ = start_and_end(source)
    if size == 0:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer in place of the file: run git lfs pull"
    if start[4:8] == b"ftyp":
        if start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            return "it is a HEIC picture, which cannot be read: magick FILE picture.jpg converts it"
        return "it has no index (moov): it is truncated, or its recording was interrupted"
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "it is a web page (HTML) and no video: download the file itself"
    with contextlib.suppress(UnicodeDecodeError):
        if "\0" not in codecs.getincrementaldecoder("utf-8")().decode(start):
            return "it is text and no video"
    return f"it is no video or picture that can be read; {CONVERT}"


def content_hash(source: str | io.BytesIO) -> str:
    """Return a hash of the size of a file, of its first MiB and of its last one."""
    size, start, end = start_and_end(source)
    return hashlib.sha256(b"%d " % size + start + end).hexdigest()


def start_and_end(source: str | io.BytesIO) -> tuple[int, bytes, bytes]:
    """Return the size of a file, or of bytes in memory, with its first MiB and its last one."""
    if isinstance(source, io.BytesIO):
        data = source.getvalue()
        return len(data), data[: 2**20], data[-(2**20) :]
    with open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(2**20)
        file.seek(max(0, size - 2**20))
        return size, start, file.read(2**20)


# ---- Precompute: each prompt and clip is encoded once, into a safetensors file, before the transformer loads --------


def precompute_prompts(args: Namespace, accelerator: Accelerator, prompts: list[str], num_tokens: int) -> dict:
    """Encode each distinct prompt once. Return its file, which holds `prompt_embeds` [S, D] in the compute dtype. The
    text encoder is loaded only if a prompt is new, and freed before this returns."""
    folder = precompute_folder(args)
    dtype = DTYPES[accelerator.mixed_precision]
    device = accelerator.device
    content = {
        "max_sequence_length": num_tokens, "dtype": str(dtype),
        "encoder": in_first(model_identity, args, "text_encoder", "tokenizer"),
    }
    paths = {prompt: item_path(folder, "prompts", prompt=prompt, **content) for prompt in prompts}
    files = {prompt: (path,) for prompt, path in paths.items()}
    new = in_first(find_new, folder / "prompts", "prompt_embeds", files)
    own = new[accelerator.process_index :: accelerator.num_processes]
    if own:
        tokenizer = load_component(T5Tokenizer, pretrained_source(args, "tokenizer"))
        text_encoder = load_component(T5EncoderModel, pretrained_source(args, "text_encoder", dtype))
        if args.offload_base or text_encoder.get_memory_footprint() > 0.95 * free_memory(device):
            logger.info(f"The text encoder waits in host memory: two of its blocks at a time are on {device}")
            place_text_encoder(text_encoder, device)
        else:
            text_encoder.to(device)
        too_long = []
        for prompt in new:
            if len(tokenizer(prompt, verbose=False).input_ids) > num_tokens:
                too_long.append(f"{prompt[:60]}…")
        if too_long:
            logger.warning(f"Cut to the {num_tokens} tokens that the model takes:\n{listing(too_long)}")
    with shared_work():
        for prompt in progress_bar(iterable=own, desc="Encoding prompts", unit="prompt"):
            embeds = compute_prompt_embeddings(tokenizer, text_encoder, prompt, num_tokens, device, dtype)
            write_item(paths[prompt], prompt_embeds=embeds[0])  # [S, D]
    tokenizer = text_encoder = None
    clear_device_cache(garbage_collection=True)
    return paths


def encode_prompt(
    tokenizer: T5Tokenizer | None, text_encoder: T5EncoderModel, prompt: str | list[str],
    num_videos_per_prompt: int = 1, max_sequence_length: int = 226, device: torch.device | None = None,
    dtype: torch.dtype | None = None, text_input_ids: Tensor | None = None,
) -> Tensor:
    """Return T5 hidden states of prompts, padded or cut to S tokens as CogVideoXPipeline does: [n, S, D], the
    num_videos_per_prompt repeats of one prompt together. Raises ValueError without both tokenizer and token ids."""
    if tokenizer is not None:
        text_input_ids = tokenizer(
            prompt, padding="max_length", max_length=max_sequence_length, truncation=True, add_special_tokens=True,
            return_tensors="pt",
        ).input_ids  # [B, S]
    elif text_input_ids is None:
        raise ValueError("without a tokenizer, text_input_ids must be given")
    prompt_embeds = text_encoder(text_input_ids.to(device))[0].to(dtype=dtype, device=device)  # [B, S, D]
    return prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)  # [n, S, D]


_get_t5_prompt_embeds = encode_prompt  # the original scripts' other name for it


def compute_prompt_embeddings(
    tokenizer: T5Tokenizer, text_encoder: T5EncoderModel, prompt: str | list[str], max_sequence_length: int,
    device: torch.device, dtype: torch.dtype, requires_grad: bool = False,
) -> Tensor:
    """Return `encode_prompt` for one video a prompt, without gradients unless asked: [n, S, D]."""
    with contextlib.nullcontext() if requires_grad else torch.no_grad():
        return encode_prompt(tokenizer, text_encoder, prompt, 1, max_sequence_length, device, dtype)


def precompute_videos(
    args: Namespace, accelerator: Accelerator, dataset: VideoDataset, is_in_tiles: bool
) -> list[tuple | None]:
    """Encode each clip once, and its mirror image for --random_flip. Return the files of each clip. The VAE is loaded
    only if a clip is new, and freed before this returns. Raises RunError that lists every clip that cannot be decoded,
    after the others are encoded; with --skip_bad_videos those have None in place of their files."""
    folder = precompute_folder(args)
    dtype = DTYPES[accelerator.mixed_precision]
    tiling = args.enable_tiling or is_in_tiles
    content = {
        "made_for": KIND, "settings": dataset.settings, "dtype": str(dtype), "reader": READER_FORMAT,
        "encoder": in_first(model_identity, args, "vae") | {"tiling": tiling},
    }
    flips = (False, True) if args.random_flip else (False,)
    paths = []
    for source in in_first(dataset.content_hashes):
        content["source"] = source
        paths.append(tuple(item_path(folder, "videos", flip=flip, **content) for flip in flips))
    new = in_first(find_new, folder / "videos", "moments", dict(enumerate(paths)))
    own = new[accelerator.process_index :: accelerator.num_processes]
    if own:
        vae = load_vae(args, dtype).to(accelerator.device)
        if tiling and not args.enable_tiling:
            vae.enable_tiling()
            logger.info("Clips are encoded in tiles, as with --enable_tiling: whole frames take more memory")
    bad = {}
    converted = Counter()
    videos = decode_videos(dataset, own, dtype, max(1, args.dataloader_num_workers))
    with shared_work(), contextlib.closing(videos):
        for index, answer in progress_bar(iterable=videos, total=len(own), desc="Encoding videos", unit="video"):
            if isinstance(answer, str):
                bad[paths[index]] = f"{dataset.records[index].path}: {answer}"
                continue
            converted.update(answer["notes"])
            for path, is_flipped in zip(paths[index], flips, strict=True):
                if is_item(path, "moments"):
                    continue
                video = answer["video"].flip(-1) if is_flipped else answer["video"]  # [F, C, H, W]
                # The path is a hash of the content: the seed is the clip's own, and equal in every run.
                write_item(path, **encode_clip(vae, video, seed=int(path.stem[:15], 16)), kept=answer["kept"])
    vae = None
    clear_device_cache(garbage_collection=True)
    converted = sum(gather(converted), Counter())  # of all processes
    if converted:
        kinds = ", ".join(f"{count} with {note}" for note, count in sorted(converted.items()))
        logger.info(f"Clips that were converted to what a person sees: {kinds}")
    for found in gather(bad):
        bad |= found
    paths = [None if files in bad else files for files in paths]
    if bad:
        problem = f"{paths.count(None)} of {len(paths)} videos cannot be decoded"
        problems = listing(sorted(bad.values()), limit=200)
        if not args.skip_bad_videos or not any(paths):
            raise RunError(f"{problem}:\n{problems}")
        logger.warning(f"{problem} and are left out:\n{problems}")
    return paths


def encode_clip(vae: AutoencoderKLCogVideoX, video: Tensor, seed: int) -> dict:  # noqa: ARG001
    """Return all that is stored of a clip [F, C, H, W], by name."""
    return {"moments": encode_video(vae, video)}  # [2c, f, h, w]


@torch.no_grad()
def encode_video(vae: AutoencoderKLCogVideoX, video: Tensor) -> Tensor:
    """Return the parameters (mean, log variance) of the latent distribution of pixels [F, C, H, W]: [2c, f, h, w]. The
    distribution is kept and not a sample of it, so that each training step can draw a fresh one."""
    batch = video[None].permute(0, 2, 1, 3, 4).to(vae.device, vae.dtype)  # [1, C, F, H, W]
    return vae.encode(batch).latent_dist.parameters[0]  # [2c, f, h, w]


def decode_videos(dataset: VideoDataset, indices: list[int], dtype: torch.dtype, num_workers: int) -> Iterator[tuple]:
    """Yield each clip's index with a dict of `video` [F, C, H, W], `kept` [2] and `notes`, or with a text that says
    what is wrong with it. `num_workers` processes decode the clips in turn, while those before are encoded."""
    decoders = [ClipDecoder(dataset, dtype) for _ in range(min(num_workers, len(indices)))]
    try:
        for decoder, index in zip(decoders, indices, strict=False):
            decoder.connection.send(index)
        for position, index in enumerate(indices):
            turn = position % len(decoders)
            try:
                answer = decoders[turn].connection.recv()
            except (EOFError, OSError):
                answer = "the decoder crashed on it"
                decoders[turn].stop()
                decoders[turn] = ClipDecoder(dataset, dtype)
            following = position + len(decoders)
            if following < len(indices):
                decoders[turn].connection.send(indices[following])
            if not isinstance(answer, str):
                notes, tensors = answer
                answer = safetensors.torch.load(tensors) | {"notes": notes}
            yield index, answer
    finally:
        for decoder in decoders:
            decoder.stop()


class ClipDecoder:
    """A process that decodes clips, one after the other."""

    def __init__(self, dataset: VideoDataset, dtype: torch.dtype):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=decode_clips, args=(theirs, dataset, dtype), daemon=True)
        self.process.start()
        # The process then holds the last copy of its end, so that its death is an end of file here.
        theirs.close()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def decode_clips(connection, dataset: VideoDataset, dtype: torch.dtype) -> None:
    """Decode clips in a process of its own. For each index that comes, send the notes about the clip, and `video`
    [F, C, H, W] and `kept` [2] as a safetensors file; or a text that says what is wrong with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A forked process has none of its parent's threads, and would wait for them for ever.
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):  # only Linux has it
        # PR_SET_PDEATHSIG (1): this process ends with its parent, even with one that is killed.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    while True:
        index = connection.recv()
        try:
            item = dataset[index]
            tensors = {"video": item["instance_video"].to(dtype), "kept": item["kept"]}
            answer = (item.get("notes", []), safetensors.torch.save(tensors))
        except Exception as error:  # FFmpeg, decord, PIL and torch have their own kinds
            text = str(error).strip() or type(error).__name__
            # The last line, without decord's line and check, and without FFmpeg's codes.
            text = re.sub(r"^(\[[\d:]+\] \S+: )*(Check failed: .*? vs\. .*?\) ?)?", "", text.splitlines()[-1])
            answer = re.sub(r"-?\d{9,}", "invalid data", text) or "its data is invalid"
        connection.send(answer)


def model_identity(args: Namespace, *subfolders: str) -> dict:
    """Return what tells an encoder from others: its config, and its commit on the Hub or the content of its files."""
    model = args.pretrained_model_name_or_path
    config, commit = read_config(args, subfolders[0])
    identity = {"variant": args.variant, "config": config}
    if not Path(model).is_dir():
        return identity | {"model": model, "revision": args.revision, "commit": commit}
    identity["files"] = []
    for subfolder in subfolders:
        for path in sorted(Path(model, subfolder).iterdir()):
            if path.is_file():
                identity["files"].append((f"{subfolder}/{path.name}", content_hash(str(path))))
    return identity


def item_path(folder: Path, kind: str, **content) -> Path:
    """Return the file of one precomputed item. Its name is a hash of all that decides its content."""
    key = json.dumps({"format": CACHE_FORMAT, "kind": kind, **content}, sort_keys=True, default=str)
    return folder / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.{CACHE_FORMAT}.safetensors"


def find_new(folder: Path, name: str, items: dict[object, tuple[Path, ...]]) -> list:
    """Return the keys of `items` whose files are not all in `folder` and complete. Of several keys with the same files
    only the last one is returned. Call it in the first process, before any process writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.partial"):
        # So old a file is left of a process that was killed while it wrote.
        if time.time() - partial.stat().st_mtime > 3600:
            partial.unlink(missing_ok=True)
    older = [path for path in folder.glob("*.safetensors") if f".{CACHE_FORMAT}." not in path.name]
    if older:
        num_bytes = sum(path.stat().st_size for path in older)
        logger.info(f"{folder}: {num_bytes / 1e9:.2f} GB in {len(older)} files of an older version may be deleted")
    new = {}
    for key, files in items.items():
        if not all(is_item(file, name) for file in files):
            new[files] = key
    logger.info(f"{folder}: {len(new)} of {len(items)} to encode")
    return list(new.values())


def is_item(path: Path, name: str) -> bool:
    """Tell whether `path` is a complete file with the tensor `name`. Opening it compares its header with its size."""
    try:
        with safe_open(path, framework="pt") as item:
            return name in item.keys()
    except (OSError, SafetensorError):
        return False


def write_item(path: Path, **tensors: Tensor) -> None:
    """Write a precomputed item, complete or not at all. Raises RunError."""
    partial = path.with_name(f".{path.stem}.{os.uname().nodename}.{os.getpid()}.partial")
    advice = " (--precompute_dir takes another folder)"
    with explain(f"{path} cannot be written", (OSError, SafetensorError), advice=advice):
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)


# ---- Batches --------------------------------------------------------------------------------------------------------


class LatentDataset(Dataset):
    """Precomputed clips, read on access: a dict of `prompt_embeds` [S, D] and the tensors of `encode_clip`. The key
    (index, is flipped, has no caption) comes from the sampler, which draws. `clips` are the files of each clip (and of
    its mirror image), that of its prompt, and its name. `num_held_out` of them, drawn by `seed` from each shape in
    turn, are not trained on. Logs the sizes, and which clips lose much. Raises RunError if no clip is left."""

    def __init__(self, clips: list[tuple[tuple[Path, ...], Path, str]], no_prompt: Path, num_held_out: int, seed: int):
        self.clips = clips
        self.no_prompt = no_prompt
        self.shapes = []
        sizes = Counter()
        cut_off = []
        for files, _, name in clips:
            with safe_open(files[0], framework="pt") as item:
                channels, f, h, w = item.get_slice("moments").get_shape()
                if "kept" in item.keys() and item.get_tensor("kept").min() < 0.5:
                    cut_off.append(name)
            self.shapes.append((channels, f, h, w))
            sizes[f"{4 * f - 3} x {8 * h} x {8 * w}"] += 1
        logger.info(f"Clips: {', '.join(f'{count} of {size}' for size, count in sorted(sizes.items()))}")
        if cut_off:
            logger.warning(f"More than half of the frames or of the pixels is cut off:\n{listing(cut_off)}")
        if num_held_out >= len(clips):
            raise RunError(f"--eval_split {num_held_out} leaves nothing of {len(clips)} clips to train on")
        of_shape = {shape: [] for shape in self.shapes}
        for index in random.Random(f"held out {seed}").sample(range(len(clips)), len(clips)):
            of_shape[self.shapes[index]].append(index)
        # One clip of each shape, then a second one of each, and so on.
        turns = itertools.chain(*itertools.zip_longest(*of_shape.values()))
        self.held_out = [index for index in turns if index is not None][:num_held_out]

    def __getitem__(self, key: tuple[int, bool, bool]) -> dict[str, Tensor]:
        index, is_flipped, has_no_caption = key
        files, prompt, _ = self.clips[index]
        item = load_file(files[int(is_flipped)]) | load_file(self.no_prompt if has_no_caption else prompt)
        item.pop("kept", None)
        return item


class ShapeBatchSampler(Sampler[list[tuple[int, bool, bool]]]):
    """Batches of keys of a `LatentDataset` in which all clips have one latent shape, for one process of
    several. The order of epoch e is a function of (seed, e) alone, so a position in the data is two numbers, and to
    resume there reads nothing of what came before. Set `epoch` and `first_batch` before iterating."""

    def __init__(
        self, shapes: dict[int, tuple[int, ...]], batch_size: int, seed: int, random_flip: bool = False,
        caption_dropout: float = 0.0, process_index: int = 0, num_processes: int = 1,
    ):
        self.shapes = shapes
        self.batch_size = batch_size
        self.seed = seed
        self.random_flip = random_flip
        self.caption_dropout = caption_dropout
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch = 0
        self.first_batch = 0

    def all_batches(self) -> list[list[tuple[int, bool, bool]]]:
        """Return the epoch's batches of all processes: clips in random order fill the open batch of their shape."""
        draw = random.Random(f"{self.seed}:{self.epoch}")
        order = list(self.shapes)
        draw.shuffle(order)
        batches = []
        filling = {}  # by shape
        for index in order:
            batch = filling.setdefault(self.shapes[index], [])
            is_flipped = self.random_flip and draw.random() < 0.5
            has_no_caption = self.caption_dropout > 0 and draw.random() < self.caption_dropout
            batch.append((index, is_flipped, has_no_caption))
            if len(batch) == self.batch_size:
                batches.append(filling.pop(self.shapes[index]))
        batches += filling.values()
        # Every process takes the same number of batches: one with fewer would let the others wait for gradients.
        for i in range(-len(batches) % self.num_processes):
            batches.append(batches[i])
        return batches

    def __iter__(self) -> Iterator[list[tuple[int, bool, bool]]]:
        yield from self.all_batches()[self.process_index :: self.num_processes][self.first_batch :]

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch of this process."""
        return len(self.all_batches()) // self.num_processes


def get_dataloader(args: Namespace, accelerator: Accelerator, dataset: LatentDataset, seed: int) -> tuple:
    """Return the loader of this process's batches, on its device, and the sampler that says where in the data it
    is."""
    shapes = dict(enumerate(dataset.shapes))
    for index in dataset.held_out:
        del shapes[index]
    sampler = ShapeBatchSampler(
        shapes, args.train_batch_size, seed, args.random_flip, args.caption_dropout,
        accelerator.process_index, accelerator.num_processes,
    )
    workers = args.dataloader_num_workers
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None, pin_memory=accelerator.device.type == "cuda",
        # A signal to the process group must not end the workers, since the step that is finished then needs its
        # batches.
        worker_init_fn=lambda _: os.setpgid(0, 0),
        # A loader draws a seed each epoch. It must not come from the stream that noise comes from, or the noise would
        # depend on the number of workers.
        generator=torch.Generator(),
    )
    # Accelerate moves the batches and finds the last one of an epoch. The sampler has sharded them already, because
    # accelerate's own sharding pads batches with clips of any shape.
    loader = prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    return loader, sampler


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def get_optimizer(args: Namespace, params_to_optimize, use_deepspeed: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of --optimizer over parameters or parameter groups; with `use_deepspeed`, the placeholder
    for the optimizer that DeepSpeed's own configuration defines."""
    if use_deepspeed:
        from accelerate.utils.deepspeed import DummyOptim
        return DummyOptim(params_to_optimize, lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    common = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }
    name = args.optimizer.lower()
    if name == "prodigy":
        from prodigyopt import Prodigy
        if args.use_8bit_adam:
            logger.warning("--use_8bit_adam has no effect with --optimizer prodigy.")
        if args.learning_rate <= 0.1:
            logger.warning(f"--learning_rate {args.learning_rate:g} is low for prodigy, which is made for 1.")
        return Prodigy(
            params_to_optimize, **common, beta3=args.prodigy_beta3, decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction, safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    optimizer_class = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    if name not in ("adam", "adamw"):  # of code that calls this: the command line knows its values
        logger.warning(f"There is no optimizer {args.optimizer}: AdamW is taken.")
    if args.use_8bit_adam:
        import bitsandbytes
        optimizer_class = getattr(bitsandbytes.optim, f"{optimizer_class.__name__}8bit")
    return optimizer_class(params_to_optimize, **common)


def prepare(args: Namespace, accelerator: Accelerator, transformer: torch.nn.Module, max_train_steps: int) -> tuple:
    """Return transformer, optimizer and schedule (over optimizer steps, with any number of processes) as the engine
    wraps them. A DeepSpeed configuration that defines an optimizer or a schedule replaces that of the flags."""
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= max_train_steps:
        flag = f"--lr_warmup_steps {args.lr_warmup_steps}"
        logger.warning(f"{flag} of {max_train_steps} steps: the learning rate never reaches its full value.")
    plugin = accelerator.state.deepspeed_plugin
    defined = plugin.deepspeed_config if plugin is not None else {}
    if defined:
        from accelerate.utils.deepspeed import DummyScheduler
    learning_rate = args.learning_rate
    if args.scale_lr:  # by the clips of an optimizer step
        learning_rate *= args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    group = {"params": list(lora_parameters(transformer).values()), "lr": learning_rate}
    if accelerator.device.type == "cuda" and not args.use_8bit_adam and args.optimizer != "prodigy":
        # In the group, and not as an argument of the optimizer: then torch's gradient scaler decides which steps of
        # fp16 are skipped, and accelerate sees it. An optimizer that is made fused skips them itself.
        group["fused"] = True
    optimizer = get_optimizer(args, [group], use_deepspeed="optimizer" in defined)
    make_schedule = functools.partial(
        get_scheduler, args.lr_scheduler, num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max(1, max_train_steps), num_cycles=args.lr_num_cycles, power=args.lr_power,
    )
    if "scheduler" in defined:
        # accelerate divides the total by the number of processes again, but not the warm-up.
        steps = max_train_steps * accelerator.num_processes
        schedule = DummyScheduler(optimizer, total_num_steps=steps, warmup_num_steps=args.lr_warmup_steps)
    elif "optimizer" in defined:
        schedule = DummyScheduler(optimizer, lr_scheduler_callable=make_schedule)
    else:
        schedule = make_schedule(optimizer)
    # accelerate writes and reads what these leave in the lists: not the frozen base.
    accelerator.register_save_state_pre_hook(lambda _models, weights, _folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())
    # All processes have read the same base: DDP needs not send it to them at the start. torch has no public name for
    # this; without it, DDP would send all blocks' views of the two slots.
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.prepare(transformer, optimizer, schedule)
    place_transformer(args, transformer, accelerator.device)
    return accelerator.prepare(transformer, optimizer, schedule, device_placement=[False, True, True])


@dataclasses.dataclass
class Run:
    """Hold what checkpoints, validation and the loop share. Fields with a default change during the run. Its creation
    is collective."""

    args: Namespace
    accelerator: Accelerator
    transformer: torch.nn.Module  # as the engine wraps it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    noise_scheduler: CogVideoXDPMScheduler
    vae_config: dict
    prompt_files: dict[str, Path]
    dataset: LatentDataset
    max_train_steps: int
    settings: dict  # what a checkpoint must fit
    seed: int  # of the data order
    step: int = 0  # optimizer steps taken
    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch that each process has taken
    is_encoded_in_tiles: bool = False
    is_decoded_in_tiles: bool = False
    step_seconds: float = 0.0  # duration of the last step
    is_updating: bool = False  # the optimizer is changing the LoRA
    before_step: tuple = ()  # batch and random states before the step that is being taken

    def __post_init__(self):
        self.stop = StopSignal(self)
        self.base = self.accelerator.unwrap_model(self.transformer)  # the transformer without the engine's wrapper
        args = self.args
        num_bytes = sum(parameter.nbytes for parameter in self.base.parameters())
        for parameter in lora_parameters(self.base).values():
            num_bytes += 2 * parameter.nbytes  # the optimizer's states
        # What the VAE takes to decode whole frames.
        num_bytes += args.height * args.width * DECODED_PIXEL * DTYPES[self.accelerator.mixed_precision].itemsize
        self.is_decoded_in_tiles = needs_tiles(args, self.accelerator, num_bytes)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-N, all processes together: everything under another name, STATE_FILE last, then the rename. If
    one cannot write, that is logged, the checkpoints before it stay, and training continues. Raises RunError, code 3,
    for weights that are not finite, before they are saved."""
    accelerator = run.accelerator
    folder = Path(run.args.output_dir) / f"checkpoint-{run.step}"
    partial = partial_name(folder)
    is_written = False
    weights = lora_weights(run.base)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise not_finite(run, "weights of the LoRA are not finite")
    in_first(remove_checkpoint, folder)
    with attempt(f"Writing {folder}"):
        partial.mkdir(parents=True, exist_ok=True)
        # DeepSpeed takes this keyword, and would otherwise save the whole base each time.
        accelerator.save_state(str(partial), exclude_frozen_parameters=True)
        if accelerator.is_main_process:
            save_lora(run.base, partial / LORA_FILE, weights)
        is_written = True
    if all(gather(is_written)) and accelerator.is_main_process:
        with attempt(f"Writing {folder}"):
            others = list_checkpoints(folder.parent)
            content = {
                # The order of saving. The clock may go back, and steps do where an older checkpoint is resumed.
                "number": read_training_state(others[-1]).get("number", 0) + 1 if others else 1,
                "saved_at": time.time(),
                "settings": run.settings,
                "sizes": file_sizes(partial),
                "state": {name: getattr(run, name) for name in RUN_STATE},
            }
            (partial / STATE_FILE).write_text(json.dumps(content, indent=1))
            for path in (*partial.rglob("*"), partial):
                # The content must be on the disk before the final name is.
                flush(path)
            os.replace(partial, folder)
            flush(folder.parent)
            logger.info(f"Saved {folder}")
            if run.args.checkpoints_total_limit is not None:
                for old in list_checkpoints(folder.parent)[: -max(1, run.args.checkpoints_total_limit)]:
                    remove_checkpoint(old)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    gather()


def lora_path(output_dir: Path, step: int) -> Path:
    """Return the file in which the LoRA of a validation is kept."""
    return output_dir / "loras" / f"step-{step:06d}.safetensors"


def keep_lora(run: Run) -> None:
    """Write the LoRA as it is, ready for use, beside the samples of this step. --loras_total_limit limits those that
    are kept. A failure is logged, and training continues. Collective."""
    weights = lora_weights(run.base)
    if not run.accelerator.is_main_process:
        return
    output_dir = Path(run.args.output_dir)
    path = lora_path(output_dir, run.step)
    with attempt(f"Writing {path}"):
        path.parent.mkdir(exist_ok=True)
        save_lora(run.base, path, weights, is_for_use=True)
        if run.args.loras_total_limit is not None:
            kept = sorted(path.parent.glob("step-*.safetensors"), key=lambda path: path.stat().st_mtime)
            best = best_step(output_dir)
            for old in kept[: -run.args.loras_total_limit]:
                if best is None or old != lora_path(output_dir, best):
                    old.unlink()


def best_step(output_dir: Path) -> int | None:
    """Return the step with the lowest loss of held-out clips, of those whose LoRA is kept; None without any."""
    lines = []
    with contextlib.suppress(OSError):
        lines = (output_dir / "metrics.jsonl").read_text(errors="replace").splitlines()
    losses = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a full disk has cut short, or another
            row = json.loads(line)
            if lora_path(output_dir, row["step"]).is_file():
                losses[row["step"]] = float(row["validation/loss"])
    return min(losses, key=losses.get, default=None)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. Its name goes first, so that a kill leaves no part of it under this name."""
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        os.replace(folder, partial)
        shutil.rmtree(partial, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the one that was saved first before the others."""
    order = {}
    for folder in output_dir.glob("checkpoint-*"):
        content = read_training_state(folder)
        if content:
            order[folder] = (content.get("number", 0), content["saved_at"])  # older checkpoints have no number
    return sorted(order, key=order.get)


def find_checkpoint(args: Namespace, settings: dict) -> Path | None:
    """Return the folder that --resume_from_checkpoint means, or None for a fresh start. Nothing is written. Warns of
    `settings` that changed. Raises RunError if the checkpoint is missing, damaged or does not fit, or if a fresh start
    would overwrite another run."""
    output_dir = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    complete = list_checkpoints(output_dir)
    if wanted == "latest":
        candidates = complete[::-1]
    elif wanted:
        candidates = [output_dir / wanted, Path(wanted)]  # a name within the run, or any path
    else:
        candidates = []
    for folder in candidates:
        content = read_training_state(folder)
        if not content:
            continue
        sizes = file_sizes(folder)
        damaged = []
        for name, saved_size in content["sizes"].items():
            if sizes.get(name) != saved_size:
                damaged.append(name)
        if damaged:
            logger.warning(f"{folder} is damaged and passed over: {', '.join(damaged)}")
            continue
        check_settings(folder, content, settings)
        return folder
    if wanted not in (None, "latest"):
        names = ", ".join(folder.name for folder in complete) or "none"
        raise RunError(f"--resume_from_checkpoint {wanted}: no complete checkpoint; {output_dir} has {names}")
    saved = [*output_dir.glob(LORA_FILE), *sorted(output_dir.glob("checkpoint-*"))]
    metrics = [path for path in output_dir.glob("metrics.jsonl") if path.stat().st_size]
    names = ", ".join(path.name for path in saved + metrics)
    if wanted is None and (complete or (metrics and not saved)):
        ways = "resume it with --resume_from_checkpoint latest, or give another --output_dir"
        raise RunError(f"--output_dir {output_dir} has a run already ({names}): {ways}")
    if saved:
        loras = [*output_dir.glob(LORA_FILE), *output_dir.glob(f"checkpoint-*/{LORA_FILE}")]
        loras.sort(key=lambda path: path.stat().st_mtime)
        way = f"--init_lora {loras[-1].parent}, to start from its LoRA, and " if loras else ""
        problem = "but no checkpoint that can be resumed: they are damaged, or another program wrote them"
        raise RunError(f"--output_dir {output_dir} has a run ({names}), {problem}. Give {way}another --output_dir")
    if wanted:
        logger.info(f"--resume_from_checkpoint latest: {output_dir} has no checkpoint, so this is a fresh start")
    if metrics:
        logger.warning(f"{metrics[0]} is written anew: its run ended before its first checkpoint")
    return None


def check_settings(folder: Path, content: dict, settings: dict) -> None:
    """Compare the settings of a run with those of its checkpoint. Warns of changes. Raises RunError for those that the
    checkpoint does not fit."""
    engine = content["settings"].get("engine")
    if engine in ("deepspeed zero3", "fsdp2"):
        way = f"start a new run from its LoRA: --init_lora {folder} and another --output_dir"
        raise RunError(f"--resume_from_checkpoint: {folder} was written with {engine}, which is gone: {way}")
    changed = changed_settings(content, settings)
    fixed = {"rank", "lora_targets", "lora_blocks", "optimizer", "use_8bit_adam", "engine", "seed"}
    # DeepSpeed writes a file of the optimizer for each process.
    if settings["engine"] != "replicated":
        fixed.add("num_processes")
    refused = [changed[name] for name in sorted(fixed & changed.keys())]
    if refused:
        raise RunError(f"--resume_from_checkpoint: {folder} does not fit these flags:\n{listing(refused)}")
    if changed:
        step = content["state"]["step"]
        logger.warning(f"From step {step} of {folder} on, the settings are others:\n{listing(list(changed.values()))}")


def changed_settings(content: dict, settings: dict) -> dict[str, str]:
    """Return what a checkpoint's training_state.json has other settings for, by name: "rank was 4, is 8"."""
    changed = {}
    for name, value in settings.items():
        old = content["settings"].get(name, value)  # older checkpoints do not have all
        if old != value:
            changed[name] = f"{name} was {old}, is {value}"
    return changed


def read_training_state(folder: Path) -> dict:
    """Return `number`, `settings`, `state` and file `sizes` of a complete checkpoint; {} for another folder."""
    return read_json(folder / STATE_FILE)


def read_json(path: Path) -> dict:
    """Return what is in a JSON file, or {} where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file below `folder` but STATE_FILE."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != STATE_FILE:
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def make_output_folders(args: Namespace, last_step: int) -> int:
    """Make the folders that the run writes to. Remove what an earlier run left half-written there, and the lines of
    metrics.jsonl after `last_step`, which the run writes again. Return the lock of the output folder. Raises RunError
    where a checkpoint could not be written, and where another run writes."""
    output_dir = Path(args.output_dir)
    metrics = output_dir / "metrics.jsonl"
    probe = output_dir / ".probe"
    with explain("--output_dir or --precompute_dir cannot be written", OSError):
        folders = [output_dir, precompute_folder(args)]
        if args.report_to:
            folders.append(output_dir / args.logging_dir)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(output_dir)
        for partial in output_dir.glob(".*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()
        # A folder and a file are written here as a checkpoint is: what fails, fails before hours of training.
        shutil.rmtree(probe, ignore_errors=True)
        partial_name(probe).mkdir()
        flush(partial_name(probe))
        os.replace(partial_name(probe), probe)
        probe.rmdir()
        lines = metrics.read_text(errors="replace").splitlines() if metrics.exists() else []
        kept = [line for line in lines if step_of(line) <= last_step]
        if len(kept) < len(lines):
            removed = f"those after step {last_step}, which are trained again, and what is cut short"
            logger.info(f"{len(lines) - len(kept)} lines of {metrics} are removed: {removed}")
        write_whole(metrics, "".join(f"{line}\n" for line in kept))
    return lock


def step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for one that a kill or a full disk has cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def write_run_json(args: Namespace, settings: dict, max_train_steps: int) -> None:
    """Write run.json: what the run was started with. Raises RunError."""
    started_with = {
        "kind": KIND,
        "command": whole_command(),
        "args": vars(args) | {"hub_token": None},
        "settings": settings,
        "max_train_steps": max_train_steps,
    }
    with explain("--output_dir cannot be written", OSError):
        write_whole(Path(args.output_dir, "run.json"), json.dumps(started_with, indent=1))


def whole_command() -> str:
    """Return the command that started this process: with the launcher and its flags, if there is one."""
    command = shlex.join(["python", *sys.argv])
    with contextlib.suppress(OSError, ValueError):  # Linux alone has this file
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        for start, word in enumerate(words):
            launcher = Path(word).name
            if launcher in ("accelerate", "torchrun"):
                # What follows the script is taken from sys.argv, where the token is blanked.
                end = words.index(sys.argv[0], start)
                command = shlex.join([launcher, *words[start + 1 : end], *sys.argv])
    return command


def write_whole(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    partial_name(path).write_text(text)
    put_in_place(partial_name(path), path)


def lock_folder(output_dir: Path) -> int:
    """Keep other runs out of the output folder until the file descriptor that is returned is closed, or this process
    ends. Raises RunError if another run is there."""
    descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT)
    os.utime(descriptor)
    try:
        # Unlike those of flock, these locks end with the process, whatever its child processes do.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise RunError(f"--output_dir {output_dir}: another run writes there at this moment") from error
        # Some network file systems have no locks.
    return descriptor


def resume(run: Run, folder: Path, content: dict) -> None:
    """Load what `save_checkpoint` wrote, with the random generators of each process, and continue at that place in the
    data. `content` is that of its STATE_FILE. Collective."""
    accelerator = run.accelerator
    saved = content["settings"]
    schedule = run.lr_scheduler.scheduler
    rates = getattr(schedule, "base_lrs", [])  # of the flags; `load_state` brings those of the checkpoint
    for name in RUN_STATE:
        setattr(run, name, content["state"].get(name, getattr(run, name)))  # older checkpoints do not have all
    # A process without generators in the checkpoint must not draw the run's first noise again.
    set_seed((run.seed + run.step) % SEED_LIMIT, device_specific=True)
    # DeepSpeed reads its own file, which has the LoRA in fp32 and in the compute dtype.
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        load_lora(run.base, folder / LORA_FILE)
    # The frozen base is not in a checkpoint, hence not strict.
    accelerator.load_state(str(folder), load_module_strict=False)
    accelerator.step = 0  # micro-batches of a step that has begun: a checkpoint has none
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # else DeepSpeed's configuration defines it
        before = schedule.get_last_lr()[0]
        schedule.base_lrs = rates
        for group, rate, factor in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = rate
            group["lr"] = rate * factor(schedule.last_epoch)
        after = schedule.optimizer.param_groups[0]["lr"]
        if not math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-12):
            why = "the flags of the learning rate or the number of steps have changed"
            logger.warning(f"The learning rate after step {run.step} was {before:.3g}, and is {after:.3g}: {why}")
    clips = run.batch * saved["train_batch_size"] * saved["num_processes"]  # taken of this epoch
    run.batch = clips // (run.settings["train_batch_size"] * run.settings["num_processes"])
    logger.info(f"Resumed {folder}: step {run.step}, epoch {run.epoch + 1}, batch {run.batch} of it")


def begin_step(run: Run) -> None:
    """Note where the data and the random generators are before a step: the checkpoint after an error is of there."""
    run.before_step = (run.batch, torch.get_rng_state(), torch.cuda.get_rng_state_all())


def read_batches(run: Run, loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of an epoch. If one cannot be read, the steps that were taken are saved. Raises RunError."""
    try:
        yield from loader
    except Exception as error:  # of this process, or handed over by a worker with its traceback
        save_after_error(run)
        problem = str(error).strip().split("\n")[-1]
        if "shared memory" in str(error) or "Bus error" in str(error):
            advice = "--dataloader_num_workers 0 needs no shared memory; a container gets more by --shm-size 8g"
        else:
            advice = "the same command encodes again what is missing"
        raise RunError(f"the next clips cannot be read: {problem}. {advice}. {RESUME_HINT}") from error


def save_after_error(run: Run) -> None:
    """Write a checkpoint of the last complete step after an error. Only a single process does: of several, others may
    be lost."""
    if run.accelerator.num_processes == 1 and run.step and not run.is_updating:  # else the LoRA may be half changed
        batch, random_state, cuda_states = run.before_step
        torch.set_rng_state(random_state)
        torch.cuda.set_rng_state_all(cuda_states)
        run.batch = batch  # the micro-batches of the failed step will be taken again
        run.accelerator.step = 0
        save_checkpoint(run)
        logger.error(RESUME_HINT)


def not_finite(run: Run, what: str) -> RunError:
    """Return the error for values that are not finite, with the checkpoint to go back to and flags to try."""
    checkpoints = list_checkpoints(Path(run.args.output_dir))
    newest = checkpoints[-1] if checkpoints else "none"
    saved = f"Nothing of this step was saved; the last checkpoint is {newest}"
    advice = "a lower --learning_rate, --mixed_precision bf16 in place of fp16, or a longer --lr_warmup_steps"
    return RunError(f"step {run.step}: {what}. {saved}. Try {advice}.", exit_code=3, is_shared=True)


# ---- Validation -----------------------------------------------------------------------------------------------------


def run_validation(run: Run, is_final: bool = False) -> list[tuple[str, Path]]:
    """Keep the LoRA as it is, sample the validation prompts with it, and return each video with its prompt. Each
    process takes some of the prompts. They were encoded at the start, so the text encoder is not loaded. A failure
    (out of memory, a full disk) is logged, and training continues. A signal to stop ends the sampling."""
    args = run.args
    accelerator = run.accelerator
    inputs = validation_inputs(args) if args.num_validation_videos else []
    own = range(accelerator.process_index, len(inputs), accelerator.num_processes)  # prompts of this process
    sampled = []
    run.base.eval()
    if run.dataset.held_out:
        log_held_out_loss(run)
    # Before the first step it changes nothing. Without any of these flags, nobody asked for validations.
    if run.step and (inputs or run.dataset.held_out or args.validation_steps):
        keep_lora(run)
    if own:
        with attempt("Validation"), stage(args, "sampling", run.step):
            vae = load_vae(args, DTYPES[accelerator.mixed_precision]).to(accelerator.device)
            if run.is_decoded_in_tiles:
                vae.enable_tiling(*SMALL_TILES)
            pipe = PIPELINE(None, None, vae, run.base, run.noise_scheduler)
            for index in own:
                label = f"Sampling prompt {index + 1} of {len(inputs)}"
                is_hidden = not (is_first_process() and sys.stderr.isatty())
                pipe.set_progress_bar_config(desc=label, disable=is_hidden, leave=False)
                if is_hidden:
                    logger.info(f"{label} at step {run.step}")
                pipeline_args = pipeline_inputs(args, inputs[index], run.prompt_files, accelerator.device)
                pipeline_args["callback_on_step_end"] = run.stop.end_sampling
                files = validation_files(args, run.step, is_final, index)
                log_validation(pipe, args, accelerator, pipeline_args, run.epoch, is_final, files)
                logger.info(f"Sampled prompt {index + 1} of {len(inputs)} at step {run.step}")
                sampled.append(index)
        # Without these names the memory can be freed below.
        pipe = vae = None
    run.base.train()
    # After held-out clips, too.
    clear_device_cache(garbage_collection=True)
    videos = []
    for index in sorted(itertools.chain(*gather(sampled))):
        files = validation_files(args, run.step, is_final, index)
        prompt = inputs[index]["prompt"]
        videos += [(prompt, file) for file in files]
        if accelerator.is_main_process:
            # What each file shows: a resumed run may have other prompts.
            names = [file.name for file in files]
            write_row(Path(args.output_dir, "samples.jsonl"), {"step": run.step, "prompt": prompt, "files": names})
            send_videos(accelerator, files, prompt, run.step)
    return videos


def log_validation(
    pipe: PIPELINE, args: Namespace, accelerator: Accelerator, pipeline_args: dict, epoch: int,
    is_final_validation: bool = False, files: list[Path] | None = None,
) -> list[np.ndarray]:
    """Sample --num_validation_videos with `pipeline_args`, the same ones each time for one --seed. They are written to
    `files`, else to <output_dir>/validation and the trackers: after other prompts of the same `epoch`, if there are
    some. Return the videos: [F, H, W, C] in [0, 1], of images lists of pictures."""
    # CogVideoX is sampled with the DPM scheduler; a fresh one, since it keeps state from call to call.
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    # Its own generator: sampling must neither depend on the training's random numbers nor advance them.
    generator = torch.Generator(accelerator.device).manual_seed(0 if args.seed is None else args.seed)
    number = 0  # of the prompt
    paths = files or validation_files(args, epoch, is_final_validation, number)
    while files is None and any(path.exists() for path in paths):
        number += 1
        paths = validation_files(args, epoch, is_final_validation, number)
    videos = []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        video = pipe(**pipeline_args, generator=generator, output_type=OUTPUT_TYPE).frames[0]  # [>=F, H, W, C]
        # Of an even number of latent frames the VAE makes four frames of the first one too: the last F are the video.
        # Without a number of frames, all are taken: -0 is 0.
        video = video[-pipeline_args.get("num_frames", 0) :]  # [F, H, W, C]
        export_to_video(list(video), str(path), fps=args.fps)
        videos.append(video)
    if files is None and accelerator.is_main_process:
        send_videos(accelerator, paths, pipeline_args.get("prompt"), epoch)
    return videos


def pipeline_inputs(
    args: Namespace, sampled_from: dict, prompt_files: dict[str, Path], device: torch.device
) -> dict:
    """Return the pipeline's arguments for one of `validation_inputs`, with its prompt and the empty one as embeddings
    [1, S, D] from `prompt_files`."""
    inputs = {**sampling_settings(args), **sampled_from, "prompt": None}
    for name, prompt in (("prompt_embeds", sampled_from["prompt"]), ("negative_prompt_embeds", "")):
        embeds = load_file(prompt_files[prompt])["prompt_embeds"]  # [S, D]
        inputs[name] = embeds[None].to(device)  # [1, S, D]
    return inputs


def sampling_settings(args: Namespace) -> dict:
    """Return what all validation videos have in common, by the pipeline's names."""
    return {
        "num_frames": frames_4k_plus_1(args.max_num_frames),
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "use_dynamic_cfg": args.use_dynamic_cfg,
    }


def validation_files(args: Namespace, step: int, is_final: bool, prompt: int) -> list[Path]:
    """Return the files to which the --num_validation_videos of one prompt are written."""
    kind = "test" if is_final else "validation"
    stem = f"{kind}_step-{step:06d}_prompt-{prompt}"
    return [Path(args.output_dir, "validation", f"{stem}_video-{i}.mp4") for i in range(args.num_validation_videos)]


@torch.no_grad()
def log_held_out_loss(run: Run) -> None:
    """Log the mean loss of the clips of --eval_split at 10 noise levels, with the same noise each time. A failure (out
    of memory) is logged, and training continues. Collective."""
    accelerator = run.accelerator
    losses = {}
    # A flag of the image-to-video script, which has this function, too.
    args = Namespace(**vars(run.args) | {"noised_image_dropout": 0})
    timesteps = torch.linspace(0, run.noise_scheduler.config.num_train_timesteps - 1, 10).long().to(accelerator.device)
    with attempt("The loss of the held-out clips"):
        for index in run.dataset.held_out[accelerator.process_index :: accelerator.num_processes]:
            item = run.dataset[index, False, False]  # not flipped, and with its caption
            batch = {name: tensor[None].to(accelerator.device) for name, tensor in item.items()}
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(index)
                latents, conditions = prepare_batch(batch, run.base.config, run.vae_config, args)
                clip_losses = []
                for timestep in timesteps.split(1):  # [1]
                    loss = diffusion_loss(run.base, run.noise_scheduler, latents, conditions, None, timestep)
                    clip_losses.append(loss.item())
                losses[index] = sum(clip_losses)
    for losses_of_process in gather(losses):
        losses |= losses_of_process
    # A mean of other clips could not be compared with the means before.
    if len(losses) == len(run.dataset.held_out):
        mean = sum(losses.values()) / len(losses) / len(timesteps)
        metrics = {"validation/loss": mean}
        log_metrics(run, metrics, metrics)
        logger.info(f"Loss of {len(losses)} held-out clips at step {run.step}: {mean:.4f}")


def start_trackers(args: Namespace, accelerator: Accelerator) -> None:
    """Start the trackers of --report_to. The token is in no tracker's configuration. Raises RunError."""
    config = {}
    for name, value in vars(args).items():
        if name != "hub_token":
            config[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    init_kwargs = {"wandb": {"dir": accelerator.logging_dir}}
    with explain(f"--report_to {args.report_to}"):
        accelerator.init_trackers(args.tracker_name or DEFAULT_OUTPUT_DIR, config, init_kwargs)


def log_metrics(run: Run, metrics: dict, scalars: dict) -> None:
    """Write `metrics` of the last step as a line of metrics.jsonl, and `scalars` to the trackers."""
    if not run.accelerator.is_main_process:
        return
    write_row(Path(run.args.output_dir, "metrics.jsonl"), {"step": run.step} | metrics)
    with attempt("Logging to the trackers"):
        run.accelerator.log(scalars, step=run.step)


def send_videos(accelerator: Accelerator, files: list[Path], caption: str, step: int) -> None:
    """Show written videos in the trackers. The name of a prompt's video is the same at each validation."""
    for tracker, file in itertools.product(accelerator.trackers, files):
        # The name has no step in it: prompt-0_video-0.
        name = f"validation/{file.stem.split('_', 2)[-1]}"
        with attempt("Showing videos in the trackers"):
            if tracker.name == "wandb":
                import wandb
                tracker.tracker.log({name: wandb.Video(str(file), caption=caption, format="mp4")}, step=step)
            elif tracker.name == "comet_ml":
                tracker.tracker.log_video(str(file), name=name, step=step)
            elif tracker.name == "tensorboard":  # as a grid of frames: its videos need moviepy
                # Not by `open_clip`: the processes that read batches are forked from this one. There, to free what
                # PyAV holds here would wait forever for its threads. This reader is a process of its own.
                import imageio
                with imageio.get_reader(file, "ffmpeg") as video:
                    frames = np.stack(list(video.iter_data()))  # [F, H, W, C]
                tracker.log_images({name: frames}, step=step, dataformats="NHWC")


# ---- Card and Hub ---------------------------------------------------------------------------------------------------


CARD = """---
{metadata}
---

# {repo_id}

<Gallery />

A LoRA for {kind} with {base_model}.

{trigger}```py
import torch
from diffusers import {pipeline}
from diffusers.utils import {helpers}

pipe = {pipeline}.from_pretrained({base_model!r}, dtype=torch.{dtype})
pipe.load_lora_weights({repo_id!r})  # alpha / rank is in its matrices: no further scale is needed
pipe.enable_model_cpu_offload()  # one part of the model at a time is on the GPU; pipe.to("cuda") is faster
pipe.vae.enable_tiling()

video = pipe(
{call}).frames[0]
export_to_video(video, "video.mp4", fps={fps})
```

## Training

| setting | value |
|---|---|
{rows}
The licence of the base model applies to these weights too.
"""


def save_model_card(
    repo_id: str, videos: list | None = None, base_model: str | None = None,
    validation_prompt: str | list[str] | None = None, repo_folder: str | None = None, fps: int = 8,
    id_token: str | None = None, settings: dict | None = None, sampling: dict | None = None, image=None,
) -> None:
    """Write README.md, the model card, into `repo_folder`, and beside it what it shows: `videos`, mp4 files or
    [F, H, W, C] in [0, 1], with the `validation_prompt` of all or a list with one for each. `settings` become a table,
    `sampling` the keywords of the pipeline's call, `image` (PIL) its start image, first_frame.png."""
    folder = Path(repo_folder or ".")
    settings = settings or {}
    base_model, licence = base_and_licence(base_model or "THUDM/CogVideoX-5b")
    prompts = [validation_prompt] if isinstance(validation_prompt, str) else validation_prompt or []
    widget = []
    for index, video in enumerate(videos if videos is not None else []):
        name = f"final_video_{index}.mp4"
        if isinstance(video, Path):
            shutil.copyfile(video, folder / name)
        else:
            export_to_video(list(video), str(folder / name), fps=fps)
        prompt = prompts[min(index, len(prompts) - 1)] if prompts else "-"
        widget.append({"text": prompt, "output": {"url": name}})
    if image is not None:
        image.save(folder / "first_frame.png")
    prompt = prompts[0] if prompts else f"{id_token or ''} your prompt".strip()
    rows = ""
    for name, value in settings.items():
        has_no_effect = name == "lr_warmup_steps" and settings.get("lr_scheduler") == "constant"
        if name == "changes":
            value = "; ".join(value)
        if value not in (None, False) and not has_no_effect:
            rows += f"| {name.replace('_', ' ')} | {value} |\n"
    metadata = ModelCardData(
        base_model=None if Path(base_model).is_dir() else base_model,
        library_name="diffusers",
        pipeline_tag=KIND,
        tags=[
            KIND, "diffusers-training", "diffusers", "lora", "cogvideox", "cogvideox-diffusers", "template:sd-lora"
        ],
        instance_prompt=id_token or None,
        widget=widget or None,
        **licence,
    )
    card = CARD.format(
        metadata=metadata.to_yaml(),
        repo_id=repo_id,
        kind=KIND,
        base_model=base_model,
        trigger=f"Trigger word: `{id_token}`, at the beginning of the prompt.\n\n" if id_token else "",
        pipeline=PIPELINE.__name__,
        helpers="export_to_video, load_image" if KIND == "image-to-video" else "export_to_video",
        dtype="float16" if settings.get("mixed_precision") == "fp16" else "bfloat16",
        call=pipeline_keywords({"prompt": prompt} | (sampling or {}), settings.get("seed"), image is not None),
        fps=fps,
        rows=rows,
    )
    ModelCard(card).save(folder / "README.md")


def pipeline_keywords(sampling: dict, seed: int | None, has_image: bool) -> str:
    """Return the lines of the card's call of the pipeline, a line for each keyword."""
    lines = ""
    for name, value in sampling.items():
        lines += f"    {name}={value!r},\n"
    if seed is not None:
        lines += f'    generator=torch.Generator("cuda").manual_seed({seed}),\n'
    if KIND == "image-to-video":
        name = "first_frame.png" if has_image else "your_image.png"
        lines += f'    image=load_image("{name}"),  # as wide and high as the video, or it is squeezed\n'
    return lines


def base_and_licence(base_model: str) -> tuple[str, dict]:
    """Return the name of the base model, on the Hub if it is in the Hub's cache, and the card's fields of its
    licence."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{Path(base_model).absolute()}/")
    if cached:
        base_model = f"{cached[1]}/{cached[2]}"
    elif Path(base_model).is_dir():
        return base_model, {"license": "other"}
    if "cogvideox-2b" in base_model.lower():
        return base_model, {"license": "apache-2.0"}
    if "cogvideox" in base_model.lower():
        link = "https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE"
        return base_model, {"license": "other", "license_name": "cogvideox", "license_link": link}
    return base_model, {"license": "other"}


def check_hub_access(args: Namespace) -> str | None:
    """Return the repository that --push_to_hub will upload to, which is made now if it does not exist. Raises RunError
    where the upload could not be made, or would make public what is to be private."""
    if not args.push_to_hub:
        return None
    api = HfApi(token=args.hub_token)
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    advice = "\n(`hf auth login`, or --hub_token with a token that may write there)"
    with explain(f"--push_to_hub: {repo_id} cannot be written on the Hub", advice=advice):
        repo_id = api.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        is_private = api.model_info(repo_id).private
    if args.hub_private_repo and not is_private:
        raise RunError(f"--hub_private_repo: {repo_id} exists and is public; its settings on the Hub can change that")
    logger.info(f"Hub: {repo_id} ({'private' if is_private else 'public'}) is written at the end")
    return repo_id


# ---- Processes ------------------------------------------------------------------------------------------------------


def command_line() -> None:
    """Run as a script: a problem with a name ends in one message a machine, and its exit code."""
    # Python runs no `finally` at these signals of its own accord. As an exit, they end child processes, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    set_up_logging()
    args = ARGS or get_args()
    try:
        with logging_redirect_tqdm():
            main(args)
    except (Exception, KeyboardInterrupt) as error:
        problem = named_problem(error, args)
        if problem is not None:
            end_with(problem)
        logger.propagate = False  # into the log file alone: Python prints it
        logger.exception("an error that nobody foresaw")
        raise
    sys.exit(0)


def named_problem(error: BaseException, args: Namespace) -> RunError | None:
    """Return what to tell the user of an error, or None for an error that nobody foresaw."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return RunError(f"interrupted; what is encoded is kept. {RESUME_HINT}", 128 + signal.SIGINT)
    text = str(error).split("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        flags = []
        for name, value in memory_flags(args):
            flags.append(f"--{name}" if value is True else f"--{name} {value}")
        text = f"the device has too little memory: {text} What helps, the cheapest first: {', '.join(flags)}."
        return RunError(f"{text} tools/plan.py tells what a run needs.", exit_code=6)
    # torch has no common kind for a lost connection: NCCL raises a DistError, gloo a RuntimeError with its name.
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        lines = [f"{OTHER_LOST}, or did not start ({text}). {RESUME_HINT}", *last_errors(Path(args.output_dir))]
        return RunError("\n".join(lines), exit_code=5)
    return None


def end_with(problem: RunError) -> None:
    """End this process with the exit code of a problem, which is logged, and printed once a machine."""
    # A problem that is not shared is known to no other process.
    is_own = dist.is_initialized() and not problem.is_shared
    if is_first_process() or is_own:
        logger.propagate = False  # into the log file alone
        # A signal to stop is no error.
        logger.log(logging.INFO if problem.exit_code > 128 else logging.ERROR, problem)
    if is_own or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = f"rank {dist.get_rank()}: " if is_own else ""
        kind = "" if problem.exit_code > 128 else "error: "
        print(f"{Path(sys.argv[0]).name}: {rank}{kind}{problem}", file=sys.stderr, flush=True)
    if is_own:
        # At a usual exit the process group would wait for the other processes.
        os._exit(problem.exit_code)
    sys.exit(problem.exit_code)


def get_accelerator(args: Namespace) -> tuple[Accelerator, str]:
    """Set up accelerate by the flags and by its own configuration. Return it, and the name of its engine: "replicated"
    where each process has all that trains. Raises RunError for an engine that is gone, or settings that do not fit."""
    gone = "which is gone: take accelerate_configs/multi_gpu.yaml with --offload_base"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise RunError(f"accelerate's configuration asks for FSDP, {gone}")
    folders = ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir))
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=args.nccl_timeout))
    # As a view, gradients take their memory once. The buffers are positions, up to 68 MB and equal in all processes.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    # The base computes in its own dtype, as in the pipeline, so autocast has nothing to do.
    autocast = AutocastKwargs(enabled=False)
    with explain("accelerate's configuration and these flags do not fit", (ValueError, ImportError)):
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision,
            log_with=args.report_to, project_config=folders, kwargs_handlers=[timeout, ddp, autocast],
            step_scheduler_with_optimizer=False,  # accelerate would step the schedule once a process
        )
    if accelerator.mixed_precision not in DTYPES:
        raise RunError(f"accelerate's configuration says {accelerator.mixed_precision}: give --mixed_precision")
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RunError("the launcher has started several processes, but each is alone: torch sees no GPU (nvidia-smi)")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        backend = f"the dynamo backend {accelerator.state.dynamo_plugin.backend.value.lower()}"
        raise RunError(f"accelerate's configuration asks for {backend}: leave it out, and give --compile")
    steps = accelerator.gradient_accumulation_steps
    if steps != args.gradient_accumulation_steps:
        raise RunError(f"accelerate's configuration says {steps}: give the same --gradient_accumulation_steps")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator, "replicated"
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise RunError(f"accelerate's configuration asks for DeepSpeed ZeRO-3, {gone}")
    if args.quantize_base or args.compile or args.offload_base:
        raise RunError("--quantize_base, --compile and --offload_base do not work with DeepSpeed")
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    # accelerate leaves clipping to DeepSpeed.
    config["gradient_clipping"] = args.max_grad_norm
    # The optimizer is the one of --optimizer, also where its states are offloaded to the host.
    config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed computes with a copy of the LoRA in the compute dtype; it learns and sums gradients in fp32.
    config["communication_data_type"] = "fp32"
    optimizer = config.get("optimizer", {}).get("params", {})
    for name, value in (("betas", [args.adam_beta1, args.adam_beta2]), ("eps", args.adam_epsilon)):
        if optimizer.get(name) == "auto":  # accelerate fills in lr and weight_decay alone
            optimizer[name] = value
    config["data_types"] = config.get("data_types", {}) | {"grad_accum_dtype": "fp32"}
    return accelerator, f"deepspeed zero{plugin.zero_stage}"


def log_device(accelerator: Accelerator) -> None:
    """Log what computes: the device, its memory, the compute dtype and the kernel that torch takes for attention. Warn
    of a CPU that nobody asked for."""
    device = accelerator.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        num_bytes = properties.total_memory
    else:
        name = device.type.upper()
        num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # torch does not say which kernel it will take, but the backward function of a result has the kernel's name.
    dtype = DTYPES[accelerator.mixed_precision]
    query = torch.zeros(1, 1, 128, 64, dtype=dtype, device=device, requires_grad=True)  # [B, heads, S, d]
    backward_name = F.scaled_dot_product_attention(query, query, query).grad_fn.name()
    match = re.match(r"ScaledDotProduct(\w+?)Attention", backward_name)
    kernel = match[1].lower() if match else "unfused"
    dtype_name = accelerator.mixed_precision.replace("no", "fp32")
    logger.info(f"Device: {name}, {num_bytes / 2**30:.1f} GiB, {dtype_name}, {kernel} attention")
    if device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only: install a CUDA build"
        logger.warning(
            "torch sees no GPU, so the training runs on the CPU, where a step of a published model takes an hour or "
            f"more. Check that `nvidia-smi` lists the GPU (the driver), that CUDA_VISIBLE_DEVICES does not hide it, "
            f"and that torch is built for it (torch {torch.__version__} is built for {build}). If the CPU is what "
            "you want, set ACCELERATE_USE_CPU=true, or give --cpu to accelerate launch."
        )


def gather(value=None) -> list:
    """Wait for all processes, and return the `value` of each, by rank. If one of them is a RunError, all processes
    raise it."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=waiting_group())
    for gathered in values:
        if isinstance(gathered, RunError):
            gathered.is_shared = True
            raise gathered
    return values


@contextlib.contextmanager
def shared_work() -> Iterator[None]:
    """Have each process do its share of some work. It ends when all have done theirs, or with the RunError of one."""
    problem = None
    try:
        yield
    except RunError as error:
        problem = error
    gather(problem)


def in_first(action: Callable, *arguments):
    """Call `action` in the first process alone, and return its result in all. They all raise a RunError of it."""
    value = None
    with shared_work():
        if is_first_process():
            value = action(*arguments)
    return gather(value)[0]


@functools.cache
def waiting_group() -> dist.ProcessGroup:
    """Return the group in which processes wait while others encode or sample, which may take hours: a collective of
    the default group gives up after --nccl_timeout seconds. A lost process is noticed at once."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def is_first_process() -> bool:
    """Return whether this is the first process of the run: known before accelerate is set up."""
    return os.environ.get("RANK", "0") == "0"


class StopSignal:
    """Note STOP_SIGNALS while it is installed: the loop finishes its step and writes a checkpoint. A second
    signal ends the process. Within a second it counts as the first one, which launchers pass on."""

    def __init__(self, run: Run):
        self.run = run
        self.number = 0  # of the first signal
        self.noted_at = 0.0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        handlers = {}
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                handlers[number] = signal.signal(number, self.note)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        if not self.number:
            self.number = number
            self.noted_at = time.monotonic()
            # In a thread of its own: the signal may have interrupted a line of the log that is being written.
            threading.Thread(target=self.announce).start()
        elif time.monotonic() - self.noted_at > 1:
            os._exit(128 + number)

    def announce(self) -> None:
        """Log what happens after the first signal, and what a second one does."""
        name = signal.Signals(self.number).name
        again = "a second one ends the run at once"
        if self.number == signal.SIGINT:
            name = "Ctrl-C"
            again = "press again to stop now"
        run = self.run
        if run.step < run.max_train_steps:
            duration = f" (a step takes {run.step_seconds:.0f} s)" if run.step_seconds >= 1 else ""
            logger.info(f"{name}: finishing step {run.step + 1}, then saving{duration}; {again}")
        else:
            logger.info(f"{name}: the training is complete; the last samples are left out; {again}")

    def end_sampling(self, _pipe: PIPELINE, _step: int, _timestep, tensors: dict) -> dict:
        """End a sample after a signal: the pipeline calls this after each denoising step. Raises InterruptedError."""
        if self.number:
            raise InterruptedError("a signal asks the run to stop")
        return tensors


@contextlib.contextmanager
def stage(args: Namespace, name: str, step: int = 0) -> Iterator[None]:
    """Note the duration of a part of the run in stages.jsonl."""
    started = time.perf_counter()
    try:
        yield
    finally:
        row = {"step": step, "stage": name, "seconds": round(time.perf_counter() - started, 3)}
        if is_first_process():
            write_row(Path(args.output_dir, "stages.jsonl"), row)


@contextlib.contextmanager
def recorded(args: Namespace, lock: int) -> Iterator[dict]:
    """Keep in state.json whether the run is going, finished, stopped by a signal or failed, and why. Yield a dict for
    what it says at the end: the last `step`, and the `lora_step` of the finished LoRA. Then other runs may write:
    `lock` is released."""
    end = {}
    if is_first_process():
        write_state(args, {"state": "going"})
    try:
        yield end
    except BaseException as error:
        problem = named_problem(error, args)
        is_stopped = isinstance(error, SystemExit) or (problem is not None and problem.exit_code > 128)
        if is_first_process() or problem is None or not problem.is_shared:
            message = str(problem or f"{type(error).__name__}: {error}")
            write_state(args, {"state": "stopped" if is_stopped else "failed", "message": message})
        raise
    else:
        if is_first_process():
            write_state(args, {"state": "finished"} | end)
    finally:
        if is_first_process():
            os.close(lock)


def write_state(args: Namespace, content: dict) -> None:
    """Write state.json."""
    with attempt("Writing state.json"):
        write_whole(Path(args.output_dir, "state.json"), json.dumps(content, indent=1))


@contextlib.contextmanager
def closing(accelerator: Accelerator) -> Iterator[None]:
    """Close the trackers at the end, and the process group after a run without errors."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            with attempt(f"Closing {tracker.name}"):
                tracker.finish()
    accelerator.state.destroy_process_group()


def write_row(path: Path, row: dict) -> None:
    """Add a line of JSON, with the peak of device memory in bytes since the last such line (on the CPU: of host memory
    in all)."""
    written = {}
    for name, value in row.items():
        is_number = not isinstance(value, float) or math.isfinite(value)
        # JSON has no NaN and no Infinity, and every reader takes null.
        written[name] = value if is_number else None
    if torch.cuda.is_available():
        written["memory"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        written["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with attempt(f"Writing {path.name}"), path.open("a") as file:
        file.write(f"{json.dumps(written)}\n")


def progress_bar(**keywords) -> tqdm:
    """Return the progress of the first process: a bar on a terminal, and lines of the log."""
    if not is_first_process():
        return tqdm(disable=True, **keywords)
    if sys.stderr.isatty():
        return ProgressLog(**keywords)
    return ProgressLog(file=io.StringIO(), mininterval=0, miniters=1, smoothing=0, **keywords)


class ProgressLog(tqdm):
    """A progress bar that logs a line at the first and the last item, and every 10 seconds between. On a terminal the
    bar is shown, and the lines are in the log file alone."""

    line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} remaining, {rate_fmt}{postfix}"
    logged = 0  # items at the last line
    logged_at = -math.inf

    def display(self, *arguments, **keywords) -> None:
        is_on_terminal = sys.stderr.isatty()
        if is_on_terminal:
            super().display(*arguments, **keywords)
        is_due = self.n == self.total or time.monotonic() >= self.logged_at + 10
        if self.n > max(self.initial, self.logged) and is_due:
            self.logged = self.n
            self.logged_at = time.monotonic()
            whole_line = {"bar_format": self.line, "ncols": None}  # also where the terminal is narrower
            text = self.format_meter(**{**self.format_dict, **whole_line})
            record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, text, None, None)
            # The log file is a handler of this logger, the terminal one of the logger above it.
            for handler in logger.handlers if is_on_terminal else [logger]:
                handler.handle(record)


def set_up_logging() -> None:
    """Set up one log, of the first process and of the others' errors; of the libraries, what a user can act on. Its
    lines are kept for the log file, which does not exist yet."""
    # tqdm's own lock is a semaphore that forked processes share: a decoding process that is killed could keep it.
    tqdm.set_lock(threading.RLock())
    level = logging.WARNING if is_first_process() else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=level)
    logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    logger.addHandler(logging.handlers.MemoryHandler(capacity=10_000, flushLevel=sys.maxsize))
    if not (is_first_process() and sys.stderr.isatty()):
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.disable_progress_bar()
        disable_progress_bars()  # the Hub's


def log_to_file(output_dir: Path) -> None:
    """Write the log of this process to a file of its own, too, from its first line on. The files of processes after
    the first appear with their first error. Raises RunError."""
    rank = int(os.environ.get("RANK", 0))
    with explain("--output_dir cannot be written", OSError):
        log_file = logging.FileHandler(output_dir / log_file_name(rank), delay=rank > 0)
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in logger.handlers:
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(log_file)
            handler.close()  # hands over its lines
    logger.handlers = [log_file]


def log_file_name(rank: int) -> str:
    """Return the name of a process's log in the output folder. Processes after the first log errors only."""
    return f"train.rank{rank}.log" if rank else "train.log"


def last_errors(output_dir: Path) -> list[str]:
    """Return the errors of this run that the logs of other processes end with, each with its rank. Those of processes
    that have only noticed the end of another one tell nothing."""
    found = []
    for rank in range(int(os.environ.get("WORLD_SIZE", 1))):
        if rank == int(os.environ.get("RANK", 0)):
            continue
        path = output_dir / log_file_name(rank)
        # There may be no such log, or no such folder.
        with contextlib.suppress(OSError):
            is_of_this_run = path.stat().st_mtime >= (output_dir / ".lock").stat().st_mtime
            # A message may have several lines, so a record ends where a line begins with a time.
            time_at_start = r"^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} )"
            records = re.split(time_at_start, path.read_text().strip(), flags=re.MULTILINE)
            _, is_error, message = records[-1].partition(" ERROR ")
            if is_of_this_run and is_error and not message.startswith(OTHER_LOST):
                found.append(f"rank {rank} ended: {message} ({path})")
    return found


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    """Do what the training does not depend on. A failure is logged, once if it repeats, and the run continues."""
    try:
        yield
    except InterruptedError as error:  # of `end_sampling`, and no failure
        logger.info(f"{what} ends: {error}")
    except Exception as error:  # trackers, full disks and networks raise many kinds
        log_error_once(f"{what} failed; training does not depend on it: {type(error).__name__}: {error}")


log_error_once = functools.cache(logger.error)
log_warning_once = functools.cache(logger.warning)


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk itself: a power cut can empty what is in memory. Some file
    systems (FUSE, network) cannot do that for a folder."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:
            raise


def partial_name(path: Path) -> Path:
    """Return the name that a file or folder has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a complete file to its final name, with the access rights of any new file: safetensors gives its files
    to their owner alone (safetensors issue 782)."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):  # file systems without access rights refuse it
        partial.chmod(0o666 & ~umask)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


if __name__ == "__main__":
    command_line()
