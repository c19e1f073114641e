"""Planar sets: moments, exact distances, training that brings them together; POT as an option."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from benchmarks.gaussian_barycenter import train
from benchmarks.planar_barycenter import SPREAD, TRAINING, Planar, exact_barycenter, squared_wasserstein


def samples(count: int, seed: int = 0) -> np.ndarray:
    return Planar().sample(count, torch.Generator().manual_seed(seed)).double().numpy()


def test_sets_are_centred_and_as_large():
    x = samples(20_000) / SPREAD
    assert np.abs(x.mean(1)).max() < 0.03 and np.abs(x.var(1).sum(1) - 1).max() < 0.1
    assert np.abs(np.hypot(*x[0].T) - 1).max() < 0.45               # a ring
    assert len(np.unique(np.round(x[2] / 0.87), axis=0)) == 9


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


def test_pot_gives_a_better_barycenter_than_any_set():
    """Needs POT (pip install pot): the objective falls below the sets' own."""
    pytest.importorskip("ot")
    x = samples(100)
    q = exact_barycenter(x)
    objective = [np.mean([squared_wasserstein(points, middle) for points in x]) for middle in (q, *x)]
    assert objective[0] < 0.9 * min(objective[1:])
