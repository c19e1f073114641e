"""Clean inputs that a network has to leave as they are: drawings, and photographs that look degraded.

Without them a wire fence is taken for rain, a night for underexposure, a black frame for a dark room.
"""

import math

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from data.degradations import GAMMA, LIGHT, RECORDED, Pair, noise, photographed, truncate

LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-+=/()")


def colours(size: int, rng: Generator) -> np.ndarray:
    """One flat colour, or up to 16, blended bilinearly, half of them grey, half dark: [size,size,3] uint8."""
    cells, channels = int(rng.choice([1, 1, 2, 3, 4])), int(rng.choice([1, 3]))
    corners = rng.integers(0, rng.choice([64, 256]), (cells, cells, channels), dtype=np.uint8)
    corners = corners.repeat(3 // channels, axis=2)
    return np.asarray(Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR))


def drawing(ground: np.ndarray, rng: Generator) -> np.ndarray:
    """Text, a grid or fence, or a line drawing on a ground, [size,size,3] uint8 each."""
    size, scale = len(ground), int(rng.integers(1, 3))          # drawn larger and shrunk, edges are soft
    side = size * scale
    image = Image.fromarray(ground).resize((side, side), Image.Resampling.BILINEAR)
    pen, ink = ImageDraw.Draw(image), tuple(int(c) for c in rng.integers(0, 256, 3))
    width = int(rng.integers(1, 2 + 2 * scale))
    kind = rng.integers(3)
    if kind == 0:
        height = int(rng.integers(8, 28)) * scale
        font = ImageFont.load_default(height)
        for y in range(-int(rng.integers(height)), side, int(1.4 * height)):
            pen.text((int(rng.integers(-height, height)), y), "".join(rng.choice(LETTERS, 40)), ink, font)
    elif kind == 1:
        for angle in rng.uniform(0, math.pi) + np.array([0, math.pi / 2])[:rng.integers(1, 3)]:
            along = side * np.array([math.cos(angle), math.sin(angle)])
            for offset in np.arange(-side, side, rng.uniform(4, 24) * scale):
                middle = side / 2 + offset * np.array([-math.sin(angle), math.cos(angle)])
                pen.line([*(middle - along), *(middle + along)], ink, width)
    else:
        for _ in range(int(rng.integers(2, 16))):
            points = rng.uniform(0, side, (rng.integers(2, 6), 2))
            pen.line([tuple(point) for point in points], ink, width)
            x, y, reach = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.05, 0.4) * side
            pen.ellipse([x - reach, y - reach, x + reach, y + reach], outline=ink, width=width)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def darker(photo: np.ndarray, rng: Generator) -> np.ndarray:
    """A photograph [H,W,3] uint8 as one of a dark scene with its lights, or of a dim one."""
    if rng.random() < 0.5:                                      # a tone curve: white stays white
        return truncate(255 * LIGHT[photo] ** (rng.uniform(1.3, 2.2) / GAMMA) + 0.5)
    return truncate(photo * rng.uniform(0.4, 0.9) + 0.5)        # low light, from 3 stops on, leaves 0.39


def flatter(photo: np.ndarray, rng: Generator) -> np.ndarray:
    """A photograph [H,W,3] uint8 of low contrast."""
    contrast, middle = rng.uniform(0.35, 0.8), rng.uniform(40, 160)
    return truncate(middle + contrast * (photo - middle) + 0.5)


def black_frame(photo: np.ndarray, rng: Generator) -> Pair:
    """A frame all of whose values lie below RECORDED, with a camera's or Gaussian noise, and without."""
    black = truncate(photo * (rng.uniform(0, RECORDED) / 256))
    if rng.random() < 0.5:
        return photographed(black, rng.uniform(0, 7), rng)
    return noise(black, rng.uniform(0, 6), rng, None)[0], black


def clean_pair(photo: np.ndarray, rng: Generator) -> Pair:
    """What stands for an undegraded photograph [S,S,3] uint8 in training, and what it is to become.

    A quarter of them black frames with their noise, a fifth flat colours, else something drawn, the
    photograph, or a darker or a flatter one.
    """
    kind = rng.random()
    if kind < 0.25:
        return black_frame(photo, rng)
    if kind < 0.45:
        image = colours(len(photo), rng)
    elif kind < 0.6:
        image = drawing(photo if rng.random() < 0.4 else colours(len(photo), rng), rng)
    else:
        image = darker(photo, rng) if kind < 0.75 else flatter(photo, rng) if kind < 0.8 else photo
    return image, image
