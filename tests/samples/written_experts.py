"""Layers with experts as people write them: loops with masks, loops over all tokens, stacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, INNER, COUNT = 8, 12, 5


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, INNER, bias=False), nn.Linear(D, INNER, bias=False)
        self.w2 = nn.Linear(INNER, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FusedSwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return self.down(value * F.silu(gate))


def gelu_network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.Linear(INNER, D), nn.Dropout(0.0))


class Routed(nn.Module):
    """A router, and experts of one kind. `scores` says how the chosen experts are weighed."""

    def __init__(self, k: int = 2, kind: Callable[[], nn.Module] | None = SwiGLU, normalised: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(D, COUNT, bias=False)
        if kind is not None:
            self.experts = nn.ModuleList(kind() for _ in range(COUNT))
        self.k, self.normalised = k, normalised

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, scores and ids."""
        logits = self.gate(x)
        probabilities = F.softmax(logits, dim=-1)
        scores, ids = torch.topk(probabilities, self.k, dim=-1)
        if self.normalised:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return probabilities, scores, ids


class MixtralLoop(Routed):
    """transformers' Mixtral, as it was."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        _, routing_weights, selected_experts = self.route(hidden_states)
        final = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(selected_experts, num_classes=COUNT).permute(2, 1, 0)
        for expert_idx in range(COUNT):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[None, top_x].reshape(-1, width)
            current = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(hidden_states.dtype))
        return final.reshape(batch, length, width)


class MixtralHits(Routed):
    """The same, later: only the experts that something has chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        _, routing_weights, selected_experts = self.route(hidden_states)
        final = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        expert_mask = F.one_hot(selected_experts, num_classes=COUNT).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]  # type: ignore[index, arg-type]  # a tensor of one number
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = hidden_states[None, top_x].reshape(-1, width)
            current = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(hidden_states.dtype))
        return final.reshape(batch, length, width)


class MistralLoop(Routed):
    """Mistral's own."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.view(-1, D)
        weights, selected = torch.topk(self.gate(inputs), self.k)
        weights = F.softmax(weights, dim=1)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch_idx, nth_expert = torch.where(selected == i)
            results[batch_idx] += weights[batch_idx, nth_expert, None] * expert(inputs[batch_idx])
        return results.view(x.shape)


class MaskLoop(Routed):
    """makeMoE's: a sparse softmax, and boolean masks."""

    def forward(self, x: Tensor) -> Tensor:
        top, indices = self.gate(x).topk(self.k, dim=-1)
        sparse = torch.full_like(self.gate(x), float("-inf")).scatter(-1, indices, top)
        gating = F.softmax(sparse, dim=-1)
        final = torch.zeros_like(x)
        flat_x, flat_gating = x.view(-1, x.size(-1)), gating.view(-1, gating.size(-1))
        for i, expert in enumerate(self.experts):
            expert_mask = (indices == i).any(dim=-1)
            flat_mask = expert_mask.view(-1)
            if flat_mask.any():
                expert_output = expert(flat_x[flat_mask])
                scores = flat_gating[flat_mask, i].unsqueeze(1)
                final[expert_mask] += (expert_output * scores).squeeze(1)
        return final


class CountedLoop(Routed):
    """DeepSeek's: experts without tokens are passed over."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, D)
        _, weights, indices = self.route(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=COUNT).tolist()
        for i in range(COUNT):
            if counts[i] == 0:
                continue
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return y.view(shape)


class SwitchLoop(Routed):
    """One expert a token; rows are written, not added."""

    def __init__(self) -> None:
        super().__init__(k=1, kind=FusedSwiGLU)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        probabilities = F.softmax(self.gate(flat), dim=-1)
        best, routes = torch.max(probabilities, dim=-1)
        final = flat.new_zeros(flat.shape)
        for i in range(COUNT):
            chosen = torch.nonzero(routes == i, as_tuple=True)[0]
            if chosen.numel() == 0:
                continue
            final[chosen, :] = self.experts[i](flat[chosen, :])
        return (final * best.unsqueeze(-1)).reshape(x.shape)


class IndexSelectLoop(Routed):
    """`index_select` and `nonzero().squeeze()`, on scattered gates."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        probabilities, scores, ids = self.route(flat)
        gates = torch.zeros_like(probabilities).scatter(1, ids, scores)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (gates[:, i] > 0).nonzero().squeeze(-1)
            made = expert(flat.index_select(0, rows)) * gates[rows, i].unsqueeze(-1)
            out = out.index_add(0, rows, made)
        return out.view_as(x)


