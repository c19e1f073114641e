"""Degradations made on the fly from clean images, [H,W,3] uint8 -> [H,W,3] uint8, repeatable by their generator.

Noise is the field's test protocol. The others are simple physical models, for smoke runs and for the demonstration on
bundled photographs; tables use the benchmarks' own pairs.
"""

import zlib

import numpy as np


def file_rng(name: str, level: float) -> np.random.Generator:
    """Generator of a test image: depends on the file's name (without folder) and the level alone."""
    return np.random.default_rng(zlib.crc32(name.encode()) + int(level))


def truncate(image: np.ndarray) -> np.ndarray:
    """[0, 255] floats -> 8 bit, truncated: what the field's noise scripts do."""
    return image.clip(0, 255).astype(np.uint8)


def noise(clean: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """White Gaussian noise of standard deviation `level` on the 0-255 scale, clipped and truncated to 8 bit."""
    return truncate(clean + rng.standard_normal(clean.shape) * level)


def rain(clean: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Slanted streaks added as light: `level` is the share of pixels, in thousandths, at which a streak starts."""
    height, width = clean.shape[:2]
    drops = (rng.random((height, width)) < level / 1000) * rng.uniform(0.4, 1.0, (height, width))
    streaks = _shift_sum(drops, angle=rng.uniform(70, 110), length=int(rng.integers(10, 20)))
    return truncate(clean + 200 * streaks.clip(0, 1)[..., None])


def blur(clean: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Motion blur along a straight line of `level` pixels in a random direction."""
    length = max(1, int(level))
    return truncate(_shift_sum(clean.astype(np.float64), angle=rng.uniform(0, 180), length=length) / length + 0.5)


def haze(clean: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Atmospheric scattering I = J t + A (1 - t), t = exp(-level * depth), airlight A in [0.7, 1].

    `depth` is [H,W] in [0, 1]; without it, depth grows linearly from the bottom of the image to the top.
    """
    if depth is None:
        depth = np.repeat(np.linspace(1, 0, clean.shape[0])[:, None], clean.shape[1], axis=1)
    transmission = np.exp(-level * depth)[..., None]
    return truncate(clean * transmission + 255 * rng.uniform(0.7, 1.0) * (1 - transmission) + 0.5)


def lowlight(clean: np.ndarray, level: float, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Exposure divided by `level`, read noise of sigma 2 on the 0-255 scale."""
    return truncate(clean / level + rng.standard_normal(clean.shape) * 2 + 0.5)


DEGRADATIONS = {"noise": noise, "rain": rain, "blur": blur, "haze": haze, "lowlight": lowlight}


def _shift_sum(image: np.ndarray, angle: float, length: int) -> np.ndarray:
    """Sum of `length` copies of an image, each one pixel further in the direction of `angle` (degrees), wrapped."""
    dy, dx = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    steps = np.arange(length) - (length - 1) / 2
    return sum(np.roll(image, (round(s * dy), round(s * dx)), axis=(0, 1)) for s in steps)
