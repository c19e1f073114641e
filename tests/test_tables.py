"""Tables beside the published rows: figures, differences, incomplete sets; text, Markdown and CSV agree."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import REPOSITORY, output_of, read_csv, write_image
from utils.errors import InputError
from utils.evaluation import Row
from utils.options import TestOptions, load_options
from utils.tables import PUBLISHED, as_markdown, comparable, comparison_table, read_published, set_table

TABLES = yaml.safe_load(PUBLISHED.read_text())["tables"]


def test_published_rows_are_whole():
    """A typing error would show in the row's average, which the papers give, too."""
    for table in ("3d", "5d", "3d_promptir", "5d_promptir"):
        content = TABLES[table]
        assert content["sets"][-1] == "average" and content["reference"] in content["rows"]
        assert len(content["rows"]) == {"3d": 23, "5d": 25}[table[:2]]
        for method, (*sets, average) in content["rows"].items():
            assert len(sets) == len(content["sets"]) - 1, method
            assert np.mean(sets, axis=0) == pytest.approx(average, abs=0.025), method


@pytest.mark.parametrize("option_file", sorted(path.name for path in REPOSITORY.glob("options/test_*.yml")))
def test_published_sets_have_the_names_of_the_option_file(option_file):
    options = load_options(TestOptions, str(REPOSITORY / "options" / option_file))
    if options.published:
        published = [name for name in read_published(options.published, "here")["sets"] if name != "average"]
        compared = [images for images in options.sets if images.name in published]
        assert [images.name for images in compared] == published
        assert all(images.expected or images.limit for images in compared)
        others = [images for images in options.sets if images.name not in published]
        assert all(images.optional for images in others) or options.published in ("mini5d", "unseen_types")


def rows(**psnr: float) -> list[Row]:
    made, scores_in = [], {"psnr": 20.0, "ssim": 0.5}
    for name, value in psnr.items():
        images, expected = (480, 500) if name == "SOTS" else (5, 5)
        made.append(Row(name, images, expected, scores_in, {"psnr": value, "ssim": 0.9}))
    average = float(np.mean(list(psnr.values())))
    return [*made, Row("average", 500, 520, scores_in, {"psnr": average, "ssim": 0.9})]


def test_difference_and_marks():
    published = read_published("5d", "here")
    made = rows(SOTS=32.0, Rain100L=38.0, BSD68_25=31.0, GoPro=29.0, LOL=23.0)
    *lines, difference = comparison_table(made, published)
    reference, ours = (next(line for line in lines if line[0] == name)
                       for name in ("BaryIR (Restormer)", "ours"))
    averages = [float(line[-1].split(" / ")[0]) for line in lines[1:]]
    assert averages == sorted(averages) and lines.index(ours) < lines.index(reference)
    assert reference == ["BaryIR (Restormer)", "31.20 / 0.979", "38.10 / 0.982", "31.43 / 0.891",
                         "29.51 / 0.889", "23.37 / 0.854", "30.72 / 0.919"]
    assert ours == ["ours", "32.00 / 0.900*", "38.00 / 0.900", "31.00 / 0.900", "29.00 / 0.900",
                    "23.00 / 0.900", "30.60 / 0.900*"]
    assert difference == ["ours - BaryIR (Restormer)", "+0.80 / -0.079*", "-0.10 / -0.082", "-0.43 / +0.009",
                          "-0.51 / +0.011", "-0.37 / +0.046", "-0.12 / -0.019*"]
    assert set_table(made, ["psnr", "ssim"])[1] == ["SOTS", "480 of 500*", "20.00 / 0.5000", "32.00 / 0.9000"]
    # An average only beside the same sets.
    assert set(comparable(rows(SOTS=32.0, LOL=23.0), published)) == {"SOTS", "LOL"}
    six = comparable(rows(Kodak=9, SOTS=1, Rain100L=1, BSD68_25=1, GoPro=1, LOL=2), published)
    assert list(six) == published["sets"] and six["average"].scores["psnr"] == pytest.approx(1.2)
    ours = comparison_table(rows(LOL=23.0), published)[-2]                 # without an average the last
    assert ours == ["ours", "-", "-", "-", "-", "23.00 / 0.900", "-"]


