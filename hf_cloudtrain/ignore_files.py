"""What the ignore files of a folder leave out: `.cloudtrainignore`, or else `.gitignore`, at every level, as git means it.

The patterns are those of https://git-scm.com/docs/gitignore, read by `pathspec`; the order of precedence is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

OWN = ".cloudtrainignore"
GIT = ".gitignore"
ALWAYS = (".git", "__pycache__/", ".cloudtrain/")
"""Left out unless an ignore file says otherwise (`!.git`): history, what Python makes again, checkpoints on their way."""


@dataclass(frozen=True)
class Rules:
    """The rules that hold in one folder: those of its own files, and of those above it.

    Example:
        >>> rules = Rules.of(Path("glue"))
        >>> rules.leave_out("output", is_folder=True)
        True
        >>> rules = rules.below("model")
    """

    name: str
    """The ignore files that are heeded: one name for all levels."""
    folder: Path
    levels: tuple[tuple[str, GitIgnoreSpec], ...]
    """From the deepest up: the path of this folder from there, with a last '/', and the rules of the file there."""

    @classmethod
    def of(cls, folder: Path) -> Rules:
        """The rules of a folder and of the repository that it is in.

        A `.cloudtrainignore` at its top takes the place of all `.gitignore`: a job may need what git does not keep.
        """
        levels = (("", _spec(ALWAYS)),)
        if (folder / OWN).is_file():
            return cls(OWN, folder, levels)._with_file()
        return cls(GIT, folder, (*_levels_above(folder), *levels))._with_file()

    def below(self, name: str) -> Rules:
        """The rules in a folder of this one."""
        levels = tuple((f"{path}{name}/", spec) for path, spec in self.levels)
        return Rules(self.name, self.folder / name, levels)._with_file()

    def leave_out(self, name: str, *, is_folder: bool) -> bool | None:
        """Whether something in this folder is left out; None where no rule speaks of it. The deepest that does decides."""
        for path, spec in self.levels:
            verdict = spec.check_file(f"{path}{name}{'/' if is_folder else ''}").include
            if verdict is not None:
                return verdict
        return None

    def _with_file(self) -> Rules:
        file = self.folder / self.name
        if not file.is_file():
            return self
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
        return Rules(self.name, self.folder, (("", _spec(text.splitlines())), *self.levels))


def _levels_above(folder: Path) -> tuple[tuple[str, GitIgnoreSpec], ...]:
    """Rules of the repository around a folder; none of them where they would leave out the folder itself."""
    folder = folder.resolve()
    around = [folder, *folder.parents]
    top = next((number for number, place in enumerate(around) if (place / ".git").exists()), 0)
    rules = Rules(GIT, around[top], ())._with_file()
    for place in reversed(around[:top]):
        if rules.leave_out(place.name, is_folder=True):
            return ()
        rules = rules.below(place.name) if place != folder else _entered(rules, place.name)
    return rules.levels if top else ()


def _entered(rules: Rules, name: str) -> Rules:
    """As `below`, without the file there: it is read by itself."""
    return Rules(
        rules.name, rules.folder / name, tuple((f"{path}{name}/", spec) for path, spec in rules.levels)
    )


def _spec(lines: Iterable[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec(list(_patterns(lines)))


def _patterns(lines: Iterable[str]) -> Iterator[GitIgnoreSpecPattern]:
    for line in lines:
        try:
            yield GitIgnoreSpecPattern(line)
        except ValueError:  # git says nothing of a pattern that is none, such as '!'
            continue
