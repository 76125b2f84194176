"""What was asked of the exchange of tokens between experts becomes arguments of the operators, where rules read it.

%y = experts(%x, ...)    ->    %y = experts(%x, ..., capacity=2.0)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import fx

from shardc.runtime.kernels.mixture.fused import CAPACITY

EXPERTS = (torch.ops.shardc.experts.default, torch.ops.shardc.experts_backward.default)


@dataclass(frozen=True)
class RoutingOptions:
    """The options `capacity`, `overflow` and `imbalance` of `shardc.options`."""

    capacity: float = CAPACITY
    overflow: str = "rounds"
    imbalance: float = 1.0

    def tell(self, graph: fx.Graph) -> None:
        """Write it into the calls of experts, in place, where it is not what they take for granted."""
        told = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        for node in graph.nodes if told else ():
            if node.target in EXPERTS:
                node.kwargs = {**node.kwargs, **told}


BALANCED = RoutingOptions()
