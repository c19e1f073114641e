"""Several processes (torchrun): set-up, means over them, a gather with gradients, naming one that died.

And `Side`, a side of the alternation, whose gradients are averaged over the processes.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError, one_line


def setup(device: str = "auto") -> tuple[int, int, torch.device]:
    """Join the process group that torchrun announces, if any; returns rank, number of processes, device.

    `device` is auto (CUDA where there is one), cpu, cuda or cuda:N. NCCL on CUDA, gloo on a CPU. InputError
    where there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device: {device}, expected auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device}, but torch {torch.__version__} finds "
                         f"{torch.cuda.device_count()} CUDA devices")
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, expected one for "
                             f"each of {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    # The first process validates alone: the others may wait longer than the default of 10 or 30 minutes.
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
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)                               # Side.average_and_clip divides
        start = rank() * ctx.batch
        return gradient[start:start + ctx.batch]


def gather(x: Tensor) -> Tensor:
    """[B,...] on each of N processes -> [N*B,...] on all, with gradients; x itself in a single process."""
    return _Gather.apply(x) if is_distributed() else x


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if is_distributed() else 0


def average_(values: Tensor) -> Tensor:
    """A tensor's mean over the processes, in its place."""
    if is_distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@contextmanager
def naming_dead_processes() -> Iterator[None]:
    """The death of a DataLoader worker or of another process of torchrun as an InputError."""
    try:
        yield
    except RuntimeError as error:
        text = one_line(error, 2000)
        dead = re.search(r"DataLoader worker .* (killed by signal: [\w ]+|exited unexpectedly)", text)
        if dead:
            raise InputError(f"a worker died ({dead[1]}) while it read an image, expected readable files "
                             "(python -m data.check) and enough memory (workers: 0 reads in the main "
                             "process)") from None
        if is_distributed() and (isinstance(error, dist.DistError)
                                 or re.search(r"gloo|NCCL|Connection (closed|reset)", text)):
            raise InputError(f"process {rank()}: another process ended, or cannot be reached ({text[:200]}); "
                             "continue with --resume") from None
        raise


# Far below the gradients: with torch's 1e-8 the latent's parameters, whose gradients are that small, hardly move.
ADAM_EPS = 1e-15


class Side:
    """One side of the alternation: parameters that descend one loss, their optimizer, their flat gradient.

    A step on it reads

        side.thaw()
        loss = ...
        loss.backward()
        norm = side.average_and_clip(loss, clip)
        side.optimizer.step()
        side.freeze()

    Nothing in it waits for a GPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = list(parameters), optimizer
        self.learning_rate = optimizer.param_groups[0]["lr"]
        first, size = self.parameters[0], sum(p.numel() for p in self.parameters)
        self.gradient = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.rate = torch.zeros((), device=first.device)            # where a recorded step reads it
        optimizer.register_load_state_dict_pre_hook(self._as_here)

    def _as_here(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """A checkpoint's state, perhaps of a CPU or of several GPUs, becomes one of this optimizer."""
        for group in state["param_groups"]:
            group["capturable"] = optimizer.defaults["capturable"]

    def set_learning_rate(self, factor: float) -> None:
        """The share of the first learning rate that holds from now on."""
        rate = self.learning_rate * factor
        recorded = self.optimizer.defaults["capturable"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.fill_(rate) if recorded else rate

    def thaw(self) -> None:
        """Let the parameters require gradients, which are zero."""
        self.gradient.zero_()
        parts = self.gradient.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())       # in its own layout

    def freeze(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def average_and_clip(self, loss: Tensor, clip: float = 0.0) -> Tensor:
        """Average the gradients over the processes and clip to norm `clip` (0: not); returns the norm before.

        Where the loss of any process or the norm is not finite, the norm is nan, and the optimizer's next
        step leaves the parameters as they are.
        """
        average_(self.gradient)
        norm = torch.linalg.vector_norm(self.gradient)
        finite = norm.isfinite() & average_(loss.detach().float().clone()).isfinite()
        if clip:
            self.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1))
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()        # their kernels read it and make no step
        elif self.gradient.is_cuda:                             # without host synchronisation: zeros
            torch.where(finite, self.gradient, torch.zeros_like(norm), out=self.gradient)
        elif not finite:
            for parameter in self.parameters:                   # optimizers pass over those without gradient
                parameter.grad = None
        return torch.where(finite, norm, torch.nan)


def make_side(optimizer: str, parameters: Iterable[nn.Parameter], learning_rate: float,
              betas: tuple[float, float] = (0.9, 0.999), eps: float = ADAM_EPS, recorded: bool = False) -> Side:
    """A side whose optimizer is rmsprop, adam or adamw (betas, eps: of the latter two), without weight decay.

    recorded: its steps can be recorded as a CUDA graph (utils/graphs.py).
    """
    parameters = list(parameters)
    if optimizer == "rmsprop":                                  # torch has no fused one
        return Side(parameters, torch.optim.RMSprop(parameters, learning_rate, capturable=recorded))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    return Side(parameters, kind(parameters, learning_rate, betas, eps, weight_decay=0.0, fused=True,
                                 capturable=recorded))
