"""Protocols and metrics against scikit-image, test.py's tables and files, restoring photographs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from conftest import output_of, read_csv, run_script, write_image, write_yaml
from utils.checkpoint import load_network
from utils.evaluation import restore
from utils.images import read_image, to_tensor


def options(tmp_path: Path, checkpoint: Path, **changes) -> str:
    for i in range(3):
        write_image(tmp_path / f"data/clean/{i}.png", 45, 37, seed=i)
        write_image(tmp_path / f"data/in/{i}.png", 45, 37, seed=i + 10)
    return write_yaml(tmp_path / "table.yml", {
        "name": "table", "checkpoint": str(checkpoint), "root": str(tmp_path / "data"),
        "output": str(tmp_path / "results"),
        "sets": [{"name": "pairs", "degraded": "in", "clean": "clean"},
                 {"name": "noise", "clean": "clean", "degradation": "noise", "levels": [25], "limit": 2},
                 {"name": "blind", "degraded": "in"},
                 {"name": "gone", "degraded": "gone", "clean": "clean", "optional": True}]} | changes)


def run(*arguments: object) -> str:
    return output_of("test.py", "--opt", *arguments)


def table(tmp_path: Path) -> dict[str, dict]:
    rows = read_csv(tmp_path / "results/table/table.csv")
    assert list(rows[0]) == ["set", "images", "expected", "psnr_in", "ssim_in", "psnr", "ssim", "protocol",
                             "checkpoint"]
    return {row["set"]: row for row in rows}


def test_promptir_protocol_by_hand_and_the_average_of_the_sets(tmp_path, checkpoint):
    printed = run(options(tmp_path, checkpoint))
    scores = []
    for i in range(3):
        degraded, clean = (read_image(tmp_path / f"data/{kind}/{i}.png")[2:34, 6:38]    # 37x45 -> 32x32
                           for kind in ("in", "clean"))
        with torch.no_grad():
            restored = load_network(checkpoint)(to_tensor(degraded)[None])[0][0].clip(0, 1)
        restored, truth = restored.permute(1, 2, 0).numpy(), clean.astype(np.float32) / 255
        scores.append((peak_signal_noise_ratio(truth, degraded.astype(np.float32) / 255, data_range=1),
                       peak_signal_noise_ratio(truth, restored, data_range=1),
                       structural_similarity(truth, restored, data_range=1, channel_axis=2)))
    rows, expected = table(tmp_path), np.mean(scores, axis=0)
    found = [float(rows["pairs"][key]) for key in ("psnr_in", "psnr", "ssim")]
    assert found == pytest.approx(expected, abs=1e-5)
    assert [row["images"] for row in rows.values()][:3] == ["3", "2", "3"]
    assert rows["blind"]["psnr"] == rows["blind"]["ssim_in"] == ""
    pairs, noise, average = (float(rows[name]["psnr"]) for name in ("pairs", "noise", "average"))
    assert average == pytest.approx((pairs + noise) / 2)
    assert "left out (optional): " in printed and "no folder" in printed
    assert "| blind | 3 | - | - |" in (tmp_path / "results/table/table.md").read_text()


@pytest.mark.parametrize("protocol, size", [("baryir", (40, 32)), ("full", (45, 37))])
def test_rounding_protocols_equal_the_saved_images(tmp_path, checkpoint, protocol, size):
    assert f"protocol {protocol}" in run(options(tmp_path, checkpoint), "--protocol", protocol)
    scores = []
    for i in range(3):
        saved = read_image(tmp_path / f"results/table/pairs/{i}.png")
        assert saved.shape[1::-1] == size
        clean = read_image(tmp_path / f"data/clean/{i}.png")[:size[1], :size[0]]
        scores.append((peak_signal_noise_ratio(clean, saved),
                       structural_similarity(clean, saved, channel_axis=2)))
    row = table(tmp_path)["pairs"]
    assert [float(row["psnr"]), float(row["ssim"])] == pytest.approx(np.mean(scores, axis=0), abs=1e-6)


def test_what_cannot_be_restored_is_one_line(tmp_path, checkpoint):
    """An absent set before anything is restored; an image too small to measure; a folder that is a file."""
    opt = options(tmp_path, checkpoint)
    write_image(tmp_path / "data/small/a.png", 40, 15)
    small = "sets=[{name: small, degraded: small}]"
    (tmp_path / "file").write_text("not a folder")
    for status, message, *arguments in (
        (1, r"sets\[3\] gone.degraded: no folder .*put the data there", "--set", "sets.3.optional=false"),
        (1, "small/a.png: 40x15 pixels, .* 16x16 to measure", "--set", small),
        (3, r"file.*: (File exists|Not a directory)\n", "--input", tmp_path / "data/in/0.png", "--output",
         tmp_path / "file/out.png"),                            # 3: others would have gone on
    ):
        result = run_script("test.py", "--opt", opt, *arguments)
        assert result.returncode == status and "Traceback" not in result.stderr
        assert re.search(f"error: .*{message}", result.stderr)
        assert not list((tmp_path / "results").rglob("*.png"))
    run(opt, "--protocol", "full", "--set", small)


def test_saved_images_keep_folders_and_names(tmp_path, checkpoint):
    for name in ("one/a.png", "two/a.png", "two/b.png", "two/b.jpg"):
        write_image(tmp_path / "data/mixed" / name)
    opt, results = options(tmp_path, checkpoint), tmp_path / "results/table"
    run(opt, "--set", "sets=[{name: mixed, degraded: mixed}]")
    saved = {str(path.relative_to(results / "mixed")) for path in (results / "mixed").rglob("*.*")
             if Image.open(path).format == "PNG"}
    assert saved == {"one/a.png", "two/a.png", "two/b.jpg.png", "two/b.png"}    # both of one stem are kept
    printed = run(opt, "--set", "save=false", "sets.1.average=false")           # none, and a set beside them
    line = r"^pairs +3 +[0-9.]+ / 0\.[0-9]{4} +[0-9.]+ / -?0\.[0-9]{4}$"
    assert re.search(line, printed, re.MULTILINE)
    assert not {"pairs", "noise"} & {path.name for path in results.iterdir()}
    rows = table(tmp_path)
    assert rows["average"]["psnr"] == rows["pairs"]["psnr"] != rows["noise"]["psnr"] != ""


@pytest.mark.parametrize("native", [False, True])
def test_precision_auto_asks_the_processor(tmp_path, checkpoint, monkeypatch, native):
    """Photographs take what it says unless told otherwise, tables where they are told to. Both say which."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: native and "amx" in name, raising=False)
    opt, automatic = options(tmp_path, checkpoint), "bfloat16" if native else "float32"
    photograph = "--input", tmp_path / "data/in/0.png", "--output", tmp_path / "out"
    sets = "sets=[{name: blind, degraded: in, limit: 1}]"
    assert "precision float32" in run(opt, "--set", sets)
    assert f"precision {automatic}" in run(opt, "--set", sets, "precision=auto")
    assert run(opt, *photograph).endswith(f", in {tmp_path / 'out'}, precision {automatic}\n")
    image, net = torch.rand(1, 3, 16, 24), load_network(checkpoint)
    restored = {kind: restore(net, image, precision=kind) for kind in ("auto", "float32", "bfloat16")}
    assert [kind for kind in restored if torch.equal(restored["auto"], restored[kind])] == ["auto", automatic]


@pytest.mark.parametrize("size", [(20, 33), (1, 9), (6, 5)])
def test_a_border_is_the_image_reflected_and_cropped_again(checkpoint, size):
    net, image, border = load_network(checkpoint), torch.rand(1, 3, *size), min(8, min(size) - 1)
    around = np.pad(image[0].numpy(), [(0, 0)] + [(border, border)] * 2, mode="reflect")
    expected = restore(net, torch.from_numpy(around)[None])[..., border:, border:][..., :size[0], :size[1]]
    assert torch.equal(restore(net, image, border=8), expected) and expected.shape == image.shape
