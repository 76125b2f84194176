"""Masks of packed sequences and chunks as functions of numbers of queries and keys: values, gradients, bytes, and
memory that grows with the length."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import shardc
from checks import forced
from checks.meter import metered
from shardc.rules.families import attention_workspace

HEADS, SHARED, SIZE = 4, 2, 4
Mask = Callable[[Tensor, Tensor], Tensor]
"""Of documents `[2, length]` and positions `[length]`."""


class Packed(nn.Module):
    """Attention of sequences that lie one behind the other, split or not."""

    def __init__(self, mask: Mask, axes: str | None = None, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.axes = mask, axes
        self.q = nn.Linear(width, HEADS * SIZE, bias=False)
        self.k, self.v = (nn.Linear(width, HEADS // SHARED * SIZE, bias=False) for _ in "kv")

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        x = x if self.axes is None else shardc.constrain(x, f"-,{self.axes},-")
        q, k, v = (part(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mask = self.mask(documents, torch.arange(x.shape[1]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out = out if self.axes is None else shardc.constrain(out, f"-,-,{self.axes},-")
        return out.sin().sum()


def same(ids: Tensor) -> Tensor:
    """`[..., 1, length, length]` of ids `[..., length]`."""
    return (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(-3)


def causal(places: Tensor) -> Tensor:
    return places[:, None] >= places


MASKS: dict[str, Mask] = {
    "documents": lambda ids, _: same(ids),
    "causal": lambda ids, places: same(ids) & causal(places),
    "padded": lambda ids, places: same(ids) & causal(places) & (ids != 0)[:, None, None, :],
    "lower triangle": lambda ids, _: same(ids[0]).tril(),
    "chunks": lambda _, places: same(places // 4) & causal(places),
    "prefix": lambda ids, places: causal(places) | (places < ids.amax(1)[:, None, None, None]),
    "added": lambda ids, _: torch.zeros(ids.shape[1:] * 2, dtype=X.dtype).masked_fill(~same(ids[1]), float("-inf")),
}
WAYS = [
    ("a=2", forced.ring("a")), ("a=3", forced.gathered("a")), ("a=2,b=2", forced.ring("a", "b")),
    ("a=4", forced.split_keys("a")), ("a=2,b=2", forced.hybrid("a", "b")), ("a=2", forced.ulysses("a")),
    ("a=3", forced.ring("a")), ("a=2,b=2", forced.gathered("a", "b")),
]  # fmt: skip
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 5 + [2] * 3, [1] * 6 + [2] * 2 + [3] * 3])
X = torch.randn(2, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def squares(compiled: shardc.Compiled, length: int) -> list[str]:
    """Values with an element for each pair."""
    return [line for line in str(compiled.graph("normalize")).splitlines() if f"{length}, {length}]" in line]


@pytest.mark.parametrize("name", MASKS)
def test_masks_exist_nowhere_and_mask_the_same(name: str) -> None:
    mesh, way = WAYS[list(MASKS).index(name)]
    model = Packed(MASKS[name]).double()
    alone = copy.deepcopy(model)
    with forced.attention(way):
        compiled = shardc.compile(model, mesh, (X, DOCUMENTS), hardware="h100", memory="unbounded")
    assert not squares(compiled, X.shape[1])
    for documents in (DOCUMENTS.flip(0), torch.zeros_like(DOCUMENTS), DOCUMENTS):
        model.zero_grad()
        alone.zero_grad()
        compiled.executable.mesh.reset()
        found, expected = compiled(X, documents), alone(X, documents)
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert compiled.plan.bytes_per_axis == pytest.approx(compiled.executable.mesh.traffic)


LIKE: dict[str, Mask] = {
    "of heads": lambda ids, _: same(ids) & (torch.arange(HEADS)[:, None, None] != ids[:, None, None, :]),
    "of numbers": lambda ids, _: ids.double()[:, None, :, None] >= ids.double()[:, None, None, :],
}


@pytest.mark.parametrize("name", LIKE)
def test_what_is_no_such_function_stays_a_mask(name: str) -> None:
    model = Packed(LIKE[name]).double()
    alone = copy.deepcopy(model)
    with torch.no_grad():
        compiled = shardc.compile(model, "a=2", (X, DOCUMENTS), hardware="h100", memory="unbounded")
        torch.testing.assert_close(compiled(X, DOCUMENTS), alone(X, DOCUMENTS), rtol=1e-10, atol=1e-10)


def test_flex_attention_with_the_documents_of_the_call() -> None:
    """And one that looks the documents of the first sequence up."""

    class Flex(Packed):
        def forward(self, x: Tensor, documents: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in (self.q, self.k, self.v))

            def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
                return (documents[b, row] == documents[b, column]) & (documents[0][row] <= documents[0][column])

            mask = create_block_mask(seen, len(x), None, x.shape[1], x.shape[1], device="cpu")
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)  # type: ignore[return-value]

    model = Flex(MASKS["documents"]).double().requires_grad_(False)
    compiled = shardc.compile(model, "a=2", (X, DOCUMENTS), hardware="h100", memory="unbounded")
    assert not squares(compiled, X.shape[1])
    expected = copy.deepcopy(model)(X, DOCUMENTS)
    torch.testing.assert_close(compiled(X, DOCUMENTS), expected, rtol=1e-10, atol=1e-10)


def peaks(length: int, way: forced.Accepts) -> tuple[float, list[float]]:
    """What a plan predicts that a rank holds, and what ranks do."""
    documents = torch.arange(length).expand(1, -1) // 48
    model, x = Packed(MASKS["causal"], "a", 32), torch.randn(1, length, 32)
    with forced.attention(way):
        compiled = shardc.compile(model, "a=2", (x, documents), hardware="cpu")
    meters = metered(compiled.executable.module)
    compiled(x, documents).backward()
    memory = compiled.plan.memory
    return memory.peak - memory.parts.get("optimizer state", 0.0), [meter.peak for meter in meters.values()]


def test_memory_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_workspace, "inside_kernel", lambda *_: [])
    sizes = [peaks(length, forced.ring("a")) for length in (4096, 8192)]
    for predicted, measured in sizes:
        assert any(predicted == pytest.approx(one, rel=0.05) for one in measured), sizes
    assert sizes[1][0] < 2.1 * sizes[0][0] and max(sizes[1][1]) < 2.1 * max(sizes[0][1])
