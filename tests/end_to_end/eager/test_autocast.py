"""Under autocast a sharded model computes in the types of one device, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardc
from shardc import shard
from shardc.capture.torch_patches import autocast
from shardc.errors import CaptureError

MESHES = ("dp=2,tp=2", "a=3")
ONES = torch.ones(8)  # float32: what it multiplies is promoted, as rotary embeddings promote
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.attend(q, k, v)


class Projected(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(24, 24), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Llama(nn.Module):
    """Gradients of a loss and of logits, so that backward starts from what was not foreseen."""

    def __init__(self) -> None:
        super().__init__()
        sizes = dict(vocab_size=48, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3)
        self.llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=3, max_position_embeddings=32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = (x[..., 0] > 0).long()
        out: Any = self.llama(ids, labels=ids, use_cache=False)
        return out.loss, out.logits


def run(model: nn.Module, dtype: torch.dtype) -> list[Tensor | None]:
    torch.manual_seed(3)
    x = torch.randn(6, 12, 24)
    with torch.autocast("cpu", dtype=dtype):
        made = model(x)
    outputs: tuple[Tensor, ...] = made if isinstance(made, tuple) else (made,)
    torch.stack([out.float().square().mean() for out in outputs]).sum().backward()
    return [*outputs, *(parameter.grad for parameter in model.parameters())]


def check(make: Callable[[], nn.Module], mesh: str, dtype: torch.dtype = torch.bfloat16) -> None:
    torch.manual_seed(0)
    single = make()
    sharded = shard(copy.deepcopy(single), mesh=mesh, hardware="cpu")
    for one, other in zip(run(single, dtype), run(sharded, dtype), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(other, one, rtol=3e-2, atol=2e-2)  # the dtype too


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return attend(q.float(), k.float() * ONES, v.float())


def within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return attend(q * ONES, k * ONES, v)


ATTENTION: dict[str, Attend] = {
    "promoted": lambda q, k, v: attend(q * ONES, k * ONES, v, is_causal=True),
    "one promoted": lambda q, k, v: attend(q, k * ONES, v, attn_mask=torch.ones(12, 12, dtype=torch.bool).tril()),
    "float mask": lambda q, k, v: attend(q * ONES, k, v, attn_mask=torch.zeros(12, 12)),
    "mask that learns": lambda q, k, v: attend(q, k * ONES, v, attn_mask=q.mean() * torch.ones(12, 12)),
    "shared heads": lambda q, k, v: attend(q * ONES, k[:, :1], v[:, :1], enable_gqa=True),
    "dropout": lambda q, k, v: attend(q * ONES, k, v, dropout_p=0.3),
    "double": lambda q, k, v: attend(q.double(), k.double(), v.double()),
    "switched off": without,
    "switched to another": within,
    "checkpointed": lambda q, k, v: checkpoint(attend, q * ONES, k, v, use_reentrant=False),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, mesh: str) -> None:
    check(lambda: Attention(ATTENTION[name]), mesh)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "least squares": lambda h: torch.linalg.lstsq(h.mT, h.mT.sin(), driver="gels").solution,
    "likelihood": lambda h: F.gaussian_nll_loss(h, h.sin(), h.float().square() + 1),
    "covariance": lambda h: torch.cov(h[0]),
    "correlation": lambda h: torch.corrcoef(h[0]),
    "pairs": lambda h: torch.combinations(h[0, 0, :6]),
    "masked write": lambda h: torch.index_put(h, (h > 0,), h.sum() * 0),
    "inverse": lambda h: torch.linalg.inv(h.mT @ h + torch.eye(24) * 5),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda function=function: Projected(function)) for name, function in FUNCTIONS.items()},
    "lstm": lambda: Recurrent(nn.LSTM(24, 24, 2, batch_first=True)),
    "projected lstm": lambda: Recurrent(nn.LSTM(24, 24, batch_first=True, proj_size=12)),
    "gru": lambda: Recurrent(nn.GRU(24, 24, bidirectional=True)),
    "encoder": lambda: nn.TransformerEncoderLayer(24, 3, 48, dropout=0.0, batch_first=True),
    "llama": Llama,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_is_traced_in_place_of_an_operator_of_torch(name: str) -> None:
    check(MODELS[name], "dp=2,tp=2")


def test_float16() -> None:
    check(lambda: Attention(ATTENTION["promoted"]), "a=3", torch.float16)


def test_operands_of_several_types_are_refused_as_on_one_device() -> None:
    model = shard(Attention(lambda q, k, v: attend(q.double(), k, v)), mesh="a=2")
    with pytest.raises(CaptureError, match="Expected query, key, and value to have the same dtype"):
        model(torch.randn(6, 12, 24))


class Types(nn.Module):
    """Values of several types under autocast for CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.layer(x)
        with torch.autocast("cuda", enabled=False):
            plain = self.layer(x)
        with torch.autocast("cpu", enabled=False):  # not the device of the model
            still = self.layer(x)
        made = {"h": h, "gelu": F.gelu(h), "sum as asked": h.sum(dtype=torch.bfloat16), "still": still}
        wide = {"norm": self.norm(h), "softmax": h.softmax(-1), "exp": h.exp(), "power": h**2, "plain": plain}
        return {**made, **wide, "loss": F.cross_entropy(h, torch.zeros(4, dtype=torch.long))}


def test_weights_are_sent_in_the_type_in_which_they_are_used() -> None:
    """Master weights stay float32 and split; the plan casts them before it gathers them."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    model = shard(model, mesh="dp=4", hardware="h100", constraints={"*.weight": ("dp", None)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4096, 64)).float().square().mean().backward()
    gathered = [one for one in model.plan.conversions if one.phase == "forward" and one.kind == "all_gather"]
    assert sum(one.sent for one in gathered) == 2 * 0.75 * 2 * 256 * 64
    assert model[0].weight.grad.dtype == model[0].weight.dtype == torch.float32


def test_autocast_for_cuda_counts_though_the_trace_runs_on_the_cpu() -> None:
    """As torch documents its types on CUDA. (torch.autocast("cuda") switches itself off without CUDA.)"""
    model, x = Types(), torch.randn(4, 8)
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        compiled = shardc.compile(model, "a=2", (x,), hardware="h100")
        assert torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    types = {name: value.dtype for name, value in compiled(x).items()}
    low = {"h", "gelu", "sum as asked", "still"}
    assert types == {name: torch.bfloat16 if name in low else torch.float32 for name in types}


def test_the_list_of_cuda_names_functions_of_torch() -> None:
    homes = (torch, Tensor, F)
    assert {name for name in autocast._WIDE_ON_CUDA if not any(hasattr(home, name) for home in homes)} == set()
