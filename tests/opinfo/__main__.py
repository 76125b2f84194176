"""Run the whole database and write the page: `python -m opinfo`, with tests/ on the path.

Records are kept as they come, so a run that was stopped goes on where it was; `--again` starts afresh (or, with
names, runs these anew).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from opinfo.database import entries
from opinfo.judge import RECORDED, SAMPLES, Record
from opinfo.summary import Summary, page, status
from opinfo.workers import judged
from shardc.inspect.progress import tracked

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "opinfo.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="patterns of operator names; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=120, help="seconds an operator")
    parser.add_argument("--again", action="store_true", help="forget earlier records")
    parser.add_argument("--records", type=Path, default=ROOT / "build" / "opinfo.jsonl")
    options = parser.parse_args()
    every = list(entries())
    chosen = [n for n in every if not options.names or any(re.fullmatch(p, n) for p in options.names)]
    records = _read(options.records)
    if options.again:
        records = {name: record for name, record in records.items() if name not in chosen}
    _write(options.records, records)
    todo = [name for name in chosen if name not in records]
    for record in tracked(judged(todo, options.jobs, SAMPLES, options.timeout), "operators", len(todo)):
        records[record.name] = record
        with options.records.open("a") as file:
            print(json.dumps(record.plain()), file=file)
    summary = Summary([records[name] for name in every if name in records])
    print(summary.totals())
    if len(records) == len(every):
        PAGE.write_text(page(summary))
        known = {name: status(records[name]) for name in json.loads(RECORDED.read_text())}
        RECORDED.write_text(json.dumps(known, indent=1) + "\n")


def _read(path: Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    found = (Record.read(json.loads(line)) for line in path.read_text().splitlines())
    return {record.name: record for record in found}


def _write(path: Path, records: dict[str, Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record.plain()) + "\n" for record in records.values()))


if __name__ == "__main__":
    main()
