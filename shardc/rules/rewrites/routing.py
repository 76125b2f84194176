"""What was asked of the exchange of tokens between experts becomes arguments of the operators, where rules read it.

%y = experts(%x, ...)    ->    %y = experts(%x, ..., capacity=2.0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

EXPERTS = (torch.ops.shardc.experts.default, torch.ops.shardc.experts_backward.default)


@dataclass(frozen=True)
class Routing:
    """The options `capacity`, `overflow` and `imbalance` of `shardc.options`."""

    capacity: float | None = None
    overflow: str = "error"
    imbalance: float = 1.0

    def tell(self, graph: fx.Graph) -> None:
        """Write it into the calls of experts, in place, where it is not what they take for granted."""
        told = {"capacity": self.capacity, "overflow": self.overflow} if self.capacity is not None else {}
        told |= {"imbalance": self.imbalance} if self.imbalance != 1.0 else {}
        for node in graph.nodes if told else ():
            if node.target in EXPERTS:
                node.kwargs = {**node.kwargs, **told}


BALANCED = Routing()
