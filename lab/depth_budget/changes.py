"""What may be done to one block to save bits or weights: round its matrices, set small weights to zero, leave it out.

A configuration maps layers to changes; a layer that is not in it stays as it is:

    {5: Bits(3), 17: Pruned(0.5), 20: SKIP}
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab.interventions import fixed_norms

OFFSETS = ("whole", "least")


@dataclass(frozen=True)
class Bits:
    """Every matrix rounded to `bits` bits in groups of `group_size` neighbouring inputs (`round_to_nearest`)."""

    bits: int
    group_size: int = 64
    offset: str = "whole"

    def __post_init__(self) -> None:
        require.whole("bits", self.bits, 2, 8)
        require.whole("group_size", self.group_size, 1)
        require.one_of("offset", self.offset, OFFSETS)

    def weights(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        return [round_to_nearest(w, self.bits, self.group_size, offset=self.offset) for w in matrices]


@dataclass(frozen=True)
class Pruned:
    """In every matrix the `share` of its weights that are least in magnitude set to zero; or a share for each matrix."""

    share: float | tuple[float, ...]

    def __post_init__(self) -> None:
        for share in self.share if isinstance(self.share, tuple) else (self.share,):
            require.number("share", share, 0, 1)

    def weights(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        shares = self.share if isinstance(self.share, tuple) else (self.share,) * len(matrices)
        if len(shares) != len(matrices):
            raise ValueError(f"share has {len(shares)} numbers: a block has {len(matrices)} matrices")
        return [_pruned(w, round(share * w.numel())) for w, share in zip(matrices, shares, strict=True)]


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on every matrix, of the Frobenius norm of what another change does to it."""

    like: Bits | Pruned
    seed: int = 0

    def __post_init__(self) -> None:
        require.seed(self.seed)

    def weights(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        found = []
        for old, new in zip(matrices, self.like.weights(matrices), strict=True):
            noise = torch.randn(old.shape, generator=draw).to(old)
            found.append(old + noise * ((new - old).norm() / noise.norm()))
        return found


@dataclass(frozen=True)
class Skip:
    """The block left out: what goes in comes out."""


@dataclass(frozen=True)
class FixedNorms:
    """The block's two norms divide by sizes measured elsewhere (`lab.interventions.fixed_norms`), which `name` tells."""

    name: str
    squares: tuple[torch.Tensor, torch.Tensor] = field(repr=False, compare=False)
    first: int = 1

    def entered(self, model: TransformerBridge, layer: int) -> AbstractContextManager[None]:
        return fixed_norms(model, layer, dict(zip(("ln1", "ln2"), self.squares, strict=True)), first=self.first)


SKIP = Skip()
Change = Bits | Pruned | Noise | Skip | FixedNorms


def round_to_nearest(
    weight: Float[torch.Tensor, "output input"], bits: int, group_size: int, *, offset: str = "whole"
) -> Float[torch.Tensor, "output input"]:
    """Weights on 2^bits equal steps from the least to the greatest of each group of neighbouring inputs.

    Args:
        offset: "whole": zero lies on a step, as in packed formats: s = (max - min) / (2^b - 1), z = round(-min / s),
            (clip(round(w / s) + z, 0, 2^b - 1) - z) s. "least": the steps begin at the least weight, as in Q4_1 and in
            `lab.interventions.quantized`. A group of equal weights stays as it is.
    """
    if weight.shape[1] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the input width {weight.shape[1]}; try 16 or 32")
    groups, top = (
        weight.reshape(len(weight), -1, group_size).to(torch.promote_types(weight.dtype, torch.float32)),
        2**bits - 1,
    )
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / top).clamp_min(torch.finfo(groups.dtype).tiny)
    if offset == "least":
        found = ((groups - low) / step).round() * step + low
    else:
        zero = (-low / step).round()
        found = (((groups / step).round() + zero).clamp(0, top) - zero) * step
    return torch.where(high > low, found, groups).reshape(weight.shape).to(weight.dtype)


def bits_a_weight(bits: float | int, group_size: int) -> float | int:
    """What a rounded weight costs: its bits, and its share of the group's 16-bit step and `bits`-bit zero point.

    >>> bits_a_weight(4, 64), bits_a_weight(16, 64), bits_a_weight(0, 64)
    (4.3125, 16, 0)
    """
    return bits if bits in (0, 16) else bits + (16 + bits) / group_size


def _pruned(weight: torch.Tensor, n_zero: int) -> torch.Tensor:
    if n_zero in (0, weight.numel()):
        return weight if n_zero == 0 else torch.zeros_like(weight)
    size = weight.reshape(-1).abs().float()
    edge = float(np.partition(size.cpu().numpy(), n_zero - 1)[n_zero - 1])
    zero = size < edge
    ties = (size == edge).nonzero()[:, 0]
    zero[ties[: n_zero - int(zero.sum())]] = True  # of equals, the first ones: exactly as many as asked for
    return weight.masked_fill(zero.reshape(weight.shape), 0)
