"""The groups of sample calls on tensors and in layers, in the order in which their random numbers are drawn."""

from __future__ import annotations

from samples.calls.layers import attentions, bags, grids, margins, mixtures, norms, pools, whole_only, windows
from samples.calls.sample import Group
from samples.calls.tensors import contraction, draws, factories, indices, microbatches, reductions, shapes

GROUPS: tuple[Group, ...] = (
    contraction, reductions, shapes, indices, norms, windows, grids, pools, margins, bags, attentions, factories,
    draws, whole_only, mixtures, microbatches,
)  # fmt: skip
