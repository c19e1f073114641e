"""The BaryIR network (Tang et al., arXiv 2505.21637 and 2602.23169) on a backbone, and the backbone alone.

    encode:     degraded image y          -> source latent z, skips
    transport:  z                         -> barycenter latent b = T(z)
    decode:     b, residual r = z - b     -> restored image
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.promptir import make_prompts
from models.restormer import Down, LayerNorm, TransformerBlock, Up

BRIDGE_HEADS = 4            # of the single blocks that fuse b with r and lead between levels (the release)
RESIDUAL_SCALE = 0.8        # of the residual branch where it joins the encoder's skip (the release)

# What BaryIR needs from a backbone. For another one, write these two and name it here.
#   block(channels, heads, expansion): the module that all stages are chains of, [B,C,H,W] -> [B,C,H,W]. It
#       adds its input itself. The weights that end its branches are named project_out (for branch_init).
#   prompts(width C, levels, heads): `levels` modules, for the maps of 2C, 4C, ... and for the latent. Each
#       appends `prompt_channels` channels, a multiple of `heads`, to its map (models/promptir.py). Or None.
# Inference in strips (models/strips.py) knows TransformerBlock; other blocks see the whole map.
BACKBONES = {
    "restormer": (TransformerBlock, None),
    "promptir": (TransformerBlock, make_prompts),               # BaryIR on it: our reading of the paper
}


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad [B,C,H,W] at the bottom and right to multiples of `multiple`: reflected, or else replicated."""
    for axis in (2, 3):                                         # by indices, which ONNX has for any size
        size = x.shape[axis]
        index = torch.arange((size + multiple - 1) // multiple * multiple, device=x.device)
        reflected = 2 * (size - 1) - index
        beyond = torch.where(reflected[-1] >= 0, reflected, size - 1)
        x = x.index_select(axis, torch.where(index < size, index, beyond))
    return x.contiguous(memory_format=torch.channels_last)


class Blocks(nn.Sequential):
    """A chain of transformer blocks, each of which adds to its input.

    The sums are float32, under autocast, too: rounded to bfloat16, they turn the gradients of the finest
    norms aside (benchmarks/RESULTS.md, "Speed").
    """

    recompute = False       # in training, keep of each block its input alone: the backward pass runs it again

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self:
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


class BaryIR(nn.Module):
    """All-in-one restoration, the latent split into barycenter and residual. Defaults are the paper's values.

    ..._blocks: how many transformer blocks; lists: of each level, finest first (full size, 1/2, 1/4).
    """

    def __init__(
        self,
        width: int = 48,                            # C at full size; the next levels 2C, 4C, the latent 8C
        encoder_blocks: Sequence[int] = (4, 6, 6),  # their number sets the depth, at least 2 levels
        latent_blocks: int = 8,                     # they end the encoder, before the layer norm that gives z
        transport_blocks: int = 8,                  # of the barycenter map T, at least 1
        decoder_blocks: Sequence[int] = (4, 6, 6),
        residual_blocks: Sequence[int] = (6, 6),    # of the residual branch, which has none at full size
        refinement_blocks: int = 4,                 # at full size, behind the decoder
        heads: Sequence[int] = (1, 2, 4, 8),        # of the attention, each level's, then the latent's
        expansion: float = 2.66,                    # hidden channels of the feed-forwards / channels
        backbone: str = "restormer",                # a name of BACKBONES
        barycenter: bool = True,                    # False: the plain backbone, b = z without T, no residual
        branch_init: float = 1.0,                   # factor of the initial project_out weights of all blocks
    ) -> None:
        super().__init__()
        levels = len(encoder_blocks)
        if levels < 2:
            raise ValueError(f"encoder_blocks: {levels} levels, expected at least 2")
        lists = {"decoder_blocks": decoder_blocks, "residual_blocks": residual_blocks, "heads": heads}
        for (name, given), count in zip(lists.items(), (levels, levels - 1, levels + 1), strict=True):
            if len(given) != count:
                raise ValueError(f"{name}: {len(given)} values, expected {count} for {levels} encoder levels")
        if width % 2:
            raise ValueError(f"width: {width}, expected an even number")
        if transport_blocks < 1:
            raise ValueError(f"transport_blocks: {transport_blocks}, expected at least 1")
        if backbone not in BACKBONES:
            raise ValueError(f"backbone: {backbone}, expected one of {', '.join(BACKBONES)}")
        block, prompts_of = BACKBONES[backbone]
        prompts = prompts_of(width, levels, BRIDGE_HEADS) if prompts_of else [None] * levels

        def blocks(count: int, channels: int, heads: int) -> Blocks:
            return Blocks(*(block(channels, heads, expansion) for _ in range(count)))

        def conv1x1(channels_in: int, channels_out: int) -> nn.Conv2d:
            return nn.Conv2d(channels_in, channels_out, 1, bias=False)

        def interaction(channels_in: int, channels_out: int, prompt: nn.Module | None) -> nn.Sequential:
            """The prompt appended, if any, one block, 1x1 convolution (PromptIR's prompt interaction)."""
            channels_in += prompt.prompt_channels if prompt else 0
            # Numbered as without a prompt, so that both backbones have the same names in checkpoints.
            parts = {"0": blocks(1, channels_in, BRIDGE_HEADS), "1": conv1x1(channels_in, channels_out)}
            return nn.Sequential(OrderedDict({"prompt": prompt} if prompt else {}, **parts))

        channels = [width * 2**level for level in range(levels)]    # C, 2C, 4C
        latent = self.latent_channels = width * 2**levels           # 8C
        self.multiple = 2**levels
        self.barycenter = barycenter
        self.width, self.widest = width, 2 * int(expansion * 2 * width)     # channels of maps at full size

        # Setup encoder: image -> z.
        self.patch_embed = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(map(blocks, encoder_blocks, channels, heads))
        self.down = nn.ModuleList(map(Down, channels))
        self.latent = blocks(latent_blocks, latent, heads[-1])
        self.latent_norm = LayerNorm(latent) if barycenter else nn.Identity()       # of z and b, the same one

        # Setup barycenter map: z -> b.
        self.transport_map = blocks(transport_blocks if barycenter else 0, latent, heads[-1])

        # Setup decoder: b, r -> image. Lists run from level 1 (full size) to the coarsest. A plain backbone
        # has no residual branch and, without prompts, no interactions.
        interacting = barycenter or prompts_of is not None
        decoded, fused = latent * (1 + barycenter), channels[-1] if interacting else latent
        self.fuse = interaction(decoded, fused, prompts[-1]) if interacting else nn.Identity()
        self.residual_in = conv1x1(latent, latent) if barycenter else nn.Identity()
        self.up = nn.ModuleList(Up(c) for c in [*channels[1:], fused])
        self.residual_up = nn.ModuleList(Up(2 * c) for c in channels if barycenter)
        # At the entry of a level of c channels, the main branch brings c (the coarsest: c/2), the skip c.
        entering = [2 * c for c in channels[1:-1]] + [fused // 2 + channels[-1]]
        self.reduce = nn.ModuleList([nn.Identity(), *map(conv1x1, entering, channels[1:])])
        decoder_channels = [2 * width] + channels[1:]               # level 1 keeps both halves
        self.decoder = nn.ModuleList(map(blocks, decoder_blocks, decoder_channels, heads))
        self.bridge = nn.ModuleList(
            interaction(c, c, prompt) if interacting else nn.Identity()
            for c, prompt in zip(channels[1:], prompts[:-1], strict=True)
        )
        beside = channels[1:] if barycenter else []                 # of the residual branch
        self.residual_reduce = nn.ModuleList(conv1x1(c, c) for c in beside)
        self.residual_decoder = nn.ModuleList(map(blocks, residual_blocks, beside, heads[1:]))
        self.residual_bridge = nn.ModuleList(conv1x1(c, c) for c in beside)
        self.refinement = blocks(refinement_blocks, 2 * width, heads[0])
        self.output = nn.Conv2d(2 * width, 3, 3, padding=1, bias=False)

        for name, weight in self.named_parameters():            # ours: if small, blocks begin as identities
            if name.endswith("project_out.weight"):
                weight.data.mul_(branch_init)

    def recompute_blocks(self) -> None:
        """Train in less memory from now on: the backward pass runs each block once more (Blocks)."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.recompute = True

    def encode(self, degraded: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image [B,3,H,W] in [0,1], any size -> source latent z [B,8C,ceil(H/8),ceil(W/8)] and the skips.

        The skips are the image itself (its size is the output's) and each encoder level's map, finest first.
        """
        x = self.patch_embed(pad_to_multiple(degraded, self.multiple))      # [B,C,H,W], H and W padded
        skips = [degraded]
        for encoder, down in zip(self.encoder, self.down, strict=True):     # of c = C, 2C, 4C channels
            skips.append(encoder(x))                                        # [B,c,H,W] at 1, 1/2, 1/4 size
            x = down(skips[-1])                                             # [B,2c,H/2,W/2]
        return self.latent_norm(self.latent(x)), skips                      # [B,8C,h,w], h = H/8, w = W/8

    def transport(self, z: Tensor) -> Tensor:
        """Barycenter map T: source latent z -> barycenter latent b, both [B,8C,h,w]; a plain backbone: z."""
        if not self.barycenter:
            return z
        # A copy, as strips overwrite the map that a block is given, and z is needed again.
        return self.latent_norm(self.transport_map(z.clone()))              # [B,8C,h,w]

    def decode(self, b: Tensor, r: Tensor, skips: list[Tensor], free_skips: bool = False) -> Tensor:
        """Barycenter latent b, residual latent r = z - b (both [B,8C,h,w]) and skips -> restored [B,3,H,W].

        free_skips: take each skip from the list when it is used, which bounds the memory of large images.
        """
        skips = skips if free_skips else list(skips)
        x = self.fuse(torch.cat([b, r], dim=1) if self.barycenter else b)   # [B,4C,h,w]
        residual = self.residual_in(r)                                      # [B,8C,h,w]
        for level in reversed(range(len(self.up))):                         # c = 4C, 2C, C at 1/4, 1/2, 1
            x = self.up[level](x)                                           # [B,c,H,W] (first: c/2)
            if self.barycenter:
                residual = self.residual_up[level](residual)                # [B,c,H,W]
                skips[-1] = skips[-1].add(residual, alpha=RESIDUAL_SCALE)
            x = torch.cat([x, skips.pop()], dim=1)                          # [B,2c,H,W]
            x = self.decoder[level](self.reduce[level](x))                  # [B,c,H,W] (last: 2c)
            if level > 0:                                                   # on to the next finer level
                x = self.bridge[level - 1](x)                               # [B,c,H,W]
            if level > 0 and self.barycenter:
                residual = self.residual_reduce[level - 1](residual)        # [B,c,H,W]
                residual = self.residual_decoder[level - 1](residual)       # [B,c,H,W]
                residual = self.residual_bridge[level - 1](residual)        # [B,c,H,W]
        x = self.output(self.refinement(x))                                 # [B,3,H,W], H and W padded
        degraded, = skips                                                   # [B,3,H,W]
        return x[..., :degraded.shape[-2], :degraded.shape[-1]] + degraded  # [B,3,H,W]

    def forward(self, degraded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Degraded image [B,3,H,W] in [0,1] -> restored image [B,3,H,W] (not clipped), z and b [B,8C,h,w]."""
        z, skips = self.encode(degraded)                                    # [B,8C,h,w]
        b = self.transport(z)                                               # [B,8C,h,w]
        restored = self.decode(b, z - b, skips, free_skips=True)            # [B,3,H,W]
        return restored, z, b
