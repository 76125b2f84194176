"""Whether tensors are of the kinds of others: everything that a program depends on but their values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shardc.runtime.execute.tensor_kinds import TensorKinds

OTHERS: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda x: x[:1],
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "gradient": lambda x: x.clone().requires_grad_(),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "none": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_tensors_of_other_kinds_do_not_fit(name: str, mode: Callable[[], torch.no_grad]) -> None:
    x = torch.ones(2, 3)
    with mode():
        known = TensorKinds([x, torch.ones(())])
        assert known.fit([x + 1, torch.zeros(())]) and not known.fit([x])
        assert not known.fit([OTHERS[name](x), torch.ones(())])  # type: ignore[list-item]


def test_batches_of_a_transform_do_not_fit() -> None:
    known = TensorKinds([torch.ones(3)])
    assert known.fit([torch.zeros(3)])
    assert torch.func.vmap(lambda x: x if known.fit([x]) else -x)(torch.ones(2, 3)).sum() == -6


def test_a_tensor_given_twice_fits_one_given_twice() -> None:
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    known = TensorKinds([x, y, x])
    assert known.fit([x, y, x]) and known.fit([y, x, y])
    assert not known.fit([x, y, y]) and not known.fit([x, y, y.clone()]) and not known.fit([x, x])
    assert not TensorKinds([x, y, x.clone()]).fit([x, y, x])
