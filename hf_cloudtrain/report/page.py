"""One HTML file about a run, which opens in any browser, for `cloudtrain run report` and beside the run.

Everything from storage is untrusted: the template escapes it, plotly gets numbers and escaped texts, the number of rows
is bounded, and the page's content security policy allows only our own scripts and no requests. A page beside a run asks for
itself again while the run is alive.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.errors import ManifestError, MissingExtraError
from hf_cloudtrain.report.charts import charts_of
from hf_cloudtrain.report.summary import CheckpointInfo, Roles, read_infos
from hf_cloudtrain.runtime.files import write_whole
from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment
from hf_cloudtrain.runtime.text import clean, count_text, duration_text, size_text
from hf_cloudtrain.tracking.history import AttemptInfo, History, history_of
from hf_cloudtrain.tracking.status import ALIVE, RunState, run_state, state_of

Columns = Mapping[str, tuple[str, Callable[[Any], object]]]
"""A table: each heading, the CSS class of its cells (as in `Table`), and the function that takes its cell."""

CellsOf = Mapping[str, Callable[[Any], object]]
PAGE_NEEDS = ("report", "jinja2", "plotly")
"""The extra, and its packages."""
OVER = ("finished", "stopped", "failed", "overtaken")
"""States after which a page beside a run stops asking for a newer one. A preempted or killed run usually continues."""
RENEWED_SECONDS = 600.0
"""A page beside a run is renewed at least so often while it trains; a page that is much older says so."""

MOST_CHECKPOINTS = 200
"""Checkpoints in the table, whose manifests are read for it: the newest, and the best."""
MOST_ATTEMPTS = 200
MOST_FACTS = 60
MOST_TEXT = 2_000
"""Characters of one cell."""


@dataclass
class Table:
    """Rows of (text, CSS class); classes are `number`, `mono`, `wrap`, `text` (mono, may wrap), and none.

    On a live page a cell may have a third text, the address of a link.
    """

    title: str
    rows: list[list[tuple[str, ...]]]
    columns: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


class Report:
    """The page of one run.

    Example:
        >>> report = Report(open_catalog("s3://bucket/runs/mrpc"))
        >>> report.write(Path("report.html"))
    """

    def __init__(self, catalog: Catalog, now: float | None = None) -> None:
        catalog.attempts.check_any()
        self.state: RunState = run_state(catalog, now)
        self.history: History = history_of(catalog, now)
        if not self.history.attempts:
            raise ManifestError(f"No attempt record of {catalog.storage.url!r} can be read.")
        self.roles = Roles.of(catalog)
        self.found = _newest_and_best(catalog, self.roles)
        self._secrets = secrets_of_environment()
        self._titles = Titles(catalog)
        self._titles.read(info.resumed_from for info in self.history.attempts[-MOST_ATTEMPTS:])

    def content(self, smoothing: float = 0.0) -> dict[str, Any]:
        """All that a page about the run shows, as JSON; `cloudtrain ui` shows the same while the run trains."""
        url = shown(self.history.run_url)
        return {
            "name": url.rstrip("/").rpartition("/")[2] or url,
            "state": shown(self.state.state, 20),
            "run_url": url,
            "trackers": self._trackers(),
            "notes": self._notes(),
            "key_figures": self._key_figures(),
            "charts": [chart.record() for chart in charts_of(self.history, smoothing)],
            "tables": [
                vars(table) for table in (self._attempt_table(), self._checkpoint_table(), *self._facts())
            ],
        }

    def write(self, path: Path) -> int:
        """Write the file, replacing it whole or not at all; its size in bytes."""
        return write_file(path, self.html())

    def html(self, *, live: bool = False) -> bytes:
        """The page, in UTF-8.

        Args:
            live: it is beside the run, renewed while the run trains, and reloads itself.
        """
        content = self.content()
        if live and self.state.state == "finished":
            content["notes"].insert(0, "The run is complete.")
        if self.state.state in ALIVE and not live:
            content["notes"].append("The run was not over when this page was written.")
        writer = "the training" if live else "cloudtrain run report"
        return render(content, writer, is_over=not live or self.state.state in OVER)

    def _trackers(self) -> list[dict[str, str | None]]:
        """Where the curves are in tracker services; `url` only where a browser may follow it."""
        pages = ((shown(service), shown(page)) for service, page in self.state.trackers.items())
        return [
            {
                "service": service,
                "page": page,
                "url": page if page.startswith(("https://", "http://")) else None,
            }
            for service, page in pages
        ]

    def _notes(self) -> list[str]:
        notes = []
        if self.state.stalled:
            notes.append(f"The run looks stalled, {self.state.stalled}.")
        damaged = sum(1 for info in self.found if info.manifest is None)
        if damaged:
            notes.append(f"{count_text(damaged, 'manifest')} damaged: see `cloudtrain checkpoint list`.")
        return notes

    def _key_figures(self) -> list[tuple[str, str, str]]:
        """The row of key figures: name, value and detail."""
        history, state = self.history, self.state
        lost = sum(info.redone_steps for info in history.attempts)
        spent = sum(info.redone_seconds for info in history.attempts)
        step = history.attempts[-1].last_step
        total = state.total_steps
        done = f"{step:,} / {total:,}" if total else f"{step:,}"
        rate = f"{duration_text(state.step_seconds)} per step" if state.step_seconds else ""
        eta = f", {duration_text(state.eta_seconds)} left" if state.eta_seconds else ""
        last = max((commit.committed for commit in history.commits.values()), default=None)
        newest = f"step {self.roles.keys[-1].step:,}" if self.roles.keys else "none"
        cost = f"{'at least ' if history.is_cost_bound else ''}{history.cost or 0.0:,.2f}"
        redone = f"at least {lost:,}" if history.is_redone_bound else f"{lost:,}"
        began = min(info.started for info in history.attempts)
        return [
            ("Steps", done, rate + eta),
            ("Wall time", duration_text(history.wall_seconds) or "0 s", f"since {utc(began)}"),
            ("Goodput", history.goodput_text or "none", "of it in steps that count"),
            ("Attempts", f"{len(history.attempts):,}", _hosts(history.attempts)),
            ("Steps redone", redone, f"{duration_text(spent)} of work lost" if spent else ""),
            ("Last commit", newest, utc(last) if last else ""),
            *([] if history.cost is None else [("Cost", cost, "at the price of its machines")]),
        ]

    def _attempt_table(self) -> Table:
        newest = self.history.attempts[-1]
        columns: Columns = {
            "attempt": ("number", lambda info: info.number),
            "state": ("", lambda info: self._state_of(info, is_newest=info is newest)),
            "began (UTC)": ("", lambda info: utc(info.started)),
            "ran": ("", lambda info: _bound(duration_text(info.last_seen - info.started), info)),
            "steps": ("", lambda info: f"{info.first_step:,} to {_bound(f'{info.last_step:,}', info)}"),
            "redone": (
                "number",
                lambda info: (
                    f"{info.redone_steps:,}" if info is newest else _bound(f"{info.redone_steps:,}", info)
                ),
            ),
            "resumed from": ("mono", lambda info: info.resumed_from and self._titles.of(info.resumed_from)),
            "host": ("mono", lambda info: info.facts.get("host")),
        }
        infos = self.history.attempts[-MOST_ATTEMPTS:]
        left = len(self.history.attempts) - len(infos)
        text = f"The newest {len(infos)}; {left} older ones are not shown." if left else ""
        if any(info.was_killed for info in infos):
            text = f"{text} An attempt that was killed may have done more than the records show: at least.".strip()
        return self._table("Attempts, the newest first", columns, reversed(infos), text)

    def _state_of(self, info: AttemptInfo, *, is_newest: bool) -> str:
        return state_of(info.state, info.last_seen, newest=is_newest, now=self.history.read_at)

    def _checkpoint_table(self) -> Table:
        columns: Columns = {
            "checkpoint": ("mono", lambda info: info.title),
            "notes": ("wrap", self._notes_on),
            "step": ("number", lambda info: f"{info.record()['step']:,}"),
            "saved (UTC)": ("", lambda info: info.manifest and utc(info.manifest.created)),
            "on storage after": ("number", self._lag),
            "size": ("number", lambda info: info.manifest and size_text(info.manifest.size)),
            "files": ("number", lambda info: info.manifest and len(info.manifest.files)),
            "metrics": ("wrap", _metrics),
        }
        left = len(self.roles.keys) - len(self.found)
        text = "What is on storage now; retention deletes old checkpoints."
        text += f" {left} older ones are not shown." if left > 0 else ""
        if not self.found:
            return self._table(
                "Checkpoints", {}, [], "None is committed: losing the machine now would lose all work."
            )
        return self._table("Checkpoints, the newest first", columns, self.found, text)

    def _lag(self, info: CheckpointInfo) -> str | None:
        key = info.checkpoint_key
        commit = self.history.commits.get(key) if key and info.manifest else None
        return duration_text(commit.lag) if commit else None

    def _notes_on(self, info: CheckpointInfo) -> str:
        if info.manifest is None:
            return "damaged manifest"
        notes = info.roles_in(self.roles)
        if not info.manifest.exact:
            notes.append(
                f"{info.manifest.exactness.word}: {info.manifest.exactness.reason or 'no reason is recorded'}"[
                    :100
                ]
            )
        return ", ".join(notes)

    def _facts(self) -> list[Table]:
        """What the newest intact manifest and the newest attempt record about the training."""
        tables = []
        manifest = next((info.manifest for info in self.found if info.manifest), None)
        if manifest is not None:
            facts: dict[str, Any] = {
                "exact": str(manifest.exactness),
                **{name.replace("_", " "): value for name, value in vars(manifest.position).items()},
            }
            started = self.history.attempts[-1].facts  # mostly the same, and shown beside it
            facts |= {name: value for name, value in manifest.origin.items() if started.get(name) != value}
            tables.append(fact_table(f"How {manifest.folder} was saved", facts, self._secrets))
        newest = self.history.attempts[-1]
        if newest.facts:
            title = f"How attempt {newest.number} was started"
            tables.append(fact_table(title, newest.facts, self._secrets))
        return tables

    def _table(self, title: str, columns: Columns, records: Iterable[object], text: str) -> Table:
        rows: list[list[tuple[str, ...]]] = []
        for record in records:
            cells = [(cell_of(record), kind) for kind, cell_of in columns.values()]
            rows.append([("" if cell is None else self._shown(cell, 200), kind) for cell, kind in cells])
        return Table(title, rows, [(name, kind) for name, (kind, _) in columns.items()], text)

    def _shown(self, text: object, most: int = MOST_TEXT) -> str:
        return shown(text, most, self._secrets)


def shown(text: object, most: int = MOST_TEXT, secrets: tuple[str, ...] = ()) -> str:
    """A text from storage, for the template to escape: without control characters and known secrets."""
    # Cut before as well: the search for secrets takes seconds in a megabyte of one letter. A cut may go through a secret,
    # so the first one leaves twice as much.
    cleaned = redact(clean(str(text)[: 2 * most]), secrets)
    return cleaned if len(cleaned) <= most else cleaned[: most - 1] + "…"


def fact_table(title: str, facts: Mapping[str, object], secrets: tuple[str, ...] = ()) -> Table:
    """A table of names and values; values that are None are left out."""
    known = [(name, value) for name, value in facts.items() if value is not None][:MOST_FACTS]
    rows: list[list[tuple[str, ...]]] = [
        [(shown(name, 60, secrets), ""), (shown(value, MOST_TEXT, secrets), "text")] for name, value in known
    ]
    return Table(title, rows)


def record_table(
    title: str, columns: CellsOf, records: Iterable[object], text: str = "", prose: str = ""
) -> Table:
    """A table with columns as the command line has them: a heading with `>` in front is right-aligned, `prose` is wrapped."""
    kinds = {
        name.lstrip(">"): "number" if name.startswith(">") else "text" * (name == prose) for name in columns
    }
    found = [[cell_of(record) for cell_of in columns.values()] for record in records]
    rows: list[list[tuple[str, ...]]] = [
        [
            ("" if cell is None else shown(cell, 300), kind)
            for cell, kind in zip(row, kinds.values(), strict=True)
        ]
        for row in found
    ]
    return Table(title, rows, list(kinds.items()), text)


def render(content: dict[str, Any], writer: str, *, is_over: bool = True) -> bytes:
    """A page as one file, in UTF-8.

    Args:
        content: as `Report.content` has it.
        writer: named at the end of the page.
        is_over: whether the page stays as it is; else it looks for a newer one.

    Raises:
        MissingExtraError: a package of the extra `report` is missing.
    """
    check_extra_installed("The report", *PAGE_NEEDS)
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    charts = content["charts"]
    now = time.time()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_file("report.html"))
    page = template.render(
        **content,
        nonce=secrets.token_urlsafe(16),
        is_over=is_over,
        written=now,
        written_text=utc(now),
        renewed_seconds=RENEWED_SECONDS,
        footer=f"Written by {writer} on {utc(now)} UTC. Charts by plotly.js (MIT licence).",
        style=Markup(_file("page.css")),  # noqa: S704 - our own files
        script=Markup(_file("charts.js")),  # noqa: S704
        live_script=Markup(_file("live.js")),  # noqa: S704
        records=Markup(_packed(json.dumps(charts, allow_nan=False))),  # noqa: S704 - base64
        plotly=Markup(base64.b64encode(packed_plotly()).decode() if charts else ""),  # noqa: S704 - base64
    )
    return page.encode("utf-8", "replace")


def write_file(path: Path, page: bytes) -> int:
    """Write a page, replacing the file whole or not at all; its size in bytes."""
    try:
        write_whole(path, page)
    except OSError as error:  # with the name that the user gave
        raise OSError(error.errno, error.strerror, str(path)) from None
    return len(page)


def utc(seconds: float) -> str:
    """A moment in UTC: '2026-11-20 14:03:11'."""
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.3g} s"  # outside the calendar


def check_extra_installed(what: str, extra: str, *packages: str) -> None:
    """Raise MissingExtraError, with the command that installs it, where a package of an extra is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs packages that are not installed ({', '.join(missing)}). "
            f"Run: pip install 'hf_cloudtrain[{extra}]'"
        )


