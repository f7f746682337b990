"""Train a LoRA of the CogVideoX image-to-video transformer on your own clips.

One GPU (settings as published; a clip's own first frame is the image that it is trained to go on from):

    accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml \\
        train_cogvideox_image_to_video_lora.py \\
        --pretrained_model_name_or_path THUDM/CogVideoX-5b-I2V --mixed_precision bf16 \\
        --instance_data_root my_clips --caption_column prompts.txt --video_column videos.txt \\
        --rank 64 --lora_alpha 64 --learning_rate 1e-3 --train_batch_size 1 --num_train_epochs 30 \\
        --gradient_checkpointing --enable_slicing --enable_tiling --seed 42 --output_dir my_lora

Eight GPUs: the same with --config_file accelerate_configs/multi_gpu.yaml --num_processes 8; see scripts/ for several
machines. Tiny, on a CPU: `make demo KIND=i2v`.

The objective, in seven lines (x0: latents of a clip, e: prompt embeddings, alpha_bar: the scheduler's noise levels):

    t       ~ U{0..T-1},  noise ~ N(0, I)                            one of each per clip and step
    x_t     = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise      scheduler.add_noise
    image   = latents of (first frame + a little noise), then zeros   f frames; all zeros with --noised_image_dropout
    v       = transformer([x_t, image], e, t)                         velocity, in the compute dtype
    x0_pred = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v         scheduler.get_velocity
    loss    = mean((x0_pred - x0)^2 / (1 - alpha_bar_t))              in fp32; it equals plain MSE on the velocity
    only the LoRA matrices beside to_q, to_k, to_v, to_out.0 learn; everything else is frozen

Dimension key:  B batch · F pixel frames, 4k+1 · f latent frames = (F-1)/4+1 · C channels ·
H, W pixels · h, w = H/8, W/8 · S text tokens · D text width

Sections: Command line · Data · Processes · Precompute · Batches · Model · Objective · Optimizer · Checkpoints ·
Validation and publishing · Training
"""

# Packages, as `uv run` installs them by itself; requirements.txt says what each is for.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11.0", "torchvision>=0.26.0", "diffusers>=0.40.0", "transformers>=5.5.0", "accelerate>=1.13.0",
#     "peft>=0.19.0", "huggingface_hub>=1.23.0", "safetensors>=0.8.0", "numpy>=2.1.3", "pillow>=11.3.0",
#     "tqdm>=4.67.1", "decord>=0.6.0", "sentencepiece>=0.2.1", "protobuf>=6.33.0", "imageio>=2.37.0",
#     "imageio-ffmpeg>=0.6.0", "datasets>=4.8.0", "bitsandbytes>=0.50.0", "prodigyopt>=1.1.2", "tensorboard>=2.20.0",
#     "wandb>=0.25.0",
# ]
# ///

import argparse
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

# It says, when it is imported, that a kernel for 4-bit models on CPUs is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import decord
import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    compare_versions,
    load_fsdp_optimizer,
    save_fsdp_optimizer,
    set_seed,
)
from accelerate.utils.memory import clear_device_cache
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,  # I2V:
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.optimization import get_scheduler
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.training_utils import cast_training_params
from diffusers.utils import export_to_video, load_image  # I2V: load_image
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id
from peft import LoraConfig
from PIL import Image, ImageDraw, ImageFont, ImageOps  # I2V: ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import InterpolationMode, resize
from tqdm.auto import tqdm
from transformers import T5EncoderModel, T5Tokenizer

logger = logging.getLogger(__name__)

KIND = "image-to-video"  # I2V:
PIPELINE = CogVideoXImageToVideoPipeline  # I2V:
DEFAULT_OUTPUT_DIR = "cogvideox-i2v-lora"  # I2V:
IMAGE_LOG_SIGMA = (-3.0, 0.5)  # I2V: mean and deviation of the log of the noise level that a first frame gets
KINDS = {1: "text-to-video", 2: "image-to-video"}  # by the latents on the input channels: noisy ones, an image's
TRAINERS = {"text-to-video": "train_cogvideox_lora.py", "image-to-video": "train_cogvideox_image_to_video_lora.py"}
LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
LORA_FILE = "pytorch_lora_weights.safetensors"
CACHE_FORMAT = 1  # raise it when the content of a precomputed file changes for the same key
CHECKPOINT_NEEDS = {"rank", "lora_targets", "optimizer", "use_8bit_adam", "engine"}  # of others a run cannot go on
CHECKPOINT_CHANGES = {  # with others it can, but is another run
    "lora_alpha": "the LoRA is applied at another strength than it has learned at",
    "learning_rate": "the checkpoint's stays",
    "lr_scheduler": "the rates to come are other ones",
    "mixed_precision": "the base computes in another dtype",
    "gradient_accumulation_steps": "a step learns from another number of clips",
    "num_clips": "some clips of this epoch may come twice or not at all",
    **dict.fromkeys(["train_batch_size", "num_processes"], "the place in the epoch is kept, as nearly as it can be"),
    **dict.fromkeys(["height", "width", "max_num_frames"], "the clips have another size or length"),
}
OPTIONAL = {  # packages that single flags need, and the lowest version of each
    "bitsandbytes": "0.50.0", "prodigyopt": "1.1.2", "datasets": "4.8.0", "tensorboard": "2.20.0", "wandb": "0.25.0",
    "comet_ml": "3.58.8", "deepspeed": "0.19.0",
}  # fmt: skip
CARD_FLAGS = (  # those that the model card tells
    "rank lora_alpha learning_rate optimizer use_8bit_adam lr_scheduler lr_warmup_steps train_batch_size "
    "gradient_accumulation_steps height width max_num_frames fps frame_sampling video_reshape_mode random_flip seed"
).split()
LICENSES = {  # of the base models, by their names; a LoRA is under its base's
    "cogvideox-2b": {"license": "apache-2.0"},
    **dict.fromkeys(
        ["cogvideox-5b", "cogvideox-5b-i2v"],
        {
            "license": "other", "license_name": "cogvideox",
            "license_link": "https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE",
        },
    ),
}  # fmt: skip
UPLOAD_WAITS = (0, 5, 30)  # seconds before each try of the upload
DECODE_SECONDS = 60  # after which a clip counts as one that cannot be decoded
SHARED_SECONDS = 90  # by which a file that another machine wrote is here; network folders may be slow
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class RunError(Exception):
    """Ends the run in one message. Exit code 1: the LoRA cannot be written, 2: wrong input, 3: loss or weights that
    are not finite, 4: failed upload, 5: another process is gone, 128 + n: stopped by signal n."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def listing(items: list[str], limit: int = 20) -> str:
    """`items` one below the other, the tail counted instead of shown."""
    shown = [f"  - {item}" for item in items[:limit]]
    return "\n".join(shown + ([f"  … and {len(items) - limit} more"] if len(items) > limit else []))


@functools.cache
def warn_once(message: str) -> None:
    logger.error(message)  # error, and not warning: the processes other than the first one say nothing less


def attempt(what: str, action: Callable, *arguments, **keywords) -> bool:
    """Do what the training does not depend on: a failure is logged, once if it repeats, and the run goes on."""
    try:
        action(*arguments, **keywords)
    except Exception as error:  # whatever a tracker, a full disk or a lost network may raise
        warn_once(f"{what} failed, the run goes on: {type(error).__name__}: {error}")
        return False
    return True


# ---- Command line ---------------------------------------------------------------------------------------------------


class OneLineErrorParser(argparse.ArgumentParser):
    """Ends a wrong command line in its one message; argparse would print the usage of all flags before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def add_model_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or local folder of a CogVideoX")
    add("--revision", help="Hub revision of the model")
    add("--variant", help="weight file variant, such as fp16")
    add("--cache_dir", help="where downloaded models and data sets are kept")
    add("--rank", type=int, default=128, help="LoRA rank")
    add("--lora_alpha", type=float, default=128, help="the LoRA is applied with strength alpha / rank")
    add("--mixed_precision", choices=list(DTYPES), help="compute dtype; default: what accelerate's configuration says")
    add("--enable_slicing", action="store_true", help="VAE slicing: a batch is coded one video at a time")
    add("--enable_tiling", action="store_true", help="VAE tiling: large frames in overlapping tiles, less memory")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: far less memory, slower")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")


def add_data_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="Hub data set, local folder, or .csv/.json/.jsonl/.parquet file")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add("--instance_data_root", help="folder of the clips and of the two line files")
    add("--video_column", default="video", help="column of the videos, or the line file of their paths")
    add("--caption_column", default="text", help="column of the captions, or the line file of them")
    add("--id_token", help="trigger word put before every training prompt")
    add("--height", type=int, default=480, help="pixels, a multiple of 16")
    add("--width", type=int, default=720, help="pixels, a multiple of 16")
    modes = ["center", "random", "none", "stretch"]
    add("--video_reshape_mode", choices=modes, default="center", help="where to crop (none: as random), or stretch")
    add("--fps", type=int, default=8, help="rate of --frame_sampling fps and of written videos")
    add("--max_num_frames", type=int, default=49, help="frames taken from a clip at most, 4k+1")
    add("--skip_frames_start", type=int, default=0, help="frames left out at the start of each clip")
    add("--skip_frames_end", type=int, default=0, help="frames left out at the end of each clip")
    samplings = ["stride", "uniform", "fps"]
    add("--frame_sampling", choices=samplings, default="stride", help="which frames of a long clip are taken")
    add("--random_flip", action="store_true", help="horizontal flips: each clip is encoded both ways")
    add("--dataloader_num_workers", type=int, default=0, help="processes that decode and read; 0: one that decodes")
    add("--skip_bad_videos", action="store_true", help="train without the clips that cannot be decoded")
    add("--precompute_dir", help="default: .cogvideox_precomputed in --instance_data_root, else in --output_dir")


def add_validation_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", help="one or more prompts, joined by the separator")
    add("--validation_prompt_separator", default=":::")
    add("--num_validation_videos", type=int, default=1, help="videos a prompt")
    add("--validation_epochs", type=int, default=50, help="validate every N epochs")
    add("--validation_steps", type=int, help="validate every N steps instead")
    add("--num_inference_steps", type=int, default=50, help="denoising steps of a validation video")
    add("--guidance_scale", type=float, default=6)
    add("--use_dynamic_cfg", action="store_true", help="the pipeline's cosine guidance schedule")


def add_image_args(parser: argparse.ArgumentParser) -> None:  # I2V:
    add = parser.add_argument_group("image").add_argument
    add("--validation_images", help="a start image (path or URL) for each validation prompt, joined by the separator")
    add("--noised_image_dropout", type=float, default=0.05, help="probability of training a clip without its image")


def add_training_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, help="makes the run repeatable")
    add("--train_batch_size", type=int, default=4, help="clips a process and micro-batch")
    add("--num_train_epochs", type=int, default=1)
    add("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches an optimizer step")
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="how many checkpoints to keep; default: all")
    add("--resume_from_checkpoint", help='"latest", or a checkpoint')
    add("--nccl_timeout", type=int, default=600, help="seconds without a word after which a process counts as gone")


def add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", type=str.lower, choices=["adam", "adamw", "prodigy"], default="adam")
    add("--use_8bit_adam", action="store_true", help="8-bit states of bitsandbytes, for adam and adamw")
    add("--learning_rate", type=float, default=1e-4, help="1 for prodigy, which finds its own scale")
    add("--scale_lr", action="store_true", help="learning rate times accumulation, batch size and processes")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="constant")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps")
    add("--lr_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="exponent of polynomial")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.95)
    add("--adam_weight_decay", type=float, default=1e-4)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--prodigy_beta3", type=float, help="default: square root of beta2")
    add("--prodigy_decouple", action="store_true", help="weight decay decoupled, as in AdamW")
    add("--prodigy_use_bias_correction", action="store_true")
    add("--prodigy_safeguard_warmup", action="store_true")


def add_output_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default=DEFAULT_OUTPUT_DIR)
    add("--logging_dir", default="logs", help="for the trackers' files, under the output dir")
    add("--report_to", choices=["tensorboard", "wandb", "comet_ml", "all"], help="default: no tracker")
    add("--tracker_name", help=f"project name at the tracker; default: {DEFAULT_OUTPUT_DIR}")
    add("--push_to_hub", action="store_true", help="upload the LoRA, its card and sample videos at the end")
    add("--hub_model_id", help="repository; default: name of the output dir")
    add("--hub_private_repo", action="store_true", help="make it private, if it does not exist yet")
    add("--hub_token", help="token for it; default: the one of `hf auth login`")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse `argv`, or the process's command line. A wrong one ends in one message and exit code 2.

    The token is blanked in `sys.argv`, which trackers record as part of a run's metadata.
    """
    parser = OneLineErrorParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = (add_model_args, add_data_args, add_validation_args, add_training_args, add_optimizer_args)
    for add_group in (*groups, add_output_args):
        add_group(parser)
    add_image_args(parser)  # I2V:
    args = parser.parse_args(argv)
    if argv is None and args.hub_token:
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    return args


def check_numbers(args: argparse.Namespace) -> list[str]:
    """Problems with single numbers, each naming its flag."""
    at_least = {
        0: "skip_frames_start skip_frames_end dataloader_num_workers lr_warmup_steps adam_weight_decay guidance_scale",
        1: "rank max_num_frames fps num_validation_videos validation_epochs validation_steps num_inference_steps "
        "train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps checkpointing_steps "
        "checkpoints_total_limit nccl_timeout lr_num_cycles",
    }
    problems = []
    for low, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value < math.inf:
                problems.append(f"--{name} must be {low} or more, not {value}")
    for name in ("lora_alpha", "learning_rate", "adam_epsilon", "max_grad_norm", "lr_power"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"--{name} must be more than 0, not {getattr(args, name)}")
    for name in ("adam_beta1", "adam_beta2", "prodigy_beta3"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            problems.append(f"--{name} must be at least 0 and less than 1, not {value}")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        problems.append(f"--seed must be from 0 to {2**31 - 1}, not {args.seed}")
    for name in ("height", "width"):
        value = getattr(args, name)
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            problems.append(f"--{name} must be a multiple of 16, not {value} (nearest: {nearest})")
    return problems


def check_packages(args: argparse.Namespace) -> list[str]:
    """Packages that the chosen flags need, and that are not installed or too old."""
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    needs = {
        "bitsandbytes": ("--use_8bit_adam", args.use_8bit_adam and args.optimizer != "prodigy"),
        "prodigyopt": ("--optimizer prodigy", args.optimizer == "prodigy"),
        "datasets": ("--dataset_name", args.dataset_name is not None),
        **{name: (f"--report_to {name}", args.report_to == name) for name in ("tensorboard", "wandb", "comet_ml")},
        "deepspeed": ("accelerate's configuration", uses_deepspeed),
    }
    problems = []
    for package, (flag, is_needed) in needs.items():
        if not is_needed:
            continue
        there = importlib.metadata.version(package) if importlib.util.find_spec(package) else "not installed"
        if there == "not installed" or compare_versions(package, "<", OPTIONAL[package]):
            wanted = f"{package}>={OPTIONAL[package]}"
            problems.append(f"{flag} needs {wanted}, which is {there}: pip install '{wanted}'")
    return problems


def check_writable(flag: str, folder: Path) -> list[str]:
    """A problem if `folder` cannot be made or written; nothing is created here."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return [f"{flag}: {existing} is a file, not a folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{flag}: {existing} cannot be written"]
    return []


