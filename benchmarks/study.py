"""Does the barycenter help where training never went? Networks under equal conditions, on real images.

    python -m benchmarks.study --root PATH/TO/mini5d [--jobs 2]       trains and measures what the tables lack
    python -m benchmarks.study --root PATH/TO/mini5d --run e_separate --seed 1 [--sources 3]
    python -m benchmarks.study --tables                               prints the tables, trains nothing

A row is an option file of options/study (base.yml and one line of difference), a run is a row with a seed;
rows from i on are further runs, which ask why. For the paper's curve, rows of CURVE have runs of fewer
sources, too, the first of ORDER. train.py trains a run, on the same samples in the same order as all of its
seed and sources, and goes on where it was stopped (SIGTERM or Ctrl-C: all is saved). It is measured on the
sets of test.yml and the matched scenes of matched.yml (benchmarks.latent_report). Its figures lie beside its
checkpoint and are collected in benchmarks/study:

    sets.csv      PSNR and SSIM by set; groups: seen (by runs of all sources), unseen level, type, mixed
    images.csv    the same by image
    runs.csv      parameters, steps, samples, core-hours, hash of the first 1000 samples, date, machine
    latents.csv   what benchmarks.latent_report says of the matched scenes
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks import latent_report
from data.datasets import ImageSet, TrainingSet, open_sources, open_test_sets
from data.sampler import EpochSampler
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.evaluation import Restored, evaluate
from utils.files import write_csv
from utils.options import TestOptions, TrainOptions, load_options
from utils.tables import as_text

OPTIONS = Path("options/study")
RESULTS = Path("benchmarks/study")
SEEDS = {"b": 3, "c": 3, "e": 3, "j": 3, "k": 3}                        # of the rows, by their letter; else 1
ORDER = ("rain", "haze", "noise", "lowlight", "deblur")                 # in which the curve adds sources
CURVE = ("b", "e")
UNSEEN = "type and mixed"
UNSEEN_GROUPS = ("type", "mixed")
GAIN = "{:+.2f} [{:+.2f}, {:+.2f}]"                                     # of difference()
GROUPS = ("seen", "level", "type", "mixed")
TABLES = {
    "sets": ("row", "seed", "sources", "group", "set", "images", "psnr", "ssim"),
    "images": ("row", "seed", "sources", "group", "set", "image", "psnr", "ssim"),
    "runs": ("row", "seed", "sources", "parameters", "steps", "samples", "core_hours", "samples_hash", "date",
             "machine"),
    "latents": ("row", "seed", "sources", "quantity", "z", "b", "r"),
}
DRAWS = 2000                                                    # of the bootstrap
RUNNING: list[subprocess.Popen] = []
STOPPING: list[int] = []                        # signals; an Event takes a lock, where a handler may wait


def option_files() -> dict[str, Path]:
    """The rows' option files by name, in the order of their letters."""
    return {path.stem: path for path in sorted(OPTIONS.glob("[a-z]_*.yml"))}


def hash_of_samples(sampler: EpochSampler, samples: TrainingSet, count: int = 1000) -> str:
    """SHA-256 (16 digits) of what the sampler asks for first: entries, their numbers, patches, the seed."""
    first = list(itertools.islice(itertools.chain.from_iterable(sampler), count))
    files = [path.name for images in samples.entries for path in images.files]
    return hashlib.sha256(repr((sampler.seed, first, files)).encode()).hexdigest()[:16]


def first_sources(file: str, count: int) -> list[str]:
    """Overrides that leave an option file the first sources of ORDER, in batches that they share evenly."""
    options = load_options(TrainOptions, file)
    sources = [dataclasses.asdict(source) for source in options.sources if source.source in ORDER[:count]]
    batch, *batches = (max(1, round(size / count)) * count
                       for size in (options.batch, *(size for _, size, _ in options.progressive)))
    progressive = [[start, size, patch]
                   for (start, _, patch), size in zip(options.progressive, batches, strict=True)]
    return [f"sources={json.dumps(sources)}", f"batch={batch}", f"progressive={progressive}"]


