"""Processes (torchrun): set-up, means over them, a gather with gradients, naming one that died."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import InputError, one_line


def setup(device: str = "auto") -> tuple[int, int, torch.device]:
    """Join the process group that torchrun announces, if any; returns rank, number of processes, device.

    `device` is auto (CUDA where there is one), cpu, cuda or cuda:N. NCCL on CUDA, gloo on a CPU. InputError
    where there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device: {device}, expected auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        raise InputError(f"device: {device}, but torch {torch.__version__} finds {count} CUDA devices")
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= count:
            raise InputError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, "
                             f"expected one for each of {count} GPUs")
        torch.cuda.set_device(device)
    # The first process validates alone: the others may wait longer than the default of 10 or 30 minutes.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def shutdown() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if is_distributed() else 0


def wait() -> None:
    """Wait until all processes are here."""
    if is_distributed():
        dist.barrier()


def average_(values: Tensor) -> Tensor:
    """Replace a tensor by its mean over the processes, in place."""
    if is_distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather(x: Tensor) -> Tensor:
    """[B,...] on each of N processes -> [N*B,...] on all, with gradients; x itself in a single process."""
    return _Gather.apply(x) if is_distributed() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.batch = x.shape[0]
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every process's loss depends on this process's samples: their gradients add up.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)                               # Side.average_and_clip divides
        return gradient[rank() * ctx.batch:(rank() + 1) * ctx.batch]


@contextmanager
def naming_dead_processes() -> Iterator[None]:
    """Raise the death of a DataLoader worker or of another process of torchrun as an InputError."""
    try:
        yield
    except RuntimeError as error:
        text = one_line(error, 2000)
        dead = re.search(r"DataLoader worker .* (killed by signal: [\w ]+|exited unexpectedly)", text)
        if dead:
            raise InputError(f"a worker died ({dead[1]}) while it read an image, expected readable files "
                             "(--dry-run) and enough memory (workers: 0 reads in the main process)") from None
        if is_distributed() and (isinstance(error, dist.DistError)
                                 or re.search(r"gloo|NCCL|Connection (closed|reset)", text)):
            raise InputError(f"process {rank()}: another process ended, or cannot be reached ({text[:200]}); "
                             "continue with --resume") from None
        raise
