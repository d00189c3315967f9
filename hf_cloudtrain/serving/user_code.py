"""`code/inference.py` of a checkpoint, by the contract of SageMaker's Hugging Face containers. It runs only if the user trusts it.

    model_fn(folder)                       the model
    input_fn(body, type)                   the data of a request
    predict_fn(data, model)                the prediction
    output_fn(prediction, accept)          the answer: text, bytes, or (text or bytes, type)
    transform_fn(model, body, type, accept)   the last three in one

`input_fn` and `output_fn` may be missing: JSON is read and written then.
https://github.com/aws/sagemaker-huggingface-inference-toolkit
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.formats import JSON, decoded, parsed
from hf_cloudtrain.serving.models.predictor import plain
from hf_cloudtrain.serving.models.source import USER_CODE, Model

FUNCTIONS = ("model_fn", "input_fn", "predict_fn", "output_fn", "transform_fn")


class UserCode:
    """The functions of a checkpoint, with its model loaded by them.

    Raises:
        ConfigurationError: the code cannot be imported, lacks functions, or does not load the model.
    """

    def __init__(self, model: Model) -> None:
        code = model.folder / USER_CODE
        sys.path.insert(0, str(code.parent))  # for modules beside it, too
        doing = f"{USER_CODE} of {model.title} cannot be imported."
        try:
            module = importlib.import_module(code.stem)
            self._own = {name: getattr(module, name) for name in FUNCTIONS if hasattr(module, name)}
            _check(set(self._own), model.title)
            doing = f"model_fn of {model.title} failed."
            self._model = self._own["model_fn"](str(model.folder))
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(f"{doing} {type(error).__name__}: {str(error)[:500]}") from error

    def answer(self, body: bytes, kind: str, accept: str) -> tuple[bytes, str]:
        """The body and the type of the answer to a request. Raises what the code raises; RequestError for a body that is not JSON."""
        # As the containers give it: text for types that are text.
        data: Any = decoded(body) if kind.startswith(("text/", JSON)) else body
        if "transform_fn" in self._own:
            return _encoded(self._own["transform_fn"](self._model, data, kind, accept), accept)
        data = self._own["input_fn"](data, kind) if "input_fn" in self._own else parsed(data)
        found = self._own["predict_fn"](data, self._model)
        if "output_fn" in self._own:
            return _encoded(self._own["output_fn"](found, accept), accept)
        return json.dumps(plain(found)).encode(), JSON


def _check(names: set[str], title: str) -> None:
    """Refuse functions that are no service. Raises ConfigurationError."""
    if "model_fn" not in names or not names & {"predict_fn", "transform_fn"}:
        raise ConfigurationError(
            f"{USER_CODE} of {title} must define model_fn, and predict_fn or transform_fn. It defines: "
            f"{', '.join(sorted(names)) or 'none of the functions'}."
        )
    if "transform_fn" in names and names & {"input_fn", "predict_fn", "output_fn"}:
        raise ConfigurationError(
            f"{USER_CODE} of {title} defines transform_fn, which replaces input_fn, predict_fn and output_fn. Remove one or the "
            "others."
        )


def _encoded(answer: Any, accept: str) -> tuple[bytes, str]:
    kind = JSON if accept in ("", "*/*") else accept
    if isinstance(answer, tuple) and len(answer) == 2:
        answer, kind = answer
    if isinstance(answer, str):
        return answer.encode(), str(kind)
    if isinstance(answer, (bytes, bytearray)):
        return bytes(answer), str(kind)
    return json.dumps(plain(answer)).encode(), JSON
