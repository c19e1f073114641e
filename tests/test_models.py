"""The network against the authors' outputs and the textbook form; stages, sizes, gradients; potentials."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from benchmarks import complexity, plain
from benchmarks.golden import fill_reference
from conftest import SMALL
from models.baryir import BACKBONES, BaryIR, pad_to_multiple
from models.potentials import Potentials
from utils.convert_official import official_name
from utils.tables import PUBLISHED

# Numbers of the authors' network and of the public plain ones for a fill rule and an input
# (benchmarks/golden.py compares all).
GOLDEN = [
    (dict(), 53_549_774, {
        "restored": {(0, 0, 0, 0): 0.075718, (0, 1, 31, 47): 4.132194, (1, 2, 63, 95): 1.173910,
                     (1, 0, 10, 80): -7.810841},
        "z": {(0, 0, 0, 0): -0.822335, (1, 100, 3, 7): 2.043365, (1, 383, 7, 11): 1.553406},
        "b": {(0, 0, 0, 0): -1.219429, (1, 100, 3, 7): -1.013630, (1, 383, 7, 11): 1.620352}}),
    (dict(backbone="restormer", barycenter=False), 26_126_644, {
        "restored": {(0, 0, 0, 0): -1.940802, (0, 1, 31, 47): 0.753103, (1, 2, 63, 95): 0.047942,
                     (1, 0, 10, 80): 0.672781}}),
    (dict(backbone="promptir", barycenter=False), 35_376_967, {
        "restored": {(0, 0, 0, 0): 1.483365, (0, 1, 31, 47): -0.214088, (1, 2, 63, 95): 1.493045,
                     (1, 0, 10, 80): 1.015018}}),
]
BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)
# BaryIR on each backbone, and each alone.
NETWORK = pytest.mark.parametrize("network", [
    dict(SMALL, backbone=backbone, barycenter=barycenter) for backbone in BACKBONES
    for barycenter in (True, False)], ids=lambda network: f"{network['backbone']}-{network['barycenter']}")


def moved(network: dict) -> BaryIR:
    """A network whose norms and temperatures are not 0 and 1."""
    net = BaryIR(**network)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("network, count, golden", GOLDEN, ids=["baryir", "restormer", "promptir"])
def test_outputs_of_the_public_networks(network, count, golden):
    net = BaryIR(**network).eval()
    fill_reference(net)
    degraded = torch.from_numpy(np.random.default_rng(0).random((2, 3, 64, 96)).astype(np.float32))
    with torch.no_grad():
        outputs = dict(zip(("restored", "z", "b"), net(degraded), strict=True))
    assert sum(p.numel() for p in net.parameters()) == count
    assert net.barycenter or outputs["b"] is outputs["z"]
    for name, values in golden.items():
        for index, value in values.items():
            near = pytest.approx(value, abs=1e-4 * outputs[name].abs().max().item())
            assert outputs[name][index].item() == near, name


def test_official_names():
    with torch.device("meta"):
        names = [official_name(name) for name, _ in BaryIR().named_parameters()]
    assert len(set(names)) == len(names) == 760
    assert {"barylatent.7.attn.temperature", "LN.body.weight", "noise_level3.ffn.project_in.weight",
            "resup3_2.body.0.weight", "reduce_chan_level2.weight", "resreduce_noise_level1.weight",
            "encoder_level3.5.attn.qkv_dwconv.weight"} <= set(names)


def test_prompts_have_the_papers_sizes_and_are_taken_from_b_not_from_r():
    with torch.device("meta"):
        net = BaryIR(backbone="promptir")
    shapes = [list(stage.prompt.prompts.shape) for stage in (*net.bridge, net.fuse)]
    assert shapes == [[5, 64, 64, 64], [5, 128, 32, 32], [5, 320, 16, 16]]
    parameters = dict(net.named_parameters())
    widths = [parameters[f"{stage}.1.weight"].shape[1] for stage in ("bridge.0", "bridge.1", "fuse")]
    assert widths == [96 + 64, 192 + 128, 2 * 384 + 320]   # [main, prompt(main)], [b, r, prompt(b)]
    prompt = BaryIR(**SMALL, backbone="promptir").fuse.prompt
    b, r = torch.rand(2, 1, 64, 3, 5)
    appended = [prompt(torch.cat(maps, dim=1))[:, 128:] for maps in ((b, r), (b, 2 * r), (2 * b, r))]
    assert torch.equal(appended[0], appended[1]) and not torch.allclose(appended[0], appended[2])


@NETWORK
def test_textbook_form(network):
    """Outputs and gradients of the blocks as the papers write them (benchmarks/plain.py), in both layouts."""
    net, degraded = moved(network), torch.rand(2, 3, 24, 40)
    expected = plain.network(net, degraded)
    weights = [torch.randn_like(output) for output in expected]

    def gradients(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        loss = sum((w * output).sum() for w, output in zip(weights, outputs, strict=True))
        return torch.autograd.grad(loss, list(net.parameters()))

    references = gradients(expected)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        outputs = net.to(memory_format=memory_format)(degraded)
        for output, reference in zip(outputs, expected, strict=True):
            assert (output - reference).abs().max() < 1e-4 * reference.abs().max()
        for gradient, reference in zip(gradients(outputs), references, strict=True):
            assert (gradient - reference).abs().max() < 1e-3 * reference.abs().max()


def test_recomputed_blocks():
    """The same outputs and gradients, from a sixth of what the forward pass keeps for the backward pass."""
    net, degraded, kept, found = BaryIR(**SMALL, backbone="promptir"), torch.rand(2, 3, 24, 40), [], []
    names = list(net.state_dict())
    for _ in range(2):
        with torch.profiler.profile(profile_memory=True) as profile:
            restored, z, b = net(degraded)
        kept.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        loss = restored.square().mean() + (z * b).mean()
        found.append([restored, z, b, *torch.autograd.grad(loss, list(net.parameters()))])
        net.recompute_blocks()
    assert 0 < kept[1] < kept[0] / 6 and list(net.state_dict()) == names
    torch.testing.assert_close(found[1], found[0])


@BACKBONE
def test_every_parameter_gets_a_gradient_and_a_black_image_finite_ones(backbone):
    net = BaryIR(width=8, backbone=backbone)                    # the paper's depth, a sixth of its width
    net(torch.rand(1, 3, 32, 32))[0].square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    net = BaryIR(**SMALL, backbone=backbone)
    restored, z, b = net(torch.zeros(1, 3, 16, 16))
    (restored.sum() + (z - b).square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@NETWORK
def test_stages_compose_to_forward(network):
    """decode leaves the skips as they are, but where forward lets it take them."""
    net, degraded = BaryIR(**network), torch.rand(2, 3, 20, 40)
    restored, z, b = net(degraded)
    z_alone, skips = net.encode(degraded)
    b_alone = net.transport(z_alone)
    assert z.shape == b.shape == (2, 64, 3, 5) and torch.equal(z, z_alone) and torch.equal(b, b_alone)
    kept, before = list(skips), [skip.clone() for skip in skips]
    r = z - b
    first, without_r, second = (net.decode(b, residual, skips) for residual in (r, 0 * r, r))
    assert torch.equal(first, restored) and torch.equal(second, restored)
    assert torch.equal(without_r, restored) is not net.barycenter
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(skips, kept, before, strict=True))
    assert torch.equal(net.decode(b, r, skips, free_skips=True), restored)
    assert len(skips) == 1 and skips[0] is degraded


@NETWORK
def test_any_size_is_padded_and_cropped_again(network):
    """The padding reflects, or replicates where there is too little to reflect."""
    net = BaryIR(**network)
    for size in ((1, 1), (3, 2), (7, 8), (17, 33)):
        degraded = torch.rand(1, 3, *size)
        restored, z, _ = net(degraded)
        assert restored.isfinite().all() and z.shape[-2:] == tuple(-(-n // 8) for n in size)
        padded = net(pad_to_multiple(degraded, 8))[0]               # the padded image as an input of its own
        torch.testing.assert_close(restored, padded[..., :size[0], :size[1]])
    for size, row in ((6, [0, 1, 2, 3, 4, 5, 4, 3]), (3, [0, 1, 2, 2, 2, 2, 2, 2])):
        assert pad_to_multiple(torch.arange(float(size)).expand(1, 3, 1, size), 8)[0, 0].tolist() == 8 * [row]


def test_other_depth_and_wrong_arguments():
    net = BaryIR(width=8, encoder_blocks=[1, 1], decoder_blocks=[1, 1], residual_blocks=[1], heads=[1, 2, 4],
                 latent_blocks=1, transport_blocks=2, refinement_blocks=0)
    assert [output.shape[1:] for output in net(torch.rand(1, 3, 10, 10))[:2]] == [(3, 10, 10), (32, 3, 3)]
    for wrong, expected in (
        (dict(residual_blocks=[6]), "residual_blocks: 1 values, expected 2"),
        (dict(transport_blocks=0), "transport_blocks: 0, expected at least 1"),
        (dict(heads=[1, 2, 5, 8]), "cannot be split into 5 heads"),
        (dict(width=5), "width: 5, expected an even number"),
        (dict(backbone="resnet"), "backbone: resnet, expected one of restormer, promptir"),
    ):
        with pytest.raises(ValueError, match=expected):
            BaryIR(**wrong)


@BACKBONE
def test_bfloat16_gradients_point_where_float32_ones_do(backbone):
    """Cosines of each parameter's gradients: with bfloat16 sums between the blocks, some had 0.87, 0.75."""
    net = BaryIR(**SMALL, backbone=backbone)
    degraded = F.interpolate(torch.rand(2, 3, 8, 8), size=(64, 64), mode="bicubic").clamp(0, 1)     # smooth
    gradients = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            restored, _, _ = net(degraded)
        loss = (restored - degraded / 2 - 0.2).abs().mean()
        gradients.append([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    least = 1e-4 * max(float(exact.norm()) for exact in gradients[0])    # rounding decides on smaller ones
    assert min(float(F.cosine_similarity(exact, rounded, dim=0))
               for exact, rounded in zip(*gradients, strict=True) if exact.norm() > least) > 0.97


@pytest.mark.parametrize("weights", [[0.2, 0.8], [0.1, 0.2, 0.7], [1.0]])
def test_potentials_are_congruent(weights):
    """For the weights of the present options, also where those of a checkpoint were others; but not zero."""
    lambdas, uniform = torch.tensor(weights), torch.full((len(weights),), 1 / len(weights))
    potentials = Potentials(lambdas, channels=16, width=8)
    potentials.load_state_dict(Potentials(uniform, channels=16, width=8).state_dict())
    for size in [(1, 1), (16, 16)]:
        f = potentials(100 * torch.randn(4, 16, *size))
        assert f.shape == (4, len(weights)) and (len(weights) == 1 or f.std(dim=0).min() > 1e-4)
        assert (f * lambdas).sum(dim=1).abs().max() <= 1e-5 * max(1, f.abs().max())


def test_potentials_share_nothing_and_are_free_without_congruence():
    potentials = Potentials(torch.full((5,), 0.2), channels=384, congruent=False)
    assert sum(p.numel() for p in potentials.parameters()) <= 5_000_000
    f = potentials(torch.randn(2, 384, 4, 4))
    grad, = torch.autograd.grad(f[:, 0].sum(), potentials.head[2].weight)
    assert f.mean(dim=1).abs().min() > 1e-4 and grad[0].abs().max() > 0 == grad[1:].abs().max()
    with pytest.raises(ValueError, match="sum 1"):
        Potentials(torch.tensor([0.5, 0.6]))


def test_sizes_are_the_published_ones():
    """Within 1 %: the published parameters of two count six layers that are never used."""
    published = yaml.safe_load(PUBLISHED.read_text())["sizes"]
    for name in published.keys() & complexity.NETWORKS.keys():
        network = complexity.NETWORKS[name]
        sizes = [complexity.parameters(network) / 1e6, complexity.gflop(network, 256, textbook=True)]
        assert sizes == pytest.approx(published[name], rel=0.01), name
