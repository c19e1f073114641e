"""Checkpoints: plain dicts of tensors and numbers, read with weights_only=True, written whole or not at all.

    net       weights of BaryIR, for use (the averaged ones where the run averages)
    network   arguments of BaryIR
    step      training steps done (epoch instead, in one converted from the authors' release)
    train     last.pth only: what a run needs to continue exactly
"""

from pathlib import Path

import torch

from models.baryir import BaryIR
from utils.errors import InputError
from utils.images import write_atomically


def save_checkpoint(path: Path, content: dict) -> None:
    try:
        write_atomically(path, lambda temporary: torch.save(content, temporary))
    except RuntimeError as error:                               # what torch raises on a full disk
        raise InputError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]})") from None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's dict on the CPU; InputError where the file is absent, broken or something else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # broken files raise nearly anything
        raise InputError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}), expected a file of train.py") from None
    if not isinstance(content, dict) or not {"net", "network"} <= content.keys():
        raise InputError(f"{path}: not a checkpoint of this repository, expected the keys net and network")
    return content


def load_network(path: str | Path, device: torch.device | str = "cpu") -> BaryIR:
    """The network of a checkpoint, with its weights, in eval mode on a device."""
    content = read_checkpoint(path)
    try:
        net = BaryIR(**content["network"])
        net.load_state_dict(content["net"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: weights and network do not fit ({' '.join(str(error).split())[:300]})") from None
    return net.eval().to(device, memory_format=torch.channels_last)
