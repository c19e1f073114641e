"""Convert a checkpoint of the authors' release, of public PromptIR or Restormer into one of this repository.

    python -m utils.convert_official IN.pt OUT.pth

The authors' files are pickled modules, torch.save({"epoch": n, "BaryIR": <module>, "Pots": <module>}); the
others' are state dicts. Nothing from a file is run (utils/pickled.py).
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.baryir import BaryIR
from utils.checkpoint import save_checkpoint
from utils.errors import InputError, first_few, one_line_errors
from utils.options import Network
from utils.pickled import Module, read, tensors_below

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


def state_dict(content: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, of a module or a plain state dict, alone or under KEYS."""
    for _ in range(3):                                              # a dict may hold itself
        if type(content) is dict and {"net", "network"} <= content.keys():
            raise InputError("a checkpoint of this repository already, expected a public one")
        if type(content) is dict:
            content = next((content[key] for key in KEYS if key in content), content)
    if type(content) not in (Module, dict):
        raise InputError(f"holds {type(content).__name__}, expected a module or a state dict")
    found = (tensors_below(content) if type(content) is Module else
             {str(name): value for name, value in content.items()})
    others = [name for name, value in found.items() if type(value) is not Tensor]
    if others or not found:
        raise InputError(f"holds {first_few(others) or 'nothing'}, expected tensors only, "
                         f"or a network under one of {', '.join(KEYS)}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


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
    try:
        content = read(source)
        epoch = content.get("epoch") if type(content) is dict else None
        content = state_dict(content)                               # the rest of the file is let go
        net, network = renamed(content)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    step = {"epoch": epoch} if type(epoch) is int and 0 <= epoch < 2 ** 31 else {}
    return {"net": net, "network": network, **step}, list(content)


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
