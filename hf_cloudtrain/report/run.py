"""`Run`: one run for notebooks and scripts, read from its records on storage; and several runs compared."""

from __future__ import annotations

import contextlib
import html
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download, is_whole
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, decode_record
from hf_cloudtrain.checkpoints.run_deletion import deleted_by
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoCheckpointError
from hf_cloudtrain.report.card import BOX, card, trouble_card
from hf_cloudtrain.report.charts import charts_of
from hf_cloudtrain.report.comparison import Compared, comparison
from hf_cloudtrain.report.curves import loss_chart
from hf_cloudtrain.report.notebook import kernel, show
from hf_cloudtrain.report.page import Report, check_extra_installed
from hf_cloudtrain.report.reader import RunReader
from hf_cloudtrain.report.still import still
from hf_cloudtrain.report.summary import Roles, read_infos
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.runtime.values import NOT_FINITE
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import normal_url
from hf_cloudtrain.tracking.history import History, history_of
from hf_cloudtrain.tracking.mirror import Mirror
from hf_cloudtrain.tracking.status import RunState, run_state

if TYPE_CHECKING:
    from pandas import DataFrame


RETRY_SECONDS = 5.0
"""`watch` waits so long after a look that failed."""


class Run:
    """One run. Everything is read from storage when it is asked for, and nothing is written there.

    As the last value of a notebook's cell it shows a card: state, progress, loss.

    Args:
        run_url: any fsspec URL, a folder, or the name of a run or a job in the store; None takes `HF_CLOUDTRAIN_RUN_URL`.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.

    Raises:
        ConfigurationError: no run URL, or one that cannot be used.

    Example:
        >>> run = Run("s3://bucket/runs/mrpc")
        >>> run.status.step
        420
        >>> run.history.plot(x="step", y="loss")
        >>> AutoModel.from_pretrained(run.download(run.best()))
    """

    @short_traceback
    def __init__(
        self,
        run_url: str | os.PathLike[str] | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        options = env.storage_options(storage_options)
        self._catalog = Catalog(Storage(_in_store(env.run_url(run_url), options), options))

    @property
    def url(self) -> str:
        """Its URL, without credentials."""
        return self._catalog.storage.url

    @property
    @short_traceback
    def status(self) -> RunState:
        """Its state now, from a few small records.

        Raises:
            NoCheckpointError: the run was deleted. StorageError: the storage is unavailable.
        """
        if deleted := deleted_by(self._catalog):
            raise NoCheckpointError(f"The run {self.url!r} was deleted ({deleted}).")
        return run_state(self._catalog)

    @property
    @short_traceback
    def history(self) -> DataFrame:
        """What was logged, one row each, without the steps that were redone: `step`, `time` (UTC), `attempt` and metrics."""
        from pandas import DataFrame, to_datetime

        rows = [{key: _value(value) for key, value in log.items()} for log in self._read().logs]
        names = dict.fromkeys(["step", "time", "attempt", *(key for row in rows for key in row)])
        frame = DataFrame.from_records(rows, columns=list(names))
        frame["time"] = to_datetime(frame["time"], unit="s", utc=True, errors="coerce")
        return frame

    @property
    @short_traceback
    def checkpoints(self) -> DataFrame:
        """The checkpoints on storage, the newest last: folder, step, size in bytes, metrics, and what they are to the run."""
        from pandas import DataFrame, to_datetime

        roles = Roles.of(self._catalog)
        rows = [info.full_record(roles) for info in read_infos(self._catalog, roles.keys)]
        names = ("folder", "step", "attempt", "created", "size", "file_count", "exact", "metrics")
        columns = [*names, "newest", "best", "pinned", "damaged", "key"]
        frame = DataFrame.from_records(rows, columns=columns)
        frame["created"] = to_datetime(frame["created"], unit="s", utc=True, errors="coerce")
        return frame

    @property
    @short_traceback
    def figures(self) -> dict[str, dict[str, Any]]:
        """The charts of the report by name, each as the dictionary of a plotly figure."""
        return {chart.name: chart.figure for chart in charts_of(self._read())}

    @short_traceback
    def plot(self, name: str = "loss") -> Any:
        """A chart of the report, which the notebook shows with zoom; needs `hf_cloudtrain[report]`.

        Args:
            name: one of `figures`.
        """
        return _plot(self.figures, name)

    @short_traceback
    def best(self) -> Manifest | None:
        """The best checkpoint; None if the training recorded none."""
        key = self._catalog.pointer("best")
        return None if key is None else self._catalog.read(key)

    @short_traceback
    def download(
        self, checkpoint: Manifest | int | str | None = None, directory: str | os.PathLike[str] = "."
    ) -> Path:
        """Download a checkpoint, verify it, and return its folder; an intact one that is there is not downloaded again.

        Args:
            checkpoint: a manifest, as `best` returns; a step; a folder, such as `checkpoint-500`. None takes the newest.
            directory: the folder in which `checkpoint-500` appears.

        Raises:
            NoCheckpointError: it does not exist.
            ConfigurationError: a folder of its name is there, with different files.
            CorruptCheckpointError: a file is damaged.
        """
        manifest = checkpoint if isinstance(checkpoint, Manifest) else self._find(checkpoint)
        target = Path(directory).absolute() / f"checkpoint-{manifest.step}"
        if target.exists():
            if not is_whole(target, manifest):
                raise ConfigurationError(
                    f"{str(target)!r} exists, and its files differ from {manifest.folder!r}. Remove it, or pass a different "
                    "directory."
                )
            return target
        progress = Progress()
        progress.begin(f"Downloading {manifest.folder}", manifest.size)
        with Bar(progress):
            download(self._catalog, manifest, target, on_bytes=progress.add)
        return target

    @short_traceback
    def compare(self, *others: Run | str | os.PathLike[str]) -> Comparison:
        """Compare with other runs, each a `Run` or a URL.

        Example:
            >>> run.compare("s3://bucket/runs/mrpc-2").arguments
        """
        return Comparison([self, *(other if isinstance(other, Run) else Run(other) for other in others)])

    @short_traceback
    def watch(self) -> None:
        """Show the card, renewed every two seconds, until the run is over; interrupting the cell ends it.

        It makes at most one request a second.
        """
        if kernel() is None:
            raise ConfigurationError(f"This is not a notebook. Use `cloudtrain run watch {self.url}`.")
        reader = RunReader(Mirror(self._catalog.storage))
        handle: Any = None
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                text, pause = _look(reader, self.url)
                bundle = {"text/html": text, "text/plain": self.url}
                if handle is None:
                    handle = show(bundle)
                else:
                    handle.update(bundle, raw=True)
                if pause is None:
                    return
                time.sleep(pause)

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    def _repr_html_(self) -> str:
        try:
            now, history = self.status, self._read()
        except CloudTrainError as error:
            return trouble_card(self.url, error)
        chart = loss_chart(history)
        return card(now, None if chart is None else chart.figure, history.goodput_text)

    def _read(self) -> History:
        return history_of(self._catalog)

    def _find(self, which: int | str | None) -> Manifest:
        keys = self._catalog.checkpoints()
        if not keys:
            raise NoCheckpointError(f"The run {self.url!r} has no checkpoint yet.")
        if which is None:
            return self._catalog.read(keys[-1])
        found = CheckpointKey.named(str(which))
        for key in reversed(keys):
            if key == found or str(which) in (str(key.step), f"checkpoint-{key.step}"):
                return self._catalog.read(key)
            if isinstance(which, str) and key.may_be_in(which):
                return self._catalog.read(key)
        steps = ", ".join(str(key.step) for key in keys[-5:])
        raise NoCheckpointError(
            f"The run {self.url!r} has no checkpoint {which!r}. The newest are of steps {steps}."
        )


class Comparison:
    """Several runs side by side; as the last value of a notebook's cell it shows curves and tables.

    Example:
        >>> found = Run("s3://bucket/runs/a").compare("s3://bucket/runs/b")
        >>> found.metrics
    """

    def __init__(self, runs: list[Run]) -> None:
        self.content: dict[str, Any] = comparison([Compared(run.url, Report(run._catalog)) for run in runs])
        """Charts and tables, as JSON."""

    @property
    def metrics(self) -> DataFrame:
        """The last values: a row for each metric, a column for each run."""
        return self._frame(0)

    @property
    def arguments(self) -> DataFrame:
        """What differs between the runs: arguments, versions, hosts."""
        return self._frame(1)

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """A chart for each metric, by its title's first words, each as the dictionary of a plotly figure."""
        return {chart["title"].partition(":")[0].lower(): chart["figure"] for chart in self.content["charts"]}

    def plot(self, name: str = "loss") -> Any:
        """One of `figures`, which the notebook shows with zoom; needs `hf_cloudtrain[report]`."""
        return _plot(self.figures, name)

    def __repr__(self) -> str:
        return f"Comparison of {self.content['name']}"

    def _repr_html_(self) -> str:
        parts = [f'<div style="{BOX}"><b>{html.escape(self.content["name"])}</b>']
        for chart in self.content["charts"][:1]:
            colours = "".join(
                f'<span style="color:{colour};margin-right:14px">&#9644; {html.escape(name)}</span>'
                for _, colour, name in chart["legend"]
            )
            parts += [
                f"<div>{html.escape(chart['title'])}</div>",
                still(chart["figure"]),
                f"<div>{colours}</div>",
            ]
        parts.append("</div>")
        return "".join([*parts, self.metrics.to_html(), self.arguments.to_html()])

    def _frame(self, index: int) -> DataFrame:
        from pandas import DataFrame

        table = self.content["tables"][index]
        rows = [[text for text, _ in row] for row in table["rows"]]
        names = [name for name, _ in table["columns"]][1:]
        return DataFrame([row[1:] for row in rows], index=[row[0] for row in rows], columns=names)


def _look(reader: RunReader, url: str) -> tuple[str, float | None]:
    """The card of a run that is watched, and the seconds until the next look; None: it is over."""
    try:
        pause = reader.turn()
        now = reader.state()
    except CloudTrainError as error:  # the next look tries again
        return trouble_card(url, error), RETRY_SECONDS
    if now.state == "waiting":
        return card(now), RETRY_SECONDS
    if reader.gone is not None or reader.report is None:
        return trouble_card(url, NoCheckpointError(reader.gone)), None
    history = reader.report.history
    chart = loss_chart(history)
    is_over = now.is_over and reader.report.state.state == now.state
    text = card(now, None if chart is None else chart.figure, history.goodput_text)
    return text, None if is_over else pause


def _in_store(run: str, options: dict[str, Any]) -> str:
    """The URL of a run of the store that is called by its name, or by that of its job; anything else as it is."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run) or os.path.exists(run):
        return run
    store = normal_url(env.store(None)).rstrip("/")
    if Catalog(Storage(f"{store}/runs/{run}", options)).attempts.numbers():
        return f"{store}/runs/{run}"
    return _run_of_job(Storage(f"{store}/jobs", options), run) or run


def _run_of_job(jobs: Storage, name: str) -> str | None:
    """The run of a job by its id, or of the newest job with a name, as its record says (jobs/records.py)."""
    ids = [info.path.removeprefix("records/").removesuffix(".json") for info in jobs.list("records")]
    numbers = {
        int(number): job_id for job_id in ids if (number := job_id.removeprefix(f"{name}-")).isdecimal()
    }
    job_id = name if name in ids else numbers[max(numbers)] if numbers else None
    if job_id is None:
        return None
    found = decode_record(jobs.read(f"records/{job_id}.json"), f"record of the job {job_id}").get("run_url")
    return found if isinstance(found, str) else None


def _plot(figures: dict[str, dict[str, Any]], name: str) -> Any:
    check_extra_installed("A chart with zoom", "report", "plotly")
    if name not in figures:
        raise ConfigurationError(f"There is no chart {name!r}. The run has: {', '.join(figures) or 'none'}.")
    from plotly.graph_objects import Figure

    return Figure(figures[name])


def _value(value: Any) -> Any:
    """A metric that is not finite is recorded as a text."""
    return float(value) if isinstance(value, str) and value in NOT_FINITE else value
