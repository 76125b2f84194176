"""Files of weights: what they hold, whose names they have, and what becomes of older ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import shardc
from shardc.errors import ShardcError
from shardc.pretrained import places
from shardc.pretrained.places import resting_cuts
from shardc.runtime.execute.slots import cut, local_shapes

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
LLAMA = LlamaConfig(**SIZES)


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


def check_same(one: nn.Module, other: nn.Module) -> None:
    pairs = zip([*one.named_parameters(), *one.named_buffers()], [*other.parameters(), *other.buffers()], strict=True)
    for (name, tensor), expected in pairs:
        assert not tensor.is_meta and torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)),  # experts are stacked
    ],
    ids=lambda model: type(model).__name__,
)
def test_transformers_and_we_read_each_other(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "theirs")
    read = on_meta(model)
    assert shardc.load_pretrained(read, tmp_path / "theirs") == ([], [])
    check_same(read, model)
    assert read.lm_head.weight is read.get_input_embeddings().weight or not model.config.tie_word_embeddings
    shardc.save_pretrained(read, tmp_path / "ours", max_shard_size="4KB")
    held = {file.name for file in (tmp_path / "ours").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < held and len(held) > 5
    check_same(type(model).from_pretrained(tmp_path / "ours"), model)
    shardc.save_pretrained(read, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {f.name for f in (tmp_path / "theirs").iterdir()}


def test_with_and_without_the_prefix_and_a_head(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LLAMA)
    shardc.save_pretrained(model, tmp_path / "head")
    shardc.save_pretrained(model.model, tmp_path / "base")
    base, whole = on_meta(model.model), on_meta(model)
    with pytest.raises(ShardcError, match=r"fit LlamaModel:\n  unknown to the model: lm_head.weight\n.*strict="):
        shardc.load_pretrained(base, tmp_path / "head")
    assert base.norm.weight.is_meta and isinstance(base, LlamaModel)
    assert shardc.load_pretrained(base, tmp_path / "head", strict=False) == ([], ["lm_head.weight"])
    check_same(base, model.model)
    with pytest.raises(ShardcError, match=r"missing in the files: lm_head.weight"):
        shardc.load_pretrained(whole, tmp_path / "base")
    torch.manual_seed(0)
    found = shardc.load_pretrained(whole, tmp_path / "base", strict=False)
    assert found.missing_keys == ["lm_head.weight"] and not whole.lm_head.weight.is_meta
    check_same(whole.model, model.model)


def test_old_names(tmp_path: Path) -> None:
    model = BertModel(BertConfig(**SIZES))
    held = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": one
        for name, one in model.state_dict().items()
    }
    held["bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(held, tmp_path / "old.safetensors")
    read = on_meta(model)
    shardc.load_pretrained(read, tmp_path / "old.safetensors")
    check_same(read, model)


def test_a_sharded_model_is_filled_in_place_before_and_after_a_call(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    source, x = net(), torch.randn(4, 8)
    shardc.save_pretrained(source, tmp_path / "net")
    with torch.device("meta"):
        model = net()
    model = shardc.shard(model, mesh="dp=2,tp=2", hardware="cpu")
    shardc.load_pretrained(model, tmp_path / "net")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.testing.assert_close(model(x), source(x))
    model(x).sum().backward()
    optimizer.step()
    weight = model[0].weight
    assert not torch.equal(weight, source[0].weight)
    shardc.load_pretrained(model, tmp_path / "net" / "model.safetensors")
    assert model[0].weight is weight
    torch.testing.assert_close(model(x), source(x))


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    shardc.save_pretrained(model, tmp_path / "whole", max_shard_size=64)
    index = tmp_path / "whole" / "model.safetensors.index.json"
    first = tmp_path / "whole" / "model-00001-of-00002.safetensors"
    assert json.loads(index.read_text())["metadata"] == {"total_size": 80}
    shardc.load_pretrained(model, index)
    before = model.weight.detach().clone()
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(ShardcError, match=f"{first.name} cannot be read as safetensors: .*truncated"):
        shardc.load_pretrained(model, tmp_path / "whole")
    first.unlink()
    with pytest.raises(ShardcError, match=f"{first.name} cannot be read"):
        shardc.load_pretrained(model, index)
    index.write_text("{}")
    with pytest.raises(ShardcError, match="is no index of safetensors"):
        shardc.load_pretrained(model, index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardcError, match=r"holds no model.safetensors"):
        shardc.load_pretrained(model, tmp_path / "empty")
    with pytest.raises(ShardcError, match="neither a file nor a folder"):
        shardc.load_pretrained(model, tmp_path / "nothing")
    assert torch.equal(model.weight, before)
    with torch.device("meta"), pytest.raises(ShardcError, match="weight is on the meta device: materialize"):
        shardc.save_pretrained(nn.Linear(2, 2), tmp_path / "meta")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = nn.Linear(4, 4), tmp_path / "model"
    shardc.save_pretrained(model, folder)
    (folder / "tokenizer.json").write_text("mine")
    before = load_file(folder / "model.safetensors")
    model.weight.data.zero_()
    monkeypatch.setattr("shardc.pretrained.save.os.fsync", full_disk)
    with pytest.raises(ShardcError, match=r"cannot save to .*No space left.*name another folder"):
        shardc.save_pretrained(model, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], before["weight"])
    monkeypatch.undo()
    shardc.save_pretrained(model, folder, max_shard_size=64)
    assert sorted(file.name for file in folder.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    with pytest.raises(ShardcError, match="not a folder"):
        shardc.save_pretrained(model, folder / "tokenizer.json")


def full_disk(_: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "cuts",
    [
        ((0, 1, "a"), (1, 1, "b")),
        ((0, 1, "a"), (0, 1, "b")),
        ((0, 3, "b"),),
        ((0, 3, "a"), (1, 1, "b")),
        ((0, 1, "b"), (1, 1, "a")),
    ],
)
def test_a_rank_reads_what_it_holds(cuts: tuple[tuple[int, int, str], ...]) -> None:
    axes, whole = {"a": 2, "b": 3}, torch.arange(18.0 * 10).reshape(18, 10)
    for a in range(2):
        for b in range(3):
            where = {"a": a, "b": b}
            local = torch.zeros(local_shapes(whole.shape, cuts, axes)[-1])
            places._copy(local, lambda piece: whole[piece], whole.shape, cuts, where, axes)
            assert torch.equal(local, cut(whole, cuts, where, axes))


def test_where_a_parameter_rests_before_a_plan() -> None:
    axes = {"dp": 2, "tp": 4}
    assert resting_cuts((16, 3), axes) == ((0, 1, "dp"), (0, 1, "tp"))
    assert resting_cuts((6,), axes) == ((0, 1, "dp"),)
    assert resting_cuts((51, 16), axes) == ((0, 1, "tp"),)  # unevenly: the last rank has less
    assert resting_cuts((3, 16), axes) == resting_cuts((), axes) == resting_cuts((5,), axes) == ()
