"""Degradations of photographs on the fly, repeatable by their generator.

One formula a name serves training (a strength drawn for each sample), tests (one strength, a generator seeded
by the file's name) and the demonstration:

    degrade(clean, strength, rng, parts) -> degraded, target        [H,W,3] uint8 each

The target is the clean image, with two exceptions: what a camera gives of it without noise, and a frame so
dark that nothing was recorded, which stays dark.
"""

import functools
import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter
from scipy.signal import fftconvolve

Pair = tuple[np.ndarray, np.ndarray]
GAMMA = 2.2                                                     # of 8-bit values: light = (value / 255)^2.2
LIGHT = (np.arange(256) / 255).astype(np.float32) ** GAMMA      # linear light of each 8-bit value
RECORDED = 8                    # of 255: a frame whose values all lie below it holds no picture
GRID = 16                       # pixels after which the grid of JPEG with half colours repeats


class Parts(NamedTuple):
    """Recorded parts of a degradation.

    depth: [H,W] in [0, 1], 1 the farthest, of the image; without it, haze and underwater draw a smooth field.
    layer: gives one of several grey rain layers [h,w] uint8; without it, rain draws its streaks.
    airlight: ends of haze's airlight A, in [0, 1].
    """

    depth: np.ndarray | None = None
    layer: Callable[[Generator], np.ndarray] | None = None
    airlight: Sequence[float] = (0.7, 1.0)


def file_rng(name: str, level: float) -> Generator:
    """Generator of a test image: depends on the file's name (without folder) and the level alone."""
    return np.random.default_rng(zlib.crc32(name.encode(errors="surrogateescape")) + int(level))


def truncate(image: np.ndarray) -> np.ndarray:
    """[0, 255] floats -> 8 bit, truncated: what the field's noise scripts do."""
    return image.clip(0, 255).astype(np.uint8)


def noise(clean: np.ndarray, sigma: float, rng: Generator, parts: Parts) -> Pair:
    """Gaussian noise of standard deviation `sigma` on the 0-255 scale, clipped and truncated to 8 bit."""
    return truncate(clean + rng.standard_normal(clean.shape) * sigma), clean


def poisson(clean: np.ndarray, photons: float, rng: Generator, parts: Parts) -> Pair:
    """Shot noise of so many photons at full value: Poisson(photons J / 255) 255 / photons, rounded."""
    return truncate(rng.poisson(clean * (photons / 255)) * (255 / photons) + 0.5), clean


# Cameras: unprocessing (Brooks et al., CVPR 2019, arXiv 1811.11127), whose numbers these are.

