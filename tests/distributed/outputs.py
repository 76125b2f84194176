"""What a user does with outputs: small ones are plain tensors, of large ones every rank holds a part. For ranks.py."""

import copy
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from shardc import ShardcError, shard


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 128), nn.Linear(128, 1000)

    def forward(self, x):
        logits = self.head(torch.relu(self.body(x)))
        return {"loss": logits.square().mean(), "top": logits.argmax(-1), "logits": logits}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def same_gradients(model, single, loss, whole=False):
    """The loss of the logits, computed outside of the model, gives the gradients of one device."""
    model.zero_grad()
    single.zero_grad()
    logits = model(x)["logits"]
    loss(logits.full_tensor() if whole else logits).backward()
    loss(single(x)["logits"]).backward()
    for one, other in zip(model.parameters(), single.parameters(), strict=True):
        close(one.grad.full_tensor(), other.grad)


def refused(function, *words):
    """It is told in one line what to call."""
    try:
        function()
    except ShardcError as error:
        assert ".full_tensor()" in str(error) and "\n" not in str(error), error
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("it was not refused")


def work_alone(logits, whole):
    """Indexed, reduced and read like any tensor."""
    close(logits.full_tensor(), whole)
    close(logits[:, -1].full_tensor(), whole[:, -1])
    close(logits[3, 5].item(), whole[3, 5].item())
    close(logits.argmax(-1).full_tensor(), whole.argmax(-1))
    close(logits.sum().item(), whole.sum().item())
    close(float(logits.mean()), float(whole.mean()))
    close(logits.T.sum(0, keepdim=True)[0, 7].item(), whole.T.sum(0)[7].item())
    assert logits.shape == whole.shape and logits.topk(3).values.shape == (1000, 3)
    assert f"{logits.mean():.3f}" == f"{whole.mean():.3f}" and bool(logits.max() > 0)
    close((2 * logits - logits.mean(0)).full_tensor(), 2 * whole - whole.mean(0))
    close(copy.deepcopy(logits).full_tensor(), whole)
    assert logits.tolist() == logits.full_tensor().tolist() and "DTensor" in str(logits)


def check(mesh, head):
    torch.manual_seed(1)
    single = Classifier()
    model = shard(copy.deepcopy(single), mesh=mesh, constraints={"head": head})
    right, made = single(x), model(x)
    for name in ("loss", "top"):
        assert type(made[name]) is torch.Tensor, made[name]
        close(made[name], right[name])
    whole, logits = right["logits"].detach(), made["logits"].detach()
    assert isinstance(logits, DTensor) and logits.to_local().numel() == whole.numel() // 2
    assert any("logits comes back split" in note for note in model.plan.notes), model.plan.notes
    work_alone(logits, whole)
    # a sum over all ranks is whole, and goes with plain tensors
    close(logits.mean() + torch.arange(3.0), whole.mean() + torch.arange(3.0))
    refused(lambda: logits == whole, "__eq__", "plain tensor")
    refused(lambda: torch.allclose(logits, whole), "allclose")
    refused(lambda: logits[torch.tensor([1, 2])], "__getitem__")
    refused(lambda: F.cross_entropy(logits, targets), "cross_entropy")
    refused(lambda: F.mse_loss(logits, logits), "mse_loss")  # DTensor: gradients too large
    try:
        logits[2000]
    except IndexError as error:  # a plain mistake is told as on one device
        assert not isinstance(error, ShardcError)
    same_gradients(model, single, lambda y: y.square().mean())
    same_gradients(model, single, lambda y: y.logsumexp(-1).sum() - y[:, 3].sum())
    same_gradients(model, single, lambda y: F.cross_entropy(y, targets), whole=True)
    after = nn.Linear(1000, 8)
    expected = after(whole).square().mean().item()
    close(shard(after, mesh=mesh)(logits).square().mean().item(), expected)


warnings.simplefilter("ignore", UserWarning)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x, targets = torch.randn(1000, 64), torch.randint(0, 1000, (1000,))
check("dp=2", ("dp", None))
check("tp=2", (None, "tp"))
print("outputs are those of one device")
dist.destroy_process_group()
