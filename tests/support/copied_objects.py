"""A launcher for a C++ compiler: it copies an object that the build of a checkout has.

The command is `copied_objects.py CHECKOUT COMPILER ARGUMENT...`. CHECKOUT's compile_commands.json
describes the build. The object is copied if sources, compiler and options are the same; otherwise the
compiler runs. The order of the options does not matter: versions of CMake differ in it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path


def sources(root: str | Path) -> dict[Path, bytes]:
    """All files below csrc, by their paths there."""
    folder = Path(root, "csrc")
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def described(command: list[str]) -> tuple[str, str, list[str]] | None:
    """The checkout, the compiler and its sorted options; None if the command compiles none of csrc."""
    if "-c" not in command or "-o" not in command:
        return None
    root, found, _ = command[command.index("-c") + 1].partition("/csrc/")
    if not found:
        return None
    first = next(i for i, argument in enumerate(command) if argument.startswith("-"))
    # Before the options comes the compiler, perhaps behind a launcher.
    compiler = os.path.realpath(shutil.which(command[first - 1]) or command[first - 1])
    # These options write the dependencies of an object, for the build tool.
    dropped = {i + k for i, a in enumerate(command) if a in ("-MT", "-MF") for k in (0, 1)}
    options = [a for i, a in enumerate(command) if i >= first and i not in dropped and a != "-MD"]
    return root, compiler, sorted(a.replace(root, "") for a in options)


def compiled(checkout: str, command: list[str]) -> Path | None:
    """The object of the checkout's build that is what this command would make."""
    wanted, listed = described(command), Path(checkout, "compile_commands.json")
    if wanted is None or not listed.exists():
        return None
    for entry in json.loads(listed.read_text()):
        found = described(shlex.split(entry["command"]))
        if found is not None and found[1:] == wanted[1:] and sources(found[0]) == sources(wanted[0]):
            path = Path(entry["directory"], command[command.index("-o") + 1])
            return path if path.exists() else None
    return None


def main(checkout: str, *command: str) -> None:
    path = compiled(checkout, list(command))
    if path is None:
        os.execvp(command[0], command)
    output = command[command.index("-o") + 1]
    shutil.copyfile(path, output)
    if "-MF" in command:
        Path(command[command.index("-MF") + 1]).write_text(f"{output}:\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
