"""The inner gap of a training, d1 = L(f, T) - inf_T L(f, T): how far T is from the best for its potentials.

A copy of T takes Adam steps on the dual alone, then both are measured on other batches. As the copy is no
minimiser, d1 is larger than this, up to the noise of the samples, which may also take it below zero.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from losses.barycenter import dual_objective
from models.baryir import BaryIR
from utils.sides import Side

Batch = tuple[Tensor, Tensor, Tensor]                           # degraded [B,3,P,P], source [B], weights [B]


def inner_gap(net: BaryIR, potentials: nn.Module, cost: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
              fit: Sequence[Batch], held_out: Sequence[Batch], learning_rate: float,
              standardize: Callable[[Tensor], Tensor] = lambda latent: latent) -> float:
    """L of T less L of a copy of T that took a step on each batch of `fit`, both measured on `held_out`.

    Args:
        net, potentials: as they are, frozen; nothing of them is changed.
        cost: losses.barycenter.transport_cost of z, b and source, with the run's options.
        standardize: of the latents before the cost (models.potentials.Standardize).
    """
    moved = copy.deepcopy(net.transport_map)
    side = Side(moved.parameters(), torch.optim.Adam(moved.parameters(), learning_rate, fused=True))

    def value(transport_map: nn.Module, batch: Batch) -> Tensor:
        degraded, source, weights = batch
        with torch.no_grad():
            z, _ = net.encode(degraded)
        z, b = z.float(), net.latent_norm(transport_map(z)).float()
        costs = cost(standardize(z), standardize(b), source)["cost"]
        return dual_objective(costs, potentials(b), source, weights)

    for batch in fit:
        side.thaw()
        loss = value(moved, batch)
        loss.backward()
        side.average_and_clip(loss)
        side.optimizer.step()
    with torch.no_grad():
        gaps = [value(net.transport_map, batch) - value(moved, batch) for batch in held_out]
        return float(torch.stack(gaps).mean())
