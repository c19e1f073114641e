"""The authors' checkpoints: pickled modules of classes with their names; broken and malicious files, too."""

import builtins
import os
import pickle
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.golden import fill_reference
from conftest import REPOSITORY, run_script
from models.baryir import BACKBONES, BaryIR
from utils.checkpoint import load_network
from utils.convert_official import UNUSED, official_name, official_shape, read
from utils.evaluation import restore


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """The authors' 766 names, filled by the golden outputs' rule."""
    net = BaryIR()
    fill_reference(net)
    unused = [(64, 64), (128, 128), (256, 320), (48, 112), (96, 224), (192, 512)]
    return {official_name(name): p.detach() for name, p in net.named_parameters()} | {
        name: torch.zeros(*shape, 1, 1) for name, shape in zip(UNUSED, unused, strict=True)}


class ModelBary:
    """The authors' module, as far as a file needs it: there while a file is saved, gone when it is read."""

    def __enter__(self) -> types.ModuleType:
        module = sys.modules["model_bary"] = types.ModuleType("model_bary")
        for name in ("BaryIR", "TransformerBlock", "potential"):
            setattr(module, name, type(name, (nn.Module,), {"__module__": "model_bary"}))
        return module

    def __exit__(self, *_) -> None:
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
    with ModelBary() as model_bary:
        pots = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.LeakyReLU(), model_bary.potential())
                             for _ in range(3))
        torch.save({"epoch": 56, "BaryIR": wrap(as_module(tensors, model_bary)), "Pots": pots, **more}, path)
    return path


def convert(source: Path, target: Path):
    return run_script("utils/convert_official.py", source, target)


def refused(source: Path, target: Path) -> str:
    """The one line with which a file is refused; nothing is written."""
    result = convert(source, target)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"error: {source}: ") and not target.exists()
    assert not list(target.parent.glob(".partial-*"))
    return result.stderr


def test_converted_weights_give_the_authors_outputs(tmp_path, reference):
    source = save_official(tmp_path / "official.pt", reference)
    result = convert(source, tmp_path / "net.pth")
    assert result.returncode == 0, result.stderr
    assert "53,549,774 parameters, epoch 56" in result.stdout and "chnl_reduce1.weight" in result.stdout
    degraded = np.random.default_rng(0).random((2, 3, 64, 96)).astype(np.float32)
    restored = restore(load_network(tmp_path / "net.pth"), torch.from_numpy(degraded[1:]))
    expected = {(0, 2, 63, 95): 1.173910, (0, 0, 10, 80): -7.810841}            # of official_forward.npz
    for place, value in expected.items():
        assert restored[place].item() == pytest.approx(value, abs=1e-3)


@pytest.fixture(scope="module")
def zeros(reference) -> dict[str, torch.Tensor]:
    """The authors' names and shapes without memory behind them: files of a few kilobytes."""
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in reference.items()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {official_name(name): p for name, p in load_network(path).named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, zeros, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in zeros.items()}
    tensors["LN.body.bias"] = torch.linspace(-1, 1, 384, dtype=dtype)
    convert(save_official(tmp_path / "official.pt", tensors), tmp_path / "net.pth")
    converted = weights(tmp_path / "net.pth")
    assert all(p.dtype == torch.float32 for p in converted.values())
    assert torch.equal(converted["LN.body.bias"], tensors["LN.body.bias"].float())


@pytest.mark.parametrize("form", ["state dict", "state dict under a key", "module. prefix", "DataParallel"])
def test_other_forms(tmp_path, zeros, form):
    output = torch.arange(3 * 96 * 9.0).reshape(96, 3, 3, 3).transpose(0, 1)                # not contiguous
    tensors = zeros | {"LN.body.bias": torch.arange(384.0), "output.weight": output}
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    source = tmp_path / "official.pt"
    if form == "DataParallel":
        save_official(source, tensors, wrap=nn.DataParallel)
    else:
        torch.save({"state dict": tensors, "state dict under a key": {"epoch": 3, "state_dict": tensors},
                    "module. prefix": {"BaryIR": prefixed}}[form], source)
    result = convert(source, tmp_path / "net.pth")
    assert result.returncode == 0, result.stderr
    converted = weights(tmp_path / "net.pth")
    assert all(torch.equal(converted[name], tensors[name]) for name in ("LN.body.bias", "output.weight"))


