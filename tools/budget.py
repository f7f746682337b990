"""How often a run does what, and what stays on the disk: the arithmetic of tools/plan.py, without models."""

import math
from argparse import Namespace
from typing import NamedTuple

NUM_NOISE_LEVELS = 10  # of each held-out clip at each validation


class Kept(NamedTuple):
    """Files of one kind: how many are left at the end, how many there are at most, and the bytes of that many."""

    number: int
    most: int
    size: int


def share(number: int, num_processes: int) -> int:
    """Return how many of `number` things the process that has the most of them does."""
    return math.ceil(number / num_processes)


def num_micro_batches(args: Namespace, steps: int, micro_batches_an_epoch: int) -> int:
    """Return the micro-batches of each process in so many steps. The last step of an epoch has what is left of it."""
    steps_an_epoch = math.ceil(micro_batches_an_epoch / args.gradient_accumulation_steps)
    epochs, rest = divmod(steps, steps_an_epoch)
    return epochs * micro_batches_an_epoch + rest * args.gradient_accumulation_steps


def num_validations(args: Namespace, steps: int, steps_an_epoch: int) -> int:
    """Return how often a run of so many steps validates: before the first step, during the training, and at the end.
    After its last step it does so once."""
    before_the_last = max(0, steps - 1)
    if args.validation_steps:
        during = before_the_last // args.validation_steps
    else:
        during = before_the_last // steps_an_epoch // args.validation_epochs
    return 1 + during + 1


def samples_a_validation(args: Namespace, num_prompts: int, num_processes: int = 1) -> int:
    """Return how many videos a process samples at each validation. The prompts are shared among the processes."""
    return share(num_prompts, num_processes) * args.num_validation_videos


def checkpoints(args: Namespace, steps: int, num_parameters: int, state_size: int) -> Kept:
    """Return the checkpoints: at each --checkpointing_steps, and at the last step. One has the LoRA in fp32 and the
    optimizer's state. The oldest one is removed after the newest one is written."""
    written = math.ceil(steps / args.checkpointing_steps)
    number = written
    if args.checkpoints_total_limit is not None:
        number = min(written, max(1, args.checkpoints_total_limit))
    most = min(written, number + 1)
    return Kept(number, most, most * (4 * num_parameters + state_size))


def loras(args: Namespace, steps: int, validations: int, num_prompts: int, num_parameters: int) -> Kept:
    """Return the LoRAs in fp32: the finished one, and one of each validation after the first step, if any flag asks
    for validations. --loras_total_limit spares the best one by the loss of held-out clips."""
    is_asked = samples_a_validation(args, num_prompts) or args.eval_split or args.validation_steps
    written = validations - 1 if is_asked and steps else 0
    number = written
    limit = getattr(args, "loras_total_limit", None)
    if limit is not None:
        number = min(written, limit + bool(args.eval_split))
    most = min(written, number + 1)
    return Kept(1 + number, 1 + most, (1 + most) * 4 * num_parameters)


def duration(seconds: float) -> str:
    """Return a time in words, such as "26 h 31 min"."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
