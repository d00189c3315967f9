"""Training scripts for `cloudtrain verify-resume`: forked where a command would have been started."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.integration._zygote import Child, Zygote

if TYPE_CHECKING:
    import pytest

PLAIN = """
import json, random, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
import hf_cloudtrain as ct

kind, folder = sys.argv[1:] if len(sys.argv) > 2 else (sys.argv[1], "ckpt")
random.seed(1)
ct.init(total_train_steps=9, run_url=f"s3://not/{os.getpid()}" if kind == "names" else "s3://not/there", checkpoint_dir=folder)
weights = np.zeros(4)
if kind != "starts over" and ct.restore() is not None:
    weights = load_file(f"{folder}/model.safetensors")["w"]
    version, state, rest = json.loads(Path(folder, "state.json").read_text())
    if kind != "forgets":
        random.setstate((version, tuple(state), rest))
chance = random.SystemRandom() if kind == "not seeded" else random
while ct.processed_steps() < 9:
    with ct.train_step():
        weights = 0.9 * weights + chance.random()
    ct.metric({"loss": float(weights.sum())})
    if ct.processed_steps() % (9 if kind == "saves once" else 3) == 0:
        Path(folder).mkdir(exist_ok=True)
        save_file({"w": weights}, f"{folder}/model.safetensors")
        Path(folder, "state.json").write_text(json.dumps(random.getstate()))
        ct.upload_checkpoint()
"""
"""Without torch, so that it starts fast."""


class Forked:
    """As much of `subprocess.Popen` as a trial needs; `words` are the name of a function below."""

    def __init__(self, zygote: Zygote, words: list[str], cwd: Path, env: dict[str, str], stdout: Any) -> None:
        self.returncode: int | None = None
        log = Path(stdout.name)
        self._child: Child = zygote.start(
            "tests.integration._rehearsed", "script", env=env, name=words[0], cwd=cwd, log=log
        )
        self.pid = self._child.pid

    def poll(self) -> int | None:
        self.returncode = self._child.poll()
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        try:
            self.returncode = self._child.wait(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired("", timeout) from None
        return self.returncode


def fork_instead(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    """No script starts an interpreter, which would import torch for seconds."""

    def start(words: list[str], *, cwd: Path, env: dict[str, str], stdout: Any, **_: Any) -> Forked:
        return Forked(zygote, words, cwd, env, stdout)

    monkeypatch.setattr("hf_cloudtrain.cli.verify.trial.subprocess.Popen", start)


def script(name: str, cwd: str, log: str) -> None:
    """What a new interpreter would do."""
    os.setsid()
    os.chdir(cwd)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    {"trainer": trainer, "trainer with dice": trainer_with_dice, "loop": loop}[name]()


def trainer(**arguments: Any) -> None:
    from tests.integration import _attempts

    jolt = [["Jolt", {}]]
    _attempts.train(output_dir="out", run_url="s3://not/there", save_steps=4, after=jolt, **arguments)


def trainer_with_dice() -> None:
    """It draws numbers that no checkpoint holds."""
    from tests.integration import _attempts

    own = random.Random(1)

    def roll() -> None:
        _attempts.torch.rand(own.randrange(3))

    callbacks = [_attempts.CallAt(step, roll) for step in range(1, 12)]
    trainer(callbacks=callbacks)


def loop() -> None:
    from tests.integration import _loops

    _loops.train("s3://not/there", Path("out"), _loops.Rows(20, noise=True))
