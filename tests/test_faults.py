"""Random option files, names, sizes, damage, kills: a short benchmarks.faults; seeds name the cases."""

import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import faults
from conftest import REPOSITORY, SMALL
from data.pairs import PAIRINGS, Folder, match_pairs
from models.baryir import BaryIR
from utils.checkpoint import load_network
from utils.errors import InputError
from utils.options import TestOptions, TrainOptions, dump, load_options, parse

NET = BaryIR(**SMALL).state_dict()
OPTION_FILES = sorted(REPOSITORY.glob("options/*.yml"))
VALUES = [None, True, -1, 0, 1, 3.5, 10**400, float("inf"), float("nan"), "", "x", "\0", "a\nb", "1e5",
          "../..", "x" * 5000, [], [[]], [1, "x"], {}, {"a": {}}, {1: 2}, "auto", "-3", {"name": []}]
PIECES = [*"{}[]:,-#&*!|>'\"%@`\t\n 0aé\u2028", "&a ", "*a", "!!python/object:os.system ", "? ", "<<: "]


def loads_or_says_why(path: Path, *overrides: str) -> None:
    for kind in (TrainOptions, TestOptions):
        try:
            options = load_options(kind, str(path), list(overrides))
        except InputError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 2000 and (str(path) in text or "--set" in text), error
        else:
            assert parse(kind, yaml.safe_load(dump(options)), "") == options    # accepted is what is meant


@pytest.fixture
def path(tmp_path) -> Path:
    """Of a file to write beside all option files, which it may name as its base."""
    for file in OPTION_FILES:
        shutil.copy(file, tmp_path)
    return tmp_path / "options.yml"


@pytest.mark.parametrize("seed", range(5))
def test_option_files_with_other_characters(path, seed):
    rng = random.Random(seed)
    for _ in range(6):
        text = list(rng.choice(OPTION_FILES).read_text(encoding="utf-8"))
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(text))
            text[place:place + rng.randrange(3)] = rng.choice(PIECES)
        path.write_text("".join(text), encoding="utf-8")
        loads_or_says_why(path)


@pytest.mark.parametrize("seed", range(10))
def test_option_files_with_other_values(path, seed):
    rng = random.Random(seed)
    content = yaml.safe_load(rng.choice(OPTION_FILES).read_text(encoding="utf-8"))
    for _ in range(3):
        here = content
        while True:                                             # to any place of the tree
            key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if not (isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.7):
                break
            here = here[key]
        here[key] = rng.choice(VALUES)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        loads_or_says_why(path)
        loads_or_says_why(rng.choice(OPTION_FILES), f"{key}={rng.choice(VALUES)}")


@pytest.mark.parametrize("text", [
    "[" * 5000, "name: " + "{a: " * 3000, "a: &a [*a]\nsources: *a", "name: 0x" + "f" * 20000,
    "name: !!python/object/apply:os.system [echo]", "? [a]\n: b",
], ids=["deep lists", "deep mappings", "itself", "large number", "python object", "list as key"])
def test_option_files_that_attack(path, text):
    path.write_text(text, encoding="utf-8")
    loads_or_says_why(path)
    with pytest.raises(InputError):
        load_options(TrainOptions, str(path))


@pytest.mark.parametrize("seed", range(8))
def test_pairing_of_random_names(seed):
    """Every degraded file is paired by its rule, or one without a partner, or with two, is named."""
    rng = random.Random(seed)
    forms = ["{}", "rain-{}", "norain-{}", "{}_1_0.2", "{}_outdoor_hazy", "{}_outdoor_GT", "{}gt", "é {}"]
    stems = [rng.choice(forms).format(rng.randrange(12)) for _ in range(30)]
    files = [[Path(folder, rng.choice(["", "a", "b"]), f"{stem}{rng.choice(['.png', '.jpg'])}")
              for stem in rng.choices(stems, k=12)] for folder in ("in", "gt")]
    degraded, clean = (list(dict.fromkeys(side)) for side in files)
    for rule, path in itertools.product(PAIRINGS, degraded):
        try:
            (pair,) = match_pairs(Folder(Path("in"), [path]), Folder(Path("gt"), clean), rule, "here")
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert pair.degraded == path and pair.clean in clean
            assert pair.clean.stem == PAIRINGS[rule](path.stem)


def test_damaged_images_and_checkpoints():
    images, checkpoints = faults.images(60, seed=0), faults.checkpoints(40, seed=0)
    assert images.total() == 60 and checkpoints.total() == 40 and checkpoints[faults.ERROR] >= 30
    assert not any(found[name] for found in (images, checkpoints) for name in faults.FAILURES)
    # The judge can fail.
    assert faults.outcome(lambda: 1, lambda result: False, checksum=True) == faults.SILENT
    assert faults.outcome(lambda: 1, lambda result: False, checksum=False) == faults.OTHER
    assert faults.outcome(lambda: {}[1], lambda result: True, True) == faults.TRACEBACK
    assert faults.outcome(lambda: 1, lambda result: True, True) == faults.SAME


@pytest.mark.parametrize("content, message", [
    (None, "no such checkpoint"), (b"no checkpoint", "cannot be read as a checkpoint"),
    ({"params": {}}, "not a checkpoint of this repository, expected the dicts net and network"),
    ({"net": [torch.zeros(3)], "network": SMALL}, "expected the dicts net and network"),
    ({"net": {}, "network": {**SMALL, "width": "x"}}, "network.width: 'x', expected a whole number"),
    ({"net": {}, "network": {**SMALL, "heads": [1, 2, 4, 10**15]}}, "be split into 1000000000000000 heads"),
    ({"net": {}, "network": SMALL}, r"177 of 177 tensors do not fit the network \(.*; \.\.\.\)$"),
    ({"net": NET | {"output.weight": torch.zeros(3, 1)}, "network": SMALL},
     r"1 of 177 tensors .*\(output.weight: \[3, 1\], expected \[3, 16, 3, 3\]\)"),
    ({"net": NET | {"more": torch.zeros(2), "other": 3}, "network": SMALL},
     r"2 of 177 tensors .*\(more: \[2\], expected none; other: \['no tensor'\], expected none\)"),
])
def test_wrong_checkpoints(tmp_path, content, message):
    path = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        load_network(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_killed_runs_end_as_they_would_have():
    found = faults.kills(2, seed=0, jobs=2, steps=8)
    assert found["identical"] == 2, found
