"""The records of a small plan, as the page of the report draws them."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

import shardc.api
from samples.textbook import Logits
from shardc.inspect.html.data import Asking, plan_records


def test_two_layers_on_two_ranks(golden: Callable[[str, str], None]) -> None:
    asking = Asking("shardc explain mlp.py --mesh=tp=2", shell=True)
    with torch.no_grad():
        asked = {"up.weight": ("tp", None), "down.weight": (None, "tp")}
        compiled = shardc.api.compile(
            Logits(64, 128), "tp=2", (torch.randn(32, 64),), hardware="h100", constraints=asked
        )
    records = plan_records(compiled.reported(asking).snapshots, compiled.plan, asking)
    records["graphs"] = [graph for graph in records["graphs"] if graph["pass"] in ("capture", "reshard")]
    shown = {
        name: record for name, record in records.items() if name != "head"
    }  # how a plan prints is tested elsewhere
    golden("two_layers", "".join(f"{name}\n{_text(record)}\n" for name, record in shown.items()))
    assert records["tensors"][0][4:] == [128 * 64 * 4, 64 * 64 * 4]  # bytes of the whole, and of a half
    assert records["dims"][0]["parts"] == [[[0, 64]], [[64, 64]]]


def _text(record: object) -> str:
    """Entries of a list or a record on lines of their own."""
    entries = record.items() if isinstance(record, dict) else record
    lines = [json.dumps(one) for one in entries] if isinstance(record, (dict, list)) else [json.dumps(record)]
    return "".join(f"  {line}\n" for line in lines)
