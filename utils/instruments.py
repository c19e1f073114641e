"""What a run tells of its transport: figures of each source, and the gap of the inner problem."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losses.barycenter import transport_objective
from models.baryir import BaryIR
from utils import distributed
from utils.gradients import FlatGradients

Batch = tuple[Tensor, Tensor, Tensor]                           # degraded [B,3,P,P], source [B], weights [B]


class Means:
    """Means of named scalars since the last report, of those that are finite, summed on the device, so that adding does not wait for it."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in names}       # of the values, their number

    def add(self, values: dict[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.sums[name].device)
            self.sums[name] += torch.stack([torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0), value.isfinite().double()])

    def report(self) -> dict[str, float]:
        """The means over all processes of the names that have a value; starts anew."""
        sums = distributed.average_(torch.stack(list(self.sums.values())))
        means = {name: value / count for name, (value, count) in zip(self.sums, sums.tolist()) if count}
        self.__init__(list(self.sums), sums.device)
        return means


class SourceStatistics:
    """Mean transport cost C_i, mean and spread of f_{k_i}(b_i), of each source's samples since the last report."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = names
        self.columns = [f"{quantity}_{name}" for name in names for quantity in ("cost", "potential_mean", "potential_spread")]
        self.sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)              # 1, C, f, f^2

    def add(self, cost: Tensor, f: Tensor, source: Tensor) -> None:
        """C_i and f_{k_i}(b_i) of a batch, [B] each. source: [B] int."""
        cost, f = cost.double(), f.double()
        rows = torch.stack([torch.ones_like(f), cost, f, f.square()], dim=1)
        self.sums.index_add_(0, source, torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, 0.0))

    def report(self) -> dict[str, float]:
        """The columns' values over all processes, nan for a source without a sample; starts anew."""
        means = distributed.average_(self.sums)
        self.sums = torch.zeros_like(means)
        values = []
        for count, cost, f, square in means.tolist():
            values += [cost / count, f / count, math.sqrt(max(0.0, square / count - (f / count) ** 2))] if count else 3 * [math.nan]
        return dict(zip(self.columns, values))


def inner_gap(net: BaryIR, potentials: torch.nn.Module, cost: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
              fit: Sequence[Batch], held_out: Sequence[Batch], learning_rate: float) -> float:
    """Estimate of d1 = L(f, T) - inf_T L(f, T): how far the barycenter map is from the best one for the present potentials.

    A copy of T takes a map step on each batch of `fit`, without the reconstruction term; L of T less L of the copy is then
    measured on the batches `held_out`. As the copy is no minimiser, d1 is larger than this, up to the noise of the samples,
    which may also take it below zero. Nothing of the run is changed.

    Args:
        net, potentials: as they are; their parameters are frozen.
        cost: losses.barycenter.transport_cost of z, b and source, with the run's options.
        learning_rate: of the copy's Adam steps.
    """
    moved = copy.deepcopy(net.transport_map).requires_grad_(True)
    optimizer = torch.optim.Adam(moved.parameters(), learning_rate, fused=True)
    gradients = FlatGradients(list(moved.parameters()))

    def value(transport_map: torch.nn.Module, batch: Batch) -> Tensor:
        degraded, source, weights = batch
        with torch.no_grad():
            z, _ = net.encode(degraded)
        z, b = z.float(), net.latent_norm(transport_map(z)).float()
        with torch.autocast(z.device.type, enabled=False):
            return transport_objective(cost(z, b, source)["cost"], potentials(b), source, weights)

    for batch in fit:
        gradients.descend(value(moved, batch), optimizer)
    with torch.no_grad():
        gaps = [value(net.transport_map, batch) - value(moved, batch) for batch in held_out]
    return float(distributed.average_(torch.stack(gaps).mean()))
