"""`cloudtrain run report`: one HTML file that shows a run, opens anywhere, and asks nobody for anything.

Everything from storage is untrusted: the template escapes it, plotly gets numbers and escaped words, the number of rows
is bounded, and the page's own policy allows no request and no script but ours.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import secrets
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import ManifestError, MissingExtraError
from hf_cloudtrain.report.summary import Found, Standing, look_at
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import clean, duration_text, size_text
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import READS_AT_ONCE
from hf_cloudtrain.tracking.history import AttemptInfo, History, history_of
from hf_cloudtrain.tracking.status import RunState, run_state, state_of

if TYPE_CHECKING:
    from hf_cloudtrain.report.figure import Chart

MOST_CHECKPOINTS = 200
"""Checkpoints in the table, and manifests that are read for it: the newest, and the best."""
MOST_ATTEMPTS = 200
MOST_FACTS = 60
MOST_TEXT = 2_000
"""Characters of one cell."""


@dataclass
class Table:
    """Rows of (text, kind); kinds are `number`, `text` (which may fold), `mono` and nothing."""

    title: str
    rows: list[list[tuple[str, str]]]
    columns: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


class Report:
    """The page of one run.

    Example:
        >>> report = Report(open_catalog("s3://bucket/runs/mrpc"))
        >>> report.write(Path("report.html"))
    """

    def __init__(self, catalog: Catalog) -> None:
        _check_extra_installed()
        catalog.attempts.check_any()
        self.state: RunState = run_state(catalog)
        self.history: History = history_of(catalog)
        if not self.history.attempts:
            raise ManifestError(f"No record of an attempt of {catalog.storage.url!r} can be read.")
        self.standing = Standing.of(catalog)
        self.found = _look_at_some(catalog, self.standing)

    def write(self, path: Path) -> int:
        """Write the file, whole or not at all; its size in bytes."""
        from hf_cloudtrain.report.charts import charts_of

        page = self._page(charts_of(self.history)).encode("utf-8", "replace")
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            beside.write_bytes(page)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        return len(page)

    def _page(self, charts: list[Chart]) -> str:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
        # JSON in a script ends only at "</", which no "<" can begin.
        data = json.dumps(
            {chart.name: json.loads(chart.figure.to_json()) for chart in charts}, allow_nan=False
        )
        url = shown(self.history.run_url)
        return template.render(
            nonce=secrets.token_urlsafe(16),
            name=url.rstrip("/").rpartition("/")[2] or url,
            state=shown(self.state.state, 20),
            run_url=url,
            notes=self._notes(),
            figures=self._figures(),
            charts=charts,
            tables=[self._attempt_table(), self._checkpoint_table(), *self._facts()],
            footer=f"Written by cloudtrain run report on {utc(time.time())}. Charts by plotly.js (MIT licence).",
            data=Markup(data.replace("<", "\\u003c")),  # noqa: S704 - as JSON has it, and harmless in a page
            plotly=Markup(_packed_plotly() if charts else ""),  # noqa: S704 - base64
        )

    def _notes(self) -> list[str]:
        notes = []
        if self.state.stalled:
            notes.append(f"It looks stalled, {self.state.stalled}.")
        if self.state.state in ("started", "training"):
            notes.append("The run goes on: this page shows how it was when the page was made.")
        damaged = sum(1 for found in self.found if found.manifest is None)
        if damaged:
            notes.append(f"{damaged} manifests are damaged: `cloudtrain checkpoint list` says which.")
        return notes

    def _figures(self) -> list[tuple[str, str, str]]:
        """The row of key figures: what, how much, and a detail."""
        history, state = self.history, self.state
        lost = sum(info.redone_steps for info in history.attempts)
        spent = sum(info.redone_seconds for info in history.attempts)
        step = history.attempts[-1].last_step
        total = state.total_steps
        done = f"{step:,} / {total:,}" if total else f"{step:,}"
        rate = f"{duration_text(state.step_seconds)} a step" if state.step_seconds else ""
        eta = f", {duration_text(state.eta_seconds)} left" if state.eta_seconds else ""
        last = max((commit.committed for commit in history.commits.values()), default=None)
        newest = f"step {self.standing.keys[-1].step:,}" if self.standing.keys else "none"
        good = "none" if history.goodput is None else f"{history.goodput:.1%}"
        began = min(info.started for info in history.attempts)
        return [
            ("Steps", done, rate + eta),
            ("Wall time", duration_text(history.wall_seconds) or "0 s", f"since {utc(began)}"),
            ("Goodput", good, "of that in steps that count"),
            ("Attempts", f"{len(history.attempts):,}", _hosts(history.attempts)),
            ("Steps done again", f"{lost:,}", f"{duration_text(spent)} of work lost" if spent else ""),
            ("Last commit", newest, utc(last) if last else ""),
        ]

    def _attempt_table(self) -> Table:
        columns = ("attempt", "state", "began (UTC)", "ran", "steps", "done again", "resumed from", "host")
        kinds = ("number", "", "", "", "", "number", "mono", "mono")
        infos = self.history.attempts[-MOST_ATTEMPTS:]
        rows = [_attempt_row(info, newest=info is self.history.attempts[-1]) for info in reversed(infos)]
        left = len(self.history.attempts) - len(infos)
        text = f"The newest {len(infos)}; {left} older ones are left out." if left else ""
        return _table("Attempts, the newest first", columns, kinds, rows, text)

    def _checkpoint_table(self) -> Table:
        columns = (
            "checkpoint",
            "step",
            "saved (UTC)",
            "on storage after",
            "size",
            "files",
            "metrics",
            "notes",
        )
        kinds = ("mono", "number", "", "number", "number", "number", "", "")
        rows = [self._checkpoint_row(found) for found in self.found]
        left = len(self.standing.keys) - len(self.found)
        text = "Those that exist now; a training with a limit deletes old ones."
        text += f" {left} older ones are left out." if left > 0 else ""
        if not rows:
            text = "None is committed: a machine that is lost now takes all work with it."
        return _table("Checkpoints, the newest first", columns if rows else (), kinds, rows, text)

    def _checkpoint_row(self, found: Found) -> list[object]:
        key, manifest = found.checkpoint_key, found.manifest
        commit = self.history.commits.get(key) if key else None
        notes = found.role(self.standing)
        if manifest is None:
            return [found.title, key and key.step, None, None, None, None, None, "damaged manifest"]
        if not manifest.exact:
            notes.append(f"not exact: {manifest.inexact_reason or 'no reason is recorded'}"[:100])
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in list(manifest.metrics.items())[:4])
        return [
            manifest.folder,
            f"{manifest.step:,}",
            utc(manifest.created),
            duration_text(commit.lag) if commit else None,
            size_text(manifest.size),
            len(manifest.files),
            metrics[:120],
            ", ".join(notes),
        ]

    def _facts(self) -> list[Table]:
        """What the newest whole manifest, and the newest attempt, say of how it is trained."""
        tables = []
        manifest = next((found.manifest for found in self.found if found.manifest), None)
        if manifest is not None:
            facts: dict[str, Any] = {
                "exact": "yes: a resume from it equals an uninterrupted run"
                if manifest.exact
                else f"no: {manifest.inexact_reason}",
                **{name.replace("_", " "): value for name, value in vars(manifest.position).items()},
            }
            started = self.history.attempts[-1].facts  # mostly the same, and told beside it
            facts |= {name: value for name, value in manifest.origin.items() if started.get(name) != value}
            tables.append(_fact_table(f"How {manifest.folder} was made", facts))
        newest = self.history.attempts[-1]
        if newest.facts:
            tables.append(_fact_table(f"How attempt {newest.number} was started", newest.facts))
        return tables


def shown(text: object, most: int = MOST_TEXT) -> str:
    """A text of storage, for the template to escape: no control characters, no secrets that are known by their shape."""
    # Cut before: what searches for secrets takes seconds for a megabyte of one letter. And cut again, because the first
    # cut may go through a secret.
    cleaned = redact(clean(str(text)[: 2 * most]))
    return cleaned if len(cleaned) <= most else cleaned[: most - 1] + "…"


def utc(seconds: float) -> str:
    """A time for people wherever they are: '2026-11-20 14:03:11'."""
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.3g} s"  # no year that a calendar has


def _check_extra_installed() -> None:
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"A report needs packages that are not installed: pip install 'hf_cloudtrain[report]' ({error})."
        ) from None


def _look_at_some(catalog: Catalog, standing: Standing) -> list[Found]:
    """The newest checkpoints, and the best, the newest first."""
    keys = standing.keys[-MOST_CHECKPOINTS:]
    if standing.best is not None and standing.best in standing.keys and standing.best not in keys:
        keys = [standing.best, *keys]

    def look(key: CheckpointKey) -> Found | None:
        return look_at(catalog, key)

    (found,) = in_threads(look, (keys[::-1], READS_AT_ONCE))
    return [item for item in found if item is not None]


def _packed_plotly() -> str:
    """The library: 5 MB, a third of it packed and in letters."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _hosts(attempts: list[AttemptInfo]) -> str:
    hosts = {info.facts.get("host") for info in attempts} - {None, ""}
    return "" if not hosts else f"on {len(hosts)} host{'' if len(hosts) == 1 else 's'}"


def _attempt_row(info: AttemptInfo, *, newest: bool) -> list[object]:
    return [
        info.number,
        state_of(info.state, info.last_seen, newest=newest),
        utc(info.started),
        duration_text(info.last_seen - info.started),
        f"{info.first_step:,} to {info.last_step:,}",
        f"{info.redone_steps:,}",
        info.resumed_from,
        info.facts.get("host"),
    ]


def _table(
    title: str, columns: tuple[str, ...], kinds: tuple[str, ...], rows: list[list[object]], text: str
) -> Table:
    cells = [
        [("" if cell is None else shown(cell, 200), kind) for cell, kind in zip(row, kinds, strict=True)]
        for row in rows
    ]
    return Table(title, cells, list(zip(columns, kinds, strict=False)), text)


def _fact_table(title: str, facts: dict[str, Any]) -> Table:
    known = [(name, value) for name, value in facts.items() if value is not None][:MOST_FACTS]
    return Table(title, [[(shown(name, 60), ""), (shown(value), "text")] for name, value in known])
