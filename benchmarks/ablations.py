"""BaryIR with parts changed, to ask what they are worth. Weights keep their names and shapes."""

from torch import Tensor

from models.baryir import BaryIR


class OneLatent(BaryIR):
    """The decoder gets zeros in the place of one of the latents. kept: both, barycenter or residual."""

    def __init__(self, kept: str = "both", **network) -> None:
        super().__init__(**network)
        self.kept = kept

    def decode(self, b: Tensor, r: Tensor, skips: list[Tensor], free_skips: bool = False) -> Tensor:
        b, r = b * (self.kept != "residual"), r * (self.kept != "barycenter")
        return super().decode(b, r, skips, free_skips)
