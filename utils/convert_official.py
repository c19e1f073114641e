"""Convert a checkpoint of the authors' release, of public PromptIR or Restormer into one of this repository.

    python -m utils.convert_official IN.pt OUT.pth

The authors' files are pickled modules, torch.save({"epoch": n, "BaryIR": <module>, "Pots": <module>}); the
others' are state dicts. Loaded the usual way, a pickle imports and calls whatever it names. Here its names
stay text, its calls stay records, and nothing is run. (torch.load(pickle_module=...) would still run code:
it hands what looks like TorchScript to torch.jit.load.)
"""

import argparse
import functools
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.checkpoint import check_archive, save_checkpoint
from utils.errors import InputError, first_few, naming, one_line_errors
from utils.options import Network

# Prefixes of our parameter names -> those in the public state dicts (their `barylatent` is the map T).
STAGES = {
    "patch_embed": "patch_embed.proj", "latent": "latent", "refinement": "refinement", "output": "output",
    "latent_norm": "LN.body", "transport_map": "barylatent", "residual_in": "resreduce_noise_level3",
    "fuse.0.0": "noise_level3", "fuse.1": "reduce_noise_level3", "fuse.prompt": "prompt3",
}
for n in (1, 2, 3):
    STAGES |= {f"encoder.{n - 1}": f"encoder_level{n}", f"decoder.{n - 1}": f"decoder_level{n}",
               f"down.{n - 1}.0": f"down{n}_{n + 1}.body.0", f"up.{n - 1}.0": f"up{n + 1}_{n}.body.0",
               f"residual_up.{n - 1}.0": f"resup{n + 1}_{n}.body.0"}
for n in (1, 2):                                                    # between the levels n + 1 and n
    STAGES |= {f"bridge.{n - 1}.0.0": f"noise_level{n}", f"bridge.{n - 1}.1": f"reduce_noise_level{n}",
               f"bridge.{n - 1}.prompt": f"prompt{n}", f"reduce.{n}": f"reduce_chan_level{n + 1}",
               f"residual_reduce.{n - 1}": f"resreduce_chan_level{n + 1}",
               f"residual_decoder.{n - 1}": f"resdecoder_level{n + 1}",
               f"residual_bridge.{n - 1}": f"resreduce_noise_level{n}"}
# The same inside a transformer block or a prompt.
PARTS = {
    "norm1": "norm1.body", "attention.temperature": "attn.temperature", "attention.qkv": "attn.qkv",
    "attention.qkv_depthwise": "attn.qkv_dwconv", "attention.project_out": "attn.project_out",
    "norm2": "norm2.body", "feed_forward.project_in": "ffn.project_in",
    "feed_forward.depthwise": "ffn.dwconv", "feed_forward.project_out": "ffn.project_out",
    "prompts": "prompt_param", "linear": "linear_layer", "conv": "conv3x3",
}
# 1x1 convolutions of their state dicts that their networks never use.
UNUSED = [f"{layer}{n}.weight" for layer in ("chnl_reduce", "reduce_noise_channel_") for n in (1, 2, 3)]
# How a name tells the network, which else is Restormer; arguments of ours.
NETWORKS = {"barylatent.": ("the authors' BaryIR", {}),
            "prompt": ("public PromptIR", {"backbone": "promptir", "barycenter": False}),
            "": ("public Restormer", {"barycenter": False})}

# Keys under which a file may hold the network; what all its names may begin with (DataParallel, wrappers).
KEYS = ("BaryIR", "state_dict", "model_state_dict", "model", "params_ema", "params")
PREFIXES = ("module.", "BaryIR.", "net.", "module.")

LARGEST_TREE = 1_000_000    # letters in all names of a network; theirs has 70,000; more is a loop or a bomb
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Byte": torch.uint8, "Bool": torch.bool}.items()}
# The names that a file may hold: containers, tensors, modules, what DistributedDataParallel has.
ALLOWED = re.compile(r"collections\.OrderedDict|(builtins|__builtin__)\.set|(\w+\.)*model_bary\.\w+|"
                     r"torch\.(Size|device|[A-Z]\w+Storage|b?float\d+|u?int\d+|bool)|"
                     r"torch\._utils\._rebuild_(tensor_v2|parameter|parameter_with_state)|"
                     r"torch\.nn\.(modules|parallel)(\.\w+)*\._?[A-Z]\w*|"
                     r"torch\.distributed\.algorithms\.join\._JoinConfig")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
