"""A plain script that saves with `Accelerator.save_state`, in a process that the hook has prepared. The zygote forks them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from hf_cloudtrain import TrainLoop, env
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.launch import hooks, marks
from hf_cloudtrain.launch.before import prepare
from hf_cloudtrain.launch.notes import note
from hf_cloudtrain.storage.client import Storage
from tests.integration._attempts import wait_until

STEPS = 12
WIDE = 600
"""1.4 MB of weights, so that files are linked."""


def run(
    output_dir: str,
    *,
    run_url: str | None,
    result: str | None = None,
    names: str = "step_{step}",
    every: int = 2,
    resume: str | None = None,
    kill_at: int | None = None,
    signal_at: int | None = None,
    committed: int = 0,
    only_main: bool = False,
    silence: float = 30.0,
    cut_off: bool = False,
    breaks_storage_at: int | None = None,
    automatic: bool = False,
    limit: int | None = None,
    notes: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Train; what `cloudtrain launch` does before the command comes first.

    Args:
        names: of the folders; `{step}` is replaced.
        resume: "latest": what `os.listdir` shows with the highest number; else a folder.
        committed: step that is on storage before the kill or the signal.
        only_main: whether rank 0 alone saves.
        cut_off: whether the kill comes while the state is written.
        breaks_storage_at: step after which nothing more can be stored.
        limit: how many folders Accelerate keeps, where it names them.
    """
    upload_queue.MAX_WAITING = 1000
    marks.SILENCE = silence
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    os.chdir(output_dir)
    if run_url is not None:
        _launch(run_url, notes)
    set_seed(1)
    configuration = ProjectConfiguration(automatic_checkpoint_naming=automatic, total_limit=limit)
    accelerator = Accelerator(
        cpu=True, project_dir="project" if automatic else None, project_config=configuration
    )
    model = torch.nn.Linear(WIDE, WIDE)
    optimizer = torch.optim.AdamW(model.parameters())
    data = TensorDataset(torch.arange(2 * STEPS, dtype=torch.float32).reshape(-1, 1) / STEPS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=2))
    if accelerator.process_index:
        accelerator.register_save_state_pre_hook(
            lambda *_: time.sleep(0.5)
        )  # the last one to write its files
    first = 0
    if resume is not None and (folder := _latest() if resume == "latest" else resume):
        accelerator.load_state(folder)
        first = int("".join(filter(str.isdigit, folder)))
    for step, (batch,) in enumerate(accelerator.skip_first_batches(loader, first), start=first + 1):
        loss = model(batch.expand(-1, WIDE)).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == breaks_storage_at:
            os.rename(str(run_url), f"{run_url}-gone")
            Path(str(run_url)).write_text("not a folder")
        if cut_off and step == kill_at:
            accelerator.get_state_dict = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        if step % every == 0 and (accelerator.is_main_process or not only_main):
            accelerator.save_state(None if automatic else names.format(step=step))
        if step in (kill_at, signal_at):
            wait_until(lambda: _committed(run_url) >= committed)
            os.kill(os.getpid(), signal.SIGKILL if step == kill_at else signal.SIGTERM)
            time.sleep(30)
    if result and accelerator.is_main_process:
        save_file(accelerator.unwrap_model(model).state_dict(), result)
    # A DistributedDataParallel that outlives its process group may hang with gloo (docs/troubleshooting.md).
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()
    return {"first": first, "folders": sorted(os.listdir("."))}


def loop(output_dir: str, *, run_url: str, **_: Any) -> dict[str, Any]:
    """A script with TrainLoop, which calls `save_state` itself."""
    hooks.install(sys.modules["accelerate.accelerator"])
    os.environ[env.RUN_URL] = run_url
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    train = TrainLoop(accelerator, run_url, num_epochs=2, save_steps=1, output_dir=output_dir)
    for _epoch in train.epochs():
        for (batch,) in train.steps(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).sum())
                optimizer.step()
                optimizer.zero_grad()
        train.end_epoch()
    return {}


def _launch(run_url: str, notes: str | None) -> None:
    """What the launch and its hook do."""
    os.environ[env.RUN_URL] = run_url
    if notes is not None:
        Path(notes).touch()
        os.environ[env.LAUNCH_NOTES] = notes
    restored = prepare(run_url, [], print).folder if os.environ.get("RANK", "0") == "0" else None
    if restored is not None:
        note("restored", restored)
    hooks.install(sys.modules["accelerate.accelerator"])


def _latest() -> str | None:
    """As scripts find it: every name that begins as theirs do, by its number."""
    found = [name for name in os.listdir() if name.startswith("step_")]
    return max(found, key=lambda name: int(name.removeprefix("step_")), default=None)


def _committed(run_url: str | None) -> int:
    keys = Catalog(Storage(str(run_url))).checkpoints()
    return max((key.step for key in keys), default=-1)
