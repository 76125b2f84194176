"""Random numbers drawn in parts, block by block: the numbers, to the bit, of torch's own draw of the whole tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from shardc.runtime import Part, VirtualMesh
from shardc.runtime.kernels import random, streams

DRAWS: dict[str, tuple[float, ...]] = {
    "uniform": (-1.0, 2.0), "normal": (1.0, 2.0), "cauchy": (0.0, 1.0), "log_normal": (0.5, 1.0), "geometric": (0.3,),
    "exponential": (2.0,), "bernoulli": (0.4,), "random": (3, 90),
}  # fmt: skip
SIZES = (1, 7, 15, 16, 17, 33, 47, 48, 49, 64, 65, 97, 200)
CONTINUOUS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def types(distribution: str) -> tuple[torch.dtype, ...]:
    more = {"normal": (torch.complex64,), "bernoulli": (torch.bool, torch.int64)}
    more |= {"geometric": (torch.int64,), "random": (torch.int64, torch.int32, torch.uint8)}
    return (*CONTINUOUS, *more.get(distribution, ()))


def in_parts(
    shape: Sequence[int], strides: Sequence[int] | None, dims: Sequence[int], name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The parts of two axes of two and three ranks, put together, and the next number of the stream."""
    machine = VirtualMesh({"a": 2, "b": 3})
    parts = {f"d{dim}": Part((axis,), shape[dim]) for dim, axis in zip(dims, ("a", "b"), strict=False)}

    def draw() -> tuple[Tensor, list[slice], Tensor]:
        made = random.draw(shape, name, *DRAWS[name], dtype=dtype, strides=strides, **parts)
        spans = [slice(0, size) for size in shape]
        for dim in dims:
            part = parts[f"d{dim}"]
            assert made.shape[dim] == part.length
            made = made.narrow(dim, 0, part.valid)
            spans[dim] = slice(part.start, part.start + part.valid)
        return made, spans, random.draw([], "uniform", dtype=torch.float64)

    torch.manual_seed(5)
    whole = torch.zeros(tuple(shape), dtype=dtype)
    for made, spans, _ in (ran := machine.run(draw, lambda _: (), random=True)):
        whole[tuple(spans)] = made
    assert len({after.item() for *_, after in ran}) == 1
    return whole, ran[0][2]


def on_one(shape: Sequence[int], strides: Sequence[int] | None, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    x = torch.empty(tuple(shape), dtype=dtype)
    if strides is not None:
        x = torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype)
    getattr(x, f"{name}_")(*DRAWS[name])
    return x, torch.empty([], dtype=torch.float64).uniform_()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK", 32)


@pytest.mark.parametrize("name", DRAWS)
def test_vectors_of_any_length(name: str) -> None:
    for dtype, size in itertools.product(types(name), SIZES):
        found = in_parts([size], None, [0], name, dtype), on_one([size], None, name, dtype)
        for actual, right in zip(*found, strict=True):
            assert torch.equal(actual, right), (dtype, size)


@pytest.mark.parametrize("name", DRAWS)
def test_tensors_in_any_memory(name: str) -> None:
    for shape, strides in (
        ((6, 5), None), ((2, 3, 50), None), ((3, 100), None), ((6, 5), (1, 6)), ((3, 4, 5), (5, 15, 1)),
        ((4, 6), (12, 2)), ((4, 1, 40), (40, 40, 1)), ((1, 2, 70), None),
    ):  # fmt: skip
        for dims in ((0,), (len(shape) - 1,), (0, len(shape) - 1), (1, 0)):
            for dtype in (torch.float32, torch.float64):
                found = in_parts(shape, strides, dims, name, dtype), on_one(shape, strides, name, dtype)
                for actual, right in zip(*found, strict=True):
                    assert torch.equal(actual, right), (shape, strides, dims, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 9])
def test_samples_of_rows(count: int, dtype: torch.dtype) -> None:
    machine = VirtualMesh({"a": 4})
    for rows, columns in ((5, 7), (8, 40), (4, 9)):
        for weights in (torch.rand(rows, columns), torch.rand(columns, rows).t()):
            weights, part = weights.to(dtype), Part(("a",), rows)

            def draw(weights: Tensor = weights, part: Part = part) -> tuple[Tensor, Tensor]:
                own = torch.full((part.length, weights.shape[1]), float("nan"), dtype=dtype)
                own[: part.valid] = weights[part.start : part.start + part.valid]
                made = random.multinomial(own, count, strides=weights.stride(), d0=part)
                return made[: part.valid], random.draw([], "uniform", dtype=torch.float64)

            torch.manual_seed(5)
            ran = machine.run(draw, lambda _: (), random=True)
            torch.manual_seed(5)
            assert torch.equal(torch.cat([own for own, _ in ran]), torch.multinomial(weights, count, True))
            after = torch.empty([], dtype=torch.float64).uniform_()
            assert all(torch.equal(own, after) for _, own in ran)


def test_one_number_into_another_type() -> None:
    for seed in range(4):
        state = torch.Generator().manual_seed(seed).get_state()
        machine = VirtualMesh({"a": 2})
        made = machine.run(
            lambda state=state: random.bernoulli(state, [], 0.4, dtype=torch.bool, drawn=torch.float64), lambda _: ()
        )
        right = torch.empty((), dtype=torch.float64).bernoulli_(0.4, generator=torch.Generator().manual_seed(seed))
        assert all(torch.equal(one, right.bool()) for one in made)
