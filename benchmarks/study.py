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
import re
import signal
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import train
from benchmarks import latent_report
from benchmarks.ablations import Bottleneck, OneLatent, load_as
from benchmarks.intervals import effects, interval
from data.datasets import ImageSet, TrainingSet, open_sources, open_test_sets
from data.sampler import EpochSampler
from models.baryir import BaryIR
from utils.errors import InputError, one_line_errors
from utils.files import write_csv
from utils.images import save_image, to_tensor
from utils.metrics import Metrics, crop_for
from utils.options import TestOptions, TrainOptions, load_options
from utils.tables import as_text

DESIGNS = {"decide": Path("options/decide"), "study": Path("options/study")}
RESULTS = Path("benchmarks/study")
SEEDS = {"w": 8, "transport": 8, "frozen": 8, "reconstruction": 8, "none": 8, "oracle": 2, "dropout": 2,
         "b": 3, "c": 3, "e": 3, "k": 3, "d": 1, "g": 1}                # of each row, in this order
ARMS = ("transport", "frozen", "reconstruction", "none", "dropout")     # which begin with w
CHECKED = ("transport", "frozen", "reconstruction", "dropout")
LEFT_OUT = ("rain", "haze", "deblur", "lowlight")                       # by seeds 0, 1, 2, 3, 4, ...
FROZEN = partial(Bottleneck, transport_map="frozen")
NETWORKS = {"w": FROZEN, "frozen": FROZEN, "oracle": FROZEN,
            "transport": Bottleneck, "reconstruction": Bottleneck,
            "none": partial(Bottleneck, transport_map="none"),
            "dropout": partial(Bottleneck, dropout=0.5),
            "g": partial(OneLatent, kept="barycenter")}                 # else BaryIR
BASELINES = {"decide": ("frozen",), "study": ("b", "c")}
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
CLAIMED, TREATED = 0.15, 0.5                    # dB, distance in b / z: rule of options/decide/base.yml
UNSEEN = {"decide": ("level", "mixed"), "study": ("type", "mixed")}     # on which a design is judged


def option_files() -> dict[str, Path]:
    """The rows' option files: of a row, or of a row and a name, as in b_restormer_large.yml."""
    files = itertools.chain(*(folder.glob("*.yml") for folder in DESIGNS.values()))
    found = {path.stem.partition("_")[0]: path for path in files}
    return {row: found[row] for row in SEEDS if row in found}


def design_of(row: str) -> str:
    folder = option_files()[re.split("[:,]", row)[0]].parent
    return next(name for name, place in DESIGNS.items() if place == folder)


def left_out(row: str, seed: int) -> str:
    """The degradation on which a run is not trained, if any."""
    return LEFT_OUT[seed % len(LEFT_OUT)] if row in ("w", *ARMS) else ""


def group(images: str, absent: str) -> str:
    """The group of a test set: its name's first word, or that it involves what training lacks."""
    words = images.split("_")
    return "left out" if absent in words else words[0]


# Runs.


def run(row: str, seed: int, root: Path, output: Path, last: bool = False) -> None:
    """Train a row with a seed, or continue it, and write its figures beside its checkpoint.

    last: measure the last weights where the run averages, too.
    """
    folder, file, absent = output / f"{row}_{seed}", str(option_files()[row]), left_out(row, seed)
    if design_of(row) == "decide":
        root = make_images(root, output / "images")
    overrides = [f"root={root}", f"name={folder.name}", f"output={output}"]
    if row in ARMS:                                             # from the warm start, on other samples
        overrides += [f"pretrained={output}/w_{seed}/last.pth", f"seed={seed + 100}"]
    else:
        overrides += [f"seed={seed}"]
    if absent:
        kept = [dataclasses.asdict(source) for source in load_options(TrainOptions, file).sources
                if source.name != absent]
        overrides += [f"sources={json.dumps(kept)}"]
    options = load_options(TrainOptions, file, overrides)
    begin = time.process_time()
    try:
        resume = ["--resume"] if (folder / "last.pth").exists() else []
        train.main(["--opt", file, "--set", *overrides, *resume], NETWORKS.get(row, BaryIR))
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "cpu_seconds.txt", "a", encoding="utf-8") as times:
            times.write(f"{time.process_time() - begin:.0f}\n")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)           # train.py lets them wait for a step's end
        signal.signal(signal.SIGINT, signal.default_int_handler)
    write_figures(row, seed, options, folder, "averaged" if options.ema and not last else "last")
    (folder / "decoded.bin").unlink(missing_ok=True)            # half a gigabyte