def check_args(args: argparse.Namespace) -> None:
    """All that the flags alone can tell. Raises RunError with every problem found."""
    problems = check_numbers(args) + check_packages(args) + check_writable("--output_dir", Path(args.output_dir))
    if args.dataset_name is None and args.instance_data_root is None:
        problems.append("no data: give --instance_data_root (a folder with two line files) or --dataset_name")
    elif args.instance_data_root is not None and not Path(args.instance_data_root).is_dir():
        problems.append(f"--instance_data_root: there is no folder {args.instance_data_root}")
    elif not problems:
        problems += check_writable("--precompute_dir", precompute_folder(args))
    if not args.validation_prompt_separator:
        problems.append("--validation_prompt_separator must not be empty")
    else:  # I2V: the images are split at it, too
        problems += check_images(args)  # I2V:
    if problems:
        raise RunError("these flags cannot work:\n" + listing(problems))


@functools.cache
def open_image(path: str) -> Image.Image:  # I2V:
    """The image at a path or URL, in RGB. It is kept: what was opened at the start is what is sampled from later."""
    return load_image(path)


def validation_images(args: argparse.Namespace) -> list[str]:  # I2V:
    """--validation_images, taken apart."""
    return args.validation_images.split(args.validation_prompt_separator) if args.validation_images else []


def start_image(args: argparse.Namespace, index: int) -> Image.Image:  # I2V:
    """Image `index` of --validation_images at H x W, its aspect kept as a clip's is; the pipeline would squeeze it."""
    image = open_image(validation_images(args)[index])
    if args.video_reshape_mode == "stretch":
        return image
    return ImageOps.fit(image, (args.width, args.height), Image.Resampling.BICUBIC)


def check_images(args: argparse.Namespace) -> list[str]:  # I2V:
    """Problems with the flags about images. Each image is opened here, long before it is needed."""
    problems = []
    if not 0 <= args.noised_image_dropout <= 1:
        problems.append(f"--noised_image_dropout must be from 0 to 1, not {args.noised_image_dropout}")
    prompts, images = len(validation_prompts(args)), validation_images(args)
    if prompts != len(images):
        counts = f"{prompts} in --validation_prompt, {len(images)} in --validation_images"
        problems.append(f"every validation prompt needs its start image: there are {counts}")
    for path in images:
        try:
            open_image(path)
        except Exception as error:  # PIL, the file system and the web each have their own
            problems.append(f"--validation_images: {path} cannot be opened: {error}")
    return problems


def precompute_folder(args: argparse.Namespace) -> Path:
    """Where encoded prompts and videos are kept between runs."""
    if args.precompute_dir is not None:
        return Path(args.precompute_dir)
    return Path(args.instance_data_root or args.output_dir) / ".cogvideox_precomputed"


def validation_prompts(args: argparse.Namespace) -> list[str]:
    """--validation_prompt, taken apart."""
    return args.validation_prompt.split(args.validation_prompt_separator) if args.validation_prompt else []


# ---- Data -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VideoRecord:
    """One training clip: its caption as written, the path of its file, and, for a video that is stored inside a
    data set's own files, the function that reads its bytes."""

    caption: str
    path: str
    read_bytes: Callable[[], bytes] | None = None


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """All that decides the pixels made of a clip. Sizes in pixels, counts in frames."""

    height: int
    width: int
    video_reshape_mode: str
    max_num_frames: int
    skip_frames_start: int
    skip_frames_end: int
    frame_sampling: str
    fps: int
    seed: int | None

    def content_key(self) -> dict:
        """The settings without those that change nothing, so that changing them encodes nothing anew."""
        key = dataclasses.asdict(self)
        if self.frame_sampling != "fps":
            del key["fps"]
        if self.video_reshape_mode not in ("random", "none"):
            del key["seed"]
        return key


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped, without the blank ones at its end.

    Raises RunError for a file that is missing or not UTF-8, and for a blank line in the middle: to leave it out would
    shift every later line against the other file's.
    """
    try:
        # Only "\n" ends a line: str.splitlines would also cut at form feeds and Unicode separators within a caption.
        lines = [line.strip() for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    blank = [str(number) for number, line in enumerate(lines, start=1) if not line]
    if blank:
        raise RunError(f"{path} has blank lines in the middle (line {', '.join(blank[:20])}): fill or remove them")
    return lines


def read_line_files(root: Path, caption_column: str, video_column: str) -> list[VideoRecord]:
    """Pair line i of the caption file with line i of the file of video paths (relative to `root`)."""
    captions, videos = read_lines(root / caption_column), read_lines(root / video_column)
    if len(captions) != len(videos):
        lines = f"{root / caption_column} has {len(captions)} lines, {root / video_column} has {len(videos)}"
        raise RunError(f"captions and videos don't pair up: {lines}")
    return [VideoRecord(caption, str(root / video)) for caption, video in zip(captions, videos, strict=True)]


def read_embedded_video(rows, column: str, index: int) -> bytes:
    """A video file that is stored in row `index` of a `datasets.Dataset`, read when it is wanted."""
    return rows[index][column]["bytes"]


def read_table(dataset_name: str, config_name: str | None, cache_dir: str | None):
    """The `train` split of a Hub data set, of a local folder, or a local table file, as a `datasets.Dataset`."""
    import datasets

    formats = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    file_format = formats.get(Path(dataset_name).suffix.lower())
    try:
        if file_format and Path(dataset_name).is_file():
            return datasets.load_dataset(file_format, data_files=dataset_name, split="train", cache_dir=cache_dir)
        return datasets.load_dataset(dataset_name, config_name, split="train", cache_dir=cache_dir)
    except Exception as error:  # datasets, pyarrow and the Hub client raise dozens of kinds
        raise RunError(f"--dataset_name {dataset_name} cannot be read: {error}") from error


def read_dataset(
    dataset_name: str, config_name: str | None, root: Path | None, caption_column: str, video_column: str,
    cache_dir: str | None,
) -> list[VideoRecord]:
    """Records of a table with a column of captions and one of videos (paths, or a `datasets.Video`).

    Relative paths are under `root`, else beside the table.
    """
    import datasets

    table = read_table(dataset_name, config_name, cache_dir)
    for flag, column in (("--caption_column", caption_column), ("--video_column", video_column)):
        if column not in table.column_names:
            raise RunError(f"{flag}: {dataset_name} has no column {column!r}, only {', '.join(table.column_names)}")
    if isinstance(table.features[video_column], datasets.Video):
        table = table.cast_column(video_column, datasets.Video(decode=False))
    if root is None and Path(dataset_name).exists():
        root = Path(dataset_name) if Path(dataset_name).is_dir() else Path(dataset_name).parent

    captions = table[caption_column]
    blank = [str(row) for row, caption in enumerate(captions) if not str(caption or "").strip()]
    if blank:
        raise RunError(f"--caption_column: {dataset_name} has no caption in row {', '.join(blank[:20])}")
    records = []
    for row, (caption, video) in enumerate(zip(captions, table[video_column], strict=True)):
        video = video if isinstance(video, dict) else {"path": str(video)}
        if video.get("bytes") is None:
            path, read = str(Path(root or "") / video["path"]), None
        else:
            path = f"row {row} of {dataset_name} ({video['path']})"
            read = functools.partial(read_embedded_video, table, video_column, row)
        records.append(VideoRecord(str(caption).strip(), path, read))
    return records


def read_records(
    instance_data_root: str | None, dataset_name: str | None, dataset_config_name: str | None, caption_column: str,
    video_column: str, cache_dir: str | None,
) -> list[VideoRecord]:
    """Captions and videos in the given order. Raises RunError that lists all missing files; nothing is decoded."""
    root = Path(instance_data_root) if instance_data_root is not None else None
    if dataset_name is not None:
        records = read_dataset(dataset_name, dataset_config_name, root, caption_column, video_column, cache_dir)
    elif root is not None:
        records = read_line_files(root, caption_column, video_column)
    else:
        raise RunError("no data: give --instance_data_root (a folder with two line files) or --dataset_name")
    if not records:
        raise RunError(f"no clips in {dataset_name or instance_data_root}: its captions and videos are empty")
    missing = [r.path for r in records if r.read_bytes is None and not Path(r.path).is_file()]
    if missing:
        raise RunError(f"{len(missing)} of {len(records)} videos are missing:\n{listing(missing)}")
    return records


def frames_4k_plus_1(count: int) -> int:
    """The largest F = 4k+1 within `count` >= 1 frames: what the VAE makes whole latent frames of."""
    return (count - 1) // 4 * 4 + 1


def select_frames(
    num_frames: int, max_num_frames: int, skip_frames_start: int = 0, skip_frames_end: int = 0,
    frame_sampling: str = "stride", source_fps: float = 8.0, fps: float = 8.0,
) -> list[int]:
    """Which frames of a clip of `num_frames` are trained on: ascending indices, 4k+1 of them.

    stride: every n-th frame, n as large as leaves max_num_frames of them; uniform: spread evenly from the first to
    the last; fps: the clip brought to `fps` frames a second by its own rate, then the first max_num_frames.
    """
    first = min(skip_frames_start, num_frames - 1)
    end = max(num_frames - skip_frames_end, first + 1)  # all skipped: the first one alone
    available = end - first
    if frame_sampling == "uniform":
        count = frames_4k_plus_1(min(max_num_frames, available))
        return [first + round(i * (available - 1) / max(count - 1, 1)) for i in range(count)]
    if frame_sampling == "fps":
        seconds = available / source_fps
        count = min(max_num_frames, max(1, math.floor(seconds * fps + 1e-6)))  # 1e-6: 24 / 30 * 10 is 8, not 7.99…
        indices = [min(first + math.floor(i * source_fps / fps + 1e-6), end - 1) for i in range(count)]
    else:
        indices = list(range(first, end, max(1, available // max_num_frames)))[:max_num_frames]
    return indices[: frames_4k_plus_1(len(indices))]


def resize_and_crop(
    frames: torch.Tensor, height: int, width: int, mode: str, position: tuple[float, float] | None = None
) -> torch.Tensor:
    """Bring frames [F, C, H0, W0] in [-1, 1] to [F, C, H, W], bicubic with antialiasing.

    `stretch` ignores the aspect. Else the frame covers H x W with its aspect kept, and is cropped at `position`, the
    fractions of the surplus above and to the left, each in [0, 1); None is the center.
    """
    source_height, source_width = frames.shape[-2:]
    if mode == "stretch":
        size = [height, width]
    elif source_width * height > source_height * width:  # wider than the target
        size = [height, max(width, source_width * height // source_height)]
    else:
        size = [max(height, source_height * width // source_width), width]
    frames = resize(frames, size, InterpolationMode.BICUBIC, antialias=True)  # [F, C, >=H, >=W]
    surplus = (size[0] - height, size[1] - width)
    if position is None:
        top, left = surplus[0] // 2, surplus[1] // 2
    else:
        top, left = (int(part * (extra + 1)) for part, extra in zip(position, surplus, strict=True))
    # Bicubic overshoots at hard edges; the VAE has only seen [-1, 1].
    return frames[..., top : top + height, left : left + width].clamp(-1, 1)  # [F, C, H, W]


def load_video(record: VideoRecord, settings: Preprocessing) -> torch.Tensor:
    """Decode, select, resize and crop one clip: [F, C, H, W] float32 in [-1, 1], F = 4k+1.

    Raises whatever decord does for a file that it cannot decode, and ValueError for one without frames.
    """
    decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's warnings about odd but readable files
    reader = decord.VideoReader(io.BytesIO(record.read_bytes()) if record.read_bytes else record.path)
    if len(reader) == 0:
        raise ValueError("it has no frames")
    source_fps = reader.get_avg_fps()
    if settings.frame_sampling == "fps" and not 0 < source_fps < math.inf:
        raise ValueError(f"its frame rate is {source_fps}, --frame_sampling fps needs a real one")
    indices = select_frames(
        len(reader), settings.max_num_frames, settings.skip_frames_start, settings.skip_frames_end,
        settings.frame_sampling, source_fps, settings.fps,
    )
    position = None
    if settings.video_reshape_mode in ("random", "none"):
        # Drawn from seed and path, not from a stream: the crop stays when other clips come, go or change order.
        draw = random.Random(f"{settings.seed}:{record.path}")
        position = (draw.random(), draw.random())

    height, width, mode = settings.height, settings.width, settings.video_reshape_mode
    video = torch.empty(len(indices), 3, height, width)  # [F, C, H, W]
    for start in range(0, len(indices), 8):  # few at a time: 49 frames of 4K as floats are 5 GB
        frames = torch.from_numpy(reader.get_batch(indices[start : start + 8]).asnumpy())  # [8, H0, W0, C] uint8
        frames = (frames.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # [8, C, H0, W0]
        video[start : start + 8] = resize_and_crop(frames, height, width, mode, position)  # [8, C, H, W]
    return video


class VideoDataset(Dataset):
    """Clips with captions, decoded on access.

    Items are {"instance_prompt": str, "instance_video": float32 [F, C, H, W] in [-1, 1]}. `records` holds what was
    read; `instance_prompts`, `instance_video_paths` and `num_instance_videos` say the same in the originals' words.
    The constructor raises RunError for a data source that cannot work, and opens no video.
    """

    def __init__(
        self, instance_data_root: str | None = None, dataset_name: str | None = None,
        dataset_config_name: str | None = None, caption_column: str = "text", video_column: str = "video",
        height: int = 480, width: int = 720, video_reshape_mode: str = "center", fps: int = 8,
        max_num_frames: int = 49, skip_frames_start: int = 0, skip_frames_end: int = 0, cache_dir: str | None = None,
        id_token: str | None = None, frame_sampling: str = "stride", seed: int | None = None,
    ):
        self.records = read_records(
            instance_data_root, dataset_name, dataset_config_name, caption_column, video_column, cache_dir
        )
        self.settings = Preprocessing(
            height=height, width=width, video_reshape_mode=video_reshape_mode, max_num_frames=max_num_frames,
            skip_frames_start=skip_frames_start, skip_frames_end=skip_frames_end, frame_sampling=frame_sampling,
            fps=fps, seed=seed,
        )
        self.id_token = (id_token or "").strip()
        self.instance_prompts = [record.caption for record in self.records]
        self.instance_video_paths = [Path(record.path) for record in self.records]
        self.num_instance_videos = len(self.records)

    def __len__(self) -> int:
        return self.num_instance_videos

    def prompt(self, index: int) -> str:
        """What the text encoder is given for clip `index`: the trigger word, one space, the caption."""
        return f"{self.id_token} {self.instance_prompts[index]}".strip()

    def __getitem__(self, index: int) -> dict:
        video = load_video(self.records[index], self.settings)  # [F, C, H, W]
        return {"instance_prompt": self.prompt(index), "instance_video": video}


# ---- Processes ------------------------------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Before accelerate is up, and for the log."""
    return os.environ.get("RANK", "0") == "0"


