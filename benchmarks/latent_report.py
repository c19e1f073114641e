"""What the barycenter is worth on images: sources lie apart in z; do they in b, and does r tell them apart?

    python -m benchmarks.latent_report --opt options/study/matched.yml [--set root=PATH checkpoint=PATH]

Each test set of the option file is a source. The sets are *matched scenes*, the same clean photographs
degraded in different ways, so that content cannot tell the source. As many patches of each, spread over its
images, go through encoder and barycenter map. Of the source latents z, the barycenter latents b and the
residuals r = z - b, and of z of the *clean* patches:

    distance    squared Bures-Wasserstein distance between two sources' latent pixels (vectors of 8C channels,
                by mean and covariance), divided by the variance of all pixels: 0 = same Gaussian. Beside the
                mean over all pairs, the mean over halves of one source's images: what scenes alone make
    variance    of all latent pixels, divided by that of z
    probe       accuracy of a linear classifier that guesses the source from the mean of a
                patch's pixels, on images that it was not fitted to (five folds); chance is 1 / sources
    same scene  mean distance between two sources' latents of one patch, ||b_j - b_k||, divided by that of z
    retrieval   share of patches whose nearest latent in another source is of the same scene
    L_ctr       the paper's contrastive term, meant for r, over all patches, and the same without j = i. With
                j = i it is near 0 as soon as latents are orthogonal, as e^(1/0.07) stands in its numerator;
                without, latents that know nothing of their source have about log(sources)

Writes the figures as CSV (--out) and, with matplotlib, a picture beside it: the first two principal
components of the patches' mean latents, lines between those of one scene.
"""

import itertools
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.gaussians import distances, moments
from data.datasets import ImageSet, open_sets
from data.transforms import random_crop
from losses.residual import contrastive, normalized
from models.baryir import BaryIR
from utils import distributed
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.files import write_csv
from utils.images import to_tensor
from utils.options import TestOptions, load_options, option_parser
from utils.tables import as_text

SPACES = {"z": "z", "b": "b", "r": "r", "clean": "z of clean"}
FOLDS = 5


