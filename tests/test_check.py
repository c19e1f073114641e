"""--dry-run of train.py and test.py: complete data pass, each damage is named, nothing is saved."""

import os
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import SMALL, run_script, write_image, write_yaml
from utils.errors import count

OPTIONS = """
name: check
steps: 1
batch: 1
patch: 16
workers: 0
sources:
- {name: denoise, clean: Train/Denoise, degradation: noise, levels: [25], expected: 3}
- {name: derain, degraded: Train/Derain/rainy, clean: Train/Derain/gt, pairing: rain, expected: 3}
- {name: dehaze, degraded: Train/Dehaze/synthetic, clean: Train/Dehaze/original, pairing: haze, expected: 4}
- {name: deblur, degraded: Train/Deblur/blur, clean: Train/Deblur/sharp, expected: 2}
- {name: lowlight, degraded: Train/lowlight/low, clean: Train/lowlight/high}
validation:
  sets:
  - {name: LOL, degraded: test/lowlight/low, clean: test/lowlight/high, expected: 1}
  - {name: haze, degraded: test/dehaze/input, clean: test/dehaze/target, pairing: haze}
  - {name: gone, degraded: test/gone, optional: true}
"""


@pytest.fixture
def option_file(public_tree: Path) -> Path:
    places = {"network": SMALL, "root": str(public_tree), "output": str(public_tree / "out")}
    return Path(write_yaml(public_tree / "check.yml", yaml.safe_load(OPTIONS) | places))


def dry_run(option_file: Path, *changes: str, script: str = "train.py"):
    result = run_script(script, "--opt", option_file, "--dry-run", *(["--set", *changes] if changes else []))
    assert not (option_file.parent / "out").exists()            # it saves nothing
    return result


def problems(result) -> list[str]:
    lines = [line.removeprefix("problem: ") for line in result.stdout.splitlines()
             if line.startswith("problem: ")]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith(f".yml: {count(len(lines), 'problem')} with its data\n")
    return lines


def test_complete_data_pass(option_file, public_tree):
    """Also a file whose name is in no encoding; noise on top of pairs of which nothing else is degraded."""
    named = public_tree / "Train/Denoise/12003.png"
    named.rename(named.with_name(os.fsdecode(b"\xe9.png")))
    result = dry_run(option_file, "sources.4.degraded=Train/lowlight/high", "sources.4.degradation=noise",
                     "sources.4.levels=[25]")
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (f"source denoise: 3 clean images in {named.parent}, noise 25 on the fly; x 1 = 3",
                 "source dehaze: 4 pairs", "validation LOL: 1 pairs", "left out (optional): ",
                 "one step: map_loss", "no problems; a dry run saves nothing"):
        assert line in result.stdout, line


def test_the_public_layout_is_what_option_files_name(public_tree):
    result = run_script("train.py", "--opt", "options/train_5d.yml", "--dry-run", "--set",
                        f"root={public_tree}")
    lines = problems(result)
    assert len(lines) == 10                                     # 5 sources and 5 sets lack images
    assert all(re.search(r"\d images?, expected \d+$", line) for line in lines)


def test_every_problem_is_listed_at_once(option_file, public_tree):
    """Folders, partners, numbers, a file, sizes; equal pixels: of a pair, of a training and a test image."""
    train = public_tree / "Train"
    (public_tree / "test/lowlight/high").rename(public_tree / "test/lowlight/high_images")
    (train / "Derain/gt/norain-2.png").unlink()
    broken = write_image(train / "Dehaze/original/0025.jpg", 200, 200)
    broken.write_bytes(broken.read_bytes()[:700])
    write_image(train / "Dehaze/original/0031.jpg", 41)
    first, second = sorted(path.name for path in (train / "Deblur/blur").iterdir())
    Image.open(train / "Deblur/sharp" / first).save(train / "Deblur/blur" / first, compress_level=1)
    (train / "Deblur/blur" / second).unlink()
    (train / "Deblur/blur" / second).symlink_to(train / "Deblur/sharp" / second)
    for copied in (public_tree / "test/dehaze/target/0001.png", train / "Denoise/again.png"):
        Image.open(train / "Denoise/00001.bmp").save(copied)
    (train / "lowlight/high").rename(train / "lowlight/high_images")
    found = problems(dry_run(option_file, "sources.0.expected=5"))
    for message, text in zip(found, (
        r"sources\[1\] derain: 1 of 3 images have no partner: .*rain-2.png \(expected",
        f"sources\\[4\\] lowlight.clean: no folder {train}/lowlight/high, did you mean ",
        f"sets\\[0\\] LOL.clean: no folder {public_tree}/test/lowlight/high, did you mean ",
        f"{broken}: cannot be read as an image", r"sources\[0\] denoise: 4 images, expected 5",
        "0031_0.8_0.1.jpg is 40x32 but ", "0031_1_0.2.jpg is 40x32 but .*0031.jpg is 41x32, expected the",
        f"{first} are equal, expected a degraded and a clean image", f"{second} are equal, expected",
        "dehaze/target/0001.png is among the training images, "), strict=True):
        assert re.search(text, message)


def test_dry_run_of_test_py(tmp_path, checkpoint):
    """Sizes, folders, numbers; no data at all is a problem, too, though every set is optional."""
    for n, size in (("a", 40), ("b", 41)):
        write_image(tmp_path / f"in/{n}.png", size)
        write_image(tmp_path / f"gt/{n}.png", 40, seed=1)
    sets = [{"name": "pairs", "degraded": ["absent", "in"], "clean": "gt", "expected": 3},
            {"name": "gone", "degraded": "gone"}, {"name": "left", "degraded": "gone", "optional": True},
            {"name": "half", "degraded": "in", "clean": "g", "optional": True}]
    path = tmp_path / "check.yml"
    write_yaml(path, {"name": "check", "checkpoint": str(checkpoint), "root": str(tmp_path),
                      "output": str(tmp_path / "out"), "sets": sets})
    result = dry_run(path, script="test.py")
    gone, half, number, size = problems(result)
    assert "sets[1] gone.degraded: no folder" in gone and "sets[3] half.clean: no folder" in half
    assert "sets[0] pairs: 2 images, expected 3" in number and "in/b.png is 41x32 but " in size
    assert "left out (optional): " in result.stdout and "pairs: 2 pairs in" in result.stdout
    result = run_script("test.py", "--opt", path, "--set", "sets=[{name: pairs, degraded: in, clean: gt}]")
    assert "in/b.png is 41x32 but " in result.stderr and not (tmp_path / "out").exists()        # nor a.png's
    good = dry_run(path, "sets=[{name: one, clean: gt, degradation: noise, levels: [25]}]", script="test.py")
    assert good.returncode == 0 and good.stdout.endswith("no problems; a dry run restores nothing\n")
    write_image(tmp_path / "tiny/c.png", 12)
    (tiny,) = problems(dry_run(path, "sets=[{name: t, clean: tiny, degradation: clean, offset: [17, 0]}]",
                               script="test.py"))
    assert tiny.endswith("tiny/c.png: 12x15 pixels, expected at least 16x16 to measure")
    refused = run_script("test.py", "--opt", path, "--dry-run", "--input", "in", "--output", tmp_path / "o")
    assert refused.returncode == 2 and "--dry-run and --protocol are for test sets" in refused.stderr
    nothing = dry_run(path, "sets=[{name: one, degraded: gone, optional: true}]", script="test.py")
    assert nothing.returncode == 1 and "sets: none of them is there, root" in nothing.stderr
