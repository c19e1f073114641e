"""data.check on trees in the public layout: complete ones pass, each damage is named."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from conftest import run_script, write_image
from data.datasets import ImageSet
from test_images import refuse_to_list
from utils.errors import InputError
from utils.options import load_options


@pytest.fixture
def option_file(tmp_path: Path, public_tree: Path) -> Path:
    content = {
        "name": "check", "steps": 1, "root": str(public_tree),
        "sources": [{"type": "denoise", "levels": [25], "expected": 3},
                    {"type": "derain", "pairing": "rain", "expected": 3},
                    {"type": "dehaze", "pairing": "haze", "expected": 4}, {"type": "deblur", "expected": 2}],
        "validation": {"sets": [{"name": "LOL", "degraded": "test/lowlight/low",
                                 "clean": "test/lowlight/high", "expected": 1},
                                {"name": "gone", "degraded": "test/gone", "optional": True}]},
    }
    path = tmp_path / "check.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def check(option_file: Path, *more: object):
    return run_script("data/check.py", "--opt", option_file, *more)


def problems(result) -> list[str]:
    count = result.stdout.count("problem: ")
    assert result.returncode == 1 and re.search(rf"error: {count} problems?, ", result.stderr)
    lines = result.stdout.splitlines()
    return [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]


def test_complete_data_pass(option_file, public_tree):
    write_image(public_tree / "Train/Denoise/wide.png", 60, 32)
    result = check(option_file, "--set", "sources.0.expected=4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (f"check.yml: sources[0] denoise: 4 clean images in {public_tree}/Train/Denoise, "
            "noise 25 on the fly; 4 files, 40-60 x 32 pixels\n    4 images of 4 expected\n") in result.stdout
    assert "sources[2] dehaze: 4 pairs" in result.stdout
    assert "left out (optional): " in result.stdout
    assert result.stdout.endswith("no problems, 22 files decoded\n")


def test_each_damage_is_named(option_file, public_tree):
    (public_tree / "Train/Derain/gt/norain-2.png").unlink()
    (public_tree / "Train/Derain/gt/norain-1.png").rename(public_tree / "Train/Derain/gt/anorain-1.png")
    broken = public_tree / "Train/Dehaze/synthetic/part1/0025_1_0.2.jpg"
    broken.write_bytes(broken.read_bytes()[:700])
    (public_tree / "Train/Deblur/sharp").rename(public_tree / "Train/Deblur/Sharp_images")
    write_image(public_tree / "test/lowlight/high/1.png", 41)
    write_image(public_tree / "Train/Denoise/4.png")
    found = problems(check(option_file))
    assert [message.split(": ")[1] for message in found] == [
        "sources[3] deblur.clean", "sources[0] denoise", "sources[1] derain", "sources[1] derain",
        "sources[2] dehaze", "validation.sets[0] LOL"]
    folder, count, unpaired, pairs, unreadable, unequal = found
    near = f"{public_tree}/Train/Deblur/Sharp_images"
    assert f"no folder {public_tree}/Train/Deblur/sharp, did you mean {near}?" in folder
    assert "4 images, expected 3" in count
    assert "2 of 3 degraded images have no clean partner: " in unpaired and "rain-2.png (expected" in unpaired
    assert "norain-1.*, did you mean anorain-1?" in unpaired
    assert "1 pair, expected 3" in pairs
    assert "1 unreadable file: " in unreadable and f"{broken}: cannot be read as an image" in unreadable
    assert "1 pair of unequal size: " in unequal
    assert "low/1.png is 40x32 but" in unequal and "high/1.png is 41x32" in unequal


def test_half_of_an_optional_set_is_a_problem(option_file):
    (half,) = problems(check(option_file, "--set", "validation.sets.0.expected=0",
                             "validation.sets.0.name=low", "validation.sets.0.degraded=test/lowlight/low",
                             "validation.sets.0.clean=test/lowlight/hig", "validation.sets.0.optional=true"))
    assert "validation.sets[0] low.clean: no folder" in half and "did you mean" in half


def test_no_data_at_all_is_a_problem(option_file, tmp_path):
    (missing,) = problems(check(Path("options/test_mixed.yml"), "--set", f"root={tmp_path / 'typo'}"))
    assert f"none of its sets is there, root {tmp_path / 'typo'}" in missing
    result = run_script("test.py", "--opt", "options/test_mixed.yml", "--set", f"root={tmp_path / 'typo'}")
    assert result.returncode == 1 and "sets: none of them is there, root" in result.stderr


def test_file_list_with_prefix(option_file, public_tree):
    (public_tree / "denoise.txt").write_text("a100075.jpg\n00001.png\n12003.png\n")
    listed, count = problems(check(option_file, "--set", "sources.0.file_list=denoise.txt"))
    assert "sources[0] denoise.file_list: 2 of 3 names in" in listed
    assert "a100075.jpg, did you mean 100075.jpg?" in listed
    assert "00001.png, did you mean 00001.bmp?" in listed
    assert "1 image, expected 3" in count


def test_option_file_of_test_py(public_tree):
    result = check(Path("options/test_5d.yml"), "--set", f"root={public_tree}")
    assert "sets[0] SOTS: 1 pair, expected 500" in "\n".join(problems(result))
    assert "did you mean batch?" in check(Path("options/train_5d.yml"), "--set", "bacth=3").stderr


def test_pairs_of_which_nothing_is_degraded(option_file, public_tree):
    """The same file on both sides, or equal pixels in another format: an infinite PSNR in the table."""
    blur, sharp = public_tree / "Train/Deblur/blur", public_tree / "Train/Deblur/sharp"
    first, second = sorted(path.name for path in blur.iterdir())
    Image.open(sharp / first).save(blur / first, compress_level=1)
    (blur / second).unlink()
    (blur / second).symlink_to(sharp / second)
    (equal,) = problems(check(option_file))
    assert "sources[3] deblur: 2 pairs of equal images: " in equal
    assert f"{blur / first} = {sharp / first}; {blur / second} = {sharp / second} (the same file)" in equal
    both = ("--set", "sources.3.degraded=Train/Deblur/sharp", "sources.3.clean=Train/Deblur/sharp")
    (same,) = problems(check(option_file, *both))
    assert "2 pairs of equal images: " in same and same.count("(the same file)") == 2
    on_the_fly = check(option_file, *both, "sources.3.degradation=noise", "sources.3.levels=[25]")
    assert on_the_fly.returncode == 0, on_the_fly.stdout


def test_what_cannot_be_read_rightly_is_a_problem(option_file, public_tree, monkeypatch):
    """Not-a-number pixels, a pipe, a folder that cannot be listed: found here, and refused by a run."""
    low, high = public_tree / "test/lowlight/low", public_tree / "test/lowlight/high"
    depth = np.full((32, 40), 0.5, np.float32)
    depth[3, 4] = np.nan
    tifffile.imwrite(low / "2.tif", depth)
    os.mkfifo(low / "3.png")
    for name in ("2.png", "3.png"):
        write_image(high / name)
    (found,) = problems(check(option_file, "--set", "validation.sets.0.expected=3"))
    assert "2 unreadable files: " in found and "3.png: no regular file" in found
    assert "2.tif: cannot be read as an image (pixels that are infinite or not a number)" in found
    images = ImageSet(load_options(None, str(option_file)).validation.sets[0], str(public_tree), "here")
    with pytest.raises(InputError, match="2.tif: cannot be read as an image"):
        images.read(1)
    refuse_to_list(monkeypatch, low)
    closed = f"{low}: a folder that cannot be read (Permission denied)"
    assert any(closed in message for message in problems(check(option_file)))


def test_what_is_not_used_of_a_file_is_reported(option_file, public_tree):
    """It is no problem."""
    path = public_tree / "Train/Denoise/12003.png"
    image = Image.open(path)
    image.putalpha(100)
    image.save(path, exif=b"Exif\0\0nonsense")
    result = check(option_file)
    assert result.returncode == 0, result.stdout
    assert "    2 remarks on what is not used: " in result.stdout
    assert "12003.png: damaged EXIF, kept as far as it can be read; " in result.stdout
    assert "12003.png: transparency, which is left out" in result.stdout


def test_names_in_no_encoding(option_file, public_tree):
    (public_tree / "Train/Denoise/12003.png").rename(public_tree / "Train/Denoise" / os.fsdecode(b"\xe9.png"))
    result = check(option_file)
    assert result.returncode == 0, result.stdout + result.stderr
