"""Problems for skip-softmax: scores in which something can be dropped, and thresholds that drop the share asked for.

Normal scores drop nothing: each block of keys holds a large one for some row. Here every stretch of keys has a level,
which all rows share. A threshold is put between two margins of the oracle that lie well apart, so that rounding decides
nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_ops.reference import SkipBlocks

MIN_DISTANCE = 2e-3  # of ln(threshold) from any margin
FORMS = ("number", "scalar", "sequence", "head")  # what a threshold is given as: float, (), (B,), (B, Hq)


def add_levels(q: Tensor, k: Tensor, scale: float, stretch: int, generator: torch.Generator) -> None:
    """Adds an exponentially distributed number to the scores of each stretch of keys, another one for each key head."""
    *rows, heads_kv, head_dim = k.shape
    direction = F.normalize(torch.randn(heads_kv, head_dim, generator=generator), dim=-1)
    shape = (*rows[:-1], rows[-1] // stretch + 1, heads_kv, 1)
    level = torch.empty(shape).exponential_(0.35, generator=generator).repeat_interleave(stretch, -3)
    k += (level[..., : rows[-1], :, :] * direction).to(k.dtype)
    q += (direction / scale).repeat_interleave(q.shape[-2] // heads_kv, 0).to(q.dtype)


def thresholds(skips: list[SkipBlocks], share: float, form: str) -> float | Tensor:
    """What drops about `share` of the visited blocks, as one number or, as `form` says, a tensor of them."""
    if form in ("number", "scalar"):
        threshold = _threshold([skip.margin[skip.visited] for skip in skips], share)
        return threshold if form == "number" else torch.tensor(threshold)
    if form == "sequence":
        return torch.tensor([_threshold([skip.margin[skip.visited]], share) for skip in skips])
    return torch.tensor(
        [
            [_threshold([margin[visited]], share) for margin, visited in zip(skip.margin, skip.visited, strict=True)]
            for skip in skips
        ]
    )


def _threshold(margins: list[Tensor], share: float) -> float:
    """The middle of the gap, of those wide enough, that has nearest to `share` of the margins below it."""
    values = torch.cat(margins).cpu().sort().values if margins else torch.zeros(0, dtype=torch.float64)
    below_zero = values[values < 0]
    edges = F.pad(F.pad(below_zero, (1, 0), value=float(below_zero[:1].sum()) - 1.0), (0, 1), value=0.0)
    gaps = (edges.diff() > 2 * MIN_DISTANCE).nonzero().flatten()
    nearest = gaps[(gaps - share * len(values)).abs().argmin()]
    return float(torch.exp((edges[nearest] + edges[nearest + 1]) / 2))
