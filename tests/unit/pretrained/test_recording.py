"""What is drawn later is what a single device draws: constructors of every kind, noted and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.errors import ShardcError
from shardc.pretrained.recording import RECORDING


class Views(nn.Module):
    """Initialisers that write through views, read what they wrote, look at values, and copy modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.layers.append(copy.deepcopy(self.layers[0]))
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight
        self.scaled = nn.Parameter(torch.randn(8, 8) * 0.1)
        self.thrown = nn.Parameter(torch.empty(4).bernoulli_(torch.full((4,), 0.5)))
        self.register_buffer("inverse", 1.0 / (100.0 ** (torch.arange(0, 8, 2).float() / 8)), persistent=False)
        self.register_buffer("given", torch.tensor([1.0, 2.0, 3.0]))
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
        self.listed = torch.linspace(0, 0.1, 4).tolist()
        nn.init.orthogonal_(self.layers[1].weight)
        nn.init.trunc_normal_(self.head.bias)  # draws again what lies outside
        with torch.no_grad():
            self.layers[0].weight.mul_(0.5)[0].zero_()
            self.layers[0].bias.copy_(self.head.bias[:8])
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.small = nn.Parameter(torch.randn(5, dtype=torch.bfloat16), requires_grad=False)


def torch_modules() -> nn.Module:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(attention, nn.LSTM(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.PReLU())


def check_same(one: nn.Module, other: nn.Module) -> None:
    pairs = zip([*one.named_parameters(), *one.named_buffers()], [*other.parameters(), *other.buffers()], strict=True)
    for (name, tensor), expected in pairs:
        assert torch.equal(tensor, expected) and type(tensor) is type(expected), name
        assert tensor.requires_grad == expected.requires_grad and tensor.stride() == expected.stride(), name


@pytest.mark.parametrize(
    ("make", "on_meta"),
    [
        (Views, shardc.deferred_init),
        (torch_modules, shardc.deferred_init),
        (torch_modules, lambda: torch.device("meta")),
    ],
)
def test_values_and_generator_are_those_of_building_it_on_the_cpu(
    make: Callable[[], nn.Module], on_meta: Callable[[], AbstractContextManager[object]]
) -> None:
    torch.manual_seed(0)
    expected = make()
    after = torch.rand(2)
    with on_meta():
        model = make()
    assert all(one.is_meta for one in model.parameters())
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters())
    torch.manual_seed(0)
    shardc.materialize(model)
    assert torch.equal(torch.rand(2), after)
    check_same(model, expected)
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    assert list(named.values()) == list(model.parameters())
    if isinstance(model, Views):
        assert model.head.weight is model.embed.weight
        assert model.rates == expected.rates and model.listed == expected.listed
    assert not any(RECORDING in vars(part) for part in model.modules())


def test_init_is_the_users() -> None:
    def init(model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)

    expected = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = copy.deepcopy(expected).to("meta")
    model[1] = nn.Linear(4, 2)
    kept = [one.detach().clone() for one in model[1].parameters()]
    torch.manual_seed(0)
    init(expected)
    torch.manual_seed(0)
    shardc.materialize(model, init)
    check_same(model[0], expected[0])
    assert all(torch.equal(one, other) for one, other in zip(model[1].parameters(), kept, strict=True))


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))


def test_what_nothing_initialises_is_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Drawn())
    state = torch.get_rng_state()
    with pytest.raises(ShardcError, match=r"nothing gives 1.weight a value.*deferred_init"):
        shardc.materialize(model)
    assert model[0].weight.is_meta and torch.equal(torch.get_rng_state(), state)


def test_a_constructor_that_looks_at_what_it_draws_is_told_the_way_out() -> None:
    with (
        pytest.raises(ShardcError, match=r"looks at a value that is drawn.*materialize\(model, init"),
        shardc.deferred_init(),
    ):
        torch.randn(3).sum().item()


def test_a_tuple_that_holds_a_parameter_is_refused() -> None:
    with shardc.deferred_init():
        model = nn.Linear(2, 2)
    held: tuple[Tensor, ...] = (model.weight,)
    with pytest.raises(ShardcError, match="a tuple holds the parameter weight, which becomes one with values"):
        shardc.materialize(model)
    assert held[0] is model.weight and model.weight.is_meta
