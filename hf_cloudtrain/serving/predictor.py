"""A loaded model: rows in, one answer or one error for each out. A row that fails does not fail the others of its batch."""

from __future__ import annotations

import base64
import binascii
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.errors import ConfigurationError, MissingExtraError
from hf_cloudtrain.runtime.values import finite
from hf_cloudtrain.serving.source import Model
from hf_cloudtrain.serving.tasks import InputError, Task, checked_parameters
from hf_cloudtrain.serving.untrusted import check_config, no_pickles

logger = logging.getLogger(__name__)

NO_LIMIT = 10**9
"""Above it, the length that a tokenizer names is not a limit."""
LARGEST_IMAGE = 50_000_000
"""Pixels. A small file may hold a picture of gigabytes."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow knows more, and runs Ghostscript for one of them (EPS)."""


@dataclass(frozen=True)
class RowError:
    """Why a row has no answer."""

    text: str
    is_input: bool
    """Whether the row is at fault, and not the model."""


class Predictor:
    """A pipeline of transformers, with answers as JSON holds them.

    Example:
        >>> predictor = load(model)
        >>> predictor.answers(["a good film", 7], predictor.parameters(None))
        [{'label': 'positive', 'score': 0.98}, RowError(text='…', is_input=True)]
    """

    def __init__(self, pipeline: Any, task: Task) -> None:
        self._pipeline = pipeline
        self.task = task
        tokenizer, config = getattr(pipeline, "tokenizer", None), pipeline.model.config
        if tokenizer is not None and tokenizer.model_max_length > NO_LIMIT:
            # Some models count positions from 2 on; a longer text would end in an index error, and on a GPU in a dead process.
            positions = getattr(config, "max_position_embeddings", None)
            if isinstance(positions, int) and positions > 2:
                tokenizer.model_max_length = positions - 2

    def parameters(self, given: object) -> dict[str, Any]:
        """The parameters of a request. Raises InputError."""
        return checked_parameters(self.task, given)

    def answers(self, rows: Sequence[Any], parameters: dict[str, Any]) -> list[Any]:
        """One answer a row, in order: JSON, or a RowError."""
        found: list[Any] = [None] * len(rows)
        good: list[tuple[int, Any]] = []
        for index, row in enumerate(rows):
            try:
                good.append((index, self._prepared(row, parameters)))
            except InputError as error:
                found[index] = RowError(str(error), is_input=True)
        prepared = [row for _, row in good]
        for (index, _), answer in zip(good, self._run(prepared, parameters), strict=True):
            found[index] = answer
        return found

    def _run(self, rows: list[Any], parameters: dict[str, Any]) -> list[Any]:
        if not rows:
            return []
        size = len(rows) if self.task.batches else 1
        try:
            # A generator: for a list of one row, some pipelines return the answer without a list around it.
            return [
                plain(answer)
                for answer in self._pipeline((row for row in rows), batch_size=size, **parameters)
            ]
        except Exception as error:  # noqa: BLE001 - any row, any model: the error is the answer
            if len(rows) == 1:
                logger.warning("A row has no answer. %s: %s", type(error).__name__, error)
                return [RowError(f"{type(error).__name__}: {error}"[:500], is_input=False)]
        # Halves, so that one bad row of many costs few calls.
        middle = len(rows) // 2
        return [*self._run(rows[:middle], parameters), *self._run(rows[middle:], parameters)]

    def _prepared(self, row: Any, parameters: dict[str, Any]) -> Any:
        """The row as the pipeline takes it. A string must never reach it as a path or URL of an image."""
        if self.task.reads_images:
            return _image(row)
        if self.task.name == "text-classification" and isinstance(row, dict):
            if not set(row) <= {"text", "text_pair"} or "text" not in row:
                raise InputError("An input that is an object must have 'text', and may have 'text_pair'.")
            return {name: _text(value) for name, value in row.items()}
        text = _text(row)
        if self.task.name == "text-generation":
            self._check_length(text, parameters)
        return text

    def _check_length(self, text: str, parameters: dict[str, Any]) -> None:
        tokens = len(self._pipeline.tokenizer(text)["input_ids"])
        most = self._pipeline.tokenizer.model_max_length
        if not text or tokens + parameters["max_new_tokens"] > most:
            raise InputError(
                f"The text has {tokens} tokens; with max_new_tokens={parameters['max_new_tokens']} it must have between 1 "
                f"and {most}."
            )


