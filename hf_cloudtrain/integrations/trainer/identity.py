"""What a Trainer trains, in the manifest of each checkpoint, and what differs when a checkpoint is restored.

A different model is refused before anything is downloaded, if the Trainer exists by then. Different arguments or data of
the same length are a warning that names them. Manifests without these facts restore as they are.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.digests import (
    ARGUMENTS,
    DATA,
    MODEL,
    counts_of,
    decode,
    digest_of,
    digest_of_shapes,
    encode,
)
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.resume.dataloaders import length
from hf_cloudtrain.runtime.redaction import visible

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("max_steps", "num_train_epochs", "seed", "data_seed", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32"),
    *("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last"),
)
_IN_STEPS = ("max_steps", "warmup_steps")
"""Counted in steps, which have a different size in a different topology."""
_ROWS, _SPREAD = 3, 64
"""Rows that are compared: of all data, and of data whose fingerprint follows the path and the time of its files."""


class Identity:
    """What is trained in this process, and what was restored.

    Example:
        >>> identity.met(trainer)                  # when the Trainer is made
        >>> identity.check(manifest, args)         # before a checkpoint is downloaded
    """

    def __init__(self) -> None:
        self._trainer: Any = lambda: None
        self._model: str | None = None
        """Digest of the model as it was made: later it may be wrapped."""
        self._unchecked: Manifest | None = None
        """Restored before the Trainer was made."""

    def met(self, trainer: Any) -> None:
        """Note the Trainer. Raises ConfigurationError if what was restored is of a different model."""
        if trainer is None or trainer is self._trainer():
            return
        # FSDP has cut a model that is in training into pieces, whose shapes depend on the number of processes.
        in_pieces = trainer.is_in_train and trainer.is_fsdp_enabled
        self._trainer, self._model = weakref.ref(trainer), None if in_pieces else _digest_of(trainer.model)
        manifest, self._unchecked = self._unchecked, None
        if manifest is not None:
            self._check_trainer(manifest)

    def check(self, manifest: Manifest, args: TrainingArguments, *, same_steps: bool = True) -> None:
        """Compare a manifest with what is trained now, before it is downloaded.

        Args:
            same_steps: whether a step means the same as when it was saved.

        Raises:
            ConfigurationError: it is of a different model.
        """
        if self._trainer() is None:
            self._unchecked = manifest
        else:
            self._check_trainer(manifest)
        saved, now = decode(manifest.origin.get(ARGUMENTS)), decode(of_arguments(args))
        differ = [
            f"{name} was {_shown(saved[name])}, is {_shown(now[name])}"
            for name in saved
            if name in now and saved[name] != now[name] and (same_steps or name not in _IN_STEPS)
        ]
        if differ:
            logger.warning(
                "Arguments differ from those of %s, so the resumed run may not equal an uninterrupted one: %s.",
                manifest.folder,
                "; ".join(differ),
            )

    def facts(self, args: TrainingArguments) -> dict[str, str]:
        """For the manifests of an attempt."""
        found = {ARGUMENTS: of_arguments(args)}
        trainer = self._trainer()
        if self._model is not None and trainer is not None:
            found[MODEL] = self._model
            found[DATA] = of_data(trainer.train_dataset)
        return found

    def _check_trainer(self, manifest: Manifest) -> None:
        saved = manifest.origin.get(MODEL)
        if saved is not None and self._model is not None and saved != self._model:
            one, other = counts_of(saved), counts_of(self._model)
            raise ConfigurationError(
                f"{manifest.folder} is of a different model: it has {one}, and the model of this Trainer {other}"
                f"{', with other names or shapes' * (one == other)}. Nothing was loaded into it. Use the model of the run, or a "
                "new run URL for the new model."
            )
        saved_data, now = decode(manifest.origin.get(DATA)), decode(of_data(self._trainer().train_dataset))
        difference = _difference(saved_data, now)
        if difference and "spread" in saved_data and saved_data["spread"] == now.get("spread"):
            logger.info(
                "The data has the length of that of %s, and the same content in the %d rows that were compared. Its fingerprint "
                "differs, as it does for the same files on a different machine.",
                manifest.folder,
                min(_SPREAD, now["length"]),
            )
        elif difference:
            logger.warning(
                "%s was trained on data with %s, so the resumed run may not equal an uninterrupted one.",
                manifest.folder,
                difference,
            )


def of_arguments(args: TrainingArguments) -> str:
    """The arguments that decide the course of training."""
    found = {}
    for name in _ARGUMENTS:
        value = getattr(args, name, None)
        value = getattr(value, "value", value)  # of an Enum
        found[name] = value if isinstance(value, (int, float, type(None))) else str(value)[:200]
    return encode(found)


def of_data(dataset: Any) -> str:
    """The length of the data, and what of its content is cheap to read and the same on every machine."""
    found: dict[str, Any] = {"length": length(dataset)}
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):
        found["fingerprint"] = fingerprint[:100]
    try:
        rows = list(_rows(dataset, found["length"] or 0, _ROWS))
        spread = list(_rows(dataset, found["length"] or 0, _SPREAD)) if "fingerprint" in found else []
    except Exception:  # noqa: BLE001 - of data that cannot be read, the training itself will tell
        rows = spread = []
    if rows:
        found["rows"] = digest_of("\n".join(rows))
    if spread:
        found["spread"] = digest_of("\n".join(spread))
    return encode(found)


def _rows(dataset: Any, samples: int, most: int) -> Iterator[str]:
    """Samples from the first to the last one, where reading one runs no code of the user."""
    import torch

    last = samples - 1
    for index in sorted({min(last, samples * part // (most - 1)) for part in range(most)}) if samples else ():
        if type(dataset) in (list, tuple):
            row = dataset[index]
        elif type(dataset) is torch.utils.data.TensorDataset:
            row = [tensor[index] for tensor in dataset.tensors]
        elif type(dataset).__module__ == "datasets.arrow_dataset":
            kept = index if dataset._indices is None else dataset._indices.column(0)[index].as_py()
            row = dataset.data.slice(kept, 1).to_pylist()
        else:
            return
        text = _text_of(row)
        if text is None:
            return
        yield text


def _text_of(value: Any) -> str | None:
    """The same for the same values on every machine; None where that is not known."""
    import torch

    if isinstance(value, (str, int, float, bytes, type(None))):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return None if value.is_cuda else repr(value.reshape(-1)[:4096].tolist())
    if isinstance(value, dict):
        parts = [_text_of(item) for pair in value.items() for item in pair]
    elif isinstance(value, (list, tuple)):
        parts = [_text_of(item) for item in value[:4096]]
    else:
        return None
    return None if None in parts else f"[{', '.join(part or '' for part in parts)}]"


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Of data of the same length: a different length is refused, or converted, elsewhere."""
    if saved.get("length") != now.get("length"):
        return None
    if any(key in saved and key in now and saved[key] != now[key] for key in ("rows", "spread")):
        return "different content"
    if "fingerprint" in saved and "fingerprint" in now and saved["fingerprint"] != now["fingerprint"]:
        return (
            f"the fingerprint {_shown(saved['fingerprint'])}, not {_shown(now['fingerprint'])}: whether it is the same "
            "data is not verified"
        )
    return None


def _digest_of(model: Any) -> str:
    # Sharded while it is loaded (DeepSpeed's stage 3), a parameter is empty, and this is its shape.
    return digest_of_shapes(
        (name, getattr(one, "ds_shape", one.shape)) for name, one in model.named_parameters()
    )


def _shown(value: Any) -> str:
    return visible(str(value)[:100])
