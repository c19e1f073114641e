"""Restore and measure test sets, or restore one's own photographs.

    python test.py --opt options/test_real.yml                                   the option file's test sets
    python test.py --opt options/test_real.yml --input PATH --output PATH        a file or a folder of photographs

A folder run that was interrupted goes on where it stopped: the same command again. What it cannot read is named, and the exit
status is 3.

Writes results/NAME/SET/ (restored images, PNG) and results/NAME/table.csv, table.md (per set: images, metrics of the input
and of the restored images), and prints the table; beside the paper's published rows where the option file names them
(comparison.csv).
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.datasets import ImageSet, open_test_sets
from models.baryir import BaryIR, compile_stages
from utils import distributed
from utils.checkpoint import load_network
from utils.errors import InputError, count, first_few, one_line_errors, printable
from utils.evaluation import Restored, average_row, evaluate, restore
from utils.files import list_files, remove_partial, write_text
from utils.images import save_image, to_image, to_uint8
from utils.metrics import Metrics
from utils.options import TestOptions, load_options
from utils.photographs import LOSSY, PHOTOGRAPHS, Journal, Photograph, require_format
from utils.runs import keep_freed_memory
from utils.tables import (
    as_markdown,
    as_text,
    comparison_table,
    markdown,
    read_published,
    remarks,
    set_table,
    write_comparison_csv,
    write_set_csv,
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override options, keys dotted")
    parser.add_argument("--protocol", choices=("promptir", "baryir", "full"), help="override the option file's protocol")
    parser.add_argument("--input", type=Path, metavar="PATH", help="a photograph or a folder of them, instead of the test sets")
    parser.add_argument("--output", type=Path, metavar="PATH", help="where the restored photographs go, with --input")
    parser.add_argument("--keep-format", action="store_true", help="with --input: JPEG, WebP and GIF come back as such, not as PNG")
    parser.add_argument("--overwrite", action="store_true", help="with --input: replace what is at --output")
    flags = parser.parse_args(arguments)
    if (flags.input is None) != (flags.output is None):
        parser.error("--input and --output belong together")
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parse_arguments(arguments)
    protocol = [f"protocol={flags.protocol}"] if flags.protocol else []
    options = load_options(TestOptions, flags.opt, flags.set + protocol)
    device = distributed.setup(options.device)[2]
    if flags.input:
        jobs, others = find_photographs(flags.input, flags.output, flags.keep_format)
        restore_photographs(jobs, others, flags, options, device)
        return

    # Setup test sets, metrics, checkpoint:
    if not options.sets:
        raise InputError(f"{options.file}: sets: empty, expected at least one test set, or --input")
    published = read_published(options.published, f"{options.file}: published") if options.published else None
    sets = open_test_sets(options.sets, options.root, f"{options.file}: sets", print)
    for images in sets:
        print(f"{images.name}: {images.describe()}")
        if "fid" in options.metrics and images.selected < 2 and images.pairs[0].clean:
            raise InputError(f"{options.file}: metrics: fid with one image in set {images.name}, expected at least 2")
    metrics = Metrics(options.metrics, device)
    net = ready_network(options, device)

    # Restore, measure, save:
    folder = Path(options.output) / options.name
    names = {images.name: png_names([images.name_of(index) for index in range(len(images))]) for images in sets}
    total = sum(images.selected for images in sets)
    start = time.monotonic()
    with tqdm(total=total, desc=f"{options.name} on {device}", dynamic_ncols=True) as bar:
        def each(images: ImageSet, result: Restored) -> None:
            bar.update()
            if options.save:
                save_restored(folder / images.name, names[images.name][result.index], images, result, options.side_by_side)

        rows = evaluate(net, sets, options.protocol, metrics, each, strip=options.strip, precision=options.precision)
    rows += [average] if (average := average_row(rows)) else []

    # Tables: ours, and the paper's with ours below.
    write_set_csv(folder / "table.csv", rows, options.metrics, options.protocol, options.checkpoint)
    (folder / "comparison.csv").unlink(missing_ok=True)                     # of an earlier run
    comparison = []
    if published:
        write_comparison_csv(folder / "comparison.csv", rows, published, options.protocol, options.checkpoint)
        comparison = [comparison_table(rows, published)]
    notes = remarks(rows, published, options.protocol, options.checkpoint, options.file)
    write_text(folder / "table.md", "\n\n".join([*map(as_markdown, [set_table(rows, options.metrics), *comparison]), *map(markdown, notes)]) + "\n")
    text = "\n\n".join([*map(as_text, [set_table(rows, options.metrics, folder if options.save else None), *comparison]), "\n".join(notes)])
    print(text)
    print(f"{total} images in {time.monotonic() - start:.0f} s, {folder / 'table.csv'}"
          + (f"; each image beside its input in {folder}/SET/side_by_side" if options.side_by_side and options.save else ""))


def ready_network(options: TestOptions, device: torch.device) -> BaryIR:
    net = load_network(options.checkpoint, device)
    if options.compile:
        if device.type == "cpu":
            keep_freed_memory(device)                               # strips need little, whole images much
        compile_stages(net, dynamic=True)
    return net


def find_photographs(source: Path, target: Path, keep_format: bool) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Files to restore and where each goes, and files that are no photographs.

    A folder's photographs keep their names below `target`; lossy formats become PNG. A single file goes to `target` itself where that
    is an image's name, whose format it gets.
    """
    if source.is_dir():
        if target.suffix.lower() in PHOTOGRAPHS and not target.is_dir():
            raise InputError(f"--output {target}: an image file, expected a folder for the folder {source}")
        if target.resolve() == source.resolve():
            raise InputError(f"--output {target}: would overwrite the images in {source}, expected another folder")
        # An earlier run's output below the input is not input.
        below = target.resolve().is_relative_to(source.resolve())
        files = [path for path in list_files(source) if not (below and path.resolve().is_relative_to(target.resolve()))]
        sources = [path for path in files if path.suffix.lower() in PHOTOGRAPHS]
        if not sources:
            raise InputError(f"--input {source}: no images, expected {', '.join(sorted(PHOTOGRAPHS))}")
        others = [path for path in files if path.suffix.lower() not in PHOTOGRAPHS]
        names = [path.relative_to(source) for path in sources]
    elif source.is_file():
        if source.suffix.lower() not in PHOTOGRAPHS:
            raise InputError(f"--input {source}: no image by its name, expected {', '.join(sorted(PHOTOGRAPHS))}")
        if target.suffix.lower() in PHOTOGRAPHS and not target.is_dir():
            if target.suffix.lower() != source.suffix.lower() and ".npy" in (source.suffix.lower(), target.suffix.lower()):
                raise InputError(f"--output {target}: an array and an image, expected the extension {source.suffix}")
            require_format(target)
            return refuse_inputs([(source, target)], target), []
        if target.suffix and not target.exists():
            raise InputError(f"--output {target}: no image by its name, expected {', '.join(sorted(PHOTOGRAPHS))}, or a folder (one with a dot must be there)")
        sources, others, names = [source], [], [Path(source.name)]
    else:
        raise InputError(f"--input {source}: no such file or folder")
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target}: a file, expected a folder")
    unchanged = {name for name in names if keep_format or name.suffix.lower() not in LOSSY}
    lossy = [name for name in names if name not in unchanged]
    places = dict(zip(lossy, png_names(lossy, taken=unchanged)))
    return refuse_inputs([(path, target / places.get(name, name)) for path, name in zip(sources, names)], target), others


