"""Rows in the order of their experts, cut by counts that only a run knows: like the single device, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from samples import written_experts as written
from samples.written_experts import COUNT, D
from shardc.capture.trace import capture
from shardc.errors import CaptureError

EXACT: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)
X = torch.randn(24, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Work = Callable[[Any, Tensor, list[int], Tensor], Tensor]


class Sorted(written.Routed):
    """Sorts rows by expert, lets `work` make something of them, and puts the results back."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        _, weights, ids = self.route(x)
        counts = torch.bincount(ids.view(-1), minlength=COUNT)
        order = ids.view(-1).argsort(stable=True)
        made = self.work(self, x[order // self.k], counts.tolist(), counts)
        back = torch.zeros_like(made).index_copy(0, order, made)
        return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1).sin().sum()


def each(model: Any, rows: Tensor, counts: list[int]) -> list[Tensor]:
    return [expert(part) for expert, part in zip(model.experts, rows.split(counts), strict=True)]


def _passed_over(model: Any, rows: Tensor, counts: list[int]) -> Tensor:
    """The start of a segment is forgotten where the one before is empty."""
    made, start = [], 0
    for expert, count in zip(model.experts, counts, strict=True):
        if count == 0:
            continue
        made.append(expert(rows[start : start + count]))
        start = count
    return torch.cat(made)


def _doubled(rows: Tensor, counts: list[int]) -> Tensor:
    """Writes into the rows by their segments."""
    for part in rows.split(counts):
        part[:, :2].mul_(2)
    return rows


REFUSED: dict[str, Work] = {
    "an int of a tensor": lambda m, rows, n, t: torch.cat([m.experts[0](rows[: int(t[0])]), rows[int(t[0]) :]]),
    "an int of a number": lambda m, rows, n, _: rows * int(n[0]),
    "as many times": lambda m, rows, n, _: sum([rows for _ in range(n[0])], rows),
    "bits": lambda m, rows, n, _: rows * (n[0] & 1),
    "told": lambda m, rows, n, _: print(n) or rows,  # type: ignore[func-returns-value]
    "told as text": lambda m, rows, n, _: print(f"{n[0]}") or rows,  # type: ignore[func-returns-value]
    "kept": lambda m, rows, n, _: setattr(m, "load", n) or rows,  # type: ignore[func-returns-value]
    "written in place": lambda m, rows, n, _: _doubled(rows, n),
    "in another order": lambda m, rows, n, _: torch.cat(each(m, rows, n)[::-1]),
    "more than three": lambda m, rows, n, _: torch.cat([one * 2 if n[1] > 3 else one for one in each(m, rows, n)]),
    "the first changes all": lambda m, rows, n, _: torch.cat(each(m, rows, n)) * (2 if n[0] == 0 else 1),
    "two that are empty": lambda m, rows, n, _: torch.cat(each(m, rows, n)) * (2 if n[1] == 0 and n[3] == 0 else 1),
    "one that is, one that is not": lambda m, rows, n, _: torch.cat(each(m, rows, n)) * (2 if n[2] == 0 < n[4] else 1),
    "passed over": lambda m, rows, n, _: _passed_over(m, rows, n),
    "divided by a number": lambda m, rows, n, _: torch.cat([y / c for y, c in zip(each(m, rows, n), n, strict=True)]),
    "mean of rows": lambda m, rows, n, _: torch.cat([m.experts[0](p - p.mean(0)) for p in rows.split(n)]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_hangs_on_counts_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="only known when it runs"):
        capture(Sorted(REFUSED[name]).double(), (X,))


RIGHT: dict[str, tuple[Work, bool]] = {
    "divided by a tensor": (
        lambda m, rows, n, t: torch.cat([y / c.clamp(min=1) for y, c in zip(each(m, rows, n), t, strict=True)]), False
    ),
    "normed": (lambda m, rows, n, _: torch.cat([torch.layer_norm(y, [D]) for y in each(m, rows, n)]), False),
    "turned": (lambda m, rows, n, _: torch.cat(each(m, rows.flip(0), n)), True),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_done_by_row_is_right(name: str) -> None:
    """Whether it is the operator or not: routings as the router says, to one expert, and all alike."""
    work, operator = RIGHT[name]
    torch.manual_seed(0)
    model = Sorted(work).double()
    alone: nn.Module = copy.deepcopy(model)
    with torch.no_grad():
        compiled = shardc.compile(model, "ep=2", (X,), hardware="h100", memory="unbounded")
        assert any(call in compiled.code for call in forced.EXPERT_CALLS.values()) == operator
        for x in (X, X.abs() * 3, X[:1].expand_as(X)):
            torch.testing.assert_close(compiled(x), alone(x), **EXACT)
