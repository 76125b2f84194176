"""Random operators: on every mesh the numbers of the single device with the same seed, forward, backward and after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardc import shard
from shardc.cost.hardware import Hardware, Link
from shardc.errors import CaptureError

SLOW = Hardware("slow arithmetic", {"float32": 1e3}, 1e4, 1e-9, 4, Link(0.0, 1e7), Link(0.0, 1e6))


def in_place(fill: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fill` on a contiguous, a permuted and a gappy tensor."""

    def program(w: Tensor) -> Tensor:
        plain, wide = torch.empty(8, 4, dtype=w.dtype), torch.zeros(8, 12, dtype=w.dtype)
        permuted = torch.empty(4, 8, dtype=w.dtype).t()
        fill(plain)
        fill(permuted)
        fill(wide[:, ::3])
        return w * plain + w.sin() * permuted + wide.sum(1, keepdim=True)

    return program


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda w: w * torch.rand(8, 4, dtype=w.dtype) + torch.rand(4),
    "randn": lambda w: w * torch.randn(8, 4, dtype=w.dtype) + torch.randn(3, 8, 4).sum(0),
    "rand_like": lambda w: w * torch.rand_like(w) + torch.rand_like(w.t()).t() * w.exp(),
    "randn_like": lambda w: w * torch.randn_like(w) + torch.randn_like(w.t()).t() * w.exp(),
    "randn_like of half": lambda w: w * torch.randn_like(w, dtype=torch.bfloat16),
    "randint": lambda w: w * torch.randint(5, (8, 4)) + w[torch.randint(2, 8, (8,))],
    "randint_like": lambda w: w * torch.randint_like(w, 7) + torch.randint_like(w, -3, 7) * w.sin(),
    "randperm": lambda w: w[torch.randperm(8)] * w,
    "bernoulli": lambda w: w * torch.bernoulli(torch.sigmoid(w.detach())),
    "bernoulli of a number": lambda w: w * torch.bernoulli(w.detach().t(), 0.3).t(),
    "bernoulli of chances in float": lambda w: w * torch.bernoulli(torch.sigmoid(w.detach().float().t())).t(),
    "bernoulli_": in_place(lambda x: x.bernoulli_(0.3)),
    "bernoulli_ of chances": in_place(lambda x: x.bernoulli_(torch.linspace(0, 1, 4))),
    "uniform_": in_place(lambda x: x.uniform_(-1, 2)),
    "normal_": in_place(lambda x: x.normal_(1, 2)),
    "exponential_": in_place(lambda x: x.exponential_(2)),
    "cauchy_": in_place(lambda x: x.cauchy_()),
    "log_normal_": in_place(lambda x: x.log_normal_()),
    "geometric_": in_place(lambda x: x.geometric_(0.4)),
    "random_": in_place(lambda x: x.random_(3, 9)),
    "random_ below": in_place(lambda x: x.random_(9)),
    "random_ of the type": in_place(lambda x: x.random_().mul_(1e-16)),
    "normal of tensors": lambda w: w * torch.normal(w, w.exp()) + torch.normal(w, 2.0) + torch.normal(1.0, w.exp()),
    "normal of numbers": lambda w: w * torch.normal(1.0, 2.0, (8, 4)),
    "multinomial": lambda w: w[torch.multinomial(w[:, 0].exp(), 3)].sum() + w * torch.multinomial(w.exp().t(), 4)[0],
    "multinomial again": lambda w: w * torch.multinomial(w.exp(), 4, True),
    "poisson": lambda w: w * torch.poisson(w.exp()) + torch.poisson(w.exp().t()).t(),
    "binomial": lambda w: w * torch.binomial(torch.full_like(w, 9), torch.sigmoid(w.detach())),
    "gamma": lambda w: w * torch._standard_gamma(w.detach().exp()),
    "dirichlet": lambda w: w * torch._sample_dirichlet(w.detach().exp()),
    "dropout": lambda w: F.dropout(w, 0.3) + F.dropout(w.t(), 0.4).t(),
    "dropout1d": lambda w: F.dropout1d(w.view(2, 4, 4), 0.3),
    "dropout2d": lambda w: F.dropout2d(w.view(2, 4, 2, 2), 0.3),
    "dropout3d": lambda w: F.dropout3d(w.view(2, 4, 2, 2, 1), 0.3),
    "alpha_dropout": lambda w: F.alpha_dropout(w, 0.3, True) + F.feature_alpha_dropout(w, 0.2, True),
    "rrelu": lambda w: F.rrelu(w, 0.1, 0.4, True) + F.rrelu(w.t(), 0.2, 0.3, True).t(),
    "rrelu in place": lambda w: F.rrelu(w * 2, 0.1, 0.4, True, True),
    "rrelu evaluated": lambda w: F.rrelu(w, 0.1, 0.4),
    "gumbel_softmax": lambda w: F.gumbel_softmax(w) + F.gumbel_softmax(w, hard=True),
    "attention": lambda w: F.scaled_dot_product_attention(*(w.view(2, 2, 4, 2),) * 3, dropout_p=0.3),
    "dropout of attention": lambda w: F.dropout(F.scaled_dot_product_attention(*(w.view(1, 2, 4, 4),) * 3), 0.4),
    "dropout of attention, heads inside": lambda w: F.dropout(
        F.scaled_dot_product_attention(*(w.view(1, 4, 2, 4).transpose(1, 2),) * 3), 0.4
    ),
    "normal and gumbel": lambda w: (
        torch.distributions.Normal(w, 1.0, False).rsample() + torch.distributions.Gumbel(w, 1.0, False).rsample()
    ),
    "two of one kind": lambda w: w * torch.rand(()) - w.exp() * torch.rand(()),
    "unused": lambda w: (torch.rand(3), w * torch.rand(8, 4))[1],
    "a half": lambda w: w * torch.rand(8, 4, dtype=torch.float16) + torch.randn(8, 4, dtype=torch.float16).double(),
    "complex": lambda w: w * torch.randn(8, 4, dtype=torch.complex128).abs(),
}  # fmt: skip


