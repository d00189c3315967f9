"""What the ignore files of a folder exclude: `.cloudtrainignore`, or else `.gitignore`, at every level, as in git.

The patterns are those of https://git-scm.com/docs/gitignore, which `pathspec` turns into expressions. This module decides
which pattern applies: in `pathspec` a pattern also matches everything below what it matches, and git never looks there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from hf_cloudtrain.storage.names import LOCAL, META

OWN = ".cloudtrainignore"
GIT = ".gitignore"
ALWAYS = frozenset((".git", "__pycache__", META, LOCAL))
"""Excluded unless `.cloudtrainignore` includes it (`!.git`): history, what Python makes again, checkpoints to upload."""
MAX_BYTES = 2**20
"""Bytes that are read of an ignore file; a larger file is something else."""

Patterns = tuple[GitIgnoreSpecPattern, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules for one folder: those of its own ignore file, and of those above it.

    Example:
        >>> rules = Rules.of(Path("glue"))
        >>> rules.excludes("output", is_folder=True)
        True
        >>> rules = rules.below("model")
    """

    file: str
    """Name of the ignore files, at all levels."""
    folder: Path
    levels: tuple[tuple[str, Patterns], ...] = ()
    """From the deepest up: the path of this folder relative to an ignore file, with a '/' at its end, and its patterns."""
    included: frozenset[str] = frozenset()
    """Names that the top `.cloudtrainignore` includes with '!': they are copied although they rarely should be."""

    @classmethod
    def of(cls, folder: Path) -> Rules:
        """The rules of a folder and of the repository around it.

        A `.cloudtrainignore` at its top replaces all `.gitignore`: a job may need files that git does not track.
        """
        own = folder / OWN
        if own.is_file():
            names = (line[1:].strip().strip("/") for line in _lines(own) if line.startswith("!"))
            return cls(OWN, folder, included=frozenset(names)).with_file()
        return cls(GIT, folder, _levels_above(folder)).with_file()

    def below(self, name: str) -> Rules:
        """The rules for a folder in this one."""
        return self.entered(name).with_file()

    def excludes(self, name: str, *, is_folder: bool) -> bool:
        """Whether a file or folder in this folder is excluded: the last matching pattern of the deepest file decides."""
        if name in ALWAYS and name not in self.included:
            return True
        for path, patterns in self.levels:
            for pattern in reversed(patterns):
                if _matches_itself(pattern, f"{path}{name}{'/' if is_folder else ''}"):
                    return bool(pattern.include)
        return False

    def entered(self, name: str) -> Rules:
        """As `below`, without the ignore file there."""
        levels = tuple((f"{path}{name}/", patterns) for path, patterns in self.levels)
        return dataclasses.replace(self, folder=self.folder / name, levels=levels)

    def with_file(self) -> Rules:
        """With the ignore file of this folder, if there is one."""
        file = self.folder / self.file
        if not file.is_file():
            return self
        return dataclasses.replace(self, levels=(("", tuple(_patterns(file))), *self.levels))


def _levels_above(folder: Path) -> tuple[tuple[str, Patterns], ...]:
    """The rules of the repository around a folder; none if they would exclude the folder itself."""
    folder = folder.resolve()
    around = [folder, *folder.parents]
    top = next((number for number, outer in enumerate(around) if (outer / ".git").exists()), 0)
    rules = Rules(GIT, around[top])
    for inner in reversed(around[:top]):
        rules = rules.with_file()
        if rules.excludes(inner.name, is_folder=True):
            return ()
        rules = rules.entered(inner.name)
    return rules.levels


def _matches_itself(pattern: GitIgnoreSpecPattern, path: str) -> bool:
    """Whether a pattern matches a path itself, not only a folder around it."""
    return pattern.regex is not None and any(_is_whole(found) for found in pattern.regex.finditer(path))


def _is_whole(found: re.Match[str]) -> bool:
    if found.groupdict().get("ps_d") is not None:  # the '/' after a matched folder
        return found.end() == len(found.string)
    # A '/' at the end otherwise comes from 'folder/**': everything in the folder, but not the folder.
    return not found[0].endswith("/") or found.end() < len(found.string)


def _patterns(file: Path) -> Iterator[GitIgnoreSpecPattern]:
    for line in _lines(file):
        # 'folder/**/' means the folders in a folder; pathspec 1.1 reads it as the folder itself.
        folders = line.rstrip().endswith("/**/")
        try:
            yield GitIgnoreSpecPattern(f"{line.rstrip()}*/" if folders else line)
        except ValueError:  # git ignores an invalid pattern, such as '!'
            continue


def _lines(file: Path) -> list[str]:
    with file.open("rb") as reader:
        return reader.read(MAX_BYTES).decode("utf-8-sig", "surrogateescape").split("\n")
