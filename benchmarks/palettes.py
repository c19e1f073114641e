"""The barycenter of photographs' colours, and each photograph recoloured to it: a picture in a minute or two.

    python -m benchmarks.palettes                               three photographs that scikit-image ships
    python -m benchmarks.palettes --images A.jpg B.jpg C.jpg    one's own, two or more

Each photograph's pixels are a distribution in RGB, D = 3. Maps T_k and potentials are trained as in
benchmarks.gaussian_barycenter, quadratic cost, uniform weights. All T_k have one image, the barycenter of the
palettes, so the lower row of the picture shares its colours. Printed: the squared Bures-Wasserstein distance
(of mean and covariance) between two palettes, mean over the pairs, before and after.
"""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.gaussian_barycenter import QUICK, Maps, train
from benchmarks.gaussians import distances
from data.datasets import bundled_folder
from utils.errors import InputError, one_line_errors
from utils.images import read_image, save_image, to_uint8

SPREAD = 4                                      # colours are centred and multiplied by it: about variance 1
SHIPPED = ("astronaut.png", "chelsea.png", "coffee.png")


class Palettes:
    """Sources for `train`: the pixels of each photograph, [H,W,3] uint8, as points in RGB."""

    def __init__(self, photographs: list[np.ndarray]) -> None:
        self.pixels = [torch.from_numpy(photograph.reshape(-1, 3).astype(np.float32) / 255 - 0.5) * SPREAD
                       for photograph in photographs]
        self.lambdas = torch.full((len(photographs),), 1 / len(photographs))
        self.means = torch.stack([pixels.mean(0) for pixels in self.pixels])

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` pixels of each photograph, [K,count,3]."""
        return torch.stack([pixels[torch.randint(len(pixels), (count,), generator=generator)]
                            for pixels in self.pixels])


@torch.no_grad()
def recolour(maps: Maps, photographs: list[np.ndarray]) -> list[np.ndarray]:
    """Each photograph's pixels through its own map, [H,W,3] uint8."""
    recoloured = []
    for k, pixels in enumerate(Palettes(photographs).pixels):
        parts = [maps(part.expand(len(photographs), -1, -1))[k] for part in pixels.split(20_000)]
        colours = torch.cat(parts) / SPREAD + 0.5
        recoloured.append(to_uint8(colours.numpy().reshape(photographs[k].shape)))
    return recoloured


def distance(photographs: list[np.ndarray]) -> float:
    """Squared Bures-Wasserstein distance of two photographs' colours in [0, 1], mean over the pairs."""
    return fmean(distances(torch.from_numpy(photograph / 255) for photograph in photographs))


def strip(photographs: list[np.ndarray], height: int) -> np.ndarray:
    """Pictures side by side, each `height` pixels high."""
    sizes = [(max(1, round(pixels.shape[1] * height / pixels.shape[0])), height) for pixels in photographs]
    return np.hstack([Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
                      for pixels, size in zip(photographs, sizes, strict=True)])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    shipped = [bundled_folder() / name for name in SHIPPED]
    parser.add_argument("--images", type=Path, nargs="+", default=shipped)
    parser.add_argument("--out", type=Path, default=Path("results/palettes.jpg"))
    flags = parser.parse_args()
    if len(flags.images) < 2:
        raise InputError(f"--images: {len(flags.images)} image, expected 2 or more")
    photographs, start = [read_image(path) for path in flags.images], time.monotonic()
    recoloured = recolour(train(Palettes(photographs), QUICK)[0], photographs)
    save_image(Image.fromarray(np.vstack([strip(row, 200) for row in (photographs, recoloured)])), flags.out)
    print(f"distance of the palettes {distance(photographs):.5f} -> {distance(recoloured):.5f}, "
          f"{time.monotonic() - start:.0f} s, {flags.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
