"""Random numbers that do not depend on the mesh: every rank draws from the stream of the single device.

Each function draws the same numbers as torch's function of that name on the CPU, from the run's generator, and advances
it as much. Operands and results are global tensors. With parts `d0`, `d1`, ... of the dims of that number, they are the
rank's part: every rank goes through the whole stream, block by block, and keeps its part.

Where randomness is to be independent, a rank draws its part alone (`draw_from`), from a seed that all ranks have
(`fresh_seed`) and the number of the part. So ranks that hold the same part draw the same.

All functions raise RankError in a run without a random generator, but for those that are given a state or a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.kernels.bernoulli import state_of_draw
from shardc.runtime.kernels.parts import Part, by_dim
from shardc.runtime.kernels.streams import Stream, filled, mixed, number_of
from shardc.runtime.mesh.mesh import TIME, Context, current

__all__ = [
    "bernoulli",
    "bernoulli_state",
    "binomial",
    "draw",
    "draw_from",
    "fresh_seed",
    "multinomial",
    "poisson",
    "randperm",
    "rrelu",
    "sample_dirichlet",
    "standard_gamma",
]


def _generator(context: Context) -> torch.Generator:
    if context.generator is None:
        raise RankError("this run has no random generator: set RANDOM = True in the generated module")
    return context.generator


def draw(
    shape: Sequence[int],
    distribution: str,
    *parameters: float,
    dtype: torch.dtype,
    strides: Sequence[int] | None = None,
    batch: Sequence[tuple[int, int]] = (),
    **parts: Part,
) -> Tensor:
    """A tensor filled by torch's in-place method `distribution` ("uniform", "normal", "bernoulli", ...).

    `shape` is global. Eager mode draws in the order in which its result is laid out in memory. So `strides` are those
    of eager mode's result if it is not contiguous. The returned tensor is always contiguous.

    `batch` lists dims of which the micro-batch under way has a part, each with its size in all of the batch: there,
    `shape` is that of the part.
    """
    context, (whole, ours) = current(), _of_batch(shape, batch, parts)
    stream = Stream(distribution, parameters, dtype, _generator(context))
    return filled(stream, whole, strides, ours).to(context.device)


def _of_batch(
    shape: Sequence[int], batch: Sequence[tuple[int, int]], parts: Mapping[str, Part]
) -> tuple[list[int], dict[int, Part]]:
    """The shape of a draw for all of the batch, and the rank's parts of it by dim, in the micro-batch under way."""
    whole, ours = list(shape), by_dim(parts)
    for dim, size in batch:
        part = ours.get(dim, Part((), shape[dim]))
        whole[dim], ours[dim] = size, Part((TIME, *part.axes), size, part.unit)
    return whole, ours