@pytest.fixture(scope="module")
def public() -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of public PromptIR and Restormer, filled by the golden outputs' rule."""
    found = {}
    for backbone in BACKBONES:
        net = BaryIR(backbone=backbone, barycenter=False)
        fill_reference(net)
        names = {official_name(name): p.detach() for name, p in net.named_parameters()}
        found[backbone] = {name: p.reshape(official_shape(name, p.shape)) for name, p in names.items()}
    found["promptir"] |= {name: torch.zeros(1) for name in UNUSED}
    return found


@pytest.mark.parametrize("backbone, wrap", [
    ("restormer", lambda tensors: {"params": tensors}),
    ("restormer", lambda tensors: tensors),
    ("promptir", lambda tensors: {"epoch": 5, "global_step": 7, "optimizer_states": [{"state": {0: {}}}],
                                  "state_dict": {f"net.{name}": t for name, t in tensors.items()}}),
])
def test_public_backbones(tmp_path, public, backbone, wrap):
    torch.save(wrap(public[backbone]), tmp_path / "public.pth")
    result = convert(tmp_path / "public.pth", tmp_path / "net.pth")
    assert result.returncode == 0, result.stderr
    count, left_out = {"restormer": ("26,126,644", False), "promptir": ("35,376,967", True)}[backbone]
    assert f"{count} parameters" in result.stdout and ("left out" in result.stdout) == left_out
    net = load_network(tmp_path / "net.pth")
    reference = BaryIR(backbone=backbone, barycenter=False)
    fill_reference(reference)
    assert not net.barycenter and net.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))


def test_backbones_that_are_refused(tmp_path, public):
    source, target, tensors = tmp_path / "public.pth", tmp_path / "net.pth", public["restormer"]
    bias_free = {name: t for name, t in tensors.items() if ".norm" not in name or "weight" in name}
    torch.save({"params": bias_free}, source)
    assert "have no bias (LayerNorm_type BiasFree), expected WithBias" in refused(source, target)
    torch.save(tensors | {"patch_embed.proj.weight": torch.zeros(48, 6, 3, 3)}, source)     # two views
    assert "not public Restormer at the paper's size: patch_embed.proj.weight is [48, 6, 3, 3], expected " \
           "[48, 3, 3, 3]" in refused(source, target)
    prompts = public["promptir"]
    torch.save(prompts | {"prompt1.prompt_param": prompts["prompt1.prompt_param"][0]}, source)
    assert "not public PromptIR at the paper's size: prompt1.prompt_param is [5, 64, 64, 64]" in refused(
        source, target)


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy a file of torch.save with each entry changed by change(name, bytes)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_tensors_of_a_cuda_device(tmp_path, zeros):
    def move(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        moved = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
        assert moved != data
        return moved

    source = rewrite(save_official(tmp_path / "cpu.pt", zeros), tmp_path / "cuda.pt", move)
    assert convert(source, tmp_path / "net.pth").returncode == 0
    assert len(weights(tmp_path / "net.pth")) == 760


def test_every_entry_that_does_not_fit_is_listed(tmp_path, zeros):
    missing = ("LN.body.bias", "latent.7.norm1.body.weight")
    tensors = {name: tensor for name, tensor in zeros.items() if name not in missing}
    tensors |= {"output.weight": torch.zeros(3, 96, 1, 1), "extra.weight": torch.zeros(2),
                "LN.body.weight": torch.full((384,), torch.nan)}
    message = refused(save_official(tmp_path / "official.pt", tensors), tmp_path / "net.pth")
    assert "2 missing: " in message and "LN.body.bias" in message and "latent.7.norm1.body.weight" in message
    assert "1 unknown: extra.weight" in message
    assert "output.weight is [3, 96, 1, 1], expected [3, 96, 3, 3]" in message
    assert "LN.body.weight holds numbers that are not finite" in message


class Reduced:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", [
    "posix.system", "builtins.eval", "builtins.exec", "pathlib.Path", "torch.hub.load", "os.system",
    "torch.nn.functional.gelu", "torch.load", "builtins.getattr", "functools.partial"])
