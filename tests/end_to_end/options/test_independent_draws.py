"""`randomness="independent"`: every device draws its part, as good as a single device's, and all that reads a draw sees
the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from shardc.runtime import Part, VirtualMesh, draw_from, fresh_seed

KEEP = 0.7
MESH = "a=2,b=2"


class Program(nn.Module):
    """Draws that are split or not, and attention with dropout whose operands lie as `split` says."""

    def __init__(self, split: tuple[str | None, ...] = (None, None, None, None)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(8, dtype=torch.float64))
        self.split = split

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x @ self.w
        heads = shardc.constrain(x.view(4, 8, 2, 4).transpose(1, 2), self.split)
        seen = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4).sin()
        return F.dropout(x, 1 - KEEP), seen, torch.rand_like(x), torch.randn_like(x)


X = torch.linspace(1, 2, 4 * 8 * 8, dtype=torch.float64).view(4, 8, 8)


@pytest.fixture(scope="module")
def sharded() -> nn.Module:
    return shardc.shard(Program(), mesh=MESH, randomness="independent")


def test_statistics_over_many_draws(sharded: nn.Module) -> None:
    torch.manual_seed(0)
    drawn = [[one.detach() for one in sharded(X)] for _ in range(100)]
    dropped, _, uniform, normal = (torch.stack(one) for one in zip(*drawn, strict=True))
    kept = (dropped != 0).double()
    torch.testing.assert_close(dropped[kept.bool()], (X / KEEP).expand_as(kept)[kept.bool()])
    count = kept.numel() ** 0.5
    for found, mean, deviation in ((kept, KEEP, (KEEP * (1 - KEEP)) ** 0.5), (uniform, 0.5, 12**-0.5), (normal, 0, 1)):
        assert abs(found.mean() - mean) < 4 * deviation / count
        assert found.std() == pytest.approx(deviation, rel=0.03)
        apart = (found - mean).flatten(1) / deviation  # draws, and places: neither depends on another
        for table in (apart, apart.T):
            other = table @ table.T / table.shape[1]
            assert (other - torch.diag(other.diagonal())).abs().max() < 6 / table.shape[1] ** 0.5


def test_the_seed_decides(sharded: nn.Module) -> None:
    runs: list[list[Tensor]] = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append([one.detach() for _ in range(2) for one in sharded(X)])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not any(map(torch.equal, runs[0], runs[2]))
    assert not any(map(torch.equal, runs[0][:4], runs[0][4:]))


def test_ranks_with_the_same_part_draw_the_same() -> None:
    def draw() -> Tensor:
        return draw_from(fresh_seed(), [5, 6], "normal", 0.0, 1.0, dtype=torch.float32, d0=Part(("a",), 5))

    first, second, third, last = VirtualMesh({"a": 2, "b": 2}).run(draw, lambda _: (), random=True)
    assert torch.equal(first, second) and torch.equal(third, last)
    assert not torch.isclose(first[:2], third[:2]).any() and not third[2].any()  # padding is zero


@pytest.mark.parametrize(
    "split", [(None,) * 4, (None, "a", None, None), (None, None, "a", None), (("a", "b"), None, None, None)], ids=str
)
def test_backward_sees_what_forward_drew(split: tuple[str | None, ...]) -> None:
    """The gradient is that of the loss, by small differences with the same seed."""
    model = shardc.shard(Program(split), mesh=MESH, randomness="independent")
    weight, step = model.get_parameter("w"), torch.randn(8, 8, dtype=torch.float64) * 1e-5
    start, losses = weight.detach().clone(), list[Tensor]()
    for sign in (1, -1, 0):
        weight.data = start + sign * step
        torch.manual_seed(1)
        losses.append(sum(one.sum() for one in model(X)[:2]))  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(losses[2], [weight])
    torch.testing.assert_close((losses[0] - losses[1]).detach() / 2, (grad * step).sum(), rtol=1e-5, atol=1e-12)


class Tower(nn.Module):
    """Masks are most of what is kept for backward."""

    def __init__(self, layers: int = 2, masks: int = 4) -> None:
        super().__init__()
        self.layers, self.masks = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers)), masks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            for _ in range(self.masks):
                y = F.dropout(y, 0.2)
            x = x + y
        return x


@pytest.mark.parametrize("randomness", ["exact", "independent"])
def test_masks_are_drawn_again_where_that_is_cheaper(randomness: str) -> None:
    model, x = Tower(), torch.randn(4096, 16)
    asked = {"mesh": "a=2", "hardware": "cpu", "randomness": randomness}
    free = shardc.shard(model, **asked, memory="unbounded")  # type: ignore[arg-type]
    torch.manual_seed(2)
    free(x).sum().backward()
    expected = [one.grad for one in model.parameters()]
    drawn = {"exact": "= bernoulli(", "independent": "= draw_from("}[randomness]
    assert free.graph("reshard").count(drawn) == 8
    room = 0.88 * free.plan.memory.peak
    model.zero_grad()
    tight = shardc.shard(model, **asked, memory=room)  # type: ignore[arg-type]
    torch.manual_seed(2)
    tight(x).sum().backward()
    assert tight.graph("reshard").count(drawn) > 8
    for one, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, grad)


def test_a_loop_of_the_code_may_end_early_by_less_than_a_run() -> None:
    """Masks that are drawn again in some layers only: what follows a loop repeats more than one of its runs."""
    asked = {"hardware": "cpu", "memory": "92KB", "randomness": "independent"}
    compiled = shardc.compile(Tower(3, 6), "a=2", (torch.empty(256, 16),), cache=False, **asked)  # type: ignore[arg-type]
    assert compiled.graph("reshard").count("= draw_from(") > 18


def test_the_default_goes_by_the_device_and_the_plan_says_which() -> None:
    def planned(model: nn.Module, **asked: str) -> shardc.Plan:
        return shardc.compile(model, "a=2", (torch.empty(4, 8, 8, dtype=torch.float64),), cache=False, **asked).plan  # type: ignore[arg-type]

    here, elsewhere = Program(), Program().to("meta")
    assert "randomness is exact" in str(planned(here, hardware="h100"))
    assert "randomness is exact" in str(planned(elsewhere, hardware="cpu"))
    assert "randomness is independent" in str(free := planned(elsewhere, hardware="h100"))
    assert "randomness" not in str(shardc.compile(nn.Linear(8, 8), "a=2", (X.float(),)).plan)
    exact = planned(elsewhere, hardware="h100", randomness="exact")
    assert free.predicted < exact.predicted  # the CPU draws for the device
