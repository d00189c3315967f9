"""`cloudtrain verify-resume`: check that a script that is killed and resumed ends like one that ran through."""

from __future__ import annotations

import enum
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.cli.arguments import Json
from hf_cloudtrain.cli.output import fail, print_json, say, show_facts, show_table
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.cli.verify.trial import ScriptError, Trial
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.runtime.provenance import shown_command
from hf_cloudtrain.runtime.text import clean, count_text

if TYPE_CHECKING:
    from hf_cloudtrain.cli.verify.compare import Comparison, FirstDifference


FILES: Columns = {
    "file of the last checkpoint": lambda file: file.path,
    "what": lambda file: file.kind,
    ">max |difference|": lambda file: None if file.max_difference is None else repr(file.max_difference),
    "note": lambda file: file.note,
}


class Signal(str, enum.Enum):
    """The signal that ends the first start."""

    KILL = "KILL"
    TERM = "TERM"


def verify_resume(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The command that starts the training.")
    ],
    signal_: Annotated[
        Signal,
        typer.Option("--signal", help="KILL: like a power cut. TERM: like a preemption with notice."),
    ] = Signal.KILL,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="New folder to work in and keep. Default: a temporary one, kept if anything differs.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a training script resumes exactly.

    Trains twice, once without a stop and once killed and resumed, and compares weights, optimizer, random states, sample
    order and logged values. Exits with code 0 if nothing differs. The run and the output of the script go to a scratch
    folder, whatever URL and folder the script names. All processes run on this machine, twice from start to end: use a
    short training with a few checkpoints.
    """
    scratch = _make(folder)
    shown = shown_command(command)
    try:
        report = _try(scratch, command, signal.Signals[f"SIG{signal_.value}"])
    except ScriptError as error:
        fail(f"{error}\nThe output of {shown!r} is in {str(scratch)!r}.")
    except BaseException:  # Ctrl-C, or a command that does not exist: there is nothing to look at
        if folder is None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    exact = report.comparison.exact
    if exact and folder is None:
        shutil.rmtree(scratch)
    record = {
        "command": shown,
        "signal": signal_.value,
        "killed_after": str(report.killed_after),
        "resumed_from": str(report.resumed_from),
        "recorded": str(report.recorded),
        "inexact_reason": report.recorded.reason,
        **report.comparison.record(),
        "folder": None if exact and folder is None else str(scratch),
    }
    if as_json:
        print_json(record)
    else:
        _show(report, record)
    if not exact:
        fail(_verdict(report, scratch))


class Report:
    """The result of both trials."""

    def __init__(self, whole: Trial, interrupted: Trial, resumed_from: CheckpointKey) -> None:
        from hf_cloudtrain.cli.verify.compare import compare

        self.killed_after = interrupted.newest_when_killed
        self.resumed_from = resumed_from
        self.folders = (_folder(interrupted, self.killed_after), _folder(interrupted, resumed_from))
        self.recorded = interrupted.seen[resumed_from].exactness
        self.comparison: Comparison = compare(
            whole.catalog, interrupted.catalog, whole.seen, interrupted.seen, resumed_from
        )


def _make(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="cloudtrain-verify-")).resolve()
    if folder.exists():
        raise ConfigurationError(f"{str(folder)!r} exists. Choose a folder that does not exist yet.")
    folder.mkdir(parents=True)
    return folder.resolve()


def _try(scratch: Path, command: list[str], number: signal.Signals) -> Report:
    with _Status() as status:
        status.phase("1 of 3: the whole run")
        whole = Trial(scratch, command, status.show_step)
        _succeed(whole, "The script")
        step = step_to_kill_after(whole.seen)
        whole.finish("whole")
        status.phase(f"2 of 3: again, until step {step} is committed; then {number.name}")
        interrupted = Trial(scratch, command, status.show_step)
        interrupted.run_until(step, number)
        killed_after = _folder(interrupted, interrupted.newest_when_killed)
        status.phase(f"3 of 3: resumed from {killed_after}, in an empty folder")
        _succeed(interrupted, "The resumed script")
        resumed_from = _resumed_from(interrupted.catalog)
        interrupted.finish("interrupted")
        status.phase("comparing")
        return Report(whole, interrupted, resumed_from)


def _folder(trial: Trial, key: CheckpointKey | None) -> str:
    """A checkpoint as people call it."""
    manifest = trial.seen.get(key) if key else None
    return manifest.folder if manifest else str(key)


def _succeed(trial: Trial, what: str) -> None:
    code = trial.run()
    if code:
        raise ScriptError(f"{what} ended with exit code {code}:\n{trial.tail()}")
    _ = trial.catalog  # of exactly one run


def step_to_kill_after(seen: dict[CheckpointKey, Manifest]) -> int:
    """The first checkpoint in the middle of an epoch, else the first one; never the last, which no step follows."""
    steps = sorted({key.step for key in seen})
    inner = [
        key.step
        for key, manifest in sorted(seen.items())
        if manifest.position.epoch is not None and not manifest.position.epoch.is_integer()
    ]
    if len(steps) < 2:
        raise ScriptError(
            f"The whole run saved {count_text(len(steps), 'checkpoint')}, but a resume needs one before the last. Save "
            "more often (save_steps), or train longer."
        )
    return next((step for step in inner if step < steps[-1]), steps[0])


def _resumed_from(catalog: Catalog) -> CheckpointKey:
    attempt = catalog.attempts.read_all(last=1)[-1]
    if attempt.resumed_from is None:
        raise ScriptError(
            f"The script did not resume when it was started again: it began at step {attempt.global_step}. Make it "
            "restore, as in `trainer.train(resume_from_checkpoint=cloud.restore(args))`."
        )
    return attempt.resumed_from


def _show(report: Report, record: dict[str, Any]) -> None:
    found = report.comparison
    show_facts(
        {
            "command": record["command"],
            "killed": f"SIG{record['signal']} after {report.folders[0]}",
            "resumed from": report.folders[1],
            "recorded as": f"exact: {record['recorded']}",
            "steps": f"{found.steps[0]}, and {found.steps[1]} resumed",
            "sample order": _first(found.position, f"equal at {found.positions} checkpoints"),
            "logged values": _first(found.value, f"{found.values} equal"),
            "weights differ from": None if found.weights is None else f"step {found.weights} on",
            "not compared": ", ".join(found.left_out) or None,
        }
    )
    typer.echo()
    show_table(FILES, found.files, spare=["what"], prose="note")
    if found.exact:
        typer.echo("\nexact")


def _verdict(report: Report, scratch: Path) -> str:
    found = report.comparison
    where = f"Both runs are in {str(scratch)!r}."
    if found.before_resume is not None:
        return (
            f"Not exact, but not because of the resume: the runs differ at step {found.before_resume}, before the kill. Two "
            "whole runs of this script would differ as well. Seed everything (transformers.set_seed) and turn on "
            f"deterministic kernels (full_determinism=True) first. {where}"
        )
    if found.steps[0] != found.steps[1]:
        return f"Not exact: the resumed run ended at step {found.steps[1]}, not {found.steps[0]}. {where}"
    worst = max((one.max_difference or 0.0 for one in found.files), default=0.0)
    first = "" if found.first is None else f" The first difference is at step {found.first}."
    return (
        f"Not exact: max |difference| {worst!r}.{first} Look for random numbers and counters of the script that are in no "
        f"checkpoint. {where}"
    )


def _first(difference: FirstDifference | None, otherwise: str) -> str:
    if difference is None:
        return otherwise
    return f"{difference.name} differs at step {difference.step}: {difference.whole} and {difference.resumed} resumed"


class _Status:
    """Progress on stderr: a line for each phase, and on a terminal the current step."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> _Status:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def phase(self, text: str) -> None:
        self._write("")
        say(text)

    def show_step(self, progress: dict[str, Any]) -> None:
        """Show the step of a heartbeat."""
        if self._live and "step" in progress:
            self._write(clean(f"  step {progress['step']} of {progress.get('total_steps') or '?'}"))

    def _write(self, text: str) -> None:
        if self._live:
            sys.stderr.write(f"\r{text.ljust(self._width)}\r{text}")
            sys.stderr.flush()
            self._width = len(text)