def _newest_and_best(catalog: Catalog, roles: Roles) -> list[CheckpointInfo]:
    """The checkpoints of the table, the newest first."""
    keys = roles.keys[-MOST_CHECKPOINTS:]
    if roles.best is not None and roles.best in roles.keys and roles.best not in keys:
        keys = [roles.best, *keys]
    return read_infos(catalog, keys[::-1])


def plotly_script() -> str:
    """plotly.js, 5 MB, from the installed package. It is read as a file: importing plotly takes a second."""
    origin = getattr(find_spec("plotly"), "origin", None)
    return Path(str(origin)).with_name("package_data").joinpath("plotly.min.js").read_text(encoding="utf-8")


@functools.cache
def packed_plotly() -> bytes:
    """The same, compressed to a third by gzip."""
    return gzip.compress(plotly_script().encode(), mtime=0)


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hosts(attempts: list[AttemptInfo]) -> str:
    hosts = {info.facts.get("host") for info in attempts} - {None, ""}
    return f"on {count_text(len(hosts), 'host')}" if hosts else ""


def _bound(text: str | None, info: AttemptInfo) -> str | None:
    return f"at least {text}" if info.was_killed else text


def _metrics(info: CheckpointInfo) -> str:
    metrics = info.manifest.metrics if info.manifest else {}
    return ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])[:120]
