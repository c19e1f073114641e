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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.checkpoint import save_checkpoint
from utils.errors import InputError, first_few, one_line_errors
from utils.official import UNUSED, official_name
from utils.options import Network

DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}
# Classes of modules: any name of the authors' module model_bary, class names of torch.nn.
MODULES = re.compile(r"(\w+\.)*model_bary \w+|torch\.nn\.(modules|parallel)(\.\w+)* _?[A-Z]\w*")
KEYS = ("BaryIR", "state_dict", "model_state_dict", "model", "params_ema", "params")    # under which a file may hold the network
MOST_MODULES = 10_000                                   # theirs has about a thousand; more are a loop or a bomb
LONGEST_NAME = 200                                      # characters, of a parameter
LARGEST_PICKLE = 8 << 20                                # bytes; theirs has half a megabyte: the numbers lie outside
BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."      # how torch.save's files began before


class Inert:
    """Stand-in for an object of the file: keeps what it was made of, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class Module(Inert):
    """Stand-in for a torch.nn module: `state` holds _parameters, _buffers and _modules."""

    state: Any = None


@dataclasses.dataclass(frozen=True)
class StorageReference:
    """Numbers that lie in the file's entry `key`."""

    key: str
    dtype: torch.dtype
    numel: int


class TensorReference(Inert):
    """Stand-in for torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size; InputError where the file has something else in that place."""
        match self.arguments:
            case (_, _, tuple(size), *_) if len(size) <= 8 and all(type(n) is int and 0 <= n < 2 ** 40 for n in size):
                return size
        raise InputError("a tensor without a size")


def parameter(tensor: Any, *_: Any) -> Any:
    """Stand-in for torch._utils._rebuild_parameter(tensor, requires_grad, hooks): the tensor."""
    return tensor


def ordered_dict(*items: Any) -> dict:
    """Stand-in for collections.OrderedDict, which files make empty and fill then."""
    if items:
        raise pickle.UnpicklingError("an OrderedDict made of something")
    return {}


def string_set(items: Any = ()) -> set[str]:
    """Stand-in for set: modules hold sets of names."""
    if type(items) is not list or not all(type(item) is str for item in items):
        raise pickle.UnpicklingError("a set of something else than names")
    return set(items)


ALLOWED = {
    ("collections", "OrderedDict"): ordered_dict, ("builtins", "set"): string_set, ("__builtin__", "set"): string_set,
    ("torch", "Size"): Inert, ("torch", "device"): Inert,
    ("torch.distributed.algorithms.join", "_JoinConfig"): Module,           # of DistributedDataParallel
    ("torch._utils", "_rebuild_tensor_v2"): TensorReference,
    ("torch._utils", "_rebuild_parameter"): parameter, ("torch._utils", "_rebuild_parameter_with_state"): parameter,
    **{("torch", name): dtype for name, dtype in DTYPES.items()}, **{("torch", str(dtype)[6:]): dtype for dtype in DTYPES.values()},
}
CALLABLE = [Module, *(function for function in ALLOWED.values() if not isinstance(function, torch.dtype))]
# What torch.save's pickles are made of (protocols 2 to 4). Nothing else is carried out: no extensions, no instances made
# otherwise than by REDUCE and NEWOBJ.
OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST,
    pickle.EMPTY_TUPLE, pickle.EMPTY_SET, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM,
    pickle.SETITEMS, pickle.ADDITEMS, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL,
    pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID,
)


class InertUnpickler(pickle._Unpickler):
    """Carries out OPCODES on plain containers and stand-ins only; a name that is not ALLOWED nor a module's is an InputError.

    The unpickler written in Python, since of the one in C only the look-up of names can be replaced. Keys and members of
    sets are text or numbers: hashing nested tuples could take for ever.
    """

    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}

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
        raise pickle.UnpicklingError("a reference to something else than a storage")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is allowed for allowed in CALLABLE) or type(arguments) is not tuple:
            raise pickle.UnpicklingError("a call of something that is no function")
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        self.stack.pop()
        if self.stack[-1] is not Module:
            raise pickle.UnpicklingError("an object of something that is no class of modules")
        self.stack[-1] = Module()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Module):
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not dict:                              # an OrderedDict's attribute _metadata is not needed
            raise pickle.UnpicklingError("a state for something that is no module")

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or not all(type(key) in (str, int, float, bool, type(None)) for key in items[::2]):
            raise pickle.UnpicklingError("a key that is neither text nor a number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError("members for something that is no set")
        self.stack[-1].update(string_set(items))

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem,
                 pickle.SETITEMS[0]: load_setitems, pickle.ADDITEMS[0]: load_additems}


