"""Time and memory of a training step of the real models, with random weights: each setting beside diffusers' example.

    python benchmarks/train_step.py 5b [--settings recomputed compiled] [--rank 128] [--steps 10]     on a GPU
    python benchmarks/train_step.py tiny                                                              on any machine
    python benchmarks/train_step.py --counted                                                         without a GPU

The first command builds the model from its published configuration, writes it to a temporary folder (11 GB for a 5B),
and runs the script's own functions on one random clip: 49 x 480 x 720, or 81 x 768 x 1360 for CogVideoX 1.5. Each
setting has a process of its own. Its first loss is compared with that of diffusers' example's way to compute a step:
diffusers' blocks, peft's layers in bf16, autocast. Operations are counted by tools/plan.py; they are those of the
setting without its recomputation, so that TFLOP/s compare. --counted prints memory, traffic and arithmetic of all
models and settings as tools/plan.py counts them. A table is printed, and JSON is written to benchmarks/results.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import models

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
RECOMPUTED, SMALL = ["--gradient_checkpointing"], ["--offload_activations", "--use_8bit_adam"]
SETTINGS = {
    "diffusers' example": RECOMPUTED,
    "no recomputation": [],
    "recomputed": RECOMPUTED,
    "attention kept": [*RECOMPUTED, "--checkpoint_policy", "attention"],
    "compiled": [*RECOMPUTED, "--compile"],
    "compiled, attention kept": [*RECOMPUTED, "--compile", "--checkpoint_policy", "attention"],
    "offloaded": [*RECOMPUTED, "--offload_activations"],
    "offloaded, 8-bit Adam, nf4": [*RECOMPUTED, *SMALL, "--quantize_base", "nf4"],
}
COUNTED = [name for name in SETTINGS if "compiled" not in name and "diffusers" not in name]
TINY = {"num_attention_heads": 4, "num_layers": 3, "time_embed_dim": 64, "text_embed_dim": 32, "sample_frames": 9,
        "sample_height": 8, "sample_width": 12}  # fmt: skip


def config_of(name: str) -> dict:
    return models.TRANSFORMER | TINY if name == "tiny" else models.transformer_config(name)


def clip_of(name: str) -> tuple[int, int, int]:
    """Latent frames, height and width."""
    return models.latent_shape(*((9, 64, 96) if name == "tiny" else models.clip_size(name)))


def dtype_of(name: str):
    """That of the published weights; fp32 for the tiny model, as CPUs are slow in half precision."""
    import torch

    return torch.float32 if name == "tiny" else getattr(torch, models.dtype_name(name))


def script_args(name: str, setting: str, rank: int, folder: str):
    """The script of the model, and its arguments for the setting."""
    script = importlib.import_module(models.script_name(name))
    common = ["--pretrained_model_name_or_path", folder, "--train_batch_size", "1", "--rank", str(rank)]
    return script, script.get_args([*common, "--lora_alpha", str(rank), *SETTINGS[setting]])


def measure(name: str, setting: str, rank: int, steps: int, folder: str) -> dict:
    """Seconds of each step, the first loss and the peak of the device's memory, in this process."""
    import torch
    from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
    from peft import LoraConfig

    script, args = script_args(name, setting, rank, folder)
    is_cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if is_cuda else "cpu"), dtype_of(name)
    torch.manual_seed(0)
    is_example = setting == "diffusers' example"
    if is_example:
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
        transformer.requires_grad_(False).add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=script.LORA_TARGETS, init_lora_weights=True)
        )
        transformer.enable_gradient_checkpointing()
        lora = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        for parameter in lora:
            parameter.data = parameter.data.to(dtype)
    else:
        transformer = script.load_transformer(args, dtype)
        lora = script.add_lora(transformer, rank, rank)
    transformer.to(device).train()
    optimizer = script.get_optimizer(args, lora)
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    config, vae_config, (frames, height, width) = transformer.config, models.vae_config(name), clip_of(name)
    batch = {"moments": torch.randn(1, 32, frames, height, width)}
    batch["image_moments"] = torch.randn(1, 32, 1, height, width)
    batch["prompt_embeds"] = torch.randn(1, config.max_text_seq_length, config.text_embed_dim)
    batch = {key: tensor.to(device, dtype) for key, tensor in batch.items()}
    seconds, losses, on_host = [], [], script.HostActivations(device)
    for _ in range(steps + 2):
        started = time.perf_counter()
        torch.manual_seed(1)
        latents, conditions = script.prepare_batch(batch, config, vae_config, args)
        with contextlib.ExitStack() as stack:
            if is_example:
                stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
            if args.offload_activations:
                stack.enter_context(on_host)
            loss = script.diffusion_loss(transformer, scheduler, latents, conditions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    return {"seconds": seconds[2:], "first_steps": seconds[:2], "loss": losses[0], "peak": peak}


def matrix_rate(name: str) -> float:
    """Operations per second of large matrix products in the model's dtype: the device's measured peak."""
    import torch

    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    matrix, rates = torch.randn(size, size, device=device, dtype=dtype_of(name)), []
    for _ in range(10):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def counted(name: str, setting: str, rank: int):
    """What tools/plan.py counts for a step."""
    import plan

    script, args = script_args(name, setting, rank, "none")
    return plan.training_cost(script, args, config_of(name), models.vae_config(name), clip_of(name), dtype_of(name))[0]


def print_counted(rank: int) -> None:
    print(f"| model | setting, rank {rank} | peak, GiB | of it the base | moved, GiB | of it casts | TFLOP |")
    print("|---|---|---|---|---|---|---|")
    for name in models.TRANSFORMERS:
        for setting in COUNTED:
            cost = counted(name, setting, rank)
            numbers = (cost.peak / 2**30, cost.parts["base"] / 2**30)
            moved = (cost.traffic / 2**30, cost.casts / 2**30, cost.flop / 1e12)
            columns = [f"{x:.1f}" for x in numbers] + [f"{x:,.0f}" for x in moved]
            print(f"| {name} | {setting} | {' | '.join(columns)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=["tiny", *models.TRANSFORMERS], default="5b")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="measured steps; two go before them")
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # a child process measures one setting
    args = parser.parse_args(argv)
    if args.counted:
        return print_counted(args.rank)
    if args.folder:
        return print(json.dumps(measure(args.model, args.settings[0], args.rank, args.steps, args.folder)))
    import torch
    from diffusers import CogVideoXTransformer3DModel

    is_cuda = torch.cuda.is_available()
    results = {
        "model": args.model, "rank": args.rank, "date": str(datetime.date.today()),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")}
        | {"python": platform.python_version()},
        "peak_flop_per_second": matrix_rate(args.model), "settings": {},
    }  # fmt: skip
    useful = counted(args.model, "no recomputation", args.rank).flop
    print(f"{args.model}, rank {args.rank}, {useful / 1e12:.3f} TFLOP a step, {results['device']}")
    print("| setting | s a step: median | min | max | TFLOP/s | of the peak | memory, GiB | loss, to the first |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device("cuda" if is_cuda else "cpu"):
            transformer = CogVideoXTransformer3DModel.from_config(config_of(args.model))
        transformer.to(dtype_of(args.model))
        transformer.save_pretrained(Path(folder, "transformer"))
        del transformer
        torch.cuda.empty_cache()
        for setting in args.settings:
            words = [args.model, "--settings", setting, "--rank", str(args.rank), "--steps", str(args.steps)]
            command = [sys.executable, __file__, *words, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {setting} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:100]} | | | | | | |")
                continue
            found = results["settings"][setting] = json.loads(done.stdout.strip().splitlines()[-1])
            middle, rate = median(found["seconds"]), useful / median(found["seconds"])
            times = f"{middle:.3f} | {min(found['seconds']):.3f} | {max(found['seconds']):.3f}"
            share, memory = rate / results["peak_flop_per_second"], found["peak"]
            memory = "-" if memory is None else f"{memory / 2**30:.1f}"
            plain = next(iter(results["settings"].values()))["loss"]
            loss = f"{found['loss']:.5f} ({found['loss'] / plain - 1:+.3%})"
            columns = [setting, times, f"{rate / 1e12:.2f}", f"{share:.0%}", memory, loss]
            print(f"| {' | '.join(columns)} |", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"{results['date']}-{args.model}-{results['device'].split(',')[0].replace(' ', '-')}.json"
    (args.results / name).write_text(json.dumps(results, indent=1))
    print(f"written to {args.results / name}")


if __name__ == "__main__":
    main()
