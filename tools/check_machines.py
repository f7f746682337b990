"""Whether the processes of a launch reach each other, and how fast: for a training on several machines that hangs.

    CHECK=1 … bash scripts/train_multi_node.sh        or any `accelerate launch … tools/check_machines.py`

Each process says where it is, then all of them add up a tensor of the size of a LoRA's gradients. What can't be
reached ends in a message after a minute instead of ten.
"""

import os
import socket
import sys
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

SECONDS = 60
MEGABYTES = 256  # about the gradients of rank 64 for the 5B
ADVICE = """Look at: the same MASTER_ADDR and MASTER_PORT everywhere, and meaning the first machine (not 127.0.0.1) \
on each of them; a firewall between them (all ports are needed, not that one alone); NODE_RANK 0, 1, … once each; as \
many machines started as NODES says; on machines with several networks NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."""


def check() -> None:
    """Prints what it finds. Raises RuntimeError where processes don't find each other."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    print(f"process {rank} of {count} on {socket.gethostname()}: looking for the others at {where}", flush=True)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=SECONDS))])
    hosts = gather_object([socket.gethostname()])
    gradients = torch.ones(MEGABYTES * 2**20 // 4, device=accelerator.device)  # fp32
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        total = accelerator.reduce(gradients, reduction="sum")[-1].item()
        seconds.append(time.perf_counter() - started)
    if total != accelerator.num_processes:
        raise RuntimeError(f"the sum of {accelerator.num_processes} ones is {total}")
    if accelerator.is_main_process:
        best = min(seconds[1:])  # the first one sets up the connections
        names = sorted(set(hosts))
        print(f"{len(hosts)} processes on {len(names)} machines reach each other: {', '.join(names)}")
        print(f"{MEGABYTES} MB added up over all of them, {accelerator.device.type}: {best:.3f} s")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        check()
    except RuntimeError as error:  # torch's errors of communication are of this kind
        print(f"{socket.gethostname()}: {error}\n{ADVICE}", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for those that are not there
