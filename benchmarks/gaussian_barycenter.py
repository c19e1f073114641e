"""Does the alternation find the barycenter? Gaussian sources, whose barycenter is known.

    python -m benchmarks.gaussian_barycenter --quick            D = 2 and 8, a look in minutes
    python -m benchmarks.gaussian_barycenter                    D = 2 ... 128
    python -m benchmarks.gaussian_barycenter --from FOLDER      public instances, published rows above ours
    python -m benchmarks.gaussian_barycenter --weights four --family uniform    K = 4, no Gaussians

Maps T_k(x) = x + MLP_k(x) and potentials f_k (MLPs, SiLU) are trained by the functions with which train.py
trains: the cost and both objectives of losses/barycenter.py, the congruence of models/potentials.py. The cost
is |x - y|^2 / 2. The figures are those of the final, averaged map on samples that training has not seen:

    l2_uvp      100 sum_k lambda_k E|T_k - T*_k|^2 / tr S, percent; error: its numerator, without the 100
    bw2_uvp     100 sum_k lambda_k BW_2^2(T_k#P_k, Q) / tr S, percent
    gap_inner   d1 = L(f, T) - inf_T L(f, T)        gap_outer   d2 = L* - inf_T L(f, T)
    bound       (2 / beta) (sqrt d1 + sqrt d2)^2, which no error exceeds

benchmarks/duality_gaps.py proves the bound.

Schemes: exact (one map per source, congruence by construction); penalty (free potentials,
10 (sum_k lambda_k f_k)^2 over the batch); release (as the authors' code: one map and one potential step on
each batch, RMSprop, the penalty on the batch's last sample); shared (one map for all sources, as BaryIR has
it: it cannot serve sources that overlap; those of --means apart do not); identity (no training).
"""

import math
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, fields
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.duality_gaps import duality_gaps
from benchmarks.gaussians import FAMILIES, MEANS, Gaussians, bw2_uvp, l2_uvp
from losses.barycenter import (
    congruence_penalty,
    dual_objective,
    potential_objective,
    sample_weights,
    transport_cost,
)
from models.potentials import congruent
from utils.errors import InputError, one_line_errors
from utils.files import write_csv
from utils.tables import PUBLISHED, as_text

SCHEMES = ("exact", "penalty", "release", "shared", "identity")
WEIGHTS = {"uniform": [1 / 3, 1 / 3, 1 / 3], "unequal": [0.25, 0.25, 0.5],
           "four": [0.1, 0.2, 0.3, 0.4]}        # as in Visentin and Cheridito, arXiv 2505.22364
# The look in minutes: many small steps instead of few large ones, which is better in short runs at low D.
QUICK = {"steps": 1500, "map_steps": 2, "batch": 64, "potential_batch": 128, "learning_rate": 2e-3,
         "second_beta": 0.99}
PUBLIC = "sampler_stats_{dim}"                 # stem of Howard et al.'s files, to which published.yml belongs


def smoothness(dim: int) -> float:
    """The length s over which maps and potentials vary: rough ones loosen the bound, more so at large D."""
    return max(2.5, math.sqrt(dim) / 2)


