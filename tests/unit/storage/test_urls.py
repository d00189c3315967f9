"""Run URLs: normalised, shown without credentials, and clear errors for those that cannot be used."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import shown_url
from tests.urls import HERE, HOME, NORMAL, REFUSED, RELATIVE

SECRET = "Wq3/vEry+5ecr3tvalue"
"""With a slash, as every third AWS secret key has."""


class TestUrl:
    """The tables of `tests/urls.py` go through every door in `tests/integration/test_url_doors.py`; here through `Storage`."""

    @pytest.mark.parametrize(("url", "normal"), {**NORMAL, **RELATIVE}.items())
    def test_is_normalised(self, url: str, normal: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.getcwd", lambda: HERE)
        monkeypatch.setenv("HOME", HOME)
        assert shown_url(url) == normal
        assert Storage(url).url == normal
        assert Storage(normal).url == normal

    @pytest.mark.parametrize(("url", "right"), REFUSED.items())
    def test_is_refused_with_what_to_type(
        self, url: str, right: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.getcwd", lambda: HERE)
        with pytest.raises(errors.ConfigurationError) as raised:
            Storage(url)
        assert repr(url) in str(raised.value)
        assert repr(right) in str(raised.value)

    @pytest.mark.parametrize("right", sorted(set(REFUSED.values())))
    def test_what_a_refusal_tells_to_type_is_accepted(self, right: str) -> None:
        Storage(right)

    def test_of_a_protocol_that_a_plug_in_registers_is_accepted(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fsspec.registry import _registry

        monkeypatch.setitem(_registry, "s9", object)
        assert Storage("s9://bucket/run").url == "s9://bucket/run"

    @pytest.mark.parametrize("url", ["", "   ", None, 3, b"s3://bucket"])
    def test_that_is_not_one_is_an_error_with_an_example(self, url: Any) -> None:
        with pytest.raises(errors.ConfigurationError, match="s3://bucket/runs/mrpc"):
            Storage(url)

    @pytest.mark.parametrize(
        "url",
        [
            f"https://account.blob.core.windows.net/container/run?sv=1&sig={SECRET}",
            f"sftp://user:{SECRET}@host/run",
        ],
    )
    def test_is_never_shown_with_its_credentials(self, url: str) -> None:
        assert SECRET not in shown_url(url)
        assert "***" in shown_url(url)

    @pytest.mark.parametrize(
        "url",
        [
            f"s3://key:{SECRET}@bucket/run",
            f"gs://user:{SECRET}@bucket/run",
            f"az://user:{SECRET}@container/run",
            f"az://container/run?sas_token={SECRET}",
        ],
    )
    def test_with_credentials_is_refused_without_repeating_them(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="storage_options") as raised:
            Storage(url)
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    @pytest.mark.parametrize(
        "url",
        [
            f"s3:/key:{SECRET}@bucket/run",
            f"s3//key:{SECRET}@bucket/run",
            f"s3:\\\\key:{SECRET}@bucket\\run",
            f"sftp://user:{SECRET}$word@host/$RUN",
            f"sftp://user:{SECRET}@host/../run",
        ],
    )
    def test_that_is_mistyped_is_refused_without_repeating_its_credentials(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError) as raised:
            Storage(url)
        assert SECRET not in str(raised.value)
        assert "$word" not in str(raised.value)


class TestProtocol:
    def test_unknown_one_is_an_error_that_names_it(self) -> None:
        with pytest.raises(errors.ConfigurationError, match="'nothing-like-it://'") as raised:
            Storage("nothing-like-it://bucket/run")
        assert not isinstance(raised.value, errors.MissingExtraError)

    @pytest.mark.parametrize(
        ("scheme", "module", "extra"),
        [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")],
    )
    def test_missing_package_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str
    ) -> None:
        from fsspec.registry import _registry

        monkeypatch.setitem(sys.modules, module, None)
        for name in ("s3", "s3a", "gs", "gcs", "az", "abfs"):
            monkeypatch.delitem(_registry, name, raising=False)
        with pytest.raises(errors.MissingExtraError, match=rf"pip install 'hf_cloudtrain\[{extra}\]'"):
            Storage(f"{scheme}://bucket/run").check()