def run_name(name: str, seed: int, sources: int) -> str:
    return f"{name}_{seed}" + (f"_of_{sources}" if sources < len(ORDER) else "")


def run(name: str, seed: int, sources: int, root: str, output: Path) -> None:
    """Train a row with a seed, or continue it, and write its figures beside its checkpoint."""
    row, folder, file = name[0], output / run_name(name, seed, sources), str(option_files()[name])
    overrides = [f"root={root}", f"seed={seed}", f"name={folder.name}", f"output={output}"]
    if sources < len(ORDER):
        overrides += first_sources(file, sources)
    options = load_options(TrainOptions, file, overrides)
    resume = ["--resume"] if (folder / "last.pth").exists() else []
    status = wait_for([sys.executable, "train.py", "--opt", options.file, "--set", *overrides, *resume])
    seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with open(folder / "cpu_seconds.txt", "a", encoding="utf-8") as file:
        file.write(f"{seconds:.0f}\n")
    if status:
        raise InputError(f"{folder.name}: training ended early; the same command continues it")

    net = load_network(str(folder / "last.pth"), torch.device("cpu"))
    tests, matched = (load_options(TestOptions, str(OPTIONS / file), [f"root={root}"])
                      for file in ("test.yml", "matched.yml"))
    samples = TrainingSet(open_sources(options), seed)
    sampler = EpochSampler.of_run(options, samples.samples_per_epoch, 0, 0, 1)
    images = []

    def note(images_of: ImageSet, result: Restored) -> None:
        images.append([row, seed, sources, group(images_of.name), images_of.name,
                       images_of.name_of(result.index), result.scores["psnr"], result.scores["ssim"]])

    sets = open_test_sets(tests.sets, root, f"{tests.file}: sets", print)
    rows = evaluate(net, sets, tests.protocol, each=note, precision=tests.precision)
    write(folder, "images", images)
    write(folder, "sets", [[row, seed, sources, group(r.set), r.set, r.images, r.scores["psnr"],
                            r.scores["ssim"]] for r in rows])
    latents = []
    if options.network.barycenter:
        scenes = open_test_sets(matched.sets, root, f"{matched.file}: sets", print)
        latents, _ = latent_report.measure(net, scenes, scenes[0].selected, 128)
    write(folder, "latents", [[row, seed, sources, *values[:4]] for values in latents])
    parameters = sum(parameter.numel() for parameter in net.parameters())
    hours = sum(map(float, (folder / "cpu_seconds.txt").read_text().split())) / 3600
    write(folder, "runs", [[row, seed, sources, parameters, options.steps, sampler.samples, f"{hours:.3f}",
                            hash_of_samples(sampler, samples), date.today(), machine()]])
    (folder / "decoded.bin").unlink(missing_ok=True)            # a gigabyte


def wait_for(command: list, **how) -> int:
    """Exit status of a command, to which SIGINT and SIGTERM are passed on."""
    process = subprocess.Popen(command, **how)
    RUNNING.append(process)
    status = process.wait()
    RUNNING.remove(process)
    return status


def pass_on_signals() -> None:
    def stop(number: int, _) -> None:
        STOPPING.append(number)
        for process in RUNNING:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def group(name: str) -> str:
    """The group of a test set: its name's first word."""
    return name.partition("_")[0]


def machine() -> str:
    """Processor and torch."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, torch {torch.__version__}"


def write(folder: Path, table: str, rows: list) -> None:
    write_csv(folder / f"{table}.csv", [TABLES[table], *rows])


def collect(output: Path) -> None:
    """The finished runs' figures, with what benchmarks/study has of others, by row, seed and sources."""
    done = [path.parent for path in sorted(output.glob("*/runs.csv"))]
    for table in TABLES:
        rows = {}
        for path in [RESULTS / f"{table}.csv", *(folder / f"{table}.csv" for folder in done)]:
            by_run = defaultdict(list)
            for line in read(path):
                by_run[key(line)].append(list(line.values()))
            rows |= by_run
        write(RESULTS, table, [row for of_run in sorted(rows) for row in rows[of_run]])


