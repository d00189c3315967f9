"""Law 11: no file, error or process listing contains credentials, and no code of the package unpickles data."""

from __future__ import annotations

import ast
import json
import string
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_cloudtrain import env
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.provenance import facts, shown_command
from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import Machine

PACKAGE = Path(__file__).resolve().parents[2] / "hf_cloudtrain"
VARIABLES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "DB_PASSWORD",
    "BASIC_AUTH",
]
# No part of a path in a traceback: it tries words from this code, such as 'hf_cloudtrai'.
secrets = st.text(string.ascii_letters + string.digits + "+/=_-", min_size=10, max_size=58).map(
    lambda text: f"Q{text}7"
)


@given(secret=secrets, name=st.sampled_from(VARIABLES))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_law_11_a_secret_of_the_environment_is_redacted_everywhere(secret: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(name, secret)
        command = shown_command(["train.py", secret, f"-x{secret}", f"--note=with {secret}", "--lr", "1e-4"])
        assert secret not in command
        assert "train.py" in command
        storage = FaultyStorage("memory://law-11-environment")
        storage.fail("list", PermissionError(f"denied for {secret!r}: {secret}"), times=10)
        with pytest.raises(CloudTrainError) as raised:
            storage.list("x")
        assert secret not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "template",
    [
        "{{'aws_secret_access_key': '{}', 'Key': 'runs/x'}}",
        '{{"token": "{}"}}',
        "Authorization: Bearer {}",
        "GET https://host/c?X-Amz-Signature={}&x=1",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey={};EndpointSuffix=x",
        "s3://user:{}@bucket/run",
        "password={}",
    ],
)
@given(secret=secrets)
@settings(max_examples=20, deadline=None)
def test_law_11_a_value_with_the_name_of_a_secret_is_redacted(template: str, secret: str) -> None:
    assert secret not in redact(template.format(secret))


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "a1B2" * 8,
        "AKIA" + "ABCD1234" * 2,
        "ghp_" + "a1B2" * 9,
        "glpat-" + "a1B2" * 5,
        "sk-proj-" + "a1B2" * 6,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    ],
)
def test_law_11_a_text_in_the_form_of_a_token_is_redacted_everywhere(token: str) -> None:
    assert redact(f"said {token}, and {token}") == "said ***, and ***"
    assert token not in shown_command(["train.py", token])


@pytest.mark.parametrize(
    "text",
    [
        "train.py --lr 1e-4 --max_steps 500 --output_dir out",
        "tokens: 500 of 1000",
        "{'Key': 'runs/x/model.safetensors'}",
        "author=someone",
        "http://localhost:9000/bucket",
        "checkpoint-500 of s3://bucket/runs/mrpc",
    ],
)
def test_law_11_a_text_without_secrets_is_unchanged(text: str) -> None:
    assert redact(text) == text


def test_law_11_paths_numbers_and_short_words_of_the_environment_are_not_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = secrets_of_environment()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/credentials.json")
    monkeypatch.setenv("MAX_TOKENS", "123456789")
    assert secrets_of_environment() == before
    monkeypatch.setenv(env.STORAGE_OPTIONS, json.dumps({"client_kwargs": {"secret": "s3cr3t/nested"}}))
    assert "s3cr3t/nested" in secrets_of_environment()


RECORDINGS: list[list[str]] = []


def record_process(event: str, arguments: tuple[Any, ...]) -> None:
    if RECORDINGS and event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        RECORDINGS[-1].append(repr(arguments))


def test_law_11_no_process_is_started_with_a_secret_in_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-of-a-test")
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", "s3cr3t-of-a-test"])
    sys.addaudithook(record_process)  # it cannot be removed; it does nothing while RECORDINGS is empty
    RECORDINGS.append([])
    try:
        machine = Machine(
            tmp_path / "out", f"file://{tmp_path}/run", storage_options={"secret": "s3cr3t-of-a-test"}
        )
        machine.start()
        machine.save(5)
        machine.wait()
        machine.stop()
        assert "s3cr3t-of-a-test" not in repr(facts())
    finally:
        (started,) = RECORDINGS
        RECORDINGS.clear()
    assert any("git" in arguments for arguments in started), "the hook must record started processes"
    # Only the command line matters: other users cannot read the environment of git.
    assert [arguments for arguments in started if "s3cr3t-of-a-test" in arguments] == []


UNPICKLES = {
    "pickle.load",
    "pickle.loads",
    "marshal.load",
    "marshal.loads",
    "torch.load",
    "numpy.load",
    "np.load",
}
ALLOWED = {"rendezvous.py"}
"""The ranks of one job exchange pickled objects with each other, as `torch.distributed` does."""


def unpickling(source: str) -> Iterator[str]:
    """The calls in `source` that would unpickle data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords}
            safe = given & {"weights_only=True", "allow_pickle=False"}
            if (name in UNPICKLES or name.endswith("Unpickler")) and not safe:
                yield name


def test_law_11_no_module_of_the_package_unpickles() -> None:
    assert list(unpickling("torch.load(path)\npickle.loads(data)\npickle.Unpickler(file)")) != []
    assert list(unpickling("torch.load(path, weights_only=True)\njson.load(file)")) == []
    found = {path.name: list(unpickling(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert {name for name, calls in found.items() if calls} == ALLOWED


@pytest.mark.timeout(60)
@pytest.mark.parametrize("word", ["z", "token-", "?sig", "token"])
def test_law_11_a_long_text_without_a_space_is_redacted_in_time(word: str) -> None:
    """A storage server may return any text; redacting an error that quotes it must not block training."""
    text = word * (200_000 // len(word))
    assert redact(text) == text
    assert redact(f"{text} token: abc") == f"{text} token: ***"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("word", ["a://:", "eyJ-"])
def test_law_11_a_text_with_many_starts_of_secrets_is_redacted_in_time(word: str) -> None:
    begun = time.process_time()
    assert redact(word * 30_000) == word * 30_000
    assert time.process_time() - begun < 10
