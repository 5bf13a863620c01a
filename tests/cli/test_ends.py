"""How the commands end: one line instead of a traceback, and no lost columns on a narrow console."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from rnnfast import _C, cli
from rnnfast.cli import check, common, info
from rnnfast.cli.bench import command, floors, table
from rnnfast.cli.bench.floors import Floor
from rnnfast.cli.bench.measure import FORWARD, Case, Result, Timing
from rnnfast.cli.bench.table import Row
from rnnfast.cli.check import Errors


def refused(arguments, capsys):
    """What the parser says of arguments that it does not take."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_the_default_picture_is_checked_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "rnnfast-demo.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rnnfast.cli.demo.run", lambda args: 0)
    assert "--out: 'rnnfast-demo.png' is a directory" in refused(["demo"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "99999999999"], "expected an integer from 1 to 8192"),
        (["--shape", "1,1,1,99999999999"], "expected an integer from 1 to 2147483647"),
        (["--json", "a" * 300], "File name too long"),
        (["--picture", "figure.pgf"], "must end in one of"),
    ],
    ids=["threads", "shape", "long name", "pgf"],
)
def test_bench_refuses_before_the_work(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda args: 0)
    monkeypatch.setattr("rnnfast.cli.bench.run", lambda args: 0)
    error = refused(["bench", *arguments], capsys)
    assert f"argument {arguments[0]}: " in error
    assert said in error


def test_an_unknown_instruction_set_is_one_line(python):
    done = python(["-m", "rnnfast", "info"], check=False, RNNFAST_ISA="foo")
    assert done.returncode == 2
    assert done.stderr.startswith("rnnfast info: RNNFAST_ISA=foo is not an instruction set")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("device", "status"), [("/dev/full", 2), ("pipe", 1)])
def test_output_that_cannot_be_written(device, status):
    command_line = [sys.executable, "-m", "rnnfast", "info"]
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        out = reader.stdin if device == "pipe" else open(device, "w")  # noqa: SIM115
        done = subprocess.run(command_line, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
        if device != "pipe":
            out.close()
    assert done.returncode == status
    full = "rnnfast info: [Errno 28] No space left on device\n"
    assert done.stderr == (full if device == "/dev/full" else "")


def test_characters_that_the_output_lacks(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(info, "run", lambda args: print("Grüße") or 0)
    assert cli.main(["info"]) == 0
    assert written.getvalue() == b"Gr??e\n"


def test_an_interrupt_puts_the_console_back_before_it_is_reported(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    before = []
    monkeypatch.setattr(command, "measure", interrupt)
    monkeypatch.setattr(command, "rates_for", lambda *_: None)
    monkeypatch.setattr(command, "Console", lambda **options: Console(force_terminal=True, **options))
    monkeypatch.setattr(cli, "complain", lambda *_, **__: before.append(capsys.readouterr().out) or 130)
    assert cli.main(["bench", "--quick"]) == 130
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert before[0].count(hidden) == before[0].count(shown) == 1


def printed(shown, width):
    console = Console(width=width, file=io.StringIO())
    common.print_table(console, shown)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 76, 80])
def test_narrow_consoles_show_every_column(width):
    errors = Errors(2e-7, 3.5e-7)
    rows = [
        check.Row("LSTMCell coupled *", torch.float32, errors, errors, passed=True),
        check.Row("GRU", torch.float32, errors, errors, passed=False),
    ]
    lines = printed(check.table(rows, 1), width).splitlines()
    assert [line.split()[-1] for line in lines if "e-07" in line] == ["pass", "FAIL"]

    timing = Timing((4e-6, 4e-6, 5e-6))
    timings = dict.fromkeys(("rnnfast", "torch.nn"), timing)
    case = Case("GRU", 100, 1, 128, 128, FORWARD)
    row = Row(Result(case, timings, dict.fromkeys(timings, 0.0)), Floor(1e-6, 1.5e-6, 2e-6))
    lines = printed(table.table([row], {"float32": 2e11}, 2, details=False), width).splitlines()
    assert [line.split()[-1] for line in lines if "100,1,128,128" in line] == ["50%"]


@pytest.mark.parametrize("passed", [True, False])
def test_check_names_the_rows_that_fail(passed, monkeypatch, capsys):
    row = check.Row("GRU original *", torch.float64, Errors(), Errors(), passed)
    monkeypatch.setattr(check, "compare", lambda *_: [row])
    assert cli.main(["check"]) == (0 if passed else 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("All results are right." if passed else "Wrong results: GRU original float64")


def test_products_that_are_too_large_to_be_measured(monkeypatch):
    for rate in ("peak_flops", "formula_rate", "read_rate"):
        monkeypatch.setattr(_C, rate, lambda *_: 1e9)
    monkeypatch.setattr(floors, "SECONDS", 0.001)
    cases = [Case("GRU", 1, rows, 1, 1, FORWARD) for rows in (2**20 + 1, 2)]
    rates = floors.rates_for(cases, 1)
    large, both = (table.products_alone(some, rates) for some in (cases[:1], cases))
    left_out = "not measured where B or H is above 1048576"
    assert large == f"recurrent products alone, of the peak: {left_out}"
    share = r"GRU \d+% \(B=2 H=1\) to \d+%"
    assert re.fullmatch(rf"recurrent products alone, of the peak: {share}, {left_out}", both)


def test_a_case_that_the_memory_cannot_hold(capsys):
    assert cli.main(["bench", "--shape", "1,1,1,2147483647", "--cell", "GRU"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rnnfast bench: GRU forward T=1 B=1 I=1 H=2147483647 needs 51539607528 GiB")
    assert error.count("\n") == 1
