"""The GPUs that tools/plan.py knows: their memory and their rates."""

import argparse
import re
from typing import NamedTuple

CUDA_CONTEXT = 0.6  # GiB that CUDA and its libraries take for themselves


class Card(NamedTuple):
    """`memory`: what CUDA shows of it, in GiB. The rates are None for a card of which only the memory is known."""

    memory: float
    bandwidth: float | None = None  # bytes a second
    rate: float | None = None  # operations a second of matrix products
    is_turing: bool = False  # older than Ampere

    @property
    def limit(self) -> float:
        """Return the GiB that are left for tensors."""
        return self.memory - CUDA_CONTEXT


# Bandwidth and rate are NVIDIA's published ones. The rate is that of dense products in half precision with sums in
# fp32, which is how torch computes them: on GeForce cards half of the rate with sums in fp16. Sources: the data sheets
# of H200, H100 (SXM), A100 (SXM), L40S, L4, A10 and T4; "NVIDIA RTX Blackwell GPU Architecture" for 5090, 5080 and
# 5070, "NVIDIA Ada GPU Architecture" for 4090 and 4080, "NVIDIA Ampere GA102 GPU Architecture" for 3090 and A6000,
# "NVIDIA Turing GPU Architecture" for 2080 Ti (at the reference clock). For 4070 and 4060 it is the product of what
# their pages say (46 and 24 multiprocessors, 2.475 and 2.46 GHz) and of 512 operations, with which the same product
# gives the published rates of 4090, 4080, 5090, 5080 and 5070. Data center cards lose memory to ECC.
GPUS = {
    "h200": Card(139, 4.8e12, 989e12), "h100": Card(79, 3.35e12, 989e12), "a100": Card(79, 2.04e12, 312e12),
    "l40s": Card(44, 0.86e12, 362e12), "a6000": Card(47.4, 0.768e12, 154.8e12),
    "5090": Card(31.3, 1.792e12, 209.5e12), "4090": Card(23.5, 1.01e12, 165e12), "3090": Card(23.5, 0.94e12, 71e12),
    "a10": Card(22, 0.6e12, 125e12), "l4": Card(22, 0.3e12, 121e12), "5080": Card(15.4, 0.96e12, 112.6e12),
    "4080": Card(15.6, 0.717e12, 97.5e12), "t4": Card(14.6, 0.32e12, 65e12, is_turing=True),
    "5070": Card(11.5, 0.672e12, 61.7e12), "4070": Card(11.6, 0.504e12, 58.3e12),
    "2080ti": Card(10.7, 0.616e12, 53.8e12, is_turing=True), "4060": Card(7.7, 0.272e12, 30.2e12),
}  # fmt: skip
SHOWN = 0.96  # of the GB on its box, CUDA shows so many GiB of a card without ECC, and 0.92 of one with it


def card_of(gpu: str) -> Card:
    """Return the card of a name, or one of so many GB. Raises ValueError."""
    if gpu in GPUS:
        return GPUS[gpu]
    size = float(gpu)
    if not 1 <= size <= 1000:
        raise ValueError(f"{gpu} GB")
    return Card(SHOWN * size)


def gpu_name(text: str) -> str:
    """Return the value of --gpu in lower case. Raises argparse.ArgumentTypeError."""
    name = re.sub(r"nvidia|geforce|rtx|[\s-]", "", text.lower()).removesuffix("gb")
    try:
        card_of(name)
    except ValueError:
        names = ", ".join(GPUS)
        raise argparse.ArgumentTypeError(f"must be one of {names}, or a number of GB, not {text}") from None
    return name
