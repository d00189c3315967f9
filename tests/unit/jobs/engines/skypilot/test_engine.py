"""The engine `skypilot`: the task by golden files, and a fake `sky` that prints what SkyPilot 0.14 prints."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import resource
import selectors
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli import app
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus
from hf_cloudtrain.jobs.engines.skypilot import engine as module
from hf_cloudtrain.jobs.engines.skypilot.client import SkyJob
from hf_cloudtrain.jobs.engines.skypilot.task import accelerator, as_task, cluster_name, task_name
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.values import Machine
from hf_cloudtrain.storage.client import Storage
from tests.fake_sky import DATA, GOLDEN, LAUNCHED, SKYPILOT, FakeSky, job_text, submission_of, submitted


class TestTask:
    """The task. `make test-skypilot` reads the same golden files with SkyPilot's own parser."""

    @pytest.mark.parametrize("golden", GOLDEN)
    def test_a_dry_run_is_the_golden_file(self, golden: str) -> None:
        name, workspace, run_url = GOLDEN[golden]
        shown = SKYPILOT.show(submission_of(DATA / name, run_url, workspace=workspace))
        assert shown.replace(f"=={version('hf_cloudtrain')}", "==0.1.0") == (DATA / golden).read_text()

    @pytest.mark.parametrize("name", ["periflow_glue.yml", "periflow_cifar.yml"])
    def test_the_machines_of_periflows_files_are_requested(self, name: str) -> None:
        task = as_task(submission_of(DATA / name))
        resources = task["resources"]
        assert (resources["infra"], resources["accelerators"]) == ("azure/eastus", "V100:4")
        assert resources["use_spot"] is True
        assert task["num_nodes"] == 2

    def test_no_value_of_a_variable_is_shown(self) -> None:
        shown = SKYPILOT.show(submission_of(job_text("env: {TOKEN: hunter2, LR: 2e-5}")))
        assert "hunter2" not in shown
        assert "2e-5" not in shown
        assert "--secret LR --secret TOKEN" in shown

    def test_storage_options_of_the_shell_are_passed_on(self) -> None:
        shell = {"HF_CLOUDTRAIN_STORAGE_OPTIONS": '{"key": "hunter2"}'}
        task = as_task(submission_of(job_text()), shell)
        assert task["secrets"] == {"HF_CLOUDTRAIN_STORAGE_OPTIONS": None}

    def test_a_cluster_for_one_start_has_no_recovery(self) -> None:
        submission = submission_of(job_text("skypilot: {managed: false}", name="7up"))
        assert "job_recovery" not in as_task(submission)["resources"]
        assert "sky launch -c job-7up-1 -y -d --down" in SKYPILOT.show(submission)

    @pytest.mark.parametrize(
        ("vm", "name"),
        [
            ("azure-16gb-v100-4g-eastus", "V100"),
            ("aws-32gb-v100-8g-us-east-1", "V100-32GB"),
            ("gcp-40gb-a100-8g-us-central1", "A100"),
            ("gcp-80gb-a100-8g-us-central1", "A100-80GB"),
            ("aws-24gb-a10g-4g-us-east-1", "A10G"),
            ("gcp-16gb-t4-1g-us-central1-spot", "T4"),
        ],
    )
    def test_a_gpu_has_skypilots_name(self, vm: str, name: str) -> None:
        assert accelerator(Machine.parse(vm)) == name

    @pytest.mark.parametrize(
        ("job_id", "name"), [("a-1", "a-1"), ("a---b-1", "a--b-1"), ("a_._-2", "a_.2"), ("a--2", "a--2")]
    )
    def test_a_task_name_is_one_that_skypilot_accepts(self, job_id: str, name: str) -> None:
        assert task_name(job_id) == name

    def test_a_cluster_name_begins_with_a_letter(self) -> None:
        assert cluster_name("7up-1") == "job-7up-1"
        assert cluster_name("up-1") == "up-1"

    @pytest.mark.parametrize(
        ("url", "source"),
        [
            ("s3://b/runs/x", "s3://b"),
            ("gs://b/x", "gs://b"),
            ("gcs://b/x", "gs://b"),
            ("abfs://c@acc.dfs.core.windows.net/x", "https://acc.blob.core.windows.net/c"),
            ("hf://buckets/team/runs", None),
        ],
    )
    def test_the_bucket_of_the_run_is_mounted(self, url: str, source: str | None) -> None:
        mounts = as_task(submission_of(job_text(), url))["file_mounts"]
        assert mounts.get("~/hf_cloudtrain/bucket", {}).get("source") == source

    @pytest.mark.parametrize(
        "line",
        [
            "env: {AZURE_STORAGE_ACCOUNT_NAME: acc}",
            "env: {AZURE_STORAGE_ACCOUNT_NAME: }",
            "env: {AZURE_STORAGE_CONNECTION_STRING: 'Protocol=https;AccountName=acc;AccountKey=abc='}",
        ],
    )
    def test_the_azure_account_is_found(self, line: str) -> None:
        shell = {"AZURE_STORAGE_ACCOUNT_NAME": "acc"} if ": }" in line else {}
        mounts = as_task(submission_of(job_text(line), "az://c/x"), shell)["file_mounts"]
        assert mounts["~/hf_cloudtrain/bucket"]["source"] == "https://acc.blob.core.windows.net/c"


