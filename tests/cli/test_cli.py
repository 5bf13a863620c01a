"""The commands: what they print, write, refuse and return."""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast import _native, cli
from rnnfast.cli import check, common, demo, info, language
from rnnfast.cli.bench import command, floors, grids, measure, peers, table
from rnnfast.cli.bench.measure import FORWARD, TRAIN, Case, Result, Timing
from rnnfast.cli.common import CommandError
from rnnfast.cli.neighbours import Neighbours
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


WRONG = {
    "outputs": lambda y, h: (y + 1e-3, h),
    "gradients": lambda y, h: (2 * y - y.detach(), h),
    "NaN": lambda y, h: (y, h + math.nan),  # with the right gradients
    "without gradients": lambda y, h: (y if torch.is_grad_enabled() else y + 1e-3, h),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_check_fails_where_a_cell_is_wrong(wrong, monkeypatch, capsys):
    class Wrong(rnnfast.GRU):
        def forward(self, *arguments):
            return WRONG[wrong](*super().forward(*arguments))

    monkeypatch.setattr(check, "SUBJECTS", (check.Subject("GRU", Wrong, nn.GRU),))
    monkeypatch.setattr(check, "QUICK", check.QUICK[:2])
    monkeypatch.setattr(check, "FULL", ())
    before = torch.get_rng_state()
    assert cli.main(["check", "--quick", "--seed", "7"]) == 1
    assert torch.equal(torch.get_rng_state(), before)
    out = capsys.readouterr().out
    assert out.count("FAIL") == 2  # in float32 and in float64
    assert "(seed 7)" in out


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "rnnfast info: interrupted"),
        (CommandError("no such thing"), 2, "rnnfast info: no such thing"),
        (
            ModuleNotFoundError(name="matplotlib.figure"),
            2,
            'rnnfast info: needs matplotlib: pip install "rnnfast[demo]"',
        ),
    ],
    ids=["interrupt", "command", "module"],
)
def test_errors_without_a_traceback(error, status, said, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == status
    assert capsys.readouterr().err == said + "\n"


def test_other_missing_modules_have_a_traceback(monkeypatch):
    def fail(args):
        raise ModuleNotFoundError(name="numpy")

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


@pytest.mark.parametrize("arguments", [[], ["chek"]], ids=str)
def test_no_command(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(arguments)
    assert refused.value.code == 2
    assert "usage: rnnfast" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error_of_the_command():
    with pytest.raises(CommandError, match="cannot write f: no space"), common.writing(Path("f")):
        raise OSError("no space")


@pytest.mark.parametrize("seed", ["-1", "x", str(2**63)])
def test_seeds_that_torch_does_not_take(seed, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["check", "--seed", seed])
    assert refused.value.code == 2
    assert "expected an integer from 0 to 2**63 - 1" in capsys.readouterr().err


def test_info_names_a_forced_instruction_set(python):
    assert (
        "baseline (RNNFAST_ISA=baseline)"
        in python(["-m", "rnnfast", "info"], RNNFAST_ISA="baseline").stdout
    )


def test_info_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    info.show({"rnnfast": "1.2", "numpy": "2.0"})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["rnnfast", "1.2"],
        ["numpy", "2.0"],
    ]


def test_info_warns_of_two_openmp_runtimes(monkeypatch, capsys):
    for runtimes in (["a"], ["a", "b"]):
        monkeypatch.setattr(info, "openmp_runtimes", lambda runtimes=runtimes: runtimes)
        assert cli.main(["info"]) == 0
        said = "several OpenMP runtimes" in capsys.readouterr().out
        assert said == (len(runtimes) > 1)


@pytest.mark.parametrize(("cores", "is_said"), [(None, False), (0.05, False), (1.5, True)])
def test_a_warning_of_busy_neighbours(cores, is_said, monkeypatch):
    monkeypatch.setattr(Neighbours, "cores", lambda self: cores)
    assert ("Other processes used 1.5 of" in Neighbours().warning()) == is_said


SENTENCE = "The cat sat on the mat, and the dog sat on the log.\n"


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    """The arguments of a demo that takes a second."""
    for name, number in {"HIDDEN": 8, "LENGTH": 6, "BATCH": 2, "BLOCK": 2}.items():
        monkeypatch.setattr(language, name, number)
    monkeypatch.setattr(check, "QUICK", check.QUICK[:1])
    (tmp_path / "text").write_text(20 * SENTENCE, encoding="utf-8")
    return ["demo", "--text", str(tmp_path / "text"), "--steps", "5", "--out", str(tmp_path / "d.png")]


def test_demo(small_demo, tmp_path, capsys):
    assert cli.main(small_demo) == 0
    assert "Same answers, same training" in capsys.readouterr().out
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_demo_compares_torch_and_rnnfast(small_demo):
    theirs, ours = language.pair("GRU", language.read_text(Path(small_demo[2])), 0)
    assert type(theirs.model.recurrent) is nn.GRU
    assert type(ours.model.recurrent) is rnnfast.GRU
    assert theirs.model is not ours.model


@pytest.mark.parametrize("wrong", ["training", "check"])
def test_demo_fails_where_the_results_differ(wrong, small_demo, monkeypatch, capsys):
    if wrong == "training":
        make = language.pair

        def pair(*arguments):
            theirs, ours = make(*arguments)
            with torch.no_grad():
                ours.model.head.bias[0] += 1
            return theirs, ours

        monkeypatch.setattr(language, "pair", pair)
    else:
        monkeypatch.setattr(check, "SUBJECTS", (check.Subject("Cell", nn.GRUCell, nn.RNNCell),))
        monkeypatch.setattr(check, "compare_once", lambda *_: (check.Errors(1, 1), check.Errors()))
    assert cli.main(small_demo) == 1
    said = {
        "training": "The loss curves differ beyond rounding: GRU, LSTM",
        "check": "The check failed",
    }
    assert said[wrong] in capsys.readouterr().out


def test_the_last_losses_are_compared_too():
    pairs = []
    for end in (1.0, 1.0 + 2 * demo.LAST_BOUND):
        model = language.LanguageModel("GRU", 3)
        steps = demo.FIRST + demo.LAST
        theirs = language.Training("torch.nn", model, [1.0] * steps)
        ours = language.Training("rnnfast", model, [1.0] * demo.FIRST + [end] * demo.LAST)
        pairs.append(demo.Pair(theirs, ours))
    assert [pair.agree for pair in pairs] == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", r"has 5 characters, the demo needs at least \d+"),
        (b"\xff" * 1000, r"is not UTF-8 text \(byte 0\)"),
        (None, "cannot read .*: No such file"),
    ],
    ids=["short", "bytes", "none"],
)
def test_texts_that_the_demo_does_not_take(content, message, tmp_path):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(CommandError, match=message):
        language.read_text(tmp_path / "text")


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
    assert {"CPU", "torch"} <= run["machine"].keys()
    assert not {"system", "OpenMP runtimes mapped"} & run["machine"].keys()
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
    [
        *(["--shape", "3,2,5"], ["--threads", "0"], ["--json", "/no/such/folder/f"], ["--json", "/"]),
        *(["--grid", "none"], ["--picture", "figure.text"]),
    ],
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


