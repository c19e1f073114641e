"""The authors' checkpoints: pickled modules of classes with their names; broken and malicious files, too."""

import contextlib
import functools
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.golden import fill_reference
from conftest import run_script
from models.baryir import BACKBONES, BaryIR
from utils.checkpoint import load_network, without_prefixes
from utils.convert_official import UNUSED, official_name, official_shape, read, renamed
from utils.errors import InputError
from utils.evaluation import restore


@contextlib.contextmanager
def authors_module() -> Iterator[types.ModuleType]:
    """As far as a file needs it: there while a file is saved, gone when it is read."""
    module = sys.modules["model_bary"] = types.ModuleType("model_bary")
    for name in ("BaryIR", "TransformerBlock", "potential"):
        setattr(module, name, type(name, (nn.Module,), {"__module__": "model_bary"}))
    yield module
    del sys.modules["model_bary"]


def as_module(tensors: dict[str, torch.Tensor], model_bary: types.ModuleType) -> nn.Module:
    net = model_bary.BaryIR()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        here = net
        for part in path:
            if part not in here._modules:
                here.add_module(part, model_bary.TransformerBlock())
            here = here._modules[part]
        here.register_parameter(last, nn.Parameter(tensor))
    net.register_buffer("scratch", torch.zeros(3), persistent=False)            # not in a state dict
    return net


def save_official(path: Path, tensors: dict[str, torch.Tensor], wrap=lambda net: net, **more) -> Path:
    with authors_module() as model_bary:
        pots = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.LeakyReLU(), model_bary.potential())
                             for _ in range(3))
        torch.save({"epoch": 56, "BaryIR": wrap(as_module(tensors, model_bary)), "Pots": pots, **more}, path)
    return path


convert = functools.partial(run_script, "utils/convert_official.py")


def refused(source: Path, target: Path) -> str:
    """The one line with which a file is refused; nothing is written."""
    result = convert(source, target)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"error: {source}: ") and not target.exists()
    assert not list(target.parent.glob(".partial-*"))
    return result.stderr


def test_converted_weights_give_the_authors_outputs(tmp_path):
    """The authors' 766 names, filled by the golden outputs' rule."""
    net = BaryIR()
    fill_reference(net)
    unused = [(64, 64), (128, 128), (256, 320), (48, 112), (96, 224), (192, 512)]
    tensors = {official_name(name): p.detach() for name, p in net.named_parameters()} | {
        name: torch.zeros(*shape, 1, 1) for name, shape in zip(UNUSED, unused, strict=True)}
    source = save_official(tmp_path / "official.pt", tensors)
    result = convert(source, tmp_path / "net.pth")
    assert result.returncode == 0, result.stderr
    assert "53,549,774 parameters, epoch 56" in result.stdout and "chnl_reduce1.weight" in result.stdout
    assert "model_bary" not in sys.modules                                      # nothing of it was imported
    degraded = np.random.default_rng(0).random((2, 3, 64, 96)).astype(np.float32)
    restored = restore(load_network(tmp_path / "net.pth"), torch.from_numpy(degraded[1:]))
    expected = {(0, 2, 63, 95): 1.173910, (0, 0, 10, 80): -7.810841}            # of official_forward.npz
    for place, value in expected.items():
        assert restored[place].item() == pytest.approx(value, abs=1e-3)


