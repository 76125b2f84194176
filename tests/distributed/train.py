"""Trains the hand-written MLP over gloo, DTensor parameters and torch's own AdamW, next to eager. For ranks.py."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from shardc.runtime import (
    DistributedMesh,
    Executable,
    RankError,
    Slot,
    VirtualMesh,
    all_gather,
    all_reduce,
    all_reduce_bucket,
    all_to_all,
    distribute,
    draw,
    load,
    permute,
    placements,
    reduce_scatter,
    reduce_scatter_bucket,
    replace_parameters,
)

executable = Executable(load(Path(__file__).with_name("mlp.py")))
mesh = executable.mesh
assert isinstance(mesh, DistributedMesh)


def train():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))
    model = model.double()
    eager = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, eager))
    names = {"up.weight": model[0].weight, "down.weight": model[2].weight}
    plain = {name: parameter.detach().requires_grad_() for name, parameter in names.items()}
    loss, _ = executable.run({**plain, "steps": torch.zeros((), dtype=torch.float64)}, [torch.ones(4, 8).double()])
    loss.backward()
    eager(torch.ones(4, 8).double()).square().sum().backward()
    for one, other in zip(plain.values(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)  # whole on every rank
    slots = {slot.name: slot for slot in executable.inputs}
    old = list(names.values())
    replace_parameters(list(names), old, [slots[name] for name in names], mesh)
    assert all(isinstance(parameter, DTensor) for parameter in names.values())
    del old
    assert model[0].weight is names["up.weight"] and model[2].weight is names["down.weight"]
    assert ours.param_groups[0]["params"][0] is model[0].weight
    state = {**names, "steps": torch.zeros((), dtype=torch.float64)}
    for _ in range(3):
        x = torch.randn(4, 8, dtype=torch.float64)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        loss, y = executable.run(state, [x])
        expected_y = eager(x)
        expected = (expected_y**2).sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(y.full_tensor(), expected_y)
        loss.backward()
        expected.backward()
        assert model[0].weight.grad.placements == model[0].weight.placements
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (model, eager)]
        torch.testing.assert_close(norms[0].full_tensor(), norms[1])
        for optimizer in (ours, theirs):
            optimizer.step()
    assert state["steps"] == 3
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)


def same_as_virtual():
    """Every collective and dtype, and the traffic, as the virtual mesh has them."""
    virtual = VirtualMesh(mesh.axes)
    mesh.reset()
    base = torch.arange(32).reshape(4, 8)

    def program(x, axis):
        moved = [all_gather(x, dim=d, axis=axis) for d in (0, 1)]
        moved += [all_to_all(x, split_dim=0, concat_dim=1, axis=axis)]
        moved += [*all_reduce_bucket([x, x.t()[1:]], axis=axis)]
        moved += [*reduce_scatter_bucket([x, x[:1]], dims=[0, 1], axis=axis)]
        moved += [permute(x, axis=axis, sources=[1, 0])]
        moved += [all_reduce(x.t(), axis=axis, op=op) for op in ("sum", "max", "min", "prod")]
        return moved + [reduce_scatter(x, dim=d, axis=axis, op=op) for d in (0, 1) for op in ("sum", "max")]

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool):
        values = [(base % 3 + rank).to(dtype) for rank in range(mesh.size)]
        for axis in mesh.axes:
            arguments = [(value, axis) for value in values]
            own = mesh.run(program, arguments.__getitem__)[0]
            for a, b in zip(own, virtual.run(program, arguments.__getitem__)[mesh.rank], strict=True):
                assert torch.equal(a, b), (dtype, axis)
    assert mesh.traffic == virtual.traffic

    torch.manual_seed(mesh.rank)  # rank 0's generator counts
    drawn = mesh.run(lambda: draw((64,), "bernoulli", 0.5, dtype=torch.float32), lambda _: (), random=True)[0]
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.empty(64).bernoulli_(0.5))


def dtensor_agrees():
    """Axis orders and outer blocks: DTensor puts the global tensor together again."""
    whole = torch.arange(96.0).reshape(24, 4)
    blocks = [1, 2, 3, 6]
    pairs = [(("dp", "tp"), pair) for pair in itertools.product(blocks, blocks)]
    pairs += [(("tp", "dp"), pair) for pair in itertools.product(blocks, blocks)]
    expressed = 0
    for axes, outers in pairs:
        cuts = tuple((0, outer, axis) for outer, axis in zip(outers, axes, strict=True))
        try:
            placements(cuts, whole.shape, mesh.axes)
        except RankError:
            continue
        expressed += 1
        parameter = distribute(whole, Slot("parameter", "w", 0, (24, 4), "float32", cuts), mesh)
        assert torch.equal(parameter.full_tensor(), whole), cuts
    assert expressed >= 8


train()
same_as_virtual()
dtensor_agrees()
with pytest.raises(RankError, match=r"has 2 ranks, but .* runs 4"):
    DistributedMesh({"a": 2}, "cpu")
print(f"rank {mesh.rank} is right", flush=True)
dist.destroy_process_group()
