"""Checkpoints: plain dicts of tensors and numbers, read with weights_only=True, written whole or not at all.

    net       weights of BaryIR, for use (the averaged ones where the run averages)
    network   arguments of BaryIR
    step      training steps done (epoch instead, in one converted from the authors' release)
    train     last.pth and previous.pth only: what a run needs to continue exactly

    python -m utils.checkpoint IN.pth OUT.pth     makes one to give away: net in half precision, network, step

A checkpoint may come from anyone: nothing in it is run, nothing is allocated before its shapes are those of
the network that it names, and its checksums, which torch writes and does not read, tell a damaged file.
"""

import argparse
import dataclasses
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from models.baryir import BaryIR
from utils.errors import InputError, first_few, one_line, one_line_errors
from utils.files import write_atomically
from utils.options import Network, parse

FORMER = {"bridge_heads": 4, "residual_scale": 0.8, "latents": "both"}     # arguments that are constants now
# Options that a run must keep, as its networks and optimizers go on; and those that make it another run.
FIXED = ("network", "potentials", "optimizer", "ema", "scheme")
SAME_RUN = ("sources", "seed", "objective", "clean_share", "camera_share")


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    """Write a checkpoint, which takes its place once it reads back; one there before goes to `previous`."""
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:                     # not by name, which torch would store
            torch.save(content, file)

    try:
        write_atomically(path, write, read_checkpoint, previous)
    except RuntimeError as error:                               # what torch raises on a full disk
        raise InputError(f"{path}: cannot be written ({one_line(error)})") from None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's dict on the CPU; InputError where the file is absent, damaged or something else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # broken files raise nearly anything
        reason = str(error) if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"{path}: cannot be read as a checkpoint ({reason}), "
                         "expected a file of train.py") from None
    if not isinstance(content, dict) or not {"net", "network"} <= content.keys():
        raise InputError(f"{path}: not a checkpoint of this repository, expected the keys net and network")
    return content


def check_archive(path: str | Path) -> None:
    """InputError unless a torch.save file has its bytes as written and unpacks to no more than its size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
            raise InputError("compressed")
        if damaged := archive.testzip():
            raise InputError(f"damaged: the checksum of {damaged} is wrong")


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that can be read, last.pth or the one before; None where there is none.

    One that cannot be read is reported; InputError where all cannot.
    """
    there = [path for path in (folder / "last.pth", folder / "previous.pth") if path.exists()]
    for path in there[:-1]:
        try:
            return path, read_checkpoint(path)
        except InputError as error:
            report(f"{error}; taking {there[-1]} instead")
    return (there[-1], read_checkpoint(there[-1])) if there else None


def load_network(path: str | Path, device: torch.device | str = "cpu") -> BaryIR:
    """The network of a checkpoint, with its weights in float32, in eval mode on a device.

    InputError where its weights are not those of the network that it names; none of it is allocated before.
    """
    def refuse(reason: str) -> None:
        raise InputError(f"{path}: weights and network do not fit ({reason})")

    content = read_checkpoint(path)
    arguments = {name: value for name, value in content["network"].items() if FORMER.get(name) != value}
    network, weights = parse(Network, arguments, f"{path}: network."), content["net"]
    if not isinstance(weights, dict) or not all(map(is_plain, weights.values())):
        refuse("net: expected a dict of tensors")
    blocks = sum(sum(value) if isinstance(value, list) else value
                 for name, value in vars(network).items() if name.endswith("_blocks"))
    if blocks > len(weights):                                   # before even the modules are made
        refuse(f"{blocks} transformer blocks and {len(weights)} tensors")
    try:
        with torch.device("meta"):
            net = BaryIR(**vars(network))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        refuse(one_line(error))
    found, wanted = ({name: (list(w.shape), w.dtype.is_floating_point) for name, w in side.items()}
                     for side in (weights, net.state_dict()))
    names = found.keys() | wanted.keys()
    wrong = sorted((name for name in names if found.get(name) != wanted.get(name)), key=str)
    if wrong:
        refuse(f"{len(wrong)} of {len(wanted)} tensors; " + first_few(
            f"{name}: {found.get(name, ['missing'])[0]}, expected {wanted.get(name, ['none'])[0]}"
            for name in wrong))
    net.load_state_dict(weights, assign=True)
    return net.float().eval().to(device, memory_format=torch.channels_last)


def is_plain(value: object) -> bool:
    """Whether a value that was read is a tensor with its numbers: neither sparse nor on no device."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def load_pretrained(net: BaryIR, path: str, where: str) -> None:
    """Give a network a checkpoint's weights; InputError, which `where` opens, if that has another network."""
    try:
        net.load_state_dict(load_network(path).state_dict())
    except RuntimeError:
        raise InputError(f"{where}: {path} has another network than the option file") from None


def network_content(net: nn.Module, network: object) -> dict:
    """What a checkpoint holds for use: weights, and arguments of their network (utils.options.Network)."""
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    return {"net": weights, "network": dataclasses.asdict(network)}


def changes(path: Path, then: dict, file: str, now: dict, allowed: bool) -> list[str]:
    """The options of `file` that differ from those of the checkpoint at `path`, "changed name: then -> now".

    InputError where the run would not be the same: at one of FIXED or, unless `allowed`, of SAME_RUN (how
    often a source is listed may change).
    """
    if len(then["sources"]) != len(now["sources"]):
        raise InputError(f"{file}: sources: {len(now['sources'])}, but {path} was trained on "
                         f"{len(then['sources'])}; a run cannot continue with them")
    changed = []
    for name, before, after in differences(then, now):
        option, text = re.split(r"[.[]", name)[0], f"{name}: {before} -> {after}"
        if option in FIXED:
            raise InputError(f"{file}: {text}, since {path}; a run cannot continue with it")
        if option in SAME_RUN and not name.endswith(".repeat") and not allowed:
            raise InputError(f"{file}: {text}, since {path}; it would be another run; "
                             "--allow-changes continues nevertheless")
        changed.append(f"changed {text}")
    return changed


def differences(then: object, now: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Name, former and present value of what differs between two nested options.

    Keys that `then` lacks are new options, those that `now` lacks former ones: neither differs.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        for key in now:
            yield from differences(then.get(key, now[key]), now[key], f"{name}.{key}" if name else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from differences(a, b, f"{name}[{i}]")
    elif then != now:
        yield name, then, now


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a checkpoint to give away: weights in half precision, nothing of its run.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    flags = parser.parse_args()
    load_network(flags.checkpoint)                              # its checks
    content = read_checkpoint(flags.checkpoint)
    weights = {name: weight.half() for name, weight in content["net"].items()}
    step = content.get("step", 0)
    save_checkpoint(flags.out, {"net": weights, "network": content["network"], "step": step})
    print(f"{flags.out}: {flags.out.stat().st_size / 2**20:.1f} MiB, step {step}")


if __name__ == "__main__":
    with one_line_errors():
        main()
