"""Does the barycenter help where training never went? Networks under equal conditions, on real images.

    python -m benchmarks.study --root PATH/TO/mini5d [--rows w transport frozen] [--seeds 2]
    python -m benchmarks.study --tables                               prints the tables, trains nothing

trains and measures what the tables lack, one run after the other. A row is an option file, a run is a row
with a seed. Stopped (SIGTERM or Ctrl-C), a training is saved, and the same command goes on. Two designs:

    options/decide   one network in which the split [b, r] matters, arms that differ in what moves T; the rule
                     by which the claim is decided is in base.yml
    options/study    whole networks from scratch: Restormer (b), BaryIR by one objective or another

Figures lie beside the checkpoint and are collected in benchmarks/study:

    sets.csv      PSNR and SSIM by set; row "w: input": of the degraded images; "transport: T off" and the
                  like, in mixed sets: where the decoder of row transport is given other latents
    images.csv    the same by image, of rows without a colon
    runs.csv      parameters, steps, samples, core-hours, hash of the first 1000 samples, date, machine
    latents.csv   what benchmarks.latent_report says of the matched scenes

Groups of sets: seen; unseen level, type, mixed; left out: of a degradation on which a seed was not trained.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import platform
import signal
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import train
from benchmarks import latent_report
from benchmarks.ablations import Bottleneck, OneLatent
from benchmarks.intervals import effects, interval
from data.datasets import ImageSet, TrainingSet, open_sets
from data.sampler import EpochSampler
from models.baryir import BaryIR
from utils.checkpoint import load_network, read_checkpoint
from utils.errors import InputError, one_line_errors
from utils.files import append_text, write_csv
from utils.images import save_image, to_tensor
from utils.metrics import Metrics, crop_for
from utils.options import TestOptions, TrainOptions, load_options
from utils.tables import as_text


class Design(NamedTuple):
    baselines: tuple[str, ...]                  # rows that others are compared with
    unseen: tuple[str, ...]                     # groups of sets on which it is judged
    paired: bool                                # whether rows of a seed have a warm start in common


class Row(NamedTuple):
    design: str
    file: str
    seeds: int
    network: Callable[..., BaryIR] = BaryIR


OPTIONS, RESULTS = Path("options"), Path("benchmarks/study")
DESIGNS = {"decide": Design(("frozen", "w", "frozen_settled"), ("level", "mixed"), True),
           "study": Design(("b", "c"), ("type", "mixed"), False)}
FROZEN, SETTLED = (partial(Bottleneck, transport_map=what) for what in ("frozen", "settled"))
ROWS = {                                                                # in the order of the tables
    "w": Row("decide", "w.yml", 8, FROZEN),
    "transport": Row("decide", "transport.yml", 8, Bottleneck),
    "frozen": Row("decide", "frozen.yml", 8, FROZEN),
    "reconstruction": Row("decide", "reconstruction.yml", 8, Bottleneck),
    "none": Row("decide", "none.yml", 8, partial(Bottleneck, transport_map="none")),
    "oracle": Row("decide", "oracle.yml", 2, FROZEN),
    "dropout": Row("decide", "dropout.yml", 2, partial(Bottleneck, dropout=0.5)),
    "transport_settled": Row("decide", "settled.yml", 4, SETTLED),
    "frozen_settled": Row("decide", "settled.yml", 4, SETTLED),
    "b": Row("study", "b_restormer_large.yml", 3),
    "c": Row("study", "c_no_transport.yml", 3),
    "e": Row("study", "e_separate.yml", 3),
    "k": Row("study", "k_faster_potentials.yml", 3),
    "d": Row("study", "d_paper.yml", 1),
    "g": Row("study", "g_barycenter_alone.yml", 1, partial(OneLatent, kept="barycenter")),
}
BEGUN_WITH = dict.fromkeys(("transport", "frozen", "reconstruction", "none", "dropout"), "w")      # arms
BEGUN_WITH |= {"transport_settled": "transport", "frozen_settled": "frozen"}
LEFT_OUT = ("rain", "haze", "deblur", "lowlight")                       # by seeds 0, 1, 2, 3, 4, ...
RUN = ("row", "seed", "sources", "weights")
TABLES = {
    "sets": (*RUN, "group", "set", "images", "psnr", "ssim"),
    "images": (*RUN, "group", "set", "image", "psnr", "ssim"),
    "runs": (*RUN, "parameters", "steps", "samples", "core_hours", "samples_hash", "date", "machine"),
    "latents": (*RUN, "quantity", "z", "b", "r"),
}
GROUPS = ("seen", "level", "type", "mixed", "left out")
QUANTITIES = ("distance between sources", "variance", "probe accuracy", "same scene", "retrieval")
MADE = 256                                      # pixels: sides of the images of options/decide/images.yml
CLAIMED, TREATED = 0.15, 0.5                    # dB, share of a distance: rule of options/decide/base.yml
NEW = 2                                         # the first of the seeds of its addendum


def design_of(row: str) -> str:
    """The design of a row, of which a colon may say more ("transport: T off")."""
    return ROWS[row.partition(":")[0]].design


def label(row: str, weights: str) -> str:
    """A row in the tables: its name and, in options/study, the weights where they are the last ones."""
    name, colon, given = row.partition(":")
    return name + ", last" * (weights == "last" and design_of(row) == "study") + colon + given


def left_out(row: str, seed: int) -> str:
    """The degradation on which a run is not trained, if any."""
    return LEFT_OUT[seed % len(LEFT_OUT)] if row in ("w", *BEGUN_WITH) else ""


def group(images: str, absent: str) -> str:
    """The group of a test set: its name's first word, or that it involves what training lacks."""
    words = images.split("_")
    return "left out" if absent in words else words[0]


