"""Convert a checkpoint of the authors' release into one of this repository, without running anything from it.

    python -m utils.convert_official IN.pt OUT.pth

Their files are pickled modules, torch.save({"epoch": n, "BaryIR": <module>, "Pots": <module>}): loading one the usual way
imports and calls whatever the file names. Here the pickle is read with stand-ins that do nothing: modules become their
attributes, tensors become references into the file. Whatever else a file names is refused. Files of plain state dicts,
`module.` prefixes, half precision and tensors of CUDA devices are read, too.
"""

import argparse
import dataclasses
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.checkpoint import save_checkpoint
from utils.errors import InputError, one_line_errors
from utils.official import UNUSED, official_name
from utils.options import Network

DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}
# Classes of modules: any name of the authors' module model_bary, class names of torch.nn.
MODULES = re.compile(r"(\w+\.)*model_bary \w+|torch\.nn\.(modules|parallel)(\.\w+)* _?[A-Z]\w*")
KEYS = ("BaryIR", "state_dict", "model", "params")      # under which a file may hold the network
MOST_MODULES = 10_000                                   # the authors' network has 1,016; more are a loop or a bomb


class Inert:
    """Stand-in for an object of the file: keeps what it was made of and set to, does nothing."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments, self.state = arguments, {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Module(Inert):
    """Stand-in for a torch.nn module: `state` holds _parameters, _buffers and _modules."""

    state: Any = {}                     # pickled objects are made without __init__


@dataclasses.dataclass(frozen=True)
class StorageReference:
    """Numbers that lie in the file's entry `key`."""

    key: str
    dtype: torch.dtype
    numel: int


class TensorReference(Inert):
    """Stand-in for torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)."""

    @property
    def shape(self) -> tuple:
        return self.arguments[2] if len(self.arguments) > 2 and isinstance(self.arguments[2], tuple) else ()


def parameter(tensor: Any, *_: Any) -> Any:
    """Stand-in for torch._utils._rebuild_parameter(tensor, requires_grad, hooks): the tensor."""
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict, ("builtins", "set"): set, ("__builtin__", "set"): set, ("torch", "Size"): Inert, ("torch", "device"): Inert,
    ("torch._utils", "_rebuild_tensor_v2"): TensorReference,
    ("torch._utils", "_rebuild_parameter"): parameter, ("torch._utils", "_rebuild_parameter_with_state"): parameter,
    **{("torch", name): dtype for name, dtype in DTYPES.items()}, **{("torch", str(dtype)[6:]): dtype for dtype in DTYPES.values()},
}


