"""Files of the repository outside of docs/ that the site shows, and the pages of the systems.

A page links to a file of the repository as it does on a forge: by its relative path. A linked Markdown
file becomes a page. Another linked file becomes a page with its source. The page with the tables of
benchmarks/results is made from the results themselves. The pages in docs/systems that exist become a
section of the navigation, in the order of SYSTEMS.

A line ``<<< path`` of a page is replaced by a file of the repository, and a line ``<<< path | first |
last`` by a part of it: the lines from the first one that begins with ``first`` to the next one that
begins with ``last``. (The syntax of pymdownx.snippets is an expression of Python, which a formatter of
code blocks changes.)

The results of the systems, examples/results.json, are included as a table: on the page of a system its
own, on another page all of them. So are those of the long trainings, examples/results-full.json.
"""

from __future__ import annotations

import importlib.util
import json
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

SYSTEMS = {  # the kind of each
    "ball": "many to many",
    "language_model": "many to many; generation",
    "word_vectors": "many to many",
    "classify": "many to one",
    "melody": "many to many; generation",
    "tagger": "many to many, both directions",
    "pronounce": "encoder-decoder; generation",
    "forecast": "many to many; generation",
    "vanishing": "many to one",
    "policy": "many to many; reinforcement learning",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
PART = re.compile(r"^<<< (\S+)(?: \| (.+?) \| (.+))?$", re.MULTILINE)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".toml": "toml"}
RESULTS = "benchmarks/results/README.md"
SYSTEM_RESULTS = "examples/results.json"
LONG_RESULTS = "examples/results-full.json"

# A search for the name of an argument finds the pages about it, and not the sources that use it.
UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"

#: The path of each page whose file is outside of docs/, by its place in the site.
PLACES: dict[str, str] = {}


def root_of(config: Any) -> Path:
    return Path(config.config_file_path).parent


def uri_of(path: str) -> str:
    """Where the site has a file of the repository, from the file's path."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"source/{path}.md"


def path_of(uri: str) -> str:
    """The path in the repository of the page ``uri``."""
    return PLACES.get(uri, f"docs/{uri}")


def target_of(link: str, uri: str, root: Path) -> str | None:
    """The path in the repository of a link on the page ``uri``; None if there is no such file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(path_of(uri)), link))
    if (root / path).is_dir() and (root / path / "README.md").exists():
        path += "/README.md"
    return path if (root / path).is_file() else None


