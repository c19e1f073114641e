"""The K dual potentials of the barycenter problem, congruent by construction."""

import torch
from torch import Tensor, nn

from utils.distributed import average_


def congruent(g: Tensor, lambdas: Tensor) -> Tensor:
    """f_k = g_k - sum_j lambda_j g_j: sum_k lambda_k f_k = 0 for weights of sum 1. g: [B,K], lambdas: [K]."""
    return g - (g * lambdas).sum(dim=1, keepdim=True)


class Standardize(nn.Module):
    """(latent - m) / s of latents [B,C,h,w]: running mean m and deviation s of each channel of z.

    Cost and potentials then do not depend on the channels' scales, which drift as the encoder trains: the
    mean square is the quadratic cost under a diagonal metric. decay: of the running moments per step.
    """

    def __init__(self, channels: int, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.zeros(channels))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """Take the latents of a batch, of all processes, into the running moments, if all are finite."""
        moments = average_(torch.stack([z.mean(dim=(0, 2, 3)), z.square().mean(dim=(0, 2, 3))]))
        finite = moments.isfinite().all()                           # no host synchronisation
        self.steps += finite
        weight = (1 - self.decay) / (1 - self.decay**self.steps)    # at first the plain mean of all steps
        for running, batch in zip((self.mean, self.square), moments, strict=True):
            running.copy_(torch.where(finite, running.lerp(batch, weight), running))

    def forward(self, latent: Tensor) -> Tensor:
        deviation = (self.square - self.mean.square()).clamp_min(1e-8).sqrt()
        return (latent - self.mean[:, None, None]) / deviation[:, None, None]


class Potentials(nn.Module):
    """K scalar functions f_k of a latent, with sum_k lambda_k f_k = 0 everywhere.

    K free networks g_k (two 3x3 convolutions, mean over the pixels, two linear layers; each layer of all K
    is one convolution) give f_k = g_k - sum_j lambda_j g_j, congruent for any weights that sum to 1
    (Kolesov et al., ICML 2024, arXiv 2402.03828). SiLU, not ReLU: smoother potentials gave more accurate maps
    on Gaussians.
    """

    def __init__(
        self,
        lambdas: Tensor,                    # [K], weights of the sources, > 0 with sum 1
        channels: int = 384,                # of the latent (8C)
        width: int = 64,                    # hidden channels of each g_k
        congruent: bool = True,             # False: f_k = g_k, for the release's penalty
        standardized: bool = False,         # f_k of standardize(b); the cost is then measured there, too
    ) -> None:
        super().__init__()
        sources = len(lambdas)
        if lambdas.ndim != 1 or bool((lambdas <= 0).any()) or abs(float(lambdas.double().sum()) - 1) > 1e-5:
            raise ValueError(f"lambdas: {lambdas.tolist()}, expected positive weights with sum 1")
        self.congruent = congruent
        self.register_buffer("lambdas", lambdas.float(), persistent=False)   # they follow from the options
        self.standardize = Standardize(channels) if standardized else nn.Identity()
        wide, wider = sources * width, sources * 2 * width
        self.features = nn.Sequential(
            nn.Conv2d(channels, wide, 3, padding=1), nn.SiLU(),
            nn.Conv2d(wide, wider, 3, stride=2, padding=1, groups=sources), nn.SiLU(),
        )
        self.head = nn.Sequential(
            nn.Conv2d(wider, wider, 1, groups=sources), nn.SiLU(),
            nn.Conv2d(wider, sources, 1, groups=sources),
        )

    def forward(self, b: Tensor) -> Tensor:
        """Latents [B,8C,h,w] of any size -> values of all K potentials [B,K]."""
        g = self.head(self.features(self.standardize(b)).mean(dim=(2, 3), keepdim=True)).flatten(1)    # [B,K]
        return congruent(g, self.lambdas) if self.congruent else g
