"""Check whether the processes of a launch reach each other, and how fast: for a training that hangs at its start.

    CHECK=1 ... bash scripts/train_multi_node.sh        or any `accelerate launch ... tools/check_machines.py`

Each process prints where it runs. Then all of them add up a tensor of the size of a LoRA's gradients. If a process is
not reached, a message says so after a minute.
"""

import os
import socket
import sys
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

SECONDS = 60  # to wait for the other processes
MEGABYTES = 256  # about the gradients of rank 64 for the 5B
ADVICE = """Check these:
- MASTER_ADDR and MASTER_PORT are the same on all machines; the address is the first machine's on each (not 127.0.0.1)
- no firewall is between the machines: all ports are needed, not only this one
- each machine has its own NODE_RANK: 0, 1, ...
- as many machines were started as NODES says
- the machines can resolve each other's host names (if they cannot: RESTARTS=0)
- on machines with several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the one to use"""


def check() -> None:
    """Prints the result. Raises RuntimeError if processes do not reach each other."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    print(f"process {rank} of {count} on {socket.gethostname()}: connecting to the others at {where}", flush=True)
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
        best = min(seconds[1:])  # the first reduction also sets up the connections
        names = sorted(set(hosts))
        print(f"{len(hosts)} processes on {len(names)} machines reach each other: {', '.join(names)}")
        print(f"{MEGABYTES} MB added up over all of them, {accelerator.device.type}: {best:.3f} s")
    accelerator.end_training()


def main() -> None:
    try:
        check()
    except RuntimeError as error:  # torch's communication errors are RuntimeErrors
        print(f"{socket.gethostname()}: {error}\n{ADVICE}", file=sys.stderr, flush=True)
        os._exit(1)  # end at once: the normal exit would wait for the other processes


if __name__ == "__main__":
    main()
