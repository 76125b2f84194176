"""What a call of a sharded model costs beyond its run: on a mesh of one device, beside the plain model.

    python benchmarks/overhead.py

Every pair of times is taken in turn, in one process, on one thread; the ratio is that of the medians. The second table
sets calls beside nothing but the run of the generated code that is in them, in models of few and of many parts.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from compile import machine
from torch import Tensor, nn

from shardc import shard

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

ROUNDS = 30


class Tiny(nn.Module):
    """A model whose run takes no time, so that a call is all overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """A layer that reads a setting and a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale, self.powers = 1.0, [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x)))) ** self.powers[0]


def llama(layers: int = 8, width: int = 192) -> nn.Module:
    """A Llama of transformers; by default with five million parameters."""
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def medians(one: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """The median times of two functions, taken in turn, in milliseconds of this thread."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        one(), other()
    for _ in range(rounds):
        for function, kept in zip((one, other), times, strict=True):
            start = time.thread_time()
            function()
            kept.append((time.thread_time() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def row(name: str, model: nn.Module, call: Callable[[nn.Module], Tensor], train: bool) -> str:
    """One line of the table: the model by itself and sharded over one device."""
    sharded = shard(copy.deepcopy(model), mesh="a=1")

    def step(each: nn.Module) -> None:
        with torch.set_grad_enabled(train):
            result = call(each)
        if train:
            result.backward()

    eager, ours = medians(lambda: step(model), lambda: step(sharded))
    return (
        f"| {name} | {'forward and backward' if train else 'forward'} | {ours / eager:.3f} | {ours - eager:+.2f} ms |"
    )


def compiled(name: str, model: nn.Module, call: Callable[[nn.Module], Tensor]) -> str:
    """One line of the table: forward and backward of the model under `torch.compile`, and sharded over one device with
    code that Inductor compiles."""
    sharded, plain = shard(copy.deepcopy(model), mesh="a=1", compile="inductor"), torch.compile(model)

    def step(each: Any) -> None:
        call(each).backward()

    theirs, ours = medians(lambda: step(plain), lambda: step(sharded))
    return f"| {name} | beside torch.compile | {ours / theirs:.3f} | {ours - theirs:+.2f} ms |"


def optimizer_step(fused: bool) -> str:
    """One line of the table: a step of AdamW on local tensors, beside the same on DTensors (as that of a subclass)."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, ids = shard(llama(), mesh="a=1"), torch.randint(1, 4096, (2, 7))
        model(input_ids=ids, labels=ids).loss.backward()
        by_dtensor = type("AdamWOnDTensors", (torch.optim.AdamW,), {})
        ours, theirs = (kind(model.parameters(), lr=1e-4, fused=fused) for kind in (torch.optim.AdamW, by_dtensor))
        local, dispatched = medians(ours.step, theirs.step)
    finally:
        torch.distributed.destroy_process_group()
    step = f"AdamW{', fused' if fused else ''}, beside DTensor's"
    return f"| Llama, 4.8 M parameters | {step} | {local / dispatched:.3f} | {local - dispatched:+.2f} ms |"


def tokens() -> str:
    """One line of the table: sixteen tokens of `generate` with a growing cache."""
    model = llama().eval()
    sharded, prompt = shard(copy.deepcopy(model), mesh="a=1"), torch.randint(1, 4096, (2, 7))

    def generated(each: nn.Module) -> None:
        each.generate(
            prompt, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0
        )  # type: ignore[operator]

    eager, ours = medians(lambda: generated(model), lambda: generated(sharded))
    return f"| Llama, 4.8 M parameters | generate, a token | {ours / eager:.3f} | {(ours - eager) / 16:+.2f} ms |"


def beyond(name: str, model: nn.Module, call: Callable[[nn.Module], object]) -> str:
    """One line of the second table: a call of a sharded model beside the run that is in it, by itself."""
    sharded: Any = shard(model, mesh="a=1")
    given = list[Any]()
    with torch.no_grad():
        call(sharded)
        executable = sharded.compiled.executable
        run = executable.run
        executable.run = lambda *arguments: given.append(arguments) or run(*arguments)
        call(sharded)
        executable.run = run
        whole, bare = medians(lambda: call(sharded), lambda: run(*given[0]), rounds=200)
    parts, tensors = len(list(sharded.modules())), len(list(sharded.parameters()))
    return f"| {name} | {parts}, {tensors} | {bare:.2f} ms | {whole / bare:.3f} | {whole - bare:+.2f} ms |"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(), "\n")
    print("| model | step | sharded / eager | difference |\n| --- | --- | --- | --- |")
    x, ids = torch.randn(2, 8), torch.randint(0, 4096, (4, 128))
    for train in (False, True):
        print(row("two linear layers of 8", Tiny(), lambda model: model(x).sum(), train))
    for train in (False, True):
        print(row("Llama, 4.8 M parameters", llama(), lambda model: model(input_ids=ids, labels=ids).loss, train))
    print(compiled("Llama, 4.8 M parameters", llama(), lambda model: model(input_ids=ids, labels=ids).loss))
    print(tokens())
    for fused in (False, True):
        print(optimizer_step(fused))
    print()
    print("| model | modules, parameters | run | call / run | difference |\n| --- | --- | --- | --- | --- |")
    deep = nn.Sequential(*(Block() for _ in range(100)))
    print(beyond("two linear layers of 8", Tiny(), lambda model: model(x)))
    print(beyond("Llama, 4.8 M parameters", llama(), lambda model: model(input_ids=ids)))
    print(beyond("Llama, 32 layers of 64", llama(32, 64), lambda model: model(input_ids=ids[:2, :16])))
    print(beyond("100 blocks of 8", deep, lambda model: model(x)))


if __name__ == "__main__":
    main()