LINEAR_TONE = 0.5 - np.sin(np.arcsin(1 - 2 * np.arange(256) / 255) / 3)                 # smoothstep inverted
RAW = LINEAR_TONE.astype(np.float32) ** GAMMA                   # sensor value of each 8-bit value
BILINEAR = (np.float32([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4,  # of red and blue, which fill a quarter
            np.float32([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4)  # of green, which fills half


def camera(clean: np.ndarray, stops: float, rng: Generator, parts: Parts) -> Pair:
    """A photograph taken at a gain of `stops` (factors of 2), and the same one without noise.

    Shot noise lambda_shot = 1e-4 * 2^stops; 0 to 7 stops are the paper's range. Three of ten photographs are
    shrunk by up to 2 afterwards, so that both images may be smaller than `clean`. Half of the noisy ones are
    JPEGs.
    """
    noisy, quiet = photographed(clean, stops, rng)
    if rng.random() < 0.3:
        shrink = rng.uniform(1, 2)
        size = [round(side / shrink) for side in clean.shape[1::-1]]
        kernel = rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
        noisy, quiet = (np.asarray(Image.fromarray(photo).resize(size, kernel)) for photo in (noisy, quiet))
    return stored(noisy, rng), quiet


def camera_noise(image: np.ndarray, stops: float, rng: Generator) -> np.ndarray:
    """An image with the noise alone that `camera` adds to it, half of the time as a JPEG, [H,W,3] uint8."""
    noisy, quiet = photographed(image, stops, rng)
    return stored(truncate(image + (noisy - quiet.astype(np.float32))), rng)


def stored(photo: np.ndarray, rng: Generator) -> np.ndarray:
    """A photograph as it is or, half of the time, as a JPEG of quality 75 to 100."""
    if rng.random() < 0.5:
        return photo
    return jpeg(photo, rng.uniform(75, 100), rng, Parts(), subsampling=int(rng.choice([0, 2])))[0]


def photographed(scene: np.ndarray, stops: float, rng: Generator) -> Pair:
    """A scene [H,W,3] uint8 as a camera gives it, with noise and without.

    Taken back to linear sensor values, Bayer mosaic, noise of variance lambda_shot y + lambda_read; then
    bilinear demosaicing, white balance, gamma, tone curve, 8 bit.
    """
    gains = np.float32([1 / rng.uniform(1.9, 2.4), 1, 1 / rng.uniform(1.5, 1.9)])       # inverse ones
    gains *= np.clip(rng.normal(0.8, 0.1), 0.5, 1.1)
    shot = 1e-4 * 2**stops
    read = math.exp(2.18 * math.log(shot) + 1.2 + rng.normal(0, 0.26))
    raw = RAW[scene]
    over = (raw.mean(axis=2, keepdims=True) - 0.9).clip(0, 1) / 0.1         # in highlights, which stay white
    raw *= np.maximum(over**2 + (1 - over**2) * gains, gains)
    mosaic = np.zeros((2, 2, 3), np.float32)                    # RGGB or one of its shifts
    mosaic[[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 2]] = 1
    mosaic = np.roll(mosaic, rng.integers(2, size=2), axis=(0, 1))
    height, width = scene.shape[:2]
    seen = np.tile(mosaic, (height // 2 + 1, width // 2 + 1, 1))[:height, :width]
    noise = np.sqrt(shot * raw + read) * rng.standard_normal(raw.shape, np.float32)

    def developed(raw: np.ndarray) -> np.ndarray:
        full = [convolve(raw[..., c] * seen[..., c], BILINEAR[c == 1], mode="mirror") for c in range(3)]
        tone = (np.stack(full, axis=2) / gains).clip(0, 1) ** np.float32(1 / GAMMA)
        return truncate(255 * (3 - 2 * tone) * tone**2 + 0.5)

    return developed(raw + noise), developed(raw)


# Weather.


def rain(clean: np.ndarray, count: float, rng: Generator, parts: Parts) -> Pair:
    """min(J + S_1 + ... + S_n, 255), n = `count` (rounded) layers S, equal in all channels (RainTrainL)."""
    shape = clean.shape[:2]
    layers = np.zeros(shape, np.float32)
    for _ in range(round(count)):
        layers += placed_layer(parts.layer(rng), shape, rng) if parts.layer else drawn_layer(shape, rng)
    return truncate(clean + layers[..., None]), clean


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
    """Streaks [h,w] in [0, 255]: drops at random places, also outside, drawn out along one direction.

    Of 0.5 to 8 thousandths of the pixels, 8 to 40 pixels long, 1 to 2.5 wide, within 30 degrees of upright,
    of peak 60 to 240.
    """
    length, angle = rng.uniform(8, 40), math.radians(rng.uniform(60, 120))
    along = np.linspace(-length / 2, length / 2, 2 * math.ceil(length))
    path = np.stack([along * math.sin(angle), along * math.cos(angle)], axis=1)
    kernel = path_kernel(path, thickness=rng.uniform(1, 2.5))
    canvas = [size + kernel.shape[0] - 1 for size in shape]
    fall = rng.random(canvas, dtype=np.float32) < rng.uniform(0.0005, 0.008)
    drops = np.where(fall, rng.uniform(0.4, 1, canvas), 0).astype(np.float32)
    streaks = fftconvolve(drops, kernel / kernel.max(), mode="valid")
    return rng.uniform(60, 240) * streaks.clip(0, 1)


def haze(clean: np.ndarray, beta: float, rng: Generator, parts: Parts) -> Pair:
    """Atmospheric scattering I_c = J_c t + A_c (1 - t), t = exp(-beta d), rounded to 8 bit.

    A_c is within 0.03 of a common A drawn from `airlight`, and in its range, too.
    """
    low, high = parts.airlight
    airlight = (rng.uniform(low, high) + rng.uniform(-0.03, 0.03, 3)).clip(low, high)
    depth = smooth_field(clean.shape[:2], rng) if parts.depth is None else parts.depth
    transmission = np.exp(-beta * depth.astype(np.float32))[..., None]
    scattered = (255 * airlight).astype(np.float32) * (1 - transmission)
    return truncate(clean * transmission + scattered + 0.5), clean


def underwater(clean: np.ndarray, strength: float, rng: Generator, parts: Parts) -> Pair:
    """Underwater cast I_c = J_c t_c + B_c (1 - t_c), t_c = exp(-strength beta_c (0.5 + d)), least red."""
    depth = smooth_field(clean.shape[:2], rng) if parts.depth is None else parts.depth
    beta, light = np.float32([0.8, 0.3, 0.2]), np.float32([0.05, 0.45, 0.5])
    transmission = np.exp(-strength * beta * (0.5 + depth[..., None]))
    return truncate(clean * transmission + 255 * light * (1 - transmission) + 0.5), clean


def smooth_field(shape: tuple[int, int], rng: Generator) -> np.ndarray:
    """A photograph's random depth [h,w], minimum in [0, 0.5], maximum 1, most of it near.

    4x4 noise and a slope, upsampled, to a power from 1 to 4.
    """
    coarse = rng.standard_normal((4, 4))
    coarse += rng.uniform(0, 3) * np.linspace(1, -1, 4)[:, None]                # mostly farther at the top
    image = Image.fromarray(coarse.astype(np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC)
    values = np.asarray(image)
    low = rng.uniform(0, 0.5)
    share = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    return low + (1 - low) * share ** rng.uniform(1, 4)


# Blur.


def blur(clean: np.ndarray, length: float, rng: Generator, parts: Parts) -> Pair:
    """Blur by a random camera path of `length` pixels, averaged in linear light, rounded to 8 bit."""
    turns = rng.uniform(0, 0.3) * rng.standard_normal(64)       # from a straight line to a scrawl
    direction = rng.uniform(0, 2 * math.pi) + np.cumsum(turns)
    path = np.cumsum(np.stack([np.sin(direction), np.cos(direction)], axis=1), axis=0) * length / 64
    return in_linear_light(clean, path_kernel(path - path.mean(axis=0))), clean


def defocus(clean: np.ndarray, radius: float, rng: Generator, parts: Parts) -> Pair:
    """Blur by an evenly lit disc of `radius` pixels, averaged in linear light, rounded to 8 bit."""
    side = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    disc = (radius + 0.5 - np.hypot(side[:, None], side)).clip(0, 1)    # its edge covers a part of its pixels
    return in_linear_light(clean, (disc / disc.sum()).astype(np.float32)), clean


def gaussian_blur(clean: np.ndarray, sigma: float, rng: Generator, parts: Parts) -> Pair:
    """Blur by a Gaussian of standard deviation `sigma` in pixels, of the 8-bit values."""
    blurred = gaussian_filter(clean.astype(np.float32), (sigma, sigma, 0), mode="reflect")
    return truncate(blurred + 0.5), clean


def path_kernel(path: np.ndarray, thickness: float = 1.0) -> np.ndarray:
    """The share of time [s,s], s odd, that points [N,2] (y, x in pixels from the middle) spend in each pixel.

    thickness: width of the line in pixels; at 1, a point covers its four neighbours bilinearly.
    """
    radius = math.ceil(np.abs(path).max() + thickness)
    side = np.arange(-radius, radius + 1)
    y, x = ((thickness / 2 + 0.5 - np.abs(side - path[:, axis, None])).clip(0, 1) for axis in (0, 1))  # [N,s]
    kernel = y.T @ x
    return (kernel / kernel.sum()).astype(np.float32)


def in_linear_light(clean: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """An image [H,W,3] uint8 convolved with a kernel [s,s] in linear light, reflected at its edges."""
    radius = kernel.shape[0] // 2
    light = np.pad(LIGHT[clean], ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    blurred = fftconvolve(light, kernel[..., None], mode="valid", axes=(0, 1))
    return truncate(255 * blurred.clip(0, 1) ** (1 / GAMMA) + 0.5)


# Exposure, compression.


def lowlight(clean: np.ndarray, stops: float, rng: Generator, parts: Parts) -> Pair:
    """A photograph exposed `stops` (factors of 2) too short, with the noise that it brings, rounded to 8 bit.

    Linear light times 2^-stops, times a white balance within 15 % a channel; Poisson-Gaussian noise of
    variance a light + b^2, a log-uniform in [2e-5, 1e-3], b uniform in [0, 5e-4] of full light; a gamma
    within 10 % of the display's. Where all values lie below RECORDED, the target is the dark frame.
    """
    light = LIGHT[clean] * (2**-stops * rng.uniform(0.85, 1.15, 3)).astype(np.float32)
    shot, read = 10 ** rng.uniform(-4.7, -3), rng.uniform(0, 5e-4)
    noisy = light + np.sqrt(shot * light + read**2) * rng.standard_normal(light.shape, dtype=np.float32)
    gamma = rng.uniform(0.9, 1.1) / GAMMA
    degraded, dark = (truncate(255 * image.clip(0, 1) ** gamma + 0.5) for image in (noisy, light))
    return degraded, clean if dark.max() >= RECORDED else dark


def jpeg(clean: np.ndarray, quality: float, rng: Generator, parts: Parts, subsampling: int = 2) -> Pair:
    """JPEG of a quality from 1 to 100 (rounded), as Pillow writes it, with half colours (4:2:0) or full."""
    file = io.BytesIO()
    Image.fromarray(clean).save(file, "JPEG", quality=round(quality), subsampling=subsampling)
    return np.asarray(Image.open(file)), clean


DEGRADATIONS: dict[str, Callable[[np.ndarray, float, Generator, Parts], Pair]] = {
    "noise": noise, "camera": camera, "poisson": poisson,
    "rain": rain, "haze": haze, "underwater": underwater,
    "blur": blur, "defocus": defocus, "gaussian_blur": gaussian_blur,
    "lowlight": lowlight, "jpeg": jpeg, "jpeg_444": functools.partial(jpeg, subsampling=0),
    "clean": lambda clean, *_: (clean, clean),                  # which has to come back as it is
}
OF_DEPTH, OF_GRID = ("haze", "underwater"), ("camera", "jpeg", "jpeg_444")      # what depth, a grid matter to
OF_TONES = (*OF_DEPTH, "lowlight")                              # what changes an image's tones


def reach(name: str, strength: float) -> int:
    """Pixels around a patch at which a degradation of so much strength looks, too."""
    radii = {"blur": 1, "defocus": 1, "gaussian_blur": 4}       # of each unit of strength
    return 2 if name == "camera" else math.ceil(radii.get(name, 0) * strength)
