"""BaryIR and its backbones in their textbook form: oracle of the tests, baseline of benchmarks/speed.py.

The blocks, the network and one training step as the authors' release computes them: layer norm on permuted
tokens, normalised copies of queries and keys, loops over the samples in the losses, the whole network once
more for the potential step. Functions take the modules of models/ and read nothing but their parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baryir import RESIDUAL_SCALE, BaryIR
from models.potentials import Potentials
from models.promptir import Prompt
from models.restormer import GDFN, MDTA, LayerNorm, TransformerBlock


def layer_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the channels of each pixel, [B,C,H,W]."""
    tokens = x.flatten(2).permute(0, 2, 1)                                                  # [B,HW,C]
    mean = tokens.mean(dim=-1, keepdim=True)
    variance = tokens.var(dim=-1, keepdim=True, unbiased=False)
    tokens = (tokens - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias
    return tokens.permute(0, 2, 1).reshape(x.shape)


def attention(mdta: MDTA, x: Tensor) -> Tensor:
    """Multi-Dconv head transposed attention (Restormer, eq. 1), [B,C,H,W]."""
    batch, channels, height, width = x.shape
    qkv = F.conv2d(x, mdta.qkv.weight)
    qkv = F.conv2d(qkv, mdta.qkv_depthwise.weight, padding=1, groups=qkv.shape[1])
    size = (batch, mdta.heads, channels // mdta.heads, height * width)
    q, k, v = (t.reshape(size) for t in qkv.chunk(3, dim=1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = (q @ k.transpose(-2, -1) * mdta.temperature).softmax(dim=-1)
    return F.conv2d((weights @ v).reshape(x.shape), mdta.project_out.weight)


def feed_forward(gdfn: GDFN, x: Tensor) -> Tensor:
    """Gated-Dconv feed-forward network (Restormer, eq. 2), [B,C,H,W]."""
    x = F.conv2d(x, gdfn.project_in.weight)
    gate, value = F.conv2d(x, gdfn.depthwise.weight, padding=1, groups=x.shape[1]).chunk(2, dim=1)
    return F.conv2d(F.gelu(gate) * value, gdfn.project_out.weight)


def block(module: TransformerBlock, x: Tensor) -> Tensor:
    x = x + attention(module.attention, layer_norm(module.norm1, x))
    return x + feed_forward(module.feed_forward, layer_norm(module.norm2, x))


def with_prompt(module: Prompt, x: Tensor) -> Tensor:
    """Prompt generation (PromptIR, section 3): [B,C,H,W] -> [B,C+P,H,W]."""
    prompt = torch.zeros((), device=x.device)
    weights = module.linear(x[:, :module.channels].mean(dim=(-2, -1))).softmax(dim=1)
    for n in range(len(module.prompts)):
        prompt = prompt + weights[:, n, None, None, None] * module.prompts[n]
    prompt = F.interpolate(prompt, x.shape[-2:], mode="bilinear")
    return torch.cat([x, F.conv2d(prompt, module.conv.weight, padding=1)], dim=1)


def run(modules: nn.Module, x: Tensor) -> Tensor:
    """A chain of prompts, transformer blocks, convolutions and pixel (un)shuffles."""
    if isinstance(modules, TransformerBlock):
        return block(modules, x)
    if isinstance(modules, Prompt):
        return with_prompt(modules, x)
    if isinstance(modules, nn.Sequential):
        for module in modules:
            x = run(module, x)
        return x
    return modules(x)


def residual_branch(net: BaryIR, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual latent [B,8C,h,w] -> what it adds to the skips of the three levels, finest first."""
    level3 = run(net.residual_up[2], net.residual_in(r))
    x = net.residual_bridge[1](run(net.residual_decoder[1], net.residual_reduce[1](level3)))
    level2 = run(net.residual_up[1], x)
    x = net.residual_bridge[0](run(net.residual_decoder[0], net.residual_reduce[0](level2)))
    return run(net.residual_up[0], x), level2, level3


def network(net: BaryIR, degraded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image [B,3,H,W], sides multiples of 8 -> restored image, z, b: the three levels, written out.

    A plain Restormer, whose fuse and bridges do nothing, or PromptIR has b = z and no residual branch.
    """
    level1 = run(net.encoder[0], net.patch_embed(degraded))
    level2 = run(net.encoder[1], run(net.down[0], level1))
    level3 = run(net.encoder[2], run(net.down[1], level2))
    b = x = z = run(net.latent, run(net.down[2], level3))
    if net.barycenter:
        z = layer_norm(net.latent_norm, z)
        b = layer_norm(net.latent_norm, run(net.transport_map, z))
        x = torch.cat([b, z - b], dim=1)
        r1, r2, r3 = residual_branch(net, z - b)
        level1, level2, level3 = (skip + RESIDUAL_SCALE * r for skip, r in
                                  ((level1, r1), (level2, r2), (level3, r3)))
    x = torch.cat([run(net.up[2], run(net.fuse, x)), level3], dim=1)
    x = run(net.bridge[1], run(net.decoder[2], net.reduce[2](x)))
    x = torch.cat([run(net.up[1], x), level2], dim=1)
    x = run(net.bridge[0], run(net.decoder[1], net.reduce[1](x)))
    x = torch.cat([run(net.up[0], x), level1], dim=1)
    x = run(net.refinement, run(net.decoder[0], x))
    return net.output(x) + degraded, z, b


def transport_cost(z: Tensor, b: Tensor, source: Tensor, gamma: float, tau: float) -> Tensor:
    """C_i with the mean square distance, sample by sample, [B]."""
    r = z - b
    costs = []
    for i in range(len(z)):
        r_i, b_i = (F.normalize(t[i].flatten(), dim=0) for t in (r, b))
        same = everything = orthogonality = torch.zeros((), device=z.device)
        for j in range(len(z)):
            r_j = F.normalize(r[j].flatten(), dim=0)
            similarity = torch.exp(r_i @ r_j / tau)
            everything = everything + similarity
            if source[i] == source[j]:
                same = same + similarity
            orthogonality = orthogonality + (b_i @ r_j) ** 2
        costs.append(((z[i] - b[i]) ** 2).mean() + gamma * (orthogonality - torch.log(same / everything)))
    return torch.stack(costs)


def training_step(net: BaryIR, potentials: Potentials, optimizers: list[torch.optim.Optimizer],
                  degraded: Tensor, clean: Tensor, source: Tensor, weights: Tensor,
                  w_rec: float = 1e4, gamma: float = 0.05, tau: float = 0.07) -> None:
    """Encoder, T and decoder descend; then the potentials, on b of the whole network, run anew."""
    restored, z, b = network(net, degraded)
    costs = transport_cost(z, b, source, gamma, tau)
    loss = w_rec * (restored - clean).abs().mean()
    for i in range(len(degraded)):
        loss = loss + weights[i] * (costs[i] - potentials(b[i:i + 1])[0, source[i]])
    optimizers[0].zero_grad()
    potentials.zero_grad()                                      # whose gradients are computed, too
    loss.backward()
    optimizers[0].step()

    with torch.no_grad():
        _, _, b = network(net, degraded)
    loss = torch.zeros((), device=degraded.device)
    for i in range(len(degraded)):
        loss = loss + weights[i] * potentials(b[i:i + 1])[0, source[i]]
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