@pytest.mark.parametrize("place", ["top", "in a module"])
def test_whatever_else_a_file_names_is_refused(tmp_path, name, place):
    victim = tmp_path / "victim"
    module, _, function = name.rpartition(".")
    code = f"open({str(victim)!r}, 'w')"
    arguments = {"eval": (code,), "exec": (code,), "system": (f"touch {victim}",)}
    stand_in = types.FunctionType((lambda *_: None).__code__, {}, function)
    stand_in.__module__, stand_in.__qualname__ = module, function
    source = tmp_path / "malicious.pt"
    with ModelBary() as model_bary:
        net = model_bary.BaryIR()
        call = Reduced(stand_in, *arguments.get(function, (str(victim),)))
        net.hook = call if place == "in a module" else None
        content = {"epoch": call if place == "top" else 1, "BaryIR": net}
        save_naming(content, source)
    message = refused(source, tmp_path / "net.pth")
    assert f"names {name}, expected" in message.replace("__builtin__", "builtins")
    assert "nothing was run" in message
    assert not victim.exists()


def save_naming(content, path: Path) -> None:
    """A file of torch.save with functions pickled by name, whatever that name leads to here."""
    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            self.write(f"c{obj.__module__}\n{name or obj.__qualname__}\n".encode())

        dispatch = pickle._Pickler.dispatch | {types.FunctionType: save_global}

    with open(path.with_suffix(".pkl"), "wb") as file:
        Pickler(file, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", path.with_suffix(".pkl").read_bytes())
        archive.writestr("archive/version", "3")


def test_the_malicious_files_are_real(tmp_path):
    """Loaded the old way, such a file does run its code: the refusals above are not for want of an attack."""
    victim = tmp_path / "victim"
    with pytest.MonkeyPatch.context() as patch, ModelBary():
        patch.chdir(tmp_path)
        code = f"open({str(victim)!r}, 'w')"
        torch.save({"epoch": Reduced(builtins.eval, code)}, tmp_path / "malicious.pt")
        torch.load(tmp_path / "malicious.pt", weights_only=False)
    assert victim.exists()
    victim.unlink()
    assert "names " in refused(tmp_path / "malicious.pt", tmp_path / "net.pth") and not victim.exists()


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:len(data) // 2], "truncated, or not a zip file"),
    (lambda data: b"", "truncated, or not a zip file"),
    (lambda data: b"\x80\x02}q\x00.", "truncated, or not a zip file"),
    (lambda data: data.replace(b"LN", b"LM"), "damaged: the checksum of official/data.pkl is wrong"),
    (lambda data: data.replace(b"official/data.pkl", b"official/data.\xff\xfel"),
     "truncated, or not a zip file"),
])
def test_broken_files(tmp_path, zeros, damage, message):
    source = save_official(tmp_path / "official.pt", zeros)
    source.write_bytes(damage(source.read_bytes()))
    assert message in refused(source, tmp_path / "net.pth")


