"""Run one benchmark in a separate process."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from benchmarks.measure import Scale
from benchmarks.report import Row


def run_apart(name: str, scale: Scale) -> list[Row]:
    """Return the rows of `benchmarks/<name>.py`, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, name, scale).result()


def _run(name: str, scale: Scale) -> list[Row]:
    os.environ |= {
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # so that only the table is printed
    logging.getLogger("hf_cloudtrain").setLevel(logging.ERROR)
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").run(scale)
    return rows