class Program(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w * x)


def run(model: nn.Module) -> list[Tensor]:
    """Output, gradient, and the next number that the program would draw."""
    torch.manual_seed(3)
    torch.rand(3)
    output: Tensor = model(torch.ones(4, dtype=torch.float64))
    (grad,) = torch.autograd.grad((output * output).sum(), list(model.parameters()))
    return [output.detach(), grad, torch.rand(())]


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_draws_as_single_device(name: str, mesh: str) -> None:
    model = Program(PROGRAMS[name])
    expected = run(model)
    for actual, right in zip(run(shard(model, mesh=mesh, hardware=SLOW)), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


def test_dropout_between_recurrent_layers() -> None:
    """torch's own decomposition of recurrent layers forgets it."""
    for cell in (nn.LSTM, nn.GRU, nn.RNN):
        model = cell(4, 4, num_layers=3, dropout=0.4, bidirectional=True).double()
        twin = shard(type(model)(4, 4, num_layers=3, dropout=0.4, bidirectional=True).double(), mesh="a=2")
        twin.load_state_dict(model.state_dict())
        x, found = torch.randn(5, 2, 4, dtype=torch.float64), list[Tensor]()
        for each in (model, twin):
            torch.manual_seed(0)
            found.append(each(x)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_checkpointed_dropout_is_drawn_once() -> None:
    def program(w: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: F.dropout(x.sin(), 0.5), w, use_reentrant=False)

    model = Program(program)
    expected = run(model)
    for actual, right in zip(run(shard(model, mesh="a=2")), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


def test_a_generator_of_its_own_is_refused() -> None:
    own = torch.Generator().manual_seed(0)
    model = shard(Program(lambda w: w * torch.rand(8, 4, generator=own)), mesh="a=2")
    with pytest.raises(CaptureError, match=r"draws from a torch\.Generator"):
        run(model)
