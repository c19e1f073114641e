"""Images and public-layout trees for the tests, made on the spot; one thread for networks so small."""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from data.datasets import ImageSet  # noqa: E402 (needs the path)
from models.baryir import BaryIR  # noqa: E402
from utils.checkpoint import save_checkpoint  # noqa: E402
from utils.options import Source, parse  # noqa: E402

torch.set_num_threads(1)

TINY_NETWORK = ["network.width=8", "network.encoder_blocks=[1,1,1]", "network.latent_blocks=1",
                "network.transport_blocks=1", "network.decoder_blocks=[1,1,1]",
                "network.residual_blocks=[1,1]", "network.refinement_blocks=0"]

SMALL = dict(width=8, encoder_blocks=[1, 1, 1], latent_blocks=1, transport_blocks=1, decoder_blocks=[1, 1, 1],
             residual_blocks=[1, 1], refinement_blocks=1)


def write_image(path: Path, width: int = 40, height: int = 32, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folder_set(root: Path, kind=Source, **entry) -> ImageSet:
    """The set of an option file's entry, or, with kind TestSet, of one of its test sets."""
    return ImageSet(parse(kind, {"name": "set", **entry}, ""), str(root), "file: set")


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """`python NAME ARGUMENTS` from the repository, in this process: no seconds lost to importing torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (mock.patch.object(sys, "argv", [name, *map(str, arguments)]), contextlib.chdir(REPOSITORY),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(name, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a small random network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "net.pth"
    save_checkpoint(path, {"net": BaryIR(**SMALL).state_dict(), "network": SMALL, "step": 0})
    return path


@pytest.fixture
def public_tree(tmp_path: Path) -> Path:
    """A small tree in the public layout: names, extensions and folders as in the data sets."""
    root = tmp_path / "datasets"
    for name in ("100075.jpg", "00001.bmp", "12003.png"):
        write_image(root / "Train/Denoise" / name, seed=1)
    for n in (1, 2, 10):
        write_image(root / f"Train/Derain/rainy/rain-{n}.png", seed=n)
        write_image(root / f"Train/Derain/gt/norain-{n}.png", seed=n + 50)
    for scene, part in (("0025", 1), ("0031", 4)):
        write_image(root / f"Train/Dehaze/original/{scene}.jpg", seed=3)
        for a in ("0.8_0.1", "1_0.2"):
            write_image(root / f"Train/Dehaze/synthetic/part{part}/{scene}_{a}.jpg", seed=4)
    for name in ("GOPR0372_07_00-000047.png", "GOPR0372_07_00-000048.png"):
        for kind in ("blur", "sharp"):
            write_image(root / "Train/Deblur" / kind / name, seed=5 + (kind == "sharp"))
    for kind in ("low", "high"):
        write_image(root / "Train/lowlight" / kind / "2.png", seed=7 + (kind == "high"))
    for i, (degraded, clean) in enumerate([
        ("dehaze/input/0001_0.8_0.2.jpg", "dehaze/target/0001.png"),
        ("derain/Rain100L/input/rain-001.png", "derain/Rain100L/target/norain-001.png"),
        ("deblur/input/a.png", "deblur/target/a.png"), ("lowlight/low/1.png", "lowlight/high/1.png"),
    ]):
        write_image(root / "test" / degraded, seed=i)
        write_image(root / "test" / clean, seed=i + 100)
    write_image(root / "test/denoise/bsd68/101085.png", seed=20)
    return root