class TestRefusals:
    """What `check` refuses, before anything is started."""

    @pytest.mark.parametrize(
        ("lines", "run_url", "message"),
        [
            ((), "/home/me/runs/x", "'/home/me/runs/x' is on this machine"),
            ((), "file:///home/me/runs/x", "on this machine"),
            ((), "az://c/x", "AZURE_STORAGE_ACCOUNT_NAME"),
            (("vm: aws-24gb-v100-4g-us-east-1",), "s3://b/x", "only with 16 or 32 GB"),
            (
                ("vm: aws-16gb-v100-4g-us-east-1",),
                "s3://b/x",
                "8 processes per node are more than the 4 GPUs",
            ),
        ],
    )
    def test_a_job_that_cannot_run_there(self, lines: tuple[str, ...], run_url: str, message: str) -> None:
        submission = submission_of(job_text(*lines), run_url)
        if "8 processes" in message:
            plan = submission.job.plan("skypilot", nodes=1, nproc_per_node=8)
            submission = dataclasses.replace(submission, plan=plan)
        with pytest.raises(ConfigurationError, match=message):
            SKYPILOT.check(submission)

    def test_a_dataset_in_a_store_on_this_machine(self) -> None:
        submission = submission_of(job_text("data: {name: mnli, mount_path: /data}"))
        with pytest.raises(
            ConfigurationError, match="'mnli' is in the store '/home/me/store', on this machine"
        ):
            SKYPILOT.check(dataclasses.replace(submission, store="/home/me/store"))

    def test_a_dry_run_names_what_is_missing_and_shows_the_task_all_the_same(self) -> None:
        shown = SKYPILOT.show(submission_of(job_text("vm: aws-24gb-v100-4g-us-east-1"), "/home/me/runs/x"))
        assert [line[:11] for line in shown.splitlines()[:3]] == ["# Missing: ", "# Missing: ", "name: x-1"]

    def test_a_variable_that_the_shell_lacks(self) -> None:
        with pytest.raises(ConfigurationError, match="export TOKEN="):
            SKYPILOT.check(submission_of(job_text("env: {TOKEN: }")))

    def test_a_machine_without_skypilot(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(ConfigurationError, match=r"pip install 'hf_cloudtrain\[skypilot\]'"):
            SKYPILOT.check(submission_of(job_text()))


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSky:
    found = FakeSky(tmp_path / "sky")
    found.install(monkeypatch)
    return found


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(str(tmp_path / "store"))


class TestCommands:
    """The engine with the fake `sky`."""

    def test_a_job_is_submitted_and_found_again(
        self, sky: FakeSky, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TOKEN", "hunter2")
        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky, "env: {TOKEN: }")
        home = Path(record.home)
        assert store.read("x-1").handle == {"managed": True, "name": "x-1", "job": 12}
        assert sky.calls == [f"jobs launch -n x-1 -y -d --secret TOKEN {home / 'task.yaml'}"]
        assert (sky.folder / "environment").read_text() == "TOKEN=hunter2\n"
        written = [path for path in home.rglob("*") if path.is_file()]
        assert {path.name for path in written} == {"job.json", "task.yaml", ".skyignore"}
        assert not any("hunter2" in path.read_text() for path in written)

    def test_a_job_whose_number_is_not_printed_is_found_by_its_name(
        self, sky: FakeSky, store: JobStore
    ) -> None:
        sky.prints("launch", "Done.\n")
        sky.lists(
            {"job_id": 3, "job_name": "x-1"},
            {"job_id": 8, "job_name": "x-1"},
            {"job_id": 9, "job_name": "y-1"},
        )
        assert submitted(store, sky).handle["job"] == 8

    def test_a_failed_launch_is_reported_with_the_last_lines_and_without_secrets(
        self, sky: FakeSky, store: JobStore
    ) -> None:
        sky.prints("launch", "token=hunter2\nNoCloudAccessError: run: sky check\n", code=1)
        with pytest.raises(
            ConfigurationError, match=r"`sky jobs launch` ended with exit code 1: token=\*\*\* \| .*sky check"
        ):
            submitted(store, sky)

    @pytest.mark.parametrize(
        ("theirs", "state"),
        [
            ("PENDING", "queued"),
            ("STARTING", "starting"),
            ("RUNNING", "running"),
            ("RECOVERING", "starting"),
            ("CANCELLING", "stopping"),
            ("SUCCEEDED", "finished"),
            ("CANCELLED", "cancelled"),
            ("FAILED", "failed"),
            ("FAILED_NO_RESOURCE", "failed"),
            ("SOMETHING_NEW", "running"),
        ],
    )
    def test_each_state_of_skypilot_has_one_of_ours(
        self, sky: FakeSky, store: JobStore, theirs: str, state: str
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = store.write(submitted(store, sky), state="running")
        sky.lists(
            {"job_id": 12, "status": theirs, "failure_reason": "key=hunter2"},
            {"job_id": 1, "status": "FAILED"},
        )
        status = SKYPILOT.look(record)
        assert status is not None
        assert status.state == state
        assert "hunter2" not in str(status.reason)

    def test_a_success_is_what_node_0_printed_at_its_end(self, sky: FakeSky, store: JobStore) -> None:
        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky)
        sky.lists({"job_id": 12, "status": "SUCCEEDED"})
        sky.prints(
            "logs",
            "(head, rank=0, pid=12, ip=10.0.0.4) step 5\n"
            '(head, rank=0, pid=12, ip=10.0.0.4) cloudtrain-verdict: {"state": "failed", "reason": "Overtaken."}\n'
            "Job finished (status: SUCCEEDED).\n",
        )
        status = SKYPILOT.look(record)
        assert status is not None
        assert (status.state, status.reason) == ("failed", "Overtaken.")

    @pytest.mark.parametrize("status", ["SUCCEEDED", "CANCELLED", "FAILED"])
    def test_a_cancelled_job_ends_as_cancelled(self, sky: FakeSky, store: JobStore, status: str) -> None:
        sky.prints("launch", LAUNCHED)
        record = store.write(submitted(store, sky), state="stopping")
        sky.lists({"job_id": 12, "status": status})
        assert SKYPILOT.look(record) == EngineStatus("cancelled", "Stopped by `cloudtrain job cancel`.")
        sky.lists({"job_id": 12, "status": "RUNNING"})
        assert SKYPILOT.look(record) == EngineStatus("stopping")

    def test_a_failure_of_sky_is_reported(self, sky: FakeSky, store: JobStore) -> None:
        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky)
        sky.prints("queue", "Could not connect to the API server.\n", code=1)
        with pytest.raises(
            ConfigurationError, match=r"`sky jobs queue` ended with exit code 1: Could not connect"
        ):
            SKYPILOT.look(record)

    @pytest.mark.parametrize(
        ("ended", "state"),
        [
            ("finished", "finished"),
            ("preempted", "preempted"),
            ("stopped", "cancelled"),
            ("overtaken", "failed"),
            ("training", "lost"),
            (None, "lost"),
        ],
    )
    def test_the_run_says_how_a_job_ended_whose_cluster_is_gone(
        self, sky: FakeSky, store: JobStore, tmp_path: Path, ended: str | None, state: str
    ) -> None:
        sky.prints("launch", "Job submitted, ID: 1\n")
        record = submitted(store, sky, "skypilot: {managed: false}")
        assert record.handle == {"managed": False, "name": "x-1", "job": 1}
        sky.prints("queue", json.dumps({"x-1": [{"job_id": 1, "status": "SETTING_UP"}]}))
        assert SKYPILOT.look(record) == EngineStatus("starting")
        sky.prints("queue", "Fetching job queue for: x-1\n{}")
        record = dataclasses.replace(record, run_url=str(tmp_path / "run"))
        if ended is not None:
            Catalog(Storage(record.run_url)).attempts.begin(0.0, 0, None, {})
            Catalog(Storage(record.run_url)).attempts.write_progress(
                1, {"state": ended, "time": record.created}
            )
        status = SKYPILOT.look(record)
        assert status is not None
        assert status.state == state
        assert "SkyPilot no longer knows it" in str(status.reason)

    def test_an_attempt_that_ended_before_the_job_began_belongs_to_an_earlier_job(
        self, sky: FakeSky, store: JobStore, tmp_path: Path
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), run_url=str(tmp_path / "run"))
        Catalog(Storage(record.run_url)).attempts.begin(0.0, 0, None, {})
        Catalog(Storage(record.run_url)).attempts.write_progress(
            1, {"state": "finished", "time": record.created - 3600}
        )
        sky.lists()
        status = SKYPILOT.look(record)
        assert status is not None
        assert status.state == "lost"

    def test_without_a_controller_no_managed_job_runs(
        self, sky: FakeSky, store: JobStore, tmp_path: Path
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), run_url=str(tmp_path / "run"))
        sky.prints("queue", "sky.exceptions.ClusterNotUpError: No in-progress managed jobs.\n", code=1)
        status = SKYPILOT.look(record)
        assert status is not None
        assert status.state == "lost"
        assert "sky jobs logs 12" in str(status.reason)
        sky.prints("other", "ClusterNotUpError: All managed jobs should have finished.\n", code=1)
        SKYPILOT.cancel(record, store)
        assert SKYPILOT.look(store.read("x-1")) == EngineStatus(
            "cancelled", "Stopped by `cloudtrain job cancel`."
        )
        (sky.folder / "queue.code").unlink()
        sky.lists({"job_id": 12, "status": "RUNNING"})
        sky.prints("other", "PermissionError: not yours\n", code=1)
        with pytest.raises(ConfigurationError, match="not yours"):
            SKYPILOT.cancel(record, store)

    def test_lines_are_labelled_by_node(self, sky: FakeSky, store: JobStore) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), nodes=2)
        sky.prints(
            "logs",
            "├── Waiting for task resources\n"
            "\x1b[36m(head, rank=0, pid=12, ip=10.0.0.4)\x1b[0m loss 1.5\n"
            "\x1b[36m(worker1, rank=1, pid=12, ip=10.0.0.5)\x1b[0m (x) ready\n",
        )
        sky.lists({"job_id": 12, "status": "RUNNING"})
        assert list(SKYPILOT.lines(record, None, follow=False)) == [
            "├── Waiting for task resources",
            "[node 0] loss 1.5",
            "[node 1] (x) ready",
        ]
        assert list(SKYPILOT.lines(record, 1, follow=False)) == ["[node 1] (x) ready"]
        assert sky.calls[-1] == "jobs logs 12 --no-follow --tail 0"
        list(SKYPILOT.lines(record, None, follow=True))
        assert sky.calls[-1] == "jobs logs 12 --follow --tail 0"

    @pytest.mark.parametrize(
        "handle",
        [
            {},
            {"managed": False, "name": "--all", "job": None},
            {"managed": True, "name": "x-1", "job": "--all"},
            {"managed": True, "name": "x-1", "job": -1},
            {"managed": True, "name": "of-a-colleague", "job": 7},
            {"managed": False, "name": "of-a-colleague", "job": None},
            {"managed": True, "name": ["x-1"], "job": 7},
        ],
    )
    def test_law_11_a_handle_of_a_different_job_or_with_an_option_is_refused(
        self, sky: FakeSky, store: JobStore, handle: dict[str, object]
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), handle=handle)
        calls = sky.calls
        with pytest.raises(
            ConfigurationError, match=r"does not name SkyPilot's job 'x-1': .* `sky jobs queue`"
        ):
            list(SKYPILOT.lines(record, None, follow=False))
        if handle:  # without one SkyPilot never had it
            with pytest.raises(ConfigurationError, match="does not name SkyPilot's job 'x-1'"):
                SKYPILOT.cancel(record, store)
        assert sky.calls == calls

    def test_law_11_a_number_of_a_different_job_is_not_cancelled_and_its_log_not_shown(
        self, sky: FakeSky, store: JobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), run_url=str(tmp_path / "run"))
        sky.lists({"job_id": 12, "job_name": "of-a-colleague", "status": "RUNNING"})
        status = SKYPILOT.look(record)
        assert status is not None
        assert status.state == "lost"
        SKYPILOT.cancel(record, store)
        assert not any(call.startswith("jobs cancel") for call in sky.calls)
        assert "SkyPilot no longer has the job 'x-1'" in caplog.text
        with pytest.raises(ConfigurationError, match="has no job 12 with the name 'x-1'"):
            list(SKYPILOT.lines(record, None, follow=False))
        assert not any(call.startswith("jobs logs") for call in sky.calls)

    def test_cancel_ends_a_job_by_its_name_where_skypilots_table_cannot_be_read(
        self, sky: FakeSky, store: JobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), run_url=str(tmp_path / "run"))
        sky.prints("queue", "not JSON\n")
        SKYPILOT.cancel(record, store)
        assert sky.calls[-1] == "jobs cancel -y -n x-1"
        assert "Cancelling the job by its name 'x-1'." in caplog.text

    def test_a_log_command_that_hangs_is_ended(
        self, sky: FakeSky, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky)
        monkeypatch.setattr(module.SkyJob, "check_number", lambda job: None)
        monkeypatch.setattr(module.client, "PATIENCE", 0.2)
        (sky.folder / "bin" / "sky").write_text("#!/bin/sh\nexec tail -f /dev/null\n")
        with pytest.raises(ConfigurationError, match=r"`sky jobs logs 12 .*` printed nothing for 0\.2 s\."):
            list(SKYPILOT.lines(record, None, follow=False))

    def test_law_11_cancel_asks_no_other_run_to_stop(
        self, sky: FakeSky, store: JobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = dataclasses.replace(submitted(store, sky), run_url=str(tmp_path / "of-a-colleague"))
        sky.lists({"job_id": 12, "status": "RUNNING"})
        catalog = Catalog(Storage(record.run_url))
        attempt = catalog.attempts.begin(0.0, 0, None, {}).number
        catalog.attempts.write_progress(attempt, {"state": "training"})
        SKYPILOT.cancel(record, store)
        assert not catalog.attempts.stop_requested(attempt)
        assert "belongs to a different job or run" in caplog.text
        assert sky.calls[-1] == "jobs cancel -y 12", "its own job ends all the same"

    def test_a_log_is_read_in_a_process_with_many_open_files(
        self, sky: FakeSky, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such as `cloudtrain ui`."""
        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky)
        sky.prints("logs", "(head, rank=0, pid=12) loss 1.5\n")
        sky.lists({"job_id": 12, "status": "RUNNING"})
        start, limits = module.client.start, resource.getrlimit(resource.RLIMIT_NOFILE)

        def started(*argv: Any) -> subprocess.Popen[str]:
            process = start(*argv)
            assert process.stdout is not None
            high = fcntl.fcntl(process.stdout.fileno(), fcntl.F_DUPFD_CLOEXEC, 2000)
            process.stdout.close()
            process.stdout = os.fdopen(high)
            return process

        monkeypatch.setattr(module.client, "start", started)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
        try:
            assert list(SKYPILOT.lines(record, None, follow=False)) == ["loss 1.5"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def test_a_log_is_read_where_no_file_is_left_for_a_selector(
        self, sky: FakeSky, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error there would wait for the command, which may never end."""

        def refuse(*_: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky)
        sky.prints("logs", "(head, rank=0, pid=12) loss 1.5\n")
        sky.lists({"job_id": 12, "status": "RUNNING"})
        monkeypatch.setattr(selectors.DefaultSelector, "__init__", refuse)
        assert list(module.client.lines(SkyJob(record).logs_argv, 60.0)) == [
            "(head, rank=0, pid=12) loss 1.5"
        ]

    @pytest.mark.parametrize(
        ("lines", "command"),
        [((), "jobs cancel -y 12"), (("skypilot: {managed: false}",), "down -y x-1")],
    )
    def test_cancel_ends_a_job_without_a_training_at_once(
        self, sky: FakeSky, store: JobStore, tmp_path: Path, lines: tuple[str, ...], command: str
    ) -> None:
        sky.prints("launch", LAUNCHED)
        record = submitted(store, sky, *lines)
        sky.lists({"job_id": 12, "status": "RUNNING"})
        SKYPILOT.cancel(dataclasses.replace(record, run_url=str(tmp_path / "run")), store)
        assert store.read("x-1").state == "stopping"
        assert sky.calls[-1] == command

    @pytest.mark.parametrize("obeys", [True, False])
    def test_cancel_lets_the_run_save_first_and_ends_it_after_its_grace(
        self, sky: FakeSky, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obeys: bool
    ) -> None:
        monkeypatch.setattr(module, "MARGIN", 0.3)
        monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "60" if obeys else "0.1")
        sky.prints("launch", LAUNCHED)
        grace = f"env: {{HF_CLOUDTRAIN_GRACE: {30 if obeys else 0.1}}}"
        record = submitted(store, sky, grace, run_url=str(tmp_path / "run"))
        catalog = Catalog(Storage(record.run_url))
        attempt = catalog.attempts.begin(0.0, 0, None, {}).number
        catalog.attempts.write_progress(attempt, {"state": "training"})
        sky.lists({"job_id": 12, "status": "RUNNING"})
        calls_before_it_ended: list[str] = []

        def look(seconds: float) -> None:
            if obeys and catalog.attempts.stop_requested(attempt):
                calls_before_it_ended.extend(sky.calls)
                catalog.attempts.write_progress(attempt, {"state": "stopped"})
            assert time.monotonic() < deadline

        deadline = time.monotonic() + 20
        monkeypatch.setattr(module.time, "sleep", look)
        SKYPILOT.cancel(record, store)
        assert catalog.attempts.stop_requested(attempt)
        assert sky.calls[-1] == "jobs cancel -y 12"
        assert not any(call.startswith("jobs cancel") for call in calls_before_it_ended)
        assert bool(calls_before_it_ended) is obeys


def test_a_job_goes_through_the_command_line(
    sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cloudtrain(*argv: str) -> str:
        result = CliRunner().invoke(app, ["job", *argv])
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("print(1)\n")
    file = tmp_path / "job.yml"
    file.write_bytes(
        job_text("vm: azure-16gb-v100-4g-eastus-spot", "num_devices: 8", "run_url: s3://bucket/x")
    )
    argv = ("run", "-f", str(file), "-d", str(tmp_path / "code"), "--engine", "skypilot")
    assert "x-1 with engine skypilot: 2 nodes of 4 processes" in cloudtrain(*argv, "--dry-run")
    assert not (sky.folder / "calls").exists()
    sky.prints("launch", LAUNCHED)
    cloudtrain(*argv)
    sky.lists({"job_id": 12, "status": "RECOVERING"})
    (job,) = json.loads(cloudtrain("list", "--json"))["jobs"]
    assert (job["id"], job["state"], job["nodes"], job["nproc_per_node"]) == ("x-1", "starting", 2, 4)
    assert "restarting it on a different machine" in job["reason"]
    assert (Path(job["home"]) / "workspace" / "code" / "train.py").exists()
    sky.prints("logs", "(worker1, rank=1, pid=1, ip=10.0.0.5) hello\n")
    assert cloudtrain("logs", "x") == "[node 1] hello\n"
