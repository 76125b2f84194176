"""Scores of attention, and what follows from them. Shapes are those of `shardc.runtime.kernels.attention`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__: list[str] = []

_NOTHING = float("-inf")


@dataclass(frozen=True)
class Literals:
    """The numbers of a call of attention."""

    causal: bool
    scale: float
    window: int
    softcap: float
    dropout: float


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(x: Tensor, dim: int = 2) -> Tensor:
    """`x` with a dim for the group, of size one, if it has none."""
    return x if x.dim() == 5 else x.unsqueeze(dim)


def seen(logsumexp: Tensor) -> Tensor:
    """The log-sum-exp, with zeros for rows where everything is masked, as the CPU's kernel returns it."""
    return logsumexp.masked_fill(logsumexp == _NOTHING, 0.0)


def visible(queries: Tensor, keys: Tensor, literals: Literals) -> Tensor:
    """Whether the query at each position sees the key at each position: `[queries, keys]`."""
    ahead = queries.unsqueeze(1) - keys
    sees = torch.ones_like(ahead, dtype=torch.bool)
    if literals.causal:
        sees &= ahead >= 0
    if literals.window:
        sees &= ahead < literals.window
        if not literals.causal:
            sees &= ahead > -literals.window
    return sees


def scores_of(
    q: Tensor, k: Tensor, mask: Tensor | None, literals: Literals, queries: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The scores `[batch, kv_heads, group, queries, keys]`, and the slope of their soft cap. `q` has a group, `mask` 5
    dims."""
    dtype = compute_dtype(q.dtype)
    scores = torch.matmul(q.to(dtype), k.to(dtype).unsqueeze(2).transpose(-2, -1)) * literals.scale
    slope = None
    if literals.softcap:
        bent = torch.tanh(scores / literals.softcap)
        scores, slope = literals.softcap * bent, 1 - bent * bent
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), _NOTHING) if mask.dtype == torch.bool else scores + mask
    if literals.causal or literals.window:
        scores = scores.masked_fill(visible(queries, keys, literals).logical_not(), _NOTHING)
    return scores, slope