@torch.inference_mode()
def latents(net: BaryIR, images: ImageSet, count: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Of seeded patches, spread evenly over a set's images: latents [count,pixels,8C] and image [count]."""
    device = next(net.parameters()).device
    groups = (torch.arange(count) % len(images)).sort().values
    found = {space: [] for space in SPACES}
    for index, of_image in enumerate(groups.bincount(minlength=len(images)).tolist()):
        pair, rng = images.degraded_and_clean(index), np.random.default_rng([0, index])
        for _ in range(of_image):
            degraded, clean = (to_tensor(patch)[None].to(device) for patch in random_crop([*pair], size, rng))
            z, _ = net.encode(degraded)
            b = net.transport(z)
            clean_z, _ = net.encode(clean)
            for space, latent in zip(SPACES, (z, b, z - b, clean_z), strict=True):
                found[space].append(latent[0].flatten(1).T.cpu())
    return {space: torch.stack(of_space) for space, of_space in found.items()}, groups


def within(sources: list[Tensor], groups: list[Tensor]) -> list[float]:
    """Distance between halves of each source's images; latents: [patches,pixels,C] each."""
    halves = ([pixels[images % 2 == half] for half in (0, 1)]
              for pixels, images in zip(sources, groups, strict=True))
    return [distances(of_source)[0] for of_source in halves]


def fit_probe(x: Tensor, source: Tensor, sources: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight [C,K] and bias [K] of a linear softmax classifier of features x [P,C] by their source [P]."""
    weight = torch.zeros(x.shape[1], sources, requires_grad=True)
    bias = torch.zeros(sources, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, source) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight, bias


def probe_accuracy(features: Tensor, source: Tensor, fold: Tensor, decay: float = 1e-3) -> float:
    """Share of features [P,C] whose source [P] a linear classifier fitted to the other folds [P] guesses."""
    sources, correct = int(source.max()) + 1, 0
    for held_out in fold.unique():
        test = fold == held_out
        x = (features - features[~test].mean(0)) / (features[~test].std(0) + 1e-9)
        weight, bias = fit_probe(x[~test], source[~test], sources, decay)
        correct += int(((x[test] @ weight + bias).argmax(1) == source[test]).sum())
    return correct / len(source)


def contrastive_of_others(r: Tensor, source: Tensor, tau: float = 0.07) -> Tensor:
    """losses.residual.contrastive without j = i. r: [P,...], source: [P]. Returns [P]."""
    r = normalized(r)
    logits = (r @ r.T / tau).fill_diagonal_(-torch.inf)
    same = logits.masked_fill(source[:, None] != source, -torch.inf)
    return logits.logsumexp(dim=1) - same.logsumexp(dim=1)


def retrieval(sources: list[Tensor]) -> float:
    """Share of latents [P,N] whose nearest one in another source, mean over pairs, is of the same place P."""
    nearest = [torch.cdist(a, b).argmin(1) for a, b in itertools.permutations(sources, 2)]
    return fmean([float((of_pair == torch.arange(len(of_pair))).float().mean()) for of_pair in nearest])


def apart(sources: list[Tensor]) -> float:
    """Mean distance between two sources' latents [P,N] of the same place P."""
    return fmean([float((a - b).norm(dim=1).mean()) for a, b in itertools.combinations(sources, 2)])


def measure(net: BaryIR, sets: list[ImageSet], count: int, size: int) -> tuple[list[list], dict[str, Tensor]]:
    """Rows [quantity, of z, b, r, z of clean] of matched sets, and the mean latents, [K*count,8C]."""
    bar = tqdm(sets, "latents", leave=False, dynamic_ncols=True)
    found, groups = zip(*(latents(net, images, count, size) for images in bar), strict=True)
    source, fold = torch.arange(len(sets)).repeat_interleave(count), torch.cat(groups) % FOLDS
    figures, pooled = {}, {}
    for space in SPACES:
        sources = [of_source[space] for of_source in found]                     # [count,pixels,8C] each
        flat = [of_source.flatten(1) for of_source in sources]
        every = torch.cat(flat)
        pooled[space] = torch.cat([of_source.mean(1) for of_source in sources])
        variance = float(moments(torch.cat(sources))[1].trace())
        figures[space] = {"distance between sources": fmean(distances(sources)) / variance,
                          "distance within a source": fmean(within(sources, groups)) / variance,
                          "variance": variance, "probe accuracy": probe_accuracy(pooled[space], source, fold),
                          "same scene": apart(flat), "retrieval": retrieval(flat),
                          "L_ctr": float(contrastive(every, source).mean()),
                          "L_ctr without j = i": float(contrastive_of_others(every, source).mean())}
    for name in ("variance", "same scene"):
        unit = figures["z"][name]
        for of_space in figures.values():
            of_space[name] /= unit
    return [[name, *(of_space[name] for of_space in figures.values())] for name in figures["z"]], pooled


def plot(path: Path, features: dict[str, Tensor], names: list[str]) -> str:
    """Draw the patches' mean latents [K*P,C] of each space, a colour a source, a line a scene; says so."""
    if not find_spec("matplotlib"):
        return "no picture, expected after: pip install matplotlib"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(features), figsize=(13.6, 3.6), layout="constrained")
    for axis, (space, of_space) in zip(axes, features.items(), strict=True):
        centred = of_space - of_space.mean(0)
        points = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
        by_source = points.unflatten(0, (len(names), -1))                       # [K,P,2]
        axis.plot(*by_source.permute(2, 0, 1), color="0.8", linewidth=0.4, zorder=0)
        for name, of_source in zip(names, by_source, strict=True):
            axis.scatter(*of_source.T, s=8, label=name)
        axis.set(title=SPACES[space], xticks=[], yticks=[])
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    return f"principal components of the patches' mean latents: {path}"


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--patches", type=int, default=90, help="of each source")
    parser.add_argument("--size", type=int, default=128, help="sides of the square patches in pixels")
    parser.add_argument("--out", type=Path, default=Path("results/latent_report.csv"))
    flags = parser.parse_args()
    options = load_options(TestOptions, flags.opt, flags.set)
    sets = open_sets(options.sets, options, "sets")
    counts = [len(images) for images in sets]
    if len(sets) < 2 or min(flags.patches, *counts) < FOLDS:
        raise InputError(f"{options.file}: sets of {counts} images and --patches {flags.patches}, "
                         f"expected two sets or more, {FOLDS} of each or more")
    photographs = {tuple(pair.clean for pair in images.pairs) for images in sets}
    if len(photographs) > 1 or None in min(photographs):
        raise InputError(f"{options.file}: expected sets of the same clean photographs, in one order")
    net = load_network(options.checkpoint, distributed.setup()[2])

    rows, pooled = measure(net, sets, flags.patches, flags.size)
    write_csv(flags.out, [["quantity", *SPACES], *rows])
    cells = [[name, *(f"{value:.3f}" for value in values)] for name, *values in rows]
    print(as_text([["", *SPACES.values()], *cells]))
    print(f"chance {1 / len(sets):.3f}; {flags.patches} patches of {flags.size} x {flags.size} of each "
          f"source, checkpoint {options.checkpoint}, option file {options.file}, {date.today()}; {flags.out}")
    print(plot(flags.out.with_suffix(".png"), pooled, [images.name for images in sets]))


if __name__ == "__main__":
    with one_line_errors():
        main()
