"""Stacks whose blocks look equal from the outside and are not, or are used unequally: all must be traced in full."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from samples.repeated_layers import Block, Stack


class AtIndex(Block):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.index < 5 else -super().forward(x)


class Indexing(AtIndex):
    TABLE = (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return Block.forward(self, x) * self.TABLE[self.index]


class Swallowing(AtIndex):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return AtIndex.forward(self, x)
        except Exception:
            return x


class Given(Stack):
    """The loop hands every layer its index."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, index)
        return x.sum()


class Taking(Block):
    def forward(self, x: Tensor, index: int) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (2 if index > 4 else 1)


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class Replacing(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return Block.forward(self, x)


class Leaving(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return super().forward(x)


COUNT = {"calls": 0}
LOSSES: list[Tensor] = []


class Global(Block):
    def forward(self, x: Tensor) -> Tensor:
        COUNT["calls"] += 1
        return super().forward(x) * (1 if COUNT["calls"] % 8 < 5 else 2)


class OfClass(Block):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        OfClass.count += 1
        return super().forward(x) * (1 if OfClass.count % 8 < 5 else 2)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1.0))


class Constant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor([1.0, 2.0] * 4)


class Collecting(Stack):
    """What the layers return is used beyond the next layer."""

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return torch.stack(seen).sum()


class Some(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:6]:
            x = layer(x)
        return x.sum()


class Between(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x) * (2.0 if index > 4 else 1.0)
        return x.sum()


