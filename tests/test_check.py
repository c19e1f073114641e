"""data.check on trees in the public layout: complete ones pass, each damage is named."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import run_script, write_image


@pytest.fixture
def option_file(tmp_path: Path, public_tree: Path) -> Path:
    content = {
        "name": "check", "steps": 1, "root": str(public_tree),
        "sources": [{"type": "denoise", "levels": [25], "expected": 3}, {"type": "derain", "pairing": "rain", "expected": 3},
                    {"type": "dehaze", "pairing": "haze", "expected": 4}, {"type": "deblur", "expected": 2}],
        "validation": {"sets": [{"name": "LOL", "degraded": "test/lowlight/low", "clean": "test/lowlight/high", "expected": 1},
                                {"name": "gone", "degraded": "test/gone", "optional": True}]},
    }
    path = tmp_path / "check.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def check(option_file: Path, *more: object):
    return run_script("data/check.py", "--opt", option_file, *more)


def problems(result) -> list[str]:
    assert result.returncode == 1 and re.search(rf"error: {result.stdout.count('problem: ')} problems?, ", result.stderr)
    return [line.removeprefix("problem: ") for line in result.stdout.splitlines() if line.startswith("problem: ")]


def test_complete_data_pass(option_file, public_tree):
    write_image(public_tree / "Train/Denoise/wide.png", 60, 32)
    (public_tree / "Train/Denoise/list.txt").write_text("not an image")
    result = check(option_file, "--set", "sources.0.expected=4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"check.yml: sources[0] denoise: 4 clean images in {public_tree}/Train/Denoise, noise 25 on the fly; 4 files, 40-60 x 32 pixels\n    4 images of 4 expected\n" in result.stdout
    assert "1 file of other kinds: " in result.stdout and "list.txt" in result.stdout
    assert "sources[2] dehaze: 4 pairs" in result.stdout and "    2 clean images for 4 degraded ones" in result.stdout
    assert "left out (optional): " in result.stdout and result.stdout.endswith("no problems, 22 files decoded\n")


def test_each_damage_is_named(option_file, public_tree):
    (public_tree / "Train/Derain/gt/norain-2.png").unlink()
    (public_tree / "Train/Derain/gt/norain-1.png").rename(public_tree / "Train/Derain/gt/anorain-1.png")
    broken = public_tree / "Train/Dehaze/synthetic/part1/0025_1_0.2.jpg"
    broken.write_bytes(broken.read_bytes()[:700])
    (public_tree / "Train/Deblur/sharp").rename(public_tree / "Train/Deblur/Sharp_images")
    write_image(public_tree / "test/lowlight/high/1.png", 41)
    write_image(public_tree / "Train/Denoise/4.png")
    found = problems(check(option_file))
    assert [message.split(": ")[1] for message in found] == ["sources[3] deblur.clean", "sources[0] denoise", "sources[1] derain", "sources[1] derain",
                                                             "sources[2] dehaze", "validation.sets[0] LOL"]
    folder, count, unpaired, pairs, unreadable, unequal = found
    assert f"no folder {public_tree}/Train/Deblur/sharp, did you mean {public_tree}/Train/Deblur/Sharp_images?" in folder
    assert "4 images, expected 3" in count
    assert "2 of 3 degraded images have no clean partner: " in unpaired and "rain-2.png (expected" in unpaired
    assert "norain-1.*, but anorain-1.png is there: one of the two has a prefix a" in unpaired
    assert "1 pair, expected 3" in pairs
    assert "1 unreadable file: " in unreadable and f"{broken}: cannot be read as an image" in unreadable
    assert "1 pair of unequal size: " in unequal and "low/1.png is 40x32 but" in unequal and "high/1.png is 41x32" in unequal


def test_copies_that_are_not_the_set(option_file, public_tree):
    """JPEG for PNG, the same image twice, a part of the set, half of an optional set."""
    low = public_tree / "test/lowlight/low/1.png"
    Image.open(low).save(public_tree / "test/lowlight/high/1.jpg", quality=60)
    (public_tree / "test/lowlight/high/1.png").unlink()
    assert "1 clean image in JPEG beside a lossless degraded one: " in problems(check(option_file))[0]
    (public_tree / "test/lowlight/high/1.jpg").rename(public_tree / "test/lowlight/high/1.png")
    named = problems(check(option_file))
    assert any("1 file with JPEG data under another format's name: " in message for message in named)
    write_image(public_tree / "test/lowlight/high/1.png", seed=16)
    for kind in ("low", "high"):
        shutil.copy(public_tree / "test/lowlight" / kind / "1.png", public_tree / "test/lowlight" / kind / "2.png")
    (twice,) = problems(check(option_file, "--set", "validation.sets.0.expected=2"))
    assert "1 image there more than once: " in twice and "low/1.png = " in twice
    (half,) = problems(check(option_file, "--set", "validation.sets.0.expected=0", "validation.sets.0.name=low", "validation.sets.0.degraded=test/lowlight/low",
                             "validation.sets.0.clean=test/lowlight/hig", "validation.sets.0.optional=true"))
    assert "validation.sets[0] low.clean: no folder" in half and "did you mean" in half


def test_no_data_at_all_is_a_problem(option_file, tmp_path):
    (missing,) = problems(check(Path("options/test_mixed.yml"), "--set", f"root={tmp_path / 'typo'}"))
    assert f"none of its sets is there, root {tmp_path / 'typo'}" in missing
    result = run_script("test.py", "--opt", "options/test_mixed.yml", "--set", f"root={tmp_path / 'typo'}")
    assert result.returncode == 1 and "sets: none of them is there, root" in result.stderr


def test_a_limit_is_not_the_whole_set(public_tree):
    found = problems(check(Path("options/test_5d.yml"), "--set", f"root={public_tree}", "sets.4.limit=1", "sets.4.expected=2",
                           "sets.4.degraded=Train/Deblur/blur", "sets.4.clean=Train/Deblur/sharp"))
    assert any("sets[4] LOL: its option limit leaves 1 of 2 images" in message for message in found)


def test_file_list_with_prefix(option_file, public_tree):
    (public_tree / "denoise.txt").write_text("a100075.jpg\n00001.png\n12003.png\n")
    listed, count = problems(check(option_file, "--set", "sources.0.file_list=denoise.txt"))
    assert "sources[0] denoise.file_list: 2 of 3 names in" in listed
    assert "a100075.jpg, but 100075.jpg is there: one of the two has a prefix a" in listed
    assert "00001.png, but 00001.bmp is there: another extension" in listed
    assert "1 image, expected 3" in count


def test_manifest_is_written_and_verified(option_file, public_tree, tmp_path):
    manifest = public_tree / "manifest_check.sha256"
    result = check(option_file, "--hash")
    assert result.returncode == 0 and f"manifest {manifest}: written, 21 files" in result.stdout, result.stderr
    name = "Train/Deblur/blur/GOPR0372_07_00-000047.png"
    assert f"{hashlib.sha256((public_tree / name).read_bytes()).hexdigest()}  {name}" in manifest.read_text().splitlines()
    assert check(option_file, "--hash").returncode == 0

    write_image(public_tree / name, seed=99)
    (public_tree / "Train/Denoise/12003.png").rename(public_tree / "Train/Denoise/12004.png")
    changed, gone, new = problems(check(option_file, "--hash", manifest))
    assert f"1 file changed since it was written: {name}" in changed and "12003.png" in gone and "12004.png" in new

    (public_tree / "Train/Denoise/12004.png").write_bytes(b"not an image")
    unreadable, unwritten = problems(check(option_file, "--hash", tmp_path / "other.sha256"))
    assert "other.sha256: not written, for the problems above" in unwritten and not (tmp_path / "other.sha256").exists()
    manifest.write_text("nonsense\n")
    assert "line 1: 'nonsense', expected a SHA-256" in check(option_file, "--hash").stderr


def test_option_file_of_test_py(public_tree):
    result = check(Path("options/test_5d.yml"), "--set", f"root={public_tree}")
    assert "sets[0] SOTS: 1 pair, expected 500" in "\n".join(problems(result))
    assert "did you mean batch?" in check(Path("options/train_5d.yml"), "--set", "bacth=3").stderr