class DenseLoop(Routed):
    """All experts for all tokens, times gates that are mostly zero."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities, scores, ids = self.route(x)
        gates = torch.zeros_like(probabilities).scatter_(-1, ids, scores)
        return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


class DenseSum(Routed):
    """The weight of each expert is summed over the choices."""

    def forward(self, x: Tensor) -> Tensor:
        _, scores, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            weight = torch.sum(scores * (ids == e), dim=-1, keepdim=True)
            out += weight * expert(x)
        return out


class DenseStack(Routed):
    """All results side by side."""

    def forward(self, x: Tensor) -> Tensor:
        _, scores, ids = self.route(x)
        gates = torch.einsum("bsk,bske->bse", scores, F.one_hot(ids, COUNT).to(scores.dtype))
        results = torch.stack([expert(x) for expert in self.experts], dim=2)
        return (results * gates.unsqueeze(-1)).sum(dim=2)


class DenseEinsum(Routed):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        probabilities, scores, ids = self.route(flat)
        gates = torch.zeros_like(probabilities).scatter(1, ids, scores)
        results = torch.stack([expert(flat) for expert in self.experts], dim=1)
        return torch.einsum("te,ted->td", gates, results).view(x.shape)


class StackedLoop(Routed):
    """Weights of all experts in one tensor."""

    def __init__(self) -> None:
        super().__init__(kind=None)
        self.up = nn.Parameter(torch.randn(COUNT, D, INNER) * 0.3)
        self.down = nn.Parameter(torch.randn(COUNT, INNER, D) * 0.3)
        self.bias = nn.Parameter(torch.randn(COUNT, INNER))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        _, scores, ids = self.route(flat)
        out = torch.zeros_like(flat)
        for e in range(COUNT):
            rows, choice = torch.where(ids == e)
            inner = torch.relu(flat[rows] @ self.up[e] + self.bias[e]).square()
            out.index_add_(0, rows, (inner @ self.down[e]) * scores[rows, choice].unsqueeze(-1))
        return out.view(x.shape)


class SortedLoop(Routed):
    """DeepSeek's for inference: rows sorted by expert, and put back."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        _, weights, ids = self.route(flat)
        counts = ids.new_zeros((ids.shape[0], COUNT))
        counts.scatter_(1, ids, 1)
        order = ids.view(-1).argsort()
        rows = flat[order // ids.shape[1]]
        outputs, start = [], 0
        for i, rows_of_expert in enumerate(counts.sum(dim=0).cpu().numpy()):
            end = start + rows_of_expert
            if rows_of_expert == 0:
                continue
            outputs.append(self.experts[i](rows[start:end]))
            start = end
        made = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
        back = torch.empty_like(made)
        back[order] = made
        return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view(x.shape)


class SplitLoop(Routed):
    """torchtitan's: a histogram, and rows split by it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        _, weights, ids = self.route(flat)
        counts = torch.histc(ids.view(-1).to(x.dtype), bins=COUNT, min=0, max=COUNT)
        order = torch.argsort(ids.view(-1), stable=True)
        token = (order // self.k).reshape(-1, 1).expand(-1, D)
        parts = torch.split(torch.gather(flat, 0, token), counts.int().tolist())
        made = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        made = made * weights.view(-1)[order].reshape(-1, 1)
        return torch.zeros_like(flat).scatter_add(0, token, made).view(x.shape)


class SlicedLoop(Routed):
    """Bounds from a cumulative sum, results written where their rows are."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        _, weights, ids = self.route(flat)
        by_expert, order = ids.flatten().sort(stable=True)
        ends = F.pad(torch.bincount(by_expert, minlength=COUNT).cumsum(0), (1, 0))
        rows = flat[order // self.k]
        made = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            if ends[i] < ends[i + 1]:
                made[ends[i] : ends[i + 1]] = expert(rows[ends[i] : ends[i + 1]])
        made = made[order.argsort()].view(-1, self.k, D)
        return torch.einsum("tkd,tk->td", made, weights).view(x.shape)


LAYERS: dict[str, Callable[[], Routed]] = {
    "mixtral": MixtralLoop,
    "mixtral hits": MixtralHits,
    "mistral": lambda: MistralLoop(kind=gelu_network),
    "masks": lambda: MaskLoop(kind=gelu_network),
    "counted": CountedLoop,
    "switch": SwitchLoop,
    "index_select": lambda: IndexSelectLoop(normalised=False),
    "dense": lambda: DenseLoop(kind=gelu_network),
    "dense sum": DenseSum,
    "dense stack": lambda: DenseStack(kind=FusedSwiGLU),
    "dense einsum": DenseEinsum,
    "stacked": StackedLoop,
    "sorted": SortedLoop,
    "split": SplitLoop,
    "sliced": SlicedLoop,
}


class Program(nn.Module):
    """A layer in float64, and a loss of it."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin().sum()
