"""Does the alternation find the barycenter? Gaussian sources, whose barycenter is known.

    python -m benchmarks.gaussian_barycenter --quick            D = 2 and 8, a look in minutes
    python -m benchmarks.gaussian_barycenter                    D = 2 ... 128
    python -m benchmarks.gaussian_barycenter --from FOLDER      public instances, published rows above ours

Maps T_k(x) = x + MLP_k(x) and potentials f_k (MLPs, SiLU) are trained by the functions with which train.py
trains: cost and objectives of losses/barycenter.py, congruence of models/potentials.py. The cost is
|x - y|^2 / 2. The figures are of the final, averaged map on 100,000 samples that training has not seen:

    l2_uvp      100 sum_k lambda_k E|T_k - T*_k|^2 / tr S, percent; error: its numerator, without the 100
    bw2_uvp     100 sum_k lambda_k BW_2^2(T_k#P_k, Q) / tr S, percent
    bound       which no error exceeds, of the duality gaps (benchmarks/duality_gaps.py)

Schemes: exact (one map per source, congruence by construction); penalty (free potentials,
10 (sum_k lambda_k f_k)^2 over the batch); shared (one map for all sources, as BaryIR has it: it cannot serve
sources that overlap; those of --means apart do not). Without training: identity; true (the maps T*_k, whose
bw2_uvp is that of the samples).
"""

import math
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from benchmarks.duality_gaps import duality_gaps
from benchmarks.gaussians import FAMILIES, MEANS, Gaussians, bw2_uvp, l2_uvp
from losses.barycenter import dual_objective, potential_objective, sample_weights, transport_cost
from models.potentials import congruent
from utils.errors import InputError, one_line_errors
from utils.files import write_csv
from utils.tables import PUBLISHED, as_text

RESULTS = Path("results/gaussian_barycenter.csv")
SCHEMES = ("exact", "penalty", "shared", "identity", "true")
WEIGHTS = {"uniform": [1 / 3, 1 / 3, 1 / 3], "unequal": [0.25, 0.25, 0.5],
           "four": [0.1, 0.2, 0.3, 0.4]}        # as in Visentin and Cheridito, arXiv 2505.22364


@dataclass(frozen=True)
class Schedule:
    """How long and by which steps `train` trains; a potential step follows `map_steps` map steps."""

    steps: int = 1000                           # potential steps
    map_steps: int = 10
    batch: int = 128                            # samples of each source in a map step
    potential_batch: int = 2048                 # and in a potential step
    learning_rate: float = 1e-3                 # at first, cosine decay
    potential_learning_rate: float = 2e-3       # a larger one leaves potentials rough
    second_beta: float = 0.999                  # Adam's


# The look in minutes: many small steps instead of few large ones, which is better in short runs at low D.
QUICK = Schedule(steps=1500, map_steps=2, batch=64, potential_batch=128, learning_rate=2e-3, second_beta=0.99)


