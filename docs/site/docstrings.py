"""Extension of griffe: what our docstrings write otherwise than Google's style has it."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Makes an `Example:` a section with code, and keeps the lines of a drawn tree."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = adapted(obj.docstring.value)


def adapted(text: str) -> str:
    """A docstring as griffe's parser of Google's style and Markdown read it."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    paragraphs = text.split("\n\n")
    return "\n\n".join(f"```text\n{part}\n```" if "├──" in part else part for part in paragraphs)
