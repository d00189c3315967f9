"""Environment variables: arguments take precedence, and the page lists all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_url_comes_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.RUN_URL, "s3://bucket/from-env")
    assert env.run_url(None) == "s3://bucket/from-env"
    assert env.run_url("s3://bucket/argument") == "s3://bucket/argument"


@pytest.mark.parametrize("value", [None, ""])
def test_without_any_run_url_the_error_shows_both_ways(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(env.RUN_URL, raising=False)
    if value is not None:
        monkeypatch.setenv(env.RUN_URL, value)
    with pytest.raises(ConfigurationError, match=r"CloudTrainCallback\('s3://.*HF_CLOUDTRAIN_RUN_URL"):
        env.run_url(None)


def test_storage_options_come_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.storage_options(None) == {}
    monkeypatch.setenv(env.STORAGE_OPTIONS, '{"profile": "training", "client_kwargs": {"verify": false}}')
    assert env.storage_options(None) == {"profile": "training", "client_kwargs": {"verify": False}}
    assert env.storage_options({}) == {}, "an empty argument is an argument"


def test_storage_options_are_a_copy() -> None:
    given = {"profile": "training"}
    env.storage_options(given)["profile"] = "other"
    assert given == {"profile": "training"}


@pytest.mark.parametrize("text", ["{", "[]", "null", '"key"', "key=SECRETKEY", '{"secret": SECRETKEY}'])
def test_storage_options_that_are_not_an_object_are_refused_without_showing_them(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(env.STORAGE_OPTIONS, text)
    with pytest.raises(ConfigurationError, match="not a JSON object") as told:
        env.storage_options(None)
    assert "SECRETKEY" not in str(told.value)
    assert told.value.__suppress_context__ or told.value.__context__ is None


@pytest.mark.parametrize(
    ("name", "default", "ask"),
    [(env.DRAIN_TIMEOUT, 1800.0, env.drain_timeout), (env.HEARTBEAT, 15.0, env.heartbeat)],
)
def test_seconds_have_a_default_and_must_be_above_zero(
    monkeypatch: pytest.MonkeyPatch, name: str, default: float, ask: object
) -> None:
    assert callable(ask)
    monkeypatch.delenv(name, raising=False)
    assert ask() == default
    monkeypatch.setenv(name, "")
    assert ask() == default
    monkeypatch.setenv(name, "0.5")
    assert ask() == 0.5
    for wrong in ("0", "-1", "soon", "nan", "inf", "1e12", "10 s"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(
            ConfigurationError, match=f"{name}='{wrong}' must be a positive number of seconds"
        ):
            ask()


def test_a_run_url_is_optional_where_the_caller_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.RUN_URL, "")
    assert env.run_url_or_none(None) is None
    monkeypatch.setenv(env.RUN_URL, "s3://bucket/from-env")
    assert env.run_url_or_none(None) == "s3://bucket/from-env"
    assert env.run_url_or_none("s3://bucket/argument") == "s3://bucket/argument"


def test_a_checkpoint_folder_comes_from_the_argument_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(env.CHECKPOINT_DIR, "")
    assert env.checkpoint_dir(None) is None
    monkeypatch.setenv(env.CHECKPOINT_DIR, "from-env")
    assert env.checkpoint_dir(None) == "from-env"
    assert env.checkpoint_dir(Path("argument")) == "argument"


@pytest.mark.parametrize(
    ("restarts", "key"), [(None, "000003-0000000500"), ("0", "000003-0000000500"), ("1", None)]
)
def test_what_a_launcher_restored_counts_until_torchrun_restarts_its_workers(
    monkeypatch: pytest.MonkeyPatch, restarts: str | None, key: str | None
) -> None:
    assert env.restored_checkpoint() is None
    monkeypatch.setenv(env.RESTORED_CHECKPOINT, "000003-0000000500")
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert env.restored_checkpoint() == key


@pytest.mark.parametrize(
    ("name", "ask", "default"),
    [(env.STORE, env.store, ".hf_cloudtrain"), (env.CACHE, env.cache, ".cache/hf_cloudtrain")],
)
def test_store_and_cache_are_in_the_home_folder_unless_something_else_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, ask: Callable[[str | None], str], default: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ask(None) == str(tmp_path / default)
    monkeypatch.setenv(name, "/from-env")
    assert ask(None) == "/from-env"
    assert ask("/argument") == "/argument"
    monkeypatch.setenv(name, "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ConfigurationError, match=f"no home folder. Set {name}"):
        ask(None)


def test_the_page_of_environment_variables_is_current() -> None:
    script = ROOT / "docs" / "site" / "environment.py"
    code = f"import runpy; print(runpy.run_path({str(script)!r})['page'](), end='')"
    written = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "environment.md").read_text() == written, (
        f"run: python {script.relative_to(ROOT)}"
    )


def test_every_variable_has_a_constant_and_is_on_the_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    constants = {value for value in vars(env).values() if isinstance(value, str)}
    for path in (ROOT / "hf_cloudtrain").rglob("*.py"):
        for name in re.findall(r"\bHF_CLOUDTRAIN_[A-Z_]+[A-Z]\b", path.read_text()):
            assert name in constants, f"{name} of {path} has no constant in env.py"
            assert f"| `{name}` |" in page, f"{name} needs a docstring that ends with its default"
