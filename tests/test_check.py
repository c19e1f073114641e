"""data.check on trees in the public layout: complete ones pass, each damage is named."""

import hashlib
from pathlib import Path

import pytest
import yaml

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
    assert result.returncode == 1 and f"{result.stdout.count('problem: ')} problems, " in result.stderr
    return [line.removeprefix("problem: ") for line in result.stdout.splitlines() if line.startswith("problem: ")]


def test_complete_data_pass(option_file, public_tree):
    write_image(public_tree / "Train/Denoise/wide.png", 60, 32)
    (public_tree / "Train/Denoise/list.txt").write_text("not an image")
    result = check(option_file, "--set", "sources.0.expected=4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"check.yml: sources[0] denoise: 4 clean images in {public_tree}/Train/Denoise, noise 25 on the fly, 40-60 x 32 pixels" in result.stdout
    assert "1 files that are not images: " in result.stdout and "list.txt" in result.stdout
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
    assert "1 pairs, expected 3" in pairs
    assert "1 unreadable files: " in unreadable and f"{broken}: cannot be read as an image" in unreadable
    assert "1 pairs of unequal size: " in unequal and "low/1.png is 40x32 but" in unequal and "high/1.png is 41x32" in unequal


def test_file_list_with_prefix(option_file, public_tree):
    (public_tree / "denoise.txt").write_text("a100075.jpg\n00001.png\n12003.png\n")
    listed, count = problems(check(option_file, "--set", "sources.0.file_list=denoise.txt"))
    assert "sources[0] denoise.file_list: 2 of 3 names in" in listed
    assert "a100075.jpg, but 100075.jpg is there: one of the two has a prefix a" in listed
    assert "00001.png, but 00001.bmp is there: another extension" in listed
    assert "1 images, expected 3" in count


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
    assert f"1 files changed since it was written: {name}" in changed and "12003.png" in gone and "12004.png" in new

    (public_tree / "Train/Denoise/12004.png").write_bytes(b"not an image")
    unreadable, unwritten = problems(check(option_file, "--hash", tmp_path / "other.sha256"))
    assert "other.sha256: not written, for the problems above" in unwritten and not (tmp_path / "other.sha256").exists()
    manifest.write_text("nonsense\n")
    assert "line 1: 'nonsense', expected a SHA-256" in check(option_file, "--hash").stderr


def test_option_file_of_test_py(public_tree):
    result = check(Path("options/test_5d.yml"), "--set", f"root={public_tree}")
    assert "sets[0] SOTS: 1 pairs, expected 500" in "\n".join(problems(result))
    assert "did you mean batch?" in check(Path("options/train_5d.yml"), "--set", "bacth=3").stderr