def load(model: Model) -> Predictor:
    """Load a model, and answer one row with it.

    Raises:
        ConfigurationError: the model cannot be loaded, or does not fit its task; the message says why.
    """
    import torch
    import transformers

    assert model.task is not None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has no types
    task = model.task
    network = _network(model)
    pieces: dict[str, Any] = {}
    source = model.processor or str(model.folder)
    kind, keyword = (
        ("AutoImageProcessor", "image_processor") if task.reads_images else ("AutoTokenizer", "tokenizer")
    )
    pieces[keyword] = _loaded(
        model,
        f"its {keyword.replace('_', ' ')} {source!r}",
        lambda: getattr(transformers, kind).from_pretrained(source, trust_remote_code=False),
    )
    rows = getattr(network.config, "vocab_size", None)
    if not task.reads_images and isinstance(rows, int) and len(pieces["tokenizer"]) > rows:
        raise ConfigurationError(
            f"{model.title} has embeddings for {rows} tokens, and its tokenizer ({source!r}) has {len(pieces['tokenizer'])}. "
            "Pass the tokenizer of the training: --processor FOLDER_OR_NAME"
        )
    make: Any = transformers.pipeline  # its overloads want a literal for the task
    pipeline = _loaded(model, "its pipeline", lambda: make(task.name, model=network.eval(), **pieces))
    predictor = Predictor(pipeline, task)
    with torch.inference_mode():
        (answer,) = predictor.answers([_sample(task, pieces)], _sample_parameters(task))
    if isinstance(answer, RowError):
        raise ConfigurationError(f"{model.title} does not fit the task {task.name}: {answer.text}")
    return predictor


def _network(model: Model) -> Any:
    """The model, or its base with the adapter merged into it; in evaluation mode, with no weight left to chance."""
    import transformers

    assert model.task is not None
    source = model.base or str(model.folder)
    kind = getattr(transformers, model.task.model_class)
    given: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    if model.base is not None:
        given.update(_head_of_adapter(model))
    what = f"its base model {source!r}" if model.base else "its weights"
    _check_config(model, source, what)
    network, info = _loaded(
        model, what, lambda: kind.from_pretrained(source, output_loading_info=True, **given)
    )
    if model.base is not None:
        return _loaded(model, "its adapter", lambda: _with_adapter(network, model))
    # Embeddings are read before the pooler, which many encoders are saved without.
    unused = "pooler." if model.task.name == "feature-extraction" else None
    missing = sorted(key for key in info["missing_keys"] if unused is None or unused not in key)
    if missing:
        raise ConfigurationError(
            f"{model.title} lacks weights of a {type(network).__name__}, such as {missing[0]!r}, so its answers would be random. "
            "Choose the checkpoint of a training for this task."
        )
    return network


def _with_adapter(network: Any, model: Model) -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft is not installed, which an adapter needs: pip install peft") from None
    adapted = peft.PeftModel.from_pretrained(network, str(model.folder))
    return adapted.merge_and_unload()


def _head_of_adapter(model: Model) -> dict[str, Any]:
    """How to load the base model so that the classifier of the adapter fits; the base may have been saved with a different one."""
    from safetensors import safe_open
    from transformers import AutoConfig

    if (model.folder / "config.json").is_file():  # written by TrainLoop
        _check_config(model, str(model.folder), "its config.json")
        config = _loaded(
            model,
            "its config.json",
            lambda: AutoConfig.from_pretrained(str(model.folder), trust_remote_code=False),
        )
        return {"config": config, "ignore_mismatched_sizes": True}
    with safe_open(str(model.folder / "adapter_model.safetensors"), framework="pt") as file:
        shapes = [
            file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118 - not a dict
            if name.endswith((".classifier.weight", ".score.weight", ".classifier.out_proj.weight"))
        ]
    return {"num_labels": shapes[0][0], "ignore_mismatched_sizes": True} if shapes else {}


def _check_config(model: Model, source: str, what: str) -> None:
    from transformers import PreTrainedConfig

    config, _ = _loaded(model, what, lambda: PreTrainedConfig.get_config_dict(source))
    check_config(config, model.title)


def _loaded(model: Model, what: str, read: Callable[[], Any]) -> Any:
    try:
        with no_pickles():
            return read()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries raise all kinds for a damaged or foreign file
        text = " ".join(str(error).split())[:500]
        raise ConfigurationError(
            f"{model.title}: {what} cannot be loaded. {type(error).__name__}: {text}"
        ) from None


def _sample(task: Task, pieces: dict[str, Any]) -> Any:
    if task.reads_images:
        from PIL import Image

        held = io.BytesIO()
        Image.new("RGB", (32, 32)).save(held, "PNG")
        return held.getvalue()
    return f"a {pieces['tokenizer'].mask_token}" if task.name == "fill-mask" else "a"


def _sample_parameters(task: Task) -> dict[str, Any]:
    return checked_parameters(task, {"max_new_tokens": 1} if task.name == "text-generation" else None)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"An input must be a text, not {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError("The text has a half of a surrogate pair, which is not a character.") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", type(None): "null", bool: "a boolean", bytes: "bytes"}
    return names.get(type(value), "a number")


def _image(value: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, str):
        try:
            value = base64.b64decode(
                value.partition(",")[2] if value.startswith("data:") else value, validate=True
            )
        except (binascii.Error, ValueError):
            raise InputError("An image must be base64 of its file; paths and URLs are not read.") from None
    if not isinstance(value, bytes):
        raise InputError(f"An image must be base64 of its file, not {_kind(value)}.")
    try:
        image = Image.open(io.BytesIO(value), formats=FORMATS)
        if image.width * image.height > LARGEST_IMAGE:
            raise InputError(
                f"The image has {image.width} x {image.height} pixels; at most {LARGEST_IMAGE} are read."
            )
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The image cannot be read: {str(error)[:200]}") from None


def plain(value: Any) -> Any:
    """An answer as JSON holds it: numbers of numpy and torch become Python's, NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        value = value.tolist()
    return finite(value)
