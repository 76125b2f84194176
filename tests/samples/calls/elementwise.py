"""Sample calls of elementwise operators: one of each kind of broadcasting, and the ones whose partial operands pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from samples.calls.sample import Group, Sample, View, boolean, positive, real, whole
from shardc.ir.precision import GRADIENT_CAST

aten = torch.ops.aten

UNARY = (
    aten.neg.default, aten.rsqrt.default, aten.sqrt.default, aten.cos.default, aten.sin.default, aten.exp.default,
    aten.log.default, aten.log1p.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.gelu.default, aten.abs.default, aten.sign.default, aten.reciprocal.default, aten.erf.default,
    aten.floor.default,
    aten.ceil.default, aten.round.default, aten.isnan.default, aten.isinf.default, aten.logical_not.default,
    aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.leaky_relu.default, aten.elu.default,
    aten.softplus.default, aten.mish.default, aten.clone.default, aten.zeros_like.default, aten.ones_like.default,
    aten.expm1.default, aten.log2.default, aten.positive.default, aten.square.default, aten.trunc.default,
    aten.logit.default, aten.erfinv.default,
)  # fmt: skip
BINARY = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default,
    aten.pow.Tensor_Tensor, aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor,
    aten.ge.Tensor,
    aten.atan2.default, aten.remainder.Tensor, aten.fmod.Tensor, aten.floor_divide.default, aten.hypot.default,
    aten.xlogy.Tensor, aten.logaddexp.default, aten.copysign.Tensor, aten.rsub.Tensor,
)  # fmt: skip
BITWISE = (
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.logical_and.default,
    aten.logical_or.default, aten.logical_xor.default,
)  # fmt: skip
SCALAR: tuple[tuple[Any, Any], ...] = (
    (aten.add.Scalar, 2.0), (aten.sub.Scalar, 2.0), (aten.mul.Scalar, 2.0), (aten.div.Scalar, 2.0),
    (aten.pow.Tensor_Scalar, 3),
    (aten.eq.Scalar, 0), (aten.ne.Scalar, 0), (aten.lt.Scalar, 0), (aten.le.Scalar, 0), (aten.gt.Scalar, 0),
    (aten.ge.Scalar, 0), (aten.remainder.Scalar, 2.0), (aten.fmod.Scalar, 2.0), (aten.rsub.Scalar, 1.0),
    (aten.clamp_min.default, 0.0), (aten.clamp_max.default, 0.0), (aten.fill.Scalar, 2.0),
    (aten.full_like.default, 3.0),
    (aten.add.Tensor, 2.0), (aten.sub.Tensor, 2.0), (aten.mul.Tensor, 2.0), (aten.div.Tensor, 2.0),
)  # fmt: skip
BACKWARD: tuple[tuple[Any, tuple[Any, ...]], ...] = (
    (aten.threshold_backward.default, (0,)), (aten.gelu_backward.default, ()), (aten.tanh_backward.default, ()),
    (aten.sigmoid_backward.default, ()), (aten.silu_backward.default, ()), (aten.hardswish_backward.default, ()),
    (aten.hardsigmoid_backward.default, ()), (aten.hardtanh_backward.default, (-1.0, 1.0)),
    (aten.leaky_relu_backward.default, (0.1, False)),
    (aten.softplus_backward.default, (1.0, 20.0)), (aten.mish_backward.default, ()),
    (aten.logit_backward.default, (None,)),
)  # fmt: skip


def unary() -> Iterator[Sample]:
    for operator in UNARY:
        yield Sample(operator, (positive(6, 1, 2),))
    for operator in (aten.clone.default, aten.neg.default, aten.relu.default):
        yield Sample(operator, (real(),))
        yield Sample(operator, (whole(5, 6),))
        yield Sample(operator, (View(real(6, 1, 2), aten.expand.default, ([6, 12, 2],)),))
    yield Sample(aten.clone.default, (View(real(2, 6, 2), aten.view.default, ([12, 2],)),))
    yield Sample(aten.clone.default, (View(real(6, 1, 2), aten.squeeze.dim, (1,)),))
    yield Sample(aten.clone.default, (View(real(6, 2), aten.unsqueeze.default, (1,)),))
    yield Sample(aten.clone.default, (View(real(6, 2, 3), aten.permute.default, ([2, 0, 1],)),))
    yield Sample(aten.clone.default, (View(real(2), aten.expand.default, ([6, 2],)),))
    yield Sample(aten.clone.default, (View(real(2, 1, 3), aten.squeeze.default, ()),))
    yield Sample(aten.clone.default, (boolean(6, 2),))
    yield Sample(aten.empty_like.default, (real(6, 2),), values=[])
    for given, dtype in (
        (real(6, 2), torch.float32),
        (whole(5, 6, 2), torch.float64),
        (real(6, 2), torch.int64),
        (boolean(6, 2), torch.float64),
        (real(6, 2), torch.bool),
        (real(6, 1), torch.bfloat16),
    ):
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}.get(dtype, 1e-9)
        yield Sample(aten._to_copy.default, (given,), {"dtype": dtype}, tolerance=tolerance)
    yield Sample(torch.ops.shardc.constrain.default, (real(6, 2), "?,?"))
    yield Sample(GRADIENT_CAST, (real(6, 2), torch.float32, False), tolerance=1e-5)


def binary() -> Iterator[Sample]:
    x = positive(6, 2)
    for operator in BINARY:
        yield Sample(operator, (positive(6, 2), positive(6, 2)))
        yield Sample(operator, (positive(2, 3), positive(6, 1, 3)))
    for operator in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor):
        yield Sample(operator, (x, x))
        yield Sample(operator, (positive(6, 2), positive()))
        yield Sample(operator, (positive(), positive(6)))
        yield Sample(operator, (whole(9, 6, low=1), whole(9, 6, low=1)), tolerance=1e-5)
        if operator is not aten.sub.Tensor:
            yield Sample(operator, (boolean(6, 2), positive(6, 2)), tolerance=1e-5)
            yield Sample(
                operator, (positive(6, 2), boolean(6, 2) if operator is not aten.div.Tensor else positive(6, 2))
            )
    yield Sample(aten.add.Tensor, (positive(6, 2), positive(2)), {"alpha": 2})
    yield Sample(aten.div.Tensor_mode, (positive(6, 2), positive(2)), {"rounding_mode": "floor"})
    for operator in BITWISE:
        yield Sample(operator, (boolean(6, 1, 2), boolean(6, 2)))
    yield Sample(aten.mul.Tensor, (boolean(6, 2), boolean(6, 2)))
    yield Sample(aten.mul.Tensor, (boolean(6, 2), 2.0), tolerance=1e-5)
    yield Sample(aten.add.Tensor, (boolean(6, 2), boolean(6, 2)))
    yield Sample(aten.where.self, (boolean(6, 2), boolean(6, 2), real(2)))
    yield Sample(aten.where.self, (boolean(6, 2), boolean(6, 2), boolean(2)))
    yield Sample(aten.bitwise_not.default, (boolean(6, 2),))
    for operator, scalar in SCALAR:
        yield Sample(operator, (positive(6, 2), scalar))
    yield Sample(aten.pow.Scalar, (2.0, positive(6, 2)))
    yield Sample(aten.copy.default, (real(6, 2), real(6, 2)))
    yield Sample(aten.copy.default, (real(6, 2), real(2)))
    yield Sample(aten.fill.Tensor, (real(6, 2), real()))


def others() -> Iterator[Sample]:
    yield Sample(aten.log_sigmoid_backward.default, (real(6, 2), real(6, 2), positive(6, 2)))
    yield Sample(aten.elu_backward.default, (real(6, 2), 1.0, 1.0, 1.0, False, real(6, 2)))
    for operator, more in BACKWARD:
        yield Sample(operator, (real(6, 2), positive(6, 2) * 0.5, *more))
    yield Sample(aten.gelu_backward.default, (real(6, 2), real(6, 2)), {"approximate": "tanh"})
    yield Sample(aten.native_dropout_backward.default, (real(6, 2), boolean(6, 2), 2.0))
    yield Sample(aten.where.self, (boolean(6, 2), real(6, 2), real(6, 2)))
    yield Sample(aten.where.self, (boolean(6, 1, 2), real(2), real()))
    yield Sample(aten.masked_fill.Scalar, (real(6, 2), boolean(6, 2), 2.0))
    yield Sample(aten.masked_fill.Scalar, (real(6, 2), boolean(2), 0))
    yield Sample(aten.masked_fill.Tensor, (real(6, 2), boolean(6, 1), real()))
    yield Sample(aten.clamp.default, (real(6, 2), -0.5, 0.5))
    yield Sample(aten.clamp.Tensor, (real(6, 2), real(2) - 3, real(2) + 3))
    yield Sample(aten.lerp.Scalar, (real(6, 2), real(6, 2), 0.3))
    yield Sample(aten.lerp.Tensor, (real(6, 2), real(6, 2), real(2)))
    yield Sample(aten.addcmul.default, (real(6, 2), real(6, 2), real(2)))
    yield Sample(aten.addcdiv.default, (real(6, 2), real(6, 2), positive(2)))
    yield Sample(aten.complex.default, (real(6, 2), real(6, 2)))
    yield Sample(aten.polar.default, (real(6, 2), real(2)))
    yield Sample(aten.frexp.Tensor, (real(6, 2),))
    yield Sample(aten.scalar_tensor.default, (2.0,), {"dtype": torch.float64})


POINTWISE: tuple[Group, ...] = (unary, binary, others)
