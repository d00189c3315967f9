"""The errors of clients become errors of ours, with advice and without credentials."""

from __future__ import annotations

import errno
import logging
import traceback
from typing import Any

import pytest

from hf_cloudtrain import errors
from tests.unit.storage.fake_backend import FakeBackend, connected_to

SECRET = "Wq3/vEry+5ecr3tvalue"
"""With a slash, as every third AWS secret key has."""


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "kind", "standard", "advice"),
        [
            (
                FileNotFoundError("The specified bucket"),
                errors.ObjectNotFoundError,
                FileNotFoundError,
                "Create the",
            ),
            (FileNotFoundError("no key"), errors.ObjectNotFoundError, FileNotFoundError, "does not exist"),
            (
                PermissionError("Forbidden"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("403 Forbidden"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("Code: ExpiredToken"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("AuthorizationFailure"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("Unable to locate credentials"),
                errors.StoragePermissionError,
                PermissionError,
                "no credentials were found",
            ),
            (OSError("PermanentRedirect"), errors.StorageError, OSError, "AWS_REGION"),
            (OSError("An error occurred (301) when calling"), errors.StorageError, OSError, "AWS_REGION"),
            (OSError("AuthorizationHeaderMalformed"), errors.StorageError, OSError, "AWS_REGION"),
            (OSError(errno.ENOSPC, "full"), errors.StorageError, OSError, "no space is left"),
            (OSError("416 InvalidRange"), errors.ObjectTruncatedError, OSError, "shorter"),
            (ConnectionResetError("reset"), errors.StorageUnavailableError, OSError, "Check the network"),
            (
                ImportError("No module named 'aiobotocore'"),
                errors.MissingExtraError,
                ImportError,
                "pip install",
            ),
        ],
        ids=lambda value: str(value) if isinstance(value, Exception) else "",
    )
    def test_kind_and_advice(
        self,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        error: Exception,
        kind: type[Exception],
        standard: type[Exception],
        advice: str,
    ) -> None:
        backend = FakeBackend(*[error] * 20)
        with pytest.raises(kind, match=advice) as raised:
            connected_to(monkeypatch, backend).read("record")
        assert isinstance(raised.value, (errors.CloudTrainError, standard))
        assert type(raised.value) is kind
        assert issubclass(kind, standard)

    def test_a_full_disk_has_its_number_and_a_message_without_it(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        backend = FakeBackend(*[OSError(errno.ENOSPC, "full")] * 20)
        with pytest.raises(errors.StorageError, match=r"^Could not write") as raised:
            connected_to(monkeypatch, backend).write("record", b"")
        assert raised.value.errno == errno.ENOSPC

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("NoCredentialsError", "Unable to locate credentials"),
            ("PartialCredentialsError", "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY"),
            (
                "TokenRetrievalError",
                "Error when retrieving token from sso: Token has expired and refresh failed",
            ),
            ("DefaultCredentialsError", "Your default credentials were not found."),
            (
                "CredentialUnavailableError",
                "EnvironmentCredential: EnvironmentCredential authentication unavailable.",
            ),
        ],
    )
    def test_missing_credentials_are_named_in_words_that_can_be_read(
        self, monkeypatch: pytest.MonkeyPatch, name: str, said: str
    ) -> None:
        backend = FakeBackend(type(name, (Exception,), {})(said))
        with pytest.raises(errors.StoragePermissionError) as raised:
            connected_to(monkeypatch, backend).read("x")
        assert f"{name}: {said}" in str(raised.value)
        assert "credentials" in str(raised.value).replace(said, "")
        assert "network" not in str(raised.value)

    @pytest.mark.parametrize("code", [301, 401, 403, 416])
    @pytest.mark.parametrize("name", ["checkpoint-{}/model", "x/{}-of-1000.json", "global_step{}", "{}.pt"])
    def test_number_in_a_name_is_not_a_status(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str, code: int
    ) -> None:
        path = name.format(code)
        backend = FakeBackend(FileNotFoundError(f"bucket/run/{path}"))
        with pytest.raises(errors.ObjectNotFoundError):
            connected_to(monkeypatch, backend).read(path)
        backend = FakeBackend(*[ConnectionResetError(f"PUT https://host/bucket/run/{path}: reset")] * 20)
        with pytest.raises(errors.StorageUnavailableError):
            connected_to(monkeypatch, backend).read(path)

    def test_message_names_the_request_and_the_object(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend(PermissionError("no"))
        with pytest.raises(
            errors.StoragePermissionError, match=r"^Could not read 's3://bucket/run/a b\.json': "
        ):
            connected_to(monkeypatch, backend).read("a b.json")

    def test_errors_of_ours_pass_unchanged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = errors.StoragePermissionError("said already")
        backend = FakeBackend(ours)
        with pytest.raises(errors.StoragePermissionError, match=r"^said already$"):
            connected_to(monkeypatch, backend).read("record")


class TestSecrets:
    OPTIONS = (
        {"secret": SECRET},
        {"token": SECRET},
        {"account_key": SECRET},
        {"connection_string": f"AccountName=a;AccountKey={SECRET};EndpointSuffix=x"},
        {"client_kwargs": {"aws_secret_access_key": SECRET}},
        {"client_kwargs": {"aws_session_token": SECRET}},
        {"sas_token": SECRET},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
    def test_of_the_options_are_in_neither_error_nor_log(
        self,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        caplog: pytest.LogCaptureFixture,
        options: dict[str, Any],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        value = next(iter(options.values()))
        said = next(iter(value.values())) if isinstance(value, dict) else value
        backend = FakeBackend(*[OSError(f"request with {said} failed")] * 20)
        with pytest.raises(errors.StorageError) as raised:
            connected_to(monkeypatch, backend, **options).read("record")
        assert SECRET not in "".join(traceback.format_exception(raised.value))
        assert "***" in str(raised.value)
        assert SECRET not in caplog.text

    @pytest.mark.parametrize("name", ["sig", "X-Amz-Signature", "token", "AccountKey", "password"])
    def test_in_a_url_inside_an_error_are_not_repeated(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str
    ) -> None:
        backend = FakeBackend(
            PermissionError(f"GET https://host/key?a=1&{name}=abcdef123456&b=2 was refused")
        )
        with pytest.raises(errors.StorageError) as raised:
            connected_to(monkeypatch, backend).read("record")
        assert "abcdef123456" not in "".join(traceback.format_exception(raised.value))
        assert f"{name}=***&b=2" in str(raised.value)
