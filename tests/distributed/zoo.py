"""Trains models through `shard` over gloo beside single device: losses, gradients, parameters, bytes (for ranks.py)."""

import copy
import sys

import torch
from torch.distributed.tensor import DTensor

from samples.models import MODELS, loss_of
from shardc import shard

TOLERANCE = 1e-10
mesh, *names = sys.argv[1:]
for name in names:
    torch.manual_seed(0)
    single, inputs = MODELS[name](torch.float64)
    # of models as small as these the solver would keep every weight whole
    weights = [(key, p.dim()) for key, p in single.named_parameters() if p.dim() > 1 and p.shape[0] % 4 == 0]
    some = weights if mesh == "tp=4" else weights[::3] if "tp" in mesh else []
    split = {key: ("tp", *(dims - 1) * (None,)) for key, dims in some}
    model = shard(copy.deepcopy(single), mesh=mesh, hardware="cpu", constraints=split)
    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, single))
    for step in range(3):
        losses = []
        for each, optimizer in ((model, ours), (single, theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            losses.append(loss_of(each(**inputs)))
            losses[-1].backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 10.0)
        torch.testing.assert_close(losses[0], losses[1], rtol=TOLERANCE, atol=0)
        scale = 1e-3 * max(float(p.grad.norm()) for p in single.parameters() if p.grad is not None)
        for (key, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
            assert isinstance(one, DTensor), key
            if other.grad is not None:
                off = (one.grad.full_tensor() - other.grad).norm()
                assert off <= TOLERANCE * max(float(other.grad.norm()), scale), (key, float(off))
        ours.step()
        theirs.step()
    for (key, one), other in zip(model.named_buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=1e-12, msg=key)
    executable = model.compiled.executable
    executable.mesh.reset()
    loss_of(model(**inputs)).backward()
    for axis, sent in model.plan.bytes_per_axis.items():
        assert abs(executable.mesh.traffic.get(axis, 0.0) - sent) < 1, (axis, sent, executable.mesh.traffic)
    assert any(p.to_local().numel() < p.numel() for p in model.parameters()), "no parameter is split"
    print(f"{name} equals single device")
