"""Which run a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.jobs.records import JobStore
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store that holds the fixture `run`, and an empty working directory."""
    work = tmp_path / "here"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv(env.STORE, str(tmp_path))
    return tmp_path


def job(name: str, run_url: str | None = None) -> str:
    facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
    return JobStore().create(name, run_url=run_url, **facts).id


@pytest.mark.usefixtures("store")
class TestName:
    @pytest.mark.parametrize(
        "words",
        [
            ("run", "status"),
            ("run", "clean", "--dry-run"),
            ("checkpoint", "list"),
            ("checkpoint", "view"),
            ("checkpoint", "verify"),
        ],
        ids=" ".join,
    )
    def test_is_that_of_a_run_in_the_store_for_every_command(self, run: Run, words: tuple[str, ...]) -> None:
        assert answer(*words, "mrpc")["run_url"] == str(run.folder)

    def test_may_be_in_the_variable_and_before_a_folder(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert answer("checkpoint", "download", "mrpc", "out")["run_url"] == str(run.folder)
        monkeypatch.setenv(env.RUN_URL, "mrpc")
        assert answer("checkpoint", "list")["run_url"] == str(run.folder)

    def test_has_as_many_parts_as_the_list_shows(self, store: Path) -> None:
        deep = Run(store / "runs" / "team" / "mrpc", store / "out")
        deep.begin()
        (found,) = answer("run", "list")["runs"]
        assert answer("run", "status", found["name"])["run_url"] == str(deep.folder)

    def test_of_a_job_is_the_run_that_it_writes_to(self, run: Run) -> None:
        assert job("glue", run.url) == "glue-1"
        assert job("glue") == "glue-2"
        assert answer("run", "status", "glue-1")["run_url"] == run.url
        assert "runs/glue-2'" in sentence("run", "status", "glue"), (
            "that of its newest job, which has not begun"
        )

    def test_that_is_unknown_names_the_nearest(self, run: Run) -> None:
        job("mnli")
        text = sentence("run", "status", "mprc")
        assert "There is no run 'mprc' in the store" in text
        assert "The nearest is 'mrpc'." in text
        assert "The nearest is 'mnli-1'." in sentence("checkpoint", "list", "mnli-9")

    def test_of_a_folder_without_a_run_is_that_of_the_store(self, run: Run) -> None:
        Path("mrpc").mkdir()
        assert answer("run", "status", "mrpc")["run_url"] == str(run.folder)

    def test_of_a_run_here_and_of_one_in_the_store_is_an_error_that_says_what_to_type(self, run: Run) -> None:
        here = Run(Path("mrpc").absolute(), Path("out").absolute())
        here.begin()
        text = sentence("run", "status", "mrpc")
        assert "'./mrpc'" in text
        assert f"'{run.folder}'" in text
        assert answer("run", "status", "./mrpc")["run_url"] == str(here.folder)

    def test_of_a_run_here_alone_is_that_run(self) -> None:
        here = Run(Path("local/cola").absolute(), Path("out").absolute())
        here.begin()
        assert answer("run", "status", "local/cola")["run_url"] == str(here.folder)

    def test_without_a_store_says_that_none_is_set(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(env.STORE)
        monkeypatch.setenv("HOME", str(store / "home"))
        text = sentence("run", "status", "mrpc")
        assert f"({env.STORE} is not set)" in text
        assert str(store / "home" / ".hf_cloudtrain") in text


class TestList:
    def test_without_a_url_lists_the_store_with_sizes(self, store: Path, run: Run) -> None:
        (found,) = answer("run", "list")["runs"]
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        assert (found["name"], found["newest_folder"]) == ("mrpc", "checkpoint-400")
        assert found["size"] == sum(path.stat().st_size for path in files)

    def test_of_an_empty_store_says_how_to_list_others(self, store: Path) -> None:
        text = cloudtrain("run", "list").stderr
        assert f"No runs below '{store}/runs'" in text
        assert env.STORE in text
