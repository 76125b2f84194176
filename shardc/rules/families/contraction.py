"""Matrix products: the contracted factor is reduced, and a product is linear in each operand alone."""

from __future__ import annotations

import torch

from shardc.rules.notation import Rule, Variant, fixed, named, named_dims, parse, rule
from shardc.rules.ring import Ring
from shardc.runtime.kernels import matmul_rings, widening

aten = torch.ops.aten


def _rings(first: int = 0) -> list[Variant]:
    """Collective products: the operand numbered `first`, or that after it, or sums go round
    (docs/design/operators/collective-matmul.md)."""
    adds = first > 0
    return [
        Variant(
            "ring_lhs", matmul_rings.add_ring_lhs if adds else matmul_rings.ring_lhs,
            ring=Ring((("n", "m"), ("n", "k")), operand=first),
        ),
        Variant(
            "ring_rhs", matmul_rings.add_ring_rhs if adds else matmul_rings.ring_rhs,
            ring=Ring((("m", "n"), ("m", "k")), operand=first + 1),
        ),
        Variant(
            "ring_sum", matmul_rings.add_ring_sum if adds else matmul_rings.ring_sum,
            ring=Ring((("k", "m"), ("k", "n"))),
        ),
    ]  # fmt: skip


fixed(aten.mm.default, text="m k, k n -> m n", linear=[{0}, {1}], flops=["m k n"], variants=_rings())
fixed(aten.bmm.default, text="b m k, b k n -> b m n", linear=[{0}, {1}], flops=["b m k n"], variants=_rings())
fixed(aten.dot.default, text="k, k -> ", linear=[{0}, {1}], flops=["k"])
fixed(aten.mv.default, text="m k, k -> m", linear=[{0}, {1}], flops=["m k"])


@rule(aten.addmm.default)
def addmm(bias: torch.Tensor, *_: object, **__: object) -> Rule:
    text = f"{_bias(bias, 'mn')}, m k, k n -> m n"
    return parse(text, [{0, 1}, {0, 2}], flops=["m k n"], variants=_rings(1))


@rule(aten.baddbmm.default)
def baddbmm(bias: torch.Tensor, *_: object, **__: object) -> Rule:
    text = f"{_bias(bias, 'bmn')}, b m k, b k n -> b m n"
    return parse(text, [{0, 1}, {0, 2}], flops=["b m k n"], variants=_rings(1))


@rule(aten._scaled_mm.default)
def scaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_x: torch.Tensor,
    scale_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *_: object,
) -> Rule:
    """A product of 8-bit numbers. Scales are one number, or one a row of `x` and one a column of `weight`; where they
    are of blocks, nothing is split. A sum in 8 bits is not put together of parts, nor are operands sums in parts."""
    m, k, n = int(x.shape[0]), int(x.shape[1]), int(weight.shape[1])
    shown = [_scale(scale_x, "m", (m, 1)), _scale(scale_weight, "n", (1, n))]
    whole = None in shown or scale_result is not None
    narrow = (out_dtype or x.dtype).itemsize == 1
    # the kernel needs k and n in multiples of 16: they are split only if parts for up to 16 ranks are
    rows = "m!" if whole else "m"
    inner = "k!" if whole or narrow or bias is not None or k % 256 else "k"
    columns = "n!" if whole or n % 256 else "n"
    operands = [f"{rows} {inner}", f"{inner} {columns}"]
    for one, scale, factor in zip(shown, (scale_x, scale_weight), (rows, columns), strict=True):
        operands.append(" ".join("s!" for _ in scale.shape) if one is None else one.replace(factor[0], factor))
    operands += [columns] if bias is not None else []
    operands += ["1" if scale_result.dim() else ""] if scale_result is not None else []
    text = f"{', '.join(operands)} -> {rows} {columns}"
    return parse(text, flops=["m k n"], body=widening.scaled_mm, even=True)


def _scale(scale: torch.Tensor, factor: str, shape: tuple[int, int]) -> str | None:
    """The dims of a scale: of one number, or of one a row (a column). None for any other."""
    if scale.numel() == 1:
        return " ".join("1" for _ in scale.shape)
    return " ".join(factor if size > 1 else "1" for size in shape) if tuple(scale.shape) == shape else None


@rule(aten._grouped_mm.default)
def grouped(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None = None, *_: object) -> Rule:
    """One product for each group. `offsets` are the ends of the groups in the flat dim; it and the groups stay
    whole."""
    left = {3: "g! m k", 2: "m! k" if weight.dim() == 3 else "m k!"}[x.dim()]
    right = {3: "g! k n", 2: "k n!" if x.dim() == 3 else "k! n"}[weight.dim()]
    result = "g! m n" if x.dim() == weight.dim() else "m! n" if x.dim() == 2 else "m n!"
    if offsets is None:
        left, right, result = "g m k", "g k n", "g m n"
    # the kernel needs strides of whole 16 bytes, so a dim is split only if parts for up to 16 ranks have such strides
    unit = 16 * 16 // x.element_size()
    m, k, n = int(x.shape[-2]), int(x.shape[-1]), int(weight.shape[-1])
    stuck = {name for name, size in (("m", m), ("k", k), ("n", n)) if size % unit}
    if offsets is None:
        stuck = set[str]()
    text = f"{left}, {right}{', g!' if offsets is not None else ''} -> {result}"
    text = " ".join(
        f"{word.rstrip(',')}!{',' * word.endswith(',')}" if word.rstrip(",") in stuck else word for word in text.split()
    )
    return parse(_ones(text, x, weight, offsets), [{0}, {1}], flops=["m k n"], even=True)


@named("transformers.grouped_mm_fallback.default")
def grouped_fallback(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> Rule:
    return parse(_ones("m! k, g! k n, g! -> m! n", x, weight, offsets), [{0}, {1}], flops=["m k n"])


@named("transformers.grouped_mm_fallback_backward.default")
def grouped_fallback_backward(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, grad: torch.Tensor) -> Rule:
    text = _ones("m! k, g! k n, g!, m! n -> m! k, g! k n", x, weight, offsets, grad)
    return parse(text, [{3}], reads=[{1, 2, 3}, {0, 2, 3}], flops=["m k n", "m k n"])


def _ones(text: str, *operands: torch.Tensor | None) -> str:
    """`text` with `1` in place of every factor of size one."""
    left, right = text.split(" -> ")
    sizes: dict[str, int] = {}
    for names, x in zip(left.split(", "), operands, strict=False):
        if x is not None:
            sizes |= {name.rstrip("!"): int(n) for name, n in zip(names.split(), x.shape, strict=True)}

    def shown(part: str) -> str:
        return " ".join("1" if sizes[name.rstrip("!")] == 1 else name for name in part.split())

    return " -> ".join(", ".join(shown(part) for part in side.split(", ")) for side in (left, right))


def _bias(bias: torch.Tensor, names: str) -> str:
    return named_dims(bias, names[len(names) - bias.dim() :])
