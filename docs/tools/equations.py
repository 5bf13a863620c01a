"""Equations of a page as MathML, which browsers draw without a script, a font file or the network.

A fence with the language ``math`` is a displayed equation. Each of its lines is a row, and the rows are
aligned at their first equals sign. A text between two dollar signs is an equation inside a sentence.
The source is LaTeX; it may contain Greek letters and operators of Unicode, so that a docstring is also
readable in a terminal.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

NAMES = re.compile(r"(?<![\\\w])(tanh|sigmoid|softmax|ReLU|log|ln|exp|max|min)(?!\w)")
OPERATORS = {"⊙": r"\odot ", "·": r"\cdot ", "−": "-", "'": "′"}


def latex(source: str) -> str:
    """The source with LaTeX's commands for names of functions and for operators of Unicode."""
    for character, command in OPERATORS.items():
        source = source.replace(character, command)
    return NAMES.sub(r"\\operatorname{\1}", source)


def content(source: str) -> str:
    """MathML of one expression, without the element ``math``."""
    element = convert(latex(source)) if source.strip() else "<math></math>"
    return re.sub(r"^<math[^>]*>|</math>$", "", element)


def fence(source: str, language: str, *_: Any, **__: Any) -> str:
    """The HTML of a displayed equation."""
    rows = []
    for line in filter(None, map(str.strip, source.splitlines())):
        left, equals, right = line.partition(" = ")
        cells = (content(left), content("=" + right)) if equals else ("", content(left))
        rows.append("<mtr>" + "".join(f"<mtd>{cell}</mtd>" for cell in cells) + "</mtr>")
    table = f'<math display="block"><mtable displaystyle="true">{"".join(rows)}</mtable></math>'
    return f'<div class="equation" role="math">{table}</div>'


class Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> Any:  # type: ignore[override]
        element = ElementTree.fromstring(f"<math>{html.unescape(content(m.group(1)))}</math>")
        return element, m.start(0), m.end(0)


class Equations(Extension):
    """Text between two dollar signs that touch it."""

    def extendMarkdown(self, md: Markdown) -> None:
        pattern = r"(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?!\w)"
        md.inlinePatterns.register(Inline(pattern, md), "math", 185)


def on_config(config: Any) -> Any:
    superfences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    superfences["custom_fences"] = [{"name": "math", "class": "equation", "format": fence}]
    config.markdown_extensions.append(Equations())
    return config
