"""Images and public-layout trees for the tests, made on the spot; one thread for networks so small."""

import contextlib
import csv
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import train  # noqa: E402 (needs the path)
from data.datasets import ImageSet  # noqa: E402
from models.baryir import BaryIR  # noqa: E402
from utils.checkpoint import save_checkpoint  # noqa: E402
from utils.options import Source, parse  # noqa: E402
from utils.sides import Side  # noqa: E402

torch.set_num_threads(1)

SMALL = dict(width=8, encoder_blocks=[1, 1, 1], latent_blocks=1, transport_blocks=1, decoder_blocks=[1, 1, 1],
             residual_blocks=[1, 1], refinement_blocks=1)
# A smaller one yet, as options of train.py.
TINY_NETWORK = [f"network.{name}={value}".replace(" ", "")
                for name, value in {**SMALL, "refinement_blocks": 0}.items()]


def write_image(path: Path, width: int = 40, height: int = 32, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_yaml(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


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


def output_of(name: str, *arguments: object) -> str:
    """What a script that must succeed prints."""
    result = run_script(name, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def train_tiny(opt: str, *arguments: str, **changes: object) -> None:
    """`train.py --opt OPT ARGUMENTS --set CHANGES` with a tiny network, in this process."""
    changed = [f"{key}={value}" for key, value in changes.items()]
    train.main(["--opt", opt, *arguments, "--set", *TINY_NETWORK, *changed])


def take_step(side: Side, loss: torch.Tensor, clip: float = 0.0) -> torch.Tensor:
    """A step of a side as train.py takes it; returns the norm of its gradient."""
    side.thaw()
    loss.backward()
    norm = side.average_and_clip(loss, clip)
    side.optimizer.step()
    return norm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
    files = [f"Train/Denoise/{name}" for name in ("100075.jpg", "00001.bmp", "12003.png")]
    files += [f"Train/Derain/{name}-{n}.png" for n in (1, 2, 10) for name in ("rainy/rain", "gt/norain")]
    for scene, part in (("0025", 1), ("0031", 4)):
        files += [f"Train/Dehaze/original/{scene}.jpg"]
        files += [f"Train/Dehaze/synthetic/part{part}/{scene}_{a}.jpg" for a in ("0.8_0.1", "1_0.2")]
    for side in ("blur", "sharp"):
        files += [f"Train/Deblur/{side}/GOPR0372_07_00-00004{n}.png" for n in (7, 8)]
    files += ["Train/lowlight/low/2.png", "Train/lowlight/high/2.png"]
    files += [f"test/{name}" for name in (
        "dehaze/input/0001_0.8_0.2.jpg", "dehaze/target/0001.png", "derain/Rain100L/input/rain-001.png",
        "derain/Rain100L/target/norain-001.png", "deblur/input/a.png", "deblur/target/a.png",
        "lowlight/low/1.png", "lowlight/high/1.png", "denoise/bsd68/101085.png")]
    for seed, file in enumerate(files):
        write_image(root / file, seed=seed)
    return root
