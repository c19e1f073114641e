"""Processes (torchrun): set-up, means over them, a gather with gradients, naming one that died."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from utils.errors import InputError, one_line

# What DataLoader workers raise, what it means, and what helps.
WORKER_ERRORS = {
    r"Too many open files|ancdata": "too many open files, expected a higher limit (ulimit -n), fewer workers",
    r"Bus error|(shm|shared memory).*No space left":
        "shared memory (/dev/shm) is full, expected a larger one (docker: --shm-size), or workers: 0",
    r"DataLoader worker .* (killed by signal: [\w ]+|exited unexpectedly)":
        "a worker died ({0[1]}) while it read an image, expected readable files (--dry-run), enough memory "
        "and /dev/shm (workers: 0 reads in the main process)"}


def setup() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun announces, if any; returns rank, number of processes, device.

    That is a GPU for each process, with NCCL, or the CPU, with gloo. InputError where GPUs are too few.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, device
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, "
                             f"expected one for each of {gpus} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The first process validates alone: the others may wait longer than the default of 10 or 30 minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_(values: Tensor) -> Tensor:
    """Replace a tensor by its mean over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather(x: Tensor) -> Tensor:
    """[B,...] on each of N processes -> [N*B,...] on all; x itself in a single process.

    Its gradient is the sum of all processes' losses; Side.average_and_clip divides by N.
    """
    return torch.cat(all_gather(x)) if dist.is_initialized() else x


@contextmanager
def naming_dead_processes() -> Iterator[None]:
    """Raise what ended a DataLoader worker or another process of torchrun as an InputError with the cure."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:          # EOFError: a worker cannot send its batch
        text = "Too many open files" if isinstance(error, EOFError) else one_line(error, 20_000)
        for pattern, message in WORKER_ERRORS.items():
            if found := re.search(pattern, text):
                raise InputError(message.format(found)) from None
        if dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or re.search(r"gloo|NCCL|Connection (closed|reset)", text)):
            raise InputError(f"process {rank()}: another process ended, or cannot be reached ({text[:200]}); "
                             "continue with --resume") from None
        raise
