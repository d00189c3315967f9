"""Who may stop a training, signals aside: what each source says, and that none of them keeps another from being heard."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import ConfigurationError, StorageUnavailableError
from hf_cloudtrain.preemption import cloud_metadata
from hf_cloudtrain.preemption import sources as preemption_sources
from hf_cloudtrain.preemption.cloud_metadata import Azure, Ec2, Gce, Notice, cloud_sources, find_cloud
from hf_cloudtrain.preemption.sources import NoticeWatcher, StopFile, StopRequest, default_sources, pending
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import wait_until
from tests.metadata import MetadataServer, Reply
from tests.servers import Server, free_port

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as running:
        yield running


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question to a real metadata service would hang here, and be answered on CI's machines."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET:
            assert address[0] == "127.0.0.1"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


class Silent:
    """Never gives notice; counts how often it was looked at."""

    pause = 0.01

    def __init__(self) -> None:
        self.looks = 0

    def look(self) -> Notice | None:
        self.looks += 1
        return None


class Hung(Silent):
    """Does not answer until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def look(self) -> Notice | None:
        self.go_on.wait()
        return super().look()


class Heard:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def __call__(self, notice: Notice) -> None:
        self.notices.append(notice)


@contextlib.contextmanager
def watching(
    *sources: preemption_sources.Source, on_notice: Callable[[Notice], None]
) -> Iterator[NoticeWatcher]:
    watcher = NoticeWatcher(sources, on_notice)
    watcher.start()
    try:
        yield watcher
    finally:
        watcher.close()


class TestEc2:
    def test_gives_no_notice_until_the_instance_is_reclaimed(self, server: MetadataServer) -> None:
        source = Ec2(server.endpoint)
        assert source.look() is None
        server.reclaim("terminate", left=120)
        assert source.look() == Notice("EC2: the instance is reclaimed (terminate)", 120.0)

    @pytest.mark.parametrize("action", ["stop", "hibernate"])
    def test_hears_of_every_kind_of_interruption(self, server: MetadataServer, action: str) -> None:
        server.reclaim(action, left=90)
        assert Ec2(server.endpoint).look() == Notice(f"EC2: the instance is reclaimed ({action})", 90.0)

    @pytest.mark.parametrize("hours", [-7, 7])
    def test_counts_by_the_clock_of_the_service(self, server: MetadataServer, hours: int) -> None:
        server.now += timedelta(hours=hours)
        server.reclaim("terminate", left=100)
        notice = Ec2(server.endpoint).look()
        assert notice is not None
        assert notice.grace == 100.0

    def test_without_the_clock_of_the_service_says_no_time(self, server: MetadataServer) -> None:
        server.dated = False
        server.reclaim("terminate", left=100)
        assert Ec2(server.endpoint).look() == Notice("EC2: the instance is reclaimed (terminate)", None)

    def test_a_time_that_has_passed_leaves_none(self, server: MetadataServer) -> None:
        server.reclaim("terminate", left=-30)
        notice = Ec2(server.endpoint).look()
        assert notice is not None
        assert notice.grace == 0.0

    @pytest.mark.parametrize("time", [None, "", "soon", 12, "9999-12-31T23:59:59Z"])
    def test_a_time_that_makes_no_sense_is_no_time_but_a_notice(
        self, server: MetadataServer, time: Any
    ) -> None:
        server.action = {"action": "terminate", "time": time}
        assert Ec2(server.endpoint).look() == Notice("EC2: the instance is reclaimed (terminate)", None)

    def test_asks_for_one_token_and_for_another_when_that_is_too_old(self, server: MetadataServer) -> None:
        source = Ec2(server.endpoint)
        assert [source.look() for _ in range(3)] == [None] * 3
        assert [status for method, _, status in server.asked if method == "PUT"] == [200]
        server.tokens.clear()
        server.reclaim("terminate", left=60)
        assert source.look() is not None
        assert [status for _, _, status in server.asked[-3:]] == [401, 200, 200]

    def test_has_a_prefix_of_the_endpoint_before_its_paths(self, server: MetadataServer) -> None:
        server.instead = Reply(404)
        with pytest.raises(ValueError, match="answers 404"):
            Ec2(f"{server.endpoint}/ec2/").look()
        assert server.asked == [("PUT", "/ec2/latest/api/token", 404)]


