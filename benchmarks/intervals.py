"""Differences between two rows of the study, with 95 % intervals over seeds and images.

    python -m benchmarks.intervals        how often the intervals hold the truth, by simulation; seconds

A row's PSNR is its mean, plus what a seed adds, what an image adds and what both together add. The variance
of a mean over seeds and images is the sum of the first two's, less the third's, which is in both (crossed
random effects). Degrees of freedom: Welch's. An image, or scene, that is in several sets counts as one.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

from utils.tables import as_text


class Effects(NamedTuple):
    """What seeds and images do in a row."""

    seeds: np.ndarray           # [S], mean of each seed over its sets
    images: np.ndarray          # [S,I], how far an image lies from the means of its sets


def effects(scores: Iterable[tuple[int, str, str, float]]) -> Effects:
    """Effects of (seed, set, image, score). Sets count evenly; seeds may have different ones."""
    by_seed = defaultdict(lambda: defaultdict(list))
    for seed, of_set, image, score in sorted(scores):
        by_seed[seed][of_set].append((image, score))
    names = sorted({image for sets in by_seed.values() for of_set in sets.values() for image, _ in of_set})
    seeds, images = np.zeros(len(by_seed)), np.zeros((len(by_seed), len(names)))
    for s, sets in enumerate(by_seed.values()):
        for of_set in sets.values():
            mean = np.mean([score for _, score in of_set])
            seeds[s] += mean / len(sets)
            for image, score in of_set:
                share = len(names) / len(sets) / len(of_set)
                images[s, names.index(image)] += share * (score - mean)
    return Effects(seeds, images)


def interval(ours: Effects, theirs: Effects, paired: bool) -> tuple[float, float, float]:
    """Mean difference, lower and upper end; nan ends where a row has one seed. paired: seed by seed."""
    difference = float(ours.seeds.mean() - theirs.seeds.mean())
    sides = [Effects(ours.seeds - theirs.seeds, ours.images - theirs.images)] if paired else [ours, theirs]
    if min(len(side.seeds) for side in sides) < 2:
        return difference, np.nan, np.nan
    of_images = ours.images.mean(axis=0) - theirs.images.mean(axis=0)
    images, free_images = of_images.var(ddof=1) / len(of_images), len(of_images) - 1
    of_seeds = [side.seeds.var(ddof=1) / len(side.seeds) for side in sides]
    seeds = sum(of_seeds)
    free_seeds = seeds**2 / sum(variance**2 / (len(side.seeds) - 1)
                                for variance, side in zip(of_seeds, sides, strict=True))
    twice = sum((side.images - side.images.mean(axis=0)).var(axis=0, ddof=1).mean() / side.images.size
                for side in sides)
    # Each variance with its own t: one t for their sum, by Satterthwaite, covers 92 % with three seeds.
    by_seeds, by_images = stats.t.ppf(0.975, [free_seeds, free_images]) ** 2
    half = max(by_seeds * (seeds - twice) + by_images * images, by_seeds * seeds, by_images * images) ** 0.5
    return difference, difference - half, difference + half


def coverage(seeds: int, paired: bool, deviations: tuple[float, float, float], draws: int = 4000) -> float:
    """Share of intervals that hold the true difference, 0; 40 images. deviations: of seeds, images, both."""
    of_seed, of_image, of_both = deviations
    rng, images, held = np.random.default_rng(0), 40, 0
    for _ in range(draws):
        shared, rows = rng.normal(size=images) * of_image, []
        for row in range(2):
            both = rng.normal(size=(seeds, images)) * of_both
            scores = rng.normal(size=(seeds, 1)) * of_seed + (shared if row else 0) + both
            rows.append(Effects(scores.mean(axis=1), scores - scores.mean(axis=1, keepdims=True)))
        _, low, high = interval(*rows, paired)
        held += low <= 0 <= high
    return held / draws


def main() -> None:
    lines = [["standard deviation in dB of seeds, images, both",
              "3 seeds", "3 seeds, paired", "8 seeds", "8 seeds, paired"]]
    for deviations in ((0.3, 0.1, 0.3), (0.1, 0.3, 0.3), (0.05, 0.3, 0.3), (0.1, 0.5, 1.0)):
        lines.append([", ".join(map(str, deviations)), *(f"{coverage(seeds, paired, deviations):.1%}"
                                                         for seeds in (3, 8) for paired in (False, True))])
    print(as_text(lines))


if __name__ == "__main__":
    main()
