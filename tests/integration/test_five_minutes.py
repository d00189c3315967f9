"""The five minutes of the README, line by line: they end in the page of a run that was resumed, and in its served model."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli import app
from hf_cloudtrain.storage.client import Storage
from tests.browser import Browser
from tests.faults.runs import wait_until
from tests.integration._serve import Served
from tests.integration._zygote import Zygote
from tests.integration.test_report import MARKS
from tests.served import DRAWN, SHOWN

if TYPE_CHECKING:
    import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_lines_of_the_readme_end_in_the_page_of_the_run_and_in_a_served_model(
    zygote: Zygote, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = README.read_text().split("## Five minutes")[1].split("\n## ")[0]
    lines = re.findall(r"^\$ (.*?)(?:  +#.*)?$", section, re.MULTILINE)
    install, new, enter, first, second, ui, copy, serve, curl = lines
    assert install == "pip install '.[ui,serve]'"
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, shlex.split(new)[1:], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    project = tmp_path / enter.removeprefix("cd ")

    child = zygote.start("tests.integration._script", "run", words=shlex.split(first)[1:], folder=project)
    run = Catalog(Storage(str(project / "runs" / "first")))
    wait_until(lambda: len(run.checkpoints()) >= 2 or child.poll() is not None, "two checkpoints")
    child.interrupt()
    assert child.wait() != 0, child.log
    child = zygote.start("tests.integration._script", "run", words=shlex.split(second)[1:], folder=project)
    assert child.wait() == 0, child.log

    command = [sys.executable, "-m", "hf_cloudtrain.cli", *shlex.split(ui)[1:], "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            page = browser.open(json.loads(server.stdout.readline())["url"], 1280)
            page.wait(SHOWN)
            assert "1 of 1 runs" in page.ask("document.body.innerText")
            page.ask("document.querySelector('tbody a').click()")
            page.wait(DRAWN)
            marks = page.ask(MARKS)
            assert {"loss", "timeline", "goodput", "commits"} <= set(marks)
            assert min(marks.values()) >= 1, marks
            text = page.ask("document.body.innerText")
            assert "finished" in text
            assert re.search(r"Attempts\s+2\b", text)
            assert page.complaints == []
            page.close()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)

    subprocess.run(copy, shell=True, cwd=project, check=True)
    served = Served(zygote, str(project / shlex.split(serve)[2]), *shlex.split(serve)[3:])
    status, answer = served.ask(shlex.split(curl)[2].encode(), "application/x-www-form-urlencoded")
    assert (status, [row["label"] for row in answer]) == (200, ["first half", "second half"])
    served.stop()
