"""Random crop, flips and quarter turns of aligned images, [H,W,C] uint8 (C may be absent)."""

import numpy as np
from torch import Tensor


def random_crop(images: list[np.ndarray], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same random size x size window of each image; images smaller than that are reflect-padded first."""
    height, width = images[0].shape[:2]
    pad = [(0, max(0, size - height)), (0, max(0, size - width))]
    if any(after for _, after in pad):
        images = [np.pad(image, pad + [(0, 0)] * (image.ndim - 2), mode="reflect") for image in images]
        height, width = images[0].shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return [image[top:top + size, left:left + size] for image in images]


def random_dihedral(images: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """One of the eight flips and quarter turns, the same for each image."""
    turns, flip = rng.integers(4), rng.integers(2)
    images = [np.rot90(image, turns) for image in images]
    return [image[:, ::-1] for image in images] if flip else images


def to_batch(images: Tensor) -> Tensor:
    """[B,H,W,3] uint8 -> [B,3,H,W] float32 in [0, 1], channels last, on the device where the images are."""
    return images.permute(0, 3, 1, 2).float() / 255
