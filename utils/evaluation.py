"""Restore the images of test sets and measure them: validation in train.py, tables in test.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from models.baryir import BaryIR
from models.strips import in_strips, strip_rows
from utils.errors import InputError, naming, out_of_memory
from utils.images import require_memory, to_tensor
from utils.metrics import MULTIPLES, Metrics, crop_for, means, too_small

ImageSet = Any                  # data.datasets.ImageSet, of the room above
BORDER = 8                      # of reflection around whole images, where networks see zeros
TONES = 4.0                     # pixels, of the Gaussian below which --keep-tones leaves an image as it is
VALIDATION = "promptir"         # protocol of validation in train.py
MAPS = 12                       # of the network's width and the image's size are in memory at least


@dataclass
class Restored:
    """One restored test image: pixels [H,W,3] in [0, 1], not clipped; clean and scores if there are any."""

    degraded: np.ndarray
    restored: np.ndarray
    clean: np.ndarray | None
    scores_in: dict[str, float]         # metrics of the input
    scores: dict[str, float]            # and of the restored image


@dataclass
class Row:
    """A set's line in the table: metrics of input and restored, PSNR in dB; empty without ground truth."""

    set: str
    images: int
    expected: int               # images of the complete set, 0 where the option file does not say
    scores_in: dict[str, float]
    scores: dict[str, float]
    averaged: bool = True       # counts in the average

    @property
    def incomplete(self) -> bool:
        return 0 < self.expected != self.images


def scores_of(scored: Row | Restored, metrics: Sequence[str]) -> list[float | str]:
    """The input's metrics, then the restored image's, for a CSV file: empty text where there is none."""
    return [scores.get(name, "") for scores in (scored.scores_in, scored.scores) for name in metrics]


def precision_on(device: torch.device, wanted: str) -> str:
    """bfloat16 or float32, as wanted; auto: bfloat16 where the device computes it natively, else float32."""
    if wanted != "auto":
        return wanted or "float32"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:                                                       # older versions of torch lack the questions
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in asked)
    return "bfloat16" if native else "float32"


@torch.inference_mode()
def restore(net: BaryIR, degraded: Tensor, strip: int | Literal["auto"] = "auto",
            precision: str = "float32", border: int = 0) -> Tensor:
    """Restore one image [1,3,H,W] in [0,1], computing `strip` rows at a time (0: all, auto: `strip_rows`).

    precision: float32, bfloat16 or auto (`precision_on`).
    border: pixels of its reflection around the image meanwhile. Without, the convolutions see zeros there.

    InputError where the memory does not suffice.
    """
    height, width = degraded.shape[-2:]
    bfloat16 = precision_on(degraded.device, precision) == "bfloat16"
    element = 2 if bfloat16 else 4
    if degraded.device.type == "cpu":                           # where the system would end the process
        require_memory((width, height), MAPS * net.width * element)
    border = min(border, height - 1, width - 1)
    if border:
        degraded = F.pad(degraded, (border,) * 4, mode="reflect")
        return restore(net, degraded, strip, precision)[..., border:-border, border:-border]
    if strip == "auto":
        strip = strip_rows(net, height, width, element, degraded.device)
    try:
        with torch.autocast(degraded.device.type, torch.bfloat16, enabled=bfloat16):
            return (in_strips(net, strip) if strip else net)(degraded)[0].float()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fewer = (strip or min(height, 256)) // 2 or 1
        raise InputError(f"{width}x{height} pixels: not enough memory on {degraded.device}, "
                         f"expected strip={fewer} or less, or a smaller image") from None


def restore_pixels(net: BaryIR, degraded: np.ndarray, keep_tones: bool = False, **how) -> np.ndarray:
    """[H,W,3] uint8 -> the restored image, [H,W,3] in [0, 1], not clipped; how: as `restore` takes it.

    keep_tones: with the brightness, colour and haze of the input: what a Gaussian of TONES pixels keeps.
    """
    batch = to_tensor(degraded)[None].to(next(net.parameters()).device)
    restored = restore(net, batch, **how)[0].permute(1, 2, 0).cpu().numpy()
    if keep_tones:
        restored += gaussian_filter(degraded / np.float32(255) - restored, (TONES, TONES, 0))
    return restored


def restore_set(net: BaryIR, images: ImageSet, protocol: str, metrics: Metrics, **how) -> Iterator[Restored]:
    """Restore and measure a set's images one by one; how: as `restore_pixels` takes it."""
    for index in range(len(images)):
        degraded, clean = images.degraded_and_clean(index)
        smallest = MULTIPLES[protocol] if clean is None else metrics.smallest(protocol)
        with naming(str(images.pairs[index].path)):
            if problem := too_small(degraded.shape, smallest):
                raise InputError(problem)
            degraded, clean = (image if image is None else crop_for(protocol, image)
                               for image in (degraded, clean))
            restored = restore_pixels(net, degraded, border=BORDER if protocol == "full" else 0, **how)
        degraded = degraded.astype(np.float32) / 255
        scores_in, scores = {}, {}
        if clean is not None:
            clean = clean.astype(np.float32) / 255
            scores_in, scores = (metrics.of_image(protocol, image, clean) for image in (degraded, restored))
        yield Restored(degraded, restored, clean, scores_in, scores)


def average_row(rows: Sequence[Row]) -> Row | None:
    """The mean over the sets with ground truth that count, each once, as in the papers; None without any."""
    measured = [row for row in rows if row.scores and row.averaged]
    if not measured:
        return None
    expected = sum(row.expected or row.images for row in measured)
    return Row("average", sum(row.images for row in measured), expected,
               means([row.scores_in for row in measured]), means([row.scores for row in measured]))


def row_of(images: ImageSet, scores: Sequence[tuple[dict[str, float], dict[str, float]]]) -> Row:
    """A set's line in the table. scores: of each image, metrics of the input and of what was restored."""
    scores_in, restored = (means([pair[side] for pair in scores if pair[side]]) for side in (0, 1))
    return Row(images.name, len(scores), images.options.expected, scores_in, restored, images.options.average)


def validate(net: BaryIR, sets: Sequence[ImageSet]) -> list[Row]:
    """Restore and measure all sets under the protocol VALIDATION: a row for each."""
    was_training, metrics = net.training, Metrics()
    net.eval()
    results = ((images, restore_set(net, images, VALIDATION, metrics)) for images in sets)
    rows = [row_of(images, [(one.scores_in, one.scores) for one in restored]) for images, restored in results]
    net.train(was_training)
    return rows
