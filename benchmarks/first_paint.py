"""First paint of `cloudtrain ui` in headless Chromium: the list of 1,000 runs, and a run of 100,000 steps, on a local disk.

    .venv/bin/python -m benchmarks.first_paint

For each page: milliseconds from the navigation until its first content (of the list, the names), all content, the first chart and
all charts are there, seconds of a core that the server and the browser's main thread need until then, and what does not depend on
the machine: elements, and points of curves. And of the page beside the long run, `index.html`: seconds to write it, and its size.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.report.live import write_page
from hf_cloudtrain.storage.client import Storage
from tests.browser import Browser
from tests.recorded import BEGAN, write
from tests.served import DRAWN, SHOWN, Served

NOTE_TIMES = """new MutationObserver(() => {
  const note = (name, is) => { if (is) window[name] ??= Math.round(performance.now()); };
  for (const name of ["shown", "drawn"]) note(name, document.documentElement?.dataset[name] === "yes");
  note("first", document.querySelector("tbody tr, dl div"));
  note("chart", document.querySelector(".js-plotly-plot"));
}).observe(document, { subtree: true, attributes: true, childList: true })"""
COUNTS = """({
  elements: document.querySelectorAll("*").length,
  points: [...document.querySelectorAll(".js-plotly-plot")].flatMap((chart) => chart.data).reduce((sum, trace) => sum + (trace.x ?? []).length, 0),
})"""


def record_list(root: str) -> None:
    for number in range(1_000):
        catalog = Catalog(Storage(f"{root}/run-{number}"))
        catalog.attempts.begin(BEGAN, 0, None, {"experiment": f"sweep-{number % 7}"})
        beat = {
            "time": BEGAN + number,
            "state": "finished",
            "step": number,
            "total_steps": 1_000,
            "loss": 0.5,
        }
        catalog.attempts.write_progress(1, beat)


def record_long(root: str) -> None:
    catalog, steps, draw = Catalog(Storage(f"{root}/long")), 100_000, random.Random(0)
    catalog.attempts.begin(BEGAN, 0, None, {})
    for batch in range(20):
        first = 5_000 * batch + 1
        seconds = [round(0.5 + 0.1 * draw.random(), 6) for _ in range(5_000)]
        lines: list[dict[str, Any]] = [{"kind": "steps", "first": first, "seconds": seconds, "samples": 32}]
        for step in range(first + 9, first + 5_000, 10):
            metrics = {"loss": 2 * math.exp(-step / 2e4) + 0.2 * draw.random(), "grad_norm": draw.random()}
            metrics |= {"learning_rate": 1e-4 * (1 - step / steps)}
            lines.append({"kind": "log", "step": step, "time": BEGAN + 0.55 * step, "metrics": metrics})
        write(catalog, 1, lines, batch + 1)
    catalog.attempts.write_progress(1, {"time": time.time(), "state": "training", "step": steps})


def measure(browser: Browser, served: Served, fragment: str, until: str) -> dict[str, Any]:
    page = browser.open("about:blank", 1280)
    page.call("Performance.enable", timeDomain="threadTicks")
    page.call("Page.addScriptToEvaluateOnNewDocument", source=NOTE_TIMES)
    began = time.process_time()
    page.call("Page.navigate", url=served.url + fragment)
    page.wait(f"document.documentElement && {until}")
    server = time.process_time() - began
    found = {metric["name"]: metric["value"] for metric in page.call("Performance.getMetrics")["metrics"]}
    times = page.ask("[window.first, window.shown, window.chart, window.drawn]")
    counts = page.ask(COUNTS)
    page.close()
    return {
        **dict(zip(("first ms", "content ms", "first chart ms", "charts ms"), times, strict=True)),
        "server s": round(server, 2),
        "browser s": round(found["TaskDuration"], 2),
        **counts,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        os.environ["HF_CLOUDTRAIN_STORE"] = f"{folder}/store"
        record_list(f"{folder}/list")
        record_long(f"{folder}/long")
        for name, fragment, until in (("list", "", SHOWN), ("long", "#/run/0%2Flong", DRAWN)):
            for _ in range(3):
                with Served([f"{folder}/{name}"]) as served:
                    print(name, json.dumps(measure(browser, served, fragment, until)), flush=True)
        began = time.perf_counter()
        size = write_page(Catalog(Storage(f"{folder}/long/long")))
        print(f"index.html of 100,000 steps: {time.perf_counter() - began:.1f} s, {size / 1e6:.1f} MB")
        print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