class Under(Stack):
    """The first layers are frozen by the loop."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.no_grad() if index < 5 else nullcontext():
                x = layer(x)
        return self.last(x).sum()


class Cast(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=index > 4):
                x = layer(x)
        return x.float().sum()


class Backwards(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x.sum()


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(layer(x))
        return x.sum()


class Lines(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:5]:
            x = layer(x)
        for layer in self.layers[5:]:
            x = layer(x)
        return x.sum()


class Skips(Stack):
    """A layer takes what an earlier one returned, besides what the last one did."""

    def forward(self, x: Tensor) -> Tensor:
        seen = [x, x]
        for layer in self.layers:
            seen.append(layer(seen[-1], seen[-2]))
        return seen[-1].sum()


class Adding(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + y


def hooked() -> nn.Module:
    module = Stack()
    module.layers[4].up.register_forward_hook(lambda *_: None)
    return module


def hooked_late() -> nn.Module:
    class Hooking(Stack):
        def forward(self, x: Tensor) -> Tensor:
            hook = self.layers[5].register_forward_hook(lambda part, given, result: result * 2)
            x = super().forward(x)
            hook.remove()
            return x

    return Hooking()


def tied() -> nn.Module:
    module = Stack()
    for layer in list(module.layers)[1:]:
        layer.up.weight = module.layers[0].up.weight
    return module


def shared() -> nn.Module:
    block = Block()
    return Stack(lambda _: block)


def wider() -> nn.Module:
    module = Stack()
    module.layers[4].up, module.layers[4].down = nn.Linear(8, 24), nn.Linear(24, 8)
    return module


def evaluated() -> nn.Module:
    module = Stack(lambda _: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)))
    module.layers[4].eval()
    return module


def frozen() -> nn.Module:
    module = Stack()
    module.layers[4].up.weight.requires_grad_(False)
    return module


def losing() -> nn.Module:
    class Losing(Block):
        def forward(self, x: Tensor) -> Tensor:
            LOSSES.append(x.square().mean())
            return super().forward(x)

    class Summing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            LOSSES.clear()
            loss = super().forward(x) + torch.stack(LOSSES).sum()
            LOSSES.clear()
            return loss

    return Summing(lambda _: Losing())


class Penalised(Stack):
    """The loss is also one of what its layers hold."""

    def penalty(self, layer: nn.Module) -> Tensor:
        return sum((p.square().sum() for p in layer.parameters()), torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(self.penalty(layer) for layer in self.layers)


class PenalisedOnce(Penalised):
    def penalty(self, layer: nn.Module) -> Tensor:
        return super().penalty(layer) if layer is self.layers[5] else torch.zeros(())


class Measured(Penalised):
    @torch.no_grad()
    def penalty(self, layer: nn.Module) -> Tensor:
        return super().penalty(layer)


class Counted(Stack):
    """Looks at its parameters, which are as many objects as there are."""

    def forward(self, x: Tensor) -> Tensor:
        parameters = list(self.parameters())
        return super().forward(x) / sum(p.numel() for p in parameters) * len({id(p) for p in parameters})


class Stepping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))


class SteppingAll(Stack):
    def __init__(self) -> None:
        super().__init__(lambda _: Stepping())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.steps = layer.steps + 1
        return super().forward(x)


class SteppingOne(SteppingAll):
    def forward(self, x: Tensor) -> Tensor:
        y = Stack.forward(self, x)
        self.layers[5].steps = y.detach()
        return y


class Lending(Stack):
    """Calls its layers with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = nn.ParameterList(torch.randn_like(self.layers[0].up.weight) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = functional_call(layer, {"up.weight": self.lent[0 if i < 4 else 1]}, (x,))
        return x.sum()


class Hooking(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 4:
                x.register_hook(lambda grad: grad * 2)
        return x.sum()


class HookingWeight(Stack):
    def forward(self, x: Tensor) -> Tensor:
        self.layers[4].up.weight.register_hook(lambda grad: grad * 2)
        return super().forward(x)


def closed_over() -> nn.Module:
    count = 0

    class Closed(Block):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return super().forward(x) * (1 if count % 8 < 5 else 2)

    return Stack(lambda _: Closed())


IN_FULL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "branch_on_index": (lambda: Stack(AtIndex), "position"),
    "table_by_index": (lambda: Stack(Indexing), "position"),
    "swallowed": (lambda: Stack(Swallowing), "position"),
    "index_given": (lambda: Given(lambda _: Taking()), "another value"),
    "buffer_in_place": (lambda: Stack(lambda _: Counting()), "in place"),
    "buffer_replaced": (lambda: Stack(lambda _: Replacing()), "attributes"),
    "attribute": (lambda: Stack(lambda _: Leaving()), "attributes"),
    "global": (lambda: Stack(lambda _: Global()), "attributes"),
    "class_attribute": (lambda: Stack(lambda _: OfClass()), "attributes"),
    "closure": (closed_over, "attributes"),
    "global_losses": (losing, "attributes"),
    "input_in_place": (lambda: Stack(lambda _: InPlace()), "in place"),
    "constants": (lambda: Stack(lambda _: Constant()), "elsewhere"),
    "collected": (lambda: Collecting(), "elsewhere"),
    "some": (lambda: Some(), "not every layer"),
    "between": (lambda: Between(), "another tensor"),
    "no_grad": (lambda: Under(), "switches"),
    "autocast": (lambda: Cast(), "switches"),
    "backwards": (lambda: Backwards(), "in turn"),
    "twice": (lambda: Twice(), "in turn"),
    "lines": (lambda: Lines(), "switches"),
    "skips": (lambda: Skips(lambda _: Adding()), "another tensor"),
    "buffers_replaced": (lambda: SteppingAll(), "other tensors"),
    "buffer_replaced_after": (lambda: SteppingOne(), "other tensors"),
    "weights_lent": (lambda: Lending(), "other tensors"),
    "hook_on_a_result": (lambda: Hooking(), "hook"),
    "hook_on_a_weight": (lambda: HookingWeight(), "hook"),
    "penalty": (lambda: Penalised(), ""),
    "penalty_on_one": (lambda: PenalisedOnce(), ""),
    "penalty_without_gradient": (lambda: Measured(), ""),
    "hook": (hooked, ""),
    "hook_during_forward": (hooked_late, "differ"),
    "tied": (tied, ""),
    "one_layer_everywhere": (shared, ""),
    "wider": (wider, ""),
    "evaluated": (evaluated, ""),
    "frozen": (frozen, ""),
}
