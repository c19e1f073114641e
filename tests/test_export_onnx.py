"""The network in ONNX Runtime: any size, as in PyTorch."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.baryir import BaryIR
from utils import export_onnx
from utils.errors import InputError


@pytest.fixture
def net():
    return BaryIR(width=8, encoder_blocks=[1, 1], latent_blocks=1, transport_blocks=1, decoder_blocks=[1, 1],
                  residual_blocks=[1], refinement_blocks=0, heads=[1, 2, 4]).eval()


def test_any_size_is_restored_as_in_pytorch(net, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = [torch.rand(1, 3, *size) for size in ((40, 52), (41, 39), (3, 9))]
    with torch.inference_mode():
        expected = [net(image)[0] for image in images]
    export_onnx.export(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [part.name for part in (*session.get_inputs(), *session.get_outputs())] == ["image", "restored"]
    for image, wanted in zip(images, expected, strict=True):
        restored, = session.run(["restored"], {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(restored), wanted, atol=1e-5, rtol=0)


def test_a_file_that_restores_otherwise_is_not_kept(net, tmp_path, monkeypatch):
    """Nor is there one without the packages, which are named."""
    program = SimpleNamespace(save=lambda file: Path(file).write_bytes(b"a network"))
    session = SimpleNamespace(run=lambda names, inputs: [inputs["image"] + 1])
    runtime = SimpleNamespace(InferenceSession=lambda file: session)
    monkeypatch.setitem(sys.modules, "onnxscript", SimpleNamespace())
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx.export(net, tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    with pytest.raises(InputError, match="net.onnx: ONNX Runtime and PyTorch differ by"):
        export_onnx.export(net, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
