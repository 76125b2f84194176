"""On a GPU: small models train on a virtual mesh of parts of it like the plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import shardc
from gpu.device import DEVICE, ROUNDED, gradients_off, needs_a_gpu, off

pytestmark = needs_a_gpu
SIZES = dict(
    vocab_size=320, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=256, max_position_embeddings=64,
)  # fmt: skip
EXPERTS = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}


class Pictures(nn.Sequential):
    """Convolutions, norms of a batch, pooling."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.GELU(),
            nn.ConvTranspose2d(32, 8, 2, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip


def decoder(model: type[Any], config: type[Any], **settings: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(use_cache=False, **settings))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": decoder(t.LlamaForCausalLM, t.LlamaConfig, **SIZES),
    "gemma2": decoder(t.Gemma2ForCausalLM, t.Gemma2Config, **SIZES, head_dim=32, sliding_window=8),
    "mixtral": decoder(t.MixtralForCausalLM, t.MixtralConfig, **EXPERTS),
    "gpt_oss": decoder(t.GptOssForCausalLM, t.GptOssConfig, **EXPERTS, head_dim=32, sliding_window=8),
    "gpt2": decoder(
        t.GPT2LMHeadModel, t.GPT2Config, vocab_size=320, n_embd=128, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "pictures": Pictures,
}  # fmt: skip


def batch(name: str, dtype: torch.dtype) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "pictures":
        return {"input": torch.randn(8, 3, 16, 16, generator=generator).to(DEVICE, dtype)}
    ids = torch.randint(0, 320, (4, 32), generator=generator).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def loss_of(out: Any) -> Tensor:
    return out.loss if hasattr(out, "loss") else out.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "a=3"])
@pytest.mark.parametrize("name", MODELS)
def test_trains_like_the_plain_module(name: str, mesh: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    alone = MODELS[name]().to(DEVICE, dtype)
    sharded = shardc.shard(copy.deepcopy(alone), mesh=mesh)
    inputs, losses = batch(name, dtype), list[tuple[Tensor, Tensor]]()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (sharded, alone)]
    for step in range(3):
        ours, theirs = (loss_of(model(**inputs)) for model in (sharded, alone))
        losses.append((ours.detach(), theirs.detach()))
        ours.backward()
        theirs.backward()
        if not step:
            assert gradients_off(sharded, alone) < 3 * ROUNDED[dtype]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1][1] < losses[0][1]
    assert max(off(*pair) for pair in losses) < ROUNDED[dtype]


def test_generates_like_the_plain_module() -> None:
    torch.manual_seed(0)
    alone = MODELS["llama"]().to(DEVICE).eval()
    sharded = shardc.shard(copy.deepcopy(alone), mesh="tp=2")
    prompt = torch.arange(2 * 7, device=DEVICE).view(2, 7)
    ours, theirs = (
        model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]
        for model in (sharded, alone)
    )
    assert torch.equal(ours, theirs)


def test_autocast_and_scaled_gradients() -> None:
    torch.manual_seed(0)
    alone = MODELS["llama"]().to(DEVICE)
    sharded = shardc.shard(copy.deepcopy(alone), mesh="dp=2,tp=2")
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)
    for model in (sharded, alone):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = loss_of(model(**batch("llama", torch.float32)))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert gradients_off(sharded, alone) < 3 * ROUNDED[torch.bfloat16]


def test_a_stream_of_the_user() -> None:
    """What is computed on another stream than the default one waits for nothing else than what is on it."""
    torch.manual_seed(0)
    alone = MODELS["llama"]().to(DEVICE)
    sharded, inputs = shardc.shard(copy.deepcopy(alone), mesh="dp=2,tp=2"), batch("llama", torch.float32)
    loss_of(sharded(**inputs)).backward()
    loss_of(alone(**inputs)).backward()
    sharded.zero_grad()
    with torch.cuda.stream(torch.cuda.Stream()) if DEVICE.type == "cuda" else torch.enable_grad():
        loss_of(sharded(**inputs)).backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert gradients_off(sharded, alone) < 3 * ROUNDED[torch.float32]
