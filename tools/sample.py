"""Sample with the LoRAs of a run: of several steps, at several strengths, for several prompts, start images and seeds.

    python tools/sample.py OUTPUT_DIR [--prompts TEXT ...] [--images FILE ...] [--steps 1000 1500]
        [--strengths 0.5 0.8 1 1.2] [--seeds 42 43] [flags of the training script]

The videos are written to OUTPUT_DIR/samples, and tools/report.py shows them as a grid. The model is loaded by the
training script, with the flags of the run: whoever can train can sample. Flags of the script that are given here, such
as --offload_base or --num_inference_steps 30, take the place of those of the run. The clips are not needed.
"""

import argparse
import hashlib
import itertools
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from training_script import ending_as, load_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "text-to-video": "train_cogvideox_lora.py",
    "image-to-video": "train_cogvideox_image_to_video_lora.py",
}
SEPARATOR = "\0"  # between prompts, in which it cannot be


def read_json(path: Path) -> dict:
    """Return what is in a JSON file, or {} where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def run_args(script: ModuleType, own: Namespace, flags: list[str], about: dict) -> Namespace:
    """Return the script's flags: those of the run, where `flags` has no others, with the prompts and images of the
    command line. Raises the script's RunError for data that cannot be sampled from."""
    of_run = about["args"]
    base = ["--pretrained_model_name_or_path", of_run["pretrained_model_name_or_path"]]
    args = script.get_args([*base, *flags])
    given = set()
    for word in flags:
        beginning = word.removeprefix("--").split("=")[0]
        if word.startswith("--"):
            # argparse takes unique beginnings of flags for them.
            given |= {beginning} & vars(args).keys() or {name for name in vars(args) if name.startswith(beginning)}
    for name, value in of_run.items():
        # A flag of an older version may be gone.
        if hasattr(args, name) and name not in given:
            setattr(args, name, value)
    args.output_dir = str(own.folder)
    if "mixed_precision" not in given:
        args.mixed_precision = about["settings"]["mixed_precision"]
    if "compile" not in given:
        args.compile = False  # which takes longer than a few videos
    if not script.precompute_folder(args).is_dir():  # it went with the clips
        args.precompute_dir = str(own.folder / ".cogvideox_precomputed")
    separator = args.validation_prompt_separator
    prompts = own.prompts or (args.validation_prompt or "").split(separator)
    if not any(prompts):
        raise script.RunError("no prompts: the run has no --validation_prompt, so give --prompts")
    args.validation_prompt = SEPARATOR.join(prompts)
    if script.KIND == "image-to-video":
        images = own.images or (args.validation_images or "").split(separator)
        if len(images) == 1:
            images *= len(prompts)  # one image for all
        args.validation_images = SEPARATOR.join(images)
    args.validation_prompt_separator = SEPARATOR
    return args


def find_loras(script: ModuleType, folder: Path, steps: list[int] | None) -> dict[str, tuple[int, Path]]:
    """Return step and file of the finished LoRA, or of those of `steps`, by name. Raises the script's RunError."""
    if steps is None:
        path = folder / script.LORA_FILE
        state = read_json(folder / "state.json")
        found = {"final": (state.get("lora_step", state.get("step", 0)), path)}
        missing = [] if path.is_file() else [str(path)]
    else:
        found = {}
        missing = []
        for step in steps:
            paths = [script.lora_path(folder, step), folder / f"checkpoint-{step}" / script.LORA_FILE]
            existing = [path for path in paths if path.is_file()]
            if existing:
                found[f"step-{step:06d}"] = (step, existing[0])
            else:
                missing.append(str(paths[0]))
    if missing:
        kept = sorted([*folder.glob("loras/*.safetensors"), *folder.glob(f"checkpoint-*/{script.LORA_FILE}")])
        there = script.listing([str(path) for path in kept]) or "  none"
        raise script.RunError(f"there is no {' and no '.join(missing)}. The run has kept:\n{there}")
    return found


def load_lora(script: ModuleType, transformer, path: Path) -> None:
    """Put a LoRA's file into the transformer's layers. At strength 1 they apply it as it was trained."""
    about = script.open_lora(str(path))[1]
    alpha = about["lora_alpha"] or about["rank"]
    script.load_lora(transformer, path, alpha / about["rank"])


def set_strength(script: ModuleType, transformer, strength: float) -> None:
    """Have the transformer's layers apply their LoRA with this strength."""
    for layer in transformer.modules():
        if isinstance(layer, script.LoraLinear):
            layer.scale = strength


