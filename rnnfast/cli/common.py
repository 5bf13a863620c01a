"""Parts that the commands share: an error without a traceback, and types of arguments."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rnnfast info runs without rich
    from rich.console import Console
    from rich.table import Table

MOST = 2**31 - 1
MOST_THREADS = 8192  # Linux takes no more processors

UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


class CommandError(Exception):
    """A wrong argument, or something that the machine lacks. Printed as one line; exit status 2."""


def positive(text: str, most: int = MOST) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to {most}, got {text!r}")
    return number


def thread_count(text: str) -> int:
    return positive(text, MOST_THREADS)


def seed(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text!r}")
    return number


def output_file(text: str) -> Path:
    """A path that can be written. Checked before minutes of work, not after."""
    path = Path(text)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"no permission to write {text!r}")
    return path


def picture_file(text: str) -> Path:
    from matplotlib.figure import Figure

    path = output_file(text)
    formats = sorted(Figure().canvas.get_supported_filetypes().keys() - {"pgf"})  # pgf needs TeX
    if path.suffix[1:].lower() not in formats:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(formats)}")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error


def print_table(console: Console, table: Table) -> None:
    """Print every column. On a console that is too narrow, a line continues on the next one."""
    unbounded = console.options.update(max_width=1000)
    width = console.measure(table, options=unbounded).maximum
    if width > console.width:
        table.width = width
    console.print(table, crop=False)


def duration(seconds: float) -> str:
    unit, size = next((u for u in UNITS if seconds >= u[1]), UNITS[-1])
    value = seconds / size
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def threads(number: int) -> str:
    return f"{number} thread" + ("s" if number > 1 else "")
