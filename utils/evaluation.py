"""Restore the images of test sets and measure them; train.py validates with it, test.py makes the tables with it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.datasets import ImageSet, bundled_depth
from data.degradations import file_rng
from data.transforms import to_tensor
from models.baryir import BaryIR
from utils.errors import InputError
from utils.metrics import Metrics, crop_for


@dataclass
class Restored:
    """One restored test image: pixels [H,W,3] in [0, 1], not clipped; clean and scores where there is ground truth.

    `scores_in` are the input's metrics, `scores` the restored image's; `features`, for fid, of input, restored and clean.
    """

    index: int
    degraded: np.ndarray
    restored: np.ndarray
    clean: np.ndarray | None
    scores_in: dict[str, float]
    scores: dict[str, float]
    features: list[np.ndarray]


@dataclass
class Row:
    """A set's line in the table: metrics over its images, PSNR in dB, of input and restored; empty without ground truth."""

    set: str
    images: int
    expected: int               # images of the complete set, 0 where the option file does not say
    scores_in: dict[str, float]
    scores: dict[str, float]

    @property
    def incomplete(self) -> bool:
        return 0 < self.expected != self.images

    def values(self, metrics: Sequence[str]) -> list[float | str]:
        """The input's metrics, then the restored images', for a line of a CSV file: empty text where there is none."""
        return [scores.get(name, "") for scores in (self.scores_in, self.scores) for name in metrics]


def degraded_and_clean(images: ImageSet, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A test image and its ground truth, [H,W,3] uint8; a degradation is drawn for the whole image, seeded per file."""
    degraded, clean = images.read(index)
    if images.options.degradation:
        name, (level,) = images.pairs[index].path.name, images.options.levels
        depth = bundled_depth(name) if images.options.bundled else None
        degraded = images.degrade(clean if degraded is None else degraded, level, file_rng(name, level), depth)
    return degraded, clean


@torch.inference_mode()
def restore(net: BaryIR, degraded: Tensor, tile: int = 0, overlap: int = 64) -> Tensor:
    """Restore one image [1,3,H,W] in [0,1]; in overlapping tiles, linearly blended, where a side is above `tile` > 0."""
    height, width = degraded.shape[-2:]
    if not tile or max(height, width) <= tile:
        return net(degraded)[0].float()
    restored = torch.zeros(degraded.shape, device=degraded.device)
    total = torch.zeros(1, 1, height, width, device=degraded.device)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            piece = degraded[..., top:top + tile, left:left + tile]
            rows, columns = (_ramp(n, overlap, degraded.device) for n in piece.shape[-2:])
            weight = rows[:, None] * columns
            restored[..., top:top + tile, left:left + tile] += weight * net(piece)[0]
            total[..., top:top + tile, left:left + tile] += weight
    return restored / total


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Evenly spread starts of the fewest tiles that cover `size` with at least `overlap` in common."""
    count = max(1, math.ceil((size - overlap) / (tile - overlap)))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def _ramp(size: int, overlap: int, device: torch.device) -> Tensor:
    """Weights that fall off linearly within `overlap` of both ends, never to zero."""
    distance = torch.arange(1, size + 1, device=device, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1)


def restore_set(net: BaryIR, images: ImageSet, protocol: str, metrics: Metrics, tile: int = 0, overlap: int = 64,
                precision: str = "float32") -> Iterator[Restored]:
    """Restore and measure a set's images one by one."""
    device = next(net.parameters()).device
    for index in range(images.selected):
        degraded, clean = (image if image is None else crop_for(protocol, image) for image in degraded_and_clean(images, index))
        height, width = degraded.shape[:2]
        smallest = 1 if clean is None else metrics.smallest
        if min(height, width) < smallest:
            raise InputError(f"{images.pairs[index].path}: {width}x{height} pixels are left by protocol {protocol}, too few to "
                             + ("restore" if clean is None else f"measure {', '.join(metrics.names)}, expected at least {smallest}x{smallest}"))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            restored = restore(net, to_tensor(degraded)[None].to(device), tile, overlap)
        restored = restored[0].permute(1, 2, 0).cpu().numpy()
        degraded = degraded.astype(np.float32) / 255
        scores_in, scores, features = {}, {}, []
        if clean is not None:
            clean = clean.astype(np.float32) / 255
            scores_in, scores = (metrics.of_image(protocol, image, clean) for image in (degraded, restored))
            features = metrics.features(degraded, restored, clean)
        yield Restored(index, degraded, restored, clean, scores_in, scores, features)


def summarize(images: ImageSet, results: Sequence[Restored], metrics: Metrics) -> Row:
    """A set's row: metrics per image, then the mean, and those of the set as a whole."""
    measured = [result for result in results if result.scores or result.features]
    inputs = metrics.of_set([r.scores_in for r in measured], [(r.features[0], r.features[2]) for r in measured if r.features])
    restored = metrics.of_set([r.scores for r in measured], [r.features[1:] for r in measured if r.features])
    return Row(images.name, len(results), images.options.expected, inputs, restored)


def average_row(rows: Sequence[Row]) -> Row | None:
    """The mean over the sets with ground truth, each set counting once, as the papers average; None without any."""
    measured = [row for row in rows if row.scores]
    if not measured:
        return None
    inputs, restored = ({name: float(np.mean([scores[name] for scores in side])) for name in side[0]}
                        for side in ([row.scores_in for row in measured], [row.scores for row in measured]))
    expected = sum(row.expected or row.images for row in measured)
    return Row("average", sum(row.images for row in measured), expected, inputs, restored)


def evaluate(net: BaryIR, sets: Sequence[ImageSet], protocol: str, metrics: Metrics = Metrics(),
             each: Callable[[ImageSet, Restored], None] = lambda *_: None, **how) -> list[Row]:
    """Restore and measure all sets; `each` sees every restored image. Returns a row for each set."""
    was_training = net.training
    net.eval()
    rows = []
    for images in sets:
        scores = []
        for result in restore_set(net, images, protocol, metrics, **how):
            each(images, result)
            result.degraded = result.restored = result.clean = None          # keep the scores, not the pixels
            scores.append(result)
        rows.append(summarize(images, scores, metrics))
    net.train(was_training)
    return rows
