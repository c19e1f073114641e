"""Sources that are no ellipses: the barycenter of a ring, two moons and a grid, beside POT's.

    python -m benchmarks.planar_barycenter                      about two minutes on one core

Maps T_k and potentials are trained as in benchmarks.gaussian_barycenter, quadratic cost, uniform weights. The
reference Q is the free-support barycenter of samples x of the sets, which training has not seen, by exact
plans: a fixed point (ot.lp.free_support_barycenter). Needs POT and matplotlib (pip install pot matplotlib).

    learned     100 W_2^2(T_k#P_k, Q) / Var Q, exact, of the samples x
    identity    that of T_k(x) = x
    sampling    100 W_2^2(Q, Q') / Var Q, Q' computed from other samples: by so much two exact ones differ
"""

import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gaussian_barycenter import Schedule, train
from utils.errors import InputError, one_line_errors
from utils.tables import as_text

NAMES = ("ring", "moons", "grid")
PICTURE = Path("results/planar.png")
SPREAD = 28             # the ring's radius: ten times the length over which potentials and maps vary
SAMPLES = 1000          # of each set, for POT and the figures
NOISE = 0.08            # deviation from the circle, the half circles, the points of the grid; the radius is 1
TRAINING = Schedule(steps=2000, map_steps=4, batch=128, potential_batch=256, learning_rate=1e-2,
                    potential_learning_rate=2e-2, second_beta=0.99)


class Planar:
    """Sources for `train`: a ring, two moons, a 3 x 3 grid; mean 0, about the same variance."""

    lambdas, means = torch.full((3,), 1 / 3), torch.zeros(3, 2)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` samples of each set, [3,count,2]."""
        angle = 2 * torch.pi * torch.rand(2, count, 1, generator=generator)
        ring, moons = torch.cat([angle.cos(), angle.sin()], dim=2)
        moons = moons + torch.tensor([0.5, 0.25]) * torch.where(angle[1] < torch.pi, -1, 1)
        grid = 0.87 * (torch.randint(3, (count, 2), generator=generator) - 1)
        points = torch.stack([ring, moons, grid])
        return SPREAD * (points + NOISE * torch.randn(points.shape, generator=generator))


def squared_wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """W_2^2 of two sets of N points [N,2], by the optimal plan."""
    import ot

    return ot.emd2([], [], ot.dist(x, y))                       # even masses


def exact_barycenter(x: np.ndarray) -> np.ndarray:
    """POT's free-support barycenter [N,2] of samples [K,N,2]; it begins with means of K samples."""
    import ot

    masses = [ot.unif(len(points)) for points in x]
    return ot.lp.free_support_barycenter(list(x), masses, x.mean(0), numItermax=50, stopThr=1e-6)


def draw(x: np.ndarray, q: np.ndarray, learned: np.ndarray) -> None:
    """The three sets, the exact barycenter and, in the colour of its source, the learned one."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(11, 2.5), sharex=True, sharey=True, layout="constrained")
    for axis, title in zip(axes, (*NAMES, "barycenter, exact (POT)", "barycenter, learned"), strict=True):
        axis.set_title(title, fontsize="medium")
        axis.set(aspect="equal", xticks=[], yticks=[])
    for k, points in enumerate(x):
        axes[k].scatter(*points.T, s=2, color=f"C{k}", linewidths=0)
        axes[4].scatter(*learned[k, ::3].T, s=2, color=f"C{k}", linewidths=0)
    axes[3].scatter(*q.T, s=2, color="black", linewidths=0)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=80, bbox_inches="tight")


def main() -> None:
    if not (find_spec("ot") and find_spec("matplotlib")):
        raise InputError("expected after: pip install pot matplotlib")
    torch.set_num_threads(1)
    generator, start = torch.Generator().manual_seed(1), time.process_time()
    x, others = (Planar().sample(SAMPLES, generator).numpy().astype(np.float64) for _ in range(2))
    maps, _ = train(Planar(), TRAINING)
    with torch.no_grad():
        learned = maps(torch.from_numpy(x).float()).numpy().astype(np.float64)
    q = exact_barycenter(x)
    draw(x, q, learned)
    percent = 100 / q.var(0).sum()
    rows = [[f"{percent * squared_wasserstein(points, q):.3g}" for points in sets] for sets in (learned, x)]
    print(as_text([["W2^2, %", *NAMES], ["learned", *rows[0]], ["identity", *rows[1]]]))
    sampling = percent * squared_wasserstein(exact_barycenter(others), q)
    print(f"sampling {sampling:.3g} %, {time.process_time() - start:.0f} CPU s, {date.today()}; {PICTURE}")


if __name__ == "__main__":
    with one_line_errors():
        main()
