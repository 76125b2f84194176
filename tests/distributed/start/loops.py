"""The loops of examples/ on two ranks, one after another, and the plain one beside one device. For ranks.py."""

import runpy
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))
FOLDER = Path(sys.argv[1])

from torch.utils.data import DistributedSampler  # noqa: E402

from gpt import GPT, Config  # noqa: E402
from shardc import load_pretrained  # noqa: E402
from text import Batches  # noqa: E402


def run(name, *arguments):
    print(f"loop {name}", flush=True)
    sys.argv = [name, *map(str, arguments)]
    runpy.run_path(str(EXAMPLES / f"loop_{name}.py"), run_name="__main__")


def one_device():
    torch.manual_seed(0)
    model = GPT(Config(layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens, targets = next(Batches(batch=32, seq=32))
    order = list(DistributedSampler(range(32), num_replicas=1, rank=0))
    for start in range(0, 32, 8):
        rows = order[start : start + 8]
        model(tokens[rows], targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


torch.set_num_threads(1)
run("plain", "--save", FOLDER / "gpt")
trained = GPT(Config(layers=1))
load_pretrained(trained, FOLDER / "gpt")
for (name, one), other in zip(trained.named_parameters(), one_device().parameters(), strict=True):
    if not name.endswith("key.bias"):  # whose gradient is rounding alone
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
run("lightning")
run("trainer", FOLDER / "llama")
run("trainer", FOLDER / "llama")  # goes on from what it saved
run("accelerate")
print("all loops ended", flush=True)  # Accelerate has destroyed the process group
