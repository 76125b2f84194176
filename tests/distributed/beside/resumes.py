"""A run that is killed again and again, and goes on each time on another mesh, is the run of one device.

    python resumes.py FOLDER STEPS KILLS SEED

It forks the ranks of one life after the other, and kills one rank of each at a random moment, also while it saves; of
several kills, some stop it instead. The last life runs to the end.
"""

import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import shardc
from shardc.runtime import Slot, distribute, local_mesh

MESHES = ["dp=4", "dp=2", "dp=2,tp=2", "tp=2", "tp=4", "dp=1"]
EVERY = 5
TIMEOUT = 15.0
folder, steps, kills, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
dice = random.Random(seed)
torch.set_num_threads(1)


class Rows:
    """Endless batches, whose place is a generator's."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __next__(self):
        return torch.randn(8, 6, generator=self.generator)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def train(save, mesh=None):
    """Losses by step, from where the last checkpoint says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.25), nn.Linear(12, 6))
    if mesh:
        split = {"0.weight": ("tp" if "tp" in mesh else None, None)}
        model = shardc.shard(model, mesh=mesh, hardware="cpu", outputs="full", constraints=split)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    state, rows = {"scheduler": scheduler}, Rows()
    start = (shardc.load_checkpoint(folder, model, optimizer, data=rows, **state) or 0) if save else 0
    yield start
    for step in range(start, steps):
        loss = (model(next(rows)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield loss.item()
        if save and (step + 1) % EVERY == 0:
            shardc.save_checkpoint(folder, model, optimizer, step=step + 1, keep=3, data=rows, **state)


def alive(mesh, rank, ranks, port, life, doom):
    """One life of one rank, killed or stopped so many steps and seconds after its start. What it did goes to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["SHARDC_VERIFY"] = "0"  # others verify such programs
    said = os.open(folder / f"said-{life}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    if life < 2:
        odd(rank, ranks)
    run = train(True, mesh)
    print("@start", next(run), flush=True)
    killer = threading.Timer(doom[1], os.kill, [os.getpid(), doom[2]]) if doom else None
    try:
        for number, loss in enumerate(run, 1):
            print("@loss", loss, flush=True)
            if killer and number == doom[0]:
                killer.start()
    except shardc.ShardcError as error:
        print("@told", time.time(), error, flush=True)
        raise
    drifts(rank, ranks)


def drifts(rank, ranks):
    """A rank whose copy of a parameter changes is told of on every rank, by name; and so is a gradient."""
    model = shardc.shard(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), mesh=f"dp={ranks}", hardware="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = shardc.watch(model, every=2)
    said = []
    for step in range(4):
        model(torch.ones(ranks, 6)).square().mean().backward()
        if rank == ranks - 1 and step == 1:
            model[0].bias.to_local().detach()[3] *= 1 + 1e-6
        if step == 3:
            model[0].weight.grad.to_local().fill_(float("nan"))
        try:
            optimizer.step()
        except shardc.ShardcError as error:
            said.append(str(error))
            model[0].bias.to_local().detach().fill_(0.5)
    watching.remove()
    others = ", ".join(map(str, range(ranks - 1)))
    drift = ranks > 1 and f"0.bias on rank{'s' * (ranks > 2)} {others} against rank {ranks - 1}"
    assert len(said) == 1 + bool(drift), said
    assert not drift or (drift in said[0] and "before step 2" in said[0]), said
    assert "the gradient of 0.weight" in said[-1] and "before step 4" in said[-1], said
    print("drift is told", flush=True)


def odd(rank, ranks):
    """Parts that are several blocks of the whole, and parts of unequal size: here, and as other ranks saved them."""
    whole = {name: torch.arange(1.0, 1 + 12 * size).reshape(12, size) for name, size in [("a", 4), ("b", 3), ("c", 5)]}
    whole["d"] = torch.arange(7.0)
    mesh = local_mesh({"tp": ranks})
    cuts = {"a": ((0, 3, "tp"),), "b": ((0, 1, "tp"),), "c": ((1, 1, "tp"),), "d": ((0, 1, "tp"),)}
    model = nn.Module()
    for name, tensor in whole.items():
        slot = Slot("parameter", name, 0, tuple(tensor.shape), "float32", cuts[name] if ranks in (2, 4) else ())
        model.register_parameter(name, distribute(tensor, slot, mesh))
    shardc.save_checkpoint(folder / "odd", model, step=ranks).result()
    for path in sorted((folder / "odd").glob("step-*")):
        with torch.no_grad():
            [parameter.zero_() for parameter in model.parameters()]
        shardc.load_checkpoint(path, model)
        for name, tensor in whole.items():
            assert torch.equal(model.get_parameter(name).full_tensor(), tensor), (path, name)
    print("odd parts are right", flush=True)


def live(life, mesh, doom):
    """Fork the ranks of one life, and wait for their end; what each said."""
    ranks = shardc.Mesh.parse(mesh).size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keeper = os.fork()  # of the store, as torchrun keeps it; this process has no threads, so that it may fork
    if not keeper:
        _store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        signal.pause()
    victim = dice.randrange(ranks)
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                alive(mesh, rank, ranks, port, life, doom if rank == victim else None)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        children[child] = rank
    ended = {}
    while children:
        if list(children.values()) == [victim]:  # if it is stopped, it will not end by itself
            time.sleep(0 if doom is None else 0.5)
            [os.kill(child, signal.SIGKILL) for child in children if doom is not None]
        child, status = os.waitpid(-1, 0)
        ended[children.pop(child)] = (os.waitstatus_to_exitcode(status), time.time())
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    said = [(folder / f"said-{life}-{rank}").read_text() for rank in range(ranks)]
    return victim, ended, said


def complete():
    return max((int(path.name.split("-")[1]) for path in folder.glob("step-*") if (path / "manifest.json").exists()
                and not path.name.endswith(".partial")), default=0)  # fmt: skip


one = list(train(False))[1:]
print("one device is done", flush=True)
for life in range(kills + 1):
    mesh = MESHES[life % len(MESHES)] if kills < len(MESHES) else dice.choice(MESHES)
    doomed = life < kills
    before = complete()
    begin = time.time()
    how = signal.SIGSTOP if kills > 1 and dice.random() < 0.3 else signal.SIGKILL
    after = dice.randrange(1, min(30, 2 + 3 * steps // (2 * max(kills, 1)))), dice.uniform(0, 0.2), how
    victim, ended, said = live(life, mesh, after if doomed else None)
    assert life > 1 or all("odd parts are right" in one for one in said), said
    lines = [line.split() for line in said[0].splitlines()]
    start = next((int(line[1]) for line in lines if line[:1] == ["@start"]), None)
    assert start in (before, None), f"life {life} starts at {start}, the last complete checkpoint is {before}"
    losses = [float(line[1]) for line in lines if line[:1] == ["@loss"]]
    for step, loss in enumerate(losses, before):
        assert abs(loss - one[step]) < 1e-4, (life, mesh, step, loss, one[step])
    killed = doomed and ended[victim][0] == -signal.SIGKILL
    for rank, (code, when) in ended.items():
        if killed and rank != victim and code:
            assert "@told" in said[rank], said[rank]
            waited = when - ended[victim][1] if how == signal.SIGKILL else 0
            assert waited < TIMEOUT + 10, (rank, waited)
        elif not killed:
            assert code == 0, said[rank]
            assert "drift is told" in said[rank]
    end = f"rank {victim} {how.name}" if killed else "ended"
    took = f"last complete {complete()}, {time.time() - begin:.1f} s"
    print(f"life {life} on {mesh}: steps {before} to {before + len(losses)}, {end}, {took}", flush=True)
assert before + len(losses) == steps
print(f"{steps} steps equal one device through {kills} kills")