# Runs.


def run(row: str, seed: int, root: Path, output: Path, last: bool = False) -> None:
    """Train a row with a seed, or continue it, and write its figures beside its checkpoint.

    last: measure the last weights where the run averages, too.
    """
    folder, absent, (design, file, _, network) = output / f"{row}_{seed}", left_out(row, seed), ROWS[row]
    file = str(OPTIONS / design / file)
    if design == "decide":
        root = make_images(root, output / "images")
    overrides = [f"root={root}", f"name={folder.name}", f"output={output}"]
    begun = BEGUN_WITH.get(row)                                 # arms see other samples than what they go on
    overrides += [f"seed={seed + 100 * bool(begun) + 100 * (begun in BEGUN_WITH)}"]
    if begun:
        overrides += [f"pretrained={output}/{begun}_{seed}/last.pth"]
    if absent:
        kept = [dataclasses.asdict(source) for source in load_options(TrainOptions, file).sources
                if source.name != absent]
        overrides += [f"sources={json.dumps(kept)}"]
    options = load_options(TrainOptions, file, overrides)
    begin = time.process_time()
    try:
        resume = ["--resume"] if (folder / "last.pth").exists() else []
        train.main(["--opt", file, "--set", *overrides, *resume], network)
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        append_text(folder / "cpu_seconds.txt", f"{time.process_time() - begin:.0f}\n")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)           # train.py lets them wait for a step's end
        signal.signal(signal.SIGINT, signal.default_int_handler)
    write_figures(row, seed, options, folder, "averaged" if options.ema and not last else "last")


def write_figures(row: str, seed: int, options: TrainOptions, folder: Path, weights: str) -> None:
    """Measure a finished run: the four tables in its folder."""
    absent = left_out(row, seed)
    net = load_network(folder / "last.pth", kind=ROWS[row].network)
    if weights == "last":
        net.load_state_dict(read_checkpoint(folder / "last.pth")["train"]["net"])
    tests, matched = (load_options(TestOptions, str(path), [f"root={options.root}"])
                      for path in map(Path(options.file).with_name, ("test.yml", "matched.yml")))
    samples = TrainingSet(open_sets(options.sources, options, "sources"), options.seed)
    sampler = EpochSampler.of_run(options, samples.samples_per_epoch, 0, 0, 1)
    this = [seed, len(samples.names), weights]

    sets, images, elsewhere = [], [], None
    for of_set in open_sets(tests.sets, tests, "sets"):
        checked = row in BEGUN_WITH and row != "none" and of_set.name.startswith("mixed")
        scores, elsewhere = measure(net, of_set, tests, elsewhere if checked else None)
        for given, of_images in scores.items():
            line = [row + given, *this, group(of_set.name, absent), of_set.name]
            values = np.round([[image["psnr"], image["ssim"]] for image in of_images], 4).tolist()
            sets.append([*line, len(values), *np.mean(values, axis=0).round(4)])
            if not given:
                images += [[*line, of_set.name_of(index), *value] for index, value in enumerate(values)]
    latents = []
    if options.network.barycenter:
        trained = [images_of for images_of in matched.sets if images_of.name != absent]
        scenes = open_sets(trained, matched, "sets")
        latents, _ = latent_report.measure(net, scenes, len(scenes[0]), 128)
    hours = sum(map(float, (folder / "cpu_seconds.txt").read_text().split())) / 3600
    facts = [sum(parameter.numel() for parameter in net.parameters()), options.steps,
             sampler.samples_before(options.steps), f"{hours:.3f}", hash_of_samples(sampler, samples),
             date.today(), machine()]
    write(folder, "sets", sets)
    write(folder, "images", images)
    write(folder, "latents", [[row, *this, *values[:4]] for values in latents])
    write(folder, "runs", [[row, *this, *facts]])               # the last one: the run is done


