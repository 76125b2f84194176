"""`shardc plan config.json`: a training step of a model of transformers, without weights and without a Python file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardc.cli import main
from shardc.errors import ShardcError
from shardc.from_config import step_from_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, "num_key_value_heads": 2,
        "vocab_size": 64, "max_position_embeddings": 64, "dtype": "bfloat16",
    },
    "GPT2LMHeadModel": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 64,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "MixtralForCausalLM": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **SMALL, "num_key_value_heads": 2,
        "num_local_experts": 4, "vocab_size": 64,
    },
    "T5ForConditionalGeneration": {
        "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64,
    },
    "BertForMaskedLM": {
        "model_type": "bert", "architectures": ["BertModel"], **SMALL, "vocab_size": 64, "max_position_embeddings": 64,
    },
    "ViTForImageClassification": {"model_type": "vit", **SMALL, "image_size": 32, "patch_size": 8},
}  # fmt: skip
"""Named for what is built of each; where no architecture is named, or one without a loss, the type tells."""

Write = Callable[[Any], str]


@pytest.fixture
def config(tmp_path: Path) -> Write:
    """Writes what it is given as a config, and tells the path."""

    def write(what: Any) -> str:
        file = tmp_path / "config.json"
        file.write_text(what if isinstance(what, str) else json.dumps(what))
        return str(file)

    return write


@pytest.mark.parametrize("built", CONFIGS)
def test_a_config_is_planned(built: str, config: Write, capsys: pytest.CaptureFixture[str]) -> None:
    seq = [] if built.startswith("ViT") else ["--seq", "16"]
    asked = ["plan", config(CONFIGS[built]), "--batch", "8", *seq, "--mesh", "dp=2", "--hardware", "h100"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "plan for mesh dp=2 on h100" in out and "output     output:0" in out
    assert ("samples a second" if built.startswith("ViT") else "tokens a second") in out
    call = step_from_config(Path(asked[1]), 8, 16 if seq else None)
    assert type(call.model).__name__ == built and call.model.training
    assert all(tensor.is_meta for tensor in (*call.model.parameters(), *call.kwargs.values()))
    dtype = str(next(call.model.parameters()).dtype).removeprefix("torch.")
    assert dtype == CONFIGS[built].get("dtype", "float32")


def test_a_folder_with_a_config_is_searched_for_meshes(config: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(Path(config(CONFIGS["LlamaForCausalLM"])).parent)
    assert main(["plan", folder, "--batch", "8", "--seq", "16", "--devices", "2", "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    assert "1 mesh of 2 devices on h100" in out and "the best: dp=2" in out
    assert out.splitlines()[-1] == f"shardc plan {folder} --batch=8 --seq=16 --mesh=dp=2 --hardware=h100"


def test_the_command_that_a_search_of_batches_ends_with_gives_its_plan(
    config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", config(CONFIGS["LlamaForCausalLM"]), "--seq", "16", "--hardware", "h100"]
    assert main([*asked, "--batch", "4:8", "--mesh", "dp=2"]) == 2
    assert "--batch 4:8 is for a search: name a number, or --devices" in capsys.readouterr().err
    assert main([*asked, "--batch", "4:8", "--devices", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["ranked"][0]
    assert {one["batch"] for one in found["ranked"]} == {4, 8} and best["batch"] == 8
    assert "--batch=8 --seq=16 --mesh=dp=2" in found["command"]
    assert main([*shlex.split(found["command"])[1:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["summary"] == best["summary"]


LLAMA = CONFIGS["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (LLAMA, "", "does not say how large a step is; add, for example, --batch 256 --seq 4096"),
        (LLAMA, "--batch 8", "add, for example, --batch 256 --seq 4096"),
        (LLAMA, "--batch 0 --seq 16", "batch=0 is no batch: write a number of rows"),
        (LLAMA, "--batch 8 --seq 0", "--batch 8 --seq 0: both must be 1 or more"),
        (LLAMA, "--batch 8 --seq 65", "llama knows 64 positions, and --seq 65 is more"),
        (CONFIGS["ViTForImageClassification"], "--batch 8 --seq 8", "vit reads pictures, which have no --seq"),
        (CONFIGS["ViTForImageClassification"], "", "add, for example, --batch 256"),
        ({"hidden_size": 8}, "--batch 8 --seq 8", "has no model_type"),
        ({"model_type": "lama"}, "--batch 8 --seq 8", "knows no model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": "mine_own", "auto_map": {}}, "--batch 8 --seq 8", "code that comes with a config is not run"),
        ({**LLAMA, "num_attention_heads": "four"}, "--batch 8 --seq 8", "config.json"),
        ({**LLAMA, "num_attention_heads": 5}, "--batch 8 --seq 8", "config.json"),
        ({"model_type": "encodec"}, "--batch 8 --seq 8", "encodec is no model that a step is known for"),
        ("[1, 2]", "--batch 8 --seq 8", "holds a list; a config of transformers is an object"),
        ("{'a'", "--batch 8 --seq 8", "is not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_config_is_one_message(
    settings: Any, flags: str, message: str, config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config(settings), *flags.split(), "--mesh", "dp=2", "--hardware", "h100"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and message in told.err and "Traceback" not in told.err


def test_a_file_that_is_none_and_sizes_for_a_python_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path / "no.json"), "--batch", "8", "--seq", "8", "--mesh", "dp=2"]) == 2
    assert "No such file or directory; name a config.json, or a folder that has one" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--batch", "8", "--seq", "8", "--mesh", "dp=2"]) == 2
    assert "name a config.json, or a folder that has one" in capsys.readouterr().err
    assert main(["plan", "model.py", "--seq", "8", "--mesh", "dp=2"]) == 2
    assert "--seq is for a config; how long the inputs of model.py are, inputs() says" in capsys.readouterr().err


def test_without_transformers_the_way_out_is_told(config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ShardcError, match="pip install transformers"):
        step_from_config(Path(config(LLAMA)), 8, 16)
