"""Take all memory of the GPU but a few GiB, and hold it until this process is ended.

    python benchmarks/hold_memory.py 8

So a large card stands in for a small one, also for programs that ask how much is free.
"""

import sys
import time

import torch


def main() -> None:
    left = float(sys.argv[1])
    free, _ = torch.cuda.mem_get_info()  # after CUDA has taken what it needs for this process itself
    held = torch.empty(int(free - left * 2**30), dtype=torch.uint8, device="cuda")
    free, _ = torch.cuda.mem_get_info()
    print(f"{held.numel() / 2**30:.1f} GiB are held, {free / 2**30:.1f} GiB are free", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