def test_broken_contents(tmp_path, zeros):
    def replaced(name: str, data: bytes) -> Path:
        return rewrite(save_official(tmp_path / "official.pt", zeros), broken,
                       lambda entry, old: data if entry.endswith(name) else old)

    broken, target = tmp_path / "broken.pt", tmp_path / "net.pth"
    assert "its pickle cannot be read" in refused(replaced("data.pkl", b"\x80\x02}q\x00"), target)
    assert "its pickle cannot be read (RuntimeError)" in refused(replaced("data/100", b""), target)
    tensors = {**zeros, "epoch": 3}
    forged = {"x\nok.pth: 53,549,774 parameters": torch.zeros(1)}   # a name must not pass for a line of ours
    for content, message in (
        (3, "holds int"), ({"weights": 3}, "holds weights, expected tensors only"), ({}, "holds nothing"),
        ({"net": {}, "network": {}}, "already"), (tensors, "holds epoch, expected tensors only"),
        (forged, "1 unknown: x\\nok.pth"),
    ):
        torch.save(content, broken)
        assert message in refused(broken, target)
    torch.save(zeros | {"LN.body.bias": torch.zeros(384, dtype=torch.int64)}, broken)
    assert "LN.body.bias holds int64, expected floating-point numbers" in refused(broken, target)
    torch.save(zeros, broken, _use_new_zipfile_serialization=False)
    assert "not a zip file as torch.save writes it since 1.6" in refused(broken, target)
    with tarfile.open(broken, "w") as archive:                      # older still; torch.load unpacks it
        archive.add(__file__, "storages")
    assert "not a zip file as torch.save writes it since 1.6" in refused(broken, target)
    source = save_official(tmp_path / "official.pt", zeros)
    assert "is a folder" in convert(source, tmp_path).stderr
    assert "no such file" in refused(tmp_path / "gone.pt", target)
    os.mkfifo(tmp_path / "pipe.pt")                                 # opening it would wait for ever
    assert "no such file" in refused(tmp_path / "pipe.pt", target)
    source = save_official(tmp_path / "official.pt", zeros)
    before = source.read_bytes()
    assert "is the input" in convert(source, source).stderr and source.read_bytes() == before
    with zipfile.ZipFile(tmp_path / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000)
    assert ": compressed" in refused(tmp_path / "compressed.pt", target)
    with zipfile.ZipFile(tmp_path / "overlapping.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000)
        archive.filelist *= 100                                     # the same bytes under a hundred entries
    assert ": compressed" in refused(tmp_path / "overlapping.pt", target)


def test_modules_that_contain_themselves_come_to_an_end(tmp_path, zeros):
    def loop(net: nn.Module) -> nn.Module:
        net._modules["again"] = net
        return net

    def wide(net: nn.Module) -> nn.Module:
        net._modules |= {f"again{i}": net for i in range(1000)}
        return net

    def doubling(net: nn.Module) -> nn.Module:
        for _ in range(60):
            net = nn.Sequential(net, net)
        return net

    for wrap in (loop, wide):                                       # each module counts once
        tensors, _ = read(save_official(tmp_path / "official.pt", zeros, wrap=wrap))
        assert tensors.keys() == zeros.keys()
    source = save_official(tmp_path / "official.pt", zeros, wrap=doubling)
    assert "766 unknown" in refused(source, tmp_path / "net.pth")
    content = {}
    content["BaryIR"] = content
    torch.save(content, tmp_path / "loop.pt")
    assert "holds BaryIR, expected tensors only" in refused(tmp_path / "loop.pt", tmp_path / "net.pth")


def doubled(end: bytes) -> bytes:
    """A pickle of a tuple that holds another twice, and so on: 2^60 elements in a few bytes; then `end`."""
    return b"K\x01" + b"".join(b"\x85q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + end


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
# A tensor of 2^40 rows, which are all the same number of the file.
ROWS = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0\x8a\x06\0\0\0\0\0\x01\x85K\0\x85\x89NtR"
HAND_MADE = {
    "hashing a key": b"\x80\x02}(" + doubled(b"K\x01u."),
    "printing a reference": b"\x80\x02" + doubled(b"Q."),
    "printing a value": b"\x80\x02}(X\x01\0\0\0k" + doubled(b"u."),
    "a memo of 2^31 places": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a set": b"\x80\x02c__builtin__\nset\n]" + doubled(b"a\x85R."),
    "an OrderedDict of pairs": b"\x80\x02ccollections\nOrderedDict\n](" + doubled(b"K\x01\x86e\x85R."),
    "a call of a number": b"\x80\x02K\x01K\x02\x85R.",
    "a call of rows": b"\x80\x02ctorch\nSize\n" + ROWS + b"R.",
    "an object of rows": b"\x80\x02cmodel_bary\nBaryIR\n" + ROWS + b"\x81.",
    "filling rows": b"\x80\x02" + ROWS + b"K\0K\x01s.",
    "comparing rows":
        b"\x80\x02cmodel_bary\nBaryIR\n)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}K\x01Ns"
        b"X\x08\0\0\0_modules}X\x1b\0\0\0_non_persistent_buffers_setcbuiltins\nset\n](" + ROWS + b"e\x85Rub.",
    "a tensor's attributes": b"\x80\x02" + ROWS + b"}X\x04\0\0\0dataK\x01sb.",
    "a stand-in's attributes": b"\x80\x02cbuiltins\nset\nN}X\x08\0\0\0__code__K\x01s\x86b.",
    "a size that takes for ever to print":
        b"\x80\x02}X\x01\0\0\0kctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE + b"K\0" + doubled(b"K\0\x85\x89NtRs."),
    "a parameter of itself":
        b"\x80\x02}X\x01\0\0\0kctorch._utils\n_rebuild_parameter\n]q\x01Rq\x02h\x01h\x02a0s.",
    "opcode OBJ": b"\x80\x02(cmodel_bary\nBaryIR\no.",
    "opcode EXT1": b"\x80\x02\x82\x01.",
    "opcode DUP": b"\x80\x02K\x01" + b"2\x86" * 60 + b".",
    "protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a name of three lines": b"\x80\x04\x8c\x0btorch.nn\n\nx\x8c\x06system\x93.",
    "a name with dots": b"\x80\x04\x8c\x0bcollections\x8c\x19OrderedDict.__init__.x.os\x93.",
    "a large pickle": b"\x80\x04" + b"0" * (9 << 20),
}


@pytest.mark.parametrize("data", HAND_MADE.values(), ids=HAND_MADE.keys())
def test_pickles_that_torch_does_not_write(tmp_path, data):
    with zipfile.ZipFile(tmp_path / "made.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", "3")
    start = time.monotonic()
    assert refused(tmp_path / "made.pt", tmp_path / "net.pth")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("size", [5, -1, 2 ** 40, 2 ** 62 + 1, 2 ** 63 - 1])
def test_tensors_that_reach_beyond_their_storage(tmp_path, size):
    def resized(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x04\x85", b"\x8a\x08" + size.to_bytes(8, "little", signed=True) + b"\x85")

    torch.save({"output.weight": torch.zeros(4)}, tmp_path / "small.pt")
    assert "its pickle cannot be read (RuntimeError" in refused(
        rewrite(tmp_path / "small.pt", tmp_path / "beyond.pt", resized), tmp_path / "net.pth")


class Script(nn.Module):
    """As TorchScript, it writes a file while it is loaded."""

    def __init__(self, victim: str) -> None:
        super().__init__()
        self.victim = victim

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.victim, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.victim, self.training = state[0], state[1]
        torch.save(torch.zeros(1), self.victim)


@pytest.mark.filterwarnings("ignore")                       # TorchScript is deprecated; torch.load runs it
def test_torchscript_is_not_run(tmp_path):
    """Why the converter does without torch.load(pickle_module=...): it never asks the unpickler."""
    victim, source = tmp_path / "victim", tmp_path / "script.pt"
    torch.jit.script(Script(str(victim))).save(source)
    refusing = types.SimpleNamespace(__name__="refusing", Unpickler=None)
    torch.load(source, weights_only=False, pickle_module=refusing)
    assert victim.exists()
    victim.unlink()
    assert ": compressed" in refused(source, tmp_path / "net.pth")
    stored = rewrite(source, tmp_path / "stored.pt", lambda name, data: data)
    assert "its pickle cannot be read (ValueError)" in refused(stored, tmp_path / "net.pth")
    assert not victim.exists()


def test_module_of_distributed_training(tmp_path, zeros):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        save_official(tmp_path / "official.pt", {name: tensor.clone() for name, tensor in zeros.items()},
                      wrap=nn.parallel.DistributedDataParallel)
    finally:
        dist.destroy_process_group()
    result = convert(tmp_path / "official.pt", tmp_path / "net.pth")
    assert result.returncode == 0 and len(weights(tmp_path / "net.pth")) == 760, result.stderr


def test_memory_is_that_of_the_weights(tmp_path, reference):
    """Beyond what importing torch takes, less than twice the file."""
    source = save_official(tmp_path / "official.pt", reference)
    code = ("import resource, sys, utils.convert_official as c\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "sys.argv[0] = 'convert'; c.main()\n"
            "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))")
    result = subprocess.run([sys.executable, "-c", code, source, tmp_path / "net.pth"],
                            capture_output=True, text=True, cwd=REPOSITORY)
    assert int(result.stdout.splitlines()[-1]) < 2 * os.path.getsize(source), result.stderr


def test_nothing_of_the_file_is_imported(tmp_path, zeros):
    """The names resolve without the authors' source: model_bary is on no path."""
    source = save_official(tmp_path / "official.pt", zeros)
    assert "model_bary" not in sys.modules
    tensors, epoch = read(source)
    assert "model_bary" not in sys.modules and len(tensors) == 766 and epoch == 56
