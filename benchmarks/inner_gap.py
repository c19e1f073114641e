"""The inner gap of a training run: how far its barycenter map is from the best one for its potentials.

    python -m benchmarks.inner_gap CHECKPOINT --opt FILE [--set KEY=VALUE ...] [--steps 10]

Estimates d1 = L(f, T) - inf_T L(f, T) of a checkpoint of train.py (last.pth), on patches of the option file's
sources that no step of the run sees: a copy of T takes Adam steps on the dual alone, then both are measured
on other batches. As the copy is no minimiser, d1 is larger than this, up to the noise of the samples, which
may also take it below zero.
"""

import copy
import functools
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from data.datasets import TrainingSet, open_sources
from data.sampler import probabilities
from data.transforms import to_batch
from losses.barycenter import dual_objective, sample_weights, source_weights, transport_cost
from models.baryir import BaryIR
from models.potentials import Potentials
from utils.checkpoint import load_network, read_checkpoint
from utils.errors import InputError, one_line, one_line_errors
from utils.options import TrainOptions, load_options
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


def unseen_batches(training_set: TrainingSet, options: TrainOptions, count: int) -> list[Batch]:
    """Batches drawn as the run draws its own, of random patches that no step of it sees."""
    rng = np.random.default_rng([options.seed, 2])
    counts = training_set.samples_per_epoch
    lambdas = source_weights(counts, options.objective.lambdas)
    drawn = probabilities(counts, options.balanced)
    starts, batches = np.cumsum([0, *counts]), []
    for _ in range(count):
        sources = (np.arange(options.batch) % len(counts) if options.balanced
                   else rng.choice(len(counts), options.batch, p=np.divide(counts, sum(counts))))
        requests = [(int(starts[k] + rng.integers(counts[k])), 2**62 + int(rng.integers(2**62)),
                     options.patch) for k in sources]
        degraded, _, source = default_collate([training_set[request] for request in requests])
        batches.append((to_batch(degraded), source, sample_weights(source, lambdas, drawn)))
    return batches


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10,
                        help="of the copy, and batches on which it is measured")
    flags = parser.parse_args()
    options = load_options(TrainOptions, flags.opt, flags.set)
    content = read_checkpoint(flags.checkpoint)
    training_set = TrainingSet(open_sources(options), options.seed, None, options.clean_share,
                               options.camera_share)
    lambdas = source_weights(training_set.samples_per_epoch, options.objective.lambdas)
    net = load_network(flags.checkpoint).train()
    potentials = Potentials(lambdas, net.latent_channels, congruent=not options.objective.penalty,
                            standardized=options.scheme == "separate")
    try:
        net.load_state_dict(content["train"]["net"])
        potentials.load_state_dict(content["train"]["potentials"])
    except (KeyError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise InputError(f"{flags.checkpoint}: {reason}; "
                         "expected a run's last.pth and its option file") from None
    net.requires_grad_(False)
    potentials.requires_grad_(False)
    objective = options.objective
    cost = functools.partial(transport_cost, cost=objective.cost, gamma=objective.gamma)
    batches = unseen_batches(training_set, options, 2 * flags.steps)
    rate = options.transport_learning_rate if options.scheme == "separate" else options.learning_rate
    fit, held_out = batches[:flags.steps], batches[flags.steps:]
    gap = inner_gap(net, potentials, cost, fit, held_out, rate, potentials.standardize)
    print(f"{flags.checkpoint}, step {content['step']}: inner gap {gap:.4g} "
          f"({flags.steps} steps of the copy)")


if __name__ == "__main__":
    with one_line_errors():
        main()
