"""Reads files of torch.save that hold pickled modules, without running anything from them.

Loaded the usual way, such files import and call whatever they name. Here a name must be on a list, and stands
for something that does nothing. torch.load(pickle_module=...) with this list would still run code: it hands
whatever looks like TorchScript to torch.jit.load.
"""

import functools
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError

LARGEST_PICKLE = 4 << 20    # bytes; the authors' has half a megabyte, as the numbers lie outside
LARGEST_TREE = 1_000_000    # letters in all names of a network; theirs has 70,000; more is a loop or a bomb


class Module:
    """Stand-in for a module of any class: `state` is what the file gives as its attributes."""

    state: Any = None


def tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    """Stand-in for torch._utils._rebuild_tensor_v2; as_strided raises where the storage is too small."""
    return torch.as_strided(storage, size, stride, offset)


def first(value: Any, second: Any = None, third: Any = None, fourth: Any = None) -> Any:
    """Stand-in for what is made of one thing: that thing. Sets stay lists, whose members nobody hashes."""
    return value


DTYPES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}
# The names that a file may hold, and what stands for them. Those of MODULES are Modules.
ALLOWED = {
    "collections.OrderedDict": lambda: {}, "builtins.set": first, "__builtin__.set": first,
    "torch.Size": first, "torch.device": first, "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": first, "torch._utils._rebuild_parameter_with_state": first,
    "torch.distributed.algorithms.join._JoinConfig": first,         # of DistributedDataParallel
    **{f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()},
    **{str(dtype): dtype for dtype in DTYPES.values()},
}
MODULES = re.compile(r"(\w+\.)*model_bary\.\w+|torch\.nn\.(modules|parallel)(\.\w+)*\._?[A-Z]\w*")
# What the pickles of torch.save are made of. Nothing else is carried out.
OPCODES = """
    PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM
    SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class Unpickler(pickle._Unpickler):
    """Makes plain values, lists, dicts, tensors and Modules; InputError where the file names anything else.

    This is the unpickler written in Python: in that in C, opcodes and keys cannot be refused.
    """

    numbers: Callable[[str], bytearray]                             # the bytes of a storage, by its key

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        if name not in ALLOWED and not MODULES.fullmatch(name):
            raise InputError(f"names {name}, expected tensors, containers and modules only; nothing was run")
        return ALLOWED.get(name, Module)

    def persistent_load(self, reference: Any) -> Tensor:
        match reference:
            case (str(), torch.dtype() as dtype, str(key), str(), int(count)):
                data = self.numbers(key)
                if len(data) != count * dtype.itemsize:
                    raise pickle.UnpicklingError("a storage does not fit the numbers that the file holds")
                return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        raise pickle.UnpicklingError("a reference to something else than a storage")

    def load_reduce(self) -> None:
        if type(self.stack[-1]) is not tuple:                       # a tensor may have 2^60 rows to unpack
            raise pickle.UnpicklingError("a call with something else than a tuple")
        super().load_reduce()

    def load_setitems(self) -> None:
        items = self.pop_mark()
        cheap = all(type(key) is str or (type(key) is int and 0 <= key < 2 ** 31) for key in items[::2])
        if not cheap or type(self.stack[-1]) is not dict:           # nested tuples take for ever to hash
            raise pickle.UnpicklingError("a key that is neither text nor a number")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.load_mark()                                            # one item is a list of items, too
        self.stack += [key, value]
        self.load_setitems()

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Module:
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not dict:                      # OrderedDicts have a state nobody needs
            raise pickle.UnpicklingError("a state for something that is no module")

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in OPCODES.split()}
    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build,
                 pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def read(path: Path) -> Any:
    """What a file of torch.save holds, modules as Module; InputError where it is broken or something else."""
    try:
        with zipfile.ZipFile(path) as archive:                      # it verifies checksums as it reads
            names, entries = archive.namelist(), archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise InputError("is compressed, expected entries as torch.save stores them")
            folder = names[0].split("/")[0]
            if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
                raise InputError("written on a big-endian machine, expected a little-endian one")
            size = archive.getinfo(f"{folder}/data.pkl").file_size
            if size > LARGEST_PICKLE:
                raise InputError(f"its pickle has {size:,} bytes, expected at most {LARGEST_PICKLE:,}")
            unpickler = Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")))
            unpickler.numbers = functools.cache(lambda key: bytearray(archive.read(f"{folder}/data/{key}")))
            return unpickler.load()
    except InputError:
        raise
    except Exception as error:                                      # broken files raise nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"its pickle cannot be read ({reason}): damaged, truncated, or not a zip file "
                         "as torch.save writes it since 1.6") from None


def tensors_below(network: Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module and of all below it, named as by Module.state_dict."""
    found, letters, waiting = {}, 0, [("", network)]
    for prefix, module in waiting:                                  # which grows meanwhile
        state = module.state if type(module.state) is dict else {}
        groups = [state.get(group) for group in ("_parameters", "_buffers", "_modules")]
        temporary = state.get("_non_persistent_buffers_set", [])
        if [type(group) for group in (*groups, temporary)] != [dict, dict, dict, list]:
            raise InputError(f"{prefix.rstrip('.') or 'its network'} is not a module as torch.save writes it")
        letters += len(temporary) + sum(len(f"{prefix}{name}.") for group in groups for name in group)
        if letters > LARGEST_TREE:
            raise InputError("its network is not a tree of modules, or far larger than the authors'")
        parameters, buffers, modules = groups
        temporary = {name for name in temporary if type(name) is str}
        tensors = parameters | {name: value for name, value in buffers.items() if name not in temporary}
        found |= {f"{prefix}{name}": value for name, value in tensors.items() if type(value) is Tensor}
        waiting += [(f"{prefix}{name}.", child) for name, child in modules.items() if type(child) is Module]
    return found