class LogHandler(logging.Handler):
    """Writes the log above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class LogLines(io.TextIOBase):
    """What tqdm draws a bar on where there is no terminal: lines of the log."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.info(text.strip())
        return len(text)


def bar_style(shown: bool) -> dict:
    """How tqdm shows progress: as a bar on a terminal, as a line of the log a minute elsewhere."""
    if not shown or sys.stderr.isatty():
        return {"disable": not shown}
    line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
    return {"file": LogLines(), "bar_format": line, "mininterval": 60, "maxinterval": 60, "delay": 1}


class Interrupted(BaseException):
    """A signal to stop, at a moment when nothing needs to be finished first."""


class StopRequest:
    """SIGINT and SIGTERM as a wish: the training finishes its step and writes a checkpoint, then grants it.

    While `at_once` is true (encoding, sampling, uploading), Interrupted is raised instead. A second signal ends the
    process where it stands.
    """

    def __init__(self):
        self.number, self.at_once, self.heard_at, self.process = 0, True, 0.0, 0

    def listen(self) -> None:
        self.process = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.hear)

    def hear(self, number: int, _frame) -> None:
        if os.getpid() != self.process:
            return  # a process forked from this one
        if not self.number:
            self.number, self.heard_at = number, time.monotonic()
            if self.at_once:
                raise Interrupted
        elif time.monotonic() - self.heard_at > 1:  # what a launcher hands on within the second is the first one again
            os._exit(128 + number)


STOP = StopRequest()


def gone(message: str, error: Exception | None = None) -> RunError:
    """Why the run cannot go on without another process, and the error that showed it, of which one line will do."""
    reason = f" ({str(error).splitlines()[0]})" if error else ""
    return RunError(f"{message}{reason}; its own log may say why", exit_code=5)


def open_store(patience: float) -> Store:
    """A connection of one's own to the store over which the process group was set up."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=patience))
    return PrefixStore(f"peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def tell_alive(store: Store, key: str, seconds: float, over: threading.Event) -> None:
    """Count up, every so often, as long as this process lives."""
    try:
        while not over.wait(seconds):
            store.add(key, 1)
    except DistError:
        pass  # the store is gone: whoever needs it will say so


class Peers:
    """The processes of a run, as they share out the encoding and the sampling, and wait for each other's part of it.

    They meet over a store and not in a collective, which gives up after --nccl_timeout whatever the others are at.
    Here a process is waited for as long as it shows that it lives; one that has not for `patience` seconds is gone.
    """

    def __init__(self, index: int = 0, count: int = 1, patience: float = 600):
        self.index, self.count, self.patience = index, count, patience
        self.meetings, self.bar, self.over = 0, tqdm(disable=True), threading.Event()
        if count > 1:
            self.store = open_store(patience)
            beat = (open_store(patience), f"beat/{index}", min(1, patience / 10), self.over)
            threading.Thread(target=tell_alive, args=beat, daemon=True).start()
            atexit.register(self.over.set)

    def share(self, items: list) -> list:
        """This process's share of `items`; the shares differ by one item at most."""
        return items[self.index :: self.count]

    def start_bar(self, what: str, total: int, unit: str) -> None:
        """Show, in the first process, how far all of them are with `total` items; `advance` moves it."""
        self.bar = tqdm(desc=what, total=total, unit=unit, **bar_style(self.index == 0))

    def advance(self, items: int) -> None:
        if self.index > 0 and not items:
            return  # it shows nothing
        done = self.store.add(f"done/{self.meetings}", items) if self.count > 1 else self.bar.n + items
        self.bar.update(done - self.bar.n)

    def gather(self, value) -> list:
        """What each process gives here, in their order. Raises, in all of them, a RunError that one of them gives, and
        one of its own for a process that is gone."""
        values, keys = [value], [f"meeting/{self.meetings}/{index}" for index in range(self.count)]
        try:
            if self.count > 1:
                self.store.set(keys[self.index], pickle.dumps(value))
                self.wait_for(keys)
                values = [pickle.loads(self.store.get(key)) for key in keys]
                read = f"read/{self.meetings}"
                self.store.add(read, 1)
                deadline = time.monotonic() + min(10, self.patience)
                # The store may live in the first process, which must not end before all have read.
                while self.index == 0 and time.monotonic() < deadline and self.store.add(read, 0) < self.count:
                    time.sleep(0.01)
        except DistError as error:
            raise gone("the first process, or the launcher beside it, is gone", error) from error
        finally:
            self.meetings += 1
        for value in values:
            if isinstance(value, RunError):
                raise value
        return values

    def wait_for(self, keys: list[str]) -> None:
        """Return when `keys`, one a process, are all in the store. Raises RunError, code 5."""
        heard, looked = {}, -math.inf  # the last sign of life of each, and when it was new here
        while not self.store.check(keys):
            now = time.monotonic()
            if now - looked > self.patience / 20:
                looked = now
                for index, key in enumerate(keys):
                    beat = self.store.add(f"beat/{index}", 0)
                    if beat != heard.get(index, (None,))[0]:
                        heard[index] = (beat, now)
                    elif now - heard[index][1] > self.patience and not self.store.check([key]):
                        raise gone(f"process {index} has given no sign of life for {self.patience} seconds")
            self.advance(0)
            time.sleep(0.1)
        self.advance(0)

    def do(self, action: Callable, *arguments) -> list:
        """What `action` returns in each process, in their order. Where it fails in one, all end: that one with its
        error, the others with a RunError that tells it."""
        try:
            try:
                value = action(*arguments)
            except RunError as error:
                value = error
            return self.gather(value)
        except RunError:
            raise
        except BaseException as error:
            if self.count > 1:
                code = 128 + STOP.number if isinstance(error, Interrupted) else 5
                what = "was told to stop" if isinstance(error, Interrupted) else f"{type(error).__name__}: {error}"
                told = RunError(f"process {self.index} on {socket.gethostname()} ended the run: {what}", code)
                with contextlib.suppress(DistError):
                    self.store.set(f"meeting/{self.meetings}/{self.index}", pickle.dumps(told))
            raise
        finally:
            self.bar.close()
            self.bar = tqdm(disable=True)

    def first(self, action: Callable, *arguments):
        """What `action` returns in the first process, which alone does it. Raises what it raises there."""
        return (self.do(action, *arguments) if self.index == 0 else self.gather(None))[0]


# ---- Precompute: each prompt and clip is encoded once, into a safetensors file, before the transformer loads --------


def find_model_file(args: argparse.Namespace, name: str) -> Path:
    """A small file of the model such as "vae/config.json", from its local folder or the Hub. Raises RunError."""
    model = args.pretrained_model_name_or_path
    if Path(model).is_dir():
        if not (Path(model) / name).is_file():
            raise RunError(f"--pretrained_model_name_or_path {model} has no {name}: no diffusers-format model")
        return Path(model) / name
    try:
        return Path(hf_hub_download(model, name, revision=args.revision, cache_dir=args.cache_dir))
    except Exception as error:  # offline, no such repository, no access, a name that is none: all end here
        what = f"--pretrained_model_name_or_path {model} is neither a local folder nor readable from the Hub"
        raise RunError(f"{what}: {error}") from error


def read_config(args: argparse.Namespace, subfolder: str) -> dict:
    """The config of one component, without its weights."""
    return json.loads(find_model_file(args, f"{subfolder}/config.json").read_text(encoding="utf-8"))


def model_identity(args: argparse.Namespace, *subfolders: str) -> dict:
    """What tells one encoder from another: its config, and its commit on the Hub or its files' size and mtime."""
    model = args.pretrained_model_name_or_path
    config_file = find_model_file(args, f"{subfolders[0]}/config.json")
    identity = {"variant": args.variant, "config": json.loads(config_file.read_text(encoding="utf-8"))}
    if Path(model).is_dir():
        files = [path for subfolder in subfolders for path in sorted((Path(model) / subfolder).iterdir())]
        identity["files"] = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    else:
        # Its place in the Hub's cache ends in snapshots/<commit>/vae/config.json
        identity |= {"model": model, "revision": args.revision, "commit": config_file.parts[-3]}
    return identity


def check_model(args: argparse.Namespace, transformer_config: dict, vae_config: dict) -> None:
    """Refuse, by their configs, checkpoints that this script cannot train. Raises RunError."""
    model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    if transformer_config.get("_class_name") != "CogVideoXTransformer3DModel":
        raise RunError(f"{model} is not a CogVideoX: its transformer is a {transformer_config.get('_class_name')}")
    in_channels, latent_channels = transformer_config["in_channels"], vae_config["latent_channels"]
    kind = KINDS.get(in_channels / latent_channels)
    if kind is None:
        raise RunError(f"{model}: its transformer takes {in_channels} channels, its VAE makes {latent_channels}")
    if kind != KIND:
        raise RunError(f"{model} is a model for {kind}: train it with {TRAINERS[kind]}")
    if transformer_config.get("patch_size_t") is not None:
        raise RunError(f"{model} is a CogVideoX 1.5 (patch_size_t is set), which this script does not train yet")
    factor = vae_scale_factor(vae_config)
    own_size = (transformer_config["sample_height"] * factor, transformer_config["sample_width"] * factor)
    if transformer_config.get("use_learned_positional_embeddings") and (args.height, args.width) != own_size:
        raise RunError(
            f"{model} has learned positions and works at its own size only: --height {own_size[0]} --width "
            f"{own_size[1]}, not {args.height} x {args.width}"
        )


def vae_scale_factor(vae_config: dict) -> int:
    """Pixels a latent pixel, along height and along width."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def encode_prompt(
    tokenizer: T5Tokenizer | None, text_encoder: T5EncoderModel, prompt: str | list[str],
    num_videos_per_prompt: int = 1, max_sequence_length: int = 226, device: torch.device | None = None,
    dtype: torch.dtype | None = None, text_input_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """T5 hidden states of prompts, padded or cut to S tokens as CogVideoXPipeline does: [n, S, D].

    n = prompts x num_videos_per_prompt, the repeats of one prompt together. Without a tokenizer, the token ids [B, S]
    must be given. Raises ValueError if neither is.
    """
    if tokenizer is not None:
        text_input_ids = tokenizer(
            [prompt] if isinstance(prompt, str) else prompt, padding="max_length", max_length=max_sequence_length,
            truncation=True, add_special_tokens=True, return_tensors="pt",
        ).input_ids  # [B, S]
    elif text_input_ids is None:
        raise ValueError("without a tokenizer, text_input_ids must be given")
    prompt_embeds = text_encoder(text_input_ids.to(device))[0].to(dtype=dtype, device=device)  # [B, S, D]
    return prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)  # [n, S, D]


def compute_prompt_embeddings(
    tokenizer: T5Tokenizer, text_encoder: T5EncoderModel, prompt: str | list[str], max_sequence_length: int,
    device: torch.device, dtype: torch.dtype, requires_grad: bool = False,
) -> torch.Tensor:
    """`encode_prompt` for one video a prompt, without gradients unless asked: [n, S, D]."""
    with torch.set_grad_enabled(requires_grad):
        return encode_prompt(tokenizer, text_encoder, prompt, 1, max_sequence_length, device, dtype)


@torch.no_grad()
def encode_video(vae: AutoencoderKLCogVideoX, video: torch.Tensor) -> torch.Tensor:
    """Parameters (mean, log variance) of the latent distribution of pixels [F, C, H, W]: [2c, f, h, w].

    The distribution is kept and not a sample of it, so that each training step can draw a fresh one.
    """
    pixels = video[None].permute(0, 2, 1, 3, 4).to(vae.device, vae.dtype)  # [1, C, F, H, W]
    return vae.encode(pixels).latent_dist.parameters[0]  # [2c, f, h, w]


def encode_first_frame(vae: AutoencoderKLCogVideoX, image: torch.Tensor, seed: int) -> torch.Tensor:  # I2V:
    """Latent distribution of an image [C, H, W] in [-1, 1] with a little noise added: [2c, 1, h, w].

    The noise is the originals', of level exp(N(-3, 0.5)); it is added: one release of theirs had only noise there
    (zai-org/CogVideo, issue 405).
    """
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = IMAGE_LOG_SIGMA
    sigma = torch.exp(mean + deviation * torch.randn((), generator=generator))
    noisy_image = image.float() + sigma * torch.randn(image.shape, generator=generator)  # [C, H, W]
    return encode_video(vae, noisy_image[None])  # [2c, 1, h, w]


def item_path(folder: Path, kind: str, **content) -> Path:
    """The file of one precomputed item: its name is a hash of all that decides its content."""
    key = json.dumps({"format": CACHE_FORMAT, "kind": kind, **content}, sort_keys=True, default=str)
    return folder / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def put_in_place(partial: Path, path: Path) -> None:
    """Give a whole file its name, and the access rights of any new file: safetensors leaves its own to their owner
    alone (safetensors issue 782)."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)
    os.replace(partial, path)


