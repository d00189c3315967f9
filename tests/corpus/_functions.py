"""Loops with the functions: the script writes the folder itself, so only the script knows what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import hf_cloudtrain as ct
from tests.corpus._attempt import Attempt, setup
from tests.corpus._loops import DATA, loss_of, net

STEPS = 12


def train(attempt: Attempt, *, random_states: bool) -> None:
    """Without a loader: the batches of a step follow from its number."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    url = attempt.url or f"{Path(attempt.folder).as_uri()}-run"
    ct.init(total_train_steps=STEPS, run_url=url, checkpoint_dir=attempt.folder)
    file = Path(attempt.folder, "state.pt")
    attempt.restored = -1
    if ct.restore() is not None:
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        attempt.restored = ct.processed_steps()
        if random_states:
            torch.set_rng_state(state["random"])
    for step in range(ct.processed_steps(), STEPS):
        with ct.train_step():
            x, y = DATA[[(step * 8 + at) % len(DATA) for at in range(8)]]
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 4 == 0:
            file.parent.mkdir(exist_ok=True)
            torch.save(state_of(model, optimizer), file)
            ct.upload_checkpoint()
        attempt.die_at(step + 1)
    attempt.finish(model)


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}


@setup("functions, with everything in the folder")
def everything(attempt: Attempt) -> None:
    train(attempt, random_states=True)


@setup("functions, without the random states")
def not_everything(attempt: Attempt) -> None:
    train(attempt, random_states=False)
