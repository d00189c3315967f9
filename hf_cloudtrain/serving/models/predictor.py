"""A loaded model: rows in, one answer or one error for each out. A row that fails does not fail the others of its batch."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.runtime.values import finite
from hf_cloudtrain.serving.models.tasks import RequestError, Task, checked_parameters, short

logger = logging.getLogger(__name__)

NO_LIMIT = 10**9
"""Above it, the length that a tokenizer names is not a limit."""
MOST_PADDING = 2000
"""Characters, of all texts of a group."""
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
        tokenizer, self._config = getattr(pipeline, "tokenizer", None), pipeline.model.config
        # Rows of different lengths cannot share a batch without padding.
        self._batches = task.batches and (tokenizer is None or tokenizer.pad_token is not None)
        if tokenizer is not None and tokenizer.model_max_length > NO_LIMIT:
            # Some models count positions from 2 on; a longer text would end in an index error, and on a GPU in a dead process.
            positions = getattr(self._config, "max_position_embeddings", None)
            if isinstance(positions, int) and positions > 2:
                tokenizer.model_max_length = positions - 2

    @property
    def labels(self) -> dict[str, str]:
        """The names of the labels by their number."""
        return {str(number): str(name) for number, name in self._config.id2label.items()}

    def parameters(self, given: object) -> dict[str, Any]:
        """The parameters of a request. Raises RequestError."""
        found = checked_parameters(self.task, given)
        if self.task.name == "fill-mask" and "top_k" in found:
            found["top_k"] = min(found["top_k"], self._config.vocab_size)
        return found

    def answers(self, rows: Sequence[Any], parameters: dict[str, Any]) -> list[Any]:
        """One answer a row, in order: JSON, or a RowError."""
        found: list[Any] = [None] * len(rows)
        good: list[tuple[int, Any]] = []
        for index, row in enumerate(rows):
            try:
                good.append((index, self._prepared(row, parameters)))
            except RequestError as error:
                found[index] = RowError(str(error), is_input=True)
            except Exception as error:  # noqa: BLE001 - of a tokenizer, say
                found[index] = _failed(error)
        for group in [good] if self.task.reads_images else _groups(good):
            answers = self._run([row for _, row in group], parameters)
            for (index, _), answer in zip(group, answers, strict=True):
                found[index] = answer
        return found

    def _run(self, rows: list[Any], parameters: dict[str, Any]) -> list[Any]:
        if not rows:
            return []
        size = len(rows) if self._batches else 1
        try:
            if self.task.name == "text-classification":  # see TextClassification
                batches = (rows[start : start + size] for start in range(0, len(rows), size))
                return [plain(answer) for found in self._pipeline(batches, **parameters) for answer in found]
            # A generator: for a list of one row, some pipelines return the answer without a list around it.
            found = self._pipeline((row for row in rows), batch_size=size, **parameters)
            return [plain(answer) for answer in found]
        except Exception as error:  # noqa: BLE001 - any row, any model: the error is the answer
            if len(rows) == 1:
                return [_failed(error)]
        # Halves, so that one bad row of many costs few calls.
        middle = len(rows) // 2
        return [*self._run(rows[:middle], parameters), *self._run(rows[middle:], parameters)]

    def _prepared(self, row: Any, parameters: dict[str, Any]) -> Any:
        """The row as the pipeline takes it. A string must never reach it as a path or URL of an image."""
        if self.task.reads_images:
            return _image(row)
        if self.task.name == "text-classification" and isinstance(row, dict):
            if not set(row) <= {"text", "text_pair"} or "text" not in row:
                raise RequestError("An input that is an object must have 'text', and may have 'text_pair'.")
            return (
                tuple(map(_text, (row["text"], row["text_pair"])))
                if "text_pair" in row
                else _text(row["text"])
            )
        text = _text(row)
        if self.task.name == "text-generation":
            self._check_length(text, parameters)
        mask = self._pipeline.tokenizer.mask_token
        if self.task.name == "fill-mask" and mask not in text:
            raise RequestError(f"The text must have the mask {mask!r}.")
        return text

    def _check_length(self, text: str, parameters: dict[str, Any]) -> None:
        tokens = len(self._pipeline.tokenizer(text)["input_ids"])
        most = self._pipeline.tokenizer.model_max_length
        if not text or tokens + parameters["max_new_tokens"] > most:
            raise RequestError(
                f"The text has {tokens} tokens; with max_new_tokens={parameters['max_new_tokens']} it must have between 1 "
                f"and {most}."
            )


def _failed(error: Exception) -> RowError:
    logger.warning("A row has no answer. %s: %s", type(error).__name__, error)
    return RowError(f"{type(error).__name__}: {error}"[:500], is_input=False)


def _groups(rows: list[tuple[int, Any]]) -> list[list[tuple[int, Any]]]:
    """Texts, or pairs of texts, in groups of similar length: padding costs as much as a text, and a group a call of the model."""
    groups: list[list[tuple[int, Any]]] = []
    padding, last = 0, (False, 0)
    for size, row in sorted((_size(row), row) for row in rows):
        padding += len(groups[-1]) * (size[1] - last[1]) if groups else 0
        if not groups or padding > MOST_PADDING or size[0] is not last[0]:
            padding = 0
            groups.append([])
        groups[-1].append(row)
        last = size
    return groups


def _size(row: tuple[int, Any]) -> tuple[bool, int]:
    """Whether it is a pair, and its characters."""
    text = row[1]
    return isinstance(text, tuple), len("".join(text))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"An input must be a text, not {short(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError("The text has a half of a surrogate pair, which is not a character.") from None
    return value


def _image(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, str):
        try:
            value = base64.b64decode(value.removeprefix("data:").rpartition(",")[2], validate=True)
        except ValueError:
            raise RequestError("An image must be base64 of its file; paths and URLs are not read.") from None
    if not isinstance(value, bytes):
        raise RequestError(f"An image must be base64 of its file, not {short(value)}.")
    try:
        image = Image.open(io.BytesIO(value), formats=FORMATS)
        if image.width * image.height > LARGEST_IMAGE:
            text = f"The image has {image.width} x {image.height} pixels; at most {LARGEST_IMAGE} are read."
            raise RequestError(text)
        return image.convert("RGB")
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"The image cannot be read: {str(error)[:200]}") from None


def plain(value: Any) -> Any:
    """An answer as JSON holds it: numbers of numpy and torch become Python's, NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        value = value.tolist()
    return finite(value)
