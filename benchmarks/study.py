"""Does the barycenter help where training never went? Networks under equal conditions, on real images.

    python -m benchmarks.study --root PATH/TO/mini5d [--rows w transport frozen] [--seeds 2]
    python -m benchmarks.study --tables                               prints the tables, trains nothing

trains and measures what the tables lack. A row (benchmarks/ablations.py) is an option file and a network, a
run a row with a seed. Stopped (SIGTERM or Ctrl-C), a run is saved, and the same command goes on. Two designs:

    options/decide   a network in which the split [b, r] matters, arms by what moves T; base.yml has the rule
    options/study    whole networks from scratch: Restormer (b), BaryIR by one objective or another

Figures lie beside the checkpoint and are collected in benchmarks/study:

    sets.csv      PSNR and SSIM by set; row "w: input": of the degraded images; "transport: T off" and the
                  like, in mixed sets: where the decoder of row transport is given other latents
    images.csv    the same by image, of rows without a colon
    runs.csv      parameters, steps, samples, core-hours, hash of the first 1000 samples, date, machine
    latents.csv   what benchmarks.latent_report says of the matched scenes

Groups of sets: seen; unseen level, type, mixed; left out: of a degradation on which a seed was not trained.
"""

import dataclasses
import hashlib
import itertools
import json
import platform
import signal
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import train
from benchmarks import latent_report
from benchmarks.ablations import BEGUN_WITH, ROWS
from benchmarks.study_tables import collect, finished, group, label, tables, write
from data.datasets import ImageSet, TrainingSet, open_sets
from data.sampler import EpochSampler
from models.baryir import BaryIR
from utils.checkpoint import load_network, read_checkpoint
from utils.errors import one_line_errors
from utils.files import append_text
from utils.images import save_image, to_tensor
from utils.metrics import Metrics, crop_for
from utils.options import TestOptions, TrainOptions, load_options

OPTIONS = Path("options")
LEFT_OUT = ("rain", "haze", "deblur", "lowlight")                       # by seeds 0, 1, 2, 3, 4, ...
MADE = 256                                      # pixels: sides of the images of options/decide/images.yml


def left_out(row: str, seed: int) -> str:
    """The degradation on which a run is not trained, if any."""
    return LEFT_OUT[seed % len(LEFT_OUT)] if row in ("w", *BEGUN_WITH) else ""


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
    for seed, row in itertools.product(range(0 if flags.tables else flags.seeds), flags.rows):
        if seed < ROWS[row].seeds and (label(row, "last" * flags.last), str(seed)) not in finished():
            run(row, seed, flags.root, flags.output, flags.last)
            collect(flags.output)
    print(tables())


if __name__ == "__main__":
    with one_line_errors():
        main()
