"""Measure the corpus, and write what came of it to measured.json and docs/guarantees.md.

python -m tests.corpus                    # all set-ups: minutes
python -m tests.corpus augmentation loop  # those with one of these words in their name
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.corpus import _table
from tests.corpus._answers import ANSWERS
from tests.corpus._harness import measure
from tests.integration._zygote import Zygote


def main(words: list[str]) -> int:
    outcomes = {name: outcome for name, outcome in _table.read().items() if name in ANSWERS}
    chosen = [name for name in ANSWERS if not words or any(word in name for word in words)]
    problems = 0
    with tempfile.TemporaryDirectory() as folder, Zygote(Path(folder), "tests.corpus._attempt") as scripts:
        for number, name in enumerate(chosen):
            began = time.monotonic()
            place = Path(folder, str(number))
            place.mkdir()
            outcome = outcomes[name] = measure(scripts, name, place, twin=True)
            problem = outcome.fault or ANSWERS[name].problem(outcome.recorded)
            problems += bool(problem)
            seconds = time.monotonic() - began
            print(
                f"{seconds:5.1f} s  {name}: differs by {outcome.difference:.0e}, recorded {outcome.recorded}"
            )
            print(f"         {problem}\n" if problem else "", end="", flush=True)
    _table.write({name: outcomes[name] for name in ANSWERS if name in outcomes})
    print(f"{len(chosen)} set-ups, {problems} with a problem")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
