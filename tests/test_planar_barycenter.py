"""Planar sets: exact distances, training that brings them together."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import torch

from benchmarks.gaussian_barycenter import train
from benchmarks.planar_barycenter import TRAINING, Planar, squared_wasserstein


def samples(count: int, seed: int = 0) -> np.ndarray:
    return Planar().sample(count, torch.Generator().manual_seed(seed)).double().numpy()


def test_distance_is_that_of_the_best_permutation():
    x, y = samples(5)[:2]
    best = min(((x - y[list(order)])**2).sum(1).mean() for order in permutations(range(5)))
    assert np.isclose(squared_wasserstein(x, y), best)


def test_training_brings_the_sets_together():
    maps, _ = train(Planar(), replace(TRAINING, steps=60, batch=64, potential_batch=128))
    x = samples(300)
    with torch.no_grad():
        learned = maps(torch.from_numpy(x).float()).double().numpy()
    before, after = (np.mean([squared_wasserstein(a, b) for a, b in zip(y, y[[1, 2, 0]], strict=True)])
                     for y in (x, learned))
    assert after < 0.75 * before
