"""Read and write images: training and test pairs as 8-bit RGB, a user's photographs in the form in which they came."""

import os
import tempfile
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import InputError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # an error at twice that size remains

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
PHOTOGRAPHS = EXTENSIONS | {".npy"}     # what a user may have restored: arrays, too, for other value ranges and depths


def list_images(folder: Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """All images below a folder and the folders that it links to, hidden files and folders left out, sorted by path."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if Path(name).suffix.lower() in extensions and not name.startswith(".")]
    return sorted(found)


def open_image(path: Path) -> Image.Image:
    """Decode a whole image file, upright as its EXIF orientation says; InputError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":      # phones' JPEGs with a second, small picture
                raise InputError(f"{path}: {image.n_frames} frames, expected a still image")
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:                                               # broken files raise nearly anything in PIL
        raise InputError(f"{path}: cannot be read as an image ({error})") from None


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB, [H,W,3] uint8."""
    return _to_rgb8(open_image(path))


def _to_rgb8(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":                      # 16-bit grey
        grey = np.asarray(image, dtype=np.float64) / _white(image)
        return np.repeat((grey.clip(0, 1) * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _white(image: Image.Image) -> float:
    return 1.0 if image.mode == "F" else 65535.0


@dataclass
class Photograph:
    """A user's image: `pixels` [H,W,3] float32 in [0, 1], and what is needed to write it back in the same form."""

    pixels: np.ndarray
    mode: str                       # PIL mode to write: L, RGB, LA, RGBA or I;16
    alpha: Image.Image | None
    format: str
    metadata: dict

    @classmethod
    def read(cls, path: Path) -> "Photograph":
        if path.suffix.lower() == ".npy":
            return cls(read_array(path), "", None, "", {})
        image = open_image(path)
        with Image.open(path) as header:
            file_format = "JPEG" if header.format == "MPO" else header.format
            metadata = {key: header.info[key] for key in ("icc_profile", "dpi") if key in header.info}
        if image.mode in ("CMYK", "LAB"):                                    # written as RGB, which its profile is not for
            metadata.pop("icc_profile", None)
        try:
            if exif := image.getexif():                                      # orientation already applied and removed
                metadata["exif"] = exif.tobytes()
        except Exception as error:
            raise InputError(f"{path}: cannot read its EXIF data ({error})") from None
        if image.mode.startswith("I"):
            grey = (np.asarray(image, dtype=np.float32) / _white(image)).clip(0, 1)
            return cls(np.repeat(grey[..., None], 3, axis=2), "I;16", None, file_format, metadata)
        transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
        alpha = image.convert("RGBA").getchannel("A") if transparent else None
        mode = "L" if image.mode in ("L", "LA", "1", "F") else "RGB"
        return cls(_to_rgb8(image).astype(np.float32) / 255, mode, alpha, file_format, metadata)

    def write(self, restored: np.ndarray, path: Path) -> None:
        """Write restored pixels [H,W,3] in [0, 1] with this photograph's mode, transparency, format and metadata.

        An array is written as an array, float32, not clipped.
        """
        if not self.format:
            write_atomically(path, lambda temporary: _save_array(temporary, restored))
            return
        image = to_image(restored, self.mode)
        if self.alpha is not None:
            image.putalpha(self.alpha)
        save_image(image, path, self.format, **self.metadata)


def read_array(path: Path) -> np.ndarray:
    """A NumPy file of floats [H,W,3] in [0, 1] as float32; InputError if it holds anything else."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read as an array ({error})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(f"{path}: {found}, expected floats [H,W,3] in [0, 1]")
    return array.astype(np.float32)


def _save_array(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as file:                                          # np.save would add an extension to a name
        np.save(file, array.astype(np.float32))


def to_image(pixels: np.ndarray, mode: str = "RGB") -> Image.Image:
    """[H,W,3] floats in [0, 1] -> an image of mode RGB, or of L or I;16 by the mean over the channels."""
    if mode == "I;16":
        return Image.fromarray((pixels.clip(0, 1).mean(axis=2, dtype=np.float64) * 65535 + 0.5).astype(np.uint16))
    return Image.fromarray(to_uint8(pixels.clip(0, 1).mean(axis=2) if mode == "L" else pixels))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] floats -> 8 bit, rounded to nearest and clipped."""
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def save_image(image: Image.Image, path: Path, file_format: str | None = None, **metadata) -> None:
    """Write an image, whole or not at all. JPEG and WebP at quality 95; everything else is lossless."""
    file_format = file_format or Image.registered_extensions()[path.suffix.lower()]
    quality = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {"quality": 95} if file_format == "WEBP" else {}
    write_atomically(path, lambda temporary: image.save(temporary, format=file_format, **quality, **metadata))


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it: an interruption never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
