"""--dry-run of train.py and test.py: complete data pass, each damage is named, nothing is saved."""

import os
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import SMALL, run_script, write_image
from data.cache import check
from data.datasets import open_test_sets
from utils.errors import count
from utils.options import Images

OPTIONS = """
{name: check, steps: 1, batch: 1, patch: 16, workers: 0, network: NETWORK, root: ROOT, output: ROOT/out,
sources: [
  {name: denoise, clean: Train/Denoise, degradation: noise, levels: [25], expected: 3},
  {name: derain, degraded: Train/Derain/rainy, clean: Train/Derain/gt, expected: 3},
  {name: dehaze, degraded: Train/Dehaze/synthetic, clean: Train/Dehaze/original, pairing: haze, expected: 4},
  {name: deblur, degraded: Train/Deblur/blur, clean: Train/Deblur/sharp, expected: 2}],
validation: {sets: [
  {name: LOL, degraded: test/lowlight/low, clean: test/lowlight/high, expected: 1},
  {name: gone, degraded: test/gone, optional: true}]}}
"""


@pytest.fixture
def option_file(public_tree: Path) -> Path:
    path = public_tree / "check.yml"
    path.write_text(OPTIONS.replace("NETWORK", yaml.safe_dump(SMALL, default_flow_style=True)).replace(
        "ROOT", str(public_tree)))
    return path


def dry_run(option_file: Path, *changes: str, script: str = "train.py"):
    result = run_script(script, "--opt", option_file, "--dry-run", *(["--set", *changes] if changes else []))
    assert not (option_file.parent / "out").exists()            # it saves nothing
    return result


def problems(result) -> list[str]:
    lines = [line.removeprefix("problem: ") for line in result.stdout.splitlines()
             if line.startswith("problem: ")]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith(f"check.yml: {count(len(lines), 'problem')} with its data\n")
    return lines


def test_complete_data_pass(option_file, public_tree):
    """Also a file whose name is in no encoding."""
    named = public_tree / "Train/Denoise/12003.png"
    named.rename(named.with_name(os.fsdecode(b"\xe9.png")))
    result = dry_run(option_file)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (f"source denoise: 3 clean images in {named.parent}, noise 25 on the fly; x 1 = 3",
                 "source derain: 3 pairs", "source dehaze: 4 pairs", "validation LOL: 1 pairs",
                 "left out (optional): ", "one step: map_loss", "no problems; a dry run saves nothing"):
        assert line in result.stdout, line


def test_the_public_layout_is_what_option_files_name(public_tree):
    opt = "--opt", "options/train_5d.yml"
    result = run_script("train.py", *opt, "--dry-run", "--set", f"root={public_tree}")
    lines = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    assert result.returncode == 1 and len(lines) == 10          # of 5 sources and 5 sets that lack images
    assert all(re.search(r"\d images?, expected \d+$", line) for line in lines)


def test_every_problem_is_listed_at_once(option_file, public_tree):
    """Of folders in two sets, of a partner, a number, a file, sizes."""
    for folder in ("Train/Deblur/sharp", "test/lowlight/high"):
        (public_tree / folder).rename(public_tree / f"{folder}_images")
    (public_tree / "Train/Derain/gt/norain-2.png").unlink()
    broken = write_image(public_tree / "Train/Dehaze/original/0025.jpg", 200, 200)
    broken.write_bytes(broken.read_bytes()[:700])
    write_image(public_tree / "Train/Dehaze/original/0031.jpg", 41)
    found = problems(dry_run(option_file, "sources.0.expected=4"))
    for message, text in zip(found, (
        "sources[1] derain: 1 of 3 degraded images have no clean partner: ",
        f"sources[3] deblur.clean: no folder {public_tree}/Train/Deblur/sharp, did you mean ",
        f"validation.sets[0] LOL.clean: no folder {public_tree}/test/lowlight/high, did you mean ",
        f"{broken}: cannot be read as an image", "sources[0] denoise: 3 images, expected 4",
        "0031_0.8_0.1.jpg is 40x32 but ", "0031_1_0.2.jpg is 40x32 but "), strict=True):
        assert text in message
    assert "rain-2.png (expected" in found[0] and "0031.jpg is 41x32, expected the same size" in found[-1]


def test_pairs_of_which_nothing_is_degraded(option_file, public_tree):
    """The same file on both sides, or equal pixels in another format: an infinite PSNR in the table."""
    blur, sharp = public_tree / "Train/Deblur/blur", public_tree / "Train/Deblur/sharp"
    first, second = sorted(path.name for path in blur.iterdir())
    Image.open(sharp / first).save(blur / first, compress_level=1)
    (blur / second).unlink()
    (blur / second).symlink_to(sharp / second)
    equal = problems(dry_run(option_file))
    assert equal == [f"{blur / name} and {sharp / name} are equal, expected a degraded and a clean image"
                     for name in (first, second)]
    both = Images(name="noise", degraded="blur", clean="sharp", degradation="noise", levels=[25])
    assert not check(open_test_sets([both], str(blur.parent), "sets"), [])          # noise comes on top


def test_a_test_image_among_the_training_images(option_file, public_tree):
    """The same pixels under another name, in another format; the sources may share theirs."""
    taken = public_tree / "Train/Denoise/00001.bmp"
    (public_tree / "test/lowlight/high/1.png").unlink()
    Image.open(taken).save(public_tree / "test/lowlight/high/1.png")
    Image.open(taken).save(public_tree / "Train/Denoise/again.png")
    (found,) = problems(dry_run(option_file))
    assert "validation.sets[0] LOL: " in found and "high/1.png is among the training images" in found


def test_dry_run_of_test_py(tmp_path, checkpoint):
    """Sizes, folders, numbers; no data at all is a problem, too, though every set is optional."""
    for n, size in (("a", 40), ("b", 41)):
        write_image(tmp_path / f"in/{n}.png", size)
        write_image(tmp_path / f"gt/{n}.png", 40, seed=1)
    path = tmp_path / "check.yml"
    sets = [{"name": "pairs", "degraded": "in", "clean": "gt", "expected": 3},
            {"name": "gone", "degraded": "gone"}, {"name": "left", "degraded": "gone", "optional": True},
            {"name": "half", "degraded": "in", "clean": "g", "optional": True}]
    path.write_text(yaml.safe_dump({"name": "check", "checkpoint": str(checkpoint), "root": str(tmp_path),
                                    "output": str(tmp_path / "out"), "sets": sets}))
    result = dry_run(path, script="test.py")
    gone, half, number, size = problems(result)
    assert "sets[1] gone.degraded: no folder" in gone and "sets[3] half.clean: no folder" in half
    assert "sets[0] pairs: 2 images, expected 3" in number and "in/b.png is 41x32 but " in size
    assert "left out (optional): " in result.stdout and "pairs: 2 pairs in" in result.stdout
    good = dry_run(path, "sets=[{name: one, clean: gt, degradation: noise, levels: [25]}]", script="test.py")
    assert good.returncode == 0 and good.stdout.endswith("no problems; a dry run restores nothing\n")
    nothing = dry_run(path, "sets=[{name: one, degraded: gone, optional: true}]", script="test.py")
    assert nothing.returncode == 1 and "sets: none of them is there, root" in nothing.stderr
