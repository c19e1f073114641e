"""Gradients of one side of the alternation as one tensor, and updates that nothing non-finite gets into."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils import distributed


class FlatGradients:
    """The gradients of some parameters, each a view of one tensor `flat`: mean over the processes, norm, clipping are one operation each.

    Nothing here waits for the device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, part in zip(parameters, self.flat.split([p.numel() for p in parameters])):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())       # in the parameter's own layout

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> Tensor:
        """Gradients of `loss` (scalar), their mean over the processes, and a step along them; returns their norm before clipping.

        clip: largest norm, 0 for none. Where the loss of any process or the norm is not finite, the parameters stay as they are (but
        for the weight decay of RMSprop on CUDA), and the norm that is returned is nan.
        """
        self.flat.zero_()
        loss.backward()
        distributed.average_(self.flat)
        norm = torch.linalg.vector_norm(self.flat)
        finite = norm.isfinite() & distributed.average_(loss.detach().float().clone()).isfinite()
        if clip:
            self.flat.mul_((clip / (norm + 1e-6)).clamp(max=1))
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()             # their kernels read it and make no step
            optimizer.step()
        elif self.flat.is_cuda:                                 # nobody waits there: a gradient of zeros
            torch.where(finite, self.flat, torch.zeros_like(norm), out=self.flat)
            optimizer.step()
        elif finite:
            optimizer.step()
        return torch.where(finite, norm, torch.nan)


class SkippedSteps:
    """Steps that were not applied. Known only when they are read: until then their norms stay on the device.

    in_a_row: the last steps read, as long as none of them was applied.
    """

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.in_a_row: list[int] = []

    def add(self, *norms: Tensor) -> None:
        """What `descend` returned for each side of a step."""
        self.norms.append(torch.stack(norms).sum())

    def read(self, step: int, limit: int) -> list[int]:
        """The steps, up to `step`, since the last reading that were not applied; the reading ends where `limit` of them came in a row."""
        if not self.norms:
            return []
        skipped = []
        for number, norm in enumerate(torch.stack(self.norms).tolist(), step - len(self.norms) + 1):
            if math.isfinite(norm):
                self.in_a_row = []
                continue
            skipped.append(number)
            self.in_a_row.append(number)
            if len(self.in_a_row) == limit:
                break
        self.norms = []
        return skipped