@torch.inference_mode()
def measure(net: BaryIR, images: ImageSet, options: TestOptions,
            elsewhere: list[Tensor] | None) -> tuple[dict[str, list[dict[str, float]]], list[Tensor]]:
    """Scores of a set's images, by what the decoder is given ("": its latents) and of the input; and their r.

    elsewhere: r of the same scenes in another set, for the checks of a Bottleneck; None: no checks.
    """
    metrics, found, seen = Metrics(), defaultdict(list), []
    bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16")
    for index in range(len(images)):
        degraded, clean = (crop_for(options.protocol, image) for image in images.degraded_and_clean(index))
        with bfloat16:
            z, skips = net.encode(to_tensor(degraded)[None])
            seen.append((z, net.transport(z), skips, degraded, clean))
    residuals = [z - b for z, b, *_ in seen]
    for index, (z, b, skips, degraded, clean) in enumerate(seen):
        given = {"": (b, residuals[index])}
        if elsewhere is not None:
            given |= {": r of another scene": (b, residuals[index - 1]), ": r = 0": (b, 0 * b),
                      ": r of another source": (b, elsewhere[index]), ": T off": (z, 0 * z)}
        restored = {": input": degraded / np.float32(255)}
        for name, latents in given.items():
            with bfloat16:
                image = net.decode(*latents, skips)[0].float()
            restored[name] = image.permute(1, 2, 0).numpy()
        for name, image in restored.items():
            found[name].append(metrics.of_image(options.protocol, image, clean / np.float32(255)))
    return found, residuals


def hash_of_samples(sampler: EpochSampler, samples: TrainingSet, count: int = 1000) -> str:
    """SHA-256 (16 digits) of what the sampler asks for first: entries, their numbers, patches, the seed."""
    first = list(itertools.islice(itertools.chain.from_iterable(sampler), count))
    files = [path.name for images in samples.entries for path in images.files]
    return hashlib.sha256(repr((sampler.seed, first, files)).encode()).hexdigest()[:16]


def make_images(root: Path, folder: Path) -> Path:
    """`folder` with links to what is in `root` and, in made, the images of options/decide/images.yml."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in root.iterdir():
        if not (folder / part.name).exists():
            (folder / part.name).symlink_to(part.resolve())
    options = load_options(TestOptions, str(OPTIONS / "decide/images.yml"), [f"root={root}"])
    for images in open_sets(options.sets, options, "sets"):
        for index in range(len(images)):
            path = folder / "made" / images.name / images.name_of(index).with_suffix(".png").name
            if not path.exists():
                degraded, _ = images.degraded_and_clean(index)
                top, left = (max(0, size - MADE) // 2 for size in degraded.shape[:2])
                save_image(Image.fromarray(degraded[top:top + MADE, left:left + MADE]), path)
    return folder


def machine() -> str:
    """Processor and torch."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, torch {torch.__version__}"


# Tables.

def write(folder: Path, table: str, rows: list) -> None:
    write_csv(folder / f"{table}.csv", [TABLES[table], *rows])


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.exists() else []


def collect(output: Path) -> None:
    """Bring the finished runs' figures to benchmarks/study, whose other runs stay."""
    done = sorted(path.parent for path in output.glob("*/runs.csv"))
    for table in TABLES:
        runs = {}
        for folder in (RESULTS, *done):
            found = defaultdict(list)
            for line in read(folder / f"{table}.csv"):
                found[line["row"], int(line["sources"]), int(line["seed"]), line["weights"]].append(line)
            runs |= found
        write(RESULTS, table, [[*line.values()] for run in sorted(runs) for line in runs[run]])