def bernoulli_state(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """What Bernoulli numbers of global `shape` are drawn from: a state of the generator, which goes on behind them.

    `dtype` is that of the tensor into which eager mode draws. The state stays on the CPU, which draws.
    """
    return state_of_draw(_generator(current()), shape, dtype)


def bernoulli(
    state: Tensor,
    shape: Sequence[int],
    probability: float,
    *,
    dtype: torch.dtype,
    drawn: torch.dtype | None = None,
    strides: Sequence[int] | None = None,
    batch: Sequence[tuple[int, int]] = (),
    **parts: Part,
) -> Tensor:
    """Bernoulli numbers of global `shape`, in `dtype`: the same for the same `state`, as often as they are drawn.

    `drawn` is the type in which eager mode draws; `strides` and `batch` are as for `draw`.
    """
    generator = torch.Generator()
    generator.set_state(state)
    stream = Stream("bernoulli", (probability,), drawn or dtype, generator)
    whole, ours = _of_batch(shape, batch, parts)
    return filled(stream, whole, strides, ours, dtype).to(current().device)


def fresh_seed() -> Tensor:
    """What numbers are drawn from that are to be independent of all others: bytes `[8]`, on the CPU. It advances the
    generator by one number."""
    return torch.empty(1, dtype=torch.int64).random_(generator=_generator(current())).view(torch.uint8)


def draw_from(
    seed: Tensor,
    shape: Sequence[int],
    distribution: str,
    *parameters: float,
    dtype: torch.dtype,
    batch: Sequence[tuple[int, int]] = (),
    **parts: Part,
) -> Tensor:
    """A tensor of global `shape` filled by torch's in-place method `distribution`, on the rank's device: the same for
    the same `seed` and part, as often as it is drawn, and independent of other parts. `batch` is as for `draw`."""
    context, (whole, split) = current(), _of_batch(shape, batch, parts)
    local = [split[d].length if d in split else n for d, n in enumerate(whole)]
    own = mixed(number_of(seed), *(split[d].index for d in sorted(split)))
    generator = torch.Generator(context.device).manual_seed(own)
    drawn = torch.empty(local, dtype=dtype, device=context.device)
    getattr(drawn, f"{distribution}_")(*parameters, generator=generator)
    for dim, part in split.items():
        drawn = part.fill(drawn, dim, 0.0)
    return drawn


def randperm(count: int, *, dtype: torch.dtype) -> Tensor:
    """A permutation of 0 to `count` - 1."""
    context = current()
    return torch.randperm(count, dtype=dtype, generator=_generator(context)).to(context.device)


def multinomial(weights: Tensor, count: int, *, strides: Sequence[int], d0: Part | None = None) -> Tensor:
    """`count` indices a row, by weight, with replacement: `[rows, count]` from weights `[rows, choices]`.

    `strides`, here and below, are those of the operand in eager mode. With `d0`, weights and indices are the rank's
    part of the rows.
    """
    generator = _generator(current())
    if d0 is None:
        return torch.multinomial(_as_eager(weights, strides), count, True, generator=generator).to(weights.device)
    rows, result = weights[: d0.valid].cpu(), torch.zeros(d0.length, count, dtype=torch.int64)
    numbers, before = Stream("uniform", (0.0, 1.0), torch.float64, generator), min(d0.start, d0.size)
    numbers.skip(before * count)  # torch draws one number for every index
    if d0.valid:
        result[: d0.valid] = torch.multinomial(rows, count, True, generator=generator)
    numbers.skip((d0.size - before - d0.valid) * count)
    return result.to(weights.device)


def poisson(rates: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Poisson numbers, of the shape of `rates`."""
    return torch.poisson(_as_eager(rates, strides), _generator(current())).contiguous().to(rates.device)


def binomial(counts: Tensor, chances: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Numbers of successes in `counts` attempts. Both operands have the same shape and strides."""
    generator = _generator(current())
    successes = torch.binomial(_as_eager(counts, strides), _as_eager(chances, strides), generator)
    return successes.contiguous().to(counts.device)


def standard_gamma(shapes: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Gamma samples with rate one, of the shape of `shapes`."""
    samples = torch.ops.aten._standard_gamma.default(_as_eager(shapes, strides), _generator(current()))
    return samples.contiguous().to(shapes.device)


def sample_dirichlet(concentrations: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Dirichlet samples: the last dim of `concentrations` is that of the distribution."""
    samples = torch.ops.aten._sample_dirichlet.default(_as_eager(concentrations, strides), _generator(current()))
    return samples.contiguous().to(concentrations.device)


def rrelu(x: Tensor, lower: float, upper: float, *, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A leaky relu and its slopes. Slopes are drawn where `x` is not positive, and one elsewhere."""
    operand, noise = _as_eager(x, strides), torch.empty(x.shape, dtype=x.dtype)
    result = torch.ops.aten.rrelu_with_noise.default(operand, noise, lower, upper, True, _generator(current()))
    return result.contiguous().to(x.device), noise.to(x.device)


def _as_eager(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x` on the CPU, with the strides of eager mode."""
    return torch.empty_strided(x.shape, tuple(strides), dtype=x.dtype).copy_(x)


INDEPENDENT = "independent"
"""The value of `RANDOM` in a module that draws from seeds: which numbers, depends on how it splits what it draws."""

DRAWS = frozenset(
    {
        bernoulli_state,
        draw,
        fresh_seed,
        randperm,
        multinomial,
        poisson,
        binomial,
        standard_gamma,
        sample_dirichlet,
        rrelu,
    }
)
"""The functions that advance the random stream."""

REPEATABLE = frozenset({bernoulli, draw_from})
"""The functions that draw the same again for the same operands."""
