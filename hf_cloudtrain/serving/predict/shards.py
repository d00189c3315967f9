"""Batch inference: a table in, the same table with predictions out; sharded, and resumed after a kill.

    OUT.parts/plan.json           what is predicted: the digests of data and model, and how the rows are cut into shards
    OUT.parts/00007.arrow         the rows of one shard, with their predictions
    OUT.parts/00007.json          its manifest: digest, and the names of labels; a shard without one does not exist
    OUT                           all shards, in order; then OUT.parts is removed

A shard is predicted in the same batches whenever and wherever that happens, so an interrupted prediction ends in the same bytes as
an uninterrupted one on the same machine.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.runtime.files import locked, temp_suffix, write_whole
from hf_cloudtrain.serving.models.loading import load
from hf_cloudtrain.serving.models.predictor import Predictor, RowError
from hf_cloudtrain.serving.models.source import Model
from hf_cloudtrain.serving.predict import tables
from hf_cloudtrain.serving.predict.scores import ERROR, LABEL, label_column
from hf_cloudtrain.storage.digest import file_digest

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("text", "inputs", "sentence", "document", "image")
"""Columns that are read as the input if none is named; the first that is there."""
SCORE, OTHER = "predicted_score", "prediction"
"""The columns that are added. Tasks other than classification have `prediction`, as JSON."""
POLL = 0.1


@dataclass(frozen=True)
class Data:
    """The tables that are read.

    Args:
        root: the folder that the files are in.
        files: read in this order.
        columns: of the input: one, or two for pairs of texts.
        stamps: size and time of each file, from before its rows were counted.
    """

    root: Path
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    rows: int
    stamps: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Args:
        shard: rows of a shard.
        batch: rows of a batch.
    """

    model: Model
    data: Data
    out: Path
    shard: int
    batch: int

    @property
    def count(self) -> int:
        """Shards."""
        return -(-self.data.rows // self.shard)

    def rows(self, index: int) -> int:
        """Rows of a shard."""
        return min(self.shard, self.data.rows - index * self.shard)

    @property
    def parts(self) -> Path:
        """The folder of the shards."""
        return _parts(self.out)

    def part(self, index: int) -> Path:
        """The rows of a shard."""
        return self.parts / f"{index:05d}.arrow"

    def manifest(self, index: int) -> Path:
        """The manifest of a shard."""
        return self.parts / f"{index:05d}.json"

    def encode(self) -> dict[str, Any]:
        """What must be the same for a prediction to be continued."""
        assert self.model.task is not None
        model = sorted(path for path in self.model.folder.iterdir() if path.is_file())
        return {
            "format": 2,
            "data": {
                path.relative_to(self.data.root).as_posix(): file_digest(path) for path in self.data.files
            },
            "model": {path.name: file_digest(path) for path in model},
            "task": self.model.task.name,
            "base": self.model.base,
            "processor": self.model.processor,
            "columns": list(self.data.columns),
            "kind": tables.kind_of(self.out),
            "shard": self.shard,
            "batch": self.batch,
        }


def data_of(path: Path, column: str | None, label: str | None) -> Data:
    """What is read of a table or a folder of tables, before anything is loaded or written.

    Raises:
        ConfigurationError: it has no rows, columns are missing, or it has one that a prediction adds.
    """
    files = tuple(tables.files_of(path))
    stamps = tuple(map(_stamp, files))
    there, rows = tables.look(files)
    columns = _input_columns(files[0], there, column)
    label_column(there, label)
    if not rows:
        raise ConfigurationError(f"{str(path)!r} has no rows, so there is nothing to predict.")
    if taken := {LABEL, SCORE, ERROR, OTHER} & set(there):
        raise ConfigurationError(
            f"The data already has a column {min(taken)!r}, which the predictions would get. Rename or drop it."
        )
    return Data(path if path.is_dir() else path.parent, files, columns, rows, stamps)


def _input_columns(file: Path, there: Sequence[str], named: str | None) -> tuple[str, ...]:
    wanted = named.split(",") if named else [name for name in COLUMNS if name in there][:1]
    missing = [name for name in wanted if name not in there]
    if missing or not 1 <= len(wanted) <= 2:
        what = f"has no column {missing[0]!r}" if missing else "has none of the columns " + ", ".join(COLUMNS)
        raise ConfigurationError(
            f"{str(file)!r} {what}. Its columns are: {', '.join(there)}. Pass the input's: --column NAME, or NAME,NAME for pairs "
            "of texts."
        )
    return tuple(wanted)


def run(plan: Plan, processes: int, on_rows: Callable[[int, bool], object]) -> dict[str, str]:
    """Predict all shards that are not committed, and write the output; returns the names of the labels by their number.

    Args:
        processes: that predict at once.
        on_rows: receives the rows of each shard as it is committed, and whether an earlier start did it.

    Raises:
        ConfigurationError: the output exists, or a different prediction is under way there, in this process's place or before.
        CloudTrainError: a process failed. OSError: the disk is full; the same command continues.
    """
    check_output(plan.out)
    plan.parts.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(plan.parts / "lock"))
        except BlockingIOError:
            raise ConfigurationError(
                f"A different process is predicting into {str(plan.out)!r}. Wait for it, or choose a different --output."
            ) from None
        _check_same(plan)
        for left in plan.parts.glob(".*"):  # of a process that was killed
            with contextlib.suppress(OSError):
                left.unlink()
        todo = []
        for index in range(plan.count):
            if _is_committed(plan, index):
                on_rows(plan.rows(index), True)
            else:
                todo.append(index)
                plan.manifest(index).unlink(missing_ok=True)  # damaged
        if todo and processes > 1:  # even for one shard: with more threads, its last digits would differ
            _in_processes(plan, todo, processes, on_rows)
        elif todo:
            _predict_shards(plan, todo, lambda index: on_rows(plan.rows(index), False))
        labels = _merge(plan)
        _remove_shards(plan)  # before the plan, so that no different prediction finds them
        shutil.rmtree(plan.parts)
        return labels


