"""Under `verify-resume` no run and no folder of the user is touched, whatever the script names."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import rehearsal
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.errors import ConfigurationError
from tests.faults.runs import wait_until


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv(env.VERIFY_FOLDER, str(folder))
    return folder


def test_a_scratch_folder_replaces_every_run_url(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = env.run_url("s3://bucket/runs/mrpc"), env.run_url("s3://bucket/runs-mrpc")
    assert one.startswith(f"{scratch}/runs/")
    assert one != other
    assert env.run_url("s3://bucket/runs/mrpc") == one == env.run_url(one) == env.run_url_or_none(one)
    assert "../" not in env.run_url("s3://bucket/../../x")
    monkeypatch.setenv(env.RUN_URL, "gs://bucket/run")
    assert str(env.run_url_or_none(None)).startswith(f"{scratch}/runs/")


def test_without_a_rehearsal_a_run_url_is_used_as_given() -> None:
    assert env.run_url("s3://bucket/run") == "s3://bucket/run"


def test_an_output_folder_outside_of_scratch_is_refused_also_behind_a_link(
    scratch: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (scratch / "link").symlink_to(tmp_path / "real")
    for folder in (tmp_path / "real", scratch / "link", scratch / "../real", scratch):
        with pytest.raises(ConfigurationError, match="must not touch"):
            Checkpointer("s3://bucket/run", folder)
    assert list((tmp_path / "real").iterdir()) == []
    assert Checkpointer("s3://bucket/run", scratch / "out").storage.url.startswith(f"{scratch}/runs/")


def test_a_save_waits_from_the_given_step_until_it_may_continue(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = threading.Event()
    monkeypatch.setattr(rehearsal.time, "sleep", lambda _: waited.set())
    (hold,) = rehearsal.saved_hooks(scratch / "out")
    hold(5)  # before verify-resume asks for it
    rehearsal.write_hold(scratch, 5)
    hold(4)
    waiting = threading.Thread(target=hold, args=(6,))
    waiting.start()
    assert waited.wait(30)
    rehearsal.let_go(scratch)
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_save_does_not_wait_for_a_process_that_has_ended(scratch: Path) -> None:
    (scratch / "hold").write_text("5 999999999")
    (hold,) = rehearsal.saved_hooks(scratch / "out")
    waiting = threading.Thread(target=hold, args=(6,))
    waiting.start()
    wait_until(lambda: not waiting.is_alive(), "it continues")