class MLPs(nn.Module):
    """K multilayer perceptrons side by side, three hidden layers, SiLU: [K,N,inputs] -> [K,N,outputs].

    Each network is s MLP(x / s), s the length over which it varies: rough networks loosen the bound, more so
    at large D. A larger s leaves the first derivative as it is and makes the higher ones smaller, by 1/s, ...
    """

    def __init__(self, count: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.scale = max(2.5, math.sqrt(inputs) / 2)
        sizes = [inputs, width, width, width, outputs]
        self.weights = nn.ParameterList(torch.randn(count, a, b) / math.sqrt(3 * a)
                                        for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.biases = nn.ParameterList(torch.zeros(count, 1, b) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.scale
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.silu(x) if i else x, weight)
        return x * self.scale


class Maps(nn.Module):
    """T_k(x) = x + MLP_k(x) of each source's samples, [K,N,D] -> [K,N,D]; with `shared`, one T for all."""

    def __init__(self, sources: int, dim: int, width: int, shared: bool = False) -> None:
        super().__init__()
        self.mlps = MLPs(1 if shared else sources, dim, width, dim)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.mlps(x.flatten(0, 1)[None])[0].view_as(x) if self.shared else self.mlps(x))


class Potentials(nn.Module):
    """f_1..f_K, [N,D] -> [N,K]: congruent or free. g_k(y) = s^2 MLP_k(y / s) keeps the second derivative."""

    def __init__(self, lambdas: Tensor, dim: int, width: int, exact: bool = True) -> None:
        super().__init__()
        self.mlps = MLPs(len(lambdas), dim, width, 1)
        self.lambdas, self.exact = lambdas, exact

    def forward(self, y: Tensor) -> Tensor:
        g = self.mlps.scale * self.mlps(y.expand(len(self.lambdas), *y.shape)).squeeze(2).T
        return congruent(g, self.lambdas) if self.exact else g


def train(truth: Gaussians, schedule: Schedule, scheme: str = "exact", seed: int = 0,
          cost: str = "mean_square", objective_lambdas: Tensor | None = None) -> tuple[Maps, Potentials]:
    """Train maps, whose average is returned, and potentials by the alternation.

    cost: of losses.barycenter.COSTS, of which |x - y|^2 / 2 and |x - y| are multiples. objective_lambdas:
    [K], other weights in the objective than in the congruence. Both for the negative controls.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    sources, dim = truth.means.shape
    width = max(100, 2 * dim)
    scale = {"mean_square": dim / 2, "root_mean_square": math.sqrt(dim)}[cost]
    lambdas = truth.lambdas.float()
    objective_lambdas = lambdas if objective_lambdas is None else objective_lambdas
    maps = Maps(sources, dim, width, shared=scheme == "shared")
    potentials = Potentials(lambdas, dim, width, exact=scheme != "penalty")
    averaged = AveragedModel(maps, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    betas = 0.9, schedule.second_beta
    map_optimizer = torch.optim.Adam(maps.parameters(), schedule.learning_rate, betas)
    potential_optimizer = torch.optim.Adam(potentials.parameters(), schedule.potential_learning_rate, betas)
    rates = [CosineAnnealingLR(side, schedule.steps) for side in (map_optimizer, potential_optimizer)]

    def labels(count: int) -> tuple[Tensor, Tensor]:
        """Source and weight of each of K*count samples."""
        source = torch.arange(sources).repeat_interleave(count)
        return source, sample_weights(source, objective_lambdas, torch.full((sources,), 1 / sources))

    for _ in range(schedule.steps):
        potentials.requires_grad_(False)
        source, weights = labels(schedule.batch)
        for _ in range(schedule.map_steps):
            x = truth.sample(schedule.batch, generator)
            y = maps(x).flatten(0, 1)
            costs = transport_cost(x.flatten(0, 1), y, source, cost, gamma=0.0)["cost"]
            loss = dual_objective(scale * costs, potentials(y), source, weights)
            map_optimizer.zero_grad()
            loss.backward()
            map_optimizer.step()
            averaged.update_parameters(maps)
        potentials.requires_grad_(True)
        with torch.no_grad():
            y = maps(truth.sample(schedule.potential_batch, generator)).flatten(0, 1)
        loss = potential_objective(potentials(y), *labels(schedule.potential_batch), lambdas,
                                   10.0 if scheme == "penalty" else 0.0)
        potential_optimizer.zero_grad()
        loss.backward()
        potential_optimizer.step()
        for rate in rates:
            rate.step()
    return averaged.module, potentials


def run(truth: Gaussians, sources: str, instance: int, scheme: str, schedule: Schedule) -> dict:
    """Train and measure one instance: a line of the results; columns as in the module's docstring."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(10_000 + instance)
    x = truth.sample(100_000, generator)
    start, bound = time.monotonic(), math.nan
    if scheme == "identity":
        transported = x
    elif scheme == "true":
        transported = truth.transport(x)
    else:
        maps, potentials = train(truth, schedule, scheme, seed=instance)
        with torch.no_grad():
            transported = torch.cat([maps(part) for part in x.split(5000, dim=1)], dim=1)
        bound = duality_gaps(truth, maps, potentials, generator)["bound"]
    share = l2_uvp(truth, transported, x)
    return {"D": len(truth.mean), "sources": sources, "scheme": scheme, "l2_uvp": share,
            "bw2_uvp": bw2_uvp(truth, transported), "bound": bound,
            "error": share * float(truth.covariance.trace()) / 100, "seconds": time.monotonic() - start}


def public_files(folder: Path, dims: list[int]) -> list[Path]:
    """A folder's files *_D.json with D in `dims`; InputError where there are none."""
    found = [(path.stem.rpartition("_")[2], path) for path in sorted(folder.glob("*_*.json"))]
    if not (chosen := [path for dim, path in found if dim in map(str, dims)]):
        raise InputError(f"--from {folder}: no file *_D.json with D among {dims}; D found: "
                         f"{', '.join(dim for dim, _ in found) or 'none'}")
    return chosen


def table(rows: list[dict]) -> str:
    """Means over the instances, a line each; above a public instance the figures published for it."""
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["gaussian_barycenter"]
    lines, groups, unknown = [[*rows[0], "instances"]], defaultdict(list), ["-"] * (len(rows[0]) - 5)
    for row in rows:
        groups[row["D"], row["sources"], row["scheme"]].append(row)
    for (dim, sources, scheme), group in groups.items():
        if sources == f"sampler_stats_{dim}" and sources not in sum(lines, []):     # Howard et al.'s file
            lines += [[str(dim), sources, method, *map(str, figures[dim]), *unknown, "published"]
                      for method, figures in published.items() if dim in figures]
        means = [sum(row[name] for row in group) / len(group) for name in list(group[0])[3:]]
        lines.append([str(dim), sources, scheme, *(f"{mean:.3g}" for mean in means), str(len(group))])
    return as_text(lines)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="D = 2 and 8, one instance, a short schedule")
    parser.add_argument("--from", type=Path, dest="folder", metavar="FOLDER",
                        help="public instances, files *_D.json, instead of random ones; --dims picks")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 16, 64, 96, 128])
    parser.add_argument("--weights", choices=WEIGHTS, default="uniform")
    parser.add_argument("--means", choices=MEANS, default="zero")
    parser.add_argument("--family", choices=FAMILIES, default="gaussian", help="of the random sources")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["exact", "identity", "true"])
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--steps", type=int, help="by default 1000, above D = 64 in proportion to D")
    flags = parser.parse_args()
    if flags.quick:
        flags.dims, flags.instances = [2, 8], 1
    if flags.folder:
        cases = [(Gaussians.read(path), path.stem, 0) for path in public_files(flags.folder, flags.dims)]
    else:
        lambdas, sources = WEIGHTS[flags.weights], f"{flags.weights} {flags.means} {flags.family}"
        cases = [(Gaussians.random(dim, lambdas, flags.means, instance, flags.family), sources, instance)
                 for instance in range(flags.instances) for dim in flags.dims]
    runs = [(*case, scheme, QUICK if flags.quick else
             Schedule(steps=flags.steps or max(1000, 1000 * len(case[0].mean) // 64)))
            for case in cases for scheme in flags.schemes]
    with ProcessPoolExecutor(torch.get_num_threads(), mp_context=get_context("spawn")) as pool:
        rows = []
        for row in tqdm(pool.map(run, *zip(*runs, strict=True)), "runs", len(runs)):
            rows.append(row)
            write_csv(RESULTS, [list(row), *(line.values() for line in rows)])    # all so far
    print(table(rows))
    print(f"{'a short schedule; ' * flags.quick}torch {torch.__version__}, {date.today()}; {RESULTS}")


if __name__ == "__main__":
    with one_line_errors():
        main()
