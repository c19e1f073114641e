"""Several processes (torchrun): set-up, the mean over them, a gather through which gradients flow, and the report of one that died."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import InputError


def setup(device: str) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun announces, if any; returns rank, number of processes and the device.

    `device` is auto (CUDA where there is one), cpu, cuda or cuda:N. NCCL on CUDA, gloo on a CPU. InputError where there
    is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device: {device}, expected auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device}, but torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices")
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, expected one for each of {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The first process validates alone: the others wait for it longer than the default of 10 or 30 minutes.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def shutdown() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if is_distributed():
        dist.barrier()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.batch
        return gradient[start:start + ctx.batch]


def gather(x: Tensor) -> Tensor:
    """[B,...] on each of N processes -> [N*B,...] on all, with gradients; x itself in a single process."""
    return _Gather.apply(x) if is_distributed() else x


def average_(values: Tensor) -> Tensor:
    """A tensor's mean over the processes, in its place."""
    if is_distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@contextmanager
def naming_dead_processes(file_of: Callable[[int], str | None]) -> Iterator[None]:
    """The death of a DataLoader worker, with the file that it was reading, or of another process of torchrun, as an InputError.

    file_of: the file that the process of this number reads, if any.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if dead := re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*?)(?: It is possible.*)?$", text):
            files = [name for number in dead[1].split(",") if (name := file_of(int(number)))]
            raise InputError(f"a worker died ({dead[2].strip(' .').removeprefix('is ')}) while it read {' or '.join(files) or 'its first file'}; "
                             "expected one that can be read, and enough memory (workers: 0 reads in the main process)") from None
        if is_distributed() and (isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|Connection (closed|reset)", text)):
            raise InputError(f"process {dist.get_rank()}: another process ended, or cannot be reached ({text[:200]}); continue with --resume") from None
        raise