class Archive:
    """A file of torch.save: its pickle, read inertly, and the tensors to which that refers, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.latest = path, ("", bytearray())            # the latest storage, which tensors may share
        try:
            self.zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except OSError:
            raise                                                           # says itself what it could not read
        except Exception:                                                   # a broken directory raises nearly anything
            with open(path, "rb") as file:
                old = file.read(len(BEFORE_1_6)) == BEFORE_1_6
            raise self.error("in torch.save's format of before torch 1.6, expected the zip format of later ones" if old else
                             "truncated, or not a zip file as torch.save writes it since torch 1.6") from None
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
            info = self.zip.getinfo(self.folder + name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise self.error(f"its entry {name} is compressed, expected none to be, as torch.save writes it")
            if name == "data.pkl" and info.file_size > LARGEST_PICKLE:
                raise self.error(f"its pickle has {info.file_size:,} bytes, expected at most {LARGEST_PICKLE:,}")
            return self.zip.read(self.folder + name)
        except InputError:
            raise
        except Exception as error:                                          # a broken entry raises nearly anything
            raise self.error(f"its entry {name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None

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
        """A tensor of the file, of any precision, as float32."""
        size = reference.shape
        match reference.arguments:
            case (StorageReference() as storage, int(offset), _, tuple(stride), *_) if (
                len(size) == len(stride) and all(type(n) is int and n >= 0 for n in (offset, *stride))
            ):
                if not storage.dtype.is_floating_point:
                    raise self.error(f"{name} holds {str(storage.dtype)[6:]}, expected floating-point numbers")
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
    for _ in range(3):
        if type(content) is dict and not {"net", "network"} <= content.keys():
            content = next((content[key] for key in KEYS if key in content), content)
    if isinstance(content, Module):
        found = tensors_below(content)
    elif type(content) is not dict:
        raise InputError(f"holds {type(content).__name__}, expected a module or a state dict")
    elif {"net", "network"} <= content.keys():
        raise InputError("a checkpoint of this repository already, expected one of the authors'")
    else:
        others = [str(name)[:LONGEST_NAME] for name, value in content.items() if not isinstance(value, TensorReference)]
        if others or not content:
            raise InputError(f"holds {first_few(others) or 'nothing'}, expected tensors only, or a network under {', '.join(KEYS)}")
        found = {str(name)[:LONGEST_NAME]: value for name, value in content.items()}
    for prefix in ("module.", "BaryIR.", "module."):                        # of DataParallel, or of a module that holds it
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def tensors_below(module: Module) -> dict[str, TensorReference]:
    """Parameters and persistent buffers of a module and of all below it, named as Module.state_dict names them."""
    found, waiting, seen = {}, [("", module)], 1
    while waiting:
        prefix, module = waiting.pop()
        state = module.state if type(module.state) is dict else {}
        parameters, buffers, modules = (state.get(group) for group in ("_parameters", "_buffers", "_modules"))
        temporary = state.get("_non_persistent_buffers_set", set())
        parts = (parameters, buffers, modules)
        if not all(type(part) is dict and all(type(name) is str for name in part) for part in parts) or type(temporary) is not set:
            raise InputError(f"{prefix.rstrip('.') or 'its network'} is not a module as torch.save writes it")
        seen += len(modules)
        if seen > MOST_MODULES or max((len(prefix + name) for part in parts for name in part), default=0) > LONGEST_NAME:
            raise InputError(f"its network is not a tree of at most {MOST_MODULES:,} modules with names of at most {LONGEST_NAME} characters")
        persistent = {name: value for name, value in buffers.items() if name not in temporary}
        found |= {f"{prefix}{name}": value for name, value in (parameters | persistent).items() if isinstance(value, TensorReference)}
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(modules.items()) if isinstance(child, Module)]
    return found


def convert(source: Path) -> dict:
    """A checkpoint of this repository from one of the authors'; InputError, listing every entry that does not fit."""
    archive = Archive(source)
    content = archive.content()
    try:
        theirs = state_dict(content)
        shapes = {name: tensor.shape for name, tensor in theirs.items()}
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
        if shapes[name] != ours[names[name]]:
            problems.append(f"{name} is {list(shapes[name])}, expected {list(ours[names[name]])}")
            continue
        net[names[name]] = tensor = archive.tensor(theirs[name], name)
        if not tensor.isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        raise archive.error(f"not the authors' network at the paper's size: {'; '.join(problems)}")
    checkpoint = {"net": {name: net[name] for name in ours}, "network": network}
    epoch = content.get("epoch") if type(content) is dict else None
    return checkpoint | ({"epoch": epoch} if type(epoch) is int and 0 <= epoch < 2 ** 31 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.pt", help="file of the authors' release")
    parser.add_argument("target", type=Path, metavar="OUT.pth", help="checkpoint to write")
    flags = parser.parse_args()
    if flags.target.resolve() == flags.source.resolve():
        raise InputError(f"{flags.target}: is the input, expected another file to write")
    if flags.target.is_dir():
        raise InputError(f"{flags.target}: is a folder, expected a file to write")
    checkpoint = convert(flags.source)
    save_checkpoint(flags.target, checkpoint)
    count = sum(tensor.numel() for tensor in checkpoint["net"].values())
    print(f"{flags.target}: {count:,} parameters" + (f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""))
    print(f"left out, as the network never uses them: {', '.join(UNUSED)}")
    print(f"use it with --set checkpoint={flags.target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
