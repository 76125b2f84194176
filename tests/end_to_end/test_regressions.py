"""What a review broke, once each: every test failed before its fix."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardc import constrain, shard
from shardc.errors import CaptureError, InfeasibleError, MeshError
from shardc.runtime import RankError


class Program(nn.Module):
    """A module whose forward is a function of the module and its input."""

    def __init__(self, function: Callable[..., Any], *sizes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(*(sizes or (8, 4)))
        self.function = function
        self.scale: Any = 1.0

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def pair(module: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    module = module.double()
    return module, shard(copy.deepcopy(module), **{"mesh": "dp=2,tp=2", "hardware": "cpu", **options})


def sample(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 8)), dtype=torch.float64)


def test_hooks_of_the_model_itself_run_once() -> None:
    single = nn.Linear(8, 4).double()
    single.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    single.register_forward_hook(lambda _, args, output: output * 2)
    x = sample()
    expected = single(x)
    torch.testing.assert_close(shard(single, mesh="dp=2", hardware="cpu")(x), expected)


@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_an_attribute_that_changed_between_calls_is_seen(value: Any) -> None:
    single, sharded = pair(Program(lambda self, x: self.layer(x) * self.scale))
    x = sample()
    sharded(x)
    single.scale = sharded.scale = value
    torch.testing.assert_close(sharded(x), single(x))


def test_autocast_is_part_of_what_a_program_was_compiled_for() -> None:
    _, sharded = pair(nn.Linear(8, 4))
    sharded.float()
    x = sample().float()
    assert sharded(x).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sharded(x).dtype is torch.bfloat16


def test_draws_that_nobody_needs_still_move_the_random_stream() -> None:
    def draw(self: Program, x: Tensor) -> Tensor:
        F.dropout(x, 0.5)
        return F.dropout(self.layer(x), 0.5)

    single, sharded = pair(Program(draw))
    x = sample()
    torch.manual_seed(3)
    expected = single(x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(sharded(x), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_that_need_no_gradient_take_none() -> None:
    single, sharded = pair(Program(lambda self, x: (self.layer(x), self.layer(x).detach(), x)))
    x = sample()
    for model in (single, sharded):
        live, dead, same = model(x)
        assert (live.requires_grad, dead.requires_grad, same.requires_grad) == (True, False, False)
        (live * dead * same[:, :4]).sum().backward()
    torch.testing.assert_close(sharded.layer.weight.grad, single.layer.weight.grad)


def test_an_input_changed_in_place_is_changed_for_the_caller() -> None:
    single, sharded = pair(Program(lambda self, x: self.layer(x.add_(1))))
    one, other = torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)
    expected, made = single(one), sharded(other)
    torch.testing.assert_close(made, expected)
    assert torch.equal(one, other)
    expected.sum().backward()
    made.sum().backward()
    torch.testing.assert_close(sharded.layer.weight.grad, single.layer.weight.grad)


def test_parameters_from_outside_are_refused() -> None:
    layer = nn.Linear(8, 4).double()
    function = shard(lambda x: layer(x).sum(), mesh="dp=2", hardware="cpu")
    with pytest.raises(CaptureError, match="neither an input nor a parameter of the model"):
        function(sample())


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_inputs_that_hide_tensors_are_opened() -> None:
    single, sharded = pair(Program(lambda self, box: self.layer(box.value)))
    for _ in range(2):
        box = Box(sample())
        torch.testing.assert_close(sharded(box), single(box))
    with pytest.raises(CaptureError, match=r"input 0 is a NumPy array of shape .*pass a tensor"):
        sharded(sample().numpy())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


def test_a_tied_parameter_is_constrained_by_any_of_its_names() -> None:
    _, sharded = pair(Tied(), constraints={"head.weight": ("tp", None)})
    sharded(torch.randint(0, 8, (4, 3)))
    assert [str(p.layout) for p in sharded.plan.placed if p.role == "parameter"] == ["[8@tp, 4]"]
    _, sharded = pair(Tied(), constraints={"head.weight": ("tp", None), "table.weight": (None, "tp")})
    with pytest.raises(InfeasibleError, match="contradict each other"):
        sharded(torch.randint(0, 8, (4, 3)))


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=1,tp=2"])
def test_what_cannot_be_made_as_propagated_is_made_whole(mesh: str) -> None:
    """A random mask, a norm's own dim, a parameter of two heads x 4 of which only the 4 are split."""
    split = "dp" if mesh == "dp=2,tp=2" else None

    def forward(self: Program, x: Tensor) -> Tensor:
        heads = constrain(F.dropout(self.layer(x), 0.5).view(4, 2, 4), (split, None, "tp"))
        return F.layer_norm(heads.reshape(4, 8), [8])

    single, sharded = pair(Program(forward, 8, 8), mesh=mesh, mode="propagate")
    x = sample()
    torch.manual_seed(1)
    expected = single(x)
    torch.manual_seed(1)
    made = sharded(x)
    torch.testing.assert_close(made, expected)
    for output in (made, expected):
        output.square().sum().backward()
    torch.testing.assert_close(sharded.layer.weight.grad, single.layer.weight.grad)


def test_a_sharded_model_is_pickled_and_copied_as_such() -> None:
    _, sharded = pair(nn.Linear(8, 4))
    x = sample()
    expected = sharded(x)
    for made in (pickle.loads(pickle.dumps(sharded)), copy.deepcopy(sharded)):
        assert isinstance(made, nn.Linear)
        torch.testing.assert_close(made(x), expected)
        assert str(made.plan.mesh) == "dp=2,tp=2"


