"""Benchmarks with pytest-benchmark: ``pytest benchmarks``, or ``make bench-suite``.

There is one row for each case and peer, grouped by case. Useful options are ``--benchmark-json``,
``--benchmark-compare`` and ``-k LSTM``. RNNFAST_GRID chooses the cases, with the values of ``rnnfast
bench --grid``. Here peers do not take turns. So use ``rnnfast bench`` to compare peers, and this suite
to compare versions of rnnfast over time.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

from rnnfast.cli.bench import grids, measure, peers

CASES = grids.GRIDS[os.environ.get("RNNFAST_GRID", "default")]()


def label(case: measure.Case) -> str:
    """Sizes and mode, and the options that are not the default."""
    sizes = f"{case.cell} T{case.T} B{case.B} I{case.I} H{case.H} {case.mode}"
    options = (f for f in dataclasses.fields(case) if f.default is not dataclasses.MISSING)
    values = ((f.name, getattr(case, f.name), f.default) for f in options)
    return " ".join(
        [sizes, *(f"{name}={value}" for name, value, default in values if value != default)]
    )


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_case(benchmark, case, peer):
    problem = measure.problem(case)
    job = peers.PEERS[peer](case, problem)
    if job is None:
        pytest.skip(f"{peer} does not support this case")
    difference = measure.difference(job(), peers.PEERS["torch.nn"](case, problem)())
    assert difference <= measure.SAME[case.dtype]
    benchmark.group = label(case)
    benchmark.name = peer
    benchmark.extra_info["flops"] = case.flops
    benchmark(job)