def check_output(out: Path) -> None:
    """Raise ConfigurationError if the output exists, or is not a table."""
    tables.kind_of(out)
    if out.exists() and not (_parts(out) / "plan.json").exists():
        raise ConfigurationError(f"{str(out)!r} exists. Remove it, or choose a different --output.")


def _check_same(plan: Plan) -> None:
    path, record = plan.parts / "plan.json", plan.encode()
    _check_unchanged(plan)
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        _remove_shards(plan)
        write_whole(path, json.dumps(record, indent=2).encode())
        return
    except ValueError:
        before = {}
    if not isinstance(before, dict) or before.get("format") != record["format"]:
        raise ConfigurationError(
            f"{str(path)!r} is damaged, or a different version of hf_cloudtrain wrote it. Remove the folder {str(plan.parts)!r}."
        )
    differing = [name for name in record if record[name] != before.get(name)]
    if differing:
        raise ConfigurationError(
            f"{str(plan.parts)!r} holds the beginning of a different prediction ({', '.join(differing)} differ). Finish it with "
            "its own command, or remove the folder."
        )


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _predict_shards(plan: Plan, todo: Sequence[int], on_commit: Callable[[int], object]) -> None:
    predictor = load(plan.model)
    wanted = set(todo)
    for index, table in enumerate(tables.chunks(plan.data.files, plan.shard)):
        if index in wanted:
            found = _predicted(predictor, table, plan)
            _check_unchanged(plan, table.num_rows == plan.rows(index))
            _commit(plan, index, found, predictor.labels)
            on_commit(index)
        if index == todo[-1]:
            return
    _check_unchanged(plan, has_rows=False)


def _check_unchanged(plan: Plan, has_rows: bool = True) -> None:
    """Raise ConfigurationError if the data is not what was counted: its digests and its shards would be of different rows."""
    data = plan.data
    changed = [path for path, stamp in zip(data.files, data.stamps, strict=True) if _stamp(path) != stamp]
    if changed or not has_rows:
        path = (changed or [data.root if data.files[1:] else data.files[0]])[0]
        raise ConfigurationError(
            f"{str(path)!r} has changed since the command began. Once no process writes to it, remove the folder "
            f"{str(plan.parts)!r}, and run the command again."
        )


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _remove_shards(plan: Plan) -> None:
    for path in plan.parts.glob("[0-9]*"):
        path.unlink()