def write_figures(row: str, seed: int, options: TrainOptions, folder: Path, weights: str) -> None:
    """Measure a finished run: the four tables in its folder."""
    absent, kind = left_out(row, seed), NETWORKS.get(row, BaryIR)
    net = load_as(kind, folder / "last.pth", weights == "last")
    tests, matched = (load_options(TestOptions, str(path), [f"root={options.root}"])
                      for path in map(Path(options.file).with_name, ("test.yml", "matched.yml")))
    samples = TrainingSet(open_sources(options), options.seed)
    sampler = EpochSampler.of_run(options, samples.samples_per_epoch, 0, 0, 1)
    this = [seed, len(samples.names), weights]

    sets, images, elsewhere = [], [], None
    for of_set in open_test_sets(tests.sets, tests.root, f"{tests.file}: sets", print):
        checked = row in CHECKED and of_set.name.startswith("mixed")
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
        scenes = open_test_sets(trained, matched.root, f"{matched.file}: sets", print)
        latents, _ = latent_report.measure(net, scenes, scenes[0].selected, 128)
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
    for index in range(images.selected):
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
    file = str(DESIGNS["decide"] / "images.yml")
    for images in open_test_sets(load_options(TestOptions, file).sets, str(root), f"{file}: sets", print):
        for index in range(images.selected):
            path = folder / "made" / images.name / images.name_of(index).with_suffix(".png").name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
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
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def key(line: dict[str, str]) -> tuple[str, int, int, str]:
    """Row, number of sources, seed and weights that a line is of."""
    return line["row"], int(line["sources"]), int(line["seed"]), line["weights"]


def collect(output: Path) -> None:
    """Bring the finished runs' figures to benchmarks/study, whose other runs stay."""
    done = [path.parent for path in sorted(output.glob("*/runs.csv"))]
    for table in TABLES:
        rows = {}
        for path in [RESULTS / f"{table}.csv", *(folder / f"{table}.csv" for folder in done)]:
            by_run = defaultdict(list)
            for line in read(path):
                by_run[key(line)].append(list(line.values()))
            rows |= by_run
        write(RESULTS, table, [row for of_run in sorted(rows) for row in rows[of_run]])


def label(line: dict[str, str]) -> str:
    """A row in the tables: its name and, in options/study, the weights where they are the last ones."""
    row, colon, given = line["row"].partition(":")
    return row + ", last" * (line["weights"] == "last" and design_of(row) == "study") + colon + given


class Figures:
    """What the files in benchmarks/study say of a design.

    psnr: by label, seed and set. of_group: seeds and sets of each group. rows: labels without a colon.
    """

    def __init__(self, design: str) -> None:
        sets, self.images, self.latents = ([line for line in read(RESULTS / f"{table}.csv")
                                            if design_of(line["row"]) == design]
                                           for table in ("sets", "images", "latents"))
        self.paired, self.unseen, self.baselines = design == "decide", UNSEEN[design], BASELINES[design]
        self.psnr, self.of_group = defaultdict(dict), {name: set() for name in GROUPS}
        for line in sets:
            self.psnr[label(line)][line["seed"], line["set"]] = float(line["psnr"])
            self.of_group[line["group"]].add((line["seed"], line["set"]))
        self.groups = [name for name in GROUPS if self.of_group[name]]
        self.rows = sorted({row for row in self.psnr if ":" not in row},
                           key=lambda row: [*SEEDS].index(row.partition(",")[0]))

    def difference(self, row: str, other: str, groups: tuple[str, ...], without: str = "") -> tuple:
        """Mean difference in PSNR over the sets of some groups, and its interval."""
        found = {name: [(int(line["seed"]), line["set"], line["image"].partition("_")[0], float(line["psnr"]))
                        for line in self.images if label(line) == name and line["group"] in groups
                        and line["set"] != without] for name in (row, other)}
        seeds = [{seed for seed, *_ in scores} for scores in found.values()]
        both = seeds[0] & seeds[1] if self.paired else seeds[0] | seeds[1]
        if not both or not all(seeds):
            return np.nan, np.nan, np.nan
        ours, theirs = (effects(score for score in scores if score[0] in both) for scores in found.values())
        return interval(ours, theirs, self.paired)

    def gain(self, row: str, name: str) -> str:
        """Of a group: PSNR, gain over the input, and its share of the oracle's gain on the same sets."""
        keys = self.of_group[name] & self.psnr[row].keys()
        if not keys:
            return "-"
        gain = np.mean([self.psnr[row][key] - self.psnr[f"{row}: input"][key] for key in keys])
        oracle = {key: value - self.psnr["oracle: input"][key] for key, value in self.psnr["oracle"].items()}
        possible = np.mean([np.mean([value for (_, of_set), value in oracle.items() if of_set == wanted]
                                    or np.nan) for _, wanted in keys])
        share = "" if np.isnan(possible) else f" {gain / possible:.0%}"
        return f"{np.mean([self.psnr[row][key] for key in keys]):.2f} {gain:+.2f}{share}"

    def latent(self, row: str, quantity: str, space: str) -> float:
        """Mean over seeds; nan where there is none."""
        return float(np.mean([float(line[space] or "nan") for line in self.latents
                              if label(line) == row and line["quantity"] == quantity] or np.nan))


