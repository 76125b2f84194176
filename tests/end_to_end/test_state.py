"""What a model keeps between calls: buffers, attributes, key-value caches; and constraints on what never runs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import shardc
from shardc import shard
from shardc.errors import ConstraintError, ShardcError


class Keeper(nn.Module):
    """A linear layer whose forward may leave something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.calls, self.names, self.held, self.plain = 0, list[Any](), dict[str, Any](), torch.zeros(4)
        self.keeps = ""

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        self.seen += 1
        self.mean = self.mean.detach() * 0.9 + made.detach().mean(0) * 0.1
        if self.keeps == "tensor":
            self.last = made
        elif self.keeps == "count":
            self.calls += 1
        elif self.keeps == "list":
            self.names.append(made)
        elif self.keeps == "dict":
            self.held["made"] = made
        elif self.keeps == "plain":
            self.plain.add_(1)
        elif self.keeps == "deep":
            self.layer.output = made
        return made.sum() + self.mean.sum()


def test_buffers_written_and_replaced_are_kept() -> None:
    single = Keeper()
    model = shard(copy.deepcopy(single), mesh="a=2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            x = torch.full((2, 4), float(step))
            torch.testing.assert_close(model(x), single(x))
    assert int(model.seen) == 3
    torch.testing.assert_close(model.mean, single.mean)


LEFT = ("tensor", "count", "list", "dict", "plain", "deep")


@pytest.mark.parametrize("keeps", LEFT)
def test_what_forward_leaves_behind_is_left_behind_at_every_call(keeps: str) -> None:
    single = Keeper()
    single.keeps = keeps
    model = shard(copy.deepcopy(single), mesh="a=2")
    for step in range(3):
        x = torch.full((2, 4), float(step))
        torch.testing.assert_close(model(x), single(x))
        for one, many in ((single, model), (single.layer, model.layer)):
            torch.testing.assert_close(kept(many), kept(one))


def kept(part: nn.Module) -> dict[str, Any]:
    names = ("last", "calls", "names", "held", "plain", "output")
    return {name: vars(part)[name] for name in names if name in vars(part)}


@pytest.mark.parametrize("keeps", LEFT)
def test_to_compile_leaves_nothing_behind(keeps: str) -> None:
    model = Keeper()
    model.keeps = keeps
    before = {path: dict(vars(part)) for path, part in model.named_modules()}
    shardc.compile(model, "a=2", (torch.ones(2, 4),))
    assert {path: dict(vars(part)) for path, part in model.named_modules()} == before
    assert (model.calls, model.names, model.held) == (0, [], {})


def test_a_program_compiled_ahead_refuses_what_it_was_not_compiled_for() -> None:
    model = Keeper()
    compiled = shardc.compile(model, "a=2", (torch.ones(2, 4),))
    compiled(torch.ones(2, 4))
    model.keeps = "tensor"
    with pytest.raises(
        ShardcError, match=r"model\.keeps is 'tensor', and was '' when the model was compiled: put it back"
    ):
        compiled(torch.ones(2, 4))


class Recompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.steps


def test_what_is_compiled_at_every_call_is_told() -> None:
    model, x = shard(Recompiled(), mesh="a=2"), torch.ones(2)
    with pytest.warns(UserWarning, match="Recompiled is compiled again and again.*model.steps is 8, and was 7"):
        for step in range(9):
            torch.testing.assert_close(model(x), x * (step + 1))


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.used(x), x, x)[0].sum()


@pytest.mark.parametrize("pattern", ["unused", "attention.out_proj", "un*d"])
def test_a_constraint_on_a_module_that_never_runs_is_refused(pattern: str) -> None:
    with pytest.raises(ConstraintError, match=f"'{pattern.replace('*', '.*')}' has no effect: .*never runs"):
        shardc.compile(Skipping(), "a=2", (torch.ones(2, 3, 4),), constraints={pattern: "?,?,a"})


def test_a_pattern_of_modules_and_parameters_needs_one_of_them() -> None:
    shardc.compile(Skipping(), "a=2", (torch.ones(2, 3, 4),), constraints={"unused*": "a,?"})


def language_model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("mesh", ["tp=4", "dp=2,tp=2"])
def test_decoding_with_a_cache(mesh: str) -> None:
    """Prompt, then word by word: the logits and the cache of every step equal single device."""
    single = language_model()
    asked = {"model.layers.*.self_attn.?_proj.weight": "tp,?"}
    model = shard(copy.deepcopy(single), mesh=mesh, constraints=asked)
    ids = torch.randint(0, 48, (4, 5))
    with torch.no_grad():
        caches: list[Any] = [None, None]
        for _ in range(3):
            pairs = zip((single, model), caches, strict=True)
            steps = [each(input_ids=ids, past_key_values=cache, use_cache=True) for each, cache in pairs]
            torch.testing.assert_close(steps[1].logits, steps[0].logits, rtol=1e-6, atol=1e-6)
            caches = [step.past_key_values for step in steps]
            for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
                torch.testing.assert_close(other.keys, one.keys, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(other.values, one.values, rtol=1e-6, atol=1e-6)
            ids = steps[0].logits[:, -1:].argmax(-1)
    assert type(caches[1]) is type(caches[0])