def test_a_result_that_is_not_a_number_differs():
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert measure.difference([one, one], [one, one]) == 0
    assert measure.difference([one, nan], [one, one]) == math.inf
    assert measure.difference([nan, one], [one, one]) == math.inf
    assert measure.difference([one[:1]], [one]) == math.inf


def result_of(ours, theirs, other):
    """A result with a time of rnnfast, of torch.nn and of another peer."""
    times = {"rnnfast": ours, "torch.nn": theirs, "JAX": other}
    timings = {name: Timing((time, time)) for name, time in times.items()}
    return Result(Case("GRU", 2, 2, 3, 4, FORWARD), timings, dict.fromkeys(times, 0.0))


def test_ratios_and_their_summary():
    """A ratio is the time of a peer divided by rnnfast's."""
    results = [result_of(1.0, 2.0, 4.0), result_of(1.0, 8.0, 4.0)]
    assert [result.ratio() for result in results] == [2, 8]
    assert [result.ratio_to_best for result in results] == [2, 4]
    assert table.summary(results[:1]) == ""
    assert table.summary(results).splitlines() == [
        "geometric means:",
        "GRU forward: 4.00 times torch.nn (least 2.00), 2.83 times the fastest other (least 2.00)",
    ]


def test_the_cases_that_are_asked_for():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args([]).grid == "default"
    assert parser.parse_args(["--quick"]).grid == "quick"
    chosen = command.cases(["GRU"], None, "quick", "bfloat16")
    assert [(case.cell, case.dtype) for case in chosen] == [("GRU", "bfloat16")]
    chosen = command.cases(["GRU", "RNN"], [(1, 2, 3, 4)], "quick", "float64")
    assert chosen == [
        Case(cell, 1, 2, 3, 4, mode, "float64") for mode in (FORWARD, TRAIN) for cell in ("GRU", "RNN")
    ]


def test_a_grid_without_the_cell(capsys):
    assert cli.main(["bench", "--grid", "steps", "--cell", "RNN"]) == 2
    assert capsys.readouterr().err == "rnnfast bench: steps has no case for RNN\n"


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
    assert cli.main(["bench", *arguments, "--threads", "2", "--json", str(file)]) == 0
    run = json.loads(file.read_text())
    assert run["threads"] == torch.get_num_threads() == 2
    for result in run["results"]:
        assert set(result["seconds"]) == {"rnnfast", "torch.nn"}