def key(line: dict[str, str]) -> tuple[str, int, int]:
    """Row, number of sources (the study's runs, of all, come last) and seed that a line is of."""
    return line["row"], int(line["sources"]), int(line["seed"])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores(lines: list[dict[str, str]], sources: int) -> dict[str, dict[str, np.ndarray]]:
    """PSNR of images.csv by row and set, [seeds,images], of the runs of so many sources."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in (line for line in lines if int(line["sources"]) == sources):
        found[line["row"]][line["set"]][int(line["seed"])].append(float(line["psnr"]))
    return {row: {name: np.array([by_seed[seed] for seed in sorted(by_seed)])
                  for name, by_seed in sets.items()} for row, sets in found.items()}


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], sets: list[str],
               rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean over sets of the paired difference in PSNR, and the ends of its 95 % bootstrap interval.

    Each draw takes seeds of both sides and images of each set, with replacement.
    """
    def mean(pick) -> float:
        seeds = [pick(len(side[sets[0]])) for side in (ours, theirs)]
        of_sets = []
        for name in sets:
            images = pick(ours[name].shape[1])
            mine, other = ours[name][seeds[0]][:, images], theirs[name][seeds[1]][:, images]
            of_sets.append(mine.mean() - other.mean())
        return float(np.mean(of_sets))

    draws = [mean(lambda count: rng.integers(count, size=count)) for _ in range(DRAWS)]
    return (mean(np.arange), *np.percentile(draws, (2.5, 97.5)))


def tables(baseline: str = "b") -> str:
    """All tables, of the files in benchmarks/study; differences are to the row `baseline`."""
    runs, images = read(RESULTS / "runs.csv"), read(RESULTS / "images.csv")
    by_row = scores(images, len(ORDER))
    if not runs:
        raise InputError(f"{RESULTS}: no runs.csv yet, expected runs: python -m benchmarks.study --root PATH")
    if baseline not in by_row:
        raise InputError(f"--baseline {baseline}: no run of that row, expected one of {', '.join(by_row)}")
    names = {path.stem[0]: path.stem for path in option_files().values()}
    text = ["Equal conditions", as_text([list(TABLES["runs"]), *([*line.values()] for line in runs)])]
    sets = sorted({name for of_row in by_row.values() for name in of_row},
                  key=lambda name: (GROUPS.index(group(name)), name))
    of_group = {part: [name for name in sets if group(name) == part] for part in map(group, sets)}

    lines = [["PSNR in dB, mean over seeds (spread: standard deviation over seeds)", *of_group, "seeds"]]
    for row, found in by_row.items():
        of_seeds = [np.mean([found[name].mean(axis=1) for name in of_group[part]], axis=0)
                    for part in of_group]
        cells = (f"{x.mean():.2f}" + (f" ({x.std(ddof=1):.2f})" if len(x) > 1 else "") for x in of_seeds)
        lines.append([names.get(row, row), *cells, str(len(of_seeds[0]))])
    text += ["", as_text(lines)]
    gains = {}
    lines = [[f"paired difference to {names[baseline]} in dB, 95 % interval", *of_group, UNSEEN]]
    groups = [*of_group.values(), [name for name in sets if group(name) in UNSEEN_GROUPS]]
    for row, found in by_row.items():
        if row != baseline:
            rng = np.random.default_rng(0)                      # of each row: no other row moves its digits
            cells = [GAIN.format(*difference(found, by_row[baseline], part, rng))
                     for part in groups]
            lines.append([names.get(row, row), *cells])
            gains[row] = cells[-1]
    text += ["", as_text(lines)]
    lines = [["PSNR in dB", *(names.get(row, row) for row in by_row)]]
    lines += [[name, *(f"{found[name].mean():.2f}" for found in by_row.values())] for name in sets]
    text += ["", as_text(lines), "", as_text(latent_table(names, f"{UNSEEN}, less {baseline}", gains))]
    return "\n".join([*text, "", as_text(curve(images, of_group))])


