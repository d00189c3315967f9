"""`code/inference.py` of a checkpoint, by the contract of SageMaker's Hugging Face containers. It runs only if the user trusts it.

    model_fn(folder)                       the model
    input_fn(body, type)                   the data of a request
    predict_fn(data, model)                the prediction
    output_fn(prediction, accept)          the answer: text, bytes, or (text or bytes, type)
    transform_fn(model, body, type, accept)   the last three in one

A function that is missing has a default: `model_fn` loads the pipeline, `input_fn` and `output_fn` read and write JSON.
https://github.com/aws/sagemaker-huggingface-inference-toolkit
"""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.formats import JSON
from hf_cloudtrain.serving.predictor import plain
from hf_cloudtrain.serving.source import USER_CODE, Model
from hf_cloudtrain.serving.tasks import InputError

FUNCTIONS = ("model_fn", "input_fn", "predict_fn", "output_fn", "transform_fn")


class UserCode:
    """The functions of a checkpoint, with its model loaded by them.

    Raises:
        ConfigurationError: the code cannot be imported, lacks functions, or does not load the model.
    """

    def __init__(self, model: Model) -> None:
        self._module = _module(model)
        has = {name for name in FUNCTIONS if hasattr(self._module, name)}
        if "model_fn" not in has or not has & {"predict_fn", "transform_fn"}:
            raise ConfigurationError(
                f"{USER_CODE} of {model.title} must define model_fn, and predict_fn or transform_fn. It defines: "
                f"{', '.join(sorted(has)) or 'none of the functions'}."
            )
        if "transform_fn" in has and has & {"input_fn", "predict_fn", "output_fn"}:
            raise ConfigurationError(
                f"{USER_CODE} of {model.title} defines transform_fn, which replaces input_fn, predict_fn and output_fn. Remove "
                "one or the others."
            )
        try:
            self._model = self._module.model_fn(str(model.folder))
        except Exception as error:
            raise ConfigurationError(
                f"model_fn of {model.title} failed. {type(error).__name__}: {str(error)[:500]}"
            ) from error

    def answer(self, body: bytes, kind: str, accept: str) -> tuple[bytes, str]:
        """The body and the type of the answer to a request. Raises what the code raises; InputError for a body that is not JSON."""
        if hasattr(self._module, "transform_fn"):
            return _encoded(self._module.transform_fn(self._model, _text(body, kind), kind, accept), accept)
        data = self._call("input_fn", _text(body, kind), kind) if self._has("input_fn") else _parsed(body)
        prediction = self._module.predict_fn(data, self._model)
        if self._has("output_fn"):
            return _encoded(self._call("output_fn", prediction, accept), accept)
        return json.dumps(plain(prediction)).encode(), JSON

    def _has(self, name: str) -> bool:
        return hasattr(self._module, name)

    def _call(self, name: str, *given: Any) -> Any:
        return getattr(self._module, name)(*given)


def _module(model: Model) -> ModuleType:
    path = model.folder / USER_CODE
    spec = importlib.util.spec_from_file_location("inference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for modules beside it
    sys.modules["inference"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(
            f"{USER_CODE} of {model.title} cannot be imported. {type(error).__name__}: {str(error)[:500]}"
        ) from error
    return module


def _text(body: bytes, kind: str) -> str | bytes:
    """As the containers give it: text for types that are text."""
    try:
        return body.decode() if kind.startswith(("text/", "application/json")) else body
    except UnicodeDecodeError as error:
        raise InputError(f"The body is not UTF-8: byte {error.start} cannot be read.") from None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The body is not JSON: {error}.") from None


def _encoded(answer: Any, accept: str) -> tuple[bytes, str]:
    kind = JSON if accept in ("", "*/*") else accept
    if isinstance(answer, tuple) and len(answer) == 2:
        answer, kind = answer
    if isinstance(answer, str):
        return answer.encode(), str(kind)
    if isinstance(answer, (bytes, bytearray)):
        return bytes(answer), str(kind)
    return json.dumps(plain(answer)).encode(), JSON
