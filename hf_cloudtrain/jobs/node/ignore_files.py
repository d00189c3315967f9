"""What the ignore files of a folder leave out: `.cloudtrainignore`, or else `.gitignore`, at every level, as git means it.

The patterns are those of https://git-scm.com/docs/gitignore; `pathspec` makes expressions of them. Which of them decides
is found here, because there a pattern also speaks of all that is below what it matches, which in git is only never
looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

OWN = ".cloudtrainignore"
GIT = ".gitignore"
ALWAYS = frozenset((".git", "__pycache__", ".cloudtrain"))
"""Left out unless `.cloudtrainignore` names it (`!.git`): history, what Python makes again, checkpoints on their way."""
MAX_BYTES = 2**20
"""Longest ignore file; one that is larger is something else."""

Patterns = tuple[GitIgnoreSpecPattern, ...]


@dataclass(frozen=True)
class Rules:
    """The rules that hold in one folder: those of its own file, and of those above it.

    Example:
        >>> rules = Rules.of(Path("glue"))
        >>> rules.leaves_out("output", is_folder=True)
        True
        >>> rules = rules.below("model")
    """

    file: str
    """Name of the ignore files that are heeded, at all levels."""
    folder: Path
    levels: tuple[tuple[str, Patterns], ...] = ()
    """From the deepest up: the path of this folder from where the file is, with a last '/', and what the file says."""
    asked_for: frozenset[str] = frozenset()
    """Names that `.cloudtrainignore` takes back in so: they are copied though they seldom should be."""

    @classmethod
    def of(cls, folder: Path) -> Rules:
        """The rules of a folder, and of the repository that it is in.

        A `.cloudtrainignore` at its top takes the place of all `.gitignore`: a job may need what git does not keep.
        """
        own = folder / OWN
        if own.is_file():
            names = (line[1:].strip().strip("/") for line in _lines(own) if line.startswith("!"))
            return cls(OWN, folder, asked_for=frozenset(names)).with_file()
        return cls(GIT, folder, _levels_above(folder)).with_file()

    def below(self, name: str) -> Rules:
        """The rules in a folder of this one."""
        return self.entered(name).with_file()

    def leaves_out(self, name: str, *, is_folder: bool) -> bool:
        """Whether something in this folder is left out: as the last pattern says that speaks of it, of the deepest file."""
        if name in ALWAYS and name not in self.asked_for:
            return True
        for path, patterns in self.levels:
            for pattern in reversed(patterns):
                if _speaks_of(pattern, f"{path}{name}{'/' if is_folder else ''}"):
                    return bool(pattern.include)
        return False

    def entered(self, name: str) -> Rules:
        """As `below`, without the file there."""
        levels = tuple((f"{path}{name}/", patterns) for path, patterns in self.levels)
        return Rules(self.file, self.folder / name, levels, self.asked_for)

    def with_file(self) -> Rules:
        """With the file of this folder, if there is one."""
        file = self.folder / self.file
        if not file.is_file():
            return self
        patterns = tuple(_patterns(file))
        return Rules(self.file, self.folder, (("", patterns), *self.levels), self.asked_for)


def _levels_above(folder: Path) -> tuple[tuple[str, Patterns], ...]:
    """The rules of the repository around a folder; none of them where they would leave out the folder itself."""
    folder = folder.resolve()
    around = [folder, *folder.parents]
    top = next((number for number, place in enumerate(around) if (place / ".git").exists()), 0)
    rules = Rules(GIT, around[top])
    for place in reversed(around[:top]):
        rules = rules.with_file()
        if rules.leaves_out(place.name, is_folder=True):
            return ()
        rules = rules.entered(place.name)
    return rules.levels


def _speaks_of(pattern: GitIgnoreSpecPattern, path: str) -> bool:
    """Whether a pattern matches a path itself, not only a folder that it is in."""
    return pattern.regex is not None and any(_is_whole(found) for found in pattern.regex.finditer(path))


def _is_whole(found: re.Match[str]) -> bool:
    if found.groupdict().get("ps_d") is not None:  # the '/' after a folder that is meant
        return found.end() == len(found.string)
    # Another '/' at the end is that of 'folder/**': all in the folder, without itself.
    return not found[0].endswith("/") or found.end() < len(found.string)


def _patterns(file: Path) -> Iterator[GitIgnoreSpecPattern]:
    for line in _lines(file):
        # 'folder/**/' is the folders in a folder; pathspec 1.1 reads it as the folder itself.
        folders = line.rstrip().endswith("/**/")
        try:
            yield GitIgnoreSpecPattern(f"{line.rstrip()}*/" if folders else line)
        except ValueError:  # git says nothing of a pattern that is none, such as '!'
            continue


def _lines(file: Path) -> list[str]:
    with file.open("rb") as reader:
        return reader.read(MAX_BYTES).decode("utf-8-sig", "surrogateescape").split("\n")
