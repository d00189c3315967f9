"""Take the pictures of docs/ui.md: pages of `cloudtrain ui` in headless Chromium, with runs as their records tell them.

    .venv/bin/python docs/pictures/pages.py

The records are those of the tests (tests/recorded.py), so no training is needed; it takes a minute.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from hf_cloudtrain.checkpoints.catalog import Catalog  # noqa: E402 - the repository is not a package
from hf_cloudtrain.checkpoints.manifest import CheckpointKey  # noqa: E402
from hf_cloudtrain.storage.client import Storage  # noqa: E402
from tests.browser import Browser, Page  # noqa: E402
from tests.recorded import FACTS, record_attempt, write  # noqa: E402
from tests.served import DRAWN, SHOWN, Served  # noqa: E402

STORE = "memory://experiments"
RATES = ("5e-5", "1e-4", "2e-4", "3e-4")


def record() -> None:
    """Four runs of a sweep, one of which was killed and resumed, and goes on."""
    now = time.time()
    for index, rate in enumerate(RATES):
        catalog = Catalog(Storage(f"{STORE}/runs/mnli-lr-{rate}"))
        facts = {**FACTS, "host": f"gpu-0{index + 3}", "command": f"train.py --learning_rate {rate}"}
        decay = 300 / (index + 1.5)
        began, last = now - (320 if index == len(RATES) - 1 else 900 + 60 * index), index == len(RATES) - 1
        first = record_attempt(
            catalog,
            began=began,
            steps=range(1, 231 if last else 401),
            facts=facts,
            state="training" if last else "finished",
            decay_steps=decay,
        )
        if last:
            resumed = CheckpointKey(first, 200)
            begun = now - 12 - 110 * 0.5 - 3 * 6
            record_attempt(
                catalog,
                began=begun,
                steps=range(201, 311),
                resumed_from=resumed,
                facts={**facts, "host": "gpu-12"},
                decay_steps=decay,
            )
            beat = {
                "attempt": 2,
                "state": "training",
                "time": now,
                "step": 310,
                "total_steps": 400,
                "step_seconds": 0.5,
            }
            beat |= {
                "eta_seconds": 45.0,
                "loss": 0.389,
                "learning_rate": 2.2e-5,
                "host": {"cpu_percent": 38, "memory_percent": 61, "gpu_percent": 97},
            }
            catalog.attempts.write_progress(2, beat)
        norms = [
            {
                "kind": "log",
                "step": step,
                "time": began + step / 2,
                "metrics": {"grad_norm": 0.6 + math.exp(-step / 60) + 0.2 * math.sin(step * (1.3 + index))},
            }
            for step in range(5, 231 if last else 401, 5)
        ]
        write(catalog, first, norms, 2)


def take(page: Page, name: str, *, whole: bool = False) -> None:
    path = HERE / f"ui-{name}.png"
    page.picture(path, whole=whole)
    print(f"{path}: {path.stat().st_size // 1024} kB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        os.environ["HF_CLOUDTRAIN_STORE"] = STORE
        record()
        with Served([f"{STORE}/runs"]) as served:
            page = browser.open(served.url, 1180, 345)
            page.wait(SHOWN)
            page.wait("document.querySelectorAll('.spark path[d^=M]').length === 4")
            take(page, "runs")
            page.close()
            page = browser.open(f"{served.url}#/run/0%2Fmnli-lr-3e-4", 1180, 900)
            page.wait(DRAWN)
            take(page, "run")
            page.close()
            runs = quote("\n".join(f"0/mnli-lr-{rate}" for rate in RATES), safe="")
            page = browser.open(f"{served.url}#/compare/{runs}", 1180, 620)
            page.wait(DRAWN)
            take(page, "compare")
            page.close()
            page = browser.open(f"{served.url}#/run/0%2Fmnli-lr-3e-4", 390, 844, dark=True)
            page.wait(DRAWN)
            take(page, "phone")


if __name__ == "__main__":
    main()
