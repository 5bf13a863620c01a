"""Writes benchmarks/results/README.md, a section for each processor, from the JSON of rnnfast bench.

    make bench-results PROCESSOR=amd-zen-4
    python benchmarks/tables.py

The first command measures and writes the page too, the second one writes the page alone. A file is one
run, with all samples; its name is the name of the grid.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
INTRODUCTION = """\
# Measured, by processor

`python benchmarks/tables.py` writes this page from the samples beside it. A file is one run of
`rnnfast bench --json`. Peers took turns on the same input, state and weights. A ratio is torch.nn's
median time divided by rnnfast's: 2 means that rnnfast is twice as fast. Where ONNX Runtime ran too,
its ratio follows. The number in brackets is the floor divided by rnnfast's time: the floor is the
least time that the machine could need. Its name is that of the part that needs it: `gates` is the
formula of the cell, and `weights` the reading of the weights. A number without a name is that of the
products. [benchmarks/README.md](../README.md) says how a floor is measured. A file of schema 1 has no
floors; there the number is rnnfast's share of the measured peak of multiply-adds, although with few
rows the limit is the reading of the weights. B is the batch size, I the input size and H the hidden
size. T is the number of steps: 50, or 20 where B * H is larger than 32768 or H is 1024; in `steps` 1.
"""

SCHEMAS = (1, 2)  # of `rnnfast bench --json`

Row = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path.read_text())
    schema = run.get("schema", 1)
    if schema not in SCHEMAS:
        known = " and ".join(map(str, SCHEMAS))
        raise SystemExit(f"{path} has schema {schema}; this program knows {known}")
    return run


def median(row: Row, peer: str) -> float:
    return statistics.median(row["seconds"][peer])


def ratio(row: Row, peer: str = "torch.nn") -> float:
    return median(row, peer) / median(row, "rnnfast")


def share(row: Row, run: Mapping[str, Any]) -> str:
    """The floor of a row by its time, and the floor's name. Of schema 1 it is the share of the peak."""
    floor = row.get("floor")
    if floor is None:
        floor = {"products": row["flops"] / run["peak_flops"][row["case"]["dtype"]]}
    part = max(floor, key=lambda key: floor[key])
    named = "" if part == "products" else f" {part}"
    return f"{floor[part] / median(row, 'rnnfast'):.0%}{named}"


def entry(row: Row, run: Mapping[str, Any]) -> str:
    others = [p for p in ("torch.nn", "ONNX Runtime") if p in row["seconds"]]
    return f"{' / '.join(f'{ratio(row, p):.2f}' for p in others)} ({share(row, run)})"


def peaks(run: Mapping[str, Any]) -> str:
    rates = [f"{unit} {rate / 1e9:.0f}" for unit, rate in run["peak_flops"].items()]
    return f"measured peaks {', '.join(rates)} GFLOP/s, schema {run.get('schema', 1)}"


def name(case: Mapping[str, Any]) -> str:
    words = [case["cell"], f"T={case['T']} B={case['B']} I={case['I']} H={case['H']}", case["mode"]]
    words += [case["name"]] if case["name"] else []
    words += ["bidirectional"] if case["bidirectional"] else []
    words += [f"{case['layers']} layers"] if case["layers"] > 1 else []
    words += ["packed"] if case["packed"] else []
    words += ["" if case["dx"] else "on data"]
    return " ".join(filter(None, words))


def is_square(cases: Sequence[Mapping[str, Any]]) -> bool:
    """Whether I is H, and B and H alone tell the cases of a cell and a mode apart."""
    keys = [(c["cell"], c["mode"], c["B"], c["H"]) for c in cases]
    return len(set(keys)) == len(keys) >= 12 and all(c["I"] == c["H"] for c in cases)


def square(rows: Sequence[Row], run: Mapping[str, Any]) -> Iterator[str]:
    batches = sorted({row["case"]["B"] for row in rows})
    widths = sorted({row["case"]["H"] for row in rows})
    yield (
        f"| {rows[0]['case']['cell']}, {rows[0]['case']['mode']} | "
        + " | ".join(f"B={b}" for b in batches)
        + " |"
    )
    yield "| --- " * (len(batches) + 1) + "|"
    by_size = {(row["case"]["B"], row["case"]["H"]): entry(row, run) for row in rows}
    for width in widths:
        yield f"| H={width} | " + " | ".join(by_size.get((b, width), "") for b in batches) + " |"


def section(path: Path) -> Iterator[str]:
    run = read(path)
    rows = [row for row in run["results"] if row["seconds"]]
    dtype = rows[0]["case"]["dtype"]
    machine = run["machine"]
    yield f"### {path.stem}"
    yield ""
    versions = f"PyTorch {machine['torch'].split(',')[0]}, rnnfast {machine['rnnfast']}"
    yield (f"{dtype}, {run['threads']} threads, {machine['chosen']}, {versions}, {peaks(run)}.")
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["case"]["cell"], row["case"]["mode"]), []).append(row)
    means = []
    for (cell, mode), group in kinds.items():
        ratios = [ratio(row) for row in group]
        means.append(f"{cell} {mode} {statistics.geometric_mean(ratios):.2f} (least {min(ratios):.2f})")
    yield f"Geometric means: {', '.join(means)}."
    yield ""
    if is_square([row["case"] for row in rows]):
        for group in kinds.values():
            yield from square(group, run)
            yield ""
    else:
        yield "| case | ratio |"
        yield "| --- | --- |"
        for row in rows:
            yield f"| {name(row['case'])} | {entry(row, run)} |"
        yield ""
    behind = [row for row in rows if ratio(row) < 1]
    if behind:
        yield "torch.nn is faster in:"
        yield ""
        for row in sorted(behind, key=ratio):
            yield f"- {name(row['case'])}: {ratio(row):.2f}"
        yield ""


def page(folder: Path) -> str:
    lines = [INTRODUCTION]
    for processor in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(processor.glob("*.json"))
        if not files:
            continue
        machine = read(files[0])["machine"]
        lines += [f"## {processor.name}", "", f"{machine['CPU']}, {machine['cores']}.", ""]
        for path in files:
            lines += section(path)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    (args.folder / "README.md").write_text(page(args.folder))


if __name__ == "__main__":
    main()
