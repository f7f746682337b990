"""Time and memory of a training step of the real models, with random weights: each setting beside diffusers' example.

    python benchmarks/train_step.py 5b [--settings recomputed compiled] [--rank 128] [--steps 10]     on a GPU
    python benchmarks/train_step.py tiny-5b                                                           on any machine
    python benchmarks/train_step.py --counted                                                         without a GPU

The first command builds the model from its published configuration, writes it to --model_folder or to a temporary one
(11 GB for a 5B), and runs the script's own functions on one random clip: 49 x 480 x 720, or 81 x 768 x 1360 for
CogVideoX 1.5. One process measures the settings one after the other. If it dies, another one goes on with the next
setting. A setting that fails has its error in its row.

First loss, first gradient norm and last loss are compared with those of the first setting, which is diffusers'
example's way to compute a step: diffusers' blocks, peft's layers in bf16, autocast. "library's blocks" has diffusers'
blocks too, and all else as "recomputed". Three settings name the kernel that computes attention, where torch chooses
one in the others.

TFLOP/s are of the operations of a step without recomputation, as tools/plan.py counts them, so that they compare.
Memory, in GiB, is the peak of all tensors, beside it the peak that tools/plan.py counts; taken is what torch's
allocator took from the device to hold them. With --gib, torch may take no more, as on a smaller card. --counted prints
memory, traffic and arithmetic of all models and settings as tools/plan.py counts them.

A table is printed, and JSON is written to --results after each setting.
"""

import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import models

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
RECOMPUTED, SMALL = ["--gradient_checkpointing"], ["--offload_activations", "--use_8bit_adam"]
EXAMPLE, LIBRARY_BLOCKS = "diffusers' example", "library's blocks"
KERNELS = {  # by their names in torch.nn.attention.SDPBackend
    "cuDNN attention": "CUDNN_ATTENTION",
    "flash attention": "FLASH_ATTENTION",
    "efficient attention": "EFFICIENT_ATTENTION",
}
SETTINGS = {
    EXAMPLE: RECOMPUTED,
    "no recomputation": [],
    "recomputed": RECOMPUTED,
    LIBRARY_BLOCKS: RECOMPUTED,
    **dict.fromkeys(KERNELS, RECOMPUTED),
    "attention kept": [*RECOMPUTED, "--checkpoint_policy", "attention"],
    "compiled": [*RECOMPUTED, "--compile"],
    "compiled, attention kept": [*RECOMPUTED, "--compile", "--checkpoint_policy", "attention"],
    "offloaded": [*RECOMPUTED, "--offload_activations"],
    "base on the host": [*RECOMPUTED, "--offload_base"],
    "base on the host, attention kept": [*RECOMPUTED, "--offload_base", "--checkpoint_policy", "attention"],
    "base on the host, offloaded": [*RECOMPUTED, "--offload_base", "--offload_activations"],
    "base on the host, offloaded, 8-bit Adam": [*RECOMPUTED, "--offload_base", *SMALL],
    "offloaded, 8-bit Adam, nf4": [*RECOMPUTED, *SMALL, "--quantize_base", "nf4"],
}
PROCESSES = multiprocessing.get_context("spawn")  # a forked process may not be able to use CUDA
NOT_COUNTED = {EXAMPLE, LIBRARY_BLOCKS, "compiled", "compiled, attention kept"}  # plan.py knows the script's own way
COLUMNS = [
    "setting", "s a step: median", "min", "max", "TFLOP/s", "of the peak", "memory, GiB", "counted", "taken",
    "first loss", "first gradient norm", "last loss",
]  # fmt: skip


def dtype_of(name: str):
    """That of the published weights."""
    import torch

    return getattr(torch, models.dtype_name(name))


def latent_shape(name: str) -> tuple[int, int, int]:
    """Latent frames, height and width of the model's clip."""
    return models.latent_shape(*models.clip_size(name))


def script_args(name: str, setting: str, rank: int, folder: str):
    """The script of the model, and its arguments for the setting."""
    script = importlib.import_module(models.script_name(name))
    common = ["--pretrained_model_name_or_path", folder, "--train_batch_size", "1", "--rank", str(rank)]
    common += ["--lora_alpha", str(rank), "--learning_rate", "1e-3"]
    return script, script.get_args([*common, *SETTINGS[setting]])


def load_example(name: str, layers: list[str], rank: int, folder: str) -> tuple:
    """The transformer as diffusers' example prepares it, and its LoRA."""
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig

    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype_of(name))
    transformer.requires_grad_(False)
    torch.manual_seed(0)  # here and below: the same LoRA
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=True))
    transformer.enable_gradient_checkpointing()
    lora = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in lora:
        parameter.data = parameter.data.to(dtype_of(name))
    return transformer, lora