def tables() -> str:
    """All tables, of the files in benchmarks/study, by design."""
    runs = read(RESULTS / "runs.csv")
    if not runs:
        raise InputError(f"{RESULTS}: no runs.csv yet, expected runs: python -m benchmarks.study --root PATH")
    text = ["Equal conditions", as_text([list(TABLES["runs"]), *([*line.values()] for line in runs)])]
    for design, folder in DESIGNS.items():
        figures = Figures(design)
        if figures.rows:
            text += [f"\n{folder}", *map(as_text, tables_of(figures))]
        if {"transport", "frozen"} <= {*figures.rows}:
            text += [verdict(figures)]
    return "\n".join(text)


def tables_of(figures: Figures) -> list[list[list[str]]]:
    """A design's tables: gains, differences to the baselines, sets, checks, latents."""
    groups, psnr = figures.groups, figures.psnr
    gains = [["PSNR in dB, gain over the input, share of the oracle's gain", *groups]]
    gains += [[row, *(figures.gain(row, name) for name in groups)] for row in figures.rows]
    parts = [*((name,) for name in groups), figures.unseen]
    differences = [["difference in dB, 95 % interval", *map(" and ".join, parts)]]
    differences += [[f"{row} less {other}", *(shown(figures.difference(row, other, part)) for part in parts)]
                    for other in figures.baselines for row in figures.rows if row != other]
    sets = [["PSNR in dB, of the trained", "input", *figures.rows]]
    trained = {key for name in groups if name != "left out" for key in figures.of_group[name]}
    for name in sorted({of_set for _, of_set in trained}, key=lambda name: GROUPS.index(group(name, ""))):
        of_rows = ([value for key, value in psnr[row].items() if key in trained and key[1] == name]
                   for row in (f"{figures.rows[0]}: input", *figures.rows))
        sets.append([name, *(f"{np.mean(values or np.nan):.2f}" for values in of_rows)])
    checks = [["change in dB by what the decoder is given", *groups]]
    for changed in (name for name in psnr if ": " in name and not name.endswith(": input")):
        before = psnr[changed.partition(":")[0]]
        of_groups = ([psnr[changed][key] - before[key] for key in figures.of_group[name] & before.keys()
                      if key in psnr[changed]] for name in groups)
        checks.append([changed, *(f"{np.mean(values or np.nan):+.2f}" for values in of_groups)])
    latents = [["matched scenes: z / b / r", *QUANTITIES]]
    latents += [[row, *(" / ".join(f"{figures.latent(row, quantity, space):.3f}" for space in "zbr")
                        for quantity in QUANTITIES)] for row in figures.rows]
    return [table for table in (gains, differences, sets, checks, latents) if len(table) > 1]


def shown(difference: tuple[float, float, float]) -> str:
    mean, low, high = difference
    return f"{mean:+.2f} " + ("(one seed)" if np.isnan(low) else f"[{low:+.2f}, {high:+.2f}]")


def verdict(figures: Figures) -> str:
    """The rule of options/decide/base.yml, applied to the runs that there are."""
    difference = partial(figures.difference, "transport", "frozen", figures.unseen)
    gain, low, high = difference()
    sets = {line["set"] for line in figures.images if line["group"] in figures.unseen}
    least = min(difference(without=name)[0] for name in sets)
    apart = [figures.latent("transport", "distance between sources", space) for space in "bz"]
    outcome = ("cannot be told: T did not bring the sources together" if not apart[0] <= TREATED * apart[1]
               else "holds" if gain >= CLAIMED and low > 0 and least > 0
               else "fails for certain" if high < CLAIMED else "fails")
    return (f"transport less frozen, {' and '.join(figures.unseen)}: {shown(difference())} dB, "
            f"{least:+.2f} without its best set; distance between sources {apart[1]:.3f} in z, "
            f"{apart[0]:.3f} in b. The claim {outcome}")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("datasets/mini5d"), help="folder of the images")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of these alone")
    parser.add_argument("--seeds", type=int, default=8, help="at most so many of each row")
    parser.add_argument("--last", action="store_true", help="measure the last weights where the runs average")
    parser.add_argument("--output", type=Path, default=Path("experiments/study"), help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="print the tables, train nothing")
    flags = parser.parse_args(arguments)
    rows = flags.rows or list(option_files())
    for row in rows:
        if row not in option_files():
            raise InputError(f"no row {row}, expected some of {', '.join(option_files())}")
    collect(flags.output)
    for seed in range(0 if flags.tables else flags.seeds):
        done = {(label(line), int(line["seed"])) for line in read(RESULTS / "runs.csv")}
        for row in rows:
            name = row + ", last" * (flags.last and design_of(row) == "study")
            if seed < SEEDS[row] and (name, seed) not in done:
                run(row, seed, flags.root, flags.output, flags.last)
                collect(flags.output)
    print(tables())


if __name__ == "__main__":
    with one_line_errors():
        main()