class TestGce:
    def test_gives_no_notice_until_the_instance_is_preempted(self, server: MetadataServer) -> None:
        source = Gce(server.endpoint)
        assert source.look() is None
        server.values["preempted"] = "TRUE"
        assert source.look() == Notice("GCE: the instance is preempted", 29.0)

    @pytest.mark.parametrize(
        ("event", "heard"),
        [("NONE", False), ("MIGRATE_ON_HOST_MAINTENANCE", False), ("TERMINATE_ON_HOST_MAINTENANCE", True)],
    )
    def test_hears_of_maintenance_that_the_instance_does_not_survive(
        self, server: MetadataServer, event: str, heard: bool
    ) -> None:
        server.values["maintenance-event"] = event
        notice = Gce(server.endpoint).look()
        assert (notice is not None) == heard
        assert notice is None or notice == Notice(
            "GCE: the instance is stopped for maintenance of its host", 59.0
        )

    def test_a_service_without_these_keys_gives_no_notice(self, server: MetadataServer) -> None:
        server.values.clear()
        assert Gce(server.endpoint).look() is None

    def test_whoever_else_answers_there_is_not_believed(self, server: MetadataServer) -> None:
        server.instead = Reply(200, "TRUE")
        with pytest.raises(ValueError, match="no answer of Google"):
            Gce(server.endpoint).look()


class TestAzure:
    def test_gives_no_notice_until_the_machine_is_evicted(self, server: MetadataServer) -> None:
        source = Azure(server.endpoint)
        assert source.look() is None
        server.schedule("Preempt", "worker_1", "WORKER_3", left=30)
        assert source.look() == Notice("Azure: the machine is evicted (Preempt)", 30.0)

    def test_hears_that_the_machine_is_deleted(self, server: MetadataServer) -> None:
        server.schedule("Terminate", "worker_3", left=300)
        notice = Azure(server.endpoint).look()
        assert notice == Notice("Azure: the machine is deleted (Terminate)", 300.0)

    @pytest.mark.parametrize("kind", ["Freeze", "Reboot", "Redeploy", None, ["Preempt"]])
    def test_anything_else_is_no_notice(self, server: MetadataServer, kind: Any) -> None:
        server.schedule(kind, "worker_3", left=30)
        assert Azure(server.endpoint).look() is None

    def test_what_happens_to_another_machine_of_the_set_is_no_notice(self, server: MetadataServer) -> None:
        server.schedule("Preempt", "worker_1", "worker_33", left=30)
        source = Azure(server.endpoint)
        assert source.look() is None
        server.schedule("Preempt", "worker_3", left=30)
        assert source.look() is not None
        names = [path for _, path, _ in server.asked if path.endswith("/name")]
        assert len(names) == 1, "the name of a machine does not change"

    def test_an_event_that_has_begun_says_no_time(self, server: MetadataServer) -> None:
        server.schedule("Preempt", "worker_3")
        assert Azure(server.endpoint).look() == Notice("Azure: the machine is evicted (Preempt)", None)

    @pytest.mark.parametrize("hours", [-7, 7])
    def test_counts_by_the_clock_of_the_service(self, server: MetadataServer, hours: int) -> None:
        server.now += timedelta(hours=hours)
        server.schedule("Preempt", "worker_3", left=30)
        notice = Azure(server.endpoint).look()
        assert notice is not None
        assert notice.grace == 30.0


ALL_CLOUDS = pytest.mark.parametrize("cloud", [Ec2, Gce, Azure])


