"""Degradations of clean images on the fly, [H,W,3] uint8 -> [H,W,3] uint8, repeatable by their generator.

By `levels`, one strength each: noise as in the field's test protocol, simple generators for demonstration.
By `range`, a strength drawn between two ends: models of how photographs are degraded, for training. Their
parts may be recorded: rain layers, depth.

    python -m data.degradations IMAGE OUT.png       a contact sheet of those by range at three strengths
"""

import io
import math
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from torchvision.utils import make_grid

from utils.errors import one_line_errors
from utils.images import read_image, save_image

GAMMA = 2.2                                                     # of 8-bit values: light = (value / 255)^2.2
LIGHT = (np.arange(256) / 255).astype(np.float32) ** GAMMA      # linear light of each 8-bit value


def file_rng(name: str, level: float) -> Generator:
    """Generator of a test image: depends on the file's name (without folder) and the level alone."""
    return np.random.default_rng(zlib.crc32(name.encode()) + int(level))


def truncate(image: np.ndarray) -> np.ndarray:
    """[0, 255] floats -> 8 bit, truncated: what the field's noise scripts do."""
    return image.clip(0, 255).astype(np.uint8)


# By levels. Depth is [H,W] in [0, 1], or None.


def noise(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Gaussian noise of standard deviation `level` on the 0-255 scale, clipped and truncated to 8 bit."""
    return truncate(clean + rng.standard_normal(clean.shape) * level)


def rain(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Slanted streaks added as light: at `level` thousandths of the pixels a streak starts."""
    height, width = clean.shape[:2]
    drops = (rng.random((height, width)) < level / 1000) * rng.uniform(0.4, 1.0, (height, width))
    streaks = _shift_sum(drops, angle=rng.uniform(70, 110), length=int(rng.integers(10, 20)))
    return truncate(clean + 200 * streaks.clip(0, 1)[..., None])


def blur(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Motion blur along a straight line of `level` pixels in a random direction."""
    length = max(1, int(level))
    total = _shift_sum(clean.astype(np.float64), angle=rng.uniform(0, 180), length=length)
    return truncate(total / length + 0.5)


def haze(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Atmospheric scattering I = J t + A (1 - t), t = exp(-level * depth), airlight A in [0.7, 1].

    `depth` is [H,W] in [0, 1]; without it, depth grows linearly from the bottom of the image to the top.
    """
    if depth is None:
        depth = np.repeat(np.linspace(1, 0, clean.shape[0])[:, None], clean.shape[1], axis=1)
    transmission = np.exp(-level * depth)[..., None]
    return truncate(clean * transmission + 255 * rng.uniform(0.7, 1.0) * (1 - transmission) + 0.5)


def lowlight(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Exposure divided by `level`, read noise of sigma 2 on the 0-255 scale."""
    return truncate(clean / level + rng.standard_normal(clean.shape) * 2 + 0.5)


def jpeg(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """JPEG of quality `level`, colours at half resolution (4:2:0), as Pillow writes it."""
    return _jpeg(clean, round(level), subsampling=2)


def poisson(clean: np.ndarray, level: float, rng: Generator, depth: np.ndarray | None = None) -> np.ndarray:
    """Shot noise of `level` photons at full value: Poisson(level J / 255) 255 / level, rounded to 8 bit."""
    return truncate(rng.poisson(clean * (level / 255)) * (255 / level) + 0.5)


def gaussian_blur(clean: np.ndarray, level: float, rng: Generator,
                  depth: np.ndarray | None = None) -> np.ndarray:
    """Blur by a Gaussian of standard deviation `level` in pixels, of the 8-bit values."""
    return truncate(gaussian_filter(clean.astype(np.float32), (level, level, 0), mode="reflect") + 0.5)


def underwater(clean: np.ndarray, level: float, rng: Generator,
               depth: np.ndarray | None = None) -> np.ndarray:
    """Underwater cast I_c = J_c t_c + B_c (1 - t_c), t_c = exp(-level beta_c d): red goes first, blue stays.

    Depth d is a smooth random field in [0.5, 1.5] where there is none.
    """
    d = 0.5 + smooth_field(clean.shape[:2], rng) if depth is None else depth
    beta, light = np.float32([0.8, 0.3, 0.2]), np.float32([0.05, 0.45, 0.5])
    transmission = np.exp(-level * beta * d[..., None])
    return truncate(clean * transmission + 255 * light * (1 - transmission) + 0.5)


BY_LEVEL = {"noise": noise, "rain": rain, "blur": blur, "haze": haze, "lowlight": lowlight, "jpeg": jpeg,
            "poisson": poisson, "gaussian_blur": gaussian_blur, "underwater": underwater}


def _shift_sum(image: np.ndarray, angle: float, length: int) -> np.ndarray:
    """Sum of `length` copies of an image, each a pixel further in direction `angle` (degrees), wrapped."""
    dy, dx = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    steps = np.arange(length) - (length - 1) / 2
    return sum(np.roll(image, (round(s * dy), round(s * dx)), axis=(0, 1)) for s in steps)


# By range.


@dataclass
class Parts:
    """Recorded parts of a degradation.

    depth: [H,W] in [0, 1], 1 the farthest, of the image; without it, haze draws a smooth field.
    layer: gives one of several grey rain layers [h,w] uint8; without it, rain draws its streaks.
    airlight: ends of haze's airlight A, in [0, 1].
    """

    depth: np.ndarray | None = None
    layer: Callable[[Generator], np.ndarray] | None = None
    airlight: tuple[float, float] = field(default=(0.7, 1.0))


def gaussian_noise(clean: np.ndarray, sigma: float, rng: Generator, parts: Parts) -> np.ndarray:
    """Gaussian noise of standard deviation `sigma` on the 0-255 scale, truncated as in the tests."""
    return truncate(clean + sigma * rng.standard_normal(clean.shape, dtype=np.float32))


def rain_layers(clean: np.ndarray, count: float, rng: Generator, parts: Parts) -> np.ndarray:
    """min(J + S_1 + ... + S_n, 255), n = `count` (rounded) layers S, equal in all channels (RainTrainL)."""
    shape = clean.shape[:2]
    rain = np.zeros(shape, np.float32)
    for _ in range(round(count)):
        rain += placed_layer(parts.layer(rng), shape, rng) if parts.layer else drawn_layer(shape, rng)
    return truncate(clean + rain[..., None])


def placed_layer(layer: np.ndarray, shape: tuple[int, int], rng: Generator) -> np.ndarray:
    """A window [h,w] uint8 of a layer; half are mirrored, half turned by up to 15 degrees and scaled."""
    missing = [(0, max(0, size - there)) for size, there in zip(shape, layer.shape, strict=True)]
    if any(after for _, after in missing):
        layer = np.pad(layer, missing, mode="reflect")
    top, left = (rng.integers(there - size + 1) for size, there in zip(shape, layer.shape, strict=True))
    angle, zoom = 0.0, 1.0
    if rng.random() < 0.5:
        angle, zoom = rng.uniform(-15, 15), rng.uniform(0.7, 1.5)
        around = [size // 2 for size in shape]                  # a turned window's corners may lie outside
        layer = np.pad(layer, [(size, size) for size in around], mode="reflect")
        top, left = top + around[0], left + around[1]
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    middle_y, middle_x = shape[0] / 2, shape[1] / 2             # turns about the window's middle
    affine = (cos, sin, left + middle_x - cos * middle_x - sin * middle_y,
              -sin, cos, top + middle_y + sin * middle_x - cos * middle_y)
    image = Image.fromarray(np.ascontiguousarray(layer))
    window = image.transform(shape[::-1], Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(window)[:, ::-1] if rng.random() < 0.5 else np.asarray(window)


def drawn_layer(shape: tuple[int, int], rng: Generator) -> np.ndarray:
    """Streaks [h,w] in [0, 255]: drops at random places, drawn out along one direction.

    Of 0.5 to 8 thousandths of the pixels, 8 to 40 pixels long, 1 to 2.5 wide, within 30 degrees of upright,
    of peak 60 to 240.
    """
    drops = rng.random(shape, dtype=np.float32)
    share = rng.uniform(0.0005, 0.008)
    drops = np.where(drops < share, rng.uniform(0.4, 1, shape), 0).astype(np.float32)
    length, angle = rng.uniform(8, 40), math.radians(rng.uniform(60, 120))
    along = np.linspace(-length / 2, length / 2, 2 * math.ceil(length))
    path = np.stack([along * math.sin(angle), along * math.cos(angle)], axis=1)
    kernel = path_kernel(path, thickness=rng.uniform(1, 2.5))
    streaks = fftconvolve(drops, kernel / kernel.max(), mode="same")
    return rng.uniform(60, 240) * streaks.clip(0, 1)


def scattering(clean: np.ndarray, beta: float, rng: Generator, parts: Parts) -> np.ndarray:
    """Atmospheric scattering I_c = J_c t + A_c (1 - t), t = exp(-beta d), rounded to 8 bit.

    A_c is within 0.03 of a common A drawn from `airlight`, and in its range, too.
    """
    low, high = parts.airlight
    airlight = (rng.uniform(low, high) + rng.uniform(-0.03, 0.03, 3)).clip(low, high)
    depth = smooth_field(clean.shape[:2], rng) if parts.depth is None else parts.depth
    transmission = np.exp(-beta * depth.astype(np.float32))[..., None]
    return truncate(clean * transmission + (255 * airlight).astype(np.float32) * (1 - transmission) + 0.5)


def smooth_field(shape: tuple[int, int], rng: Generator) -> np.ndarray:
    """A smooth random field [h,w] with minimum in [0, 0.5], maximum 1: 4x4 noise and a slope, upsampled."""
    coarse = rng.standard_normal((4, 4))
    coarse += rng.uniform(0, 3) * np.linspace(1, -1, 4)[:, None]                # mostly farther at the top
    image = Image.fromarray(coarse.astype(np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC)
    values = np.asarray(image)
    low = rng.uniform(0, 0.5)
    return low + (1 - low) * (values - values.min()) / max(float(np.ptp(values)), 1e-6)


def camera_shake(clean: np.ndarray, length: float, rng: Generator, parts: Parts) -> np.ndarray:
    """Blur by a random camera path of `length` pixels, averaged in linear light, rounded to 8 bit."""
    turns = rng.uniform(0, 0.3) * rng.standard_normal(64)       # from a straight line to a scrawl
    direction = rng.uniform(0, 2 * math.pi) + np.cumsum(turns)
    path = np.cumsum(np.stack([np.sin(direction), np.cos(direction)], axis=1), axis=0) * length / 64
    return _in_linear_light(clean, path_kernel(path - path.mean(axis=0)))


def defocus(clean: np.ndarray, radius: float, rng: Generator, parts: Parts) -> np.ndarray:
    """Blur by an evenly lit disc of `radius` pixels, averaged in linear light, rounded to 8 bit."""
    side = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    disc = (radius + 0.5 - np.hypot(side[:, None], side)).clip(0, 1)    # its edge covers a part of its pixels
    return _in_linear_light(clean, (disc / disc.sum()).astype(np.float32))


def path_kernel(path: np.ndarray, thickness: float = 1.0) -> np.ndarray:
    """The share of time [s,s], s odd, that points [N,2] (y, x in pixels from the middle) spend in each pixel.

    thickness: width of the line in pixels; at 1, a point covers its four neighbours bilinearly.
    """
    radius = math.ceil(np.abs(path).max() + thickness)
    side = np.arange(-radius, radius + 1)
    y, x = ((thickness / 2 + 0.5 - np.abs(side - path[:, axis, None])).clip(0, 1) for axis in (0, 1))  # [N,s]
    kernel = y.T @ x
    return (kernel / kernel.sum()).astype(np.float32)


def _in_linear_light(clean: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    radius = kernel.shape[0] // 2
    light = np.pad(LIGHT[clean], ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    blurred = fftconvolve(light, kernel[..., None], mode="valid", axes=(0, 1))
    return truncate(255 * blurred.clip(0, 1) ** (1 / GAMMA) + 0.5)


def underexposure(clean: np.ndarray, stops: float, rng: Generator, parts: Parts) -> np.ndarray:
    """A photograph exposed `stops` (factors of 2) too short, with the noise that it brings, rounded to 8 bit.

    Linear light times 2^-stops, times a white balance within 15 % a channel; Poisson-Gaussian noise of
    variance a light + b^2, a log-uniform in [2e-5, 1e-3], b uniform in [0, 5e-4] of full light; a gamma
    within 10 % of the display's.
    """
    light = LIGHT[clean] * (2**-stops * rng.uniform(0.85, 1.15, 3)).astype(np.float32)
    shot, read = 10 ** rng.uniform(-4.7, -3), rng.uniform(0, 5e-4)
    light += np.sqrt(shot * light + read**2) * rng.standard_normal(light.shape, dtype=np.float32)
    return truncate(255 * light.clip(0, 1) ** (rng.uniform(0.9, 1.1) / GAMMA) + 0.5)


def compression(clean: np.ndarray, quality: float, rng: Generator, parts: Parts) -> np.ndarray:
    """JPEG of a quality from 1 to 100 (rounded), colours at full or half resolution, as Pillow writes it."""
    return _jpeg(clean, round(quality), subsampling=2 * int(rng.integers(2)))


def _jpeg(clean: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(clean).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))


def camera(image: np.ndarray, rng: Generator) -> np.ndarray:
    """What a camera adds: a little sensor noise, and to every third image JPEG of quality 60 to 95.

    Gaussian noise of standard deviation up to 5 on the 0-255 scale, half of the time smoothed over up to a
    pixel, as demosaicing does, with its deviation kept. Rounded to 8 bit.
    """
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    if rng.random() < 0.5:
        noise = gaussian_filter(noise, (rng.uniform(0.3, 1),) * 2 + (0,))
        noise /= noise.std()
    image = truncate(image + rng.uniform(0, 5) * noise + 0.5)
    if rng.random() < 1 / 3:
        image = compression(image, rng.uniform(60, 95), rng, Parts())
    return image


def unharmed(clean: np.ndarray, strength: float, rng: Generator, parts: Parts) -> np.ndarray:
    """The clean image itself: what needs no restoration has to come back as it is."""
    return clean


BY_RANGE: dict[str, Callable[[np.ndarray, float, Generator, Parts], np.ndarray]] = {
    "noise": gaussian_noise, "rain": rain_layers, "haze": scattering, "blur": camera_shake,
    "defocus": defocus, "lowlight": underexposure, "jpeg": compression, "clean": unharmed,
}
MARGINED = ("blur", "defocus")          # look beyond a patch, as far as their strength in pixels


def plain_patch(size: int, rng: Generator) -> np.ndarray:
    """A synthetic clean patch [size,size,3] uint8: one flat colour, or up to 16, blended bilinearly."""
    cells = int(rng.choice([1, 1, 2, 3, 4]))
    colours = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(colours).resize((size, size), Image.Resampling.BILINEAR))


def main() -> None:
    strengths = {"noise": (15, 25, 50), "rain": (1, 2, 3), "haze": (0.6, 1.2, 2), "blur": (7, 15, 25),
                 "defocus": (1.5, 3, 5), "lowlight": (2, 4, 6), "jpeg": (50, 20, 10), "clean": (0, 0, 0)}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    rows = ", ".join(f"{name} {strengths[name]}" for name in strengths)
    parser.add_argument("out", type=Path, help=f"a row for each of {rows}")
    flags = parser.parse_args()
    clean = read_image(flags.image)[:256, :384]
    sheet = [degrade(clean, strength, np.random.default_rng(0), Parts())
             for name, degrade in BY_RANGE.items() for strength in strengths[name]]
    grid = make_grid(torch.from_numpy(np.stack(sheet)).permute(0, 3, 1, 2), nrow=3, padding=4, pad_value=255)
    save_image(Image.fromarray(grid.permute(1, 2, 0).numpy()), flags.out)
    print(f"{flags.out}: a row for each of {rows}")


if __name__ == "__main__":
    with one_line_errors():
        main()