def write_item(path: Path, **tensors: torch.Tensor) -> None:
    """Write a precomputed item whole or not at all: under a temporary name first. Raises RunError naming the path."""
    partial = path.with_name(f".{path.stem}.{os.uname().nodename}.{os.getpid()}.partial")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"checksum": checksum(tensors)})
        put_in_place(partial, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be written: {error} (--precompute_dir takes another place)") from error
    finally:
        partial.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a precomputed file holds what was written into it, to the bit."""
    try:
        with safe_open(path, framework="pt") as item:
            tensors = {name: item.get_tensor(name) for name in item.keys()}
            return item.metadata()["checksum"] == checksum(tensors)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return False


def check_items(peers: Peers, folder: Path, paths: list[Path]) -> None:
    """Remove those of `paths` that are damaged, each process looking at its share, and the temporary files of runs of
    this machine that were killed. (Other runs may be at work in the same folder.)"""
    for path in peers.share(paths):
        if path.exists() and not is_whole(path):
            logger.error(f"{path} is damaged: it is encoded anew")
            path.unlink(missing_ok=True)
    if peers.index == 0:
        for partial in folder.glob("*/.*.partial"):
            _, _, *machine, process, _ = partial.name.split(".")
            if ".".join(machine) == os.uname().nodename and not Path("/proc", process).exists():
                partial.unlink(missing_ok=True)


def wait_for_files(flag: str, paths: list[Path]) -> None:
    """Return when what other processes have written is here, too. Raises RunError after SHARED_SECONDS."""
    deadline = time.monotonic() + SHARED_SECONDS
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise RunError(f"{flag} must be one folder for all machines: {missing[0]}, of another one, is not there")
        time.sleep(0.5)


def check_shared(peers: Peers, flag: str, folder: Path) -> None:
    """What the first process writes into `folder`, all see. Raises RunError."""
    marker = folder / f".shared-{peers.gather(os.getpid())[0]}.partial"
    peers.first(make_folder, flag, marker)
    peers.do(wait_for_files, flag, [marker])
    if peers.index == 0:
        marker.rmdir()


def make_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{flag} {folder} cannot be written: {error}") from error


def start_precomputing(peers: Peers, folder: Path, what: str, items: dict[object, tuple[Path, ...]]) -> list:
    """Those keys of `items` whose files are not all there and whole, each set of files once: the same in all
    processes, found by the first one before any of them writes."""
    peers.do(check_items, peers, folder, [path for files in items.values() for path in files])
    new = peers.first(find_new, items)
    logger.info(f"{what}: {len(items) - len(new)} of {len(items)} come from {folder}")
    if new and peers.count > 1:
        check_shared(peers, "--precompute_dir", folder)
    return new


def find_new(items: dict[object, tuple[Path, ...]]) -> list:
    return list({files: key for key, files in items.items() if not all(file.exists() for file in files)}.values())


def precompute_prompts(
    args: argparse.Namespace, accelerator: Accelerator, peers: Peers, prompts: list[str], max_sequence_length: int
) -> dict[str, Path]:
    """Encode each distinct prompt once; returns its file, which holds `prompt_embeds` [S, D] in the compute dtype.

    The text encoder is loaded only if a prompt is new, and freed before this returns.
    """
    dtype = DTYPES[accelerator.mixed_precision]
    encoder = model_identity(args, "text_encoder", "tokenizer")
    content = {"max_sequence_length": max_sequence_length, "dtype": str(dtype), "encoder": encoder}
    paths = {prompt: item_path(precompute_folder(args), "prompts", prompt=prompt, **content) for prompt in prompts}
    paths = peers.gather(paths)[0]  # one machine's copy of the model may have other dates than another's
    items = {prompt: (path,) for prompt, path in paths.items()}
    new = start_precomputing(peers, precompute_folder(args), "Prompts", items)
    if new:
        peers.start_bar("Encoding prompts", len(new), "prompt")
        share = {prompt: paths[prompt] for prompt in peers.share(new)}
        long = sum(peers.do(encode_prompts, args, accelerator.device, peers, share, max_sequence_length, dtype), [])
        if long:
            logger.warning(f"Cut to {max_sequence_length} tokens, as the model takes no more:\n{listing(long)}")
        peers.do(wait_for_files, "--precompute_dir", list(paths.values()))
    return paths


def encode_prompts(
    args: argparse.Namespace, device: torch.device, peers: Peers, paths: dict[str, Path], max_sequence_length: int,
    dtype: torch.dtype,
) -> list[str]:
    """Encode prompts into their `paths`; returns the beginnings of those that are longer than the model takes."""
    if not paths:
        return []
    source = pretrained_source(args)
    tokenizer = T5Tokenizer.from_pretrained(subfolder="tokenizer", **source)
    source |= {"variant": args.variant, "dtype": dtype}
    text_encoder = T5EncoderModel.from_pretrained(subfolder="text_encoder", **source)
    text_encoder.to(device).requires_grad_(False)
    for prompt, path in paths.items():
        prompt_embeds = compute_prompt_embeddings(
            tokenizer, text_encoder, prompt, max_sequence_length, device, dtype
        )  # [1, S, D]
        write_item(path, prompt_embeds=prompt_embeds[0])
        peers.advance(1)
    long = [p[:60] + "…" for p in paths if len(tokenizer(p, verbose=False).input_ids) > max_sequence_length]
    del tokenizer, text_encoder
    clear_device_cache(garbage_collection=True)
    return long


def decode_in_child(connection, dataset: VideoDataset, index: int, dtype: torch.dtype) -> None:
    """Send the pixels of a clip, its shape before it, or in place of both why it cannot be decoded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # a forked process has none of its parent's
    try:
        video = dataset[index]["instance_video"].to(dtype)  # [F, C, H, W]
    except Exception as error:  # decord, PIL and torch each have their own
        connection.send((str(error).strip().splitlines() or [type(error).__name__])[-1])
    else:
        connection.send(tuple(video.shape))
        for frame in video:
            connection.send_bytes(frame.flatten().view(torch.uint8).numpy())  # flat: bytes are counted in its length


def receive_video(connection, dtype: torch.dtype, deadline: float) -> torch.Tensor | str:
    """What `decode_in_child` sends: pixels [F, C, H, W], or what is wrong with the clip."""
    if not connection.poll(max(0, deadline - time.monotonic())):
        return f"it was not decoded within {DECODE_SECONDS} seconds"
    try:
        shape = connection.recv()
        if isinstance(shape, str):
            return shape
        video = torch.empty(shape, dtype=dtype)  # [F, C, H, W]
        for frame in video:
            connection.recv_bytes_into(frame.view(-1).view(torch.uint8).numpy())
        return video
    except EOFError:
        return "the decoder crashed on it"


def decode_videos(
    dataset: VideoDataset, indices: list[int], dtype: torch.dtype, num_workers: int
) -> Iterator[tuple[int, torch.Tensor | str]]:
    """Each clip's index with its pixels [F, C, H, W], or with what is wrong with it.

    Every clip has a process of its own, `num_workers` of them at a time and ahead: a file that crashes the decoder,
    hangs it or makes it eat memory costs that clip and nothing else.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = deque(indices), deque()
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                ours, theirs = context.Pipe(duplex=False)
                index = waiting.popleft()
                process = context.Process(target=decode_in_child, args=(theirs, dataset, index, dtype), daemon=True)
                process.start()
                theirs.close()  # so that a dead child is an end of file
                running.append((index, process, ours, time.monotonic() + DECODE_SECONDS))
            index, process, ours, deadline = running[0]
            video = receive_video(ours, dtype, deadline)
            process.kill()  # it has sent all, or never will
            process.join()
            ours.close()
            running.popleft()
            yield index, video
    finally:
        for _, process, ours, _ in running:
            process.kill()
            ours.close()


def video_source(record: VideoRecord) -> dict:
    """What tells whether a clip's file is still the one that was encoded."""
    if record.read_bytes is not None:
        return {"sha256": hashlib.sha256(record.read_bytes()).hexdigest()}
    status = os.stat(record.path)
    return {"path": str(Path(record.path).resolve()), "size": status.st_size, "mtime": status.st_mtime_ns}


def precompute_videos(
    args: argparse.Namespace, accelerator: Accelerator, peers: Peers, dataset: VideoDataset
) -> list[tuple[Path, ...] | None]:
    """Encode each clip once, and its mirror image for --random_flip; returns the files of each clip.

    A file holds `moments` [2c, f, h, w] in the compute dtype. The VAE is loaded only if a clip is new, and freed
    before this returns. Raises RunError that lists every clip that could not be decoded, the others staying encoded;
    with --skip_bad_videos those have None in place of their files.
    """
    dtype = DTYPES[accelerator.mixed_precision]
    encoder = model_identity(args, "vae") | {"tiling": args.enable_tiling}
    settings = dataset.settings.content_key()
    flips = (False, True) if args.random_flip else (False,)
    folder, paths = precompute_folder(args), []
    for record in dataset.records:
        content = {"source": video_source(record), "settings": settings, "dtype": str(dtype), "encoder": encoder}
        paths.append(tuple(item_path(folder, "videos", made_for=KIND, flip=flip, **content) for flip in flips))
    paths = peers.gather(paths)[0]  # one machine's copy of the clips may have other dates than another's
    new, bad = start_precomputing(peers, folder, "Videos", dict(enumerate(paths))), {}
    if new:
        peers.start_bar("Encoding videos", len(new), "video")
        share = {index: paths[index] for index in peers.share(new)}
        for found in peers.do(encode_videos, args, accelerator.device, peers, dataset, share, dtype):
            bad |= found
        without = {paths[index] for index in bad}  # a clip that is listed twice was tried once
        paths = [None if files in without else files for files in paths]
        peers.do(wait_for_files, "--precompute_dir", [path for files in paths if files for path in files])
    if not bad:
        return paths
    said = f"{paths.count(None)} of {len(paths)} videos cannot be decoded"
    if not args.skip_bad_videos or not any(paths):
        raise RunError(f"{said}:\n{listing(sorted(bad.values()), limit=200)}")
    logger.warning(f"{said} and are left out:\n{listing(sorted(bad.values()), limit=200)}")
    return paths


def encode_videos(
    args: argparse.Namespace, device: torch.device, peers: Peers, dataset: VideoDataset,
    paths: dict[int, tuple[Path, ...]], dtype: torch.dtype,
) -> dict[int, str]:
    """Decode and encode clips, by their index, into their `paths`; returns what is wrong with those that failed."""
    if not paths:
        return {}
    vae, bad = load_vae(args, dtype).to(device), {}
    for index, video in decode_videos(dataset, list(paths), dtype, max(1, args.dataloader_num_workers)):
        if isinstance(video, str):
            bad[index] = f"{dataset.records[index].path}: {video}"
        for flipped, path in enumerate(paths[index]):
            if index not in bad and not path.exists():
                pixels = video.flip(-1) if flipped else video  # [F, C, H, W]
                tensors = {"moments": encode_video(vae, pixels)}
                # I2V: seeded by the name, the hash of all that decides the content: noise of its own, and repeatable
                tensors["image_moments"] = encode_first_frame(vae, pixels[0], seed=int(path.stem[:15], 16))
                write_item(path, **tensors)
        peers.advance(1)
    del vae
    clear_device_cache(garbage_collection=True)
    return bad


# ---- Batches --------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Clips of one latent shape, as the loop takes them."""

    moments: torch.Tensor  # [B, 2c, f, h, w]
    prompt_embeds: torch.Tensor  # [B, S, D]
    image_moments: torch.Tensor  # I2V: [B, 2c, 1, h, w]


class LatentDataset(Dataset):
    """Precomputed clips, read on access. The key (index, flipped) comes from the sampler, which draws the flips."""

    def __init__(self, video_files: list[tuple[Path, ...]], prompt_files: list[Path]):
        self.video_files, self.prompt_files = video_files, prompt_files

    def shapes(self) -> list[tuple[int, ...]]:
        """Latent shape of each clip, from the files' headers."""
        shapes = []
        for files in self.video_files:
            with safe_open(files[0], framework="pt") as item:
                shapes.append(tuple(item.get_slice("moments").get_shape()))
        return shapes

    def __len__(self) -> int:
        return len(self.video_files)

    def __getitem__(self, key: tuple[int, bool]) -> Batch:
        index, flipped = key
        return Batch(**load_file(self.video_files[index][int(flipped)]), **load_file(self.prompt_files[index]))


def check_lengths(transformer_config: dict, shapes: list[tuple[int, ...]]) -> None:  # I2V:
    """Warn of clips, by their latent shapes, that are not as long as a model's learned positions: the transformer then
    takes computed ones in their place, in training as in inference."""
    frames = transformer_config["sample_frames"]
    others = sum((shape[1] - 1) * 4 + 1 != frames for shape in shapes)
    if transformer_config.get("use_learned_positional_embeddings") and others:
        logger.warning(
            f"{others} of {len(shapes)} clips do not give the {frames} frames that the model's learned positions are "
            f"for, and train with computed positions: best are longer clips and --max_num_frames {frames}."
        )


def collate(items: list[Batch]) -> Batch:
    return Batch(*(torch.stack(tensors) for tensors in zip(*items, strict=True)))


class ShapeBatchSampler(Sampler[list[tuple[int, bool]]]):
    """Batches of (index, flipped) in which all clips have one latent shape, for one of `num_processes` processes.

    The order of epoch e is a function of (seed, e) alone, so a position in the data is two numbers, and to resume
    there reads nothing of what came before. Set `epoch` and `first_batch` before iterating.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], batch_size: int, seed: int, random_flip: bool = False,
        num_processes: int = 1, process_index: int = 0,
    ):
        self.shapes, self.batch_size, self.seed, self.random_flip = shapes, batch_size, seed, random_flip
        self.num_processes, self.process_index = num_processes, process_index
        self.epoch, self.first_batch = 0, 0

    def all_batches(self) -> list[list[tuple[int, bool]]]:
        """The epoch's batches of all processes: clips in random order fill the open batch of their shape."""
        draw = random.Random(f"{self.seed}:{self.epoch}")
        order = list(range(len(self.shapes)))
        draw.shuffle(order)
        batches, filling = [], {}
        for index in order:
            batch = filling.setdefault(self.shapes[index], [])
            batch.append((index, self.random_flip and draw.random() < 0.5))
            if len(batch) == self.batch_size:
                batches.append(filling.pop(self.shapes[index]))
        batches += filling.values()
        missing = -len(batches) % self.num_processes  # every process takes the same number of batches
        return batches + [batches[i % len(batches)] for i in range(missing)]

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        yield from self.all_batches()[self.process_index :: self.num_processes][self.first_batch :]

    def __len__(self) -> int:
        """Batches in a whole epoch of this process."""
        return len(self.all_batches()) // self.num_processes


def ignore_signals(_worker: int) -> None:
    """A signal to the process group reaches its loading processes, too: their batches are needed to finish a step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def get_dataloader(
    args: argparse.Namespace, accelerator: Accelerator, dataset: LatentDataset, seed: int
) -> tuple[DataLoader, ShapeBatchSampler]:
    """The loader of this process's batches, on its device, and the sampler that says where in the data it is."""
    sampler = ShapeBatchSampler(
        dataset.shapes(), args.train_batch_size, seed, args.random_flip, accelerator.num_processes,
        accelerator.process_index,
    )
    workers = args.dataloader_num_workers
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda", worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # a loader draws a seed each epoch: not from the stream that noise comes from
    )
    # Accelerate moves the batches and tells the last one of an epoch; the sampler has shared them out already, because
    # accelerate's own sharing pads batches with clips of any shape.
    loader = prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    return loader, sampler