def png_names(names: list[Path], taken: set[Path] = frozenset()) -> list[Path]:
    """Where restored images go: a.jpg -> a.png, or a.jpg.png where that is taken or two would share it."""
    pngs = [name.with_suffix(".png") for name in names]
    shared = Counter(pngs)
    return [name.with_name(f"{name.name}.png") if shared[png] > 1 or png in taken else png for name, png in zip(names, pngs)]


def refuse_inputs(jobs: list[tuple[Path, Path]], target: Path) -> list[tuple[Path, Path]]:
    """The jobs; InputError where one's output is an input, or another's output."""
    inputs = {path.resolve() for path, _ in jobs}
    places: dict[Path, Path] = {}
    for path, destination in jobs:
        if destination.resolve() in inputs:
            raise InputError(f"--output {target}: would overwrite {destination}, expected another place")
        if (other := places.setdefault(destination, path)) != path:
            raise InputError(f"--output {target}: {other} and {path} would both go to {destination}, expected another name for one of them")
    return jobs


def restore_photographs(jobs: list[tuple[Path, Path]], others: list[Path], flags: argparse.Namespace, options: TestOptions, device: torch.device) -> None:
    """Restore photographs, each written under the name that its job says; those that an earlier, interrupted run has done are left.

    A file that cannot be read does not keep the others from being restored; all such files are named.
    """
    journal = Journal(flags.input, flags.output, options.checkpoint) if flags.input.is_dir() else None
    todo = jobs
    if journal and not flags.overwrite:
        todo = [job for job in jobs if not journal.has(*job)]
    if not flags.overwrite and (there := [str(target) for _, target in todo if target.exists()]):
        raise InputError(f"--output {flags.output}: {count(len(there), 'file')} there already: {first_few(there)}; expected --overwrite or another place")
    for path in others:
        print(printable(f"left out: {path}, no photograph by its name"))
    net = ready_network(options, device)
    failures = []
    if journal:
        flags.output.mkdir(parents=True, exist_ok=True)
        remove_partial(flags.output, seconds=3600)                          # of killed runs; younger ones may be at work beside this one
    with tqdm(todo, desc=f"restoring on {device}", dynamic_ncols=True) as bar:
        for source, target in bar:
            try:
                photograph = Photograph.read(source)
                for remark in photograph.remarks:
                    bar.write(printable(f"{source}: {remark}"))
                degraded = torch.from_numpy(photograph.pixels).permute(2, 0, 1)[None].to(device)
                restored = restore(net, degraded, options.strip, options.precision)[0].permute(1, 2, 0).cpu().numpy()
            except InputError as error:
                failures.append(str(error) if str(source) in str(error) else f"{source}: {error}")
                bar.write(printable(failures[-1]))
                continue
            except KeyboardInterrupt:
                again = "; the same command goes on where it stopped" if journal else ""
                raise InputError(f"interrupted before {source}{again}", status=130) from None
            if journal:
                target.unlink(missing_ok=True)
                journal.add(source, target)
            photograph.write(restored, target)
    earlier = f"; {len(jobs) - len(todo)} by an earlier run" if len(jobs) > len(todo) else ""
    left = f"; {count(len(others), 'file')} left out, no photographs" if others else ""
    restored = len(todo) - len(failures)
    print(f"{restored} of {len(jobs)} images restored{f', in {flags.output}' if restored else ''}{earlier}{left}")
    if failures:
        raise InputError(f"{len(failures)} of {len(jobs)} images not restored: {'; '.join(failures)}", status=3)


def save_restored(folder: Path, name: Path, images: ImageSet, result: Restored, side_by_side: bool) -> None:
    """Write a restored test image, 8-bit and lossless, and input | restored (| ground truth) in one picture.

    A grey image without ground truth comes back grey; one that was measured keeps the three channels that were.
    """
    with Image.open(images.pairs[result.index].path) as header:
        mode = "L" if header.mode == "L" and result.clean is None else "RGB"
    save_image(to_image(result.restored, mode), folder / name)
    if side_by_side:
        panels = [result.degraded, result.restored] + ([result.clean] if result.clean is not None else [])
        save_image(Image.fromarray(np.concatenate([to_uint8(panel) for panel in panels], axis=1)), folder / "side_by_side" / name)


if __name__ == "__main__":
    with one_line_errors():
        main()
