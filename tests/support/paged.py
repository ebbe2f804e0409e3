"""A paged cache made of any problem's keys: pages in an order of their own, NaN in the rows that nobody may read, and
numbers far out of range in the entries of the table that nobody may read."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

import fa_ops
from tests.support.cases import Inputs
from tests.support.memory import Canaries
from tests.support.problems import op_arguments, small_case

UNREADABLE = 0x2A5A_5A5A  # a page number far outside of any cache
SPARE_PAGES, SPARE_ENTRIES = 2, 2


def to_pages(
    canaries: Canaries, k: Tensor, v: Tensor, start: Tensor, length: Tensor, page_size: int, index_dtype=torch.int32
) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, block_table): the sequences' rows of packed or padded k and v in shuffled pages."""
    lengths = length.tolist()
    counts = [-(-n // page_size) for n in lengths]
    order = list(range(sum(counts) + SPARE_PAGES))
    random.Random(page_size).shuffle(order)
    table = torch.full((len(counts), max(counts, default=0) + SPARE_ENTRIES), UNREADABLE, dtype=index_dtype)
    caches = [t.new_full((len(order), page_size, *t.shape[-2:]), torch.nan) for t in (k, v)]
    for seq, (first, n, count) in enumerate(zip(start.tolist(), lengths, counts, strict=True)):
        pages = torch.tensor([order.pop() for _ in range(count)], dtype=torch.long)
        table[seq, :count] = pages
        for t, cache in zip((k, v), caches, strict=True):
            own = (t[seq] if t.dim() == 4 else t)[first : first + n]
            key = torch.arange(n)
            cache[pages[key // page_size], key % page_size] = own
    k, v = (canaries.place(cache, name=name) for name, cache in zip(("k pages", "v pages"), caches, strict=True))
    return k, v, canaries.place(table.to(k.device), name="block_table")


def paged(page_size: int, is_head_major: bool = False) -> Callable:
    """`fa_ops.attention` through a paged cache that is made of the k and v of each call."""

    def attention(
        q, k, v, b_start_loc, b_seq_len, max_input_len, is_causal, softmax_scale, b_start_loc_k, b_seq_len_k,
        max_input_len_k, *, key_mask=None, **options,
    ):  # fmt: skip
        assert key_mask is None
        canaries = Canaries()
        start = b_start_loc if b_start_loc_k is None else b_start_loc_k
        length = b_seq_len if b_seq_len_k is None else b_seq_len_k
        k, v, block_table = to_pages(canaries, k, v, start, length, page_size, length.dtype)
        if is_head_major:  # (pages, Hkv, page size, D) in memory
            k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        results = fa_ops.attention(
            q, k, v, b_start_loc, b_seq_len, max_input_len, is_causal, softmax_scale, None, length, max_input_len_k,
            block_table=block_table, **options,
        )  # fmt: skip
        canaries.check()
        return results

    return attention


def check_page_numbers_are_clamped(page_size: int) -> None:
    """Whatever numbers a table holds, they lead to pages."""
    inputs = small_case(lens_q=(1, 5), lens_k=(40, 9)).build()
    q, k, v, *others = paged_arguments(inputs, page_size)
    names = [argument.name for argument in torch.ops.modelopt.varlen_attention.default._schema.arguments]
    given = dict(zip(names, (q, k.nan_to_num(), v.nan_to_num(), *others), strict=True))
    wild = given["block_table"].clone()
    wild[0, ::2], wild[1, ::2] = -5, UNREADABLE
    found, expected = (
        torch.ops.modelopt.varlen_attention(**given | {"block_table": table})[0]
        for table in (wild, wild.clamp(0, len(k) - 1))
    )
    assert torch.equal(found, expected)


def paged_arguments(inputs: Inputs, page_size: int) -> tuple:
    """What `torch.ops.modelopt.varlen_attention` takes, with the keys and values of `inputs` in a paged cache."""
    start = inputs.b_start_loc if inputs.b_start_loc_k is None else inputs.b_start_loc_k
    length = inputs.b_seq_len if inputs.b_seq_len_k is None else inputs.b_seq_len_k
    k, v, block_table = to_pages(inputs.canaries, inputs.k, inputs.v, start, length, page_size, length.dtype)
    names = [argument.name for argument in torch.ops.modelopt.varlen_attention.default._schema.arguments]
    given = dict(zip(names, op_arguments(inputs), strict=True))
    given |= {"k": k, "v": v, "b_start_loc_k": None, "b_seq_len_k": length, "block_table": block_table}
    return tuple(given.values())
