"""One process of the corpus: a training script, without or with our library, to its end or to a SIGKILL."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils.logging import disable_progress_bar

import hf_cloudtrain.integrations.trainer.callbacks  # noqa: F401 - paid for before the fork
from hf_cloudtrain import CloudTrainCallback, TrainLoop
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.storage.client import Storage
from tests.integration._zygote import PATIENCE

if TYPE_CHECKING:
    from accelerate import Accelerator

torch.set_num_threads(1)  # sums in one order
disable_progress_bar()
SAVED = 8
"""Step that is resumed from unless a set-up says otherwise: of batches of 8 from 48 samples, the second of the second epoch."""


@dataclass(frozen=True)
class Setup:
    """A training script."""

    script: Callable[[Attempt], None]
    saved: int = SAVED
    """The step whose checkpoint is resumed from; SIGKILL comes in the step after it."""


SETUPS: dict[str, Setup] = {}


def setup(
    name: str, *, saved: int = SAVED
) -> Callable[[Callable[[Attempt], None]], Callable[[Attempt], None]]:
    """Register a script under the name that `_answers.py` has."""

    def register(script: Callable[[Attempt], None]) -> Callable[[Attempt], None]:
        assert name not in SETUPS, name
        SETUPS[name] = Setup(script, saved)
        return script

    return register


@dataclass
class Attempt:
    """What a script needs to know about the attempt that it is."""

    folder: str
    weights: str
    url: str | None
    """None: plain training without our library, as far as that is possible."""
    kill: int | None
    """The step whose checkpoint must be committed before SIGKILL comes."""
    restored: int = -1

    def arguments(
        self, kind: type[TrainingArguments] = TrainingArguments, **changes: Any
    ) -> TrainingArguments:
        """Small and quiet: 12 steps in two epochs of 48 samples, a checkpoint every 4."""
        return kind(
            output_dir=self.folder,
            **{
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 8,
                "learning_rate": 1e-3,
                "save_steps": 4,
                "logging_steps": 1,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                **changes,
            },
        )

    def train(self, trainer: Trainer) -> None:
        """What the end of a script does."""
        checkpoint = None
        if self.url:
            cloud = CloudTrainCallback(self.url)
            trainer.add_callback(cloud)
            checkpoint = cloud.restore(trainer.args)
        self.note_restored(checkpoint)
        if self.kill is not None:
            _die_after_steps(self.die_at)
        trainer.train(resume_from_checkpoint=checkpoint)
        self.finish(trainer.model, write=trainer.args.process_index == 0)

    def loop(self, accelerator: Accelerator, **arguments: Any) -> TrainLoop:
        """The same for a loop; a plain one does not exist, so without a URL it has a run of its own."""
        url = self.url or f"{Path(self.folder).as_uri()}-run"
        given = {"num_epochs": 2, "save_steps": 4, "output_dir": self.folder, **arguments}
        loop = TrainLoop(accelerator, url, **given)
        self.note_restored(loop.resume())
        return loop

    def note_restored(self, checkpoint: str | Path | None) -> None:
        match = re.search(r"-(\d+)$", str(checkpoint or ""))
        self.restored = int(match[1]) if match else -1

    def die_at(self, step: int) -> None:
        """Tell that a step is over; SIGKILL follows the first one after the step that is to be resumed from."""
        if self.kill is not None and self.url and step > self.kill:
            catalog = Catalog(Storage(self.url))
            deadline = time.monotonic() + PATIENCE
            while max((key.step for key in catalog.checkpoints()), default=-1) < self.kill:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no checkpoint of step {self.kill}: {catalog.checkpoints()}")
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, *models: torch.nn.Module, write: bool = True) -> None:
        """Keep the weights: what is compared."""
        if write:
            found = {
                f"{number}.{name}": value.detach().clone().float().contiguous()
                for number, model in enumerate(models)
                for name, value in model.state_dict().items()
            }
            save_file(found, self.weights)


def attempt(
    name: str, folder: str, weights: str, url: str | None = None, kills: bool = False, plant: str = ""
) -> int:
    """Run a script; returns the step that it was restored from, -1 for none."""
    warnings.simplefilter("ignore")  # scripts of other people are not held to our standard
    upload_queue.MAX_WAITING = 1_000
    if plant:
        _plant(plant)
    setup = SETUPS[name]
    this = Attempt(folder, weights, url, setup.saved if kills else None)
    transformers.set_seed(0)
    setup.script(this)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return this.restored


def names() -> list[str]:
    return sorted(SETUPS)


def warm_up() -> None:
    """What each process would do once, and may do before the fork: no gradients, they start threads."""
    import datasets  # noqa: F401 - half a second

    from tests.corpus import (  # noqa: F401 - they register scripts
        _functions,
        _hidden,
        _hidden_loops,
        _loops,
        _models,
        _trainers,
        _unsure,
    )

    with tempfile.TemporaryDirectory() as folder:
        _models.bert().save_pretrained(folder)


def _die_after_steps(die_at: Callable[[int], None]) -> None:
    """Not by a callback: the library would see one more than the script has."""
    real = CallbackHandler.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any) -> Any:
        answer = real(self, args, state, control)
        die_at(state.global_step)
        return answer

    CallbackHandler.on_step_end = on_step_end


def _plant(answer: str) -> None:
    """Record an answer whatever is true."""
    real = Checkpointer.save
    exactness = EXACT if answer == "yes" else Exactness.no(answer)

    def save(self: Checkpointer, *args: Any, **options: Any) -> Any:
        return real(self, *args, **{**options, "exactness": exactness})

    Checkpointer.save = save