def curve(images: list[dict[str, str]], of_group: dict[str, list[str]]) -> list[list[str]]:
    """PSNR of the rows CURVE where no run was trained, by the number of degradations trained."""
    parts = [part for part in of_group if part in UNSEEN_GROUPS]
    unseen = [name for part in parts for name in of_group[part]]
    first, last = CURVE
    lines = [[f"trained, of {', '.join(ORDER)}", *(f"{row}: {part}" for part in parts for row in CURVE),
              f"{last} less {first}, {UNSEEN}", "seeds"]]
    for count in range(1, len(ORDER) + 1):
        found = scores(images, count)
        if all(row in found for row in CURVE):
            means = (np.mean([found[row][name].mean() for name in of_group[part]])
                     for part in parts for row in CURVE)
            gain = difference(found[last], found[first], unseen, np.random.default_rng(0))
            lines.append([f"the first {count}", *(f"{mean:.2f}" for mean in means),
                          GAIN.format(*gain), str(len(found[last][unseen[0]]))])
    return lines


def latent_table(names: dict[str, str], title: str, gains: dict[str, str]) -> list[list[str]]:
    """What latents.csv says of each row with a barycenter, means over seeds of z, b and r, and its gain."""
    wanted = ("distance between sources", "variance", "probe accuracy", "same scene", "retrieval")
    found = defaultdict(list)
    for line in read(RESULTS / "latents.csv"):
        if line["quantity"] in wanted and int(line["sources"]) == len(ORDER):
            found[line["row"], line["quantity"]].append([float(line[space]) for space in "zbr"])
    lines = [["matched scenes: z / b / r", *wanted, title]]
    for row in dict.fromkeys(row for row, _ in found):
        lines.append([names.get(row, row), *(" / ".join(f"{value:.3f}" for value in np.mean(found[row, q], 0))
                                             for q in wanted), gains.get(row, "-")])
    return lines


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="datasets/mini5d", help="folder of the images")
    parser.add_argument("--run", metavar="NAME", help="one row alone, by its option file's name")
    parser.add_argument("--seed", type=int, default=0, help="with --run")
    parser.add_argument("--sources", type=int, default=len(ORDER), choices=range(1, len(ORDER) + 1),
                        metavar="COUNT", help=f"with --run: only the first of {', '.join(ORDER)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--output", type=Path, default=Path("experiments/study"), help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--baseline", default="b", metavar="LETTER", help="with --tables: compare with it")
    flags = parser.parse_args()
    names = option_files()
    if flags.run and flags.run not in names:
        raise InputError(f"--run {flags.run}, expected one of {', '.join(names)}")
    if flags.tables:
        print(tables(flags.baseline))
        return
    pass_on_signals()
    if flags.run:
        run(flags.run, flags.seed, flags.sources, flags.root, flags.output)
        return
    collect(flags.output)
    have = {key(line) for line in read(RESULTS / "runs.csv")}
    wanted = [(name, len(ORDER), seed) for seed in range(3) for name in names
              if seed < SEEDS.get(name[0], 1)]
    wanted += [(name, count, 0) for count in range(2, len(ORDER)) for name in names if name[0] in CURVE]

    def separately(of: tuple[str, int, int]) -> str:
        """A run in a process of its own, on one core; returns its line."""
        name, sources, seed = of
        label = run_name(name, seed, sources)
        if STOPPING:
            return f"{label}: not begun"
        start = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.study", "--root", flags.root, "--output", flags.output,
                   "--run", name, "--seed", str(seed), "--sources", str(sources)]
        log = flags.output / f"{label}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            status = wait_for(command, stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        state = f"not done, see {log}" if status else "done"
        return f"{label}: {state}, {(time.monotonic() - start) / 60:.0f} minutes"

    with ThreadPoolExecutor(max(1, flags.jobs)) as pool:
        for line in pool.map(separately, [of for of in wanted if (of[0][0], *of[1:]) not in have]):
            print(line, flush=True)
            collect(flags.output)
    if not STOPPING:
        print(tables())


if __name__ == "__main__":
    with one_line_errors():
        main()
