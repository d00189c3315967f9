"""Batch inference: a table in, the same table with predictions out; sharded, and resumed after a kill.

    OUT.parts/plan.json           what is predicted: the digests of data and model, and how the rows are cut into shards
    OUT.parts/00007.arrow         the rows of one shard, with their predictions
    OUT.parts/00007.json          its manifest: rows and digest; a shard without one does not exist
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
class Plan:
    """What is predicted.

    Args:
        data: tables, read in this order.
        columns: of the input: one, or two for pairs of texts.
        out: the file with the predictions.
        shard: rows of a shard.
        batch: rows of a batch.
    """

    model: Model
    data: tuple[Path, ...]
    columns: tuple[str, ...]
    out: Path
    shard: int
    batch: int

    @property
    def parts(self) -> Path:
        """The folder of the shards."""
        return self.out.with_name(f"{self.out.name}.parts")

    def part(self, index: int) -> Path:
        """The rows of a shard; its manifest lies beside it."""
        return self.parts / f"{index:05d}.arrow"

    def encode(self) -> dict[str, Any]:
        """What must be the same for a prediction to be continued."""
        assert self.model.task is not None
        model = sorted(path for path in self.model.folder.iterdir() if path.is_file())
        return {
            "format": 1,
            "data": {path.name: file_digest(path) for path in self.data},
            "model": {path.name: file_digest(path) for path in model},
            "task": self.model.task.name,
            "base": self.model.base,
            "processor": self.model.processor,
            "columns": list(self.columns),
            "kind": tables.kind_of(self.out),
            "shard": self.shard,
            "batch": self.batch,
        }


def plan(
    model: Model, data: Path, column: str | None, label: str | None, out: Path, *, shard: int, batch: int
) -> Plan:
    """Decide what is predicted, before anything is loaded or written.

    Raises:
        ConfigurationError: columns are missing, or the output exists.
    """
    files = tuple(tables.files_of(data))
    there = tables.columns_of(files)
    tables.kind_of(out)
    found = Plan(model, files, _input_columns(files[0], there, column), out, shard, batch)
    if out.exists() and not found.parts.is_dir():
        raise ConfigurationError(f"{str(out)!r} exists. Remove it, or choose a different --output.")
    label_column(there, label)
    if taken := {LABEL, SCORE, ERROR, OTHER} & set(there):
        raise ConfigurationError(
            f"The data already has a column {min(taken)!r}, which the predictions would get. Rename or drop it."
        )
    return found


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


def run(plan: Plan, processes: int, on_rows: Callable[[int], object]) -> None:
    """Predict all shards that are not committed, and write the output.

    Args:
        processes: that predict at once.
        on_rows: receives the rows of each shard as it is committed, those of earlier starts too.

    Raises:
        ConfigurationError: a different prediction is under way at this output, in this process's place or before.
        CloudTrainError: a process failed. OSError: the disk is full; the same command continues.
    """
    plan.parts.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(plan.parts / "lock"))
        except BlockingIOError:
            raise ConfigurationError(
                f"A different process is predicting into {str(plan.out)!r}. Wait for it, or choose a different --output."
            ) from None
        _check_same(plan)
        if processes == 1:
            _predict_shards(plan, 0, 1, on_rows)
        else:
            _in_processes(plan, processes, on_rows)
        _merge(plan)
        shutil.rmtree(plan.parts)


def _check_same(plan: Plan) -> None:
    path, record = plan.parts / "plan.json", plan.encode()
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_whole(path, json.dumps(record, indent=2).encode())
        return
    except ValueError:
        before = {}
    differing = [name for name in record if record[name] != before.get(name)]
    if differing:
        raise ConfigurationError(
            f"{str(plan.parts)!r} holds the beginning of a different prediction ({', '.join(differing)} differ). Finish it with "
            "its own command, or remove the folder."
        )


def _predict_shards(plan: Plan, rank: int, processes: int, on_rows: Callable[[int], object]) -> None:
    predictor: Predictor | None = None
    for index, table in enumerate(tables.chunks(plan.data, plan.shard)):
        if index % processes == rank:
            if not _is_committed(plan, index):
                predictor = predictor or load(plan.model)
                _commit(plan, index, _predicted(predictor, table, plan))
            on_rows(table.num_rows)


def _is_committed(plan: Plan, index: int) -> bool:
    part = plan.part(index)
    try:
        return bool(json.loads(part.with_suffix(".json").read_bytes())["digest"] == file_digest(part))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _commit(plan: Plan, index: int, table: pa.Table) -> None:
    import pyarrow as pa

    part = plan.part(index)
    beside = part.with_name(f".{part.name}-{temp_suffix()}")
    with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(beside, part)
    record = {"rows": table.num_rows, "digest": file_digest(part)}
    write_whole(part.with_suffix(".json"), json.dumps(record).encode())


def _predicted(predictor: Predictor, table: pa.Table, plan: Plan) -> pa.Table:
    import pyarrow as pa

    rows = _rows(table, plan.columns)
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
        table = table.append_column(LABEL, pa.array([row and row["label"] for row in best], pa.string()))
        table = table.append_column(SCORE, pa.array([row and row["score"] for row in best], pa.float64()))
    else:
        texts = [None if answer is None else json.dumps(answer, ensure_ascii=False) for answer in whole]
        table = table.append_column(OTHER, pa.array(texts, pa.string()))
    return table.append_column(ERROR, pa.array(errors, pa.string()))


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


def _in_processes(plan: Plan, processes: int, on_rows: Callable[[int], object]) -> None:
    start = multiprocessing.get_context("spawn")
    running = [start.Process(target=_one_of, args=(plan, rank, processes)) for rank in range(processes)]
    seen: set[Path] = set()
    try:
        for process in running:
            process.start()
        while True:
            connection.wait([process.sentinel for process in running if process.is_alive()], POLL)
            codes = [process.exitcode for process in running]
            for path in {*plan.parts.glob("[0-9]*.json")} - seen:
                seen.add(path)
                on_rows(int(json.loads(path.read_bytes())["rows"]))
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


def _one_of(plan: Plan, rank: int, processes: int) -> None:
    """What one of several processes does."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent(_: int) -> None:
        if not parent.is_alive():
            sys.exit("The command was killed, so this process ends; the same command continues.")

    try:
        _predict_shards(plan, rank, processes, end_with_parent)
    except (CloudTrainError, OSError) as error:
        sys.exit(f"Error: {error}")


def _merge(plan: Plan) -> None:
    import pyarrow as pa

    def parts() -> Iterator[pa.Table]:
        for index in range(count):
            with pa.memory_map(str(plan.part(index))) as source:
                yield pa.ipc.open_file(source).read_all()

    count = sum(1 for _ in tables.chunks(plan.data, plan.shard))
    if not count:
        raise ConfigurationError(f"{str(plan.data[0])!r} has no rows, so there is nothing to predict.")
    for index in range(count):
        if not _is_committed(plan, index):
            raise CloudTrainError(
                f"Shard {index} of {count} was damaged on the disk. Run the same command again."
            )
    schema = pa.unify_schemas([table.schema for table in parts()], promote_options="permissive")
    beside = plan.parts / "whole.tmp"
    tables.write(parts(), schema, beside, tables.kind_of(plan.out))
    os.replace(beside, plan.out)
