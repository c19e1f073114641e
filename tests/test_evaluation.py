"""Protocols and metrics against scikit-image, strips, test.py's tables and files, restoring photographs."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from conftest import SMALL, run_script, write_image
from models.baryir import BaryIR
from utils.checkpoint import load_network
from utils.evaluation import restore
from utils.images import read_image


def options(tmp_path: Path, checkpoint: Path, **changes) -> str:
    for i in range(3):
        write_image(tmp_path / f"data/clean/{i}.png", 45, 37, seed=i)
        write_image(tmp_path / f"data/in/{i}.png", 45, 37, seed=i + 10)
    content = {
        "name": "table", "checkpoint": str(checkpoint),
        "root": str(tmp_path / "data"), "output": str(tmp_path / "results"),
        "sets": [{"name": "pairs", "degraded": "in", "clean": "clean"},
                 {"name": "noise", "clean": "clean", "degradation": "noise", "levels": [25], "limit": 2},
                 {"name": "blind", "degraded": "in"},
                 {"name": "gone", "degraded": "gone", "clean": "clean", "optional": True}],
        **changes,
    }
    path = tmp_path / "table.yml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def table(tmp_path: Path) -> dict[str, dict]:
    with open(tmp_path / "results/table/table.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["set", "images", "expected", "psnr_in", "ssim_in", "psnr", "ssim",
                                     "protocol", "checkpoint"]
        return {row["set"]: row for row in reader}


def restored_by_hand(checkpoint: Path, degraded: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        x = torch.from_numpy(degraded.transpose(2, 0, 1)[None].astype(np.float32) / 255)
        return load_network(checkpoint)(x)[0][0].numpy().transpose(1, 2, 0)


def test_promptir_protocol_by_hand(tmp_path, checkpoint):
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint))
    assert result.returncode == 0, result.stderr
    scores = []
    for i in range(3):
        degraded, clean = (read_image(tmp_path / f"data/{kind}/{i}.png")[2:34, 6:38]    # 37x45 -> 32x32
                           for kind in ("in", "clean"))
        restored, truth = restored_by_hand(checkpoint, degraded).clip(0, 1), clean.astype(np.float32) / 255
        scores.append((peak_signal_noise_ratio(truth, degraded.astype(np.float32) / 255, data_range=1),
                       peak_signal_noise_ratio(truth, restored, data_range=1),
                       structural_similarity(truth, restored, data_range=1, channel_axis=2)))
    row, expected = table(tmp_path)["pairs"], np.mean(scores, axis=0)
    assert [float(row[key]) for key in ("psnr_in", "psnr", "ssim")] == pytest.approx(expected, abs=1e-5)
    assert row["images"] == "3"


@pytest.mark.parametrize("protocol, size", [("baryir", (40, 32)), ("full", (45, 37))])
def test_rounding_protocols_equal_the_saved_images(tmp_path, checkpoint, protocol, size):
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint), "--protocol", protocol)
    assert result.returncode == 0, result.stderr
    assert f"protocol {protocol}" in result.stdout
    scores = []
    for i in range(3):
        saved = read_image(tmp_path / f"results/table/pairs/{i}.png")
        assert saved.shape[1::-1] == size
        clean = read_image(tmp_path / f"data/clean/{i}.png")[:size[1], :size[0]]
        scores.append((peak_signal_noise_ratio(clean, saved),
                       structural_similarity(clean, saved, channel_axis=2)))
    row = table(tmp_path)["pairs"]
    assert [float(row["psnr"]), float(row["ssim"])] == pytest.approx(np.mean(scores, axis=0), abs=1e-6)


def test_table_average_optional_and_blind_sets(tmp_path, checkpoint):
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint))
    assert result.returncode == 0, result.stderr
    rows = table(tmp_path)
    assert list(rows) == ["pairs", "noise", "blind", "average"] and rows["noise"]["images"] == "2"
    assert rows["blind"]["psnr"] == rows["blind"]["ssim_in"] == ""
    average = (float(rows["pairs"]["psnr"]) + float(rows["noise"]["psnr"])) / 2
    assert float(rows["average"]["psnr"]) == pytest.approx(average)
    assert "left out (optional): " in result.stdout and "no folder" in result.stdout
    assert "| blind | 3 | - | - |" in (tmp_path / "results/table/table.md").read_text()


def test_table_without_saved_images(tmp_path, checkpoint):
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint), "--set", "save=false")
    assert result.returncode == 0, result.stderr
    line = r"^pairs +3 +[0-9.]+ / 0\.[0-9]{4} +[0-9.]+ / -?0\.[0-9]{4}$"
    assert re.search(line, result.stdout, re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "results/table").iterdir()) == ["table.csv", "table.md"]


def test_a_set_beside_the_average(tmp_path, checkpoint):
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint), "--set", "sets.1.average=false")
    assert result.returncode == 0, result.stderr
    rows = table(tmp_path)
    assert rows["average"]["psnr"] == rows["pairs"]["psnr"] != rows["noise"]["psnr"] != ""


def test_absent_set_is_an_error_before_anything_is_restored(tmp_path, checkpoint):
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint), "--set", "sets.3.optional=false")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "sets[3] gone.degraded: no folder" in result.stderr and "put the data there" in result.stderr
    assert not (tmp_path / "results").exists()


def test_saved_images_keep_folders_names_and_grey(tmp_path, checkpoint):
    write_image(tmp_path / "data/mixed/one/a.png")
    for name in ("a.png", "b.png", "b.jpg"):
        write_image(tmp_path / "data/mixed/two" / name)
    grey = write_image(tmp_path / "data/mixed/grey.jpg")
    Image.open(grey).convert("L").save(grey)
    description = {"name": "mixed", "degraded": "mixed"}
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint, sets=[description]))
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results/table/mixed"
    saved = {str(path.relative_to(folder)): Image.open(path)
             for path in folder.rglob("*") if path.is_file()}
    assert {name: (image.format, image.mode) for name, image in saved.items()} == {
        "one/a.png": ("PNG", "RGB"), "two/a.png": ("PNG", "RGB"), "two/b.jpg.png": ("PNG", "RGB"),
        "two/b.png": ("PNG", "RGB"), "grey.png": ("PNG", "L")}      # lossless, both of one stem kept


def test_image_that_is_too_small_to_measure_is_named(tmp_path, checkpoint):
    for folder in ("small", "truth"):
        write_image(tmp_path / f"data/{folder}/a.png", 40, 15)
    description = {"name": "small", "degraded": "small", "clean": "truth"}
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint, sets=[description]))
    assert result.returncode == 1 and "expected at least 7x7" in result.stderr
    assert "small/a.png: 32x0 pixels are left by protocol promptir" in result.stderr
    opt = options(tmp_path, checkpoint, sets=[description])
    result = run_script("test.py", "--opt", opt, "--protocol", "full")
    assert result.returncode == 0, result.stderr


def test_unwritable_output_is_one_line(tmp_path, checkpoint):
    (tmp_path / "file").write_text("not a folder")
    photograph = write_image(tmp_path / "photo.png")
    result = run_script("test.py", "--opt", options(tmp_path, checkpoint), "--input", photograph,
                        "--output", tmp_path / "file/out.png")
    assert result.returncode == 3 and "Traceback" not in result.stderr      # others would have gone on
    assert re.search(r"error: .*file.*: (File exists|Not a directory)\n$", result.stderr)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_strips_give_what_the_whole_image_gives(precision, tolerance):
    torch.manual_seed(0)
    net, image = BaryIR(**SMALL).eval(), torch.rand(1, 3, 50, 31)
    whole = restore(net, image, 0, precision)
    for strip in (1, 7, 64, "auto"):
        torch.testing.assert_close(restore(net, image, strip, precision), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("native", [False, True])
def test_precision_auto_asks_the_processor(tmp_path, checkpoint, monkeypatch, native):
    """Photographs take what it says unless told otherwise, tables where they are told to. Both say which."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: native and "amx" in name, raising=False)
    automatic = "precision bfloat16" if native else "precision float32"
    opt, photograph = options(tmp_path, checkpoint), tmp_path / "data/in/0.png"
    for precision, in_table, of_photograph in (("", "precision float32", automatic),
                                               ("auto", automatic, automatic),
                                               ("bfloat16", "precision bfloat16", "precision bfloat16")):
        common = "--opt", opt, "--set", f"precision={precision}"
        assert in_table in run_script("test.py", *common).stdout
        result = run_script("test.py", *common, "--input", photograph, "--output", tmp_path / "out",
                            "--overwrite")
        assert result.stdout.endswith(f", in {tmp_path / 'out'}, {of_photograph}\n"), result.stderr
    image, net = torch.rand(1, 3, 16, 24), load_network(checkpoint)
    restored = {kind: restore(net, image, precision=kind) for kind in ("auto", "float32", "bfloat16")}
    assert torch.equal(restored["auto"], restored["bfloat16"]) is native
    assert torch.equal(restored["auto"], restored["float32"]) is not native


@pytest.mark.parametrize("size", [(20, 33), (1, 9), (6, 5)])
def test_a_border_is_the_image_reflected_and_cropped_again(checkpoint, size):
    net, image = load_network(checkpoint), torch.rand(1, 3, *size)
    around = np.pad(image[0].numpy(), [(0, 0)] + [(min(8, min(size) - 1),) * 2] * 2, mode="reflect")
    inner = slice(min(8, min(size) - 1), None)
    expected = restore(net, torch.from_numpy(around)[None])[..., inner, inner][..., :size[0], :size[1]]
    assert torch.equal(restore(net, image, border=8), expected)
    assert expected.shape == image.shape
