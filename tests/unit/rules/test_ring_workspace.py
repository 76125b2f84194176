"""What a ring says that it allocates beside its results, against what ranks allocate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checks.brute_force import Call
from checks.meter import Meter
from samples.calls.sample import Sample
from shardc.ir.mesh import Mesh
from shardc.rules.factors.strategy import workspace
from shardc.rules.families.attention_workspace import Operands, whole
from shardc.runtime import Part, VirtualMesh, ring_attention, ring_attention_backward

FORWARD, BACKWARD = torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default
NONE, LITERALS = (None, None, None), (False, 0.1, 0, 0.0, 0.0)


def allocated(sample: Sample, ranks: int) -> int:
    """Bytes by the rule of a ring, without the buffers of kernels, which no meter of storages sees."""
    call, mesh = Call(sample), Mesh((("a", ranks),))
    backward = sample.target is BACKWARD
    q, k, v = sample.args[backward : 3 + backward]
    hidden = whole(Operands(q, k, v, *NONE, False, 0, 0.0), backward=backward)
    (strategy,) = [one for one in call.strategies(mesh) if one.variant == "ring"]
    buffers = sum(int(one.itemsize * one.elements) for one in hidden if not one.factors)
    return workspace(call.shape, strategy, mesh) - buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_allocates_what_it_says(ranks: int, dtype: torch.dtype) -> None:
    length = 512 * ranks
    mesh, part = VirtualMesh({"a": ranks}), Part(("a",), length)
    q, k, v = (torch.randn(1, length, 2, 64).to(dtype).transpose(1, 2) for _ in range(3))
    out, sums = FORWARD(q, k, v, *NONE, *LITERALS)
    sides: list[tuple[Tensor, ...]] = [(q, k, v), (torch.randn_like(out), q, k, v, out, sums)]

    def beside(body: object, given: tuple[Tensor, ...], rank: int) -> int:
        meter = Meter()
        meter.show(given)
        before = meter.held
        with meter:
            tensors, rest = (given, ()) if len(given) == 3 else (given[:4], given[4:])
            made = body(*tensors, *NONE, *rest, *LITERALS, r=part, s=part)  # type: ignore[operator]
        return meter.peak - before - sum(x.nbytes for x in made)

    for body, operands, target in zip(
        (ring_attention, ring_attention_backward), sides, (FORWARD, BACKWARD), strict=True
    ):

        def own(rank: int, operands: tuple[Tensor, ...] = operands) -> tuple[Tensor, ...]:
            return tuple(x.chunk(ranks, 2)[rank] for x in operands)

        # a message is there until the thread of the next rank has taken it: the shortest of several runs counts
        runs = [mesh.run(lambda *given, body=body: beside(body, given, 0), own) for _ in range(4)]
        found = min(runs, key=max)
        tensors, rest = (operands, ()) if target is FORWARD else (operands[:4], operands[4:])
        said = allocated(Sample(target, (*tensors, *NONE, *rest, *LITERALS)), ranks)
        assert max(found) == pytest.approx(said, rel=0.01)