def test_a_mesh_that_is_no_text_is_refused() -> None:
    with pytest.raises(MeshError, match="write axes like"):
        shard(nn.Linear(8, 4), mesh={"dp": 2})


def test_unsigned_outputs() -> None:
    single, sharded = pair(Program(lambda self, x: self.layer(x).abs().to(torch.uint16)))
    x = sample()
    assert torch.equal(sharded(x), single(x))


def test_complex_outputs_have_gradients() -> None:
    single, sharded = pair(Program(lambda self, x: torch.complex(self.layer(x), x[:, :4])))
    x = sample()
    for model in (single, sharded):
        model(x).abs().sum().backward()
    torch.testing.assert_close(sharded.layer.weight.grad, single.layer.weight.grad)


class Config:
    """Settings as an object."""

    def __init__(self) -> None:
        self.scale, self.scales = 1.0, {"up": [1.0]}


def _set_object(model: Any) -> None:
    model.config.scales["up"][0] = 2.0


def _set_list(model: Any) -> None:
    model.factors[0] = 2.0


def _set_activation(model: Any) -> None:
    model.act = nn.Sigmoid()


def _set_function(model: Any) -> None:
    model.last = torch.cos


def _add_hook(model: Any) -> None:
    model.layer.register_forward_hook(lambda part, args, output: output * 2)


@pytest.mark.parametrize("change", [_set_object, _set_list, _set_activation, _set_function, _add_hook])
def test_a_change_of_the_model_between_calls_is_seen(change: Callable[[Any], None]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act, self.last = nn.Linear(8, 4), nn.Tanh(), torch.sin
            self.config, self.factors = Config(), [1.0]

        def forward(self, x: Tensor) -> Tensor:
            factor = self.config.scale * self.config.scales["up"][0] * self.factors[0]
            return self.last(self.act(self.layer(x))) * factor

    single, sharded = pair(Model())
    x = sample()
    before = sharded(x)
    for model in (single, sharded):
        change(model)
    torch.testing.assert_close(sharded(x), single(x))
    assert not torch.equal(sharded(x), before)


def test_attributes_that_say_nothing_to_the_program_do_not_compile_it_again() -> None:
    """A trainer, say: it counts its steps, and holds what no key could tell."""
    _, sharded = pair(Program(lambda self, x: self.layer(x)))
    sharded.trainer = Config()
    sharded.trainer.model, sharded.trainer.steps = sharded.layer, 0
    sharded(sample())
    sharded.trainer.steps = 1
    sharded(sample())
    assert len(sharded._shardc.calls) == 1


def test_random_numbers_follow_the_memory_of_inputs_that_lie_otherwise() -> None:
    single, sharded = pair(Program(lambda self, x: torch.dropout(x, 0.5, True)))
    for x in (sample(4, 8), sample(8, 4).t()):
        results: list[Tensor] = []
        for model in (single, sharded):
            torch.manual_seed(3)
            results.append(model(x))
        torch.testing.assert_close(*results)


def test_threads_that_call_a_model_at_the_same_time() -> None:
    single, sharded = pair(Program(lambda self, x: self.layer(x).relu()))
    batches = [sample(rows, 8) for rows in range(2, 8)]
    with ThreadPoolExecutor(len(batches)) as pool:
        for x, made in zip(batches, pool.map(sharded, batches), strict=True):
            torch.testing.assert_close(made, single(x))
    assert len(sharded._shardc.calls) == 1


def test_an_index_out_of_range_is_an_error_where_the_table_is_split() -> None:
    table, sharded = sample(4096, 64), shard(lambda w, i: constrain(w, ("tp", None))[i], mesh="tp=2", hardware="cpu")
    found = sharded(table, torch.tensor([0, 4095, -1]))
    assert "rebase" in sharded.code
    torch.testing.assert_close(found, table[[0, -1, -1]])
    for wrong in (4096, -4097):
        with pytest.raises(RankError, match="index out of range"):
            sharded(table, torch.tensor([0, 1, wrong]))


def test_a_model_is_captured_in_anomaly_mode() -> None:
    single, sharded = pair(Program(lambda self, x: self.layer(x)))
    x = sample()
    with torch.autograd.set_detect_anomaly(True):
        for model in (single, sharded):
            model(x).sum().backward()
    torch.testing.assert_close(sharded.layer.weight.grad, single.layer.weight.grad)


def test_a_value_whose_dims_share_atoms_is_viewed_in_other_blocks_per_dim() -> None:
    single, sharded = pair(Program(lambda _, x: (x[:, None] * x).view(6, 2, 4, 3).sin()))
    x = sample(12)
    torch.testing.assert_close(sharded(x), single(x))


def test_equal_calls_of_which_other_results_are_read() -> None:
    """What a call makes and nobody reads is not held; the next one like it may have other readers."""

    def program(_: nn.Module, x: Tensor) -> Tensor:
        one, other = (constrain(y, ("tp", None)).unbind(0) for y in (x.sin(), x.cos()))
        return one[0].sum() + other[5].sum()

    single, sharded = pair(Program(program), mode="propagate")
    x = sample(8, 8)
    torch.testing.assert_close(sharded(x), single(x))
