"""An operator of a user with two parted factors that one axis splits together, and with variants of its own.

    prefix_mix(x, y, w)[i] = x[i] * sum over j <= i of w[i, j] * y[j]

Its body holds rows `i` of x and w, and rows `j` of y, which it gathers. `w` carries both factors: it is split along i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from shardc.rules.notation import Rule, Send, Variant, Workspace, parse, rule
from shardc.runtime import Part, all_gather

SCRATCH = 1000
"""Elements a column that the roomy variant allocates for itself."""


def _mix(x: Tensor, y: Tensor, w: Tensor, first: int) -> Tensor:
    return x * (w.tril(first) @ y)


@custom_op("paired::prefix_mix", mutates_args=())
def prefix_mix(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return _mix(x, y, w, 0)


@prefix_mix.register_fake
def _(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    del y, w
    return torch.empty_like(x)


@custom_op("paired::prefix_mix_two_ways", mutates_args=())
def prefix_mix_two_ways(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return _mix(x, y, w, 0)


@prefix_mix_two_ways.register_fake
def _(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    del y, w
    return torch.empty_like(x)


def prefix_mix_in_parts(x: Tensor, y: Tensor, w: Tensor, *, i: Part, j: Part) -> Tensor:
    """This rank's rows `i`; all rows `j` are gathered."""
    gathered, length = j.gather(y, 0), j.length
    rows = [gathered[place * length : place * length + valid] for place, (_, valid) in enumerate(j.spans)]
    return _mix(x, torch.cat(rows), w, i.start)


def prefix_mix_frugal(x: Tensor, y: Tensor, w: Tensor, *, i: Part, j: Part) -> Tensor:
    """As `prefix_mix_in_parts`, in twice as many messages."""
    j.gather(y, 0)
    return prefix_mix_in_parts(x, y, w, i=i, j=j)


TEXT = "i~ d, j~ d, i~ j~ -> i~ d"


@rule(torch.ops.paired.prefix_mix.default)
def _(x: Tensor, y: Tensor, w: Tensor) -> Rule:
    del y, w
    sends = {"j": [Send(all_gather, ("j", "d"), x.element_size())]}
    return parse(TEXT, variants=[Variant("gathered", prefix_mix_in_parts, sends, together=(("i", "j"),))])


@rule(torch.ops.paired.prefix_mix_two_ways.default)
def _(x: Tensor, y: Tensor, w: Tensor) -> Rule:
    del y, w
    sent = Send(all_gather, ("j", "d"), x.element_size())
    room = (Workspace(("d",), x.element_size(), SCRATCH),)
    pair = (("i", "j"),)
    return parse(TEXT, variants=[
        Variant("frugal", prefix_mix_frugal, {"j": [sent, sent]}, pair),
        Variant("roomy", prefix_mix_in_parts, {"j": [sent]}, pair, room),
    ])  # fmt: skip
