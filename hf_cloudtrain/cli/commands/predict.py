"""`cloudtrain predict`: add the predictions of a checkpoint to a table."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from hf_cloudtrain.cli.arguments import Best, CheckpointOrNewest, Json, RunArgument
from hf_cloudtrain.cli.commands.serve import Base, Processor, TaskName, found_model
from hf_cloudtrain.cli.output import print_json, say, show_facts, transfer
from hf_cloudtrain.errors import ConfigurationError, NoDatasetError
from hf_cloudtrain.runtime.text import count_text

if TYPE_CHECKING:
    from tqdm import tqdm

SAY_EVERY = 30.0
"""Seconds between two lines about the progress, without a terminal."""


def predict(
    run: RunArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A table, a folder of tables, or a dataset of the store (NAME or NAME/FILE)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="File to write: .parquet, .csv or .jsonl.")
    ],
    checkpoint: CheckpointOrNewest = None,
    best: Best = False,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the input; NAME,NAME for pairs. Default: text, inputs, sentence, …",
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column with the right label. Default: label or labels."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that predict at once.")] = 1,
    batch: Annotated[int, typer.Option("--max-batch", min=1, metavar="ROWS", help="Rows of a batch.")] = 64,
    shard: Annotated[
        int, typer.Option("--shard", min=1, metavar="ROWS", help="Rows that a kill costs at most, a process.")
    ] = 2048,
    base: Base = None,
    processor: Processor = None,
    task: TaskName = None,
    as_json: Json = False,
) -> None:
    """Predict every row of a table with a checkpoint.

    All columns are kept, and predictions added. If the command is interrupted, run it again: it continues, and ends in the
    same bytes. Prints accuracy and F1 if the data has labels.
    """
    from hf_cloudtrain.serving.models.source import Wish
    from hf_cloudtrain.serving.predict import shards
    from hf_cloudtrain.serving.predict.scores import ERROR, scores

    shards.check_output(output)
    read = shards.data_of(_table(data), column, label)
    model = found_model(run, checkpoint, best, Wish(processor=processor, base=base, task=task))
    plan = shards.Plan(model, read, output, shard, batch)
    with _Progress(read.rows) as progress:
        try:
            labels = shards.run(plan, processes, progress.add)
        except OSError as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"{error.strerror or error}: {str(error.filename or plan.parts)!r}. What is done is kept: solve this, and run the same "
                "command again."
            ) from None
    found = scores(output, labels, label)
    say(f"Wrote {count_text(found.rows, 'row')} with the predictions of {model.title} to {str(output)!r}.")
    if found.failed:
        say(f"Warning: {count_text(found.failed, 'row')} could not be predicted; column {ERROR!r} says why.")
    if found.unlabelled:
        say(f"{count_text(found.unlabelled, 'row')} without a label: not in the scores.")
    if as_json:
        print_json({"output": str(output.absolute()), "model": model.title, **dataclasses.asdict(found)})
    else:
        facts = {
            name: None if value is None else f"{value:.5f}"
            for name, value in (("accuracy", found.accuracy), ("F1", found.f1))
        }
        show_facts({"rows": found.rows, "failed": found.failed, **facts})


class _Progress:
    """Rows that are predicted: a bar on a terminal, and elsewhere a line from time to time."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc="Predicting", unit=" rows", total=total)
            if self._bar.disable:  # by TQDM_DISABLE
                self._bar = None

    def __enter__(self) -> _Progress:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, rows: int, is_old: bool) -> None:
        """Count the rows of a shard; those of an earlier start are not in the speed."""
        self._done += rows
        if self._bar is not None:
            self._bar.initial += rows if is_old else 0
            self._bar.update(rows)
        elif time.monotonic() - self._said > SAY_EVERY:
            self._said = time.monotonic()
            say(f"Predicted {self._done:,} of {count_text(self._total, 'row')}.")


def _table(data: str) -> Path:
    """A file or folder of this machine, or the local copy of a dataset of the store."""
    if Path(data).exists():
        return Path(data)
    name, _, below = data.partition("/")
    name, _, version = name.partition("@")
    missing = ConfigurationError(
        f"{data!r} does not exist. Name a file or folder of this machine, or a dataset of the store (`cloudtrain data list`)."
    )
    if data.startswith(("/", ".", "~")) or "://" in data or (version and not version.isdecimal()):
        raise missing
    from hf_cloudtrain.datasets.store import DatasetStore
    from hf_cloudtrain.serving.predict.tables import KINDS

    store = DatasetStore()
    try:
        dataset = store.find(name, int(version) if version else None)
    except NoDatasetError:
        if Path(data).suffix.lower() in KINDS:  # the name of a file, not of a dataset
            raise missing from None
        raise
    with transfer(f"Downloading {name}", dataset.manifest.size) as progress:
        folder = store.local_copy(dataset, on_bytes=progress.add)
    if below and not (folder / below).exists():
        files = ", ".join(entry.path for entry in dataset.manifest.files[:10])
        raise ConfigurationError(f"The dataset {name!r} has no file {below!r}. Its files are: {files}.")
    return folder / below
