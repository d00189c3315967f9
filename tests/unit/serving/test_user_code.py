"""`code/inference.py` of a checkpoint, by the contract of SageMaker's containers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.models.source import Model
from hf_cloudtrain.serving.models.tasks import RequestError
from hf_cloudtrain.serving.user_code import UserCode

LOADS = "from pathlib import Path\ndef model_fn(folder):\n    return Path(folder, 'word.txt').read_text()\n"


@pytest.fixture(autouse=True)
def imports_as_before() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in ({"inference", "helper"} & set(sys.modules)) - modules:
        del sys.modules[name]


def user_code(folder: Path, code: str) -> UserCode:
    (folder / "code").mkdir()
    (folder / "code" / "inference.py").write_text(code)
    (folder / "code" / "helper.py").write_text("SIGN = '!'\n")
    (folder / "word.txt").write_text("hello")
    return UserCode(Model(folder, "checkpoint-5", None, runs_code=True))


def test_predict_fn_with_json_on_both_sides(tmp_path: Path) -> None:
    code = user_code(tmp_path, LOADS + "def predict_fn(data, model):\n    return {model: data['inputs']}\n")
    assert code.answer(b'{"inputs": [1, 2]}', "application/json", "") == (
        b'{"hello": [1, 2]}',
        "application/json",
    )
    with pytest.raises(RequestError, match="not JSON"):
        code.answer(b"{", "application/json", "")


def test_all_four_functions_and_a_module_beside_them(tmp_path: Path) -> None:
    code = user_code(
        tmp_path,
        "import helper\n"
        + LOADS
        + "def input_fn(body, kind):\n    return (body.upper(), kind)\n"
        + "def predict_fn(data, model):\n    return [model, *data]\n"
        + "def output_fn(found, accept):\n    return ','.join(found) + helper.SIGN, 'text/csv'\n",
    )
    assert code.answer(b"a", "text/csv", "text/csv") == (b"hello,A,text/csv!", "text/csv")


def test_transform_fn_receives_bytes_of_types_that_are_not_text(tmp_path: Path) -> None:
    code = user_code(
        tmp_path,
        LOADS
        + "def transform_fn(model, body, kind, accept):\n    return repr((model, body, kind, accept))\n",
    )
    body, kind = code.answer(b"\x00", "image/png", "text/plain")
    assert (body, kind) == (b"('hello', b'\\x00', 'image/png', 'text/plain')", "text/plain")


def test_a_body_that_is_not_utf8_is_the_fault_of_the_client(tmp_path: Path) -> None:
    code = user_code(tmp_path, LOADS + "def transform_fn(model, body, kind, accept):\n    return body\n")
    with pytest.raises(RequestError, match="not UTF-8: byte 1 cannot be read"):
        code.answer(b"a\xff", "text/csv", "")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def model_fn(folder): ...",
            "must define model_fn, and predict_fn or transform_fn. It defines: model_fn",
        ),
        (LOADS + "def transform_fn(): ...\ndef predict_fn(): ...", "transform_fn, which replaces"),
        ("1/0", r"cannot be imported\. ZeroDivisionError: division by zero"),
        (
            "def model_fn(folder): return 1/0\ndef predict_fn(): ...",
            r"model_fn of checkpoint-5 failed\. ZeroDiv",
        ),
    ],
)
def test_code_that_cannot_serve_is_refused(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        user_code(tmp_path, code)


def test_numbers_of_numpy_become_json(tmp_path: Path) -> None:
    code = user_code(
        tmp_path, "import numpy\n" + LOADS + "def predict_fn(data, model):\n    return numpy.float32(0.5)\n"
    )
    assert json.loads(code.answer(b"1", "application/json", "*/*")[0]) == 0.5
