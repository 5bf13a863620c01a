"""Writes the table of the mode "auto" from files that beside_cudnn.py wrote with --json.

    python benchmarks/gpu/table.py benchmarks/results/DEVICE/*.json

The cases of a compute capability replace those that the table had of it. Rows that cuDNN computed on
both sides, since no tier fits, are left out.
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
    return [Case(Kind(*row["case"][:KINDS]), *row["case"][KINDS:], row["ratio"]) for row in measured]


def merged(runs: list[dict[str, Any]], table: dict[str, Any]) -> dict[str, Any]:
    """The table with the cases of the runs in the place of the older ones of the same device."""
    for capability in {run["capability"] for run in runs}:
        own = [run for run in runs if run["capability"] == capability]
        cases = {case[:-1]: case for run in own for case in cases_of(run)}
        facts = {name: own[-1][name] for name in ("device", "torch", "cudnn")}
        table[capability] = facts | {"cases": [cuda_measured.row_of(c) for c in cases.values()]}
    return table


def text_of(table: dict[str, Any]) -> str:
    """JSON with one case a line."""
    entries = []
    for capability in sorted(table):
        entry = dict(table[capability])
        rows = ",\n   ".join(json.dumps(row) for row in entry.pop("cases"))
        facts = "".join(
            f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in entry.items()
        )
        entries.append(f' {json.dumps(capability)}: {{\n{facts}  "cases": [\n   {rows}\n  ]\n }}')
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
