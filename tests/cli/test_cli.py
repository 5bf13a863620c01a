"""The commands: what they print, write, refuse and return."""

import gc
import json
import subprocess
import sys
import time

import pytest
import torch

from rnnfast import _native, cli
from rnnfast.cli import info
from rnnfast.cli.bench import command, floors, grids, measure, peers
from rnnfast.cli.bench.measure import FORWARD, TRAIN, Case
from rnnfast.stack import packed_weights


def test_info_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rnnfast", "info"], capture_output=True, text=True, check=True
    )
    for word in ("compiler", "OpenMP", "torch"):
        assert word in done.stdout


def test_info_with_cuda_and_without_torch(monkeypatch):
    monkeypatch.setattr(_native, "_cuda", object())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert info.cuda_state() == "built; no layer uses it without torch"


def test_check_agrees_on_this_machine(capsys):
    assert cli.main(["check"]) == 0
    assert "LSTM" in capsys.readouterr().out


def shorten(monkeypatch):
    """Make `rnnfast bench` measure so little that its figures mean nothing."""
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(floors, "SECONDS", 0.001)
    monkeypatch.setattr(command, "SECONDS", 0.1)


def test_bench_writes_every_sample_and_a_picture(tmp_path, capsys, monkeypatch):
    shorten(monkeypatch)
    samples, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [
        "--shape",
        "3,2,5,7",
        "--cell",
        "GRU",
        "--json",
        str(samples),
        "--picture",
        str(picture),
    ]
    assert cli.main(["bench", *arguments]) == 0
    assert "GRU" in capsys.readouterr().out
    run = json.loads(samples.read_text())
    assert run["schema"] == 2
    assert {"float32", "bfloat16"} <= set(run["peak_flops"])
    assert {(rate["cell"], rate["pass"]) for rate in run["formula_rates"]} == {
        ("gru", "forward"),
        ("gru", "backward"),
    }
    assert run["read_rates"]
    results = run["results"]
    assert [r["case"]["mode"] for r in results] == [FORWARD, TRAIN]
    for result in results:
        assert set(result["floor"]) == {"products", "gates", "weights"}
        assert min(result["floor"].values()) > 0
        assert result["unit"] == "float32"
        assert len(result["seconds"]["rnnfast"]) >= measure.LEAST_SAMPLES
        assert min(result["seconds"]["torch.nn"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_peer_has_enough_samples(monkeypatch):
    """Also one that is slower than a turn, beside one that runs many times in a turn."""
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.001)
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0.0)
    jobs = {"fast": lambda: [], "slow": lambda: time.sleep(0.002)}
    monkeypatch.setattr(measure, "BATCH_SECONDS", 1e-5)
    timings = measure.interleave(jobs, 0.001)
    assert len(timings["slow"].samples) >= measure.LEAST_SAMPLES


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "3,2,5"], ["--threads", "0"], ["--json", "/no/such/folder/f"], ["--grid", "none"]],
    ids=str,
)
def test_bench_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", *arguments])
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_bench_does_not_time_peers_that_differ(tmp_path, monkeypatch, capsys):
    def wrong(case, given):
        job = peers.PEERS["torch.nn"](case, given)
        return lambda: [value + 1 for value in job()]

    given = {"rnnfast": wrong, "torch.nn": peers.PEERS["torch.nn"]}
    result = measure.measure(Case("GRU", 2, 2, 3, 4, FORWARD), given, 0.01)
    assert not result.same
    assert not result.timings
    shorten(monkeypatch)
    monkeypatch.setattr(command, "PEERS", given)
    picture = tmp_path / "bench.png"
    assert cli.main(["bench", "--shape", "2,2,3,4", "--cell", "GRU", "--picture", str(picture)]) == 1
    assert "results differ" in capsys.readouterr().out
    assert not picture.exists()


@pytest.mark.parametrize("grid", list(grids.GRIDS))
def test_grids_name_cases_that_torch_can_run(grid):
    cases = grids.GRIDS[grid]()
    assert cases
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert case.flops > 0
        assert case.lengths().max() <= case.T


VARIANTS = [
    Case("LSTM", 4, 3, 5, 6, TRAIN),
    Case("GRU", 4, 3, 5, 6, TRAIN, layers=2, bidirectional=True),
    Case("RNN", 4, 3, 5, 6, TRAIN, packed=True).on_data(),
    Case("LSTM", 4, 3, 5, 6, TRAIN, proj=2),
    Case("LSTM", 4, 3, 5, 6, FORWARD, layers=2, bidirectional=True),
    Case("GRU", 4, 3, 5, 6, FORWARD),
    Case("RNN", 4, 3, 5, 6, FORWARD),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_all_peers_that_are_here_compute_the_same(case):
    given = measure.problem(case)
    truth = peers.PEERS["torch.nn"](case, given)()
    for peer in peers.PEERS.values():
        job = peer(case, given)
        if job is not None:
            assert measure.difference(job(), truth) < 1e-5


def test_flops_count_what_is_there():
    full = Case("LSTM", 10, 4, 8, 8, FORWARD)
    assert full.flops == 2 * 10 * 4 * 4 * 8 * 16
    trained = Case("LSTM", 10, 4, 8, 8, TRAIN)
    assert trained.flops == 3 * full.flops
    assert trained.on_data().flops == 3 * full.flops - full.flops / 2
    packed = Case("LSTM", 10, 4, 8, 8, FORWARD, packed=True)
    assert packed.flops == full.flops * int(packed.lengths().sum()) / 40


def test_seeds_give_the_same_problem():
    case = Case("GRU", 3, 2, 4, 5, TRAIN)
    first, second = measure.problem(case), measure.problem(case)
    assert torch.equal(first.x, second.x)
    assert all(torch.equal(a, b) for a, b in zip(first.states, second.states, strict=True))


@pytest.mark.parametrize("mode", [FORWARD, TRAIN])
def test_frozen_peer_computes_the_same(mode):
    case = Case("LSTM", 2, 1, 3, 4, mode)
    given = measure.problem(case)
    job = peers.frozen_peer(case, given)
    assert packed_weights.HELD
    assert measure.difference(job(), peers.PEERS["torch.nn"](case, given)()) < 1e-5
    del job
    gc.collect()
    assert not packed_weights.HELD


def test_bench_runs_only_the_peers_asked_for(tmp_path, monkeypatch):
    shorten(monkeypatch)
    file = tmp_path / "samples.json"
    arguments = ["--shape", "1,1,2,3", "--cell", "GRU", "--frozen", "--beside", "torch.nn"]
    assert cli.main(["bench", *arguments, "--json", str(file)]) == 0
    for result in json.loads(file.read_text())["results"]:
        assert set(result["seconds"]) == {"rnnfast", "torch.nn"}