def load(name: str, setting: str, rank: int, folder: str) -> tuple:
    """The script, its arguments, the transformer (on the CPU, unless it is quantized) and its LoRA."""
    import torch
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    script, args = script_args(name, setting, rank, folder)
    if setting == EXAMPLE:
        return script, args, *load_example(name, script.LORA_TARGETS, rank, folder)
    transformer = script.load_transformer(args, dtype_of(name))
    if setting == LIBRARY_BLOCKS:
        for block in transformer.transformer_blocks:
            block.__class__ = CogVideoXBlock
    torch.manual_seed(0)
    return script, args, transformer, script.add_lora(transformer, rank, rank)


def random_batch(name: str, transformer_config, device) -> dict:
    """What the script's data loader would give for one clip of the model's size."""
    import torch

    torch.manual_seed(1)
    frames, height, width = latent_shape(name)
    batch = {
        "moments": torch.randn(1, 32, frames, height, width),
        "image_moments": torch.randn(1, 32, 1, height, width),
        "prompt_embeds": torch.randn(1, transformer_config.max_text_seq_length, transformer_config.text_embed_dim),
    }
    return {key: tensor.to(device, dtype_of(name)) for key, tensor in batch.items()}


def kernel_of(setting: str):
    """A context in which attention is computed by the kernel that the setting names."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if setting in KERNELS:
        return sdpa_kernel(getattr(SDPBackend, KERNELS[setting]))
    return contextlib.nullcontext()


def autocast_of(name: str, setting: str, device):
    """The autocast of diffusers' example. The script has none around a base that is in half precision already."""
    import torch

    if setting == EXAMPLE and not models.is_tiny(name):
        return torch.autocast(device.type, dtype_of(name))
    return contextlib.nullcontext()


def measure(name: str, setting: str, rank: int, steps: int, folder: str) -> dict:
    """Seconds of each step, losses, the first gradient norm and the peaks of the device's memory, in this process."""
    import torch
    from diffusers import CogVideoXDPMScheduler

    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    started = time.perf_counter()
    script, args, transformer, lora = load(name, setting, rank, folder)
    script.place_transformer(args, transformer, device)
    transformer.train()
    loading = time.perf_counter() - started
    optimizer = script.get_optimizer(args, lora)
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    config, vae_config = transformer.config, models.vae_config(name)
    batch = random_batch(name, config, device)
    on_host = script.saving_activations(args)
    seconds, losses, norms, retries = [], [], [], 0
    if is_cuda:
        torch.cuda.empty_cache()  # of what loading needed
        torch.cuda.reset_peak_memory_stats()
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
    for _ in range(steps + 2):
        started = time.perf_counter()
        torch.manual_seed(2)  # the same noise in each step
        latents, conditions = script.prepare_batch(batch, config, vae_config, args)
        with kernel_of(setting):  # also around the backward pass, which recomputes
            with autocast_of(name, setting, device), on_host:
                loss = script.diffusion_loss(transformer, scheduler, latents, conditions)
            loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(lora, args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - started)
    found = {"seconds": seconds[2:], "first_steps": seconds[:2], "loading": loading, "peak": None, "taken": None}
    found |= {"loss": losses[0], "norm": norms[0].item(), "last_loss": losses[-1]}
    if is_cuda:
        stats = torch.cuda.memory_stats()
        found["peak"] = stats["allocated_bytes.all.peak"]
        found["taken"] = stats["reserved_bytes.all.peak"]
        found["retries"] = stats["num_alloc_retries"] - retries  # how often the allocator gave back what it kept
    return found


def free_memory() -> None:
    """Free what an earlier model has left: compiled functions, cycles of objects, what the allocator keeps."""
    import torch

    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure_all(args: argparse.Namespace, settings: list[str], sender) -> None:
    """Send facts about the device, and then what is found for each setting. Runs in a process of its own."""
    import make_model
    import torch

    is_cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    make_model.write_transformer(args.model, Path(args.model_folder, "transformer"))
    sender.send({"device": device, "peak_flop_per_second": matrix_rate(args.model)})
    free_memory()
    if is_cuda and args.gib:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib * 2**30 / whole))
    for setting in settings:
        try:
            found = measure(args.model, setting, args.rank, args.steps, args.model_folder)
        except torch.AcceleratorError:
            raise  # this process has lost the device
        except Exception as error:
            message = str(error).strip().split("\n")[0]
            found = {"error": f"{type(error).__name__}: {message}"}
        free_memory()
        sender.send(found)


