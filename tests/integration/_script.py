"""What `python SCRIPT …` does, in a process that was forked instead of started."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def run(words: list[str], folder: str) -> None:
    """Run a script, or the code after `-c`, in a folder."""
    os.chdir(folder)
    is_code = words[0] == "-c"
    sys.path.insert(0, folder)
    sys.argv = ["-c", *words[2:]] if is_code else words
    if is_code:
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(Path(folder, words[0])), run_name="__main__")