def _is_committed(plan: Plan, index: int) -> bool:
    try:
        return bool(_record(plan, index)["digest"] == file_digest(plan.part(index)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _record(plan: Plan, index: int) -> Any:
    return json.loads(plan.manifest(index).read_bytes())


def _commit(plan: Plan, index: int, table: pa.Table, labels: dict[str, str]) -> None:
    import pyarrow as pa

    part = plan.part(index)
    beside = part.with_name(f".{part.name}-{temp_suffix()}")
    try:
        with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(beside, part)
    except BaseException:  # on a full disk, each try would leave one more file
        beside.unlink(missing_ok=True)
        raise
    record = {"digest": file_digest(part), "labels": labels}
    write_whole(plan.manifest(index), json.dumps(record).encode())


def _predicted(predictor: Predictor, table: pa.Table, plan: Plan) -> pa.Table:
    import pyarrow as pa

    rows = _rows(table, plan.data.columns)
    answers: list[Any] = [None] * len(rows)
    # Rows of similar length share a batch: less padding. The order depends on the rows alone.
    order = sorted(range(len(rows)), key=lambda at: (len(str(rows[at])), at))
    parameters = predictor.parameters(None)
    for start in range(0, len(order), plan.batch):
        places = order[start : start + plan.batch]
        for place, answer in zip(
            places, predictor.answers([rows[at] for at in places], parameters), strict=True
        ):
            answers[place] = answer
    errors = [answer.text if isinstance(answer, RowError) else None for answer in answers]
    whole = [None if isinstance(answer, RowError) else answer for answer in answers]
    if predictor.task.name in ("text-classification", "image-classification"):
        best = [answer[0] if isinstance(answer, list) else answer for answer in whole]
        table = table.append_column(LABEL, tables.texts([row and row["label"] for row in best]))
        scores = [row["score"] if row else None for row in best]  # a NaN is None
        texts = tables.texts([None if score is None else repr(score) for score in scores])
        table = table.append_column(SCORE, texts.cast(pa.float64()))
    else:
        found = [None if answer is None else json.dumps(answer, ensure_ascii=False) for answer in whole]
        table = table.append_column(OTHER, tables.texts(found))
    return table.append_column(ERROR, tables.texts(errors))


def _rows(table: pa.Table, columns: Sequence[str]) -> list[Any]:
    found = [[_input(value) for value in table[name].to_pylist()] for name in columns]
    if len(found) == 1:
        return found[0]
    return [{"text": first, "text_pair": second} for first, second in zip(*found, strict=True)]


def _input(value: Any) -> Any:
    """A null is an empty text; an image of a dataset is an object with its bytes."""
    if value is None:
        return ""
    return value.get("bytes") if isinstance(value, dict) and "bytes" in value else value


def _in_processes(
    plan: Plan, todo: Sequence[int], processes: int, on_rows: Callable[[int, bool], object]
) -> None:
    start = multiprocessing.get_context("spawn")
    shares = [todo[rank::processes] for rank in range(min(processes, len(todo)))]
    running = [start.Process(target=_one_of, args=(plan, share, processes)) for share in shares]
    waiting = set(todo)
    try:
        for process in running:
            process.start()
        while True:
            connection.wait([process.sentinel for process in running if process.is_alive()], POLL)
            codes = [process.exitcode for process in running]
            for index in [index for index in waiting if plan.manifest(index).exists()]:
                waiting.remove(index)
                on_rows(plan.rows(index), False)
            if any(codes):
                raise CloudTrainError(
                    f"A process ended with exit code {max(code for code in codes if code)}; its error is above. What is done is "
                    "kept: run the same command again to continue."
                )
            if None not in codes:
                return
    finally:
        for process in running:
            if process.pid is not None:
                process.kill()
                process.join()


def _one_of(plan: Plan, todo: Sequence[int], processes: int) -> None:
    """What one of several processes does."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent(_: int) -> None:
        if not parent.is_alive():
            sys.exit("The command was killed, so this process ends; the same command continues.")

    try:
        _predict_shards(plan, todo, end_with_parent)
    except (CloudTrainError, OSError) as error:
        sys.exit(f"Error: {error}")


def _merge(plan: Plan) -> dict[str, str]:
    import pyarrow as pa

    def parts() -> Iterator[pa.Table]:
        for index in range(plan.count):
            with pa.memory_map(str(plan.part(index))) as source:
                yield pa.ipc.open_file(source).read_all()

    for index in range(plan.count):
        if not _is_committed(plan, index):
            raise CloudTrainError(
                f"Shard {index} of {plan.count} was damaged on the disk. Run the same command again."
            )
    schema = pa.unify_schemas([table.schema for table in parts()], promote_options="permissive")
    beside = plan.parts / "whole.tmp"
    tables.write(parts(), schema, beside, tables.kind_of(plan.out))
    labels: dict[str, str] = _record(plan, 0)["labels"]
    os.replace(beside, plan.out)
    return labels