def results_page(root: Path) -> str:
    """The page that benchmarks/tables.py makes from the samples."""
    spec = importlib.util.spec_from_file_location("tables", root / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page: str = tables.page(tables.RESULTS)
    return page


def systems_table(root: Path) -> str:
    """A row for each system of examples/results.json."""
    rows = ["| | kind | number | baseline | seconds | seconds of torch.nn |", "| --- " * 6 + "|"]
    for name, result in system_results(root).items():
        seconds = f"{result['seconds']:.1f} | {result['seconds_torch']:.1f}"
        rows.append(f"| {link_to(name, root)} | {SYSTEMS[name]} | {numbers_of(result)} | {seconds} |")
    return "\n".join(rows)


def long_table(page: str, root: Path) -> str:
    """A row for each result of a long training; on the page of a system only its own."""
    rows = ["| | number | baseline | better |", "| --- " * 4 + "|"]
    for result in json.loads((root / LONG_RESULTS).read_text()):
        name = result["system"].partition(" --")[0].replace(" ", "_")
        if page in (name, "index"):
            rows.append(f"| {link_to(name, root)} | {numbers_of(result)} | {result['better']} |")
    return "\n".join(rows)


def link_to(name: str, root: Path) -> str:
    """A link to the page of a system, with the page's title."""
    title = (root / "docs" / "systems" / f"{name}.md").read_text().splitlines()[0].lstrip("# ")
    return f"[{title}]({name}.md)"


def numbers_of(result: dict[str, Any]) -> str:
    """Two cells of a table: the number and the baseline of a result."""
    number = f"{result['metric']}: {rounded(result['value'])}"
    return f"{number} | {result['baseline_name']}: {rounded(result['baseline'])}"


def system_table(name: str, root: Path) -> str:
    """The number of one system beside its baseline, and the seconds of its training."""
    result = system_results(root)[name]
    return f"""\
| | |
| --- | --- |
| {result["metric"]} ({result["better"]} is better) | {rounded(result["value"])} |
| baseline: {result["baseline_name"]} | {rounded(result["baseline"])} |
| seconds of the training with rnnfast | {result["seconds"]:.1f} |
| seconds of the training with torch.nn | {result["seconds_torch"]:.1f} |"""


def system_results(root: Path) -> dict[str, dict[str, Any]]:
    results = json.loads((root / SYSTEM_RESULTS).read_text())
    return {result["system"].replace(" ", "_"): result for result in results}


def rounded(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def text_of(path: str, root: Path) -> str:
    if path == RESULTS:
        return results_page(root)
    text = (root / path).read_text()
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"{UNSEARCHED}# {path}\n\n````{language}\n{text}````\n"


def part_of(path: str, first: str | None, last: str | None, root: Path) -> str:
    text = (root / path).read_text()
    if first is None or last is None:
        return text.rstrip()
    lines = text.splitlines()
    starts = [k for k, line in enumerate(lines) if line.startswith(first)]
    ends = [k for k, line in enumerate(lines) if starts and k >= starts[0] and line.startswith(last)]
    if not ends:
        raise PluginError(f"{path} has no lines from {first!r} to {last!r}")
    return textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1]))


def on_config(config: Any) -> Any:
    folder = Path(config.docs_dir) / "systems"
    pages = [f"systems/{name}.md" for name in SYSTEMS if (folder / f"{name}.md").exists()]
    unknown = {path.stem for path in folder.glob("*.md")} - set(SYSTEMS) - {"index"}
    if unknown:
        raise PluginError(f"{', '.join(sorted(unknown))}: not among SYSTEMS in {__file__}")
    if pages:
        titles = [next(iter(item)) for item in config.nav]
        overview = {"Overview": "systems/index.md"}
        config.nav.insert(titles.index("Classes"), {"Systems": [overview, *pages]})
    return config


def on_files(files: Files, config: Any) -> Files:
    root = root_of(config)
    paths = {RESULTS, "CONTRIBUTING.md", "CHANGELOG.md"}
    pending = [file.src_uri for file in files.documentation_pages()]
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    while pending or paths:
        for path in sorted(paths):
            uri = uri_of(path)
            PLACES[uri] = path
            texts[uri] = text_of(path, root)
            files.append(File.generated(config, uri, content=texts[uri]))
            if path.endswith(".md"):
                pending.append(uri)
        paths.clear()
        for uri in pending:
            for match in LINK.finditer(texts[uri]):
                path = target_of(match[1], uri, root)
                if path is not None and files.get_file_from_path(uri_of(path)) is None:
                    paths.add(path)
        pending.clear()
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri, root = page.file.src_uri, root_of(config)
    if uri.startswith("classes/"):
        page.meta["search"] = {"boost": 2}  # above the guide and the changelog
    if page.parent is None:  # a page without neighbours needs no list of neighbours
        page.meta.setdefault("hide", ["navigation"])
    if uri.startswith("source/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        path = target_of(match[1], uri, root)
        if path is None or files.get_file_from_path(uri_of(path)) is None:
            return match[0]
        return posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".") + (match[2] or "")

    def included(match: re.Match[str]) -> str:
        path, first, last = match.groups()
        name = Path(uri).stem
        if path == LONG_RESULTS:
            return long_table(name, root)
        if path == SYSTEM_RESULTS:
            return system_table(name, root) if name in SYSTEMS else systems_table(root)
        return part_of(path, first, last, root)

    markdown = PART.sub(included, markdown)
    return LINK.sub(moved, markdown)
