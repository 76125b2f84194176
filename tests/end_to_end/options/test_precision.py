"""A model computes in other types than its parameters have, and gradients are summed in a chosen one: the casts are
operators of the program, so that the plan gathers 16 bits of a weight of 32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from shardc import shard
from shardc.compiled import Compiled
from shardc.errors import CaptureError, ShardcError
from shardc.flags import parsed, spelled
from shardc.options import Options

LOW = torch.bfloat16
HEADS = 2


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.k = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        k = self.k(h).view(*x.shape[:-1], HEADS, -1).transpose(1, 2)
        return x + self.down(F.gelu(self.up(h))) + F.scaled_dot_product_attention(k, k, k).transpose(1, 2).flatten(2)


class Decoder(nn.Module):
    """Its embedding is its head as well, and a buffer is added that stays float32."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer(16) for _ in range(4))
        self.register_buffer("offset", torch.full((16,), 0.5))

    def forward(self, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) * scale
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(x, self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()), x.float().mean() + self.offset.mean()


IDS, SCALE = torch.arange(64).view(4, 16) % 32, torch.tensor(1.5)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def on_one_device(model: nn.Module, *inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a program that makes the same casts."""
    cast = {name: parameter.to(LOW) for name, parameter in model.named_parameters()}
    inputs = tuple(x.to(LOW) if x.is_floating_point() else x for x in inputs)
    outputs = list(torch.func.functional_call(model, cast, inputs))
    outputs[0].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return outputs, gradients  # type: ignore[return-value]


@pytest.mark.parametrize("asked", [{}, {"microbatches": 2, "reduce_dtype": "float32"}])
def test_values_and_types_are_those_of_one_device_that_makes_the_same_casts(
    decoder: Decoder, asked: dict[str, Any]
) -> None:
    outputs, gradients = on_one_device(decoder, IDS, SCALE)
    model = shard(copy.deepcopy(decoder), mesh="dp=2,tp=2", hardware="cpu", param_dtype=LOW, **asked)
    loss, mean = model(IDS, SCALE)
    loss.backward()
    assert model.code.count("for i in range(") >= 2  # equal layers stay one function
    assert (loss.dtype, mean.dtype) == (outputs[0].dtype, outputs[1].dtype)
    torch.testing.assert_close([loss, mean], outputs, rtol=2e-2, atol=2e-2)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=3e-2, atol=2e-2)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


X, SIZE = torch.randn(4096, 64), 64 * 256
SHARDED = {"*.weight": ("dp", None), "up": ("dp", None), "down": ("dp", None)}


def compiled(model: nn.Module | None = None, **asked: Any) -> Compiled:
    options: dict[str, Any] = {"constraints": SHARDED, "outputs": "sharded", "hardware": "h100", **asked}
    return shardc.compile(model or Mlp(), "dp=4", (X,), **options)


@pytest.mark.parametrize(
    ("asked", "gathered", "reduced"),
    [
        ({"param_dtype": LOW}, 2, 2),
        ({"param_dtype": LOW, "reduce_dtype": torch.float32}, 2, 4),
        ({"reduce_dtype": LOW}, 4, 2),
        ({"reduce_dtype": torch.float32}, 4, 4),
        ({"param_dtype": LOW, "reduce_dtype": torch.float32, "memory": 2.1 * 2**20}, 2, 4),
    ],
)
def test_bytes_are_those_of_the_types_that_were_asked_for(asked: dict[str, Any], gathered: int, reduced: int) -> None:
    plan = compiled(**asked).plan
    gathers = [one for one in plan.conversions if one.kind == "all_gather" and one.phase == "forward"]
    assert sum(one.sent for one in gathers) == gathered * 2 * 3 / 4 * SIZE
    sums = [one for one in plan.conversions if one.kind in ("reduce_scatter", "all_reduce")]
    assert sum(one.sent for one in sums) == reduced * 2 * 3 / 4 * SIZE


def test_autocast_leaves_sums_to_reduce_dtype() -> None:
    """The model's own casts are those of autocast; behind that of a gradient may stand a view."""
    sent: list[float] = []
    for dtype in (LOW, torch.float32):
        with torch.autocast("cpu", dtype=LOW):
            made = compiled(reduce_dtype=dtype)
        assert made.graph("capture").count("gradient_cast(") == 2
        plan = made.plan
        sent.append(sum(one.sent for one in plan.conversions if one.kind == "reduce_scatter"))
    assert sent == [2 * 2 * 3 / 4 * SIZE, 4 * 2 * 3 / 4 * SIZE]


def test_memory_counts_masters_copies_and_gradients_in_their_types() -> None:
    wide, low = compiled().plan.memory, compiled(param_dtype=LOW).plan.memory
    assert low.parts["parameters"] == wide.parts["parameters"] == 4 * 2 * SIZE / 4
    assert low.parts["optimizer state"] == wide.parts["optimizer state"]
    assert 0.5 <= low.parts["kept for backward"] / wide.parts["kept for backward"] < 0.7  # the input's copy is among it
    assert low.peak < 0.6 * wide.peak


class Keys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(64, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).view(-1, HEADS, 12).transpose(0, 1).softmax(-1)


def test_what_is_stored_across_heads_is_gathered_in_16_bits_too() -> None:
    plan = compiled(Keys(), constraints={"k.weight": ("dp", None), "k": ("dp", None)}, param_dtype=LOW).plan
    moved = {one.kind: one.sent for one in plan.conversions if one.kind in ("all_gather", "reduce_scatter")}
    assert moved == dict.fromkeys(("all_gather", "reduce_scatter"), 2 * 3 / 4 * 24 * 64)


class Odd(nn.Module):
    """Returns and writes what it is given."""

    def __init__(self, write: bool = False) -> None:
        super().__init__()
        self.weight, self.write = nn.Parameter(torch.ones(4)), write

    def forward(self, x: Tensor) -> dict[str, Any]:
        if self.write:
            x.mul_(2)
        return {"x": x, "weight": self.weight, "ids": x.detach().long(), "type": self.weight.dtype}


def test_what_a_model_returns_as_it_is_has_the_type_in_which_the_model_had_it() -> None:
    made = shard(Odd(), mesh="dp=2", param_dtype=LOW)(torch.ones(4))
    types = {name: getattr(value, "dtype", value) for name, value in made.items()}
    assert types == {"x": LOW, "weight": LOW, "ids": torch.int64, "type": LOW}
    asked: Any = {"param_dtype": LOW, "output_dtype": torch.float64, "cast_forward_inputs": False}
    made = shard(Odd(), mesh="dp=2", **asked)(torch.ones(4))
    assert made["x"].dtype == made["weight"].dtype == torch.float64
    made["weight"].sum().backward()


def test_gradients_of_inputs_have_the_type_of_inputs() -> None:
    x = X.clone().requires_grad_()
    shard(Mlp(), mesh="dp=2", hardware="cpu", param_dtype=LOW, output_dtype="float32")(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_a_write_to_a_copy_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"forward writes to input:0, of which it has a copy in bfloat16.*cast_forw"):
        shard(Odd(write=True), mesh="dp=2", param_dtype=LOW)(torch.ones(4))


MIXED = "an operator gets (float32 and bfloat16|bfloat16 and float32), and takes one type"


def test_inputs_that_are_not_cast_are_refused_where_one_device_refuses_them() -> None:
    """An operator that is traced all the same, and one that takes both."""
    asked: Any = {"param_dtype": LOW, "cast_forward_inputs": False}
    with pytest.raises(CaptureError, match=rf"module 'up', test_precision.py:\d+: {MIXED}.*leave out cast_forward_inp"):
        shard(Mlp(), mesh="dp=2", **asked)(X)
    with pytest.raises(CaptureError, match=f"module '0', .*{MIXED}.*native_layer_norm.*; cast one with"):
        shard(nn.Sequential(nn.LayerNorm(64).to(LOW)), mesh="dp=2")(X)
    with torch.autocast("cpu", dtype=LOW):
        assert shard(Mlp(), mesh="dp=2", hardware="cpu", **asked)(X).dtype == LOW
    assert shard(nn.Sequential(nn.LayerNorm(64)), mesh="dp=2", hardware="cpu")(X.to(LOW)).dtype == LOW


class LowCopies(nn.Module):
    """What `param_dtype` does, on one device."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Any:
        cast = {name: parameter.to(self.dtype) for name, parameter in self.model.named_parameters()}
        return torch.func.functional_call(self.model, cast, (x.to(self.dtype),))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_scaled_losses_with_and_without_autocast(low: torch.dtype, autocast: bool) -> None:
    """Steps and scales are those of one device; a batch that overflows skips its step, whichever rank sees it."""
    torch.manual_seed(0)
    single = nn.Sequential(nn.LayerNorm(64), Mlp())
    asked: dict[str, Any] = {"param_dtype": low, "reduce_dtype": torch.float32, "output_dtype": torch.float32}
    many = shard(copy.deepcopy(single), mesh="dp=2,tp=2", hardware="cpu", **asked)
    found: list[list[float]] = []
    for model in (LowCopies(single, low), many):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        scaler, said = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2), list[float]()
        for step in range(5):
            x = X[8 * step : 8 * step + 8]
            with torch.autocast("cpu", dtype=low, enabled=autocast):
                loss = (model(x).float() - x).square().mean()
            if step == 2:
                loss = loss * torch.where(x[-1, -1] != 7, torch.inf, 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            said += [scaler.get_scale(), *([] if step == 2 else [loss.item(), norm.item()])]
        found.append(said)
    assert found[1][6] == found[1][3] / 2  # the scale after the step that was skipped
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def test_no_type_to_compute_in() -> None:
    for wrong in ("int8", "float8_e4m3fn", "half precision"):
        with pytest.raises(ShardcError, match=f"{wrong} is no type to compute in; it is one of bfloat16, float16"):
            Options(param_dtype=wrong)


def test_flags() -> None:
    options = Options(param_dtype=LOW, reduce_dtype="torch.float32", cast_forward_inputs=False)
    words = spelled(options, Options)
    assert words == ["--param-dtype=bfloat16", "--reduce-dtype=float32", "--cast-forward-inputs=False"]
    assert parsed(Options, words, "") == options
