"""Kill and resume the commands of docs/integrations.md, and write what came of it to measured.json and to the page.

python -m tests.trainers            # all whose environment, data and script are here: half an hour
python -m tests.trainers trl swift  # those with one of these words in their name
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from tests.trainers import _integrations
from tests.trainers._commands import COMMANDS
from tests.trainers._integrations import Row
from tests.trainers._launch import CommandError, measure


def main(words: list[str]) -> int:
    rows = {name: row for name, row in _integrations.read().items() if name in COMMANDS}
    chosen = [name for name in COMMANDS if not words or any(word.lower() in name.lower() for word in words)]
    problems = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(chosen):
            command, began = COMMANDS[name], time.monotonic()
            if command.missing:
                print(f"          {name}: left as it was, {command.missing}", flush=True)
                continue
            try:
                outcome = measure(command, Path(folder, str(number)), random.Random())
            except CommandError as error:
                problems += 1
                print(f"          {name}: {error}", flush=True)
                continue
            rows[name] = Row.of(command, outcome)
            problems += command.exact and outcome.difference > 0
            print(f"{time.monotonic() - began:7.1f} s {name}: {outcome.said}", flush=True)
    _integrations.write({name: rows[name] for name in COMMANDS if name in rows})
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