class TestTrouble:
    @ALL_CLOUDS
    @pytest.mark.parametrize(
        "reply",
        [
            Reply(500, "boom"),
            Reply(429),
            Reply(200, "<html>Welcome to the hotel</html>"),
            Reply(200, "null"),
            Reply(200, '{"action": ["\\u001b"], "Events": 3}'),
            Reply(200, '{"action": "\\u001b[31m", "Events": [{"EventType": "Preempt"}]}'),
            Reply(302, "", {"Location": "http://192.0.2.1/"}),
        ],
        ids=["500", "429", "portal", "null", "types", "fields", "redirect"],
    )
    def test_an_answer_that_is_none_is_no_notice_and_the_next_one_is_heard(
        self, server: MetadataServer, cloud: Callable[[str], preemption_sources.Source], reply: Reply
    ) -> None:
        server.instead = reply
        source = cloud(server.endpoint)
        assert pending([source]) is None
        assert server.asked
        server.instead = None
        give_every_notice(server)
        assert pending([source]) is not None

    @ALL_CLOUDS
    def test_nobody_there_is_no_notice(self, cloud: Callable[[str], preemption_sources.Source]) -> None:
        assert pending([cloud(f"http://127.0.0.1:{free_port()}")]) is None
        assert pending([cloud("https://127.0.0.1"), cloud("metadata"), cloud("http://127.0.0.1:x")]) is None

    @ALL_CLOUDS
    def test_a_service_that_hangs_is_given_up_and_asked_again(
        self,
        server: MetadataServer,
        cloud: Callable[[str], preemption_sources.Source],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        server.hang()
        source = cloud(server.endpoint)
        with monkeypatch.context() as impatient:
            impatient.setattr(cloud_metadata, "TIMEOUT", 0.1)
            with pytest.raises(TimeoutError):
                source.look()
        server.go_on()
        give_every_notice(server)
        assert source.look() is not None

    @ALL_CLOUDS
    def test_a_proxy_of_the_environment_is_not_asked(
        self,
        server: MetadataServer,
        cloud: Callable[[str], preemption_sources.Source],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
        give_every_notice(server)
        assert cloud(server.endpoint).look() is not None

    def test_an_endless_answer_is_not_read_to_its_end(self, server: MetadataServer) -> None:
        server.instead = Reply(200, " " * 2 * cloud_metadata.MAX_ANSWER + '{"Events": []}')
        with pytest.raises(ValueError, match="Expecting value"):
            Azure(server.endpoint).look()

    def test_is_told_once(self, server: MetadataServer, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "hf_cloudtrain")
        server.instead = Reply(500)
        source = Azure(server.endpoint)
        source.pause = 0.0
        with watching(source, on_notice=Heard()):
            wait_until(lambda: len(server.asked) > 3, "some more questions")
        assert [(record.levelname, "answers 500" in record.message) for record in caplog.records] == [
            ("DEBUG", True)
        ]


def give_every_notice(server: MetadataServer) -> None:
    server.reclaim("terminate", left=60)
    server.values["preempted"] = "TRUE"
    server.schedule("Preempt", server.name, left=60)


class TestWhichCloud:
    """By what the firmware says; nobody is asked on a machine that is in none."""

    @pytest.mark.parametrize(
        ("facts", "cloud"),
        [
            ({}, None),
            ({"sys_vendor": "Amazon EC2", "product_name": "p4d.24xlarge"}, Ec2),
            ({"sys_vendor": "Xen", "bios_version": "4.11.amazon"}, Ec2),
            ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, Gce),
            ({"sys_vendor": "Google", "product_name": "Eve"}, None),
            ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE_TAG}, Azure),
            ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, None),
            ({"sys_vendor": "LENOVO", "product_name": "20XW"}, None),
        ],
        ids=str,
    )
    def test_is_known_by_its_machines(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], cloud: type | None
    ) -> None:
        monkeypatch.delenv(env.CLOUD_NOTICES)
        monkeypatch.delenv(env.EC2_DISABLED)
        for name, value in facts.items():
            (tmp_path / name).write_text(f"{value}\n")
        assert [type(source) for source in cloud_sources(tmp_path)] == ([cloud] if cloud else [])

    def test_a_machine_that_hides_what_it_is_is_in_none(self, tmp_path: Path) -> None:
        (tmp_path / "sys_vendor").mkdir()
        assert find_cloud(tmp_path) is None
        assert find_cloud(tmp_path / "none") is None

    @pytest.mark.parametrize(
        ("named", "found"), [("ec2", [Ec2]), ("GCE", [Gce]), ("azure", [Azure]), ("off", []), ("", [Ec2])]
    )
    def test_is_what_the_environment_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, found: list[type]
    ) -> None:
        monkeypatch.delenv(env.EC2_DISABLED)
        monkeypatch.setenv(env.CLOUD_NOTICES, named)
        (tmp_path / "sys_vendor").write_text("Amazon EC2")
        assert [type(source) for source in cloud_sources(tmp_path)] == found

    def test_of_another_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.CLOUD_NOTICES, "aws")
        with pytest.raises(ConfigurationError, match="'aws' is none of auto, off, ec2, gce and azure"):
            default_sources()

    def test_aws_s_own_variables_are_honoured(
        self, server: MetadataServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(env.CLOUD_NOTICES, "ec2")
        monkeypatch.setenv(env.EC2_ENDPOINT, server.endpoint)
        monkeypatch.setenv(env.EC2_DISABLED, "True")
        assert cloud_sources() == []
        monkeypatch.setenv(env.EC2_DISABLED, "false")
        server.reclaim("terminate", left=60)
        assert pending(cloud_sources()) is not None

    def test_google_s_own_variable_is_honoured(
        self, server: MetadataServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(env.CLOUD_NOTICES, "gce")
        monkeypatch.setenv(env.GCE_HOST, server.endpoint.removeprefix("http://"))
        server.values["preempted"] = "TRUE"
        assert pending(cloud_sources()) is not None

    def test_without_these_the_services_are_where_the_clouds_have_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(env.EC2_DISABLED)
        assert (env.ec2_endpoint(), env.gce_endpoint()) == ("http://169.254.169.254",) * 2


class TestStopFile:
    def test_gives_notice_when_it_appears(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "stop"
        monkeypatch.setenv(env.STOP_FILE, str(path))
        sources = default_sources()
        heard = Heard()
        for source in sources:
            source.pause = 0.01
        with watching(*sources, on_notice=heard):
            path.touch()
            wait_until(lambda: heard.notices, "the notice")
        assert heard.notices == [Notice(f"the file {str(path)!r}", None)]

    def test_that_nobody_named_is_not_looked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.STOP_FILE, "")
        assert default_sources() == []


class TestStopRequest:
    def begin(self, catalog: Catalog) -> int:
        return catalog.begin_attempt(0.0, 0, None, {}).number

    def test_stops_the_attempt_that_is_the_newest_then(self, catalog: Catalog) -> None:
        attempt = self.begin(catalog)
        source = StopRequest(catalog, attempt)
        assert source.look() is None
        assert catalog.request_stop(1.8e9, {"user": "ada"}) == 1
        assert source.look() == Notice("`cloudtrain run stop` for attempt 1", None)

    def test_stops_an_overtaken_attempt_too(self, catalog: Catalog) -> None:
        old, _ = self.begin(catalog), self.begin(catalog)
        catalog.request_stop(1.8e9, {})
        assert StopRequest(catalog, old).look() is not None

    def test_lets_an_attempt_train_that_a_person_starts_after_it(self, catalog: Catalog) -> None:
        self.begin(catalog)
        catalog.request_stop(1.8e9, {})
        assert pending(default_sources(catalog)) is None
        assert StopRequest(catalog, self.begin(catalog)).look() is None

    def test_keeps_the_launcher_from_starting_the_same_again(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert pending(default_sources(catalog)) is None, "there is no attempt yet"
        self.begin(catalog)
        assert pending(default_sources(catalog)) is None
        catalog.request_stop(1.8e9, {})
        assert pending(default_sources(catalog)) == Notice("`cloudtrain run stop` for attempt 1", None)
        self.begin(catalog)  # by hand, and this one crashes: the launcher may start it again
        assert pending(default_sources(catalog)) is None

    def test_of_a_run_that_never_began_is_none(self, catalog: Catalog) -> None:
        assert catalog.request_stop(1.8e9, {}) is None
        assert catalog.storage.list("") == []

    def test_says_who_and_when(self, catalog: Catalog) -> None:
        self.begin(catalog)
        catalog.request_stop(1.8e9, {"user": "ada", "attempt": "99"})
        record = json.loads(catalog.storage.read(".cloudtrain/stop.json"))
        assert record == {"user": "ada", "attempt": 1, "time": 1.8e9}

    @pytest.mark.parametrize(
        "record", ["", "{", "[]", '{"attempt": "1"}', '{"attempt": true}', '{"attempt": 1.5}', "{}"]
    )
    def test_that_is_damaged_stops_nothing(self, catalog: Catalog, record: str) -> None:
        self.begin(catalog)
        catalog.storage.write(".cloudtrain/stop.json", record.encode())
        assert not catalog.stop_requested(1)

    def test_is_looked_for_at_every_heartbeat(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert StopRequest(catalog, 1).pause == 15.0
        monkeypatch.setenv(env.HEARTBEAT, "3")
        assert StopRequest(catalog, 1).pause == 3.0

    def test_trouble_with_the_storage_is_no_notice_and_the_next_look_hears(
        self, tmp_path: Path, no_pauses: None
    ) -> None:
        faulty = FaultyStorage(f"file://{tmp_path / 'run'}")
        catalog = Catalog(faulty)
        self.begin(catalog)
        catalog.request_stop(1.8e9, {})
        faulty.fail("read", times=1000)
        source = StopRequest(catalog, 1)
        with pytest.raises(StorageUnavailableError):
            source.look()
        assert pending([source]) is None
        faulty.heal()
        assert pending([source]) is not None

    def test_reaches_a_run_on_s3(self, moto: Server) -> None:
        storage = Storage(f"s3://{moto.bucket}/notices/run", moto.storage_options)
        catalog = Catalog(storage)
        attempt = self.begin(catalog)
        source = StopRequest(catalog, attempt)
        assert source.look() is None
        another = Catalog(Storage(storage.url, moto.storage_options))
        another.request_stop(1.8e9, {})
        assert source.look() is not None


class TestWatcher:
    def test_tells_the_first_notice_once_and_looks_no_more(self, tmp_path: Path) -> None:
        (tmp_path / "one").touch()
        (tmp_path / "two").touch()
        heard, silent = Heard(), Silent()
        sources = [StopFile(str(tmp_path / "one")), StopFile(str(tmp_path / "two")), silent]
        watcher = NoticeWatcher(sources, heard)
        watcher.start()
        for thread in watcher._threads:
            thread.join(60)
        assert len(heard.notices) == 1
        assert not any(thread.is_alive() for thread in watcher._threads)

    def test_hears_one_source_while_another_hangs(self, tmp_path: Path) -> None:
        heard, hung = Heard(), Hung()
        path = tmp_path / "stop"
        source = StopFile(str(path))
        source.pause = 0.01
        with watching(hung, source, on_notice=heard):
            path.touch()
            wait_until(lambda: heard.notices, "the notice of the file")
            assert hung.looks == 0
            hung.go_on.set()

    def test_looks_at_each_source_at_its_own_pace(self) -> None:
        eager, patient = Silent(), Silent()
        patient.pause = 3600.0
        with watching(eager, patient, on_notice=Heard()):
            wait_until(lambda: eager.looks > 20 and patient.looks, "many looks at one of them")
            assert patient.looks == 1

    def test_goes_on_after_a_source_that_raised(self) -> None:
        class Broken(Silent):
            def look(self) -> Notice | None:
                super().look()
                raise ZeroDivisionError

        broken = Broken()
        with watching(broken, on_notice=Heard()):
            wait_until(lambda: broken.looks > 2, "more looks at it")

    def test_closed_tells_nothing_more(self) -> None:
        class Late(Hung):
            def look(self) -> Notice | None:
                super().look()
                return Notice("late")

        heard, late = Heard(), Late()
        watcher = NoticeWatcher([late], heard)
        watcher.start()
        closing = threading.Thread(target=watcher.close)
        closing.start()
        wait_until(watcher._over.is_set, "the begin of the end")
        late.go_on.set()
        closing.join()
        assert late.looks == 1, "close waits for a look under way"
        assert heard.notices == []

    def test_is_closed_at_once_though_the_next_look_is_far(self) -> None:
        silent = Silent()
        silent.pause = 3600.0
        with watching(silent, on_notice=Heard()) as watcher:
            wait_until(lambda: silent.looks, "the first look")
        assert not any(thread.is_alive() for thread in watcher._threads)

    def test_may_be_closed_by_whoever_hears(self, tmp_path: Path) -> None:
        heard: list[Notice] = []

        def hear(notice: Notice) -> None:
            watcher.close()
            heard.append(notice)

        watcher = NoticeWatcher([StopFile(str(tmp_path))], hear)
        watcher.start()
        wait_until(lambda: heard, "the notice")

    def test_neither_outlives_its_process_nor_enters_a_forked_child(self) -> None:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", HUNG], capture_output=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"0", b"")


HUNG = """
import os, sys, threading
from hf_cloudtrain.preemption import sources
sources.CLOSE_SECONDS = 0.1
class Hung:
    pause = 1
    def look(self): threading.Event().wait()
watcher = sources.NoticeWatcher([Hung()], print)
watcher.start()
child = os.fork()
if child == 0:
    watcher.close()
    os._exit(threading.active_count() - 1)
sys.stdout.write(str(os.waitpid(child, 0)[1]))
"""


class TestPending:
    def test_is_the_notice_that_stands(self, tmp_path: Path) -> None:
        assert pending([Silent(), StopFile(str(tmp_path))]) == Notice(f"the file {str(tmp_path)!r}")

    def test_is_none_where_nobody_gives_notice(self) -> None:
        silent = Silent()
        assert pending([silent]) is None
        assert silent.looks == 1
        assert pending([]) is None

    def test_does_not_wait_for_a_source_that_hangs(self, tmp_path: Path) -> None:
        hung = Hung()
        assert pending([hung, StopFile(str(tmp_path))]) is not None
        assert pending([hung, Silent()], seconds=0.05) is None
        hung.go_on.set()