@pytest.fixture(scope="module")
def public() -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of public PromptIR and Restormer: names and shapes without memory behind them."""
    found = {}
    for backbone in BACKBONES:
        with torch.device("meta"):
            net = BaryIR(backbone=backbone, barycenter=False)
        shapes = {official_name(name): p.shape for name, p in net.named_parameters()}
        found[backbone] = {name: torch.zeros(1).expand(official_shape(name, shape))
                           for name, shape in shapes.items()}
    found["promptir"] |= {name: torch.zeros(1) for name in UNUSED}
    return found


@pytest.mark.parametrize("backbone, dtype, wrap", [
    ("restormer", torch.bfloat16, lambda tensors: {"params": tensors}),
    ("promptir", torch.float32, lambda tensors: {
        "epoch": 5, "global_step": 7, "optimizer_states": [{"state": {0: {}}}],
        "state_dict": {f"net._orig_mod.{name}": tensor for name, tensor in tensors.items()}}),
])
def test_public_backbones(tmp_path, public, backbone, dtype, wrap):
    """Of a trainer, compiled, in another precision; a tensor that is not contiguous."""
    marked = {"output.weight": torch.linspace(-1, 1, 96 * 27).reshape(96, 3, 3, 3).transpose(0, 1),
              "refinement.0.norm1.body.bias": torch.linspace(-1, 1, 96)}
    tensors = {name: tensor.to(dtype) for name, tensor in (public[backbone] | marked).items()}
    torch.save(wrap(tensors), tmp_path / "public.pth")
    result = convert(tmp_path / "public.pth", tmp_path / "net.pth")
    assert result.returncode == 0, result.stderr
    count, left_out = {"restormer": ("26,126,644", False), "promptir": ("35,376,967", True)}[backbone]
    assert f"{count} parameters" in result.stdout and ("left out" in result.stdout) == left_out
    net = load_network(tmp_path / "net.pth")
    converted = {official_name(name): p for name, p in net.named_parameters()}
    assert not net.barycenter and all(p.dtype == torch.float32 for p in converted.values())
    for name in marked:
        assert torch.equal(converted[name], tensors[name].float())


def test_prefixes_of_wrappers_go(tmp_path, checkpoint):
    plain = {"output.weight": 1, "encoder.0.1.net.weight": 2}
    by_stages = {"encoder._orig_mod.0.1.net.weight": 2, "output.weight": 1}         # compiled by stages
    for prefix in ("", "module.", "_orig_mod.module.", "ema_model.module.BaryIR._orig_mod."):
        for tensors in (plain, by_stages):
            assert without_prefixes({prefix + name: value for name, value in tensors.items()}) == plain
    with pytest.raises(InputError, match="holds 2 tensors under 1 names, expected one network's"):
        without_prefixes({"net.output.weight": 1, "ema_model.output.weight": 2})
    content = torch.load(checkpoint, weights_only=True)
    content["net"] = {f"_orig_mod.{name}": tensor for name, tensor in content["net"].items()}
    torch.save(content, tmp_path / "compiled.pth")
    load_network(tmp_path / "compiled.pth")


def test_forms_of_modules(tmp_path):
    """Pickled in DataParallel or DistributedDataParallel; in modules that contain themselves."""
    tensors = {"output.weight": torch.arange(4.0), "LN.body.bias": torch.ones(2)}

    def looped(net: nn.Module) -> nn.Module:
        net._modules["again"] = net
        return net

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel, looped):
            found, trained = read(save_official(tmp_path / "official.pt", tensors, wrap=wrap))
            assert found.keys() == tensors.keys() and trained == {"epoch": 56}
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    finally:
        dist.destroy_process_group()


def test_tensors_of_a_cuda_device(tmp_path):
    source, target = tmp_path / "cpu.pt", tmp_path / "cuda.pt"
    save_official(source, {"output.weight": torch.ones(3)})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:1"))
        assert b"cuda:1" in new.read("cpu/data.pkl") and b"cuda:1" not in old.read("cpu/data.pkl")
    found, _ = read(target)
    assert found["output.weight"].device.type == "cpu"


def test_what_does_not_fit_is_refused_with_a_few_names(tmp_path, public):
    source, target, tensors = tmp_path / "public.pth", tmp_path / "net.pth", public["restormer"]
    prompts = public["promptir"]
    for content, message in (
        (tensors | {"patch_embed.proj.weight": torch.zeros(48, 6, 3, 3)},               # two views
         "1 of 494 tensors do not fit public Restormer at the paper's size "
         "(patch_embed.proj.weight: [48, 6, 3, 3], expected [48, 3, 3, 3])"),
        (prompts | {"prompt1.prompt_param": prompts["prompt1.prompt_param"][0]},
         "fit public PromptIR at the paper's size (prompt1.prompt_param: [5, 64, 64, 64], expected"),
        ({f"odd.{name}": tensor for name, tensor in tensors.items()}, "988 of 494 tensors do not fit"),
        # A name must not pass for a line of ours.
        (tensors | {"x\nok.pth: 53,549,774 parameters": torch.zeros(1)}, "x\\nok.pth: 53"),
        ({}, "of 494 tensors"), (3, "holds int"), (tensors | {"a": 3}, "(a: ['no tensor'], expected none)"),
    ):
        torch.save(content, source)
        assert message in (line := refused(source, target)) and len(line) < 600
    before = source.read_bytes()
    assert "is the input" in convert(source, source).stderr and source.read_bytes() == before
    renamed(tensors := dict(prompts))
    assert set(tensors) == set(UNUSED)                          # it holds no second copy


@pytest.mark.parametrize("function, name, arguments, place", [
    (os.system, "posix.system", "touch victim", "top"),
    (eval, "builtins.eval", "open('victim', 'w')", "in a module"),
    (getattr, "builtins.getattr", "victim", "in a module"),
    (torch.hub.load, "torch.hub.load", "victim", "top")])
def test_whatever_else_a_file_names_is_refused(tmp_path, monkeypatch, function, name, arguments, place):
    """The first two are real attacks: loaded the usual way, such a file does run its code."""
    monkeypatch.chdir(tmp_path)
    source, victim = tmp_path / "malicious.pt", tmp_path / "victim"
    with authors_module() as model_bary:
        call = type("Call", (), {"__reduce__": lambda _: (function, (arguments,))})()
        net = model_bary.BaryIR()
        net.hook = call if place == "in a module" else None
        torch.save({"epoch": call if place == "top" else 1, "BaryIR": net}, source)
        if "victim" != arguments:
            torch.load(source, weights_only=False)
            assert victim.exists()
            victim.unlink()
    message = refused(source, tmp_path / "net.pth")
    assert f"names {name}, expected" in message.replace("__builtin__", "builtins")
    assert "nothing was run" in message and not victim.exists()


def test_broken_files(tmp_path):
    source = save_official(tmp_path / "official.pt", {"LN.body.bias": torch.zeros(3)})
    whole = source.read_bytes()
    for data, message in ((whole[:len(whole) // 2], "truncated, or not a zip file as torch.save writes it s"),
                          (whole.replace(b"LN", b"LM"), "damaged: the checksum of official/data.pkl is wro")):
        source.write_bytes(data)
        assert message in refused(source, tmp_path / "net.pth")
    os.mkfifo(tmp_path / "pipe.pt")                                 # opening it would wait for ever
    assert "no such file" in refused(tmp_path / "pipe.pt", tmp_path / "net.pth")
