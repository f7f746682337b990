"""What training depends on, measured on this machine: versions, rates of matrix products, copies and attention, and
what pinned memory really takes.

    python benchmarks/device_facts.py [--results FILE] [--disk FOLDER]

Prints a table, and writes it to FILE as JSON. Sizes are those of the 5B with a clip of 49 x 480 x 720: 17,776 tokens,
48 heads of 64 channels. On a CPU they are small, and what needs a GPU is left out. A fact that cannot be found has its
error in its place.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

IS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if IS_CUDA else "cpu"
TOKENS, HEADS, CHANNELS = (17776, 48, 64) if IS_CUDA else (128, 4, 64)
SIDE = 8192 if IS_CUDA else 256  # of square matrices
BYTES = 2**30 if IS_CUDA else 2**22  # of a copy
BLOCK_INPUT = 2 * 17776 * 48 * 64  # bytes: what the 5B keeps of one block with recomputation
PACKAGES = [
    "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "huggingface_hub", "numpy",
]  # fmt: skip
FACTS = {}


def note(name: str, value, unit: str = "") -> None:
    FACTS[name] = value
    text = f"{value:.3g} {unit}" if isinstance(value, float) else value
    print(f"| {name} | {text} |", flush=True)


def attempt(name: str, measure: Callable, *arguments) -> None:
    """Call `measure`, which notes facts. If it fails, note under `name` why."""
    try:
        measure(*arguments)
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        note(name, f"{type(error).__name__}: {message[:160]}")


def wait() -> None:
    if IS_CUDA:
        torch.cuda.synchronize()


def once(function: Callable, *arguments) -> float:
    """Seconds of one call."""
    wait()
    started = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - started


def seconds(function: Callable, *arguments) -> float:
    """The median of three calls, after one that is not counted."""
    function(*arguments)
    return median(once(function, *arguments) for _ in range(3))


def note_versions(disk: Path) -> None:
    note("Python", platform.python_version())
    for package in PACKAGES:
        try:
            note(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            note(package, "not installed")
    note("CPU cores", os.cpu_count())
    note("free on the disk", shutil.disk_usage(disk).free / 1e9, "GB")
    if IS_CUDA:
        free, total = torch.cuda.mem_get_info()
        note("device", torch.cuda.get_device_name())
        note("device memory", total / 2**30, "GiB")
        note("of it free", free / 2**30, "GiB")


def note_products() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        matrix = torch.randn(SIDE, SIDE, device=DEVICE).to(dtype)
        note(f"matrix product, {dtype}", 2 * SIDE**3 / seconds(torch.matmul, matrix, matrix) / 1e12, "TFLOP/s")


def note_copies() -> None:
    there = torch.empty(BYTES, dtype=torch.uint8, device=DEVICE)
    note("copy on the device, read and written", 2 * BYTES / seconds(there.clone) / 1e9, "GB/s")
    if not IS_CUDA:
        return
    pinned = torch.zeros(BYTES, dtype=torch.uint8, pin_memory=True)
    pageable = torch.zeros(BYTES, dtype=torch.uint8)
    for name, host in (("pinned", pinned), ("not pinned", pageable)):
        note(f"to the host, {name}", BYTES / seconds(host.copy_, there, True) / 1e9, "GB/s")
        note(f"from the host, {name}", BYTES / seconds(there.copy_, host, True) / 1e9, "GB/s")


def pin_block_input() -> torch.Tensor:
    return torch.empty(BLOCK_INPUT, dtype=torch.uint8, pin_memory=True)


def note_pinned_memory() -> None:
    """torch may round a size up, for instance to a power of two, and keeps what is freed for the next request."""
    note("a block's input", BLOCK_INPUT / 1e6, "MB")
    if not IS_CUDA:
        return
    before = torch.cuda.host_memory_stats()
    note("pinned memory for it, the first time", 1e3 * once(pin_block_input), "ms")
    note("pinned memory for it, again", 1e3 * once(pin_block_input), "ms")
    held = pin_block_input()
    for name, value in torch.cuda.host_memory_stats().items():  # names and their meaning differ between versions
        if name.endswith("bytes.current"):
            note(f"pinned memory for it, {name}", (value - before.get(name, 0)) / 1e6, "MB")
    del held


def attend(query: torch.Tensor) -> None:
    F.scaled_dot_product_attention(query, query, query).sum().backward()


def note_kernel(name: str, backend: SDPBackend, query: torch.Tensor) -> None:
    flop = 7 * 2 * HEADS * TOKENS**2 * CHANNELS  # two matrix products, and five in the backward pass
    with sdpa_kernel(backend):
        note(name, flop / seconds(attend, query) / 1e12, "TFLOP/s")


def note_attention() -> None:
    query = torch.randn(1, HEADS, TOKENS, CHANNELS, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = f"attention, {backend.name}"
        attempt(name, note_kernel, name, backend, query)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        F.scaled_dot_product_attention(query, query, query)
    names = [event.key for event in profiled.key_averages() if "scaled_dot_product" in event.key]
    note("attention that torch itself takes", ", ".join(names))


def rotate(real: torch.Tensor, imaginary: torch.Tensor, cos: torch.Tensor, target: torch.Tensor) -> None:
    torch.addcmul(real * cos, imaginary, cos, value=-1, out=target)


def note_rotation() -> None:
    """What the scripts' rotary positions rely on: products of bf16 and fp32 are added in fp32, rounded once, and
    written into every second element of a tensor."""
    query = torch.randn(1, TOKENS, HEADS, CHANNELS, device=DEVICE, dtype=torch.bfloat16)
    cos = torch.rand(TOKENS, 1, CHANNELS // 2, device=DEVICE)
    real, imaginary = query.unflatten(-1, (-1, 2)).unbind(-1)
    target = torch.empty_like(query).unflatten(-1, (-1, 2)).unbind(-1)[0]
    note("rotation of half of the queries", 1e3 * seconds(rotate, real, imaginary, cos, target), "ms")
    exact = (real.double() - imaginary.double()) * cos.double()
    errors = (target / exact - 1)[exact != 0]
    note("its largest error (0.5: rounded once)", errors.abs().max().item() / 2**-7, "of bf16's last digit")


def note_disk(folder: Path) -> None:
    content, path = os.urandom(2**20) * (BYTES // 2**20), folder / "written"
    note("written to the disk", len(content) / once(path.write_bytes, content) / 1e9, "GB/s")
    path.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    parser.add_argument("--disk", type=Path, default=Path("."), help="a folder on the disk to measure")
    args = parser.parse_args(argv)
    print("| fact | value |\n|---|---|")
    attempt("versions", note_versions, args.disk)
    attempt("matrix product", note_products)
    attempt("copies", note_copies)
    attempt("pinned memory", note_pinned_memory)
    attempt("attention", note_attention)
    attempt("rotation", note_rotation)
    attempt("disk", note_disk, args.disk)
    if args.results:
        args.results.write_text(json.dumps(FACTS, indent=1))


if __name__ == "__main__":
    main()
