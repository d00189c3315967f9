"""`run delete` and `job delete`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.cli import delete
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.records import JobRecord, JobStore, State
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.client import Storage
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    monkeypatch.setenv(env.STORE, str(tmp_path))
    return JobStore()


@pytest.fixture
def over(run: Run) -> Run:
    run.beat(2, state="finished", ago=60)
    return run


def files_of(run: Run) -> list[str]:
    return sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file())


class TestRunDelete:
    def test_deletes_all_but_the_record_that_it_did(self, over: Run) -> None:
        record = answer("run", "delete", "mrpc", "--force", "--yes")
        assert record["run_url"] == str(over.folder)
        assert files_of(over) == [".cloudtrain/attempts/000003.json"]
        assert answer("run", "list")["runs"] == []
        assert "was deleted (" in sentence("run", "status", "mrpc")
        assert "was deleted (" in sentence("run", "delete", "mrpc", "--force", "--yes")

    def test_without_force_names_what_is_lost_and_deletes_nothing(self, over: Run) -> None:
        cloudtrain("checkpoint", "pin", over.url, "-c", "300")
        before = files_of(over)
        text = sentence("run", "delete", over.url, "--yes")
        for part in (
            "5 checkpoints",
            "the newest is checkpoint-400",
            "the best is checkpoint-200",
            "pinned: checkpoint-300.a2",
        ):
            assert part in text
        assert "saved by name: final, final.2" in text
        assert "--force" in text
        assert files_of(over) == before

    def test_of_a_run_without_checkpoints_needs_no_force_but_an_answer(self, empty: Run) -> None:
        empty.begin()
        empty.beat(1, state="failed")
        assert "--yes" in sentence("run", "delete", empty.url)
        cloudtrain("run", "delete", empty.url, "--yes")
        assert files_of(empty) == [".cloudtrain/attempts/000002.json"]

    def test_of_a_run_that_trains_is_refused_with_the_command_that_stops_it(self, run: Run) -> None:
        run.beat(2, step=420)
        before = files_of(run)
        text = sentence("run", "delete", "mrpc", "--force", "--yes")
        assert "Attempt 2 of" in text
        assert "`cloudtrain run stop mrpc --wait`" in text
        assert files_of(run) == before

    def test_of_a_run_whose_clock_is_wrong_is_refused_once_a_heartbeat_arrives(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run.beat(2, ago=3600, step=420)
        before = files_of(run)
        monkeypatch.setattr(delete.time, "sleep", lambda _: run.beat(2, ago=3500, step=421))
        text = cloudtrain("run", "delete", "mrpc", "--force", "--yes", code=1).stderr
        assert "recorded no end. Watching it for 1 min" in text
        assert "is training. Nothing was deleted." in text
        assert files_of(run) == before

    def test_of_a_killed_run_deletes_after_a_watch(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        run.beat(2, ago=3600, step=420)
        monkeypatch.setattr(delete, "quiet_seconds", lambda: 0.05)
        monkeypatch.setattr(delete, "LOOK_SECONDS", 0.01)
        assert "Watching" in cloudtrain("run", "delete", "mrpc", "--force", "--yes").stderr
        assert files_of(run) == [".cloudtrain/attempts/000003.json"]

    def test_of_a_run_that_a_job_writes_to_is_refused_whatever_its_spelling(
        self, over: Run, store: JobStore, tmp_path: Path
    ) -> None:
        make_job(store, "queued", over.url)
        (tmp_path / "link").symlink_to(over.folder)
        for url in (over.url, str(over.folder), "mrpc", f"file:///{over.folder}/", str(tmp_path / "link")):
            text = sentence("run", "delete", url, "--force", "--yes")
            assert "`cloudtrain job cancel glue-1 --wait`" in text

    def test_keeps_and_names_files_that_are_not_of_the_run(self, over: Run) -> None:
        (over.folder / "notes.txt").write_text("mine")
        other = Run(over.folder / "below", over.work)
        other.begin()
        result = cloudtrain("run", "delete", "mrpc", "--force", "--yes")
        assert "notes.txt" in result.stderr
        assert (over.folder / "notes.txt").exists()
        assert other.catalog.attempts.numbers() == [1]

    def test_of_a_folder_without_a_run_deletes_nothing(self, tmp_path: Path) -> None:
        saved = tmp_path / "out" / "checkpoint-500" / "model.safetensors"
        saved.parent.mkdir(parents=True)
        saved.write_text("of a Trainer without a run")
        assert "There is no run at" in sentence("run", "delete", str(tmp_path / "out"), "--force", "--yes")
        assert saved.exists()

    def test_of_the_datasets_of_a_store_deletes_nothing(self, store: JobStore, tmp_path: Path) -> None:
        DatasetStore(store.url).create("words", str(Path(__file__)))
        url = str(tmp_path / "datasets")
        assert "There is no run at" in sentence("run", "delete", url, "--force", "--yes")
        assert list(DatasetStore(store.url).versions()) == ["words"]

    def test_with_another_run_in_a_folder_that_it_has_saved_is_refused(self, over: Run) -> None:
        other = Run(over.folder / "final" / "tuned", over.work)
        other.begin()
        other.save(1, 5)
        before = files_of(over)
        text = sentence("run", "delete", "mrpc", "--force", "--yes")
        assert f"`cloudtrain run delete {over.folder / 'final' / 'tuned'}`" in text
        assert files_of(over) == before

    def test_that_is_interrupted_anywhere_leaves_no_half_checkpoint_and_is_completed_by_the_same_command(
        self, over: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        delete_one = Storage._delete_one
        allowed = 0
        while True:
            allowed += 4
            left = [allowed]

            def limited(self: Storage, path: str, left: list[int] = left) -> None:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                delete_one(self, path)

            monkeypatch.setattr(Storage, "_delete_one", limited)
            done = cloudtrain(
                "run", "delete", "mrpc", "--force", "--yes", code=130 if left_over(over) > allowed else 0
            )
            if "Deleted the run" in done.stderr:
                break
            for key in over.catalog.checkpoints():
                manifest = over.catalog.read(key)
                assert all((over.folder / manifest.object_path(entry)).exists() for entry in manifest.files)
            (found,) = answer("run", "list")["runs"]
            assert found["state"] == "deleting"
        assert files_of(over) == [".cloudtrain/attempts/000003.json"]

    def test_what_an_old_machine_uploads_later_does_not_win_over_a_new_run(self, over: Run) -> None:
        over.accept(1, 900)
        cloudtrain("run", "delete", "mrpc", "--force", "--yes")
        assert over.begin() == 4
        over.save(4, 10)  # flushes the old entry of the outbox as well
        assert over.catalog.checkpoints() == [CheckpointKey(1, 900), CheckpointKey(4, 10)]


def left_over(run: Run) -> int:
    """How many objects a deletion still deletes."""
    return len(files_of(run)) + (1 if run.catalog.attempts.numbers()[-1] == 2 else -1)


def make_job(store: JobStore, state: State, run_url: str | None = None) -> JobRecord:
    facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
    record = store.create("glue", run_url=run_url, handle={"pid": 1}, **facts)
    home = Path(record.home)
    (home / "log").mkdir(parents=True)
    (home / "log" / "node-0.log").write_text("hello")
    return store.write(record, state=state)


class TestJobDelete:
    def test_deletes_the_record_and_the_folder_and_keeps_the_run(self, store: JobStore, run: Run) -> None:
        record = make_job(store, "finished", run.url)
        text = cloudtrain("job", "delete", "glue", "--yes").stderr
        assert "Its run stays" in text
        assert store.ids() == []
        assert not Path(record.home).exists()
        assert run.committed() != []

    def test_of_a_job_that_could_be_resumed_needs_force(self, store: JobStore) -> None:
        record = make_job(store, "preempted")
        text = sentence("job", "delete", "glue-1", "--yes")
        assert "could not be resumed afterwards" in text
        assert "--force" in text
        assert store.ids() == [record.id]
        assert answer("job", "delete", "glue-1", "--force", "--yes")["id"] == "glue-1"

    def test_of_a_job_that_is_not_over_is_refused(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = make_job(store, "running")
        monkeypatch.setattr(lifecycle, "look", lambda store, record: record)
        assert "`cloudtrain job cancel glue-1 --wait`" in sentence(
            "job", "delete", "glue", "--force", "--yes"
        )
        assert Path(record.home).exists()

    def test_its_id_and_with_it_its_run_goes_to_no_other_job(self, store: JobStore) -> None:
        make_job(store, "finished")
        cloudtrain("job", "delete", "glue", "--yes")
        assert make_job(store, "finished").id == "glue-2"

    def test_that_is_interrupted_is_completed_by_the_same_command(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = Path(make_job(store, "finished").home)

        def interrupted(_: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("hf_cloudtrain.jobs.deletion.shutil.rmtree", interrupted)
            cloudtrain("job", "delete", "glue-1", "--yes", code=130)
        assert store.ids() == []
        assert home.exists()
        cloudtrain("job", "delete", "glue-1", "--yes")
        assert not home.exists()
        assert "No job 'glue-1'" in sentence("job", "delete", "glue-1", "--yes")

    def test_law_11_of_a_record_with_the_folder_of_a_different_job_leaves_that_folder(
        self, store: JobStore
    ) -> None:
        victim = make_job(store, "preempted")
        job = parse_job(b"name: glue\njob_setting: {docker: {command: 'true'}}\n")
        Submission(job, job.plan(), victim.id, victim.run_url, store.url, Path(victim.home)).save()
        forged = make_job(store, "finished")
        shutil.rmtree(forged.home)
        store.write(forged, home=victim.home)
        cloudtrain("job", "delete", forged.id, "--yes")
        assert store.ids() == [victim.id]
        assert (Path(victim.home) / "log" / "node-0.log").exists()

    def test_in_a_copy_of_a_store_leaves_the_folder_of_the_original(
        self, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = Path(make_job(store, "finished").home)
        shutil.copytree(tmp_path / "jobs" / "records", tmp_path / "copy" / "jobs" / "records")
        monkeypatch.setenv(env.STORE, str(tmp_path / "copy"))
        assert f"Its folder '{home}'" in cloudtrain("job", "delete", "glue", "--yes").stderr
        assert (home / "log" / "node-0.log").exists()
        assert store.ids() == ["glue-1"]
