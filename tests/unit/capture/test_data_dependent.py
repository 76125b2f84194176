"""Functions of torch that look at values while they run: they give what torch gives, and refuse what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardc import shard
from shardc.cost.hardware import Hardware, Link

SLOW = Hardware("slow arithmetic", {"float32": 1e3}, 1e4, 1e-9, 4, Link(0.0, 1e7), Link(0.0, 1e6))
COUNTS, SHARES = torch.tensor([1, 0, 3, 2]), torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)

PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "likelihood": lambda w: F.gaussian_nll_loss(w, w.sin(), w.square()),
    "likelihood in full": lambda w: F.gaussian_nll_loss(w, w.sin(), 1e-3 * w[:, :1].square(), True, 1e-5, "none"),
    "likelihood by rows": lambda w: F.gaussian_nll_loss(w, w.sin(), w[:, 0].exp(), reduction="sum"),
    "likelihood of a number": lambda w: F.gaussian_nll_loss(w, w.sin(), 0.5),
    "pairs": lambda w: torch.combinations(w[:, 0]) @ torch.ones(2, 3, dtype=w.dtype),
    "triples": lambda w: torch.combinations(w[1], 3, True),
    "too few": lambda w: torch.combinations(w[1], 5).sum() + w,
    "covariance": lambda w: w.cov() + torch.cov(w, correction=0),
    "covariance of a row": lambda w: torch.cov(w[0]) * w,
    "counted": lambda w: torch.cov(w, fweights=COUNTS),
    "weighted": lambda w: torch.cov(w, aweights=SHARES),
    "counted and weighted": lambda w: torch.cov(w, correction=2, fweights=COUNTS, aweights=SHARES),
    "overcorrected": lambda w: torch.cov(w, correction=3),
    "correlation": lambda w: torch.corrcoef(w) + w.corrcoef().sin(),
    "correlation of a row": lambda w: torch.corrcoef(w[0]) * w,
    "least squares": lambda w: torch.linalg.lstsq(w, w.sin(), driver="gels").solution,
    "residuals": lambda w: torch.linalg.lstsq(w, w[:, :2].sin(), driver="gels").residuals,
    "shortest": lambda w: torch.linalg.lstsq(w.view(2, 4, 4)[:, :3], w.view(2, 4, 4)[:, 1:].sin(), driver="gels")[0],
    "inverse": lambda w: torch.linalg.inv_ex(w[:4])[0] @ torch.linalg.inv(w[4:]),
    "pseudoinverse": lambda w: torch.linalg.pinv(w, rtol=1e-3) + torch.linalg.pinv(w, atol=0.1).sin(),
    "pseudoinverse of symmetric": lambda w: torch.linalg.pinv(w.view(2, 4, 4) + w.view(2, 4, 4).mT, hermitian=True),
    "reflections": lambda w: torch.linalg.qr(w)[0] @ torch.linalg.qr(w.detach(), "r")[1],
    "all reflections": lambda w: torch.linalg.qr(w, "complete")[0].detach() @ w,
    "lu": lambda w: torch.cat([t.flatten() for t in torch.linalg.lu(w)[1:]]) * torch.linalg.lu(w.mT)[0].sum(),
}


class Program(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.w = nn.Parameter(torch.randn(8, 4, dtype=torch.float64, generator=generator) if start is None else start)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w * x)


def run(model: nn.Module) -> list[Tensor]:
    output: Tensor = model(torch.ones(4, dtype=torch.float64))
    (grad,) = torch.autograd.grad((output * output.detach().sin()).sum(), list(model.parameters()))
    return [output.detach(), grad]


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_torch(name: str) -> None:
    model = Program(PROGRAMS[name])
    expected = run(model)
    for actual, right in zip(run(shard(model, mesh="a=4", hardware=SLOW)), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    "program, message",
    [
        (lambda w: F.gaussian_nll_loss(w, w, -w.square()), "var has negative"),
        (lambda w: torch.cov(w, fweights=COUNTS - 1), "weights cannot be negative"),
        (lambda w: torch.cov(w, aweights=0 * SHARES), "weights sum to zero"),
        (lambda w: torch.linalg.lstsq(w * 0, w, driver="gels").solution, "full rank"),
        (lambda w: w[torch.multinomial(w * 0, 1)[:, 0]], "multinomial"),
        (lambda w: w[torch.multinomial(w.abs() - 1, 2)[:, 0]], "multinomial"),
    ],
)
def test_what_torch_refuses(program: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(shard(Program(program), mesh="a=2"))