class InertUnpickler(pickle.Unpickler):
    """Resolves the names of ALLOWED and classes of modules, all to stand-ins; InputError, by name, for any other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if MODULES.fullmatch(f"{module} {name}"):
            return Module
        raise InputError(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> StorageReference:
        match reference:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                return StorageReference(key, dtype, numel)
        raise pickle.UnpicklingError(f"unknown storage {reference!r}")


class Archive:
    """A file of torch.save: its pickle, read inertly, and the tensors to which that refers, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.latest = path, ("", bytearray())            # the latest storage, which tensors may share
        try:
            self.zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (zipfile.BadZipFile, NotImplementedError):
            raise self.error("truncated, or not a zip file as torch.save writes it since torch 1.6") from None
        pickles = [name for name in self.zip.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise self.error(f"{len(pickles)} entries data.pkl, expected one, as torch.save writes it")
        self.folder = pickles[0].removesuffix("data.pkl")
        if self.folder + "byteorder" in self.zip.namelist() and self.entry("byteorder") != b"little":
            raise self.error("written on a big-endian machine")

    def error(self, message: str) -> InputError:
        return InputError(f"{self.path}: {message}")

    def entry(self, name: str) -> bytes:
        """An entry's bytes, their checksum verified."""
        try:
            if self.zip.getinfo(self.folder + name).compress_type != zipfile.ZIP_STORED:
                raise self.error(f"its entry {name} is compressed, expected none to be, as torch.save writes it")
            return self.zip.read(self.folder + name)
        except (KeyError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise self.error(f"its entry {name} cannot be read ({' '.join(str(error).split())})") from None

    def content(self) -> Any:
        """The pickled object; InputError where it names anything but tensors, plain containers and module classes."""
        data = self.entry("data.pkl")
        try:
            return InertUnpickler(io.BytesIO(data)).load()
        except InputError as refused:
            raise self.error(f"names {refused}, expected only tensors, plain containers and classes of torch.nn and model_bary; "
                             "nothing was run, nothing is converted") from None
        except Exception as error:                                          # a broken pickle raises nearly anything
            raise self.error(f"its pickle cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None

    def tensor(self, reference: TensorReference, name: str) -> Tensor:
        """A tensor of the file as float32."""
        match reference.arguments:
            case (StorageReference() as storage, int(offset), tuple(size), tuple(stride), *_) if (
                len(size) == len(stride) and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
            ):
                last = offset + sum((n - 1) * step for n, step in zip(size, stride))
                if self.latest[0] != storage.key:
                    self.latest = (storage.key, bytearray(self.entry(f"data/{storage.key}")))
                data = self.latest[1]
                if last < storage.numel and len(data) == storage.numel * storage.dtype.itemsize:
                    numbers = torch.frombuffer(data, dtype=storage.dtype).as_strided(size, stride, offset)
                    return numbers.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        raise self.error(f"{name}: its size does not fit the numbers that the file holds for it")


def state_dict(content: Any) -> dict[str, TensorReference]:
    """Parameters and persistent buffers by name, of a module or of a plain state dict, alone or under one of KEYS."""
    if isinstance(content, dict):
        if {"net", "network"} <= content.keys():
            raise InputError("a checkpoint of this repository already, expected one of the authors'")
        for key in KEYS:
            if key in content:
                return state_dict(content[key])
        if content and all(isinstance(value, TensorReference) for value in content.values()):
            found = {str(name): value for name, value in content.items()}
        else:
            raise InputError(f"holds {', '.join(map(str, content)) or 'nothing'}, expected a network under {', '.join(KEYS)} or a state dict")
    elif isinstance(content, Module):
        found = tensors_below(content)
    else:
        raise InputError(f"holds {type(content).__name__}, expected a module or a state dict")
    while found and all(name.startswith("module.") for name in found):      # of DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found


def tensors_below(module: Module) -> dict[str, TensorReference]:
    """Parameters and persistent buffers of a module and of all below it, named as Module.state_dict names them."""
    found, waiting, seen = {}, [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        groups = [module.state.get(group, {}) for group in ("_parameters", "_buffers", "_modules")] if isinstance(module.state, dict) else []
        if not groups or not all(isinstance(group, dict) for group in groups) or seen > MOST_MODULES:
            raise InputError(f"{prefix.rstrip('.') or 'the network'} is not a tree of modules")
        temporary = module.state.get("_non_persistent_buffers_set", ())
        parameters, buffers, modules = groups
        for name, value in (*parameters.items(), *((name, buffer) for name, buffer in buffers.items() if name not in temporary)):
            if isinstance(value, TensorReference):
                found[f"{prefix}{name}"] = value
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(modules.items()) if isinstance(child, Module)]
    return found


def convert(source: Path) -> dict:
    """A checkpoint of this repository from one of the authors'; InputError, listing every entry that does not fit."""
    archive = Archive(source)
    content = archive.content()
    try:
        theirs = state_dict(content)
    except InputError as error:
        raise archive.error(str(error)) from None
    network = dataclasses.asdict(Network())
    with torch.device("meta"):
        ours = {name: tuple(parameter.shape) for name, parameter in BaryIR(**network).named_parameters()}
    names = {official_name(name): name for name in ours}                    # theirs -> ours

    net, problems = {}, []
    if missing := [name for name in names if name not in theirs]:
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if extra := [name for name in theirs if name not in names and name not in UNUSED]:
        problems.append(f"{len(extra)} unknown: {', '.join(extra)}")
    for name in (name for name in names if name in theirs):
        if theirs[name].shape != ours[names[name]]:
            problems.append(f"{name} is {list(theirs[name].shape)}, expected {list(ours[names[name]])}")
            continue
        net[names[name]] = tensor = archive.tensor(theirs[name], name)
        if not tensor.isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        raise archive.error(f"not the authors' network at the paper's size: {'; '.join(problems)}")
    epoch = content.get("epoch") if isinstance(content, dict) else None
    return {"net": {name: net[name] for name in ours}, "network": network, **({"epoch": epoch} if type(epoch) is int else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.pt", help="file of the authors' release")
    parser.add_argument("target", type=Path, metavar="OUT.pth", help="checkpoint to write")
    flags = parser.parse_args()
    if flags.target.resolve() == flags.source.resolve():
        raise InputError(f"{flags.target}: is the input, expected another file to write")
    checkpoint = convert(flags.source)
    save_checkpoint(flags.target, checkpoint)
    count = sum(tensor.numel() for tensor in checkpoint["net"].values())
    print(f"{flags.target}: {count:,} parameters" + (f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""))
    print(f"left out, as the network never uses them: {', '.join(UNUSED)}")
    print(f"use it with --set checkpoint={flags.target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
