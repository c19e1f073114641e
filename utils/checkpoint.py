"""Checkpoints: plain dicts of tensors and numbers, read with weights_only=True, written whole or not at all.

    net       weights of BaryIR, for use (the averaged ones where the run averages)
    network   arguments of BaryIR
    step      training steps done (epoch instead, in one converted from the authors' release)
    train     last.pth and previous.pth only: what a run needs to continue exactly
"""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.baryir import BaryIR
from utils.errors import InputError, first_few, naming
from utils.files import write_atomically
from utils.options import Network, parse

# What torch.compile, DataParallel, averages of weights and trainers put into the names of weights.
PREFIXES = re.compile(r"^((_orig_mod|module|ema_model|net|BaryIR)\.)+|_orig_mod\.")


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    """Write a checkpoint, which takes its place once it reads back; one there before goes to `previous`."""
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:                     # not by name, which torch would store
            torch.save(content, file)

    write_atomically(path, write, read_checkpoint, previous)


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's dict on the CPU; InputError where the file is absent, damaged or something else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # broken files raise nearly anything
        reason = error if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"{path}: cannot be read as a checkpoint ({reason}), "
                         "expected a file of train.py") from None
    parts = [content.get(name) for name in ("net", "network")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: not a checkpoint of this repository, expected the dicts net and network")
    return content


def check_sums(path: str | Path) -> None:
    """InputError where a file of torch.save has not the bytes that were written: torch reads no checksums."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise InputError(f"damaged: the checksum of {damaged} is wrong")


def newest_checkpoint(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that can be read, last.pth or the one before; None where there is none.

    One that cannot be read is logged; InputError where all cannot.
    """
    there = [path for path in (folder / "last.pth", folder / "previous.pth") if path.exists()]
    for path in there[:-1]:
        try:
            return path, read_checkpoint(path)
        except InputError as error:
            log(f"{error}; taking {there[-1]} instead")
    return (there[-1], read_checkpoint(there[-1])) if there else None


def load_network(path: str | Path, device: torch.device | str = "cpu",
                 kind: Callable[..., BaryIR] = BaryIR) -> BaryIR:
    """The network of a checkpoint, in float32 and eval mode on a device; kind: its class.

    InputError where the weights are not those of the network that the checkpoint names.
    """
    content = read_checkpoint(path)
    arguments = vars(parse(Network, content["network"], f"{path}: network."))
    with naming(f"{path}: network"), torch.device("meta"):      # without memory, until the weights are there
        net = kind(**arguments)
    load_weights(net, content["net"], str(path), assign=True)
    return net.float().eval().to(device, memory_format=torch.channels_last)


def load_weights(net: nn.Module, weights: dict[str, Tensor], where: str, assign: bool = False) -> None:
    """Load all of a network's weights and no other ones, whatever wrapped the network; or InputError."""
    with naming(where):
        weights = without_prefixes(weights)
        require_fit(weights, net.state_dict())
    net.load_state_dict(weights, assign=assign)


def without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the bare network; InputError where two of them would have one name."""
    plain = {PREFIXES.sub("", str(name)): weight for name, weight in weights.items()}
    if len(plain) < len(weights):
        raise InputError(f"holds {len(weights)} tensors under {len(plain)} names, expected one network's")
    return plain


def require_fit(weights: dict[str, Tensor], wanted: dict[str, Tensor], network: str = "the network") -> None:
    """InputError, which names a few, where tensors are missing, too many or not of the wanted shapes."""
    found, expected = ({name: list(getattr(tensor, "shape", ["no tensor"])) for name, tensor in side.items()}
                       for side in (weights, wanted))
    if wrong := [name for name in {**expected, **found} if found.get(name) != expected.get(name)]:
        few = first_few(f"{name}: {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
                        for name in wrong)
        raise InputError(f"{len(wrong)} of {len(wanted)} tensors do not fit {network} ({few})")
