"""Read and write images: training and test pairs as 8-bit RGB (a user's own photographs: utils/photographs.py)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import InputError
from utils.files import write_atomically

warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # an error at twice that size remains

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Whatever a broken image file raises, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:                                               # broken files raise nearly anything in PIL
        raise InputError(f"{path}: cannot be read as an image ({' '.join(str(error).split()) or type(error).__name__})") from None


def open_header(path: Path) -> Image.Image:
    """An image file, not decoded yet, to be used within `decoding`; of a PNG the checksums are verified, which decoding does not."""
    with Image.open(path) as image:
        if image.format == "PNG":
            image.verify()
    return Image.open(path)


def frames(image: Image.Image) -> int:
    """Frames or pages of a file; phones' JPEGs with a second, small picture have one."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def open_image(path: Path) -> Image.Image:
    """Decode a whole image file, upright as its EXIF orientation says; InputError if it cannot be read."""
    with decoding(path), open_header(path) as image:
        if (count := frames(image)) > 1:
            raise InputError(f"{path}: {count} frames, expected a still image")
        image.load()
        return ImageOps.exif_transpose(image)


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB, [H,W,3] uint8."""
    return to_rgb8(open_image(path))


def to_rgb8(image: Image.Image) -> np.ndarray:
    if is_deep(image):
        grey = deep_grey(image)
        return np.repeat((grey * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def is_deep(image: Image.Image) -> bool:
    """Grey of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def deep_grey(image: Image.Image) -> np.ndarray:
    """Grey of 16 bits, or of floats in [0, 1], as float64 [H,W] in [0, 1]."""
    return (np.asarray(image, dtype=np.float64) / (1.0 if image.mode == "F" else 65535.0)).clip(0, 1)


def to_image(pixels: np.ndarray, mode: str = "RGB") -> Image.Image:
    """[H,W,3] floats in [0, 1] -> an image of mode RGB, or of L by the mean over the channels."""
    return Image.fromarray(to_uint8(pixels.clip(0, 1).mean(axis=2) if mode == "L" else pixels))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] floats -> 8 bit, rounded to nearest and clipped."""
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def save_image(image: Image.Image, path: Path, **metadata) -> None:
    """Write an image, whole or not at all, in the format of its extension. JPEG and WebP at quality 95; everything else is lossless."""
    file_format = Image.registered_extensions()[path.suffix.lower()]
    quality = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {"quality": 95} if file_format == "WEBP" else {}
    write_atomically(path, lambda temporary: image.save(temporary, format=file_format, **quality, **metadata))
