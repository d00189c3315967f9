"""Run URLs: normalised, shown without credentials, and clear errors for those that cannot be used."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import shown_url

SECRET = "Wq3/vEry+5ecr3tvalue"
"""With a slash, as every third AWS secret key has."""


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("s3://bucket/runs/mrpc", "s3://bucket/runs/mrpc"),
            ("s3://bucket/runs/mrpc/", "s3://bucket/runs/mrpc"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/a run/läuft", "s3://bucket/a run/läuft"),
            (
                "az://container@account.dfs.core.windows.net/run",
                "az://container@account.dfs.core.windows.net/run",
            ),
            ("file:///data/run/", "file:///data/run"),
            ("local:///data/run", "file:///data/run"),
            ("file:///data/../run", "file:///run"),
            ("/data/run/", "/data/run"),
            ("/data//run/./x", "/data/run/x"),
        ],
    )
    def test_is_normalised(self, url: str, shown: str) -> None:
        assert shown_url(url) == shown
        assert Storage(url).url == shown

    def test_plain_path_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/user")
        assert Storage("runs/mrpc").url == str(tmp_path / "runs" / "mrpc")
        assert Storage("~/runs").url == "/home/user/runs"

    @pytest.mark.parametrize("url", ["", "   ", None, 3, b"s3://bucket"])
    def test_that_is_not_one_is_an_error_with_an_example(self, url: Any) -> None:
        with pytest.raises(errors.ConfigurationError, match="s3://bucket/runs/mrpc"):
            Storage(url)

    @pytest.mark.parametrize(
        "url",
        [
            f"s3://key:{SECRET}@bucket/run",
            f"gs://user:{SECRET}@bucket/run",
            f"https://account.blob.core.windows.net/container/run?sv=1&sig={SECRET}",
            f"sftp://user:{SECRET}@host/run",
            f"az://container/run?sas_token={SECRET}",
        ],
    )
    def test_is_never_shown_with_its_credentials(self, url: str) -> None:
        assert SECRET not in shown_url(url)
        assert "***" in shown_url(url)

    @pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
    def test_with_credentials_is_refused_without_repeating_them(self, scheme: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="storage_options") as raised:
            Storage(f"{scheme}://key:{SECRET}@bucket/run")
        assert SECRET not in "".join(traceback.format_exception(raised.value))


class TestProtocol:
    def test_unknown_one_is_an_error_that_names_it(self) -> None:
        with pytest.raises(errors.ConfigurationError, match="'s4://'") as raised:
            Storage("s4://bucket/run").check()
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
