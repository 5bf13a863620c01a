"""The benchmark for machines: ``pytest benchmarks`` (``make bench-suite``), with pytest-benchmark.

One row for each case and peer, grouped by case, with pytest-benchmark's options: ``--benchmark-json``,
``--benchmark-compare``, ``-k LSTM``. RNNFAST_GRID chooses the cases, with the values of ``rnnfast bench
--grid``. Peers take turns only within ``rnnfast bench``: prefer that for ratios, this for histories.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

from rnnfast.cli.bench import grids, measure, peers

CASES = grids.GRIDS[os.environ.get("RNNFAST_GRID", "default")]()


def label(case: measure.Case) -> str:
    """Sizes and mode, and whatever else is not the default."""
    sizes = f"{case.cell} T{case.T} B{case.B} I{case.I} H{case.H} {case.mode}"
    others = (f for f in dataclasses.fields(case) if f.default is not dataclasses.MISSING)
    values = ((f.name, getattr(case, f.name), f.default) for f in others)
    return " ".join([sizes, *(f"{name}={value}" for name, value, usual in values if value != usual)])


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_case(benchmark, case, peer):
    given = measure.problem(case)
    job = peers.PEERS[peer](case, given)
    if job is None:
        pytest.skip(f"{peer} does not do this")
    difference = measure.difference(job(), peers.PEERS["torch.nn"](case, given)())
    assert difference <= measure.SAME[case.dtype]
    benchmark.group = label(case)
    benchmark.name = peer
    benchmark.extra_info["flops"] = case.flops
    benchmark(job)
