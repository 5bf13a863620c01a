"""Writes the table of the mode "auto" from files that beside_cudnn.py wrote with --json.

    python benchmarks/gpu/table.py benchmarks/results/DEVICE/*.json

The cases of a kind of device replace those that the table had of it. Rows that cuDNN computed on both
sides, since no tier fits, are left out. The ratio of a case is the lower quartile of cuDNN's times over
the upper one of ours, so that noise makes no win.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rnnfast.stack import cuda_measured
from rnnfast.stack.cuda_measured import Case, Kind

KINDS = len(Kind._fields)


def cases_of(run: dict[str, Any]) -> list[Case]:
    measured = [row for row in run["rows"] if "cuDNN" not in row["tier"]]
    return [
        Case(Kind(*row["case"][:KINDS]), *row["case"][KINDS:], row["steps"], ratio_of(row))
        for row in measured
    ]


def ratio_of(row: dict[str, Any]) -> float:
    (_, ours), (theirs, _) = row["quartiles"]
    return float(theirs / ours)


def merged(runs: list[dict[str, Any]], table: dict[str, Any]) -> dict[str, Any]:
    """The table with the cases of the runs in the place of the older ones of the same device."""
    keys = [cuda_measured.key_of(run["capability"], run["multiprocessors"]) for run in runs]
    for key in set(keys):
        own = [run for run, of in zip(runs, keys, strict=True) if of == key]
        cases = {case[:-1]: case for run in own for case in cases_of(run)}
        facts = {name: own[-1][name] for name in ("device", "driver", "torch", "cudnn", "commit")}
        table[key] = facts | {"cases": [cuda_measured.row_of(c) for c in cases.values()]}
    return table


def text_of(table: dict[str, Any]) -> str:
    """JSON with one case a line."""
    entries = []
    for key in sorted(table):
        entry = dict(table[key])
        rows = ",\n   ".join(json.dumps(row) for row in entry.pop("cases"))
        facts = "".join(
            f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in entry.items()
        )
        entries.append(f' {json.dumps(key)}: {{\n{facts}  "cases": [\n   {rows}\n  ]\n }}')
    return "{\n" + ",\n".join(entries) + "\n}\n" if entries else "{}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--table", type=Path, default=cuda_measured.FILE)
    arguments = parser.parse_args()
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
    table = json.loads(arguments.table.read_text(encoding="utf-8"))
    arguments.table.write_text(text_of(merged(runs, table)), encoding="utf-8")


if __name__ == "__main__":
    main()
