"""Convert a checkpoint of the authors' release into one of this repository, without running anything from it.

    python -m utils.convert_official IN.pt OUT.pth

Their files are pickled modules, torch.save({"epoch": n, "BaryIR": <module>, "Pots": <module>}): loaded the
usual way, they import and call whatever they name. Here a name must be on a list, and stands for something
that does nothing. torch.load(pickle_module=...) with this list would still run code: it hands whatever looks
like TorchScript to torch.jit.load.
"""

import argparse
import functools
import io
import pickle
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.checkpoint import check_archive, save_checkpoint
from utils.errors import InputError, first_few, naming, one_line_errors
from utils.options import Network

# Beginnings of our parameter names -> of theirs; {0}: a level, counted from 0, {1}: from 1, {2}: the next.
STAGES = {
    "patch_embed": "patch_embed.proj", "refinement": "refinement", "output": "output", "latent": "latent",
    "latent_norm": "LN.body", "transport_map": "barylatent", "residual_in": "resreduce_noise_level3",
    "fuse.0.0": "noise_level3", "fuse.1": "reduce_noise_level3",
}
LEVELS = {
    "encoder.{0}": "encoder_level{1}", "down.{0}.0": "down{1}_{2}.body.0",
    "decoder.{0}": "decoder_level{1}", "residual_decoder.{0}": "resdecoder_level{2}",
    "up.{0}.0": "up{2}_{1}.body.0", "residual_up.{0}.0": "resup{2}_{1}.body.0",
    "reduce.{0}": "reduce_chan_level{1}", "residual_reduce.{0}": "resreduce_chan_level{2}",
    "bridge.{0}.0.0": "noise_level{1}", "bridge.{0}.1": "reduce_noise_level{1}",
    "residual_bridge.{0}": "resreduce_noise_level{1}",
}
for i in range(3):
    STAGES |= {ours.format(i): theirs.format(i, i + 1, i + 2) for ours, theirs in LEVELS.items()}
# The same inside a transformer block.
PARTS = {"norm1": "norm1.body", "norm2": "norm2.body", "attention": "attn", "feed_forward": "ffn",
         "depthwise": "dwconv"}
# 1x1 convolutions of their state dict that their network never uses.
UNUSED = [f"{layer}{n}.weight" for layer in ("chnl_reduce", "reduce_noise_channel_") for n in (1, 2, 3)]

KEYS = ("BaryIR", "state_dict", "params")       # under which a file may hold the network
LARGEST_PICKLE = 4 << 20    # bytes; theirs has half a megabyte, as the numbers lie outside
LARGEST_TREE = 1_000_000    # letters in all names of a network; theirs has 70,000; more is a loop or a bomb


class Module:
    """Stand-in for a module of any class: `state` is what the file gives as its attributes."""

    state: Any = None


class Stored:
    """A tensor with which the file can do nothing: its rows may be 2^60, to unpack, to fill, to compare."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Items(dict):
    """A dict whose keys are text or small numbers: nested tuples may take for ever to hash."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str and not (type(key) is int and 0 <= key < 2 ** 31):
            raise pickle.UnpicklingError("a key that is neither text nor a number")
        super().__setitem__(key, value)


def rebuild(storage: Stored, offset: int, size: tuple, stride: tuple, *_: Any) -> Stored:
    """Stand-in for torch._utils._rebuild_tensor_v2; as_strided raises where the storage is too small."""
    return Stored(torch.as_strided(storage.tensor, size, stride, offset))


def first(value: Any, *_: Any) -> Any:
    """Stand-in for what is made of one thing: that thing. Sets stay lists, whose members nobody hashes."""
    return value


# The names that a file may hold, and what stands for them. Those of MODULES are Modules.
ALLOWED = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.LongStorage": torch.int64,
    "torch.DoubleStorage": torch.float64, "torch.BFloat16Storage": torch.bfloat16,
    "torch._utils._rebuild_tensor_v2": rebuild, "torch._utils._rebuild_parameter": first,
    "collections.OrderedDict": lambda: Items(), "builtins.set": first, "__builtin__.set": first,
    "torch.Size": first, "torch.device": first, "torch.float32": torch.float32,
    "torch.distributed.algorithms.join._JoinConfig": first,         # of DistributedDataParallel
}
MODULES = re.compile(r"(\w+\.)*model_bary\.\w+|torch\.nn\.(modules|parallel)(\.\w+)*\._?[A-Z]\w*")
# What the pickles of torch.save are made of. Nothing else is carried out.
OPCODES = """
    PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM
    SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class Unpickler(pickle._Unpickler):
    """Makes plain values, lists, Items, Stored and Modules; InputError where the file names anything else.

    This is the unpickler written in Python: in that in C, opcodes and keys cannot be refused.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.numbers = functools.cache(lambda key: bytearray(archive.read(f"{folder}/data/{key}")))

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        if name not in ALLOWED and not MODULES.fullmatch(name):
            raise InputError(f"names {name}, expected tensors, containers and modules only; nothing was run")
        return ALLOWED.get(name, Module)

    def persistent_load(self, reference: Any) -> Stored:
        match reference:
            case (str(), torch.dtype() as dtype, str(key), str(), int(count)):
                data = self.numbers(key)
                if len(data) != count * dtype.itemsize:
                    raise pickle.UnpicklingError("a storage does not fit the numbers that the file holds")
                return Stored(torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype))
        raise pickle.UnpicklingError("a reference to something else than a storage")

    def load_empty_dict(self) -> None:
        self.append(Items())

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Module:
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not Items:                     # whose state nobody needs
            raise pickle.UnpicklingError("a state for something that is no module")

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in OPCODES.split()}
    dispatch |= {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build,
                 pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce}           # stand-ins may be functions


