"""Problems for skip-softmax: scores in which something can be dropped, and thresholds that drop the share asked for.

Normal scores drop nothing: each block of keys holds a large one for some row. Here every stretch of keys has a level,
which all rows share. A threshold is put between two margins of the oracle that lie well apart, so that rounding decides
nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_ops.reference import SkipBlocks, skip_softmax_blocks
from fa_ops_meta import outputs
from fa_ops_meta.skip import BITS_PER_WORD

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


def oracle_bits(inputs) -> tuple[Tensor, Tensor]:
    """(block_bits, counts) that the op has to give for the Inputs of a case."""
    case, lens = inputs.case, inputs.b_seq_len
    skips = skip_softmax_blocks(
        inputs.q, inputs.k, inputs.b_start_loc, lens, case.is_causal, case.softmax_scale,
        inputs.b_start_loc_k, inputs.b_seq_len_k, window_size=case.window_size, softcap=case.softcap,
        key_mask=inputs.key_mask, skip_softmax_threshold=inputs.skip_softmax_threshold,
        skip_softmax_block=case.skip_block,
    )  # fmt: skip
    bits, counts = (t.zero_() for t in outputs.empty_skip(inputs.q, inputs.k, lens, case.skip_block))
    tile = 0
    for seq, skip in enumerate(skips):
        _, tiles, blocks = skip.visited.shape
        if case.is_padded:
            tile = seq * -(-inputs.q.shape[1] // case.skip_block[0])
        for block in range(blocks):
            kept = skip.visited[..., block] & ~skip.dropped[..., block]
            bit = torch.tensor(1 << block % BITS_PER_WORD).int()
            bits[:, tile : tile + tiles, block // BITS_PER_WORD] |= kept.to(bits) * bit.to(bits.device)
        counts[0, seq] = skip.visited.sum((1, 2))
        counts[1, seq] = (skip.visited & skip.dropped).sum((1, 2))
        tile += tiles
    return bits, counts


def _threshold(margins: list[Tensor], share: float) -> float:
    """The middle of the gap, of those wide enough, that has nearest to `share` of the margins below it."""
    values = torch.cat(margins).cpu().sort().values if margins else torch.zeros(0, dtype=torch.float64)
    below_zero = values[values < 0]
    edges = F.pad(F.pad(below_zero, (1, 0), value=float(below_zero[:1].sum()) - 1.0), (0, 1), value=0.0)
    gaps = (edges.diff() > 2 * MIN_DISTANCE).nonzero().flatten()
    nearest = gaps[(gaps - share * len(values)).abs().argmin()]
    return float(torch.exp((edges[nearest] + edges[nearest + 1]) / 2))
