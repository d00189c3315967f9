"""Run the import and the basic tests on each Python of setup.cfg that this machine has, without torch.

`make test-pythons`. A Python is found on PATH or among those of pyenv, and gets a small environment in .venv-pythons/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-pythons"
PACKAGES = (
    "fsspec s3fs obstore botocore xxhash tqdm psutil pytest pytest-rerunfailures pytest-timeout".split()
)
TESTS = ("tests/unit/test_errors.py", "tests/unit/test_env.py", "tests/unit/storage")
OLDEST_PINNED = (3, 11)
"""constraints.txt has no pins for an older Python."""


def main() -> int:
    """One line per version; the exit status is 1 if one fails."""
    failed = False
    classifiers = (ROOT / "setup.cfg").read_text()
    for version in re.findall(r"Programming Language :: Python :: (3\.\d+)", classifiers):
        python = next(found(version), None)
        if python is None:
            say(f"{version}  skipped: not on this machine")
            continue
        ended = run_tests(environment(version, python))
        summary = (ended.stdout.strip().splitlines() or [""])[-1].strip("= ")
        say(f"{version}  {'passed' if ended.returncode == 0 else 'FAILED'}: {summary}")
        if ended.returncode:
            failed = True
            say(ended.stdout[-4000:] + ended.stderr[-4000:])
    return int(failed)


def say(line: str) -> None:
    """Write a line to stdout at once: each Python takes a while."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def found(version: str) -> Iterator[str]:
    """Interpreters of this version that start: a shim of pyenv may exist and not."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}*/bin/python{version}"))
    for candidate in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if (
            candidate
            and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            yield candidate


def environment(version: str, python: str) -> Path:
    """The interpreter of an environment with the packages that the tests need."""
    folder = ENVIRONMENTS / version
    done = folder / ".installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        pinned = tuple(map(int, version.split("."))) >= OLDEST_PINNED
        pins = ["-c", "constraints.txt"] if pinned else []
        pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *pins, *PACKAGES], cwd=ROOT, check=True)
        done.touch()
    return folder / "bin" / "python"


def run_tests(python: Path) -> subprocess.CompletedProcess[str]:
    """The import by itself, then the tests."""
    imported = subprocess.run(
        [python, "-W", "error", "-c", "import hf_cloudtrain, hf_cloudtrain.testing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if imported.returncode:
        return imported
    command = [python, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
