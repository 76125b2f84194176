"""Random programs: short lists of operators on small tensors, grown from a source of random choices.

A `Random` that hypothesis provides makes them shrink. A program is a module whose forward replays recorded steps, so
that capture meets ordinary calls of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor, nn

from shardc import constrain

AXES = ("a", "b", "c")
MOST = 300  # elements of any tensor
Step = tuple[str, Callable[..., Tensor], tuple[int, ...]]


class Program(nn.Module):
    """`steps` run on parameters and inputs; the last `outputs` values are weighed into a loss or are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.returned: tuple[int, ...] = ()
        self.with_loss = True
        self.exact = True  # no step rounds to float32
        self.noise: torch.Generator | None = None

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = [*self.parameters(), *inputs]
        for _, function, operands in self.steps:
            value = function(*(values[i] for i in operands))
            if self.noise is not None and value.is_floating_point():
                value = value * (1 + 1e-14 * torch.randn(value.shape, generator=self.noise, dtype=value.dtype))
            values.append(value)
        found = [values[i] for i in self.returned]
        if not self.with_loss:
            return found
        weighed = [(torch.linspace(0.5, 1.5, f.numel(), dtype=f.dtype).view(f.shape) * f).sum() for f in found]
        return [torch.stack([w.double() for w in weighed]).sum(), *found]

    def extra_repr(self) -> str:
        return "\n".join(f"{name}{operands}" for name, _, operands in self.steps) + f"\nreturn {self.returned}"


class Grower:
    """Grows one program: `pick` and `fresh` give operands, `emit` appends a step and runs it once for its shape."""

    def __init__(self, random: Random, menu: Sequence[Callable[[Grower], None]], length: int, axes: int = 0) -> None:
        self.random = random
        self.program = Program()
        self.names = AXES[:axes]
        # handles: values that steps make are 0, 1, ...; leaves are -1, -2, ...
        self.leaves: list[Tensor] = []
        self.kinds: list[str] = []
        self.steps: list[Step] = []
        self.made: list[Tensor] = []
        for _ in range(random.randint(1, 3)):
            self.leaf([self.size() for _ in range(random.randint(1, 3))])
        for _ in range(length):
            random.choice(menu)(self)
        if self.names and random.random() < 0.3:
            constraint(self)

    def size(self) -> int:
        return self.random.choice((1, 2, 2, 3, 4, 4, 5, 6))

    def leaf(self, shape: list[int], kind: str | None = None) -> int:
        """A new parameter or input; its handle."""
        kind = kind or self.random.choice(("parameter", "parameter", "input", "grad input"))
        generator = torch.Generator().manual_seed(len(self.leaves))
        self.leaves.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.kinds.append(kind)
        return -len(self.leaves)

    def integers(self, shape: list[int], high: int) -> int:
        generator = torch.Generator().manual_seed(len(self.leaves))
        self.leaves.append(torch.randint(0, high, shape, generator=generator))
        self.kinds.append("input")
        return -len(self.leaves)

    def tensor(self, handle: int) -> Tensor:
        return self.made[handle] if handle >= 0 else self.leaves[-handle - 1]

    def shape(self, handle: int) -> list[int]:
        return list(self.tensor(handle).shape)

    def handles(self) -> list[int]:
        """Every floating value, younger ones twice, so that programs grow deep."""
        leaves = [-i - 1 for i, t in enumerate(self.leaves) if t.is_floating_point()]
        made = [i for i, t in enumerate(self.made) if t.dtype == torch.float64]
        return leaves + made + made[-3:] + made[-2:]

    def pick(self, least: int = 0, most: int = 4, test: Callable[[Tensor], bool] = lambda t: True) -> int:
        """A floating value with `least` to `most` dims that passes `test`, or a new leaf of `least` dims."""
        good = [h for h in self.handles() if least <= len(self.shape(h)) <= most and test(self.tensor(h))]
        return self.random.choice(good) if good else self.leaf([self.size() for _ in range(max(least, 1))])

    def dim(self, handle: int, signed: bool = True) -> int:
        rank = len(self.shape(handle))
        return self.random.randrange(-rank if signed else 0, rank)

    def dims(self, handle: int) -> list[int]:
        rank = len(self.shape(handle))
        return sorted(self.random.sample(range(rank), self.random.randint(1, rank)))

    def emit(self, name: str, function: Callable[..., Tensor], *operands: int) -> int | None:
        """Append a step unless its value is empty or too large."""
        state = torch.get_rng_state()
        value = function(*(self.tensor(h) for h in operands))
        torch.set_rng_state(state)
        if not 0 < value.numel() <= MOST or not torch.isfinite(value).all() or value.abs().max() > 1e4:
            return None
        self.made.append(value)
        self.steps.append((name, function, operands))
        return len(self.made) - 1

    def finish(self) -> tuple[Program, list[Tensor]]:
        program, random = self.program, self.random
        order = [i for i, kind in enumerate(self.kinds) if kind == "parameter"]
        inputs = [i for i, kind in enumerate(self.kinds) if kind != "parameter"]
        for i in order:
            program.register_parameter(
                f"w{i}", nn.Parameter(self.leaves[i].clone(), requires_grad=random.random() < 0.9)
            )
        place = {-i - 1: at for at, i in enumerate([*order, *inputs])}
        place |= {i: len(place) + i for i in range(len(self.made))}
        program.steps = [(name, function, tuple(place[h] for h in operands)) for name, function, operands in self.steps]
        used = {h for _, _, operands in self.steps for h in operands}
        ends = [i for i in range(len(self.made)) if i not in used]
        program.returned = tuple(place[i] for i in ends) or (0,)  # nothing is dead: draws of dead code are not made
        program.with_loss = random.random() < 0.7
        program.exact = not any(name == "float32" for name, _, _ in self.steps)
        tensors = [self.leaves[i].clone().requires_grad_(self.kinds[i] == "grad input") for i in inputs]
        return program, tensors


def constraint(g: Grower) -> None:
    h = g.pick(1)
    spec = random_spec(g.random, g.shape(h), dict.fromkeys(g.names, 2))
    g.emit(f"constrain{spec}", lambda x: constrain(x, spec), h)


def random_spec(random: Random, shape: list[int], axes: dict[str, int]) -> tuple[str | tuple[str, ...] | None, ...]:
    """A constraint for a tensor: mostly one that can be met, often unevenly, sometimes open, sometimes impossible."""
    free = list(axes)
    random.shuffle(free)
    spec: list[str | tuple[str, ...] | None] = []
    for size in shape:
        choice = random.random()
        if choice < 0.25:
            spec.append(None)
        elif choice < 0.45 or not free:
            spec.append("?")
        else:
            take = free[: 2 if choice > 0.93 else 1]
            if size < math.prod(axes[a] for a in take) and random.random() < 0.95:
                spec.append("?")
                continue
            free = free[len(take) :]
            spec.append(take[0] if len(take) == 1 else tuple(take))
    return tuple(spec)