# What the pickles of torch.save are made of. Nothing else is carried out.
OPCODES = """
    PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM
    SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


@dataclass(eq=False)
class Call:
    """What a file makes by a call, which is not made: a module, a tensor, a set. state: its attributes."""

    function: Any
    arguments: Any
    state: Any = None


class Unpickler(pickle._Unpickler):
    """Makes plain values, lists, dicts and Calls; names and references to storages stay text and tuples.

    This is the unpickler written in Python: in that in C, opcodes and keys cannot be refused.
    """

    def find_class(self, module: str, name: str) -> str:
        if not ALLOWED.fullmatch(f"{module}.{name}"):
            raise InputError(f"names {module}.{name}, expected tensors, containers and modules only; "
                             "nothing was run")
        return f"{module}.{name}"

    def persistent_load(self, reference: Any) -> Any:
        return reference

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append({} if function == "collections.OrderedDict" else Call(function, arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Call:                            # OrderedDicts have a state nobody needs
            self.stack[-1].state = state

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

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in OPCODES.split()}
    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build,
                 pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def read(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of the network in a file of torch.save, and its epoch; InputError where it holds none."""
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            folder = archive.namelist()[0].split("/")[0]
            byteorder = f"{folder}/byteorder"
            if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
                raise InputError("written on a big-endian machine, expected a little-endian one")
            content = Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl"))).load()
            numbers = functools.cache(lambda key: bytearray(archive.read(f"{folder}/data/{key}")))
            tensors = {name: as_tensor(value, numbers) for name, value in entries(content).items()}
    except InputError:
        raise
    except Exception as error:                                      # broken files raise nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"its pickle cannot be read ({reason}): damaged, truncated, or not a zip file "
                         "as torch.save writes it since 1.6") from None
    others = [name for name, tensor in tensors.items() if tensor is None]
    if others or not tensors:
        raise InputError(f"holds {first_few(others) or 'nothing'}, expected tensors only, "
                         f"or a network under one of {', '.join(KEYS)}")
    epoch = content.get("epoch") if type(content) is dict else None
    return tensors, epoch if type(epoch) is int and 0 <= epoch < 2 ** 31 else None


