"""benchmarks/gpu.sh, dry, on a CPU: it ends in time, with every file that it promises."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.pack import chosen
from conftest import REPOSITORY, TINY_NETWORK, write_image
from data.datasets import ImageSet
from utils import options
from utils.checkpoint import load_network

SOURCES = [{"name": name, "bundled": ["coffee.png"], "degradation": name, "range": ends}
           for name, ends in (("noise", [5, 50]), ("lowlight", [2, 5]))]


def test_dry_run(tmp_path):
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(write_image(tmp_path / "a.png"), "a.png")
    train = ["sources=" + json.dumps(SOURCES, separators=(",", ":")), "validation.sets=[]", "patch=16",
             "cache=false", "pretrained=", *TINY_NETWORK]
    environment = {"DEVICE": "cpu", "BATCH": "2", "MINUTES": "5", "PROBE": "4", "STEPS": "6",
                   "SPEED": "--help", "TESTS": "tests/test_cuda.py", "TRAIN": " ".join(train),
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "benchmarks/gpu.sh", tmp_path / "out", tmp_path / "data.tar"]
    result = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True,
                            text=True, timeout=300)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert result.returncode == 0, result.stdout + result.stderr
    weights, = (tmp_path / "out").glob("*.pth")
    assert files == {"summary.txt", "tests.txt", "speed.txt", "train.txt", "losses.csv", "validation.csv",
                     "options.yml", weights.name}
    assert all(weight.isfinite().all() for weight in load_network(weights).state_dict().values())
    assert "skipped" in (tmp_path / "out/tests.txt").read_text()


def test_a_pack_keeps_what_belongs_together(tmp_path):
    for n in range(9):
        for folder in ("clean", "depth", "low"):
            write_image(tmp_path / folder / f"{n}.png", seed=n)
    haze = options.Source(name="haze", clean="clean", degradation="haze", range=[1, 2], depth="depth")
    pairs = options.Source(name="low", degraded="low", clean="clean")
    sets = [ImageSet(entry, str(tmp_path), "x") for entry in (haze, pairs)]
    files = {path.relative_to(tmp_path).as_posix() for path in chosen(sets, 4)}
    assert files == {f"{folder}/{n}.png" for folder in ("clean", "depth", "low") for n in (0, 4, 8)}
