"""PeriFlow's words for our commands: some mean the same and are accepted, the others get an answer that names what to type.

Its commands are those of https://github.com/friendliai/periflow-cli, from `datastore` and `experiment` of its first releases
to the last one.
"""

from __future__ import annotations

import shlex

import typer

from hf_cloudtrain.cli.output import say

ACCEPTED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("datastore",): ("data",),
    ("dataset",): ("data",),
    ("experiment", "view"): ("job", "list", "--experiment"),
    ("job", "log"): ("job", "logs"),
    ("job", "view"): ("job", "status"),
    ("job", "stop"): ("job", "cancel"),
}
"""The first words of a command, and ours for them."""
OPTIONS: dict[tuple[str, ...], dict[str, str]] = {
    ("job", "run"): {"--config-file": "--file", "--workspace-dir": "--directory", "-w": "--directory"},
}
"""Names of options, by command."""

_EXPERIMENT = (
    "An experiment is a name in job files and needs no command. Write `experiment: NAME` into the job file; "
    "`cloudtrain job list --experiment NAME` lists its jobs."
)
_ACCOUNT = (
    "There is no account to sign in to. Storage, clouds and registries are used with their own credentials, such as "
    "those of `aws configure`."
)
_QUOTA = "`cloudtrain vm list` shows how many machines there are."
ANSWERS: dict[tuple[str, ...], str] = {
    ("experiment",): _EXPERIMENT,
    **dict.fromkeys([(word,) for word in "login logout signup whoami passwd key org project billing".split()], _ACCOUNT),
    ("credential",): _ACCOUNT,
    ("data", "edit"): "A dataset does not change. Store a new version: `cloudtrain data create NAME PATH`.",
    ("job", "template", "create"): "`cloudtrain job template > job.yml` writes a job file.",
    ("job", "metrics"): "`cloudtrain run watch RUN` shows the metrics of a run, and `cloudtrain run report RUN` draws them.",
    ("checkpoint", "create"): "Store a model to start from as a dataset: `cloudtrain data create NAME PATH`.",
    ("checkpoint", "upload"): "Store a model to start from as a dataset: `cloudtrain data create NAME PATH`.",
    ("checkpoint", "restore"): "A deleted checkpoint is gone. `cloudtrain checkpoint pin RUN` protects one.",
    ("artifact",): "`cloudtrain checkpoint download RUN DIR` downloads what a job has saved; `cloudtrain job status JOB` names the run.",
    ("vm", "quota"): _QUOTA,
    ("deployment",): "`cloudtrain endpoint create NAME RUN` serves the model of a run; `cloudtrain endpoint list` lists what is served.",
    ("version",): "`cloudtrain --version` prints the version.",
}  # fmt: skip
"""The first words of a command that has no counterpart, and what to do instead."""


def translated(words: list[str]) -> list[str]:
    """The words of a command line with ours in place of PeriFlow's; ends with code 2 and advice where there is none.

    Example:
        >>> translated(["datastore", "view", "mnli"])
        ['data', 'view', 'mnli']
    """
    typed = words
    for theirs, ours in ACCEPTED.items():
        if tuple(words[: len(theirs)]) == theirs:
            words = [*ours, *words[len(theirs) :]]
            break
    if words[:2] == ["data", "upload"] or (words[:2] == ["data", "create"] and {"-n", "--name"} & set(words)):
        _answer(typed[:2], _upload_advice(words))
    for theirs, advice in ANSWERS.items():
        if tuple(words[: len(theirs)]) == theirs:
            _answer(typed[: len(theirs)], advice)
    names = OPTIONS.get(tuple(words[:2]), {})
    return [names.get(word, word) for word in words]


def _upload_advice(words: list[str]) -> str:
    name = _value(words, ("-n", "--name")) or "NAME"
    path = _value(words, ("-p", "--source-path")) or "PATH"
    return (
        f"Type `{shlex.join(['cloudtrain', 'data', 'create', name, path])}`. It stores the content of a folder, as PeriFlow "
        "did for a path with '/' at its end, or what is at a URL."
    )


def _value(words: list[str], names: tuple[str, ...]) -> str | None:
    places = [place for place, word in enumerate(words[:-1]) if word in names]
    return words[places[0] + 1] if places else None


def _answer(typed: list[str], advice: str) -> None:
    say(f"Error: '{' '.join(typed)}' is a command of PeriFlow. {advice}")
    raise typer.Exit(2)
