"""Fourier transforms: transformed dims stay whole, the others split freely."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardc.rules.notation import Rule, letters, mark, parse, rule

aten = torch.ops.aten


@rule(aten._fft_c2c.default)
def complex_to_complex(x: torch.Tensor, dim: Sequence[int], *_: object) -> Rule:
    names = mark(letters(x), dim)
    return parse(f"{names} -> {names}", [{0}])


@rule(aten._fft_r2c.default)
def real_to_complex(x: torch.Tensor, dim: Sequence[int], _: int, onesided: bool) -> Rule:
    """Of a dim of n real numbers, the one-sided spectrum has n // 2 + 1 elements."""
    return _halved(x, dim, x.shape[dim[-1]] // 2 + 1 if onesided else x.shape[dim[-1]])


@rule(aten._fft_c2r.default)
def complex_to_real(x: torch.Tensor, dim: Sequence[int], _: int, size: int) -> Rule:
    return _halved(x, dim, size)


def _halved(x: torch.Tensor, dim: Sequence[int], size: int) -> Rule:
    """The rule of a transform after which the last of `dim` has `size` elements."""
    before = mark(letters(x), dim).split()
    after = [*before]
    after[dim[-1] % x.dim()] = "h!" if size != 1 else "1"
    return parse(f"{' '.join(before)} -> {' '.join(after)}", [{0}])