class MLPs(nn.Module):
    """K multilayer perceptrons side by side, three hidden layers, SiLU: [K,N,inputs] -> [K,N,outputs].

    Each network is s MLP(x / s). A larger s leaves the first derivative as it is and makes the higher ones
    smaller, by 1/s, 1/s^2, ...
    """

    def __init__(self, count: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.scale = smoothness(inputs)
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


@dataclass
class Row:
    """A line of the results; columns as in the module's docstring."""

    dim: int
    weights: str
    means: str
    instance: str
    scheme: str
    l2_uvp: float
    bw2_uvp: float
    gap_inner: float
    gap_outer: float
    bound: float
    error: float
    seconds: float


def train(
    truth: Gaussians, scheme: str = "exact", steps: int = 1000, map_steps: int = 10, batch: int = 128,
    potential_batch: int = 2048, learning_rate: float = 1e-3, potential_learning_rate: float = 2e-3,
    average: float = 0.99, second_beta: float = 0.999, seed: int = 0, cost: str = "mean_square",
    objective_lambdas: Tensor | None = None,
) -> tuple[Maps, Potentials]:
    """Train maps and potentials by the alternation: `map_steps` map steps, a potential step, `steps` times.

    Args:
        batch, potential_batch: samples of each source in a map step and in a potential step.
        learning_rate, potential_learning_rate: at first, cosine decay; larger, the latter leaves f rough.
        average: decay of the maps' average, which is returned. second_beta: Adam's.
        cost: a name of losses.barycenter.COSTS, of which |x - y|^2 / 2 and |x - y| are multiples.
        objective_lambdas: [K], other weights in the objective than in the congruence. Both for the negative
            controls.

    The release's scheme takes one map step and one potential step on a batch, whatever `map_steps` says.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    sources, dim = truth.means.shape
    width = max(100, 2 * dim)
    scale = {"mean_square": dim / 2, "root_mean_square": math.sqrt(dim)}[cost]
    lambdas = truth.lambdas.float()
    release = scheme == "release"
    maps = Maps(sources, dim, width, shared=scheme == "shared")
    potentials = Potentials(lambdas, dim, width, exact=scheme in ("exact", "shared"))
    rho = 10.0 if scheme == "penalty" else 0.0
    optimizers = [torch.optim.RMSprop(side.parameters()) if release else
                  torch.optim.Adam(side.parameters(), betas=(0.9, second_beta))
                  for side in (maps, potentials)]
    map_optimizer, potential_optimizer = optimizers
    averaged = [parameter.detach().clone() for parameter in maps.parameters()]

    def labels(count: int) -> tuple[Tensor, Tensor]:
        """Source and weight of each of K*count samples."""
        source = torch.arange(sources).repeat_interleave(count)
        objective = lambdas if objective_lambdas is None else objective_lambdas
        return source, sample_weights(source, objective, torch.full((sources,), 1 / sources))

    for step in range(steps):
        for side, rate in ((map_optimizer, learning_rate), (potential_optimizer, potential_learning_rate)):
            for group in side.param_groups:
                group["lr"] = rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * step / steps)))
        x = truth.sample(batch, generator)
        source, weights = labels(batch)
        potentials.requires_grad_(False)
        for _ in range(1 if release else map_steps):
            y = maps(x).flatten(0, 1)
            costs = transport_cost(x.flatten(0, 1), y, source, cost, gamma=0.0)["cost"]
            loss = dual_objective(scale * costs, potentials(y), source, weights)
            map_optimizer.zero_grad()
            loss.backward()
            map_optimizer.step()
            for mean, parameter in zip(averaged, maps.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1 - average)
            x = x if release else truth.sample(batch, generator)
        x = x if release else truth.sample(potential_batch, generator)
        potentials.requires_grad_(True)
        with torch.no_grad():
            y = maps(x).flatten(0, 1)
        f = potentials(y)
        loss = potential_objective(f, *labels(x.shape[1]), lambdas, rho)
        if release:
            last = int(torch.randint(len(f), (), generator=generator))     # any: they lie source by source
            loss = loss + congruence_penalty(f[last:last + 1], lambdas, 10.0)
        potential_optimizer.zero_grad()
        loss.backward()
        potential_optimizer.step()
    with torch.no_grad():
        for parameter, mean in zip(maps.parameters(), averaged, strict=True):
            parameter.copy_(mean)
    return maps, potentials


def run(dim: int, weights: str, means: str, instance: str, scheme: str, steps: int, quick: bool = False,
        file: Path | None = None, samples: int = 100_000) -> Row:
    """Train and measure one instance: N, uniform_N or, with `file`, that of the file."""
    torch.set_num_threads(1)
    seed = 0 if file else int(instance.rpartition("_")[2])
    family = "uniform" if instance.startswith("uniform_") else "gaussian"
    truth = Gaussians.read(file) if file else Gaussians.random(dim, WEIGHTS[weights], means, seed, family)
    start = time.monotonic()
    generator = torch.Generator().manual_seed(10_000 + seed)
    x = truth.sample(samples, generator)
    if scheme == "identity":
        transported, gaps = x, {"gap_inner": math.nan, "gap_outer": math.nan, "bound": math.nan}
        seconds = 0.0
    else:
        release = scheme == "release"
        how = {"batch": 256, "potential_learning_rate": 1e-3} if release else {}
        how = {"steps": steps * 5 if release else steps} | how
        how = QUICK if quick and scheme == "exact" else how
        maps, potentials = train(truth, scheme, seed=seed, **how)
        seconds = time.monotonic() - start
        with torch.no_grad():
            transported = torch.cat([maps(part) for part in x.split(5000, dim=1)], dim=1)
        gaps = duality_gaps(truth, maps, potentials, generator)
    error = l2_uvp(truth, transported, x)
    return Row(dim, weights, means, instance, scheme, error, bw2_uvp(truth, transported), **gaps,
               error=error * float(truth.covariance.trace()) / 100, seconds=seconds)


def public_files(folder: Path, dims: list[int]) -> list[tuple[int, Path]]:
    """Dimension and path of a folder's files *_D.json, of `dims`; InputError where there are none."""
    named = [(path.stem.rpartition("_")[2], path) for path in folder.glob("*_*.json")]
    found = [(int(dim), path) for dim, path in named if dim.isdecimal()]
    chosen = sorted(pair for pair in found if pair[0] in dims)
    if not chosen:
        has = ", ".join(str(dim) for dim in sorted({dim for dim, _ in found})) or "none"
        raise InputError(f"--from {folder}: no file *_D.json with D among {dims}; D found: {has}")
    for dim, path in chosen:
        if (size := Gaussians.read(path).means.shape[1]) != dim:
            raise InputError(f"{path}: dimension {size}, expected {dim} by its name")
    return chosen


def default_steps(dim: int) -> int:
    """Potential steps that keep the figures at the level of low dimensions, as measured."""
    return max(1000, 1000 * dim // 64)


def sampling_floor(dim: int, samples: int = 100_000) -> float:
    """BW2-UVP in percent that the true maps get on as many samples."""
    truth = Gaussians.random(dim, WEIGHTS["uniform"], "zero", seed=0)
    return bw2_uvp(truth, truth.transport(truth.sample(samples, torch.Generator().manual_seed(0))))


def table(rows: list[Row]) -> str:
    """Means over the instances, a line each; above a public instance the figures published for it."""
    lines = [["D", "weights", "means", "scheme", "L2-UVP %", "BW2-UVP %", "inner gap", "outer gap", "bound",
              "error", "seconds", "instances"]]
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["gaussian_barycenter"]

    def case(row: Row) -> tuple:
        """What a mean is taken over: random instances of a family, or a file alone."""
        family = row.instance.rpartition("_")[0] if row.instance.rpartition("_")[2].isdigit() else ""
        family = row.instance if row.means == "file" else family
        return row.dim, row.weights, row.means, row.scheme, family

    public: set[int] = set()
    for key in dict.fromkeys(map(case, rows)):
        group = [row for row in rows if case(row) == key]
        dim = key[0]
        if key[4] == PUBLIC.format(dim=dim) and key[2] == "file" and dim not in public:
            public.add(dim)
            lines += [[str(dim), "uniform", "file", method, *map(str, figures[dim]), *["-"] * 5, "published"]
                      for method, figures in published.items() if dim in figures]
        names = list(asdict(group[0]))[5:]
        mean = {name: sum(getattr(row, name) for row in group) / len(group) for name in names}
        numbers = ["-" if math.isnan(value) else f"{value:.3g}" for value in mean.values()]
        lines.append([*map(str, key[:4]), *numbers, key[4] if key[2] == "file" else
                      f"{len(group)} {key[4]}".strip()])
    return as_text(lines)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="D = 2 and 8, one instance, a short schedule; exact and identity, or --schemes")
    parser.add_argument("--from", type=Path, dest="folder", metavar="FOLDER",
                        help="public instances, files *_D.json, instead of random ones; --dims picks")
    parser.add_argument("--family", choices=FAMILIES, default="gaussian", help="of the random sources")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 16, 64, 96, 128])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["uniform"])
    parser.add_argument("--means", nargs="+", choices=MEANS, default=["zero"])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="by default all")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--steps", type=int, help="potential steps; each follows ten map steps; "
                        "by default 1000, above D = 64 in proportion to D")
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(),
                        help="runs side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path("results/gaussian_barycenter.csv"),
                        help="CSV file to write")
    flags = parser.parse_args()
    if flags.quick and flags.folder:
        raise InputError("--quick has instances of its own, expected it without --from")
    if flags.quick:
        flags.dims, flags.instances, flags.steps = [2, 8], 1, 250
    schemes = flags.schemes or (["exact", "identity"] if flags.quick else SCHEMES)
    if min(*flags.dims, flags.instances, flags.jobs, 1 if flags.steps is None else flags.steps) < 1:
        raise InputError("--dims, --instances, --steps and --jobs: expected numbers from 1 on")
    prefix = "uniform_" if flags.family == "uniform" else ""
    runs = [(dim, weights, means, f"{prefix}{instance}", scheme, flags.steps or default_steps(dim),
             flags.quick)
            for instance in range(flags.instances) for weights in flags.weights for means in flags.means
            for dim in flags.dims for scheme in schemes]  # all cases once before any comes again
    if flags.folder:
        runs = [(dim, "uniform", "file", path.stem, scheme, flags.steps or default_steps(dim), False, path)
                for dim, path in public_files(flags.folder, flags.dims) for scheme in schemes]
    rows: dict[int, Row] = {}
    with ProcessPoolExecutor(flags.jobs, mp_context=get_context("spawn")) as pool:
        numbers = {pool.submit(run, *arguments): number for number, arguments in enumerate(runs)}
        for future in tqdm(as_completed(numbers), "runs", len(runs), dynamic_ncols=True):
            rows[numbers[future]] = future.result()
            # All rows so far: a long benchmark keeps what it has.
            done = [astuple(rows[number]) for number in sorted(rows)]
            write_csv(flags.out, [[entry.name for entry in fields(Row)], *done])
    print(table([rows[number] for number in sorted(rows)]))
    print("tier: quick, a short schedule; without --quick the figures are more exact"
          if flags.quick else f"tier: {f'--steps {flags.steps}' if flags.steps else 'full'}")
    floors = ", ".join(f"D={dim} {sampling_floor(dim):.2g}" for dim in dict.fromkeys(key[0] for key in runs))
    print(f"floor of BW2-UVP at 100,000 samples: {floors}")
    print(f"{flags.jobs} jobs of one thread, torch {torch.__version__}, {date.today()}; {flags.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