def load_pipeline(script: ModuleType, args: Namespace, accelerator, lora: Path):
    """Return the pipeline of the training's samples, with layers for LoRAs like `lora`, and prompts as embeddings."""
    dtype = script.DTYPES[accelerator.mixed_precision]
    about = script.open_lora(str(lora))[1]
    transformer = script.load_transformer(args, dtype)
    script.add_lora(transformer, about["rank"], about["rank"], about["lora_target_modules"], about["lora_blocks"])
    script.place_transformer(args, transformer, accelerator.device)
    transformer.eval()
    vae = script.load_vae(args, dtype).to(accelerator.device)
    held = sum(parameter.nbytes for parameter in transformer.parameters())
    whole_frames = args.height * args.width * script.DECODED_PIXEL * dtype.itemsize  # bytes
    if script.needs_tiles(args, accelerator, held + whole_frames):
        vae.enable_tiling(*script.SMALL_TILES)
    source = script.pretrained_source(args, "scheduler")
    noise_scheduler = script.load_component(script.CogVideoXDPMScheduler, source)
    return script.PIPELINE(None, None, vae, transformer, noise_scheduler)


def sample(script: ModuleType, args: Namespace, own: Namespace) -> list[Path]:
    """Write a video for each LoRA, strength, prompt and seed, with a line about each in samples/index.jsonl. Return
    the videos. Raises the script's RunError."""
    loras = find_loras(script, own.folder, own.steps)
    accelerator, _ = script.get_accelerator(args)
    script.log_device(accelerator)
    transformer_config, _ = script.read_config(args, "transformer")
    script.check_model(args, transformer_config, script.read_config(args, "vae")[0])
    script.check_model_files(args)
    inputs = script.validation_inputs(args)
    images = [None] * len(inputs)
    if script.KIND == "image-to-video":
        images = args.validation_images.split(SEPARATOR)
    prompts = [each["prompt"] for each in inputs]
    num_tokens = transformer_config["max_text_seq_length"]
    script.precompute_folder(args).mkdir(parents=True, exist_ok=True)
    prompt_files = script.precompute_prompts(args, accelerator, [*prompts, ""], num_tokens)
    pipe = load_pipeline(script, args, accelerator, next(iter(loras.values()))[1])
    folder = own.folder / "samples"
    folder.mkdir(exist_ok=True)
    files = []
    wanted = list(itertools.product(own.strengths, zip(inputs, images, strict=True), own.seeds))
    number = len(loras) * len(wanted)
    for name, (step, path) in loras.items():
        load_lora(script, pipe.transformer, path)
        for strength, (each, image), seed in wanted:
            set_strength(script, pipe.transformer, strength)
            pipeline_args = script.pipeline_inputs(args, each, prompt_files, accelerator.device)
            shown = hashlib.sha256(f"{each['prompt']}\0{image}".encode()).hexdigest()[:8]
            file = folder / f"{name}_strength-{strength:g}_seed-{seed}_{shown}.mp4"
            label = f"Sampling {len(files) + 1} of {number}"
            pipe.set_progress_bar_config(desc=label, disable=not sys.stderr.isatty(), leave=False)
            seeded = Namespace(**vars(args) | {"seed": seed})
            script.log_validation(pipe, seeded, accelerator, pipeline_args, step, files=[file])
            row = {
                "lora": name, "step": step, "strength": strength, "prompt": each["prompt"], "image": image,
                "seed": seed, "file": file.name,
            }  # fmt: skip
            with (folder / "index.jsonl").open("a") as index:
                index.write(f"{json.dumps(row)}\n")
            script.logger.info(f"{len(files) + 1} of {number}: {file}")
            files.append(file)
    return files


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="--output_dir of a run")
    prompts = "default: those of --validation_prompt"
    parser.add_argument("--prompts", "--prompt", nargs="+", metavar="TEXT", help=prompts)
    images = "start images, one for all prompts or one for each (image-to-video); default: --validation_images"
    parser.add_argument("--images", "--image", nargs="+", metavar="FILE", help=images)
    steps = "LoRAs of these steps, of loras/ or of checkpoints; default: the finished LoRA"
    parser.add_argument("--steps", "--step", nargs="+", type=int, metavar="N", help=steps)
    strengths = "how strongly the LoRA is applied: 1 is as trained, 0 the base model alone; default: 1"
    parser.add_argument("--strengths", "--strength", nargs="+", type=float, default=[1.0], metavar="X", help=strengths)
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: --seed of the run, or 0")
    own, flags = parser.parse_known_args(argv)
    about = read_json(own.folder / "run.json")
    if about.get("kind") not in SCRIPTS or "pretrained_model_name_or_path" not in about.get("args", {}):
        parser.exit(2, f"sample.py: error: {own.folder / 'run.json'} is missing: is this the --output_dir of a run?\n")
    script = load_script(ROOT / SCRIPTS[about["kind"]])
    script.set_up_logging()
    with ending_as(script, "sample.py"):
        args = run_args(script, own, flags, about)
        own.seeds = own.seeds or [args.seed or 0]
        sample(script, args, own)
    script.logger.info(f"To look at them: python tools/report.py {own.folder}")


if __name__ == "__main__":
    main()
