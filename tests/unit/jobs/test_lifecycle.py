"""Jobs: what is decided and refused before anything starts, and what is recorded when an engine fails."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_cloudtrain.cli import app, job_actions
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoDatasetError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines import EngineStatus
from hf_cloudtrain.jobs.node.docker import docker_argv
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import SUPERVISOR_LOCK, Submission
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import this_process
from hf_cloudtrain.tracking.status import RunState

FILES = Path(__file__).resolve().parents[2] / "data"
TEXT = "name: toy\nengine: {engine}\njob_setting: {{docker: {{command: torchrun train.py}}}}\n"


class FakeEngine:
    """An engine that starts nothing."""

    def __init__(self) -> None:
        self.submitted: list[Submission] = []
        self.failure: Exception | None = None
        self.status: EngineStatus | None = None
        self.cancelled: list[str] = []

    def check(self, submission: Submission) -> None:
        pass

    def show(self, submission: Submission) -> str:
        return "nothing"

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        if self.failure is not None:
            raise self.failure
        self.submitted.append(submission)
        return store.write(record, state="running")

    def look(self, record: JobRecord) -> EngineStatus | None:
        return self.status

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        self.cancelled.append(record.id)

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        yield "a line"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
    return JobStore()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(lifecycle, "engine", lambda name: fake)
    return fake


def submitted(store: JobStore, text: str = TEXT.format(engine="local")) -> JobRecord:
    return lifecycle.submit(lifecycle.prepare(parse_job(text.encode()), store), store)


@pytest.mark.parametrize("engine_name", ["local", "slurm", "skypilot", "sagemaker"])
@pytest.mark.parametrize(("file", "dataset"), [("glue", "mnli"), ("cifar", "cifar100")])
def test_periflows_files_are_two_nodes_of_four_processes_on_every_engine(
    store: JobStore, tmp_path: Path, engine_name: str, file: str, dataset: str
) -> None:
    (tmp_path / "data.txt").write_text("data")
    for argv in (
        ("data", "create", dataset, str(tmp_path / "data.txt")),
        ("job", "run", "-f", str(FILES / f"periflow_{file}.yml"), "--engine", engine_name, "--dry-run"),
    ):
        result = CliRunner().invoke(app, list(argv))
        assert result.exit_code == 0, result.output
    assert f"with engine {engine_name}: 2 nodes of 4 processes" in result.stdout
    assert store.ids() == []
    assert not (tmp_path / "store" / "jobs").exists()


def test_the_script_is_told_the_price_of_all_machines_of_the_job(
    store: JobStore, engine: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "vms.yml").write_text("vms:\n- vm: rack-80gb-h100-2g-berlin\n  price: 2.5\n")
    text = TEXT.format(engine="local") + "vm: rack-80gb-h100-2g-berlin\nlocal: {nodes: 3}\n"
    found: list[str | None] = []
    for job in (text, TEXT.format(engine="local")):
        record = submitted(store, job)
        submission = Submission.load(Path(record.home))  # as a node has it
        place = {"master_addr": "host", "master_port": 1, "run_url": record.run_url, "exit_file": "exit"}
        shells: list[dict[str, str]] = [{}, {"HF_CLOUDTRAIN_PRICE": "9"}]
        environments = [submission.plan.environment(0, **place, shell=shell) for shell in shells]  # type: ignore[arg-type]
        found += [environment.get("HF_CLOUDTRAIN_PRICE") for environment in environments]
    assert found == ["7.5", None, None, None], "the shell's own price stays as it is"
    own = dataclasses.replace(submission.plan, variables={"HF_CLOUDTRAIN_PRICE": "7"}, price=7.5)
    assert own.environment(0, **place)["HF_CLOUDTRAIN_PRICE"] == "7"  # type: ignore[arg-type]
    assert "HF_CLOUDTRAIN_PRICE" in docker_argv(submission, "image", [], ["true"])


def test_an_engine_that_cannot_start_a_job_leaves_a_record_that_says_so(
    store: JobStore, engine: FakeEngine
) -> None:
    engine.failure = ConfigurationError("sbatch says no")
    with pytest.raises(ConfigurationError, match="sbatch says no"):
        submitted(store)
    record = store.read("toy")
    assert (record.state, record.reason) == ("failed", "It could not be started: sbatch says no")


def test_the_home_has_a_copy_of_the_folder_and_what_the_nodes_need(
    store: JobStore, engine: FakeEngine, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text("print()")
    (tmp_path / "link").symlink_to(code)
    job = parse_job(b"name: toy\nenv: {KEY: value}\njob_setting: {docker: {command: echo}}")
    record = lifecycle.submit(lifecycle.prepare(job, store, workspace=code), store, code)
    home = Path(record.home)
    assert (home / "workspace" / "code" / "train.py").read_text() == "print()"
    loaded = Submission.load(home)
    assert (loaded.id, loaded.start_folder) == (record.id, "/workspace/code")
    assert lifecycle.prepare(job, store, workspace=tmp_path / "link").start_folder == "/workspace/link"
    assert "value" not in (home / "job.json").read_text()
    assert engine.submitted[0].home == home


def test_jobs_and_runs_inside_a_workspace_are_not_copied(engine: FakeEngine, tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / "run").mkdir(parents=True)
    for name in ("train.py", "run/weights"):
        (code / name).write_text("x")
    store = JobStore(str(code / "store"))
    job = parse_job(f"name: toy\nrun_url: {code}/run\njob_setting: {{docker: {{command: echo}}}}".encode())
    for _ in range(2):
        record = lifecycle.submit(lifecycle.prepare(job, store, workspace=code), store, code)
        store.write(record, state="failed")
        assert [path.name for path in Path(record.home, "workspace", "code").iterdir()] == ["train.py"]


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "list"])
def test_a_record_with_an_unknown_engine_is_one_sentence(store: JobStore, command: str) -> None:
    store.create("toy", engine="quantum", nodes=1, nproc_per_node=1, max_restarts=0)
    store.write(store.read("toy"), state="running")
    result = CliRunner().invoke(app, ["job", command, *(["toy"] if command != "list" else [])])
    assert result.exit_code == (1 if command in ("logs", "cancel") else 0)
    assert result.stderr.count("Unknown engine 'quantum'") == 1 + (command == "cancel")


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ("", "all 8 processes (2 nodes of 4 processes) start on this machine"),
        (
            "local: {nodes: 2, nproc_per_node: 1}",
            "all 2 processes (2 nodes of 1 process) start on this machine",
        ),
        ("engine: slurm", None),
    ],
)
def test_what_a_vm_means_on_this_machine_is_said_in_one_line(
    store: JobStore, tmp_path: Path, more: str, shown: str | None
) -> None:
    file = tmp_path / "job.yml"
    vm = "azure-16gb-v100-4g-eastus-spot"
    file.write_text(
        f"name: toy\nvm: {vm}\nnum_devices: 8\n{more}\njob_setting: {{docker: {{command: echo}}}}"
    )
    result = CliRunner().invoke(app, ["job", "run", "-f", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if vm in line]
    assert len(lines) == (shown is not None)
    assert shown is None or shown in lines[0]


def test_a_job_that_was_submitted_before_folders_kept_their_names_starts_at_its_mount_path(
    store: JobStore, engine: FakeEngine
) -> None:
    record = submitted(store)
    path = Path(record.home, "job.json")
    old = json.loads(path.read_text())
    del old["code"]
    path.write_text(json.dumps({**old, "has_workspace": True}))
    assert Submission.load(record.home).start_folder == "/workspace"


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ("checkpoint: {output_checkpoint_dir: /workspace/code}", "checkpoint.output_checkpoint_dir"),
        ("checkpoint: {output_checkpoint_dir: ./}", None),
        ("data: {name: x, mount_path: /workspace/code}", "data.mount_path"),
    ],
)
def test_a_path_of_the_job_must_not_be_that_of_its_folder(
    store: JobStore, tmp_path: Path, more: str, taken: str | None
) -> None:
    (tmp_path / "code").mkdir()
    text = f"name: toy\n{more}\njob_setting: {{docker: {{command: echo}}}}"
    with pytest.raises(CloudTrainError, match=taken or "contains the code"):
        lifecycle.prepare(parse_job(text.encode()), store, workspace=tmp_path / "code")


def test_a_relative_checkpoint_folder_is_where_the_command_starts(store: JobStore, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    text = b"name: toy\ncheckpoint: {output_checkpoint_dir: ckpt}\njob_setting: {docker: {command: echo}}"
    submission = lifecycle.prepare(parse_job(text), store, workspace=tmp_path / "code")
    assert submission.job.checkpoint_dir == submission.plan.checkpoint_dir == "/workspace/code/ckpt"
    assert lifecycle.prepare(parse_job(text), store).job.checkpoint_dir == "/workspace/ckpt"


@pytest.mark.parametrize("name", ["a$HOME", "line\nbreak"])
def test_a_folder_whose_name_a_path_in_the_job_file_cannot_contain_is_refused(
    store: JobStore, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    text = "name: toy\ncheckpoint: {output_checkpoint_dir: %s}\njob_setting: {docker: {command: echo}}"
    with pytest.raises(ConfigurationError, match="Rename the folder"):
        lifecycle.prepare(parse_job((text % "ckpt").encode()), store, workspace=tmp_path / name)
    assert lifecycle.prepare(parse_job((text % "/ckpt").encode()), store, workspace=tmp_path / name)


def test_a_dataset_that_would_hide_files_of_the_workspace_is_refused_before_anything_starts(
    store: JobStore, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    (code / "data").mkdir(parents=True)
    (code / "data" / "mine.csv").write_text("rows")
    DatasetStore(store.url).create("set", code / "data")
    job = parse_job(
        b"name: toy\njob_setting: {docker: {command: echo}}\ndata: {name: set, mount_path: /workspace/code/data}"
    )
    with pytest.raises(ConfigurationError, match=r"exclude that from the workspace \(\.cloudtrainignore\)"):
        lifecycle.submit(lifecycle.prepare(job, store, workspace=code), store, code)
    assert [(record.state, record.starts) for record in store.records()] == [("failed", ())]


def test_a_missing_folder_and_a_missing_dataset_are_refused(store: JobStore, tmp_path: Path) -> None:
    job = parse_job(
        b"name: toy\ndata: {name: mnli@2, mount_path: /data}\njob_setting: {docker: {command: echo}}"
    )
    with pytest.raises(ConfigurationError, match="is not a folder"):
        lifecycle.prepare(job, store, workspace=tmp_path / "nothing")
    with pytest.raises(NoDatasetError, match="'mnli'"):
        lifecycle.prepare(job, store)


def test_only_one_job_at_a_time_writes_to_a_run(store: JobStore, engine: FakeEngine) -> None:
    text = TEXT.format(engine="local") + "run_url: /runs/one\n"
    first = submitted(store, text)
    with pytest.raises(ConfigurationError, match=r"'toy-1' is running and writes to '/runs/one'"):
        submitted(store, text)
    store.write(first, state="cancelled")
    assert submitted(store, text).id == "toy-2"


def test_the_status_of_an_engine_is_shown_and_a_final_one_is_kept(
    store: JobStore, engine: FakeEngine
) -> None:
    record = submitted(store)
    assert lifecycle.look(store, record) == record
    engine.status = EngineStatus("stopping", "asked")
    assert lifecycle.look(store, record).state == "stopping"
    assert store.read("toy").state == "running"
    engine.status = EngineStatus("lost", "gone")
    assert lifecycle.look(store, record).state == "lost"
    assert store.read("toy").state == "running"  # it may come back
    engine.status = EngineStatus("finished")
    assert lifecycle.look(store, record).state == "finished"
    assert store.read("toy").state == "finished"
    engine.status = EngineStatus("running")
    assert lifecycle.look(store, store.read("toy")).state == "finished"


def test_the_last_record_of_a_supervisor_overrides_the_status_of_its_engine(
    store: JobStore, engine: FakeEngine
) -> None:
    before = submitted(store)
    store.write(before, state="finished", reason="All done.")
    engine.status = EngineStatus("failed", "Slurm: COMPLETED")
    assert lifecycle.look(store, before).reason == "All done."
    assert store.read("toy").state == "finished"


def test_a_start_without_an_end_ends_with_its_job(store: JobStore, engine: FakeEngine) -> None:
    record = store.write(submitted(store), starts=(Start(1, 1.0, 2.0, "preempted"), Start(2, 3.0)))
    engine.status = EngineStatus("cancelled", "scancel")
    starts = lifecycle.look(store, record).starts
    assert [start.outcome for start in starts] == ["preempted", "cancelled"]
    assert starts[1].ended is not None
    assert starts[0].ended == 2.0


def test_a_job_is_cancelled_although_its_engine_fails(
    store: JobStore, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = submitted(store)

    def no_answer(record: JobRecord) -> None:
        raise ConfigurationError("Slurm does not answer")

    monkeypatch.setattr(engine, "look", no_answer)
    lifecycle.cancel(store, record.id)
    assert store.is_cancelled(record.id)
    assert engine.cancelled == [record.id]


def test_a_job_that_is_over_is_not_cancelled_and_a_running_one_is_not_resumed(
    store: JobStore, engine: FakeEngine
) -> None:
    record = submitted(store)
    with pytest.raises(ConfigurationError, match="is running"):
        lifecycle.resume(store, "toy")
    lifecycle.cancel(store, "toy")
    assert store.is_cancelled("toy-1")
    assert engine.cancelled == ["toy-1"]
    store.write(record, state="finished")
    with pytest.raises(ConfigurationError, match="is over: finished"):
        lifecycle.cancel(store, "toy")
    with pytest.raises(ConfigurationError, match="has finished"):
        lifecycle.resume(store, "toy")


def test_a_resume_removes_the_cancel_mark_and_resets_the_restarts(
    store: JobStore, engine: FakeEngine
) -> None:
    record = submitted(store)
    lifecycle.cancel(store, "toy")
    store.write(record, state="cancelled", restarts=2, starts=(Start(1, 0.0),))
    resumed = lifecycle.resume(store, "toy")
    assert (resumed.state, resumed.restarts, len(resumed.starts)) == ("running", 0, 1)
    assert not store.is_cancelled("toy-1")


def test_a_job_of_a_different_machine_is_not_resumed_here(store: JobStore, engine: FakeEngine) -> None:
    record = submitted(store)
    store.write(record, state="failed", home="/nowhere/toy-1", submitted_by={"host": "far"})
    with pytest.raises(ConfigurationError, match="on 'far', where it was submitted"):
        lifecycle.resume(store, "toy")


@pytest.mark.parametrize("what", ["id", "run_url", "store"])
def test_a_resume_starts_nothing_from_a_folder_of_a_different_job(
    store: JobStore, engine: FakeEngine, tmp_path: Path, what: str
) -> None:
    record = store.write(submitted(store), state="failed")
    own = Submission.load(record.home)
    other = dataclasses.replace(
        own, **{what: f"{getattr(own, what)}-of-a-colleague", "home": tmp_path / "other"}
    )
    other.save()
    store.write(record, home=str(other.home))
    engine.submitted.clear()
    with pytest.raises(ConfigurationError, match=r"-of-a-colleague'.* Nothing was started\."):
        lifecycle.resume(store, "toy")
    assert engine.submitted == []
    assert store.read("toy-1").state == "failed"


def test_a_job_whose_submitter_was_killed_blocks_no_other_job(store: JobStore, engine: FakeEngine) -> None:
    url = str(store.url) + "/run"
    facts = {"engine": "local", "run_url": url, "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
    record = store.create("toy", submitter=this_process(), **facts)
    assert lifecycle.look(store, record) == record, "this process runs, and may still copy the workspace"
    for change in ({"pid": 999999999}, {"boot": "another"}, {"began": -1}):
        gone = store.write(record, submitter={**record.submitter, **change})
        assert (lifecycle.look(store, gone).state, store.read("toy-1").state) == ("failed", "failed")
    Path(record.home).mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="interrupted"):
        lifecycle.resume(store, "toy-1")
    far = store.write(record, submitter={**record.submitter, "host": "far", "boot": "another"})
    assert lifecycle.look(store, far).state == "queued", (
        "the state of a process on a different machine is unknown"
    )
    store.write(record, submitter={**record.submitter, "pid": 999999999})
    text = TEXT.format(engine="local") + f"run_url: {url}\n"
    assert submitted(store, text).id == "toy-2"


def test_a_resume_does_not_take_the_grace_from_the_shell(store: JobStore, engine: FakeEngine) -> None:
    record = submitted(store, TEXT.format(engine="local") + "env: {HF_CLOUDTRAIN_GRACE: 7, DEBUG: 1}\n")
    loaded = Submission.load(record.home)
    assert (loaded.plan.grace, dict(loaded.plan.variables)) == (
        7.0,
        {"HF_CLOUDTRAIN_GRACE": "7", "DEBUG": None},
    )


@pytest.mark.parametrize(
    ("state", "began", "now", "reason"),
    [
        ("running", 50.0, RunState("r", "training", stalled="no step", last_seen=100.0), "no step"),
        ("running", 150.0, RunState("r", "killed", stalled="no heartbeat", last_seen=100.0), None),
        ("running", 50.0, RunState("r", "training", last_seen=100.0), None),
        ("starting", 50.0, RunState("r", "waiting"), "training has not begun after 50 s"),
        ("starting", 60.0, RunState("r", "waiting"), None),
        ("finished", 50.0, RunState("r", "finished", stalled="x", last_seen=100.0), None),
        ("running", 50.0, None, None),
    ],
)
def test_a_job_without_progress_is_shown_as_stalled(
    store: JobStore,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    state: Any,
    began: float,
    now: RunState | None,
    reason: str | None,
) -> None:
    record = store.write(submitted(store), state=state, starts=(Start(1, began),))
    monkeypatch.setattr(job_actions, "LATE", 45.0)
    monkeypatch.setattr(job_actions.time, "time", lambda: 100.0)
    monkeypatch.setattr(job_actions, "run_state", lambda catalog: now)
    assert job_actions._stall(record, now) == reason


def test_an_engine_that_fails_hides_no_job(
    store: JobStore, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store)

    def no_answer(record: JobRecord) -> EngineStatus:
        raise ConfigurationError("slurmctld is down")

    monkeypatch.setattr(engine, "look", no_answer)
    result = CliRunner().invoke(app, ["job", "list", "--json"])
    assert [job["state"] for job in json.loads(result.stdout)["jobs"]] == ["running"]
    assert "slurmctld is down" in result.stderr


def test_a_failed_submission_does_not_overwrite_the_record_of_a_supervisor(
    store: JobStore, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_over(submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        store.write(record, state="starting", handle={"pid": 1})
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "submit", taken_over)
    with pytest.raises(KeyboardInterrupt):
        submitted(store)
    assert store.read("toy").state == "starting"


def test_of_two_concurrent_resumes_one_starts_the_job(store: JobStore, engine: FakeEngine) -> None:
    record = submitted(store)
    store.write(record, state="lost")
    with (
        locked(Path(record.home, "resume.lock")),
        pytest.raises(ConfigurationError, match="already starting"),
    ):
        lifecycle.resume(store, record.id)
    assert store.read(record.id).state == "lost"
    assert lifecycle.resume(store, record.id).state == "running"


def test_the_home_of_a_running_job_is_not_deleted(store: JobStore, engine: FakeEngine) -> None:
    home = store.home("toy-1")
    with (
        locked(home / SUPERVISOR_LOCK),
        pytest.raises(ConfigurationError, match="a running job without a record"),
    ):
        submitted(store)
    assert (home / SUPERVISOR_LOCK).exists()
