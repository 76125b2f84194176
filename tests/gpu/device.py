"""The device that these tests run on, and how near to one device a mesh of parts of it must come.

They need CUDA. `SHARDC_TEST_DEVICE=cpu` tries the tests themselves where there is none.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

DEVICE = torch.device(os.environ.get("SHARDC_TEST_DEVICE", "cuda"))

needs_a_gpu = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU; SHARDC_TEST_DEVICE=cpu tries the test"
)

ROUNDED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far sums in another order may be off, relative to the norm of the whole."""


def off(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of `expected`."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / max(size, 1e-6)


def gradients_off(found: nn.Module, expected: nn.Module) -> float:
    """`off` of all gradients as one long vector. Both have the same parameters, and gradients of the same ones."""
    pairs = [(p.grad, q.grad) for p, q in zip(found.parameters(), expected.parameters(), strict=True)]
    assert [p is None for p, _ in pairs] == [q is None for _, q in pairs]
    return off(*(torch.cat([g.flatten() for g in side if g is not None]) for side in zip(*pairs, strict=True)))
