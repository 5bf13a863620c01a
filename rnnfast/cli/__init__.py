"""The command line: rnnfast info, check, bench and demo.

Each command is a module of this package with two functions: add_arguments(parser), and run(args), which
returns the exit status. Only the module of the command that the user calls is imported.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from rnnfast.cli.common import CommandError

COMMANDS = {
    "info": "say what is installed and what it runs on",
    "check": "compare the outputs and gradients of every cell with torch.nn's on this machine",
    "bench": "time rnnfast beside torch.nn",
    "demo": "run a check, then train a small language model with torch.nn and with rnnfast",
}
EXTRAS = ("torch", "rich", "matplotlib", "psutil")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="rnnfast", description="Fused CPU kernels for RNN, LSTM and GRU, which replace torch.nn's."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    parsers = {
        name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()
    }
    # The main parser has no option with a value, so the first word that is no option is the command.
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen not in COMMANDS:
        parser.parse_args(argv)  # --help or an error: exits
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters of a text or a path
        sys.stdout.reconfigure(errors="replace")
    try:
        command = importlib.import_module(f"rnnfast.cli.{chosen}")
        command.add_arguments(parsers[chosen])
        status = int(command.run(parser.parse_args(argv)))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        return complain(chosen, f'needs {missing}: pip install "rnnfast[demo]"')
    except BrokenPipeError:  # nobody reads on, as in `rnnfast info | head -1`
        drop_output()
        return 1
    except OSError as error:  # such as a full disk
        drop_output()
        return complain(chosen, str(error))
    except (CommandError, ImportError) as error:
        return complain(chosen, str(error))
    except KeyboardInterrupt:
        return complain(chosen, "interrupted", status=130)


def drop_output() -> None:
    """Drop what standard output cannot write, which the interpreter would write again at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(command: str, text: str, status: int = 2) -> int:
    print(f"rnnfast {command}: {text}", file=sys.stderr)
    return status
