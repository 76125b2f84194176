"""Second derivatives, function transforms and odd tensors around a sharded model: as on one device, or refused in a
line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardc import shard
from shardc.runtime import RankError

MESHES = ("dp=2,tp=2", "a=3")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Penalised(MLP):
    """A gradient penalty inside of forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = super().forward(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (slope.norm() - 1).square() + y.mean()


class Forces(MLP):
    """An energy and its gradient by the input, also where the caller has switched gradients off."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=self.training)
        return energy, -slope


class Attending(nn.Module):
    """A gradient penalty through attention by one kernel."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self.layer, self.kernel = nn.Linear(12, 12), kernel

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        heads = self.layer(x).view(3, 2, 3, 4).transpose(1, 2)
        with sdpa_kernel(self.kernel):
            y = F.scaled_dot_product_attention(heads, heads, heads)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return slope.square().sum() + y.sum()


def pair(make: Callable[[], nn.Module], mesh: str = "a=2") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    single = make().double()
    return single, shard(copy.deepcopy(single), mesh=mesh, hardware="cpu")


def sample() -> Tensor:
    return torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mesh", MESHES)
def test_second_derivatives_inside_of_forward(mesh: str) -> None:
    for make in (Penalised, Forces, lambda: Attending(SDPBackend.MATH)):
        found: list[list[Tensor | None]] = []
        for model in pair(make, mesh):
            out = model(sample())
            loss = out if isinstance(out, Tensor) else out[0] + out[1].square().sum()
            loss.backward()
            found.append([loss, *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(*found)
    single, sharded = pair(Forces, mesh)
    with torch.no_grad():
        torch.testing.assert_close(sharded.eval()(sample()), single.eval()(sample()))


def test_fused_attention_has_no_second_derivative() -> None:
    _, sharded = pair(lambda: Attending(SDPBackend.FLASH_ATTENTION))
    with pytest.raises(RankError, match=r"fused attention has no second derivative: .*sdpa_kernel\(SDPBackend.MATH\)"):
        sharded(sample())


def test_second_derivatives_outside_of_forward_are_refused() -> None:
    _, sharded = pair(MLP)
    x = sample().requires_grad_()
    (slope,) = torch.autograd.grad(sharded(x).sum(), x, create_graph=True)
    assert slope.requires_grad  # never a constant in silence
    with pytest.raises(RankError, match="no second derivatives outside of its forward"):
        slope.norm().backward()
    with pytest.raises(RankError, match="no second derivatives outside of its forward"):
        torch.autograd.functional.hessian(lambda x: sharded(x).sum(), x.detach())
    sharded(x).sum().backward(create_graph=True)  # nobody asks for more
    single, sharded = pair(MLP)
    jacobians = [torch.autograd.functional.jacobian(model, x.detach()[:2]) for model in (single, sharded)]
    torch.testing.assert_close(*jacobians)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "grad": lambda model, x: grad(lambda x: model(x).sum())(x),
    "grad of parameters": lambda model, x: grad(lambda p: functional_call(model, p, (x,)).sum())(
        dict(model.named_parameters())
    ),
    "vmap": lambda model, x: vmap(model)(x[None]),
    "vmap of something else": lambda model, x: vmap(lambda n: model(x) * n)(torch.arange(3.0)),
    "jacrev": lambda model, x: jacrev(model)(x[:1]),
    "jvp": lambda model, x: jvp(model, (x,), (x,)),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_refused(name: str, called: bool) -> None:
    _, sharded = pair(MLP)
    if called:
        sharded(sample())
    with pytest.raises(RankError, match=r"cannot run inside of a transform of torch.func") as caught:
        TRANSFORMS[name](sharded, sample())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused(frozen: bool) -> None:
    _, sharded = pair(MLP)
    sharded.requires_grad_(not frozen)
    with forward_mode.dual_level(), pytest.raises(RankError, match="input 0 carries a tangent of forward-mode AD"):
        sharded(forward_mode.make_dual(sample(), sample()))
    state = {"up.weight": sharded.get_parameter("up.weight").detach()}
    with forward_mode.dual_level(), pytest.raises(RankError, match=r"parameter up.weight carries a tangent"):
        state = {name: forward_mode.make_dual(value, value) for name, value in state.items()}
        functional_call(sharded, state, (sample(),))


def test_batched_gradients_are_refused() -> None:
    _, sharded = pair(MLP)
    x = sample().requires_grad_()
    y = sharded(x)[0]
    with pytest.raises(RankError, match="a batch of gradients at once"):
        torch.autograd.grad(y, x, torch.eye(6, dtype=x.dtype), is_grads_batched=True)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_functional_call_computes_with_what_it_is_given(mesh: str) -> None:
    single, sharded = pair(MLP, mesh)
    x = sample()
    before = sharded(x)
    other = {name: (value.detach() * 2).requires_grad_() for name, value in single.named_parameters()}
    one, two = functional_call(single, other, (x,)), functional_call(sharded, other, (x,))
    torch.testing.assert_close(two, one)
    made, expected = (torch.autograd.grad(out.square().sum(), list(other.values())) for out in (two, one))
    torch.testing.assert_close(made, expected)
    some = {"up.weight": other["up.weight"] * 3}
    torch.testing.assert_close(functional_call(sharded, some, (x,)), functional_call(single, some, (x,)))
    torch.testing.assert_close(sharded(x), before)


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(3, 12), torch.ones(2, 12)]), "is a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(3, 12), torch.ones(2, 12)], layout=torch.jagged),
        "is a nested tensor",
    ),
    "sparse": (lambda: torch.ones(6, 12).to_sparse(), r"is stored as torch.sparse_coo: pass it dense"),
    "rows": (lambda: torch.ones(6, 12).to_sparse_csr(), r"is stored as torch.sparse_csr: pass it dense"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(6, 12), 0.1, 0, torch.qint8), "is a quantized tensor"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_refused(name: str) -> None:
    make, message = ODD[name]
    _, sharded = pair(MLP)
    with pytest.raises(RankError, match=f"^input 0 {message}"):
        sharded.float()(make())


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = MLP(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x) + 1)


COMPILED: dict[str, Callable[[Outer, Callable[..., Any]], Callable[[Tensor], Tensor]]] = {
    "itself": lambda model, compiled: compiled(model.part),
    "around": lambda model, compiled: compiled(model),
    "its forward": lambda model, compiled: compiled(lambda x: 2 * model.part.forward(x)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_by_torch_it_runs_sharded(name: str) -> None:
    model, x = Outer(), torch.randn(4, 12)
    expected = COMPILED[name](model, lambda function: function)(x)
    shard(model.part, mesh="a=2")
    torch.testing.assert_close(COMPILED[name](model, partial(torch.compile, backend="eager"))(x), expected)
    assert model.part.compiled is not None and model.part.__class__ is MLP
