"""A side of the alternation: the parameters that one loss moves, their optimizer, their learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.distributed import average_
from utils.options import TrainOptions

# Far below the gradients: at torch's 1e-8 the latent's parameters, whose gradients are as small, hardly move.
ADAM_EPS = 1e-15


def learning_rate_factor(options: TrainOptions, step: int, steps: int, epoch: float) -> float:
    """The share of the first learning rate that holds at a step of so many, in this epoch of the run."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, steps - options.warmup)))
    return 1.0 if options.schedule == "constant" else 0.1 ** int(epoch / options.schedule)


class Side:
    """One side of the alternation; its steps, as in train.py, never wait for a GPU.

    `skipped` counts those whose loss or gradient was not finite, `skipped_in_a_row` the last ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = list(parameters), optimizer
        self.learning_rate = optimizer.param_groups[0]["lr"]
        first, size = self.parameters[0], sum(p.numel() for p in self.parameters)
        self.gradient = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.skipped, self.skipped_in_a_row = torch.zeros(2, dtype=torch.int64, device=first.device)
        self.recorded = optimizer.defaults.get("capturable", False)
        self.rate = torch.zeros((), device=first.device)        # where a recorded step reads it
        optimizer.register_load_state_dict_pre_hook(self._as_here)

    def _as_here(self, _: torch.optim.Optimizer, state: dict) -> None:
        for group in state["param_groups"]:                     # of a run that recorded its steps, or not
            group["capturable"] = self.recorded

    def set_learning_rate(self, factor: float) -> None:
        """Set the learning rate to a share of the first one."""
        rate = self.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.fill_(rate) if self.recorded else rate

    def thaw(self) -> None:
        """Let the parameters require gradients, which are parts of one flat tensor of zeros."""
        self.gradient.zero_()
        parts = self.gradient.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())       # in its own layout

    def freeze(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def average_and_clip(self, loss: Tensor, clip: float = 0.0) -> Tensor:
        """Average the gradients over the processes, clip their norm to `clip` (0: not), return it as it was.

        Where the loss of any process or the norm is not finite, the optimizer's next step moves nothing.
        """
        average_(self.gradient)
        norm = torch.linalg.vector_norm(self.gradient)
        finite = norm.isfinite() & average_(loss.detach().float().clone()).isfinite()
        self.skipped += ~finite
        self.skipped_in_a_row.add_(1).mul_(~finite)
        if clip:
            self.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1))
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()        # as torch.amp.GradScaler tells fused kernels
        elif self.gradient.is_cuda:                             # RMSprop; without waiting: a step of zeros
            torch.where(finite, self.gradient, torch.zeros_like(norm), out=self.gradient)
        elif not finite:
            for parameter in self.parameters:                   # optimizers pass over those without gradient
                parameter.grad = None
        return norm


def make_side(optimizer: str, parameters: Iterable[nn.Parameter], learning_rate: float,
              betas: tuple[float, float] = (0.9, 0.999), recorded: bool = False) -> Side:
    """A side that moves the parameters by rmsprop or adamw (which has betas), without weight decay.

    recorded: its steps can be recorded as a CUDA graph (utils/graphs.py).
    """
    parameters, how = list(parameters), {"lr": learning_rate, "weight_decay": 0.0, "capturable": recorded}
    if optimizer == "rmsprop":                                  # torch has no fused one
        return Side(parameters, torch.optim.RMSprop(parameters, **how))
    return Side(parameters, torch.optim.AdamW(parameters, betas=betas, eps=ADAM_EPS, fused=True, **how))
