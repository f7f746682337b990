"""Seconds that T5-XXL takes for one prompt, on the GPU and on the CPU, with random weights.

    python benchmarks/text_encoder.py [--tiny]

It takes 8.9 GiB in bf16. Where a GPU has no room for it, the scripts have two of its blocks there. This tells
what the CPU would take instead. One of its 24 equal layers is measured there, and its time is multiplied by 24.
"""

import argparse
import time

import models
import torch
from transformers import T5Config, T5EncoderModel

LAYERS = models.TEXT_ENCODER["num_layers"]


def seconds(name: str, num_layers: int, dtype: torch.dtype, device: str) -> float:
    """The shortest of three calls of the text encoder of model `name`, with this number of layers."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        encoder = T5EncoderModel(T5Config(**models.text_encoder_config(name) | {"num_layers": num_layers})).eval()
    torch.set_default_dtype(torch.float32)
    tokens = torch.ones(1, models.TRANSFORMER["max_text_seq_length"], dtype=torch.long, device=device)
    times = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            encoder(tokens).last_hidden_state.sum().item()  # waits for the device
            times.append(time.perf_counter() - started)
    return min(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a narrow encoder, to try this program")
    args = parser.parse_args(argv)
    name = "tiny-5b" if args.tiny else "5b"
    threads = torch.get_num_threads()
    print("| T5-XXL, one prompt | dtype | seconds |\n|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.cuda.is_available() and dtype != torch.float32:
            print(f"| on the GPU | {dtype} | {seconds(name, LAYERS, dtype, 'cuda'):.3f} |", flush=True)
            torch.cuda.empty_cache()
        on_cpu = LAYERS * seconds(name, 1, dtype, "cpu")
        print(f"| on the CPU, {threads} threads | {dtype} | {on_cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()