def measurements(args: argparse.Namespace) -> Iterator[tuple[str | None, dict]]:
    """Yield each setting and what is found for it; before them, of each process that measures, None and its device."""
    waiting = list(args.settings)
    while waiting:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=measure_all, args=(args, waiting, sender), daemon=True)
        process.start()
        sender.close()  # so that the other process has the only one: reading ends with it
        importlib.import_module("plan")  # counts, and takes as long to load as what the other process begins with
        try:
            yield None, receiver.recv()
        except EOFError:
            sys.exit("the process that measures ended before its first setting")
        try:
            while waiting:
                found = receiver.recv()
                yield waiting.pop(0), found
        except EOFError:
            process.join()
            yield waiting.pop(0), {"error": f"the process that measures ended with exit code {process.exitcode}"}
        process.join()


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
    configs = models.transformer_config(name), models.vae_config(name)
    return plan.training_cost(script, args, *configs, latent_shape(name), dtype_of(name))[0]


def print_counted(rank: int) -> None:
    print(f"| model | setting, rank {rank} | peak, GiB | of it the base | moved, GiB | of it casts | TFLOP |")
    print("|---|---|---|---|---|---|---|")
    for name in models.TRANSFORMERS:
        for setting in SETTINGS:
            if setting in NOT_COUNTED or setting in KERNELS:
                continue
            cost = counted(name, setting, rank)
            numbers = (cost.peak / 2**30, cost.parts["base"] / 2**30)
            moved = (cost.traffic / 2**30, cost.casts / 2**30, cost.flop / 1e12)
            columns = [f"{x:.1f}" for x in numbers] + [f"{x:,.0f}" for x in moved]
            print(f"| {name} | {setting} | {' | '.join(columns)} |", flush=True)


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f}"


def beside(value: float, first: float) -> str:
    """The value, and how far it is from that of the first setting."""
    return f"{value:.5g} ({value / first - 1:+.3%})" if first else f"{value:.5g}"


def row(setting: str, found: dict, first: dict, flop: int, peak_rate: float) -> str:
    """The line of the table for a setting. `first` is what was found for the first one, `flop` a step's operations."""
    if "error" in found:
        columns = [setting, found["error"][:160], *[""] * (len(COLUMNS) - 2)]
    else:
        times, rate = found["seconds"], flop / median(found["seconds"])
        columns = [setting, *(f"{seconds:.3f}" for seconds in (median(times), min(times), max(times)))]
        columns += [f"{rate / 1e12:.2f}", f"{rate / peak_rate:.0%}"]
        columns += [gib(found[key]) for key in ("peak", "counted", "taken")]
        for key in ("loss", "norm", "last_loss"):
            columns.append(beside(found[key], first[key]))
    return f"| {' | '.join(columns)} |"


def print_measured(args: argparse.Namespace) -> None:
    """Measure the settings; print the table, and write the results after each of them."""
    names = ("torch", "diffusers", "peft")
    results = {
        "model": args.model, "rank": args.rank, "gib": args.gib, "date": str(datetime.date.today()),
        "versions": {name: importlib.metadata.version(name) for name in names}
        | {"python": platform.python_version()},
        "settings": {},
    }  # fmt: skip
    flop, first, file = 0, None, args.results
    for setting, found in measurements(args):
        if setting is None:
            if "device" not in results:
                flop = counted(args.model, "no recomputation", args.rank).flop
                print(f"{args.model}, rank {args.rank}, {flop / 1e12:.3f} TFLOP a step, {found['device']}")
                print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
            results |= found
            continue
        found["counted"] = None if setting in NOT_COUNTED else counted(args.model, setting, args.rank).peak
        if first is None and "error" not in found:
            first = found
        print(row(setting, found, first, flop, results["peak_flop_per_second"]), flush=True)
        results["settings"][setting] = found
        if file is None:
            device = results["device"].split(",")[0].replace(" ", "-")
            file = ROOT / "benchmarks" / "results" / f"{results['date']}-{args.model}-{device}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1))
    if first is None:
        sys.exit("no setting could be measured")
    print(f"written to {file}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=models.NAMES, default="5b")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="measured steps; two go before them")
    parser.add_argument("--gib", type=float, help="device memory that torch may take")
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--results", type=Path, help="file (default: benchmarks/results/DATE-MODEL-DEVICE.json)")
    parser.add_argument("--model_folder", help="where the model is, or will be written (default: a temporary folder)")
    args = parser.parse_args(argv)
    if args.counted:
        print_counted(args.rank)
    elif args.model_folder:
        print_measured(args)
    else:
        with tempfile.TemporaryDirectory() as args.model_folder:
            print_measured(args)


if __name__ == "__main__":
    main()
