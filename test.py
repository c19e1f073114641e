"""Restore and measure test sets, or restore one's own photographs.

    python test.py --opt options/test_real.yml                              the option file's test sets
    python test.py --opt options/test_real.yml --input PATH --output PATH   a photograph, or a folder of them

Writes results/NAME/SET/ (restored images, PNG), results/NAME/table.csv and table.md (per set: images, metrics
of the input and of the restored images; our row in the paper's table, where the option file names one),
images.csv (the same per image) and index.html (a page to look at, with report/ beside it).
"""

from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from data.cache import check
from data.datasets import open_sets
from utils import distributed, tables
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.evaluation import average_row, precision_on, restore_set, row_of, scores_of
from utils.files import write_csv, write_text
from utils.images import save_image, to_image
from utils.metrics import Metrics
from utils.options import TestOptions, load_options, option_parser
from utils.photographs import png_names, restore_input
from utils.report import Report


def parse_arguments() -> Namespace:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="check options and images, restore nothing")
    add("--protocol", choices=("promptir", "baryir", "full"), help="override the option file's protocol")
    add("--input", type=Path, metavar="PATH", help="a photograph or a folder of them, no test sets")
    add("--output", type=Path, metavar="PATH", help="where the restored photographs go, with --input")
    add("--keep-format", action="store_true", help="with --input: JPEG and WebP stay such, not PNG")
    add("--report", action="store_true", help="with --input: a page to look at, index.html in its folder")
    add("--keep-tones", action="store_true", help="brightness, colour and haze stay as they are")
    add("--overwrite", action="store_true", help="with --input: replace what is at --output")
    flags = parser.parse_args()
    if (flags.input is None) != (flags.output is None):
        parser.error("--input and --output belong together")
    if flags.input and (flags.dry_run or flags.protocol):
        parser.error("--dry-run and --protocol are for test sets, not for --input")
    if not flags.input and (flags.keep_format or flags.report or flags.overwrite):
        parser.error("--keep-format, --report and --overwrite belong to --input")
    return flags


def main() -> None:
    flags = parse_arguments()
    overrides = [f"protocol={flags.protocol}"] * bool(flags.protocol) + ["keep_tones=true"] * flags.keep_tones
    options = load_options(TestOptions, flags.opt, flags.set + overrides)
    device = distributed.setup()[2]
    options.precision = precision_on(device, options.precision or ("auto" if flags.input else "float32"))
    if flags.input:
        return restore_input(flags, options, lambda: load_network(options.checkpoint, device))

    # Setup test sets, metrics, checkpoint:
    if not options.sets:
        raise InputError(f"{options.file}: sets: empty, expected at least one test set, or --input")
    table, where = options.published, f"{options.file}: published"
    published = tables.read_published(table, where) if table else None
    metrics = Metrics(options.metrics, device)
    problems = [] if flags.dry_run else None                # a dry run lists all of them
    sets = open_sets(options.sets, options, "sets", problems=problems)
    if not sets and not problems:
        raise InputError(f"{options.file}: sets: none of them is there, root {options.root}; set root=PATH")
    for images in sets:
        print(f"{images.name}: {images.describe()}")
    check(options.file, [], sets, metrics.smallest(options.protocol), problems)
    if flags.dry_run:
        print("no problems; a dry run restores nothing")
        return
    net = load_network(options.checkpoint, device)

    # Restore, measure, save:
    folder, total = Path(options.output) / options.name, sum(len(images) for images in sets)
    page = Report(folder) if options.save else None
    how = {"strip": options.strip, "precision": options.precision, "keep_tones": options.keep_tones}
    lines, rows = [], []
    with tqdm(total=total, desc=f"{options.name} on {device}", dynamic_ncols=True) as bar:
        for images in sets:
            names, scores = png_names([images.name_of(i) for i in range(len(images))]), []
            for index, result in enumerate(restore_set(net, images, options.protocol, metrics, **how)):
                lines.append([images.name, images.name_of(index), *scores_of(result, options.metrics)])
                scores.append((result.scores_in, result.scores))
                if page:
                    path = folder / images.name / names[index]
                    save_image(to_image(result.restored), path)
                    pictures = result.degraded, result.restored, result.clean
                    page.add(images.name, str(names[index]), path, pictures, scores[-1])
                bar.update()
            rows.append(row_of(images, scores))

    # Write and print the tables: of the sets and, where it is named, the published one with our row.
    write_csv(folder / "images.csv", [["set", "image", *tables.columns(options.metrics)], *lines])
    rows += [average] if (average := average_row(rows)) else []
    protocol = options.protocol + ", tones kept" * options.keep_tones
    tables.write_set_csv(folder / "table.csv", rows, options.metrics, protocol, options.checkpoint)
    shown = [tables.set_table(rows, options.metrics)]
    shown += [tables.comparison_table(rows, published)] if published else []
    notes = tables.remarks(rows, published, options)
    write_text(folder / "table.md", "\n\n".join([*map(tables.as_markdown, shown),
                                                 *map(tables.markdown, notes)]) + "\n")
    print("\n\n".join([*map(tables.as_text, shown), "\n".join(notes)]))
    print(f"{total} images in {bar.format_dict['elapsed']:.0f} s, {folder / 'table.csv'}")
    if page:
        print(f"look at them: {page.write(options.name, shown, notes)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
