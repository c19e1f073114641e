"""Which samples each step of a training run takes."""

import functools
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data.datasets import TrainingSet
from utils.options import TrainOptions


class EpochSampler(Sampler):
    """Batches of requests for TrainingSet, from any step on: the same whatever the workers and processes.

    The samples of an epoch are one group or, for balanced batches, one for each source. Sample n of the run
    is of group n mod G; the m-th of a group of N is entry m mod N of its m // N-th epoch's permutation. A
    step takes the next batch * processes samples, process r the r-th part. Nothing needs saving to continue.

    Args:
        groups: samples of each group, which lie one after the other in the training set.
        stages: [(first step, batch per process, patch)], the first from step 0.
    """

    def __init__(self, groups: Sequence[int], stages: Sequence[tuple[int, int, int]], steps: int, seed: int,
                 start: int = 0, rank: int = 0, processes: int = 1) -> None:
        self.groups, self.stages, self.steps, self.seed = list(groups), list(stages), steps, seed
        self.start, self.rank, self.processes = start, rank, processes

    @classmethod
    def of_run(cls, options: TrainOptions, samples_per_epoch: Sequence[int], start: int, rank: int,
               processes: int) -> "EpochSampler":
        """The sampler of a run with its options. samples_per_epoch: N_k of each source."""
        groups = samples_per_epoch if options.balanced else [sum(samples_per_epoch)]
        stages = [(0, options.batch, options.patch)] + [tuple(stage) for stage in sorted(options.progressive)]
        samples = options.epochs * sum(samples_per_epoch)
        steps = options.steps or math.ceil(samples / (options.batch * processes))
        return cls(groups, stages, steps, options.seed, start, rank, processes)

    def samples_before(self, step: int) -> int:
        """Samples that all processes have taken before a step."""
        ends = [first for first, _, _ in self.stages[1:]] + [self.steps]
        return sum(max(0, min(step, end) - first) * batch * self.processes
                   for (first, batch, _), end in zip(self.stages, ends, strict=True))

    def epochs_before(self, step: int) -> float:
        return self.samples_before(step) / sum(self.groups)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        @functools.lru_cache(len(self.groups))                  # that of each group's present epoch
        def order(epoch: int, group: int) -> np.ndarray:
            return np.random.default_rng([self.seed, 1, epoch, group]).permutation(self.groups[group])

        starts = np.cumsum([0, *self.groups])
        for step in range(self.start, self.steps):
            batch, patch = next((b, p) for first, b, p in reversed(self.stages) if step >= first)
            position, requests = self.samples_before(step) + self.rank * batch, []
            for n in range(position, position + batch):
                m, group = divmod(n, len(self.groups))
                epoch, entry = divmod(m, self.groups[group])
                requests.append((int(starts[group] + order(epoch, group)[entry]), n, patch))
            yield requests


def probabilities(samples_per_epoch: Sequence[int], balanced: bool) -> Tensor:
    """p_k with which the sampler draws source k, [K]: by its samples N_k, or, in balanced batches, evenly."""
    counts = torch.tensor(samples_per_epoch, dtype=torch.float64)
    return (torch.full_like(counts, 1 / len(counts)) if balanced else counts / counts.sum()).float()


def make_loader(training_set: TrainingSet, sampler: EpochSampler, workers: int,
                device: torch.device) -> DataLoader:
    """Batches of the samples that the sampler asks for."""
    return DataLoader(training_set, batch_sampler=sampler, num_workers=workers,
                      worker_init_fn=own_process_group, pin_memory=device.type == "cuda",
                      generator=torch.Generator())              # its own: the run's random state stays


def own_process_group(worker: int) -> None:
    """For DataLoader workers: signals to the group (Ctrl-C) reach the main process alone, which ends them."""
    if hasattr(os, "setpgid"):                                  # not on Windows
        os.setpgid(0, 0)
