"""Restore and measure test sets, or restore one's own photographs.

    python test.py --opt options/test_real.yml                                   the option file's test sets
    python test.py --opt options/test_real.yml --input PATH --output PATH        a file or a folder of photographs

Writes results/NAME/SET/ (restored images) and results/NAME/table.csv, table.md (per set: images, input PSNR / SSIM,
restored PSNR / SSIM), and prints the table.
"""

import argparse
import csv
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.datasets import ImageSet, open_test_sets
from models.baryir import BaryIR
from utils import distributed
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.evaluation import Restored, Row, average_row, evaluate, restore
from utils.images import EXTENSIONS, Photograph, list_images, save_image, to_image, to_uint8, write_atomically
from utils.options import DEFAULT_TILE, TestOptions, load_options

HEADER = ["set", "images", "input dB / SSIM", "restored dB / SSIM"]


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
        restore_photographs(load_network(options.checkpoint, device), jobs, flags.output, options)
        return

    # Setup test sets:
    sets = open_test_sets(options.sets, options.root, f"{options.file}: sets", print)
    for images in sets:
        print(f"{images.name}: {images.describe()}")
    net = load_network(options.checkpoint, device)

    # Restore, measure, save:
    folder = Path(options.output) / options.name
    total = sum(min(images.options.limit or len(images), len(images)) for images in sets)
    start = time.monotonic()
    with tqdm(total=total, desc=f"{options.name} on {device}", dynamic_ncols=True) as bar:
        def each(images: ImageSet, result: Restored) -> None:
            bar.update()
            if options.save:
                save_restored(folder / images.name, images, result, options)

        rows = evaluate(net, sets, options.protocol, each, tile=options.tile, overlap=options.overlap, precision=options.precision)

    # Table:
    average = average_row(rows)
    rows += [average] if average else []
    write_atomically(folder / "table.csv", lambda path: write_csv(path, rows))
    write_atomically(folder / "table.md", lambda path: Path(path).write_text(markdown(rows, options), encoding="utf-8"))
    print(text_table(rows, folder if options.save else None))
    print(f"protocol {options.protocol}, {options.checkpoint}, {total} images in {time.monotonic() - start:.0f} s, {folder / 'table.csv'}"
          + (f"; each image beside its input in {folder}/SET/side_by_side" if options.side_by_side and options.save else ""))


def find_photographs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Files to restore and where each goes: the same name below `target`, or `target` itself for a single file."""
    if source.is_dir():
        if target.suffix.lower() in EXTENSIONS and not target.is_dir():
            raise InputError(f"--output {target}: an image file, expected a folder for the folder {source}")
        if target.resolve() == source.resolve():
            raise InputError(f"--output {target}: would overwrite the images in {source}, expected another folder")
        # An earlier run's output below the input is not input.
        jobs = [(path, target / path.relative_to(source)) for path in list_images(source) if target.resolve() not in path.resolve().parents]
        if not jobs:
            raise InputError(f"--input {source}: no images, expected {', '.join(sorted(EXTENSIONS))}")
    elif source.is_file():
        jobs = [(source, target if target.suffix.lower() in EXTENSIONS else target / source.name)]
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
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            restored = restore(net, degraded, options.tile or DEFAULT_TILE, options.overlap)
        photograph.write(restored[0].permute(1, 2, 0).cpu().numpy(), target)
    print(f"{len(jobs) - len(failures)} of {len(jobs)} images restored, in {output}")
    if failures:
        raise InputError("; ".join(failures))


def save_restored(folder: Path, images: ImageSet, result: Restored, options: TestOptions) -> None:
    """Write a restored test image under the name of its input, grey where that is, and input | restored (| ground truth) in one picture."""
    name = images.name_of(result.index)
    with Image.open(images.pairs[result.index].path) as header:
        mode = "L" if header.mode == "L" else "RGB"
    save_image(to_image(result.restored, mode), folder / name)
    if options.side_by_side:
        panels = [result.degraded, result.restored] + ([result.clean] if result.clean is not None else [])
        picture = np.concatenate([to_uint8(panel) for panel in panels], axis=1)
        save_image(Image.fromarray(picture), folder / "side_by_side" / name.with_name(f"{name.name}.png" if name.suffix != ".png" else name.name))


def write_csv(path: str, rows: list[Row]) -> None:
    """The table with full precision; empty cells where there is no ground truth."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([entry.name for entry in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in rows)


def cells(row: Row) -> list[str]:
    def pair(psnr: float | None, ssim: float | None) -> str:
        return "-" if psnr is None else f"{psnr:.2f} / {ssim:.4f}"

    return [row.set, str(row.images), pair(row.psnr_in, row.ssim_in), pair(row.psnr, row.ssim)]


def text_table(rows: list[Row], folder: Path | None) -> str:
    """The table in columns; with `folder`, a last column says where a set's restored images are."""
    lines = [HEADER] + [cells(row) for row in rows]
    if folder:
        where = ["restored images"] + ["" if row.set == "average" else str(folder / row.set) for row in rows]
        lines = [[*line, place] for line, place in zip(lines, where)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown(rows: list[Row], options: TestOptions) -> str:
    lines = [HEADER, ["---"] * len(HEADER)] + [cells(row) for row in rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nProtocol `{options.protocol}`, checkpoint `{options.checkpoint}`, option file `{options.file}`.\n"


if __name__ == "__main__":
    with one_line_errors():
        main()
