"""Restore and measure test sets, or restore one's own photographs.

    python test.py --opt options/test_real.yml                                   the option file's test sets
    python test.py --opt options/test_real.yml --input PATH --output PATH        a file or a folder of photographs

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
from utils.errors import InputError, one_line_errors
from utils.evaluation import Restored, average_row, evaluate, restore
from utils.images import PHOTOGRAPHS, Photograph, list_images, save_image, to_image, to_uint8, write_atomically
from utils.memory import keep_freed_memory
from utils.metrics import Metrics
from utils.options import TestOptions, load_options
from utils.tables import (as_markdown, as_text, comparison_table, read_published, remarks, set_table, write_comparison_csv,
                          write_set_csv)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override options, keys dotted")
    parser.add_argument("--protocol", choices=("promptir", "baryir", "full"), help="override the option file's protocol")
    parser.add_argument("--input", type=Path, metavar="PATH", help="a photograph or a folder of them, instead of the test sets")
    parser.add_argument("--output", type=Path, metavar="PATH", help="where the restored photographs go, with --input")
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
        jobs = find_photographs(flags.input, flags.output)
        restore_photographs(ready_network(options, device), jobs, flags.output, options)
        return

    # Setup test sets, metrics, checkpoint:
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
    names = {images.name: png_names(images) for images in sets}
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
    text = "\n\n".join([*map(as_markdown, [set_table(rows, options.metrics), *comparison]), *notes]) + "\n"
    write_atomically(folder / "table.md", lambda path: Path(path).write_text(text, encoding="utf-8"))
    text = "\n\n".join([*map(as_text, [set_table(rows, options.metrics, folder if options.save else None), *comparison]), "\n".join(notes)])
    print(text)
    print(f"{total} images in {time.monotonic() - start:.0f} s, {folder / 'table.csv'}"
          + (f"; each image beside its input in {folder}/SET/side_by_side" if options.side_by_side and options.save else ""))


def ready_network(options: TestOptions, device: torch.device) -> BaryIR:
    net = load_network(options.checkpoint, device)
    if options.compile:
        if device.type == "cpu":
            keep_freed_memory()                                 # strips need little, whole images much
        compile_stages(net, dynamic=True)
    return net


def find_photographs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Files to restore and where each goes: the same name below `target`, or `target` itself for a single file."""
    if source.is_dir():
        if target.suffix.lower() in PHOTOGRAPHS and not target.is_dir():
            raise InputError(f"--output {target}: an image file, expected a folder for the folder {source}")
        if target.resolve() == source.resolve():
            raise InputError(f"--output {target}: would overwrite the images in {source}, expected another folder")
        # An earlier run's output below the input is not input.
        jobs = [(path, target / path.relative_to(source)) for path in list_images(source, PHOTOGRAPHS) if target.resolve() not in path.resolve().parents]
        if not jobs:
            raise InputError(f"--input {source}: no images, expected {', '.join(sorted(PHOTOGRAPHS))}")
    elif source.is_file():
        jobs = [(source, target if target.suffix.lower() in PHOTOGRAPHS else target / source.name)]
    else:
        raise InputError(f"--input {source}: no such file or folder")
    inputs = {path.resolve() for path, _ in jobs}
    for path, destination in jobs:
        if destination.resolve() in inputs:
            raise InputError(f"--output {target}: would overwrite {destination}, expected another place")
        if destination.suffix.lower() != path.suffix.lower() and not source.is_dir():
            raise InputError(f"--output {target}: another format than {path}, expected the extension {path.suffix}")
    return jobs


def restore_photographs(net: BaryIR, jobs: list[tuple[Path, Path]], output: Path, options: TestOptions) -> None:
    """Restore photographs, each written in the form and under the name of its input.

    A file that cannot be read does not keep the others from being restored; all such files are named at the end.
    """
    device = next(net.parameters()).device
    failures = []
    for source, target in tqdm(jobs, desc=f"restoring on {device}", dynamic_ncols=True):
        try:
            photograph = Photograph.read(source)
        except InputError as error:
            failures.append(str(error))
            continue
        degraded = torch.from_numpy(photograph.pixels).permute(2, 0, 1)[None].to(device)
        restored = restore(net, degraded, options.strip, options.precision)
        photograph.write(restored[0].permute(1, 2, 0).cpu().numpy(), target)
    print(f"{len(jobs) - len(failures)} of {len(jobs)} images restored, in {output}")
    if failures:
        raise InputError("; ".join(failures))


def png_names(images: ImageSet) -> list[Path]:
    """Where a set's restored images go, below its folder: their input's name with .png, beside it where two would share that."""
    names = [images.name_of(index) for index in range(len(images))]
    count = Counter(name.with_suffix(".png") for name in names)
    return [name.with_suffix(".png") if count[name.with_suffix(".png")] == 1 else name.with_name(f"{name.name}.png") for name in names]


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
