"""shardc::attention against F.scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shardc.runtime import attention

PLAIN = (0, 0.0, 0.0)
"""No window, no soft cap, no dropout."""

MASK = torch.ones(4, 4, dtype=torch.bool).tril()


def masks():
    bools = torch.rand(2, 1, 5, 7) > 0.4
    bools[0, 0, 2] = False
    return {
        "none": (None, False),
        "causal": (None, True),
        "bool": (bools, False),
        "float": (torch.randn(5, 7), False),
        "row": (torch.randn(3, 1, 7), False),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value_dim", [8, 4])
@pytest.mark.parametrize("kind", list(masks()))
@pytest.mark.parametrize("inside", [False, True])
def test_equals_torch(dtype, value_dim, kind, inside):
    torch.manual_seed(0)
    mask, causal = masks()[kind]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    made = [torch.randn(2, 3, n, d, dtype=dtype) for n, d in ((5, 8), (7, 8), (7, value_dim))]
    if inside:  # the heads of a position side by side, as projections leave them
        made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    ours = [x.clone().requires_grad_() for x in made]
    theirs = [x.clone().requires_grad_() for x in made]
    out, logsumexp = attention(*ours, mask, None, None, causal, 0.3, 0, 0.0, 0.0)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=causal, scale=0.3)
    tangent = torch.randn_like(expected)
    out.backward(tangent)
    expected.backward(tangent)
    assert out.stride() == expected.stride() and logsumexp.shape == (2, 3, 5)
    torch.testing.assert_close(out, expected)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_is_a_sound_custom_op():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for args in (
        (q, k, v, None, None, None, True, 0.5, *PLAIN),
        (q, k, v[..., :4], MASK, None, None, False, 0.5, *PLAIN),
    ):
        torch.library.opcheck(torch.ops.shardc.attention.default, args)


@pytest.mark.parametrize("turned", range(4))
def test_operands_may_lie_in_memory_as_they_like(turned):
    """The CPU's kernel takes the elements of a row to be neighbours, and reads past the end where they are not."""
    torch.manual_seed(0)
    q, k, v, tangent = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7, 5))
    operands = [q, k, v, tangent]
    expected = _with_gradients(*operands)
    operands[turned] = operands[turned].mT.contiguous().mT
    torch.testing.assert_close(_with_gradients(*operands), expected)


def _with_gradients(q, k, v, tangent):
    out, logsumexp = attention(q, k, v, None, None, None, False, 0.3, *PLAIN)
    grads = torch.ops.shardc.attention_backward(tangent, q, k, v, None, None, None, out, logsumexp, False, 0.3, *PLAIN)[
        :3
    ]
    return out, logsumexp, *grads
