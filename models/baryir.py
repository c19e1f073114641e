"""The BaryIR network (Tang et al., arXiv 2505.21637 and 2602.23169) on the Restormer backbone.

    encode:     degraded image y          -> source latent z, skips
    transport:  z                         -> barycenter latent b = T(z)
    decode:     b, residual r = z - b     -> restored image
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.restormer import Down, LayerNorm, TransformerBlock, Up


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad [B,C,H,W] at the bottom and right to multiples of `multiple`: reflected, or replicated where too small."""
    for axis in (3, 2):
        size = x.shape[axis]
        pad = -size % multiple
        if pad:
            amounts = (0, pad) if axis == 3 else (0, 0, 0, pad)
            # Reflection on one axis needs the other one spelled out, too.
            x = F.pad(x, amounts + (0, 0) * (axis == 3), mode="reflect" if pad < size else "replicate")
    return x


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def compile_stages(net: "BaryIR", dynamic: bool | None = None, backend: str = "inductor") -> None:
    """torch.compile of the three stages; dynamic: for images of any size from the first one on, else from the second size on."""
    net.compiled = True
    for stage in ("encode", "transport", "decode"):
        setattr(net, stage, torch.compile(getattr(net, stage), dynamic=dynamic, backend=backend))


class BaryIR(nn.Module):
    """All-in-one restoration with a latent split into barycenter and residual. The defaults are the paper's values.

    Args:
        width: C, the channels at full size; level l has C * 2^(l-1) channels, the latent C * 2^levels (8C).
        encoder_blocks: transformer blocks of each encoder level, finest first; their number sets the depth.
        latent_blocks: blocks that end the encoder, before the layer norm that gives z.
        transport_blocks: blocks of the barycenter map T.
        decoder_blocks: blocks of each decoder level, finest first.
        residual_blocks: blocks of the residual branch at the levels 2, 3, ... (it has none at level 1).
        refinement_blocks: blocks at full size after decoder level 1.
        heads: attention heads of each level, finest first, then of the latent.
        bridge_heads: heads of the single blocks that fuse b with r and that lead from one decoder level to the next.
        expansion: hidden width of the feed-forward networks.
        residual_scale: factor of the residual branch where it joins the encoder's skip (0.8 in the release).
    """

    compiled = False                # by compile_stages

    def __init__(
        self,
        width: int = 48,
        encoder_blocks: Sequence[int] = (4, 6, 6),
        latent_blocks: int = 8,
        transport_blocks: int = 8,
        decoder_blocks: Sequence[int] = (4, 6, 6),
        residual_blocks: Sequence[int] = (6, 6),
        refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        bridge_heads: int = 4,
        expansion: float = 2.66,
        residual_scale: float = 0.8,
    ) -> None:
        super().__init__()
        levels = len(encoder_blocks)
        if levels < 2:
            raise ValueError(f"encoder_blocks: {levels} levels, expected at least 2")
        expected = {"decoder_blocks": levels, "residual_blocks": levels - 1, "heads": levels + 1}
        for name, values in (("decoder_blocks", decoder_blocks), ("residual_blocks", residual_blocks), ("heads", heads)):
            if len(values) != expected[name]:
                raise ValueError(f"{name}: {len(values)} values, expected {expected[name]} for {levels} encoder levels")
        if width % 2:
            raise ValueError(f"width: {width}, expected an even number")

        def blocks(count: int, channels: int, heads: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(channels, heads, expansion) for _ in range(count)))

        def conv1x1(channels_in: int, channels_out: int) -> nn.Conv2d:
            return nn.Conv2d(channels_in, channels_out, 1, bias=False)

        channels = [width * 2**level for level in range(levels)]    # C, 2C, 4C
        latent = self.latent_channels = width * 2**levels           # 8C
        self.multiple = 2**levels
        self.width, self.widest = width, 2 * int(expansion * 2 * width)    # channels at full size: C, and the most (feed-forward, 2C)
        self.residual_scale = residual_scale

        # Setup encoder: image -> z.
        self.patch_embed = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(blocks(n, c, h) for n, c, h in zip(encoder_blocks, channels, heads))
        self.down = nn.ModuleList(Down(c) for c in channels)
        self.latent = blocks(latent_blocks, latent, heads[-1])
        self.latent_norm = LayerNorm(latent)                        # gives z, and b: the same norm for both

        # Setup barycenter map: z -> b.
        self.transport_map = blocks(transport_blocks, latent, heads[-1])

        # Setup decoder: b, r -> image. Lists run from level 1 (full size) to the coarsest.
        self.fuse = nn.Sequential(blocks(1, 2 * latent, bridge_heads), conv1x1(2 * latent, channels[-1]))
        self.residual_in = conv1x1(latent, latent)
        self.up = nn.ModuleList(Up(c) for c in channels[1:] + channels[-1:])
        self.residual_up = nn.ModuleList(Up(2 * c) for c in channels)
        # At the entry of level l the main branch brings C 2^(l-1) channels (half of that at the coarsest), the skip as many.
        entering = channels[:-1] + [channels[-1] // 2]
        self.reduce = nn.ModuleList(
            nn.Identity() if level == 0 else conv1x1(entering[level] + c, c) for level, c in enumerate(channels)
        )
        decoder_channels = [2 * width] + channels[1:]               # level 1 keeps both halves of the concatenation
        self.decoder = nn.ModuleList(blocks(n, c, h) for n, c, h in zip(decoder_blocks, decoder_channels, heads))
        self.bridge = nn.ModuleList(nn.Sequential(blocks(1, c, bridge_heads), conv1x1(c, c)) for c in channels[1:])
        self.residual_reduce = nn.ModuleList(conv1x1(c, c) for c in channels[1:])
        self.residual_decoder = nn.ModuleList(
            blocks(n, c, h) for n, c, h in zip(residual_blocks, channels[1:], heads[1:])
        )
        self.residual_bridge = nn.ModuleList(conv1x1(c, c) for c in channels[1:])
        self.refinement = blocks(refinement_blocks, 2 * width, heads[0])
        self.output = nn.Conv2d(2 * width, 3, 3, padding=1, bias=False)

    def stage_parameters(self, stages: Sequence[str]) -> list[nn.Parameter]:
        """Parameters of some of the stages encoder (the norm, which is b's, too, included), transport_map and decoder."""
        encoder = ("patch_embed", "encoder", "down", "latent", "latent_norm")
        stage_of = {**dict.fromkeys(encoder, "encoder"), "transport_map": "transport_map"}
        return [p for name, p in self.named_parameters() if stage_of.get(name.partition(".")[0], "decoder") in stages]

    def encode(self, degraded: Tensor, run: Callable = call) -> tuple[Tensor, list[Tensor]]:
        """Image [B,3,H,W] in [0,1], any size -> source latent z [B,8C,ceil(H/8),ceil(W/8)] and the skips.

        The skips are the image itself (its size is the output's) and the features of each encoder level, finest first.
        `run` calls a module, see forward.
        """
        x = run(self.patch_embed, pad_to_multiple(degraded, self.multiple))
        skips = [degraded]
        for encoder, down in zip(self.encoder, self.down):
            x = run(encoder, x)
            skips.append(x)
            x = run(down, x)
        return self.latent_norm(run(self.latent, x)), skips

    def transport(self, z: Tensor, run: Callable = call) -> Tensor:
        """Barycenter map T: source latent z -> barycenter latent b, both [B,8C,h,w]."""
        return self.latent_norm(run(self.transport_map, z.clone()))     # strips overwrite what a block is called with

    def decode(self, b: Tensor, r: Tensor, skips: list[Tensor], run: Callable = call) -> Tensor:
        """Barycenter latent b, residual latent r = z - b (both [B,8C,h,w]) and skips -> restored image [B,3,H,W].

        The skips are taken from their list, which leaves the image alone there: each is freed as soon as it is used.
        """
        x = run(self.fuse, torch.cat([b, r], dim=1))                        # [B,4C,h,w]
        residual = run(self.residual_in, r)                                 # [B,8C,h,w]
        for level in reversed(range(len(self.up))):
            x = run(self.up[level], x)
            residual = run(self.residual_up[level], residual)
            x = torch.cat([x, torch.add(skips.pop(), residual, alpha=self.residual_scale)], dim=1)
            x = run(self.decoder[level], run(self.reduce[level], x))
            if level > 0:                                                   # on to the next finer level
                residual = run(self.residual_decoder[level - 1], run(self.residual_reduce[level - 1], residual))
                x = run(self.bridge[level - 1], x)
                residual = run(self.residual_bridge[level - 1], residual)
        x = run(self.output, run(self.refinement, x))                       # [B,3,padded H,padded W]
        degraded, = skips
        return x[..., :degraded.shape[-2], :degraded.shape[-1]] + degraded

    def forward(self, degraded: Tensor, run: Callable = call) -> tuple[Tensor, Tensor, Tensor]:
        """Degraded image [B,3,H,W] in [0,1] -> restored image [B,3,H,W] (not clipped), z and b [B,8C,h,w].

        `run` calls a module: functools.partial(models.restormer.strips, rows=...) gives the same result in bounded memory.
        """
        z, skips = self.encode(degraded, run)
        b = self.transport(z, run)
        restored = self.decode(b, z - b, skips, run)
        return restored, z, b
