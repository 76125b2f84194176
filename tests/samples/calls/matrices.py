"""Sample calls of operators on matrices, spectra, runs of rows and pairs of points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples.calls.sample import Group, Sample, View, boolean, positive, real, whole

aten = torch.ops.aten


def _definite(*shape: int) -> Tensor:
    """Symmetric matrices whose eigenvalues are far from zero."""
    x = real(*shape)
    return x @ x.mT + shape[-1] * torch.eye(shape[-1], dtype=x.dtype)


def factorisations() -> Iterator[Sample]:
    for shape in ((6, 4, 4), (4, 6), (2, 6, 4)):
        x = real(*shape)
        yield Sample(aten.linalg_lu_factor_ex.default, (x,))
        packed, pivots, _ = aten.linalg_lu_factor_ex(x)
        yield Sample(aten.lu_unpack.default, (packed, pivots))
        yield Sample(aten.lu_unpack.default, (packed, pivots, False), values=[0])
        yield Sample(aten.geqrf.default, (x,))
        yield Sample(aten._linalg_svd.default, (x,))
        yield Sample(aten._linalg_svd.default, (x, True))
        yield Sample(aten._linalg_svd.default, (x, False, False), values=[1])
    yield Sample(aten._linalg_eigh.default, (_definite(6, 4, 4),))
    yield Sample(aten._linalg_eigh.default, (_definite(4, 4), "U", False), values=[0])


def reflections() -> Iterator[Sample]:
    for shape in ((6, 6), (6, 4, 4), (7, 5), (1, 6, 1)):
        packed, scales = aten.geqrf(real(*shape))
        yield Sample(aten.linalg_householder_product.default, (packed, scales))
    packed, scales = aten.geqrf(real(2, 6, 4))
    yield Sample(aten.linalg_householder_product.default, (packed, scales[..., :2].contiguous()))
    for left, transpose in ((True, False), (True, True), (False, False), (False, True)):
        other = real(2, 6, 5) if left else real(2, 5, 6)
        yield Sample(aten.ormqr.default, (packed, scales, other, left, transpose))


def solves() -> Iterator[Sample]:
    for shape in ((6, 6), (6, 4, 4), (5, 5), (2, 1, 1)):
        for upper in (False, True):
            factor = torch.linalg.cholesky(_definite(*shape), upper=upper).contiguous()
            yield Sample(aten.cholesky_inverse.default, (factor, upper))
    for x, other, more in (
        (_definite(4, 4), real(4, 6), {}),
        (_definite(6, 4, 4), real(6, 4, 5), {}),
        (_definite(6, 4, 4), real(6, 4), {}),
        (_definite(1, 4, 4), real(6, 4, 1), {}),
        (_definite(4, 4), real(6, 4, 2), {}),
        (_definite(4, 4), real(4), {}),
        (_definite(2, 4, 4), real(2, 6, 4), {"left": False}),
    ):
        yield Sample(aten._linalg_solve_ex.default, (x, other), more)
    for x, other in (
        (_definite(4, 4), real(4, 6)),
        (_definite(6, 4, 4), real(6, 4, 5)),
        (_definite(4, 4), real(2, 4, 6)),
    ):
        yield Sample(aten.triangular_solve.default, (other, x))
        yield Sample(aten.triangular_solve.default, (other, x, False, True, True))


def spectra() -> Iterator[Sample]:
    x = real(6, 4, 6)
    z = torch.complex(x, real(6, 4, 6))
    for dims in ([1], [2], [1, 2], [0, 2]):
        yield Sample(aten._fft_c2c.default, (z, dims, 0, True))
        yield Sample(aten._fft_r2c.default, (x, dims, 1, True))
        yield Sample(aten._fft_c2r.default, (z, dims, 2, 2 * z.shape[dims[-1]] - 2))
    yield Sample(aten._fft_r2c.default, (real(5, 7), [1], 0, False))
    yield Sample(aten._fft_c2r.default, (z[..., :1].contiguous(), [2], 0, 1))


def segments() -> Iterator[Sample]:
    for reduce in ("sum", "mean", "max", "min", "prod"):
        for data, lengths, axis in (
            (real(6, 5, 4), torch.tensor([2, 1, 3]), 0),
            (real(4, 6), torch.tensor([[2, 1, 3], [1, 1, 4], [2, 2, 2], [3, 2, 1]]), 1),
            (real(6), torch.tensor([6]), 0),
        ):
            zeros = torch.zeros_like(lengths[..., :1])
            offsets = torch.cat([zeros, lengths.cumsum(-1)], -1)
            for runs in ({"lengths": lengths}, {"offsets": offsets}):
                given = {**runs, "axis": axis}
                yield Sample(aten.segment_reduce.default, (data, reduce), given)
                made = aten.segment_reduce(data, reduce, **given)
                yield Sample(aten._segment_reduce_backward.default, (real(*made.shape), made, data, reduce), given)


def lists() -> Iterator[Sample]:
    for size in (0, 3, 50):
        yield Sample(aten.nonzero_static.default, (whole(3, 6, 5),), {"size": size})
        yield Sample(aten.nonzero_static.default, (boolean(7),), {"size": size, "fill_value": 9})
    for x in (real(6, 5).float(), whole(9, 6, 5), boolean(5, 6)):
        for given in ({}, {"dim": [1]}, {"dim": [0, 1], "keepdim": True}):
            arguments = [given["dim"]] if "dim" in given else []
            yield Sample(aten.hash_tensor.default, (x, *arguments), {k: v for k, v in given.items() if k != "dim"})
    for operator in (aten.median.dim, aten.nanmedian.dim, aten.mode.default):
        yield Sample(operator, (real(6, 5), 1), values=[0])
        yield Sample(operator, (real(7, 6), 0, True))


def pairs() -> Iterator[Sample]:
    points = real(4, 6)
    for p in (2.0, 0.0, 1.0, 3.5, float("inf")):
        yield Sample(aten._pdist_forward.default, (points, p))
        distances = aten._pdist_forward(points, p)
        yield Sample(aten._pdist_backward.default, (real(6), points, p, distances))
    yield Sample(aten._pdist_forward.default, (positive(2, 5),))


def scaled() -> Iterator[Sample]:
    """8-bit numbers whose products are exact in float32: one scale, and one a row and a column; sums in 16 bits."""
    eight, product = torch.float8_e4m3fn, aten._scaled_mm.default
    x, half = whole(2, 6, 256, low=-1).to(eight), torch.full((), 0.5)
    weight = View(whole(2, 256, 256, low=-1).to(eight), aten.permute.default, ([1, 0],))
    rows, columns = (torch.full(shape, 0.5) for shape in ((6, 1), (1, 256)))
    yield Sample(product, (x, weight, half, half), {"out_dtype": torch.float32})
    yield Sample(product, (x, weight, rows, columns), {"out_dtype": torch.float32})
    yield Sample(
        product, (x, weight, half, half, whole(3, 256).bfloat16()), {"out_dtype": torch.bfloat16}, tolerance=0.02
    )
    yield Sample(product, (x, weight, half.view(1), half.view(1)), {"out_dtype": eight})


def decomposed() -> Iterator[Sample]:
    """Of operators that are decomposed before layouts are chosen."""
    for operators in (aten.any, aten.all):
        for x in (whole(2, 6, 4), torch.tensor([[0.0, float("nan")], [-0.0, 0.0]]), whole(2, 5, 3).to(torch.uint8)):
            yield Sample(operators.default, (x,))
            yield Sample(operators.dim, (x, 1, True))
            yield Sample(operators.dims, (x, [0, -1]))
    for shape in ((4, 4), (2, 5, 3), (3, 5), (2, 1, 3, 3)):
        x = real(*shape)
        packed, pivots, _ = aten.linalg_lu_factor_ex(x)
        yield Sample(aten.lu_unpack.default, (packed, pivots))
        yield Sample(aten.lu_unpack.default, (packed, pivots, True, False))
        yield Sample(aten.linalg_lu.default, (x,))
        for mode in ("reduced", "complete", "r"):
            yield Sample(aten.linalg_qr.default, (x, mode))
        tolerance = torch.tensor(0.3, dtype=torch.float64)
        for given in ({}, {"atol": tolerance}, {"rtol": tolerance}, {"atol": tolerance, "rtol": tolerance}):
            yield Sample(aten.linalg_pinv.atol_rtol_tensor, (x,), given)
    yield Sample(aten.linalg_pinv.atol_rtol_tensor, (_definite(2, 4, 4),), {"hermitian": True})
    for shape in ((4, 4), (2, 3, 3), (1, 1)):
        yield Sample(aten.linalg_inv_ex.default, (_definite(*shape),))


MATRICES: tuple[Group, ...] = (factorisations, reflections, solves, spectra, segments, lists, pairs, scaled)
