"""Law 7, Exact: resumed equals uninterrupted, and the manifest says true, false or null (not verified) of it.

Many more set-ups are killed and resumed in tests/corpus.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_cloudtrain import CheckpointUploadCallback
from tests.unit.integrations.trainer.test_exactness import Augmented, Data, Model
from tests.unit.integrations.trainer.test_known_trainers import Weighted


def weights(folder: Path, machine: str, kind: type[Trainer], data: Any, steps: int) -> torch.Tensor:
    """Of a training on a machine of its own, up to a step, with a constant learning rate."""
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder / machine),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        save_steps=2,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        learning_rate=0.1,
        max_steps=steps,
    )
    cloud = CheckpointUploadCallback(str(folder / "run"))
    trainer = kind(Model(), args, train_dataset=data, callbacks=[cloud])
    trainer.train(resume_from_checkpoint=cloud.restore(args))
    weight: torch.Tensor = trainer.model.layer.weight.detach().clone()
    return weight


@pytest.mark.parametrize(
    ("kind", "data", "exact", "says"),
    [
        (Trainer, Data(), True, ""),
        (
            Trainer,
            Augmented(),
            False,
            "A resume will not equal an uninterrupted run: random numbers are drawn",
        ),
        (Weighted, Data(), None, "Whether a resume equals an uninterrupted run is not verified: Weighted"),
    ],
)
def test_law_7_the_manifest_says_whether_a_resume_is_exact(
    kind: type[Trainer],
    data: Any,
    exact: bool | None,
    says: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = weights(tmp_path / "whole", "machine", kind, data, 4)
    weights(tmp_path / "parts", "first", kind, data, 2)
    caplog.clear()
    resumed = weights(tmp_path / "parts", "second", kind, data, 4)
    stored = json.loads((tmp_path / "parts/run/.cloudtrain/checkpoints/000001-0000000002.json").read_text())
    assert stored["exact"] is exact
    assert (whole == resumed).all() == (exact is not False)
    assert says in caplog.text
