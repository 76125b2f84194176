"""Parts that torch treats apart: scripted, lazy, parametrized, distributions, embeddings of bounded norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Distribution, Independent, MultivariateNormal, Normal
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import shardc
from shardc import shard
from shardc.errors import CaptureError

MESHES = ("dp=2,tp=2", "a=3")


class Program(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(12, 12), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of two steps, and what the model then holds."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    outputs: list[Tensor] = []
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().mean().backward()
        optimizer.step()
    return [value.detach() for value in (*outputs, *model.parameters(), *model.buffers())]


def check(make: Callable[[], nn.Module], mesh: str, x: Tensor) -> None:
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
    expected = train(models[0], x)
    for made, right in zip(train(shard(models[1], mesh=mesh, hardware="cpu"), x), expected, strict=True):
        torch.testing.assert_close(made, right)


def sample() -> Tensor:
    return torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- scripted and lazy parts


class Encoder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(part), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.randn(6, 12))], ids=["scripted", "traced"]
)
def test_a_scripted_part_is_refused_and_keeps_its_weights(make: Callable[[nn.Module], nn.Module]) -> None:
    model, x = Encoder(make(nn.Linear(12, 24))), torch.randn(6, 12)
    expected = model(x)
    for run in (lambda: shardc.compile(model, "a=2", (x,)), lambda: shard(model, mesh="a=2")(x)):
        with pytest.raises(CaptureError, match=r"^module 'inner.0' is a ScriptModule .*: build the model"):
            run()
        assert all(type(value) in (nn.Parameter, Tensor) for value in model.inner[0].parameters())
    torch.testing.assert_close(model(x) if not hasattr(model, "plan") else model.head(model.inner(x)), expected)
    with pytest.raises(CaptureError, match=r"^the model is a ScriptModule"):
        shard(make(nn.Linear(12, 24)), mesh="a=2")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_function_is_traced() -> None:
    @torch.jit.script
    def squash(x: torch.Tensor) -> torch.Tensor:
        return x.tanh() * 2 + 1

    check(lambda: Program(squash), "a=2", sample())


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_part_is_refused_until_it_has_shapes() -> None:
    model, x = nn.Sequential(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.Linear(24, 6)), torch.randn(6, 12)
    message = "^module '0' is lazy, and 'weight' has no shape yet: call the model once before you shard it$"
    with pytest.raises(CaptureError, match=message):
        shardc.compile(model, "a=2", (x,))
    with pytest.raises(CaptureError, match=message):
        shard(nn.Sequential(nn.LazyLinear(24)), mesh="a=2")(x)
    expected = model.eval()(x)
    torch.testing.assert_close(shard(model, mesh="a=2")(x), expected)


# --- distributions

DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": lambda h: Normal(h, h.exp()).rsample(),
    "density": lambda h: Normal(h, h.exp()).log_prob(h.detach().sin()),
    "told to check": lambda h: Normal(h, h.exp(), validate_args=True).log_prob(h.detach().sin()),
    "classes": lambda h: Categorical(probs=h.softmax(-1)).log_prob(torch.arange(6)) + Categorical(logits=h).entropy(),
    "independent": lambda h: Independent(Beta(h.exp(), h.exp()), 1).log_prob(h.detach().sigmoid()),
    "with a factor": lambda h: MultivariateNormal(h, torch.eye(12, dtype=h.dtype)).log_prob(h.detach()),
    "expanded": lambda h: Normal(h, h.exp()).expand(torch.Size((2, 6, 12))).log_prob(h.detach().cos()),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name: str) -> None:
    check(lambda: Program(DISTRIBUTIONS[name]), "dp=2,tp=2", sample())
    with pytest.raises(ValueError, match="to satisfy the constraint"):  # outside of a trace they check
        Normal(torch.zeros(2), -torch.ones(2))


def test_a_distribution_that_the_model_holds() -> None:
    held = Normal(torch.zeros(12, dtype=torch.float64), torch.ones(12, dtype=torch.float64), validate_args=True)
    check(lambda: Program(held.log_prob), "a=3", sample())
    assert isinstance(held, Distribution) and held.__dict__["_validate_args"] is True


# --- embeddings


class Embedded(nn.Module):
    def __init__(self, table: nn.Module, trained: bool) -> None:
        super().__init__()
        self.table, self.layer = table.requires_grad_(trained), nn.Linear(12, 6)

    def forward(self, index: Tensor) -> Tensor:
        return self.layer(self.table(index))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_of_bounded_norm(kind: type[nn.Module]) -> None:
    index = torch.arange(24).view(6, 4) % 20
    check(lambda: Embedded(kind(20, 12, max_norm=1.0), trained=False), "dp=2,tp=2", index)
    model = shard(Embedded(kind(20, 12, max_norm=1.0), trained=True), mesh="a=2")
    with pytest.raises(CaptureError, match="max_norm rewrites its weight, which is trained") as caught:
        model(index)
    assert "\n" not in str(caught.value)


# --- parametrized parts


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def symmetric(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "householder": orthogonal,
    "exponential": lambda layer: orthogonal(layer, orthogonal_map="matrix_exp"),
    "cayley": lambda layer: orthogonal(layer, orthogonal_map="cayley"),
    "symmetric": symmetric,
    "weight norm by hooks": torch.nn.utils.weight_norm,
    "spectral norm by hooks": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_parametrized_parts_train(name: str) -> None:
    check(lambda: nn.Sequential(PARAMETRIZED[name](nn.Linear(12, 12)), nn.Tanh()), "dp=2,tp=2", sample())


def test_a_cache_of_parametrizations() -> None:
    def once(model: nn.Module) -> nn.Module:
        weight_norm(model.get_submodule("layer"))
        return model

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return self.layer(torch.tanh(self.layer(x)))

    check(lambda: once(Twice()), "a=2", sample())
    single, x = once(Twice()).double(), sample()
    expected = single(x)
    sharded = shard(single, mesh="a=2")
    with parametrize.cached():
        for _ in range(2):
            torch.testing.assert_close(sharded(x), expected)
            assert F.linear(x, single.get_submodule("layer").weight).shape == x.shape  # a real weight
