"""Which sizes change from call to call: found by comparing calls, as torch.compile does.

model(x[4, 12], mask[4, 12])
model(x[4, 16], mask[4, 16])     ->    {0: {1: "s0"}, 1: {1: "s0"}}     dim 1 of both changes; the two are equal
model(x[6, 20], mask[6, 20])     ->    {0: {0: "s0", 1: "s1"}, 1: {0: "s0", 1: "s1"}}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from shardc.ir.model_call import Dims

Place = tuple[int, int]
"""A dim of a flat input: the input's index, and the dim's."""


class Growth(NamedTuple):
    """What is known to grow from call to call in the inputs of a call: `lengths`, with which masks grow, and `counts`,
    with which nothing else does. What stands `still` grows no more, or never did."""

    lengths: list[Place]
    counts: list[Place]
    still: set[Place]

    @property
    def known(self) -> bool:
        """Whether anything grows."""
        return bool(self.lengths or self.counts)


class Longer(str):
    """The name of a size that is another one and `more`: that of a mask beside what is cached."""

    def __new__(cls, name: str, more: int) -> Longer:
        """`name` is that of the other size."""
        made = super().__new__(cls, f"{name}+{more}")
        made.name, made.more = name, more
        return made

    name: str
    more: int


class ChangingSizes:
    """The sizes of calls that have as many inputs, of as many dims, as one another. `named` are dims that the user has
    named; these keep their names."""

    def __init__(self, named: Dims) -> None:
        self._named = named
        self._seen: dict[Place, tuple[int, ...]] = {}

    def see(self, leaves: Sequence[Any], grown: Growth) -> Dims:
        """The dims that change, as far as the calls until this one show, and what is known to have `grown`. Of ints,
        those that are known to grow.

        Dims whose sizes were equal in every call have one name. Sizes of zero and one never change: they broadcast.
        What is one longer than a growing length grows with it, as masks do with what is cached. So does what changes
        and was as much longer in every call.
        """
        growing = {*grown.lengths, *grown.counts}
        for index, leaf in enumerate(leaves):
            told = isinstance(leaf, Tensor) or (index, 0) in growing
            for dim, size in enumerate(_sizes(leaf) if told else ()):
                if dim not in self._named.get(index, ()) and size > 1:
                    self._seen[index, dim] = (*self._seen.get((index, dim), ()), int(size))
        longer = {self._seen[one][-1] + more for one in grown.lengths if one in self._seen for more in (0, 1)}
        caches = {index for index, _ in (*growing, *grown.still)}

        def changes(place: Place, sizes: tuple[int, ...]) -> bool:
            return len(set(sizes)) > 1 or place in growing or (sizes[-1] in longer and place[0] not in caches)

        changing = {
            place: sizes for place, sizes in self._seen.items() if changes(place, sizes) and place not in grown.still
        }
        taken = {name for dims in self._named.values() for name in dims.values()}
        names = dict(zip(dict.fromkeys(changing.values()), _fresh(taken), strict=False))
        dims = {index: dict(named) for index, named in self._named.items()}
        lengths = dict.fromkeys(changing[place] for place in grown.lengths if place in changing)
        for (index, dim), sizes in changing.items():
            longer_ones = () if index in caches else (_longer(sizes, length, names[length]) for length in lengths)
            dims.setdefault(index, {})[dim] = next(filter(None, longer_ones), names[sizes])
        return dims


def _longer(sizes: tuple[int, ...], length: tuple[int, ...], name: str) -> Longer | None:
    """The name of what had these sizes, if it was longer than `length`, in every call as much."""
    more = {size - other for size, other in zip(sizes, length, strict=False)}
    same = len(sizes) == len(length) and len(more) == 1 and min(more) > 0
    return Longer(name, more.pop()) if same else None


def _fresh(taken: Collection[str]) -> Iterable[str]:
    return (name for name in (f"s{number}" for number in range(10**6)) if name not in taken)


def fixed_sizes(leaves: Sequence[Any], dims: Mapping[int, Collection[int]]) -> tuple[Any, ...]:
    """The sizes of all tensors, and all ints, without those of `dims`: what one captured program is for."""
    return tuple(
        [
            tuple([size for dim, size in enumerate(_sizes(leaf)) if dim not in dims[index]])
            if index in dims
            else _sizes(leaf)
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) or type(leaf) is int
        ]
    )


def _sizes(leaf: Any) -> Sequence[int]:
    return leaf.shape if isinstance(leaf, Tensor) else (leaf,)
