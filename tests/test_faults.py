"""Random option files, names, sizes, damage, kills: a short benchmarks.faults; seeds name the cases."""

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import faults
from conftest import REPOSITORY, SMALL
from data.pairs import PAIRINGS, Folder, match_pairs
from models.baryir import BaryIR, pad_to_multiple
from utils.checkpoint import load_network, save_checkpoint
from utils.errors import InputError
from utils.options import TestOptions, TrainOptions, dump, load_options, parse

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


@pytest.mark.parametrize("seed", range(40))
def test_option_files_with_other_characters(path, seed):
    rng = random.Random(seed)
    for _ in range(3):
        text = list(rng.choice(OPTION_FILES).read_text(encoding="utf-8"))
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(text))
            text[place:place + rng.randrange(3)] = rng.choice(PIECES)
        path.write_text("".join(text), encoding="utf-8")
        loads_or_says_why(path)


@pytest.mark.parametrize("seed", range(40))
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
    "name: !!python/object/apply:os.system [echo]", "\0", "? [a]\n: b",
    "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))
    + "\nsources: *a39\nname: *a39",
], ids=["deep lists", "deep mappings", "itself", "large number", "python object", "nul", "list as key",
        "billion laughs"])
def test_option_files_that_attack(tmp_path, text):
    path = tmp_path / "options.yml"
    path.write_text(text, encoding="utf-8")
    for kind in (TrainOptions, TestOptions):
        with pytest.raises(InputError) as error:
            if text.startswith("a"):
                parse(kind, {**yaml_or_empty(path), "file": ""}, f"{path}: ")
            else:
                load_options(kind, str(path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def yaml_or_empty(path: Path) -> dict:
    """The file's sources and name alone, so that no unknown key is what is refused."""
    content = yaml.safe_load(path.read_text())
    return {key: value for key, value in content.items() if key in ("sources", "name")}


@pytest.mark.parametrize("seed", range(30))
def test_pairing_of_random_names(seed):
    """Every degraded file is paired by its rule, or one without a partner, or with two, is named."""
    rng = random.Random(seed)
    forms = ["{}", "rain-{}", "norain-{}", "{}_1_0.2", "{}_outdoor_hazy", "{}_outdoor_GT", "{}gt", "é {}"]
    stems = [rng.choice(forms).format(rng.randrange(12)) for _ in range(30)]
    files = [[Path(folder, rng.choice(["", "a", "b"]), f"{stem}{rng.choice(['.png', '.jpg'])}")
              for stem in rng.sample(stems, 12)] for folder in ("in", "gt")]
    degraded, clean = (list(dict.fromkeys(side)) for side in files)
    for rule, path in itertools.product(("auto", *PAIRINGS), degraded):
        try:
            (pair,) = match_pairs(Folder(Path("in"), [path]), Folder(Path("gt"), clean), rule, "here")
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert pair.degraded == path and pair.clean in clean
            rules = PAIRINGS if rule == "auto" else [rule]
            assert pair.clean.stem in [PAIRINGS[name](path.stem) for name in rules]


@pytest.mark.parametrize("seed", range(20))
def test_padding_of_random_sizes(seed):
    rng = random.Random(seed)
    height, width, multiple = rng.randrange(1, 40), rng.randrange(1, 40), rng.choice([2, 4, 8, 16])
    x = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(x, multiple)
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    assert padded.shape[2] - height < multiple and padded.shape[3] - width < multiple
    expected = x.numpy()
    for axis, size in ((3, width), (2, height)):
        pad = -size % multiple
        if pad:
            sides = [(0, pad if a == axis else 0) for a in range(4)]
            expected = np.pad(expected, sides, mode="reflect" if pad < size else "edge")
    assert np.array_equal(padded.numpy(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_images(seed):
    found = faults.images(30, seed)
    assert found.total() == 30 and not any(found[name] for name in faults.FAILURES), found


def test_damaged_checkpoints():
    found = faults.checkpoints(40, seed=0)
    assert found.total() == 40 and found[faults.ERROR] >= 30, found
    assert not any(found[name] for name in faults.FAILURES), found


def test_outcomes_that_must_not_be_are_told():
    """The judge of both tests above can fail."""
    assert faults.outcome(lambda: 1, lambda result: False, checksum=True) == faults.SILENT
    assert faults.outcome(lambda: 1, lambda result: False, checksum=False) == faults.OTHER
    assert faults.outcome(lambda: {}[1], lambda result: True, True) == faults.TRACEBACK
    assert faults.outcome(lambda: 1, lambda result: True, True) == faults.SAME


@pytest.mark.parametrize("content, message", [
    (lambda net: {"net": {"a": torch.zeros(1).expand(10**12)}, "network": {"width": 10**12}},
     r"weights and network do not fit \(64 transformer blocks and 1 tensors\)"),
    (lambda net: {"net": net, "network": {**SMALL, "width": 10**9}}, "do not fit"),
    (lambda net: {"net": net, "network": {**SMALL, "latent_blocks": 10**9}},
     "do not fit .*1000000010 transformer blocks"),
    (lambda net: {"net": net, "network": {**SMALL, "heads": [1, 2, 4, 10**15]}},
     "cannot be split into 1000000000000000 heads"),
    (lambda net: {"net": {**net, "output.weight": torch.zeros(1).expand(10**6, 10**6)}, "network": SMALL},
     r"output.weight: \[1000000, 1000000\], expected \[3, 16, 3, 3\]"),
    (lambda net: {"net": {**net, "more": torch.zeros(2)}, "network": SMALL}, r"more: \[2\], expected none"),
    (lambda net: {"net": {**net, "output.weight": torch.zeros(3, 16, 3, 3, device="meta")}, "network": SMALL},
     "expected a dict of tensors"),
    (lambda net: {"net": list(net.values()), "network": SMALL}, "expected a dict of tensors"),
    (lambda net: {"net": net, "network": {**SMALL, "width": "8"}},
     "network.width: '8', expected a whole number"),
    (lambda net: {"net": net, "network": 8}, "network: 8, expected keys and values"),
])
def test_checkpoints_that_claim_what_they_do_not_hold(tmp_path, content, message):
    net = BaryIR(**SMALL).state_dict()
    torch.save(content(net), tmp_path / "claims.pth")
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / "claims.pth")


def test_checkpoints_are_not_unpacked_beyond_their_size(tmp_path):
    import zipfile

    save_checkpoint(tmp_path / "net.pth", {"net": {}, "network": {}})
    with (zipfile.ZipFile(tmp_path / "net.pth") as whole,
          zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry) + bytes(10**7) * entry.filename.endswith("pkl"))
    with pytest.raises(InputError, match=r"bomb.pth: cannot be read as a checkpoint \(compressed\)"):
        load_network(tmp_path / "bomb.pth")


def test_killed_runs_end_as_they_would_have():
    found = faults.kills(2, seed=0, jobs=2, steps=12)
    assert found["identical"] == 2, found
