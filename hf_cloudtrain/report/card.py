"""The card of a run: state, progress and curve of the loss as one piece of HTML, for the output of a notebook's cell.

It has no script and no style sheet, which notebooks would drop or mix with their own.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.report.page import shown
from hf_cloudtrain.report.still import still
from hf_cloudtrain.runtime.text import duration_text
from hf_cloudtrain.tracking.host import HOST_METRICS
from hf_cloudtrain.tracking.status import ALIVE, RunState

GOOD, BUSY, BAD, CALM = "#1d7d53", "#2563b8", "#b3261e", "#8a5a00"
COLOURS = {
    "finished": GOOD,
    "training": BUSY,
    "started": BUSY,
    "failed": BAD,
    "killed": BAD,
    "overtaken": BAD,
}
"""Of the states; others have the calm one."""
BOX = (
    "border:1px solid rgba(128,128,128,0.35);border-radius:8px;padding:10px 14px;max-width:640px;"
    "font:13px/1.5 system-ui,sans-serif"
)


PILL = "border:1px solid;border-radius:9px;padding:0 8px;margin-left:6px"


def card(now: RunState, figure: dict[str, Any] | None = None, goodput: str | None = None) -> str:
    """The card of a run at one moment.

    Args:
        now: its state.
        figure: of its loss, as `charts_of` has it.
        goodput: as a text, such as '97.1%'; None if it is not known.

    Example:
        >>> IPython.display.HTML(card(run_state(catalog)))
    """
    url = shown(now.run_url, 300)
    state = shown(now.state, 20)
    colour = COLOURS.get(now.state, CALM)
    parts = [
        f'<div style="{BOX}"><div><b>{escape(url.rstrip("/").rpartition("/")[2] or url)}</b>',
        f' <span style="color:{colour};{PILL}">{escape(state)}</span></div>',
        f'<div style="opacity:0.65;font-size:12px;overflow-wrap:anywhere">{escape(url)}</div>',
        _bar(now, colour),
        f"<div>{escape(' · '.join(facts(now, goodput)))}</div>",
    ]
    if now.stalled:
        parts.append(f'<div style="color:{BAD}">It looks stalled, {escape(shown(now.stalled, 200))}.</div>')
    if figure is not None:
        parts.append(still(figure))
    return "".join(parts) + "</div>"


def trouble_card(run_url: str, error: Exception) -> str:
    """In place of a card, if the run cannot be read."""
    return (
        f'<div style="{BOX}"><b>{escape(shown(run_url, 300))}</b>'
        f'<div style="color:{BAD}">Cannot read the run: {escape(shown(error, 500))}</div></div>'
    )


def facts(now: RunState, goodput: str | None = None) -> list[str]:
    """What is known of a run, in a few words each."""
    committed = None if now.last_committed is None else CheckpointKey.named(now.last_committed)
    step = None if now.step is None else f"step {now.step:,}"
    loss = (
        None if now.loss is None else f"loss {now.loss:.4g}" if math.isfinite(now.loss) else "loss not finite"
    )
    seconds, left = duration_text(now.step_seconds), duration_text(now.eta_seconds)
    found = [
        None if now.attempt is None else f"attempt {now.attempt}",
        f"{step} of {now.total_steps:,}" if step and now.total_steps else step,
        seconds and f"{seconds} per step",
        f"{left} left" if left and now.state in ALIVE else None,
        loss,
        None if goodput is None else f"goodput {goodput}",
        None if now.learning_rate is None else f"learning rate {now.learning_rate:.3g}",
        *(f"{HOST_METRICS[name]} {value:.0f} %" for name, value in now.host.items()),
        "no checkpoint on storage yet" if committed is None else f"checkpoint-{committed.step} is on storage",
    ]
    return [text for text in found if text]


def _bar(now: RunState, colour: str) -> str:
    if not now.total_steps or now.step is None:
        return ""
    done = min(100.0, 100 * now.step / now.total_steps)
    return (
        '<div style="background:rgba(128,128,128,0.25);border-radius:3px;height:6px;margin:6px 0">'
        f'<div style="background:{colour};border-radius:3px;height:6px;width:{done:.1f}%"></div></div>'
    )
