"""Gradients of one side of the alternation as one tensor, and an update that a non-finite gradient cannot get into."""

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

        clip: largest norm, 0 for none. Where loss or norm is not finite, the parameters stay as they are.
        """
        self.flat.zero_()
        loss.backward()
        distributed.average_(self.flat)
        norm = torch.linalg.vector_norm(self.flat)
        finite = norm.isfinite() & loss.detach().isfinite()
        # RMSprop makes no step along a gradient of zeros; Adam would go on by momentum, but its fused kernels read found_inf.
        if clip:
            self.flat.mul_((clip / (norm + 1e-6)).clamp(max=1))
        torch.where(finite, self.flat, torch.zeros_like(norm), out=self.flat)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
        optimizer.step()
        return norm
