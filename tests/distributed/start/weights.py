"""Models on the meta device get their values over gloo, from files and by drawing, beside one device. For ranks.py."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import shardc
from shardc.errors import ShardcError

FOLDER = Path(sys.argv[1])
MESH = "dp=2,tp=2"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(51, 16), nn.Linear(16, 36), nn.Linear(36, 16)
        self.head = nn.Linear(16, 51, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", 1 / torch.arange(1.0, 17.0), persistent=False)

    def forward(self, tokens):
        return self.head(self.down(self.up(self.embed(tokens)).relu()) * self.scale).logsumexp(-1).mean()


PLACED = {"up.weight": (("dp", "tp"), None), "down.weight": (None, "tp")}
DATA = torch.arange(32).reshape(4, 8)


def on_meta(make, how=None):
    with how or torch.device("meta"):
        return make()


def sharded(model):
    return shardc.shard(model, mesh=MESH, hardware="cpu", constraints=PLACED)


def check_same(model, single):
    pairs = zip(
        [*model.named_parameters(), *model.named_buffers()], [*single.parameters(), *single.buffers()], strict=True
    )
    for (name, one), other in pairs:
        assert isinstance(one, DTensor) == isinstance(other, nn.Parameter), name
        whole = one.full_tensor() if isinstance(one, DTensor) else one
        assert torch.equal(whole, other), name


def step(model, optimizer):
    optimizer.zero_grad()
    loss = model(DATA)
    loss.backward()
    optimizer.step()
    return loss.detach()


dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()

# drawn as on one device, by rank 0's generator, for an optimizer that was made on the meta device
torch.manual_seed(3)
single = Tied()
after = torch.rand(2)
model = sharded(on_meta(Tied, shardc.deferred_init()))
optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01) for one in (model, single)]
torch.manual_seed(3 + rank)
shardc.materialize(model)
assert torch.equal(torch.rand(2), after)
assert model.head.weight is model.embed.weight
assert model.up.weight.to_local().shape == (9, 16)  # split four ways before any plan
check_same(model, single)
up = model.up.weight
for _ in range(2):
    torch.testing.assert_close(*(step(*pair) for pair in zip((model, single), optimizers, strict=True)))
assert model.up.weight is up
assert model.down.weight.to_local().shape == (16, 18)

# what a trained model holds is written whole, in several files, and is read where plans placed it
shardc.save_pretrained(model, FOLDER / "tied", max_shard_size="2KB")
assert len(list((FOLDER / "tied").glob("model-*.safetensors"))) > 1
written = on_meta(Tied, shardc.deferred_init())
shardc.load_pretrained(written, FOLDER / "tied", mesh=MESH)
assert torch.equal(written.scale, single.scale)
step(model, optimizers[0])
shardc.load_pretrained(model, FOLDER / "tied")
for one, other in zip(model.parameters(), written.parameters(), strict=True):
    assert torch.equal(one.full_tensor(), other.full_tensor())

# what does not match is told on every rank, and nothing is changed
other = on_meta(Tied)
with pytest.raises(ShardcError, match="no mesh: shard the model first"):
    shardc.load_pretrained(other, FOLDER / "tied")
other.up = nn.Linear(16, 40, device="meta")
with pytest.raises(ShardcError, match=r"up.weight is \[36, 16\] in the files and \[40, 16\] in the model"):
    shardc.load_pretrained(other, FOLDER / "tied", mesh="a=4")
assert other.head.weight.is_meta

print("weights are those of one device", flush=True)
dist.destroy_process_group()
