"""Checkpoints: plain dicts of tensors and numbers, read with weights_only=True, written whole or not at all.

    net       weights of BaryIR, for use (the averaged ones where the run averages)
    network   arguments of BaryIR
    step      training steps done (epoch instead, in one converted from the authors' release)
    train     last.pth and previous.pth only: what a run needs to continue exactly

A checkpoint may come from anyone: nothing in it is run, nothing is allocated before its shapes are those of the network that it
names, and its checksums, which torch writes and does not read, tell a damaged file.
"""

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.errors import InputError, first_few
from utils.files import write_atomically
from utils.option_files import parse
from utils.options import Network


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    """Write a checkpoint, which takes its place once it reads back; an earlier one there goes to `previous`, or is replaced."""
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:                     # not by name, which torch would store
            torch.save(content, file)

    try:
        write_atomically(path, write, read_checkpoint, previous)
    except RuntimeError as error:                               # what torch raises on a full disk
        free = shutil.disk_usage(path.parent).free / 1e6
        raise InputError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]}); {free:.0f} MB are free there") from None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's dict on the CPU; InputError where the file is absent, damaged or something else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: a folder, expected a checkpoint" if path and Path(path).is_dir() else f"{path or '(empty path)'}: no such checkpoint")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # broken files raise nearly anything
        reason = str(error) if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"{path}: cannot be read as a checkpoint ({reason}), expected a file of train.py") from None
    if not isinstance(content, dict) or not {"net", "network"} <= content.keys():
        raise InputError(f"{path}: not a checkpoint of this repository, expected the keys net and network")
    return content


def check_archive(path: str | Path) -> None:
    """InputError unless all bytes of a file of torch.save are as they were written, and unpacking it takes no more than its size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > Path(path).stat().st_size:
            raise InputError("compressed")
        if damaged := archive.testzip():
            raise InputError(f"damaged: the checksum of {damaged} is wrong")


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that can be read, last.pth or the one before it; None where there is none yet.

    One that cannot be read is reported; InputError where all cannot.
    """
    there = [path for path in (folder / "last.pth", folder / "previous.pth") if path.exists()]
    for path in there:
        try:
            return path, read_checkpoint(path)
        except InputError as error:
            if path == there[-1]:
                raise
            report(f"{error}; taking {there[-1]} instead")
    return None


def load_network(path: str | Path, device: torch.device | str = "cpu") -> BaryIR:
    """The network of a checkpoint, with its weights, in eval mode on a device."""
    content = read_checkpoint(path)
    network = parse(Network, content["network"], f"{path}: network.")
    check_weights(path, asdict(network), content["net"])
    net = BaryIR(**asdict(network))
    net.load_state_dict(content["net"])
    return net.eval().to(device, memory_format=torch.channels_last)


def check_weights(path: str | Path, network: dict, weights: dict[str, Tensor]) -> None:
    """InputError unless weights are those of a network, compared without allocating it."""
    def refuse(reason: str) -> None:
        raise InputError(f"{path}: weights and network do not fit ({reason})")

    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) and w.layout == torch.strided and w.device.type == "cpu" for w in weights.values()):
        refuse("net: expected a dict of tensors")
    blocks = sum(sum(value) if isinstance(value, list) else value for name, value in network.items() if name.endswith("_blocks"))
    if blocks > len(weights):                                   # before even the modules are made
        refuse(f"{blocks} transformer blocks and {len(weights)} tensors")
    try:
        with torch.device("meta"):
            expected = BaryIR(**network).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        refuse(" ".join(str(error).split())[:300])
    shapes = [{name: (list(w.shape), w.dtype.is_floating_point) for name, w in side.items()} for side in (weights, expected)]
    wrong = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    if wrong:
        refuse(f"{len(wrong)} of {len(expected)} tensors; " + first_few(
            f"{name}: {shapes[0][name][0] if name in shapes[0] else 'missing'}, expected {shapes[1][name][0] if name in shapes[1] else 'none'}" for name in wrong))
