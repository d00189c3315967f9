"""Starts processes of Python that run code of this package, whatever lies in the folder in which the user works."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Not -m, and nothing in front of Python's own modules: the folder in which the user works may have a file socket.py. This
# package is that of the training, wherever a different copy of it is installed.
START = """\
import importlib.util, json, sys
sys.path.extend(path for path in json.loads(sys.argv[2]) if path not in sys.path)
spec = importlib.util.spec_from_file_location("hf_cloudtrain", sys.argv[1])
sys.modules["hf_cloudtrain"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
"""


def command(code: str) -> list[str]:
    """The command line of a process that runs `code`, which begins with `START`. Further arguments may follow."""
    paths = [str(PACKAGE.parent), *(path for path in sys.path if os.path.isabs(path))]
    return [sys.executable, "-c", code, str(PACKAGE / "__init__.py"), json.dumps(paths)]