def test_published_psnr_alone_unknown_tables_and_names_in_markdown():
    lines = comparison_table(rows(UIEB=19.0, JPEG_10=26.0), read_published("unseen_types", "here"))
    assert ["MoCE-IR", "18.66 / -"] in lines and lines[-1] == ["ours - BaryIR", "-1.84 / -"]
    with pytest.raises(InputError, match="here: '7d', expected a table of published.yml: 3d, 5d"):
        read_published("7d", "here")
    text = as_markdown([["set", "x"], ["<script>|`rm`*", "[a](b)\n\n# c"]])
    assert text.splitlines()[2:] == [r"| &lt;script&gt;\|\`rm\`\* | \[a\](b) # c |"]


@pytest.fixture
def five(tmp_path: Path, checkpoint: Path) -> list[str]:
    """Options for a root in the public layout, with a few images of each set of the table, LOL's 15 all."""
    for count, *sides in ((2, "dehaze/input/{0:04}_1_0.2.jpg", "dehaze/target/{0:04}.png"),
                          (3, "derain/Rain100L/input/rain-{0}.png", "derain/Rain100L/target/norain-{0}.png"),
                          (1, "deblur/input/{0}.png", "deblur/target/{0}.png"), (1, "denoise/bsd68/{0}.png"),
                          (15, "lowlight/low/{0}.png", "lowlight/high/{0}.png")):
        for i in range(count):
            for seed, side in enumerate(sides):
                write_image(tmp_path / "root/test" / side.format(i), 37, 45, seed=i + 50 * seed)
    places = {"root": tmp_path / "root", "checkpoint": checkpoint, "output": tmp_path / "results"}
    return ["--set", *(f"{name}={path}" for name, path in places.items())]


def test_five_degradations_in_one_command(tmp_path, five, checkpoint):
    text = output_of("test.py", "--opt", "options/test_5d.yml", "--protocol", "baryir", *five)
    folder = tmp_path / "results/5d"
    table = {row["set"]: row for row in read_csv(folder / "table.csv")}
    markdown = (folder / "table.md").read_text()

    printed = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "2 of 500*" in printed["SOTS"] and "1 of 1111*" in printed["GoPro"]
    assert " 15 " in printed["LOL"] and "15 of" not in printed["LOL"]
    assert ("* not the published test set: SOTS (2 of 500 images), Rain100L (3 of 100 images), "
            "BSD68_25 (1 of 68 images), GoPro (1 of 1111 images)") in text
    images = [row for row in read_csv(folder / "images.csv") if row["set"] == "LOL"]
    assert sorted(row["image"] for row in images) == sorted(f"{i}.png" for i in range(15))
    for metric in ("psnr_in", "ssim_in", "psnr", "ssim"):
        assert np.mean([float(row[metric]) for row in images]) == pytest.approx(float(table["LOL"][metric]))
    for words in ("protocol baryir, checkpoint", "BaryIR (PromptIR)", "31.68 / 0.980"):
        assert words in text and words in markdown
    assert {(row["protocol"], row["checkpoint"]) for row in table.values()} == {("baryir", str(checkpoint))}
    for row, best in zip(table.values(), TABLES["5d"]["rows"]["BaryIR (Restormer)"], strict=True):
        scores = [float(row[metric]) for metric in ("psnr", "ssim")]
        assert "{:.2f} / {:.3f}".format(*scores) in printed["ours"]
        assert "{:+.2f} / {:+.3f}".format(*np.subtract(scores, best)) in printed["ours - BaryIR (Restormer)"]
        assert "{:.2f} / {:.4f}".format(*scores) in markdown


def test_only_what_was_measured_is_compared(tmp_path, five):
    write_image(tmp_path / "root/test/denoise/urban100/img_001.png")        # a set that is optional
    command = "test.py", "--opt", "options/test_5d_promptir.yml", *five, "save=false"
    text = output_of(*command, "metrics=[ssim]")
    ours = next(line for line in text.splitlines() if line.startswith("ours "))
    assert " - / 0." in ours
    assert "left out (optional): options/test_5d_promptir.yml: sets[5] Kodak24_25.clean" in text
    assert "ours - BaryIR (PromptIR)" in text