def read(path: Path) -> Any:
    """What a file of torch.save holds, modules as Module; InputError where it is broken or something else."""
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            folder = names[0].split("/")[0]
            if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
                raise InputError("written on a big-endian machine, expected a little-endian one")
            size = archive.getinfo(f"{folder}/data.pkl").file_size
            if size > LARGEST_PICKLE:
                raise InputError(f"its pickle has {size:,} bytes, expected at most {LARGEST_PICKLE:,}")
            return Unpickler(archive, folder).load()
    except InputError:
        raise
    except Exception as error:                                      # broken files raise nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"its pickle cannot be read ({reason}): damaged, truncated, or not a zip file "
                         "as torch.save writes it since 1.6") from None


def state_dict(content: Any) -> dict[str, Tensor]:
    """Parameters by name, of a module (of DataParallel, too) or a state dict, alone or under one of KEYS."""
    if isinstance(content, dict):
        content = next((content[key] for key in KEYS if key in content), content)
    found = content if isinstance(content, dict) else parameters_below(content)
    others = [str(name) for name, value in found.items() if type(value) is not Stored]
    if others or not found:
        raise InputError(f"holds {first_few(others) or 'nothing'}, expected tensors only, "
                         f"or a network under one of {', '.join(KEYS)}")
    return {str(name).removeprefix("module."): stored.tensor for name, stored in found.items()}


def parameters_below(network: Any) -> dict[str, Stored]:
    """Parameters of a module and of all below it, named as by Module.state_dict; theirs have no buffers."""
    found, letters, waiting = {}, 0, [("", network)]
    for prefix, module in waiting:                                  # which grows meanwhile
        match getattr(module, "state", None):
            case {"_parameters": dict() as parameters, "_modules": dict() as modules}:
                members = parameters | modules
            case _:
                raise InputError(f"holds {type(module).__name__}, expected a module or a state dict")
        letters += sum(len(prefix) + len(str(name)) for name in members)
        if letters > LARGEST_TREE:
            raise InputError("its network is not a tree of modules, or far larger than the authors'")
        found |= {f"{prefix}{name}": value for name, value in members.items() if type(value) is Stored}
        waiting += [(f"{prefix}{name}.", value) for name, value in members.items() if type(value) is Module]
    return found


def official_name(name: str) -> str:
    """Our parameter name (encoder.0.1.attention.qkv.weight) -> theirs (encoder_level1.1.attn.qkv.weight)."""
    stage = next(stage for stage in STAGES if name.startswith(f"{stage}."))
    rest = name.removeprefix(stage)
    for ours, theirs in PARTS.items():
        rest = rest.replace(ours, theirs)
    return STAGES[stage] + rest


def renamed(theirs: dict[str, Tensor], ours: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors under our names, in float32. ours: our names and their shapes.

    Raises InputError, listing every entry that does not fit them.
    """
    names = {name: official_name(name) for name in ours}
    missing = [name for name in names.values() if name not in theirs]
    unknown = theirs.keys() - [*names.values(), *UNUSED]
    problems = [f"{len(wrong)} {what}: {', '.join(sorted(wrong))}"
                for what, wrong in (("missing", missing), ("unknown", unknown)) if wrong]
    for name, shape in ours.items():
        value = theirs.get(names[name], torch.zeros(1).expand(shape))
        if value.shape != shape or not value.is_floating_point() or not value.isfinite().all():
            problems.append(f"{names[name]} is {list(value.shape)} of {str(value.dtype)[6:]}, "
                            f"expected {list(shape)} of finite floating-point numbers")
    if problems:
        raise InputError(f"not the authors' network at the paper's size: {'; '.join(problems)}")
    return {name: theirs[names[name]].float().contiguous() for name in ours}


def convert(source: Path) -> dict:
    """A checkpoint of this repository from one of the authors'; InputError where it is none of theirs."""
    network = asdict(Network())
    with torch.device("meta"):
        ours = {name: tuple(parameter.shape) for name, parameter in BaryIR(**network).named_parameters()}
    with naming(str(source)):
        if not source.is_file():
            raise InputError("no such file")
        content = read(source)
        checkpoint = {"net": renamed(state_dict(content), ours), "network": network}
    epoch = content.get("epoch") if isinstance(content, dict) else None
    return checkpoint | ({"epoch": epoch} if type(epoch) is int else {})


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="IN.pt", help="file of the authors' release")
    parser.add_argument("target", type=Path, metavar="OUT.pth", help="checkpoint to write")
    flags = parser.parse_args()
    if flags.target.is_dir() or flags.target.resolve() == flags.source.resolve():
        raise InputError(f"{flags.target}: is a folder, or is the input, expected another file to write")
    checkpoint = convert(flags.source)
    save_checkpoint(flags.target, checkpoint)
    count = sum(tensor.numel() for tensor in checkpoint["net"].values())
    print(f"{flags.target}: {count:,} parameters, epoch {checkpoint.get('epoch', 'unknown')}")
    print(f"left out, as the network never uses them: {', '.join(UNUSED)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
