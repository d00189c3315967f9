"""A run in a notebook, with a real kernel: the card renews itself while a cell trains, and an interrupted cell shows one line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

TRAIN = """
import os, time
import hf_cloudtrain as ct
from hf_cloudtrain.report import notebook
notebook.DRAW_SECONDS = 0.1
ct.init(total_train_steps={total}, run_url={url!r}, checkpoint_dir="ck")
ct.restore()
os.makedirs("ck", exist_ok=True)
step = 0
while step < {total}:
    with ct.train_step():
        time.sleep(0.02)
    step += 1
    ct.metric({{"loss": 1 / step}})
    if step == {total} or ct.is_emergency_save():
        open("ck/state", "w").write(str(step))
        ct.upload_checkpoint()
"""
MODEL = """
import time
import torch
import hf_cloudtrain as ct
from hf_cloudtrain.report import notebook
notebook.DRAW_SECONDS = 0.1

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        time.sleep(0.02)
        return {{"loss": self.layer(x).square().mean()}}

rows = [{{"x": torch.ones(2), "labels": torch.ones(1)}}] * 400_000
"""
TRAINER = (
    MODEL
    + """
from transformers import Trainer, TrainingArguments
arguments = TrainingArguments("out", max_steps={total}, per_device_train_batch_size=4, logging_steps=1,
                              save_steps={total}, report_to=[], disable_tqdm=True, use_cpu=True)
Trainer(Model(), arguments, train_dataset=rows, callbacks=[ct.CloudTrainCallback({url!r})]).train()
"""
)
LOOP = (
    MODEL
    + """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = Model()
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.SGD(model.parameters(), 0.01), torch.utils.data.DataLoader(rows, batch_size=4))
loop = ct.TrainLoop(accelerator, {url!r}, num_epochs=1, save_steps={total}, logging_steps=1, output_dir="out")
for epoch in loop.epochs():
    for batch in loop.steps(loader):
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step(); optimizer.zero_grad()
        loop.log(loss=loss)
"""
)
WAIT_SECONDS = 120


class Kernel:
    """A kernel of its own, and what it sends while a cell runs."""

    def __init__(self, folder: Path) -> None:
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(folder), env={**os.environ, "HF_CLOUDTRAIN_CLOUD_NOTICES": "off"})
        self._client: Any = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=WAIT_SECONDS)

    def run(self, code: str, interrupt_after: int | None = None) -> list[dict[str, Any]]:
        """Run a cell; the messages of its output. It is interrupted after so many cards."""
        mine = self._client.execute(code)
        found: list[dict[str, Any]] = []
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            message = self._client.get_iopub_msg(timeout=WAIT_SECONDS)
            found.append(message)
            if interrupt_after is not None and len(cards(found)) >= interrupt_after:
                self._manager.interrupt_kernel()
                interrupt_after = None
            is_idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
            if is_idle and message["parent_header"].get("msg_id") == mine:
                return found
        raise TimeoutError(str(found)[-2000:])

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    found = Kernel(tmp_path)
    yield found
    found.close()


def cards(messages: list[dict[str, Any]]) -> list[str]:
    """The states of cards in the order in which the cell showed them."""
    shown = [one for one in messages if one["msg_type"] in ("display_data", "update_display_data")]
    return [str(one["content"]["data"]["text/html"]) for one in shown]


def errors(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one["content"] for one in messages if one["msg_type"] == "error"]


@pytest.mark.parametrize("code", [TRAIN, TRAINER, LOOP], ids=["functions", "Trainer", "TrainLoop"])
def test_the_card_of_a_cell_that_trains_renews_itself_and_one_line_ends_an_interrupted_cell(
    kernel: Kernel, tmp_path: Path, code: str
) -> None:
    url = str(tmp_path / "run")
    messages = kernel.run(code.format(total=100_000, url=url), interrupt_after=5)
    (error,) = errors(messages)
    assert error["ename"] == "PreemptedError"
    (line,) = error["traceback"]
    assert line.startswith("PreemptedError: Training was stopped at step ")
    assert "is on storage" in line
    shown = cards(messages)
    assert sum(one["msg_type"] == "display_data" for one in messages) == 1, "one card, renewed in place"
    assert len(shown) > 5
    assert ">training</span>" in shown[0]
    assert ">preempted</span>" in shown[-1]
    assert "<polyline" in shown[-1]
    assert not any("<script" in card for card in shown)

    again = kernel.run("ct.Run(%r)" % url)  # noqa: UP031 - braces
    (result,) = (one["content"]["data"] for one in again if one["msg_type"] == "execute_result")
    assert ">preempted</span>" in result["text/html"]
    assert result["text/plain"] == f"Run({url!r})"