class Figures:
    """What the files in benchmarks/study say of a design, of some seeds or all; rows: labels of its runs."""

    def __init__(self, design: str, seeds: Iterable[str] = ()) -> None:
        self.design = DESIGNS[design]
        self.sets, self.images, self.latents = (
            [line | {"row": label(line["row"], line["weights"])} for line in read(RESULTS / f"{table}.csv")
             if design_of(line["row"]) == design and (not seeds or line["seed"] in seeds)]
            for table in ("sets", "images", "latents"))
        labels, groups = ({line[column] for line in self.images} for column in ("row", "group"))
        self.rows = sorted(labels, key=lambda row: ([*ROWS].index(row.partition(",")[0]), row))
        self.groups = [name for name in GROUPS if name in groups]
        self.oracle = defaultdict(list)                         # gains by set
        for (_, of_set), gain in self.above("oracle", "oracle: input", *GROUPS).items():
            self.oracle[of_set].append(gain)

    def psnr(self, row: str, *groups: str) -> dict[tuple[str, str], float]:
        """By seed and set, of the sets of some groups."""
        return {(line["seed"], line["set"]): float(line["psnr"]) for line in self.sets
                if line["row"] == row and line["group"] in groups}

    def above(self, row: str, other: str, *groups: str) -> dict[tuple[str, str], float]:
        """PSNR of a row less that of another, by seed and set."""
        others = self.psnr(other, *groups)
        return {key: value - others[key] for key, value in self.psnr(row, *groups).items()}

    def gain(self, row: str, name: str) -> str:
        """Of a group: PSNR, gain over the input, and its share of the oracle's gain on the same sets."""
        gains = self.above(row, f"{row}: input", name)
        gain, possible = over_seeds(gains), over_seeds({key: mean(self.oracle[key[1]]) for key in gains})
        share = "" if np.isnan(possible) else f" {gain / possible:.0%}"
        return f"{over_seeds(self.psnr(row, name)):.2f} {gain:+.2f}{share}" if gains else "-"

    def difference(self, row: str, other: str, groups: tuple[str, ...], without: str = "") -> tuple:
        """Mean difference in PSNR over the sets of some groups, and its interval."""
        found = {name: [(int(line["seed"]), line["set"], line["image"].partition("_")[0], float(line["psnr"]))
                        for line in self.images if line["row"] == name and line["group"] in groups
                        and line["set"] != without] for name in (row, other)}
        seeds = [{seed for seed, *_ in scores} for scores in found.values()]
        both = seeds[0] & seeds[1] if self.design.paired else seeds[0] | seeds[1]
        if not both or not all(seeds):
            return np.nan, np.nan, np.nan
        ours, theirs = (effects(score for score in scores if score[0] in both) for scores in found.values())
        return interval(ours, theirs, self.design.paired)

    def latent(self, row: str, quantity: str) -> list[float]:
        """In z, b and r: mean over seeds; nan where there is none."""
        lines = [line for line in self.latents if line["row"] == row and line["quantity"] == quantity]
        return [mean(line[space] or "nan" for line in lines) for space in "zbr"]


def mean(values: Iterable[float | str]) -> float:
    """nan where there are none."""
    return float(np.mean([float(value) for value in values] or np.nan))


def over_seeds(found: dict[tuple[str, str], float]) -> float:
    """Mean over seeds of what a seed has in the mean of its sets: not all have as many."""
    seeds = {seed for seed, _ in found}
    return mean(mean(value for (seed, _), value in found.items() if seed == one) for one in seeds)


def tables() -> str:
    """All tables, of the files in benchmarks/study, by design."""
    runs = read(RESULTS / "runs.csv")
    if not runs:
        raise InputError(f"{RESULTS}: no runs.csv yet, expected runs: python -m benchmarks.study --root PATH")
    text = ["Equal conditions", as_text([list(TABLES["runs"]), *([*line.values()] for line in runs)])]
    for design in DESIGNS:
        figures = Figures(design)
        if figures.rows:
            text += [f"\n{OPTIONS / design}", *map(as_text, tables_of(figures))]
    done = [{line["seed"] for line in runs if line["row"] == row} for row in ("transport", "frozen")]
    for name, since, *than in (("The rule", 0, "transport", 0), ("Its addendum", NEW, "frozen", 1)):
        if seeds := [seed for seed in done[0] & done[1] if int(seed) >= since]:
            text += [f"{name}, seeds {', '.join(sorted(seeds))}: {verdict(Figures('decide', seeds), *than)}"]
    return "\n".join(text)


