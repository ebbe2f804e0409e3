"""Key ranges that overlap are refused where a gradient of k or v is asked for: each program stores its dK and dV."""

import pytest
import torch

import fa_ops
from fa_ops.reference import attention_reference


def attend(attention, needs_grad: str, start_k: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, 2, 16, requires_grad=name in needs_grad) for name in "qkv")
    start, length = torch.tensor([0, 20]), torch.tensor([20, 20])
    out = attention(q, k, v, start, length, b_start_loc_k=torch.tensor(start_k), b_seq_len_k=length)
    return [t for t in (q, k, v) if t.requires_grad], out


@pytest.mark.parametrize(("needs_grad", "start_k"), [("q", (0, 5)), ("qkv", (20, 0))])
def test_gradients_are_right(needs_grad, start_k):
    found, expected = (
        torch.autograd.grad(out.sum(), tensors)
        for tensors, out in (attend(f, needs_grad, start_k) for f in (fa_ops.attention, attention_reference))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("start_k", [(0, 0), (0, 19), (5, 0)])
def test_overlap_is_refused(start_k):
    _, out = attend(fa_ops.attention, "qkv", start_k)
    with pytest.raises(ValueError, match=r"^b_start_loc_k, b_seq_len_k: ranges given that overlap"):
        out.sum().backward()
