"""`shardc.constrain`: the user says, in the code or by module path, how a value must lie on the mesh."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from shardc.errors import LayoutError
from shardc.ir.layout import Layout
from shardc.runtime.mesh.orders import ORDERS, axis_of, in_order, order_of

OPEN = "?"
"""A dim about which the constraint says nothing."""

Dim = tuple[str, ...] | None
"""The axes that split a dim, major to minor (`()`: kept whole), or None where the dim is open."""

Spec = str | Sequence[str | Sequence[str] | None]

_capturing = False


@torch.library.custom_op("shardc::constrain", mutates_args=())
def _constrain(x: torch.Tensor, spec: str) -> torch.Tensor:
    return x.clone()


@_constrain.register_fake
def _constrain_fake(x: torch.Tensor, spec: str) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("shardc::retile", mutates_args=())
def _retile(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """The identity, between a parameter stored one way and used another; `dims` have other atoms on the two sides."""
    return x.clone()


@_retile.register_fake
def _retile_fake(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    return torch.empty_like(x)


def _remember_spec(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor, str], output: object) -> None:
    ctx.spec = inputs[1]  # type: ignore[attr-defined]


def _constrain_cotangent(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.shardc.constrain(grad, ctx.spec), None  # type: ignore[attr-defined]


_constrain.register_autograd(_constrain_cotangent, setup_context=_remember_spec)


def constrain(x: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Demand that `x` lie as `spec` says; outside of a capture this is the identity.

    `spec` has one entry per dim: an axis name, a tuple of axis names (major to minor), None to keep the dim whole, or
    "?" to leave it open: `constrain(x, ("dp", None, ("sp", "tp"), "?"))`. Its text form is `"dp,-,(sp,tp),?"`. A layout
    as plans print it does as well: `constrain(x, "f32[32@dp, 64]")`. An axis that is to fold the dim is written as
    `"cp~folded"`.
    """
    text = serialise(spec)
    check(text, x.ndim, "constrain")
    return torch.ops.shardc.constrain(x, text) if _capturing else x


def serialise(spec: Spec) -> str:
    """The text form of `spec`: `("dp", None, ("sp", "tp"), "?")` becomes `"dp,-,(sp,tp),?"`, and `"f32[32@dp, 64]"` is
    `"[32@dp, 64]"`."""
    if isinstance(spec, str):
        layout = printed_layout(spec)
        return spec_text(parse(spec)) if layout is None else str(layout)
    return spec_text(tuple(_dim(entry) for entry in spec))


def parse(text: str) -> tuple[Dim, ...]:
    """The inverse of `serialise`: per dim its axes, `()` where it is kept whole, None where it is open."""
    if not text.strip():
        return ()
    layout = printed_layout(text)
    if layout is not None:
        return tuple(tuple(axis for atom in dim for axis in atom.axes) for dim in layout.dims)
    entries = re.split(r",(?![^(]*\))", text)
    return tuple(_dim(_unbracket(entry.strip())) for entry in entries)


def printed_layout(text: str) -> Layout | None:
    """The layout of a spec that is written as plans print it, `f32[32@dp, 64]`; None for any other. Raises LayoutError
    for one that cannot be read, or has partial sums."""
    if "[" not in text:
        return None
    layout = Layout.parse(text)
    if layout.partial:
        pending = "".join(f" +{op}@{axis}" for axis, op in layout.partial)
        raise LayoutError(f"{text}: a constraint cannot leave a value in parts; leave out{pending}")
    return layout


def check(text: str, rank: int, place: str) -> None:
    """Raise LayoutError if the spec does not fit a tensor of `rank` dims, or uses an axis twice."""
    dims = parse(text)
    if len(dims) != rank:
        raise LayoutError(
            f"{place}: the spec ({text}) has {len(dims)} entries but the tensor has {rank} dims; "
            'give one entry per dim: an axis, a tuple of axes, None to keep it whole, or "?" to leave it open'
        )
    axes = [axis_of(axis) for dim in dims for axis in dim or ()]
    for axis in axes:
        if axes.count(axis) > 1:
            raise LayoutError(f"{place}: the spec ({text}) uses axis {axis!r} twice; an axis splits one dim at most")


@contextmanager
def recording() -> Generator[None]:
    """While this is open, `constrain` leaves its operator in the graph."""
    global _capturing
    before, _capturing = _capturing, True
    try:
        yield
    finally:
        _capturing = before


def _unbracket(entry: str) -> str | tuple[str, ...]:
    if entry.startswith("(") and entry.endswith(")"):
        return tuple(axis.strip() for axis in entry[1:-1].split(",") if axis.strip())
    return entry


def _dim(entry: str | Sequence[str] | None) -> Dim:
    if entry is None or entry == "-":
        return ()
    if entry == OPEN:
        return None
    axes = (entry,) if isinstance(entry, str) else tuple(entry)
    for axis in axes:
        if (
            not axis_of(axis).isidentifier()
            or in_order(axis_of(axis), order_of(axis)) != axis
            or (order_of(axis) not in ORDERS)
        ):
            raise LayoutError(f'{entry!r} is no axis name; an entry is an axis, a tuple of axes, None or "-", or "?"')
    return axes


def spec_text(dims: tuple[Dim, ...]) -> str:
    """The inverse of `parse`."""

    def one(dim: Dim) -> str:
        if dim is None:
            return OPEN
        if len(dim) == 1:
            return dim[0]
        return f"({','.join(dim)})" if dim else "-"

    return ",".join(one(dim) for dim in dims)
