"""How the package writes docstrings, for mkdocstrings.

A role of Sphinx, such as :func:`name`, becomes the plain name. A comment that begins with ``#:`` above
a field is the field's docstring. Two colons at the end of a paragraph begin a block of code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):`(?:~?(?:rnnfast\.))?([^`]+)`")
CODE = re.compile(r"::(?=\n\n    )")


class Conventions(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.is_attribute and obj.docstring is None:
            comment = comment_above(obj)
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)
        if obj.docstring is not None:
            text = ROLE.sub(r"``\1``", obj.docstring.value)
            obj.docstring.value = CODE.sub(":", text)


def comment_above(obj: griffe.Object) -> str:
    """The text of the lines above an attribute that begin with ``#:``."""
    lines, number = obj.lines_collection[obj.filepath], (obj.lineno or 1) - 2
    comment: list[str] = []
    while number >= 0 and lines[number].strip().startswith("#:"):
        comment.insert(0, lines[number].strip().removeprefix("#:").strip())
        number -= 1
    return "\n".join(comment)