def entries(content: Any) -> dict[str, Any]:
    """Parameters and persistent buffers by name, of a module or a plain state dict, alone or under KEYS."""
    for _ in range(3):                                              # a dict may hold itself
        if type(content) is dict and {"net", "network"} <= content.keys():
            raise InputError("a checkpoint of this repository already, expected a public one")
        if type(content) is dict:
            content = next((content[key] for key in KEYS if key in content), content)
    if type(content) not in (Call, dict):
        raise InputError(f"holds {type(content).__name__}, expected a module or a state dict")
    found = entries_below(content) if type(content) is Call else content
    for prefix in PREFIXES:
        if all(str(name).startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return {str(name): value for name, value in found.items()}


def entries_below(network: Call) -> dict[str, Any]:
    """Those of a module and of all below it, named as by Module.state_dict."""
    found, letters, waiting = {}, 0, [("", network)]
    for prefix, module in waiting:                                  # which grows meanwhile
        match module.state:
            case {"_parameters": dict(parameters), "_buffers": dict(buffers), "_modules": dict(modules),
                  "_non_persistent_buffers_set": Call(arguments=(list(names),))}:
                temporary = {name for name in names if type(name) is str}
            case _:
                raise InputError(f"{prefix or 'its network'} is not a module as torch.save writes it")
        letters += sum(len(f"{prefix}{name}.") for name in (*parameters, *buffers, *modules, *temporary))
        if letters > LARGEST_TREE:
            raise InputError("its network is not a tree of modules, or far larger than the authors'")
        own = parameters | {name: value for name, value in buffers.items() if name not in temporary}
        found |= {f"{prefix}{name}": value for name, value in own.items() if value is not None}
        waiting += [(f"{prefix}{name}.", child) for name, child in modules.items() if type(child) is Call]
    return found


def as_tensor(value: Any, numbers: Callable[[str], bytearray]) -> Tensor | None:
    """The tensor of a Call, None of anything else. numbers: the bytes of a storage, by its key."""
    if type(value) is Call and value.function in PARAMETERS:
        value = value.arguments[0]
    match value:
        case Call("torch._utils._rebuild_tensor_v2",
                  (("storage", str(storage), str(key), str(), int(count)), offset, size, stride, *_)):
            data, dtype = numbers(key), DTYPES[storage]
            if len(data) != count * dtype.itemsize:
                raise ValueError("a storage does not fit the numbers that the file holds")
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return flat.as_strided(size, stride, offset)            # which raises beyond the storage
    return None


def official_name(name: str) -> str:
    """Our parameter name (encoder.0.1.attention.qkv.weight) -> theirs (encoder_level1.1.attn.qkv.weight)."""
    stage = next(stage for stage in STAGES if name.startswith(f"{stage}."))
    rest = name.removeprefix(stage)
    part = next((part for part in PARTS if f".{part}." in f"{rest}."), None)
    return STAGES[stage] + (rest.replace(part, PARTS[part]) if part else rest)


def official_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of ours -> that of the parameter that they call `name`: their prompts have a batch axis."""
    return (1,) * name.endswith(".prompt_param") + tuple(shape)


def renamed(theirs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Tensors under our names, in float32, and the options of their network; empties `theirs`.

    Raises InputError, listing every entry that does not fit.
    """
    kind, network = next(found for start, found in NETWORKS.items()
                         if any(name.startswith(start) for name in theirs))
    network = asdict(Network(**network))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in BaryIR(**network).named_parameters()}
    names = {official_name(name): name for name in shapes}          # theirs -> ours
    missing = [name for name in names if name not in theirs]
    biases = [name for name in names if ".norm" in name and name.endswith(".bias")]
    if set(biases) <= set(missing) and any(".norm" in name for name in theirs):
        raise InputError("its layer norms have no bias (LayerNorm_type BiasFree), expected WithBias")
    unknown = [name for name in theirs if name not in names and name not in UNUSED]
    problems = [f"{len(wrong)} {what}: {', '.join(wrong)}"
                for what, wrong in (("missing", missing), ("unknown", unknown)) if wrong]
    net = {}
    for name, ours in names.items():
        value, shape = theirs.pop(name, None), official_shape(name, shapes[ours])   # never two copies of all
        if value is None:
            continue
        if tuple(value.shape) != shape:
            problems.append(f"{name} is {list(value.shape)}, expected {list(shape)}")
        elif not value.is_floating_point():
            problems.append(f"{name} holds {str(value.dtype)[6:]}, expected floating-point numbers")
        elif not value.isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
        else:
            value = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            net[ours] = value.reshape(shapes[ours])
    if problems:
        raise InputError(f"not {kind} at the paper's size: {'; '.join(problems)}")
    return net, network


def convert(source: Path) -> tuple[dict, list[str]]:
    """A checkpoint of this repository from a public one, and what was left out; InputError if it is none."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    with naming(str(source)):
        theirs, epoch = read(source)
        net, network = renamed(theirs)
    step = {} if epoch is None else {"epoch": epoch}
    return {"net": net, "network": network, **step}, list(theirs)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="IN.pt", help="public checkpoint")
    parser.add_argument("target", type=Path, metavar="OUT.pth", help="checkpoint to write")
    flags = parser.parse_args()
    if flags.target.is_dir() or flags.target.resolve() == flags.source.resolve():
        what = "a folder" if flags.target.is_dir() else "the input"
        raise InputError(f"{flags.target}: is {what}, expected another file to write")
    checkpoint, unused = convert(flags.source)
    save_checkpoint(flags.target, checkpoint)
    count = sum(tensor.numel() for tensor in checkpoint["net"].values())
    epoch = f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""
    print(f"{flags.target}: {count:,} parameters{epoch}")
    if unused:
        print(f"left out, as the network never uses them: {', '.join(unused)}")
    print(f"use it with --set checkpoint={flags.target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