def tables_of(figures: Figures) -> list[list[list[str]]]:
    """A design's tables: gains, differences to the baselines, sets, checks, latents."""
    rows, groups = figures.rows, figures.groups
    pairs = {f"{row} less {other}": (row, other) for other in figures.design.baselines if other in rows
             for row in rows if row != other and row.endswith("_settled") == other.endswith("_settled")}
    parts = {" and ".join(part): part for part in (*((name,) for name in groups), figures.design.unseen)}
    trained = {row: figures.psnr(row if row in rows else f"{rows[0]}: input", *GROUPS[:-1])
               for row in ("input", *rows)}
    sets = sorted({of_set for psnr in trained.values() for _, of_set in psnr},
                  key=lambda name: (GROUPS.index(group(name, "")), name))
    given = dict.fromkeys(line["row"] for line in figures.sets if ": " in line["row"])
    every = [
        grid("PSNR in dB, gain over the input, share of the oracle's gain", rows, groups, figures.gain),
        grid("difference in dB, 95 % interval", pairs, parts,
             lambda pair, part: shown(*figures.difference(*pairs[pair], parts[part]))),
        grid("PSNR in dB, of the trained", sets, trained, lambda name, row:
             f"{mean(psnr for (_, of_set), psnr in trained[row].items() if of_set == name):.2f}"),
        grid("change in dB by what the decoder is given",
             [name for name in given if not name.endswith(": input")], groups, lambda row, name:
             f"{over_seeds(figures.above(row, row.partition(':')[0], name)):+.2f}".replace("+nan", "-")),
        grid("matched scenes: z / b / r", rows, QUANTITIES, lambda row, quantity:
             " / ".join(f"{value:.3f}" for value in figures.latent(row, quantity))),
    ]
    return [table for table in every if len(table) > 1]


def grid(title: str, rows: Iterable[str], columns: Iterable[str],
         cell: Callable[[str, str], str]) -> list[list[str]]:
    return [[title, *columns], *([row, *(cell(row, column) for column in columns)] for row in rows)]


def shown(middle: float, low: float, high: float) -> str:
    between = "(one seed)" if np.isnan(low) else f"[{low:+.2f}, {high:+.2f}]"
    return "-" if np.isnan(middle) else f"{middle:+.2f} {between}"


def verdict(figures: Figures, than: str, latent: int) -> str:
    """The rule of options/decide/base.yml, applied to the runs that there are.

    than, latent: the row and which of its z, b, r the distance in `transport`'s b is compared with.
    """
    unseen = figures.design.unseen
    difference = partial(figures.difference, "transport", "frozen", unseen)
    gain, low, high = difference()
    sets = {of_set for _, of_set in figures.psnr("transport", *unseen)}
    least = min(difference(without=name)[0] for name in sets)
    (in_z, in_b, _), others = (figures.latent(row, "distance between sources") for row in ("transport", than))
    outcome = ("cannot be told: T did not bring the sources together" if not in_b <= TREATED * others[latent]
               else "holds" if gain >= CLAIMED and low > 0 and least > 0
               else "fails for certain" if high < CLAIMED else "fails")
    return (f"transport less frozen, {' and '.join(unseen)}: {shown(*difference())} dB, "
            f"{least:+.2f} without its best set; distance between sources {in_z:.3f} in z, {in_b:.3f} in b, "
            f"{others[latent]:.3f} in {than}'s {'zbr'[latent]}. The claim {outcome}")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("datasets/mini5d"), help="folder of the images")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="of these alone")
    parser.add_argument("--seeds", type=int, default=8, help="at most so many of each row")
    parser.add_argument("--last", action="store_true", help="measure the last weights where the runs average")
    parser.add_argument("--output", type=Path, default=Path("experiments/study"), help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="print the tables, train nothing")
    flags = parser.parse_args(arguments)
    collect(flags.output)
    done = {(label(line["row"], line["weights"]), line["seed"]) for line in read(RESULTS / "runs.csv")}
    for seed in range(0 if flags.tables else flags.seeds):
        for row in flags.rows:
            name = label(row, "last" if flags.last else "")
            if seed < ROWS[row].seeds and (name, str(seed)) not in done:
                run(row, seed, flags.root, flags.output, flags.last)
                collect(flags.output)
    print(tables())


if __name__ == "__main__":
    with one_line_errors():
        main()
