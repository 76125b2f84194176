"""Trains under a budget on memory over gloo, beside single device, and measures what a rank allocates. For ranks.py."""

import copy
import itertools
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from checks.meter import metered
from samples.towers import Tower
from shardc import shard

MESH, PART = sys.argv[1], float(sys.argv[2])


def step(model, x):
    torch.manual_seed(3)
    loss = model(x)
    loss.backward()
    return loss


torch.manual_seed(0)
single, x = Tower(64, 4).double(), torch.randn(32, 64, 64, dtype=torch.float64)
step(single, x)
free = copy.deepcopy(single)
free.zero_grad()
model = copy.deepcopy(free)
free = shard(free, mesh=MESH, hardware="cpu", memory="unbounded", outputs="sharded")
step(free, x)
budget = PART * free.plan.memory.peak
model = shard(model, mesh=MESH, hardware="cpu", memory=budget, outputs="sharded")
step(model, x)
for (name, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
    torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-9, atol=1e-12, msg=name)
model.zero_grad()
meters = metered(model.compiled.executable.module)
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
    step(model, x)
(meter,) = meters.values()
events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
stored = sum(p.to_local().nbytes for p in model.parameters())
allocated = max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=stored))
predicted = model.plan.memory.peak
for measured in (meter.peak, allocated):
    assert abs(predicted - measured) <= 0.05 * measured, (predicted, measured, model.plan.memory)
assert predicted <= budget
print("memory as predicted", predicted, meter.peak, allocated)