# ---- Model ----------------------------------------------------------------------------------------------------------


def pretrained_source(args: argparse.Namespace) -> dict:
    """What every `from_pretrained` is given; those of weights take --variant too."""
    return {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "cache_dir")}


def load_vae(args: argparse.Namespace, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    source = pretrained_source(args)
    vae = AutoencoderKLCogVideoX.from_pretrained(subfolder="vae", variant=args.variant, dtype=dtype, **source)
    if args.enable_slicing:
        vae.enable_slicing()
    if args.enable_tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval()


def load_transformer(args: argparse.Namespace, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """The frozen base, straight in the compute dtype."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        subfolder="transformer", variant=args.variant, dtype=dtype, **pretrained_source(args)
    )
    transformer.requires_grad_(False)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def add_lora(transformer: CogVideoXTransformer3DModel, rank: int, lora_alpha: float) -> list[torch.nn.Parameter]:
    """Put LoRA matrices beside the attention projections; returns them, the only parameters that train, in fp32."""
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS))
    cast_training_params(transformer, dtype=torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def lora_parameters(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.nn.Parameter]:
    """What trains, under the names of the saved file: those of peft without the adapter's."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full, where an engine keeps a part of it, or a copy in the compute dtype, in each process. All of
    them have to ask for it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    return tensor


def lora_weights(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.Tensor]:
    """The LoRA in full, in fp32, on the CPU; all processes take part."""
    return {name: whole(weight).detach().float().cpu() for name, weight in lora_parameters(transformer).items()}


def all_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(weight.isfinite().all() for weight in weights.values())


def save_lora(
    transformer: CogVideoXTransformer3DModel, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write LORA_FILE into `folder`, whole or not at all, with the metadata that makes
    `pipe.load_lora_weights(folder)` apply alpha / rank, once. `weights`: those of `lora_weights`."""
    # peft makes a set of the targets, in another order each run: the file shall not differ for that.
    metadata = transformer.peft_config["default"].to_dict() | {"target_modules": LORA_TARGETS}
    weights = lora_weights(transformer) if weights is None else weights
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-", suffix=".partial") as partial:
        PIPELINE.save_lora_weights(
            partial, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
        put_in_place(Path(partial) / LORA_FILE, folder / LORA_FILE)


def load_lora(transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
    """Read LORA_FILE of `folder` into the LoRA that `transformer` already has. Raises RunError if they don't fit."""
    saved = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / LORA_FILE).items()}
    parameters = lora_parameters(transformer)
    if {n: tensor.shape for n, tensor in saved.items()} != {n: tensor.shape for n, tensor in parameters.items()}:
        raise RunError(f"--resume_from_checkpoint: {folder / LORA_FILE} does not fit this run's layers or --rank")
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = saved[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
            parameter.copy_(tensor)


# ---- Objective ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def prepare_rotary_positional_embeddings(
    height: int, width: int, num_frames: int, vae_scale_factor_spatial: int = 8, patch_size: int = 2,
    attention_head_dim: int = 64, device: torch.device | None = None, base_height: int = 480, base_width: int = 720,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embeddings (cos, sin) of all video tokens, each [f * h/p * w/p, head dim]; once a shape.

    `height`, `width` and the base size that the model was trained at are in pixels, `num_frames` in latent frames.
    Source: CogVideoXPipeline._prepare_rotary_positional_embeddings.
    """
    pixels_per_token = vae_scale_factor_spatial * patch_size
    grid_size = (height // pixels_per_token, width // pixels_per_token)
    crops_coords = get_resize_crop_region_for_grid(
        grid_size, base_width // pixels_per_token, base_height // pixels_per_token
    )
    return get_3d_rotary_pos_embed(
        embed_dim=attention_head_dim, crops_coords=crops_coords, grid_size=grid_size, temporal_size=num_frames,
        device=device,
    )


def rotary_for(
    transformer_config, latents: torch.Tensor, vae_scale_factor_spatial: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the pipeline feeds as `image_rotary_emb` for latents [B, f, C, h, w]; None for a model without (2B)."""
    if not transformer_config.use_rotary_positional_embeddings:
        return None
    num_frames, _, height, width = latents.shape[1:]
    return prepare_rotary_positional_embeddings(
        height * vae_scale_factor_spatial, width * vae_scale_factor_spatial, num_frames, vae_scale_factor_spatial,
        transformer_config.patch_size, transformer_config.attention_head_dim, latents.device,
        transformer_config.sample_height * vae_scale_factor_spatial,
        transformer_config.sample_width * vae_scale_factor_spatial,
    )


def sample_latents(moments: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """A fresh sample of the latent distribution [B, 2c, f, h, w], scaled for the transformer: [B, f, c, h, w]."""
    latents = DiagonalGaussianDistribution(moments.float()).sample() * scaling_factor  # [B, c, f, h, w]
    return latents.permute(0, 2, 1, 3, 4).contiguous()  # [B, f, c, h, w]


def sample_image_latents(  # I2V:
    image_moments: torch.Tensor, num_frames: int, vae_config: dict, dropout: float
) -> torch.Tensor:
    """What tells the transformer the first frame, from its distribution [B, 2c, 1, h, w]: latents [B, f, c, h, w] that
    are zero after the first frame, and zero throughout for the part `dropout` of the clips, drawn one by one.

    Source: CogVideoXImageToVideoPipeline.prepare_latents, its division where `invert_scale_latents` is set included.
    """
    scaling_factor = vae_config["scaling_factor"]
    scale = 1 / scaling_factor if vae_config.get("invert_scale_latents") else scaling_factor
    first = sample_latents(image_moments, scale)  # [B, 1, c, h, w]
    kept = torch.rand(len(first), device=first.device) >= dropout  # [B]
    image_latents = first.new_zeros(len(first), num_frames, *first.shape[2:])  # [B, f, c, h, w]
    image_latents[:, :1] = first * kept.view(-1, 1, 1, 1, 1)
    return image_latents


def diffusion_loss(
    transformer: torch.nn.Module, noise_scheduler: CogVideoXDPMScheduler, latents: torch.Tensor,
    image_latents: torch.Tensor,  # I2V:
    prompt_embeds: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype,
    noise: torch.Tensor | None = None, timesteps: torch.Tensor | None = None,
) -> torch.Tensor:
    """The training loss of latents and image latents [B, f, C, h, w] (fp32) under prompts [B, S, D]: a scalar, fp32.

    Noise and timesteps [B] are drawn from the global generator unless given. All but the transformer runs in fp32: in
    bf16 the 1000 noise levels of the scheduler collapse to 193.
    """
    if noise is None:
        noise = torch.randn_like(latents)  # [B, f, C, h, w]
    if timesteps is None:
        num_timesteps = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, num_timesteps, (len(latents),), device=latents.device)  # [B] int64
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)  # [B, f, C, h, w]
    velocity_pred = transformer(
        hidden_states=torch.cat([noisy_latents, image_latents], dim=2).to(dtype),  # I2V: [B, f, 2C, h, w]
        encoder_hidden_states=prompt_embeds.to(dtype), timestep=timesteps, image_rotary_emb=image_rotary_emb,
        return_dict=False,
    )[0].float()  # [B, f, C, h, w]
    x0_pred = noise_scheduler.get_velocity(velocity_pred, noisy_latents, timesteps)  # [B, f, C, h, w]
    alphas_cumprod = noise_scheduler.alphas_cumprod[timesteps].to(latents.dtype)  # [B]
    squared_error = (x0_pred - latents).square().flatten(1).mean(dim=1)  # [B]
    return (squared_error / (1 - alphas_cumprod)).mean()


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def get_optimizer(args: argparse.Namespace, params_to_optimize, use_deepspeed: bool = False) -> torch.optim.Optimizer:
    """The optimizer of --optimizer over parameters or parameter groups.

    With `use_deepspeed`, the placeholder for the optimizer that DeepSpeed's own configuration defines.
    """
    if use_deepspeed:
        from accelerate.utils.deepspeed import DummyOptim

        return DummyOptim(params_to_optimize, lr=args.learning_rate)
    common = {"lr": args.learning_rate, "eps": args.adam_epsilon, "weight_decay": args.adam_weight_decay}
    common["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if args.use_8bit_adam:
            logger.warning("--use_8bit_adam has no effect with --optimizer prodigy.")
        if args.learning_rate <= 0.1:
            logger.warning("Prodigy finds its own scale: --learning_rate 1 is what it is made for.")
        return Prodigy(
            params_to_optimize, **common, beta3=args.prodigy_beta3, decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction, safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = getattr(bitsandbytes.optim, f"{optimizer_class.__name__}8bit")
    return optimizer_class(params_to_optimize, **common)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How long the run is: optimizer steps an epoch and in all, and the clips that a step learns from."""

    steps_per_epoch: int
    num_epochs: int
    max_train_steps: int
    total_batch_size: int
    learning_rate: float


def plan_training(args: argparse.Namespace, batches_per_epoch: int, num_processes: int) -> TrainingPlan:
    """`batches_per_epoch` counts one process's micro-batches. An epoch's last step takes what is left of them."""
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    total_batch_size = args.train_batch_size * num_processes * args.gradient_accumulation_steps
    return TrainingPlan(
        steps_per_epoch=steps_per_epoch, num_epochs=math.ceil(max_train_steps / steps_per_epoch),
        max_train_steps=max_train_steps, total_batch_size=total_batch_size,
        learning_rate=args.learning_rate * (total_batch_size if args.scale_lr else 1),
    )


def get_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, plan: TrainingPlan):
    """The schedule over `plan.max_train_steps` optimizer steps, the same with any number of processes."""
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= plan.max_train_steps:
        logger.warning(
            f"--lr_warmup_steps {args.lr_warmup_steps} is not less than the {plan.max_train_steps} steps of this run: "
            "the learning rate never gets to its full height."
        )
    return get_scheduler(
        args.lr_scheduler, optimizer=optimizer, num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=plan.max_train_steps, num_cycles=args.lr_num_cycles, power=args.lr_power,
    )


class Prepared(NamedTuple):
    """What trains, as accelerate's engine holds it."""

    transformer: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler


def prepare(
    args: argparse.Namespace, accelerator: Accelerator, transformer: CogVideoXTransformer3DModel,
    trainable: list[torch.nn.Parameter], plan: TrainingPlan,
) -> Prepared:
    """Hand the model, its optimizer and its schedule to the engine. Where a DeepSpeed configuration defines one of the
    two, it is that one; the flags' are for what is not defined."""
    plugin = accelerator.state.deepspeed_plugin
    defined = plugin.deepspeed_config if plugin is not None else {}
    if defined:
        from accelerate.utils.deepspeed import DummyScheduler
    groups = [{"params": trainable, "lr": plan.learning_rate}]
    optimizer = get_optimizer(args, groups, use_deepspeed="optimizer" in defined)
    if "scheduler" in defined:
        steps = plan.max_train_steps * accelerator.num_processes  # accelerate divides them again, but not the warm-up
        schedule = DummyScheduler(optimizer, total_num_steps=steps, warmup_num_steps=args.lr_warmup_steps)
    elif "optimizer" in defined:
        make = functools.partial(get_lr_scheduler, args, plan=plan)
        schedule = DummyScheduler(optimizer, lr_scheduler_callable=make)
    else:
        schedule = get_lr_scheduler(args, optimizer, plan)
    prepared = Prepared(*accelerator.prepare(transformer, optimizer, schedule))
    if isinstance(prepared.transformer, DistributedDataParallel):
        prepared.transformer.broadcast_buffers = False  # the positions: the same everywhere, and up to 68 MB a step
    return prepared


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainingState:
    """Where the run is, all of it that is not in the optimizer, the schedule, the LoRA or the random generators."""

    seed: int  # of the data order
    step: int = 0  # optimizer steps taken
    epoch: int = 0
    batch: int = 0  # micro-batches taken of this epoch, a process


def save_no_base(_models: list, weights: list, _output_dir: str) -> None:
    """A hook of accelerate's, which writes what is left in `weights`: nobody needs the frozen base twice."""
    weights.clear()


def load_no_base(models: list, _input_dir: str) -> None:
    models.clear()


def write_state(accelerator: Accelerator, prepared: Prepared, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write LoRA, optimizer, schedule and random generators as each engine does, all processes together."""
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_fsdp2:  # accelerate's save_state would write the base, too
        plugin = accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, accelerator, prepared.optimizer, prepared.transformer, str(folder))
        state = ([], [], [prepared.lr_scheduler], [], accelerator.process_index, accelerator.step, accelerator.scaler)
        save_accelerator_state(str(folder), *state)
    else:
        accelerator.save_state(str(folder), exclude_frozen_parameters=True)  # which DeepSpeed asks for
    if accelerator.is_main_process or accelerator.project_configuration.save_on_each_node:
        save_lora(accelerator.unwrap_model(prepared.transformer), folder, weights)


def read_state(accelerator: Accelerator, prepared: Prepared, folder: Path) -> None:
    """Read back what `write_state` wrote."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:  # which keeps it twice, in fp32 and to compute with
        load_lora(accelerator.unwrap_model(prepared.transformer), folder)
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        load_fsdp_optimizer(plugin, accelerator, prepared.optimizer, prepared.transformer, str(folder))
        state = ([], [], [prepared.lr_scheduler], [], accelerator.process_index, accelerator.scaler)
        load_accelerator_state(str(folder), *state)
    else:
        accelerator.load_state(str(folder), load_module_strict=False)  # the frozen base is not in it


def read_training_state(folder: Path) -> tuple[float, dict, dict]:
    """When a checkpoint was written, the settings of its run, and where the run was."""
    content = json.loads((folder / "training_state.json").read_text())
    return content["saved_at"], content["settings"], content["state"]


def checkpoint_time(folder: Path) -> float:
    """When a checkpoint says that it was written; 0 for what is no complete checkpoint."""
    try:
        return read_training_state(folder)[0]
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return sorted(filter(checkpoint_time, output_dir.glob("checkpoint-*")), key=checkpoint_time)


def run_settings(args: argparse.Namespace, accelerator: Accelerator, num_clips: int) -> dict:
    """What a checkpoint depends on, as CHECKPOINT_NEEDS and CHECKPOINT_CHANGES name it."""
    counted = {"lora_targets": LORA_TARGETS, "num_processes": accelerator.num_processes, "num_clips": num_clips}
    counted |= {"engine": engine_name(accelerator), "mixed_precision": accelerator.mixed_precision}
    names = CHECKPOINT_NEEDS | CHECKPOINT_CHANGES.keys()
    return counted | {name: getattr(args, name) for name in sorted(names - counted.keys())}


def check_checkpoint(folder: Path, settings: dict) -> None:
    """Hold a checkpoint against the settings of the run that is to go on from it: warn of what changes, and raise
    RunError where it cannot go on."""
    _, saved, _ = read_training_state(folder)
    changed = {
        name: f"{name} was {saved[name]}, is {new}" for name, new in settings.items() if saved.get(name, new) != new
    }
    # An engine that spreads the optimizer over the processes has a file for each of them.
    needs = CHECKPOINT_NEEDS | ({"num_processes"} if settings["engine"] != "replicated" else set())
    refused = [text for name, text in changed.items() if name in needs]
    if refused:
        raise RunError(f"--resume_from_checkpoint: {folder} does not fit these flags:\n{listing(refused)}")
    if changed:
        texts = [f"{text}: {CHECKPOINT_CHANGES[name]}" for name, text in changed.items()]
        logger.warning(f"This run goes on from {folder} in another way:\n{listing(texts)}")


def remove_checkpoint(folder: Path) -> None:
    """Under another name first: a folder that has its final name is complete, while it is removed, too."""
    doomed = folder.with_name(f".{folder.name}.removed.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def publish_checkpoint(args: argparse.Namespace, partial: Path, folder: Path, state: TrainingState, settings: dict):
    """Give a complete checkpoint its name; then remove the oldest ones beyond --checkpoints_total_limit."""
    before = list_checkpoints(folder.parent)
    # A clock that was set back must not make the newest checkpoint the oldest.
    saved_at = max([time.time(), *(checkpoint_time(old) + 1e-3 for old in before[-1:])])
    content = {"saved_at": saved_at, "settings": settings, "state": dataclasses.asdict(state)}
    (partial / "training_state.json").write_text(json.dumps(content, indent=1))
    replaced = folder.with_name(f"{folder.name}.replaced")  # a complete checkpoint under this name, too
    if folder.exists():  # an earlier run in the same output dir came this far
        os.replace(folder, replaced)
    os.replace(partial, folder)
    if replaced.exists():
        remove_checkpoint(replaced)
    if args.checkpoints_total_limit is not None:
        for old in list_checkpoints(folder.parent)[: -args.checkpoints_total_limit]:
            remove_checkpoint(old)


def save_checkpoint(
    args: argparse.Namespace, accelerator: Accelerator, prepared: Prepared, state: TrainingState, settings: dict
) -> None:
    """Write checkpoint-N, all processes together: under a temporary name, so that a folder with its final name is
    whole. Where a process cannot write, that is logged, the checkpoints before it stay, and training goes on."""
    folder = Path(args.output_dir) / f"checkpoint-{state.step}"
    partial = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    weights = lora_weights(accelerator.unwrap_model(prepared.transformer))
    accelerator.wait_for_everyone()
    failed = not attempt(f"Writing {folder}", write_state, accelerator, prepared, partial, weights)
    failed = accelerator.reduce(torch.tensor(float(failed), device=accelerator.device)).item() > 0
    if accelerator.is_main_process:
        if failed:
            shutil.rmtree(partial, ignore_errors=True)
        elif attempt(f"Writing {folder}", publish_checkpoint, args, partial, folder, state, settings):
            logger.info(f"Saved {folder}")
    accelerator.wait_for_everyone()


class LastStep:
    """The run as its last whole step left it, for a checkpoint in case the next one fails half-way."""

    def __init__(self, device: torch.device):
        self.device, self.state, self.random = device, None, []

    def keep(self, state: TrainingState) -> None:
        self.state, self.random = dataclasses.replace(state), [torch.get_rng_state()]
        if self.device.type == "cuda":
            self.random.append(torch.cuda.get_rng_state(self.device))

    def drop(self) -> None:
        """The weights are about to change: until the next `keep` they are of no step."""
        self.state = None

    def restore_random(self) -> None:
        torch.set_rng_state(self.random[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random[1], self.device)


def rescue(
    args: argparse.Namespace, accelerator: Accelerator, prepared: Prepared, last: LastStep, settings: dict
) -> None:
    """Write a checkpoint of the last whole step after the next one has failed, without a word with the other
    processes, who may be gone: the first process of each machine tries, and the first one to do so writes.

    An engine that spreads the optimizer over the processes cannot be saved without them all.
    """
    if not (last.state and last.state.step) or settings["engine"] != "replicated":
        return
    if not accelerator.is_local_main_process:
        return
    folder = Path(args.output_dir) / f"checkpoint-{last.state.step}"
    partial = folder.with_name(f".{folder.name}.rescued.partial")
    try:
        partial.mkdir()
    except OSError:  # there, by another machine's process, or not to be written
        return
    accelerator.project_configuration.save_on_each_node = True  # whichever this one is
    accelerator.step = 0  # the micro-batches of the step that failed are to come again
    last.restore_random()
    weights = lora_weights(accelerator.unwrap_model(prepared.transformer))
    what = f"Writing {folder}"
    written = all_finite(weights) and attempt(what, write_state, accelerator, prepared, partial, weights)
    if written and attempt(what, publish_checkpoint, args, partial, folder, last.state, settings):
        logger.error(f"Saved {folder}: all steps before the one that failed")


def clean_up(output_dir: Path) -> None:
    """Remove what a run that was killed left half-written, and put back a checkpoint that it was about to replace."""
    for replaced in output_dir.glob("checkpoint-*.replaced"):
        if replaced.with_suffix("").exists():
            remove_checkpoint(replaced)
        else:
            os.replace(replaced, replaced.with_suffix(""))
    for leftover in (*output_dir.glob(".*.partial"), *output_dir.glob("validation/.*.partial.mp4")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder that --resume_from_checkpoint means, None for a fresh start. Raises RunError if there is none."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    complete = list_checkpoints(Path(args.output_dir))
    if wanted == "latest":
        return complete[-1] if complete else None
    for folder in (Path(args.output_dir) / wanted, Path(wanted)):
        if checkpoint_time(folder):
            return folder
    there = ", ".join(folder.name for folder in complete) or "none"
    raise RunError(f"--resume_from_checkpoint {wanted}: no complete checkpoint there; {args.output_dir} has {there}")


def resume(accelerator: Accelerator, prepared: Prepared, folder: Path, settings: dict) -> TrainingState:
    """Load LoRA, optimizer, schedule and this process's random generators; returns where the run was."""
    _, saved, state = read_training_state(folder)
    state = TrainingState(**state)
    # A process of which the checkpoint has no generators must not draw the run's first noise again.
    set_seed(state.seed + state.step, device_specific=True)
    read_state(accelerator, prepared, folder)
    clips = state.batch * saved["train_batch_size"] * saved["num_processes"]  # of this epoch, seen already
    state.batch = clips // (settings["train_batch_size"] * settings["num_processes"])
    logger.info(f"Resumed {folder}: step {state.step}, epoch {state.epoch + 1}, batch {state.batch} of it")
    return state


# ---- Validation and publishing --------------------------------------------------------------------------------------


def start_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`: those after it belong to a run that is taken up again there."""
    lines = path.read_text().splitlines() if path.exists() and step > 0 else []
    kept = [line for line in lines if line.startswith("{") and line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))


def append_metrics(path: Path, metrics: dict) -> None:
    # JSON has no NaN or Infinity: they become null, which every reader takes.
    row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def tracker_config(args: argparse.Namespace) -> dict:
    """The flags as trackers take them: plain values, and never the token."""
    shown = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in shown.items()}


def as_gif(file: Path, fps: int):
    """A video for TensorBoard, which plays GIFs among its images. (Its own add_video wants moviepy to make them.)"""
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames = [Image.fromarray(frame) for frame in decord.VideoReader(str(file))[:].asnumpy()]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    width, height = frames[0].size
    return Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif.getvalue())


def tracker_scalars(metrics: dict) -> dict:
    """Under the names that trackers group by, and under those that the originals used."""
    grouped = {f"train/{name}": metrics[name] for name in ("loss", "lr", "grad_norm")}
    return grouped | {"train/step_time": metrics["seconds"], "loss": metrics["loss"], "lr": metrics["lr"]}


def send_videos(accelerator: Accelerator, files: list[Path], caption: str, step: int, fps: int) -> None:
    """Show written videos in the trackers that take video, those of one prompt and number under one name."""
    for tracker, file in itertools.product(accelerator.trackers, files):
        tag = f"validation/{file.stem.split('_', 2)[2]}"
        if tracker.name == "wandb":
            import wandb

            tracker.tracker.log({tag: wandb.Video(str(file), caption=caption, format="mp4")}, step=step)
        elif tracker.name == "comet_ml":
            tracker.tracker.log_video(str(file), name=tag, step=step)
        elif tracker.name == "tensorboard":
            from tensorboard.compat.proto.summary_pb2 import Summary

            value = Summary.Value(tag=tag, image=as_gif(file, fps))
            tracker.tracker.file_writer.add_summary(Summary(value=[value]), step)


def validation_files(args: argparse.Namespace, step: int, is_final: bool, name: str) -> list[Path]:
    """Where the --num_validation_videos of one prompt are written."""
    stem = f"{'test' if is_final else 'validation'}_step-{step:06d}_{name}"
    folder = Path(args.output_dir) / "validation"
    return [folder / f"{stem}video-{index}.mp4" for index in range(args.num_validation_videos)]


def log_validation(
    pipe: PIPELINE, args: argparse.Namespace, accelerator: Accelerator, pipeline_args: dict, epoch: int,
    is_final_validation: bool = False, step: int | None = None, name: str | None = "", caption: str | None = None,
) -> list[np.ndarray]:
    """Sample --num_validation_videos with `pipeline_args`, the same ones each time for one --seed.

    Each is written to <output_dir>/validation and sent to the trackers of this process; with `name` None it is only
    sampled. Returns the videos, [F, H, W, C] in [0, 1].
    """
    step = epoch if step is None else step
    files = validation_files(args, step, is_final_validation, name or "")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    # CogVideoX is sampled with the DPM scheduler; a fresh one, since it keeps state from call to call.
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    # Its own generator: sampling must neither depend on the training's random numbers nor advance them.
    generator = torch.Generator(accelerator.device).manual_seed(0 if args.seed is None else args.seed)
    videos = []
    for file in files:
        video = pipe(**pipeline_args, generator=generator, output_type="np").frames[0]  # [>=F, H, W, C]
        # Of an even number of latent frames the VAE makes four frames of the first one too: the last F are the video.
        video = video[-pipeline_args.get("num_frames", 0) :]  # [F, H, W, C]
        videos.append(video)
        if name is None:
            continue
        partial = file.with_name(f".{file.stem}.partial.mp4")
        export_to_video(list(video), str(partial), fps=args.fps)
        if len(decord.VideoReader(str(partial))) != len(video):  # ffmpeg on a full disk: imageio does not tell
            raise OSError(f"{file} was not written whole")
        os.replace(partial, file)
    if name is not None:
        caption = caption or pipeline_args.get("prompt", "")
        attempt("Showing videos in the trackers", send_videos, accelerator, files, caption, step, args.fps)
    return videos


def sample_prompts(
    args: argparse.Namespace, accelerator: Accelerator, transformer: CogVideoXTransformer3DModel,
    noise_scheduler: CogVideoXDPMScheduler, prompt_files: dict[str, Path], state: TrainingState, is_final: bool,
    indices: list[int],
) -> Iterator[int]:
    """Sample validation prompts, by their index, each one given back when its videos are written. Those past the last
    one are sampled as the last one, and not written."""
    prompts, pipe = validation_prompts(args), None
    transformer.eval()
    try:
        models = {"transformer": transformer, "scheduler": noise_scheduler, "tokenizer": None, "text_encoder": None}
        vae = load_vae(args, DTYPES[accelerator.mixed_precision])
        pipe = PIPELINE(vae=vae.to(accelerator.device), **models)
        for number in indices:
            index = min(number, len(prompts) - 1)
            what = f"Sampling prompt {index + 1} of {len(prompts)}"
            pipe.set_progress_bar_config(desc=what, unit="step", leave=False, **bar_style(accelerator.is_main_process))
            prompt, name = prompts[index], f"prompt-{index}_" if index == number else None
            embeds = {key: load_file(prompt_files[key])["prompt_embeds"][None] for key in (prompt, "")}  # [1, S, D]
            names = ("height", "width", "num_inference_steps", "guidance_scale", "use_dynamic_cfg")
            pipeline_args = {name: getattr(args, name) for name in names} | {
                "num_frames": frames_4k_plus_1(args.max_num_frames),
                "prompt_embeds": embeds[prompt].to(accelerator.device),
                "negative_prompt_embeds": embeds[""].to(accelerator.device),
                "image": start_image(args, index),  # I2V:
            }
            log_validation(
                pipe, args, accelerator, pipeline_args, state.epoch, is_final, state.step, name, prompt
            )
            if name is not None:
                yield index
    finally:
        pipe = vae = None
        transformer.train()
        clear_device_cache(garbage_collection=True)


def run_validation(
    args: argparse.Namespace, accelerator: Accelerator, peers: Peers, transformer: CogVideoXTransformer3DModel,
    noise_scheduler: CogVideoXDPMScheduler, prompt_files: dict[str, Path], state: TrainingState,
    is_final: bool = False,
) -> dict[Path, str]:
    """Sample the validation prompts with the LoRA as it is, each process its share; returns the prompt of each video.

    The prompts were encoded at the start, so the text encoder is not loaded. A failure (out of memory, a full disk)
    is logged, and training goes on. A signal to stop ends the sampling at once.
    """
    prompts = validation_prompts(args)
    if not prompts:
        return {}
    # Where each has a part of the base only, all of them sample in step, or none gets any further.
    in_step = engine_name(accelerator) in ("deepspeed zero3", "fsdp2")
    padding = -len(prompts) % peers.count if in_step else 0
    share = peers.share(list(range(len(prompts) + padding))) if in_step or not STOP.number else []
    logger.info(f"Validation at step {state.step}: {len(prompts)} prompts, {args.num_validation_videos} videos each")
    sampled, everyone = [], []
    try:
        STOP.at_once = not in_step
        if share:
            given = (args, accelerator, transformer, noise_scheduler, prompt_files, state, is_final, share)
            for index in sample_prompts(*given):
                sampled.append(index)
    except Exception:  # the weights matter more than a sample of them
        logger.error("Validation failed; training is not affected:", exc_info=True)
    except Interrupted:
        logger.warning("Validation is cut short.")
    finally:
        STOP.at_once = False
    try:
        everyone = peers.gather(sampled)
    except RunError as error:
        if not is_final:
            raise
        logger.error(f"Not all videos are there: {error}")  # the LoRA is, and all else that is still to do
    files = {i: validation_files(args, state.step, is_final, f"prompt-{i}_") for i in sorted(sum(everyone, sampled))}
    for index in files.keys() - set(sampled) if peers.index == 0 else ():
        attempt("Waiting for another machine's videos", wait_for_files, "--output_dir", files[index])
        what = (accelerator, files[index], prompts[index], state.step, args.fps)
        attempt("Showing videos in the trackers", send_videos, *what)
    return {file: prompts[index] for index in files for file in files[index]}


def draw_loss_curve(rows: list[dict], path: Path) -> None:
    """The loss over the steps, of rows of metrics.jsonl, as means of up to 100 equal stretches; a PNG of 800 x 320."""
    means = [np.mean([row["loss"] for row in part]) for part in np.array_split(rows, min(len(rows), 100))]
    low, high = min(means), max(means)
    left, right, top, bottom = 70, 780, 30, 280
    x = np.linspace(left, right, len(means))
    y = bottom - (np.array(means) - low) / max(high - low, 1e-12) * (bottom - top)
    picture = Image.new("RGB", (800, 320), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for height, value in ((top, high), (bottom, low)):
        draw.line([(left, height), (right, height)], "#cccccc")
        draw.text((left - 8, height), f"{value:.3g}", "black", font, anchor="rm")
    for side, row in ((left, rows[0]), (right, rows[-1])):
        draw.text((side, bottom + 18), f"step {row['step']}", "black", font, anchor="lm" if side == left else "rm")
    draw.text(((left + right) / 2, bottom + 18), "loss", "black", font, anchor="mm")
    draw.line(list(zip(x, y, strict=True)), "#1f77b4", width=3)
    picture.save(path)


def usage_example(
    repo_id: str, base_model: str, prompt: str, fps: int, dtype: str = "bfloat16", shape: dict | None = None
) -> str:
    """The lines of the card that load the LoRA and sample with it; `shape`: height, width, num_frames."""
    arguments = "".join(f", {name}={value}" for name, value in (shape or {}).items())
    return f"""import torch
from diffusers import {PIPELINE.__name__}
from diffusers.utils import export_to_video, load_image

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = {PIPELINE.__name__}.from_pretrained({json.dumps(base_model)}, dtype=torch.{dtype}).to(device)
pipe.load_lora_weights({json.dumps(repo_id)})  # applies alpha / rank: no further scale is needed
pipe.vae.enable_tiling()

image = load_image("first_frame.png")  # as wide and high as the video, or it is squeezed
video = pipe(image, {json.dumps(prompt, ensure_ascii=False)}{arguments}).frames[0]
export_to_video(video, "video.mp4", fps={fps})"""


def card_metadata(base_model: str, widget: list[dict], id_token: str | None) -> ModelCardData:
    """The front matter that the Hub reads: what to show, what the LoRA belongs to, and its licence."""
    optional = {"instance_prompt": id_token, "widget": widget, "base_model": base_model}
    try:
        validate_repo_id(base_model)
    except HFValidationError:  # the name of a local folder: the Hub would refuse the whole card
        optional["base_model"] = None
    tags = [KIND, "diffusers-training", "diffusers", "lora", "cogvideox", "template:sd-lora"]
    optional = {name: value for name, value in optional.items() if value}
    license_of = LICENSES.get(base_model.split("/")[-1].lower(), {"license": "other"})
    return ModelCardData(library_name="diffusers", pipeline_tag=KIND, tags=tags, **license_of, **optional)


def save_model_card(
    repo_id: str, videos: list | None = None, base_model: str | None = None,
    validation_prompt: str | list[str] | None = None, repo_folder: str | None = None, fps: int = 8,
    id_token: str | None = None, settings: dict | None = None,
) -> None:
    """Write README.md, the model card, into `repo_folder`, and what it shows beside it: `videos` (mp4 files,
    [F, H, W, C] in [0, 1] each, or lists of images), as final_video_N.mp4, and the losses of metrics.jsonl, as
    loss.png. `validation_prompt` is that of all videos, or a list with one for each; `settings` become a table."""
    folder, widget, settings = Path(repo_folder or "."), [], settings or {}
    base_model = base_model or "THUDM/CogVideoX-5b"
    base_model = Path(base_model).name if Path(base_model).is_dir() else base_model  # where it lay is nobody's concern
    prompts = [validation_prompt] if isinstance(validation_prompt, str) else validation_prompt or []
    for index, video in enumerate(videos if videos is not None else []):
        name = f"final_video_{index}.mp4"
        if isinstance(video, Path):
            shutil.copyfile(video, folder / name)
        else:
            export_to_video(list(video), str(folder / name), fps=fps)
        widget.append({"text": prompts[min(index, len(prompts) - 1)] if prompts else "-", "output": {"url": name}})
    shape = {name: settings[name] for name in ("height", "width") if name in settings}
    if "max_num_frames" in settings:
        shape["num_frames"] = frames_4k_plus_1(settings["max_num_frames"])
    dtype = "float16" if settings.get("mixed_precision") == "fp16" else "bfloat16"
    prompt = prompts[0] if prompts else f"{id_token or ''} your prompt".strip()
    parts = [f"# {repo_id}", f"A LoRA for {KIND} with {base_model}."]
    if id_token:
        parts.append(f"Trigger word: `{id_token}`, at the beginning of the prompt.")
    parts.append(f"```py\n{usage_example(repo_id, base_model, prompt, fps, dtype, shape)}\n```")
    told = {name: value for name, value in settings.items() if value is not None and value is not False}
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in told.items()]
    if rows:
        parts.append("\n".join(["## Training", "", "| | |", "|---|---|", *rows]))
    metrics = folder / "metrics.jsonl"
    losses = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if losses := [row for row in losses if row["loss"] is not None]:
        draw_loss_curve(losses, folder / "loss.png")
        parts.append("![The loss over the steps](loss.png)")
    parts.append("The licence of the base model applies to these weights, too.")
    metadata = card_metadata(base_model, widget, id_token).to_yaml()
    ModelCard("\n\n".join([f"---\n{metadata}\n---", *parts]) + "\n").save(folder / "README.md")


def card_settings(args: argparse.Namespace, settings: dict, state: TrainingState) -> dict:
    """What the card tells of the training."""
    counted = {"clips": settings["num_clips"], "steps": state.step, "processes": settings["num_processes"]}
    return counted | {"mixed_precision": settings["mixed_precision"]} | {n: getattr(args, n) for n in CARD_FLAGS}


def check_hub_access(args: argparse.Namespace) -> str | None:
    """The repository that --push_to_hub will upload to, made now if it does not exist. Raises RunError where the
    upload could not be made, or would make public what is to be private."""
    if not args.push_to_hub:
        return None
    api, repo_id = HfApi(token=args.hub_token), args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        user = api.whoami()["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        api.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True)
        api.auth_check(repo_id, write=True)
        is_private = api.model_info(repo_id).private
    except Exception as error:  # no network, no token, no right: the Hub client says which
        how = "`hf auth login`, or --hub_token with a token that may write there"
        raise RunError(f"--push_to_hub: {repo_id} cannot be written on the Hub: {error}\n({how})") from error
    if args.hub_private_repo and not is_private:
        raise RunError(f"--hub_private_repo: {repo_id} exists and is public; its settings on the Hub can change that")
    logger.info(f"Hub: {repo_id} ({'private' if is_private else 'public'}), written by {user} at the end")
    return repo_id


def upload(args: argparse.Namespace, repo_id: str, names: list[str]) -> None:
    """Send these files of the output dir in one commit. Raises RunError, code 4, or 128 + n after a signal."""
    failed = None
    for wait in UPLOAD_WAITS:
        try:
            time.sleep(wait)
            files = [CommitOperationAdd(name, Path(args.output_dir) / name) for name in names]
            HfApi(token=args.hub_token).create_commit(repo_id, files, commit_message="LoRA, its card and samples")
            logger.info(f"Uploaded {', '.join(names)} to {repo_id}")
            return
        except Interrupted as error:
            failed = error
            break
        except Exception as error:
            failed = error
            logger.warning(f"The upload to {repo_id} failed: {error}")
            if getattr(getattr(error, "response", None), "status_code", None) in (400, 401, 403, 404):
                break  # and would fail again
    includes = " ".join(f"--include {name}" for name in names)
    raise RunError(
        f"the upload to {repo_id} failed: {str(failed) or 'it was interrupted'}\nEverything is in {args.output_dir}; "
        f"by hand, after `hf auth login`: hf upload {repo_id} {shlex.quote(args.output_dir)} {includes}",
        exit_code=128 + STOP.number if STOP.number else 4,
    ) from failed


# ---- Training -------------------------------------------------------------------------------------------------------


def get_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate as the flags and its own configuration want it. Raises RunError."""
    logging_dir = Path(args.output_dir) / args.logging_dir
    # A collective of NCCL that times out shall be an error here, and not the end of the process in a thread of NCCL's.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(logging_dir)),
            step_scheduler_with_optimizer=False,  # accelerate would step the schedule once a process
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=args.nccl_timeout)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else there are two of each gradient
            ],
        )
    except (ValueError, ImportError) as error:
        raise RunError(f"accelerate's configuration and these flags don't go together: {error}") from error
    except DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"the processes of this run did not find each other at {where} within {args.nccl_timeout} seconds "
            f"({error}): do all launchers have that address, can each machine reach it, were all of them started?",
            exit_code=5,
        ) from error
    if accelerator.mixed_precision not in DTYPES:
        raise RunError(f"accelerate's configuration says {accelerator.mixed_precision}: give --mixed_precision")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        there = f"accelerate's configuration says {accelerator.gradient_accumulation_steps}: let them agree"
        raise RunError(f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, and {there}")
    configure_engine(args, accelerator)
    return accelerator


def engine_name(accelerator: Accelerator) -> str:
    """How the processes hold what trains: "replicated" (each has it all), or the engine that spreads it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"deepspeed zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp2" if accelerator.is_fsdp2 else "replicated"


def configure_engine(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Tell the engine what the flags say. Raises RunError for one that cannot train a LoRA in fp32."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # with it the text encoder, too, would be spread over the processes
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["gradient_clipping"] = args.max_grad_norm  # DeepSpeed clips, and nobody else
        config["zero_force_ds_cpu_optimizer"] = False  # the optimizer is the one of --optimizer, offloaded too
        # DeepSpeed computes with a copy of the LoRA in the compute dtype; what it learns and sums up is fp32.
        config["communication_data_type"] = "fp32"
        config["data_types"] = config.get("data_types", {}) | {"grad_accum_dtype": "fp32"}
    elif accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise RunError("FSDP must be version 2 (fsdp_version: 2): the first one wants a single dtype in a block")
        if accelerator.mixed_precision == "fp16":
            raise RunError("FSDP2 trains in bf16 here: --mixed_precision bf16 (2B, too, learns in it)")
        dtype = DTYPES[accelerator.mixed_precision]
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False  # rotary positions stay fp32
        )


def go_on(args: argparse.Namespace) -> str:
    """How a run that ends here is taken up again."""
    complete = list_checkpoints(Path(args.output_dir))
    how = f" with --resume_from_checkpoint latest ({complete[-1].name})" if complete else ""
    return f"To go on, give the same command{how}."


def stopped(args: argparse.Namespace, when: str) -> RunError:
    """The one line that says how to go on."""
    number = STOP.number or signal.SIGTERM  # none: another process was told
    return RunError(f"stopped by {signal.Signals(number).name} {when}. {go_on(args)}", 128 + number)


def set_up_logging() -> None:
    """One log, above the bars, of the first process and the others' errors; of libraries, what a user can act on."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a child process that is killed keeps for ever
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING if is_first_process() else logging.ERROR)
    logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    if not (is_first_process() and sys.stderr.isatty()):
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.disable_progress_bar()
        disable_progress_bars()  # the Hub's


def not_finite(args: argparse.Namespace, step: int, what: str) -> RunError:
    complete = list_checkpoints(Path(args.output_dir))
    return RunError(
        f"step {step}: {what}. Nothing of this step was saved; the last checkpoint is "
        f"{complete[-1] if complete else 'none (--checkpointing_steps is more than the steps taken)'}. "
        "Try a lower --learning_rate, --mixed_precision bf16 in place of fp16, or a longer --lr_warmup_steps.",
        exit_code=3,
    )


def check_finite(args: argparse.Namespace, step: int, loss: float, grad_norm: float, step_skipped: bool) -> None:
    """End the run at a loss or gradients that are not finite. Raises RunError, code 3.

    An fp16 gradient may overflow: the gradient scaler then skips the step, and nothing is lost.
    """
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or step_skipped):
        raise not_finite(args, step, f"the loss is {loss}, the gradient norm {grad_norm}")


def check_weights(args: argparse.Namespace, step: int, transformer: CogVideoXTransformer3DModel) -> None:
    """End the run before weights that are not finite are saved over good ones. Raises RunError, code 3."""
    if not all_finite(lora_weights(transformer)):
        raise not_finite(args, step, "weights of the LoRA are not finite")


def start_trackers(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raises RunError, as for a tracker that nobody is logged in at."""
    name = args.tracker_name or DEFAULT_OUTPUT_DIR
    try:
        accelerator.init_trackers(name, tracker_config(args), {"wandb": {"dir": accelerator.logging_dir}})
    except Exception as error:  # each has its own
        raise RunError(f"--report_to {args.report_to}: {type(error).__name__}: {error}") from error


def start_logging(
    args: argparse.Namespace, accelerator: Accelerator, plan: TrainingPlan, step: int, num_clips: int,
    num_trainable: int,
) -> None:
    """Open the metrics file, from `step` on; say what is going to be trained."""
    if accelerator.is_main_process:
        start_metrics(Path(args.output_dir) / "metrics.jsonl", step)
    logger.info(f"Clips: {num_clips}, in batches of {plan.total_batch_size} a step, all processes together")
    logger.info(f"LoRA: {num_trainable:,} parameters of rank {args.rank}, applied at {args.lora_alpha / args.rank:g}")
    logger.info(f"Steps: {plan.max_train_steps}, {plan.steps_per_epoch} an epoch, {plan.num_epochs} epochs")


def train(
    args: argparse.Namespace, accelerator: Accelerator, prepared: Prepared, noise_scheduler: CogVideoXDPMScheduler,
    loader: DataLoader, sampler: ShapeBatchSampler, plan: TrainingPlan, state: TrainingState, last: LastStep,
    vae_config: dict, validate: Callable[[TrainingState], object], save: Callable[[], None],
) -> None:
    """The training loop, from wherever `state` is to the last step of `plan`. Raises RunError."""
    transformer, optimizer, lr_scheduler = prepared
    base = accelerator.unwrap_model(transformer)
    dtype = DTYPES[accelerator.mixed_precision]
    metrics_file = Path(args.output_dir) / "metrics.jsonl"
    style = bar_style(accelerator.is_main_process)
    progress = tqdm(total=plan.max_train_steps, initial=state.step, desc="Training", unit="step", **style)
    loss_sum, num_micro_batches, started = 0.0, 0, time.perf_counter()
    transformer.train()
    last.keep(state)
    STOP.at_once = False  # from here on a signal waits for the step's end
    while state.step < plan.max_train_steps:
        sampler.epoch, sampler.first_batch = state.epoch, state.batch
        for batch in loader:
            with accelerator.accumulate(transformer):
                latents = sample_latents(batch.moments, vae_config["scaling_factor"])  # [B, f, C, h, w]
                image_latents = sample_image_latents(  # I2V: [B, f, C, h, w]
                    batch.image_moments, latents.shape[1], vae_config, args.noised_image_dropout
                )
                rotary = rotary_for(base.config, latents, vae_scale_factor(vae_config))
                loss = diffusion_loss(  # I2V:
                    transformer, noise_scheduler, latents, image_latents, batch.prompt_embeds, rotary, dtype
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(transformer.parameters(), args.max_grad_norm)
                    last.drop()
                optimizer.step()
                optimizer.zero_grad()
            loss_sum, num_micro_batches, state.batch = loss_sum + loss.detach(), num_micro_batches + 1, state.batch + 1
            if not accelerator.sync_gradients:
                continue  # up to here nothing waits for the GPU

            lr_scheduler.step()
            state.step += 1
            last.keep(state)
            # A process that was told to stop tells the others here, so that all of them stop after the same step.
            norm, stop = (torch.as_tensor(x, device=loss_sum.device) for x in (whole(grad_norm), STOP.number))
            numbers = torch.stack([loss_sum / num_micro_batches, norm.float(), stop.float()])
            mean_loss, norm, stop = accelerator.reduce(numbers, reduction="mean").tolist()
            check_finite(args, state.step, mean_loss, norm, accelerator.optimizer_step_was_skipped)
            # As the originals logged it, the rate is the one that the schedule now stands at.
            metrics = {"loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0], "grad_norm": norm}
            metrics["seconds"] = round(time.perf_counter() - started, 4)
            if accelerator.is_main_process:
                attempt("Logging to the trackers", accelerator.log, tracker_scalars(metrics), step=state.step)
                attempt(f"Writing {metrics_file}", append_metrics, metrics_file, {"step": state.step, **metrics})
            progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{metrics['lr']:.2e}", refresh=False)
            progress.update()

            if state.step % args.checkpointing_steps == 0 or stop or state.step >= plan.max_train_steps:
                check_weights(args, state.step, base)
            if state.step % args.checkpointing_steps == 0 or stop:
                save()
            if stop:
                raise stopped(args, f"after step {state.step}")
            if state.step >= plan.max_train_steps:
                break
            if args.validation_steps and state.step % args.validation_steps == 0:
                validate(state)
            loss_sum, num_micro_batches, started = 0.0, 0, time.perf_counter()
        else:
            state.epoch, state.batch = state.epoch + 1, 0
            if not args.validation_steps and state.epoch % args.validation_epochs == 0:
                validate(state)
    progress.close()


def save_result(output_dir: Path, transformer: CogVideoXTransformer3DModel, weights: dict[str, torch.Tensor]) -> None:
    """Write what all this is for. Raises RunError, code 1."""
    try:
        save_lora(transformer, output_dir, weights)
    except (OSError, SafetensorError) as error:
        how = "once it can, --resume_from_checkpoint latest goes on from the last checkpoint"
        raise RunError(f"{output_dir / LORA_FILE} cannot be written: {error}; {how}", exit_code=1) from error
    logger.info(f"LoRA: {output_dir / LORA_FILE}")


def finish(
    args: argparse.Namespace, accelerator: Accelerator, peers: Peers, transformer: CogVideoXTransformer3DModel,
    validate: Callable[[], dict[Path, str]], repo_id: str | None, card: dict,
) -> None:
    """Save the LoRA, then sample it, write its card, and upload, in the order of what must not be lost. `card`: what
    the card tells of the training."""
    output_dir = Path(args.output_dir)
    peers.first(save_result, output_dir, transformer, lora_weights(transformer))
    videos = validate()
    peers.over.set()  # nobody waits for anybody any more
    if accelerator.is_main_process:
        about = (repo_id or output_dir.resolve().name, list(videos), args.pretrained_model_name_or_path)
        about += (list(videos.values()) or validation_prompts(args), args.output_dir, args.fps, args.id_token, card)
        attempt("Writing the model card", save_model_card, *about)
    attempt("Closing the trackers", accelerator.end_training)
    if STOP.number:
        raise stopped(args, "after the last step, with the LoRA saved")
    STOP.at_once = True
    if not accelerator.is_main_process:
        return
    if repo_id is not None:
        names = [LORA_FILE, "README.md", "loss.png", *(f"final_video_{index}.mp4" for index in range(len(videos)))]
        upload(args, repo_id, [name for name in names if (output_dir / name).is_file()])
    logger.info(f"Done. {output_dir} has the LoRA and its card, README.md; every loss is in metrics.jsonl")
    logger.info(f"To use it: pipe.load_lora_weights({json.dumps(args.output_dir)}); README.md has the whole code")
    how = "no checkpoint was written (--checkpointing_steps)"
    for newest in list_checkpoints(output_dir)[-1:]:
        how = f"the same command with --resume_from_checkpoint latest ({newest.name}) and more steps or epochs"
    logger.info(f"To train on: {how}")


def end_early(
    args: argparse.Namespace, accelerator: Accelerator, prepared: Prepared, last: LastStep, settings: dict,
    error: Exception,
) -> Exception:
    """What a training that cannot go on ends with: `error`, or RunError, code 5, where it comes of the loss of another
    process. The steps are saved where the error has left them whole."""
    if isinstance(error, RunError) and error.exit_code != 5:  # in all processes after the same step
        attempt("Closing the trackers", accelerator.end_training)
        return error
    rescue(args, accelerator, prepared, last, settings)
    for tracker in accelerator.trackers:  # and nothing that would wait for the others
        attempt(f"Closing {tracker.name}", tracker.finish)
    if isinstance(error, DistError) or "gloo" in str(error):  # nothing else tells gloo's errors from others
        error = gone("a process of this run is gone, or out of reach", error)
    if isinstance(error, RunError):
        return RunError(f"{error}. {go_on(args)}", exit_code=5)
    logger.error(go_on(args))
    return error


def start_from(args: argparse.Namespace, peers: Peers, settings: dict) -> Path | None:
    """The checkpoint that the run goes on from, None for a fresh start; what is half-written in the output folder is
    removed. Raises RunError."""
    output_dir = Path(args.output_dir)
    for folder in (output_dir, output_dir / args.logging_dir):
        peers.do(make_folder, "--output_dir", folder)
    if peers.count > 1:
        check_shared(peers, "--output_dir", output_dir)
    peers.first(clean_up, output_dir)
    checkpoint = peers.first(find_checkpoint, args)
    if checkpoint is not None:
        check_checkpoint(checkpoint, settings)
    elif args.resume_from_checkpoint:
        logger.info(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}, so this is a fresh start")
    return checkpoint


def precompute(
    args: argparse.Namespace, accelerator: Accelerator, peers: Peers, dataset: VideoDataset, text_length: int
) -> tuple[LatentDataset, dict[str, Path]]:
    """The encoded clips, and the files of all encoded prompts. Each encoder is on the device alone, and gone before
    the transformer comes. Raises RunError."""
    prompts = [dataset.prompt(index) for index in range(len(dataset))]
    all_prompts = [*prompts, *validation_prompts(args), ""]
    prompt_files = precompute_prompts(args, accelerator, peers, all_prompts, text_length)
    video_files = precompute_videos(args, accelerator, peers, dataset)
    usable = [(files, prompt_files[prompt]) for files, prompt in zip(video_files, prompts, strict=True) if files]
    return LatentDataset(*map(list, zip(*usable, strict=True))), prompt_files


def main(args: argparse.Namespace) -> None:
    """Check, precompute, train, save, publish: the data flow from top to bottom. Raises RunError."""
    set_up_logging()
    check_args(args)
    transformer_config, vae_config = read_config(args, "transformer"), read_config(args, "vae")
    check_model(args, transformer_config, vae_config)
    dataset = VideoDataset(**{name: getattr(args, name) for name in inspect.signature(VideoDataset).parameters})
    find_checkpoint(args)  # a wrong one is said before anything is written
    accelerator = get_accelerator(args)
    peers = Peers(accelerator.process_index, accelerator.num_processes, args.nccl_timeout)
    repo_id = peers.first(check_hub_access, args)
    settings = run_settings(args, accelerator, len(dataset))
    checkpoint = start_from(args, peers, settings)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed
    state = TrainingState(seed=peers.gather(seed)[0])
    frames = frames_4k_plus_1(args.max_num_frames)
    if frames != args.max_num_frames:
        logger.warning(f"--max_num_frames {args.max_num_frames} is not 4k+1: {frames} frames are used.")

    latents, prompt_files = precompute(args, accelerator, peers, dataset, transformer_config["max_text_seq_length"])
    peers.first(start_trackers, args, accelerator)  # not earlier: their threads and forked decoders don't go together
    loader, sampler = get_dataloader(args, accelerator, latents, state.seed)
    plan = plan_training(args, len(sampler), accelerator.num_processes)
    check_lengths(transformer_config, sampler.shapes)  # I2V:

    set_seed(state.seed)  # the LoRA starts the same in all processes
    transformer = load_transformer(args, DTYPES[accelerator.mixed_precision])
    trainable = add_lora(transformer, args.rank, args.lora_alpha)
    noise_scheduler = CogVideoXDPMScheduler.from_pretrained(subfolder="scheduler", **pretrained_source(args))
    num_trainable = sum(parameter.numel() for parameter in trainable)
    peers.gather("loaded")  # a slow disk must not make the others' first collective give up
    prepared = prepare(args, accelerator, transformer, trainable, plan)
    accelerator.register_save_state_pre_hook(save_no_base)
    accelerator.register_load_state_pre_hook(load_no_base)
    set_seed(state.seed, device_specific=True)  # each process draws its own noise
    if checkpoint is not None:
        state = resume(accelerator, prepared, checkpoint, settings)
        sampler.seed = state.seed

    start_logging(args, accelerator, plan, state.step, len(latents), num_trainable)
    base, last = accelerator.unwrap_model(prepared.transformer), LastStep(accelerator.device)
    validate = functools.partial(run_validation, args, accelerator, peers, base, noise_scheduler, prompt_files)
    save = functools.partial(save_checkpoint, args, accelerator, prepared, state, settings)
    try:
        train(
            args, accelerator, prepared, noise_scheduler, loader, sampler, plan, state, last, vae_config, validate,
            save,
        )
    except Exception as error:
        raise end_early(args, accelerator, prepared, last, settings, error) from None
    card = card_settings(args, settings | {"num_clips": len(latents)}, state)
    finish(args, accelerator, peers, base, functools.partial(validate, state, is_final=True), repo_id, card)


def end_children() -> None:
    """The loading processes ignore signals: at an error, this process would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would make an error of their end
    for child in multiprocessing.active_children():
        child.kill()


def command_line() -> None:
    """Run as a script: a problem that has a name ends in one message a machine, and its exit code."""
    STOP.listen()
    code = 0
    try:
        args = get_args()
        try:
            main(args)
        except Interrupted:
            raise stopped(args, "before the first step; what is encoded is kept") from None
    except RunError as error:
        code = error.exit_code
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process a machine, as another one's may be out of sight
            print(f"{Path(sys.argv[0]).name}: {'' if code > 128 else 'error: '}{error}", file=sys.stderr, flush=True)
    finally:
        end_children()
    if code == 5:
        os._exit(code)  # to take the process group down may wait for the one that is gone
    sys.exit(code)


if __name__ == "__main__":
    command_line()
