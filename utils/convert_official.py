"""Convert a checkpoint of the authors' release, of public PromptIR or Restormer into one of this repository.

    python -m utils.convert_official IN.pt OUT.pth

The authors' files are pickled modules, torch.save({"epoch": n, "BaryIR": <module>, "Pots": <module>}); the
others' are state dicts. Loaded the usual way, a pickle imports and calls whatever it names. Here torch reads
it with weights_only=True, and an empty nn.Module stands in for each class that it names: no code is run.
"""

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models.baryir import BaryIR
from utils.checkpoint import check_sums, require_fit, save_checkpoint, without_prefixes
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

# Keys under which a file may hold the network.
KEYS = ("BaryIR", "state_dict", "model_state_dict", "model", "params_ema", "params")

# Classes for which an nn.Module stands in: the authors', torch's layers, what DistributedDataParallel has.
CLASSES = re.compile(r"(\w+\.)*model_bary\.\w+|torch\.nn\.(modules|parallel)(\.\w+)*\._?[A-Z]\w*|"
                     r"torch\.distributed\.algorithms\.join\._JoinConfig")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The network's tensors in a file of torch.save, and its epoch, if any; InputError where it has none."""
    if not path.is_file():
        raise InputError("no such file")
    try:
        check_sums(path)
        names = sorted(get_unsafe_globals_in_checkpoint(path))
        if refused := [name for name in names if not CLASSES.fullmatch(name)]:
            raise InputError(f"names {first_few(refused)}, expected tensors, containers and modules only; "
                             "nothing was run")
        places = [name.rpartition(".") for name in names]
        with safe_globals([type(name, (nn.Module,), {"__module__": module}) for module, _, name in places]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:                                      # broken files raise nearly anything
        raise InputError(f"its pickle cannot be read ({type(error).__name__}): damaged, truncated, or not "
                         "a zip file as torch.save writes it since 1.6") from None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    if isinstance(content, dict):
        content = next((content[key] for key in KEYS if key in content), content)
    if isinstance(content, nn.Module):
        content = dict(content.named_parameters())
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, expected a module or a state dict")
    return without_prefixes(content), {"epoch": epoch} if type(epoch) is int else {}


def official_name(name: str) -> str:
    """Our parameter name (encoder.0.1.attention.qkv.weight) -> theirs (encoder_level1.1.attn.qkv.weight)."""
    stage = next(stage for stage in STAGES if name.startswith(f"{stage}."))
    rest = name.removeprefix(stage)
    part = next((part for part in PARTS if f".{part}." in f"{rest}."), None)
    return STAGES[stage] + (rest.replace(part, PARTS[part]) if part else rest)


def official_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of ours -> that of the parameter that they call `name`: their prompts have a batch axis."""
    return (1,) * name.endswith(".prompt_param") + tuple(shape)


def renamed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Tensors under our names, in float32, and the options of their network; leaves what it never uses.

    InputError where they are not those of a public network.
    """
    kind, network = next(found for start, found in NETWORKS.items()
                         if not start or any(name.startswith(start) for name in tensors))
    network = asdict(Network(**network))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in BaryIR(**network).named_parameters()}
        names = {official_name(name): name for name in shapes}      # theirs -> ours
        wanted = {name: torch.empty(official_shape(name, shapes[names[name]])) for name in names}
    used = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
    require_fit(used, wanted, f"{kind} at the paper's size")
    net = {}
    for theirs, ours in names.items():                              # never two copies of all
        del used[theirs]
        net[ours] = torch.empty(shapes[ours]).copy_(tensors.pop(theirs).reshape(shapes[ours]))
    return net, network


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.pt", help="public checkpoint")
    parser.add_argument("target", type=Path, metavar="OUT.pth", help="checkpoint to write")
    flags = parser.parse_args()
    if flags.target.resolve() == flags.source.resolve():
        raise InputError(f"{flags.target}: is the input, expected another file to write")
    with naming(str(flags.source)):
        tensors, trained = read(flags.source)
        net, network = renamed(tensors)
    save_checkpoint(flags.target, {"net": net, "network": network, **trained})
    count = sum(tensor.numel() for tensor in net.values())
    print(f"{flags.target}: {count:,} parameters" + "".join(f", epoch {n}" for n in trained.values()))
    if tensors:
        print(f"left out, as the network never uses them: {', '.join(tensors)}")
    print(f"use it with --set checkpoint={flags.target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
