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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.checkpoint import save_checkpoint
from utils.errors import InputError, first_few, one_line_errors
from utils.options import Network

# Prefixes of our parameter names -> those in the authors' state dict (their `barylatent` is the map T).
STAGES = {
    "patch_embed": "patch_embed.proj", "refinement": "refinement", "output": "output",
    "encoder.0": "encoder_level1", "encoder.1": "encoder_level2", "encoder.2": "encoder_level3",
    "down.0.0": "down1_2.body.0", "down.1.0": "down2_3.body.0", "down.2.0": "down3_4.body.0",
    "latent": "latent", "latent_norm": "LN.body", "transport_map": "barylatent",
    "fuse.0.0": "noise_level3", "fuse.1": "reduce_noise_level3", "residual_in": "resreduce_noise_level3",
    "up.2.0": "up4_3.body.0", "up.1.0": "up3_2.body.0", "up.0.0": "up2_1.body.0",
    "residual_up.2.0": "resup4_3.body.0", "residual_up.1.0": "resup3_2.body.0",
    "residual_up.0.0": "resup2_1.body.0", "reduce.2": "reduce_chan_level3", "reduce.1": "reduce_chan_level2",
    "residual_reduce.1": "resreduce_chan_level3", "residual_reduce.0": "resreduce_chan_level2",
    "decoder.2": "decoder_level3", "decoder.1": "decoder_level2", "decoder.0": "decoder_level1",
    "residual_decoder.1": "resdecoder_level3", "residual_decoder.0": "resdecoder_level2",
    "bridge.1.0.0": "noise_level2", "bridge.1.1": "reduce_noise_level2",
    "bridge.0.0.0": "noise_level1", "bridge.0.1": "reduce_noise_level1",
    "residual_bridge.1": "resreduce_noise_level2", "residual_bridge.0": "resreduce_noise_level1",
}
# The same inside a transformer block.
PARTS = {
    "norm1": "norm1.body", "attention.temperature": "attn.temperature", "attention.qkv": "attn.qkv",
    "attention.qkv_depthwise": "attn.qkv_dwconv", "attention.project_out": "attn.project_out",
    "norm2": "norm2.body", "feed_forward.project_in": "ffn.project_in",
    "feed_forward.depthwise": "ffn.dwconv", "feed_forward.project_out": "ffn.project_out",
}
# 1x1 convolutions of their state dict that their network never uses.
UNUSED = [f"{layer}{n}.weight" for layer in ("chnl_reduce", "reduce_noise_channel_") for n in (1, 2, 3)]

# Keys under which a file may hold the network; what all its names may begin with (DataParallel, a wrapper).
KEYS = ("BaryIR", "state_dict", "model_state_dict", "model", "params_ema", "params")
PREFIXES = ("module.", "BaryIR.", "module.")
LARGEST_PICKLE = 4 << 20    # bytes; theirs has half a megabyte, as the numbers lie outside
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


def state_dict(content: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, of a module or a plain state dict, alone or under KEYS."""
    for _ in range(3):                                              # a dict may hold itself
        if type(content) is dict and {"net", "network"} <= content.keys():
            raise InputError("a checkpoint of this repository already, expected one of the authors'")
        if type(content) is dict:
            content = next((content[key] for key in KEYS if key in content), content)
    if type(content) is Module:
        found = tensors_below(content)
    elif type(content) is dict:
        found = {str(name): value for name, value in content.items()}
    else:
        raise InputError(f"holds {type(content).__name__}, expected a module or a state dict")
    others = [name for name, value in found.items() if type(value) is not Tensor]
    if others or not found:
        raise InputError(f"holds {first_few(others) or 'nothing'}, expected tensors only, "
                         f"or a network under one of {', '.join(KEYS)}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


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


def official_name(name: str) -> str:
    """Our parameter name (encoder.0.1.attention.qkv.weight) -> theirs (encoder_level1.1.attn.qkv.weight)."""
    stage = next(stage for stage in STAGES if name.startswith(f"{stage}."))
    rest = name.removeprefix(stage)
    part = next((part for part in PARTS if f".{part}." in f"{rest}."), None)
    return STAGES[stage] + (rest.replace(part, PARTS[part]) if part else rest)


def renamed(theirs: dict[str, Tensor], ours: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors under our names, in float32; empties `theirs`.

    ours: our names and their shapes. Raises InputError, listing every entry that does not fit them.
    """
    names = {official_name(name): name for name in ours}            # theirs -> ours
    missing = [name for name in names if name not in theirs]
    unknown = [name for name in theirs if name not in names and name not in UNUSED]
    problems = [f"{len(wrong)} {what}: {', '.join(wrong)}"
                for what, wrong in (("missing", missing), ("unknown", unknown)) if wrong]
    net = {}
    for name in (name for name in names if name in theirs):
        value, shape = theirs.pop(name), ours[names[name]]          # so that two copies never exist of all
        if tuple(value.shape) != shape:
            problems.append(f"{name} is {list(value.shape)}, expected {list(shape)}")
        elif not value.is_floating_point():
            problems.append(f"{name} holds {str(value.dtype)[6:]}, expected floating-point numbers")
        elif not value.isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
        else:
            net[names[name]] = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if problems:
        raise InputError(f"not the authors' network at the paper's size: {'; '.join(problems)}")
    return net


def convert(source: Path) -> dict:
    """A checkpoint of this repository from one of the authors'; InputError where it is none of theirs."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    network = asdict(Network())
    with torch.device("meta"):
        ours = {name: tuple(parameter.shape) for name, parameter in BaryIR(**network).named_parameters()}
    try:
        content = read(source)
        epoch = content.get("epoch") if type(content) is dict else None
        content = state_dict(content)                               # the rest of the file is let go
        checkpoint = {"net": renamed(content, ours), "network": network}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return checkpoint | ({"epoch": epoch} if type(epoch) is int and 0 <= epoch < 2 ** 31 else {})


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
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
    epoch = f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""
    print(f"{flags.target}: {count:,} parameters{epoch}")
    print(f"left out, as the network never uses them: {', '.join(UNUSED)}")
    print(f"use it with --set checkpoint={flags.target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
