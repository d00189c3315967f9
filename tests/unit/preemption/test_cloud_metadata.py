"""What the metadata services of three clouds announce, and what their malformed answers do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.preemption import cloud_metadata
from hf_cloudtrain.preemption.cloud_metadata import Azure, Ec2, Gce, Notice, cloud_sources, find_cloud
from hf_cloudtrain.preemption.sources import Source, default_sources, pending
from tests.faults.runs import wait_until
from tests.metadata import MetadataServer, Reply
from tests.servers import free_port
from tests.unit.preemption._sources import Received, watching

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as running:
        yield running


class TestEc2:
    def test_gives_no_notice_until_the_instance_is_reclaimed(self, server: MetadataServer) -> None:
        source = Ec2(server.endpoint)
        assert source.look() is None
        server.reclaim("terminate", left=120)
        assert source.look() == Notice("EC2: the instance is reclaimed (terminate)", 120.0)

    @pytest.mark.parametrize("action", ["stop", "hibernate"])
    def test_reports_every_kind_of_interruption(self, server: MetadataServer, action: str) -> None:
        server.reclaim(action, left=90)
        assert Ec2(server.endpoint).look() == Notice(f"EC2: the instance is reclaimed ({action})", 90.0)

    @pytest.mark.parametrize("hours", [-7, 7])
    def test_counts_time_by_the_clock_of_the_service(self, server: MetadataServer, hours: int) -> None:
        server.now += timedelta(hours=hours)
        server.reclaim("terminate", left=100)
        notice = Ec2(server.endpoint).look()
        assert notice is not None
        assert notice.grace == 100.0

    def test_without_the_clock_of_the_service_names_no_time(self, server: MetadataServer) -> None:
        server.dated = False
        server.reclaim("terminate", left=100)
        assert Ec2(server.endpoint).look() == Notice("EC2: the instance is reclaimed (terminate)", None)

    def test_a_time_that_has_passed_leaves_zero_seconds(self, server: MetadataServer) -> None:
        server.reclaim("terminate", left=-30)
        notice = Ec2(server.endpoint).look()
        assert notice is not None
        assert notice.grace == 0.0

    @pytest.mark.parametrize("time", [None, "", "soon", 12, "9999-12-31T23:59:59Z"])
    def test_a_time_that_makes_no_sense_is_ignored_but_the_notice_counts(
        self, server: MetadataServer, time: Any
    ) -> None:
        server.action = {"action": "terminate", "time": time}
        assert Ec2(server.endpoint).look() == Notice("EC2: the instance is reclaimed (terminate)", None)

    def test_requests_one_token_and_a_new_one_when_it_has_expired(self, server: MetadataServer) -> None:
        source = Ec2(server.endpoint)
        assert [source.look() for _ in range(3)] == [None] * 3
        assert [status for method, _, status in server.asked if method == "PUT"] == [200]
        server.tokens.clear()
        server.reclaim("terminate", left=60)
        assert source.look() is not None
        assert [status for _, _, status in server.asked[-3:]] == [401, 200, 200]

    def test_keeps_the_path_of_the_endpoint_in_front_of_its_own(self, server: MetadataServer) -> None:
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
        ("event", "reported"),
        [("NONE", False), ("MIGRATE_ON_HOST_MAINTENANCE", False), ("TERMINATE_ON_HOST_MAINTENANCE", True)],
    )
    def test_reports_maintenance_that_the_instance_does_not_survive(
        self, server: MetadataServer, event: str, reported: bool
    ) -> None:
        server.values["maintenance-event"] = event
        notice = Gce(server.endpoint).look()
        assert (notice is not None) == reported
        assert notice is None or notice == Notice(
            "GCE: the instance is stopped for maintenance of its host", 59.0
        )

    def test_a_service_without_these_keys_gives_no_notice(self, server: MetadataServer) -> None:
        server.values.clear()
        assert Gce(server.endpoint).look() is None

    def test_an_answer_of_another_service_is_not_a_notice(self, server: MetadataServer) -> None:
        server.instead = Reply(200, "TRUE")
        with pytest.raises(ValueError, match="not an answer of Google"):
            Gce(server.endpoint).look()


class TestAzure:
    def test_gives_no_notice_until_the_machine_is_evicted(self, server: MetadataServer) -> None:
        source = Azure(server.endpoint)
        assert source.look() is None
        server.schedule("Preempt", "worker_1", "WORKER_3", left=30)
        assert source.look() == Notice("Azure: the machine is evicted (Preempt)", 30.0)

    def test_reports_that_the_machine_is_deleted(self, server: MetadataServer) -> None:
        server.schedule("Terminate", "worker_3", left=300)
        notice = Azure(server.endpoint).look()
        assert notice == Notice("Azure: the machine is deleted (Terminate)", 300.0)

    @pytest.mark.parametrize("kind", ["Freeze", "Reboot", "Redeploy", None, ["Preempt"]])
    def test_any_other_event_gives_no_notice(self, server: MetadataServer, kind: Any) -> None:
        server.schedule(kind, "worker_3", left=30)
        assert Azure(server.endpoint).look() is None

    def test_an_event_of_another_machine_of_the_set_gives_no_notice(self, server: MetadataServer) -> None:
        server.schedule("Preempt", "worker_1", "worker_33", left=30)
        source = Azure(server.endpoint)
        assert source.look() is None
        server.schedule("Preempt", "worker_3", left=30)
        assert source.look() is not None
        names = [path for _, path, _ in server.asked if path.endswith("/name")]
        assert len(names) == 1, "the name of a machine does not change"

    def test_an_event_that_has_begun_names_no_time(self, server: MetadataServer) -> None:
        server.schedule("Preempt", "worker_3")
        assert Azure(server.endpoint).look() == Notice("Azure: the machine is evicted (Preempt)", None)

    @pytest.mark.parametrize("hours", [-7, 7])
    def test_counts_time_by_the_clock_of_the_service(self, server: MetadataServer, hours: int) -> None:
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
    def test_a_malformed_answer_gives_no_notice_and_the_next_good_one_does(
        self, server: MetadataServer, cloud: Callable[[str], Source], reply: Reply
    ) -> None:
        server.instead = reply
        source = cloud(server.endpoint)
        assert pending([source]) is None
        assert server.asked
        server.instead = None
        give_every_notice(server)
        assert pending([source]) is not None

    @ALL_CLOUDS
    def test_an_endpoint_that_does_not_answer_gives_no_notice(self, cloud: Callable[[str], Source]) -> None:
        assert pending([cloud(f"http://127.0.0.1:{free_port()}")]) is None
        assert pending([cloud("https://127.0.0.1"), cloud("metadata"), cloud("http://127.0.0.1:x")]) is None

    @ALL_CLOUDS
    def test_a_request_that_hangs_times_out_and_the_next_look_asks_again(
        self,
        server: MetadataServer,
        cloud: Callable[[str], Source],
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
    def test_a_proxy_of_the_environment_is_not_used(
        self,
        server: MetadataServer,
        cloud: Callable[[str], Source],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
        give_every_notice(server)
        assert cloud(server.endpoint).look() is not None

    def test_an_endless_answer_is_cut_off(self, server: MetadataServer) -> None:
        server.instead = Reply(200, " " * 2 * cloud_metadata.MAX_ANSWER + '{"Events": []}')
        with pytest.raises(ValueError, match="Expecting value"):
            Azure(server.endpoint).look()

    def test_trouble_is_logged_once(self, server: MetadataServer, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "hf_cloudtrain")
        server.instead = Reply(500)
        source = Azure(server.endpoint)
        source.pause = 0.0
        with watching(source, on_notice=Received()):
            wait_until(lambda: len(server.asked) > 3, "some more questions")
        assert [(record.levelname, "answers 500" in record.message) for record in caplog.records] == [
            ("DEBUG", True)
        ]


def give_every_notice(server: MetadataServer) -> None:
    server.reclaim("terminate", left=60)
    server.values["preempted"] = "TRUE"
    server.schedule("Preempt", server.name, left=60)


class TestWhichCloud:
    """It is known from the firmware; on a machine outside these clouds no request is sent."""

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
    def test_is_known_from_the_firmware(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], cloud: type | None
    ) -> None:
        monkeypatch.delenv(env.CLOUD_NOTICES)
        monkeypatch.delenv(env.EC2_DISABLED)
        for name, value in facts.items():
            (tmp_path / name).write_text(f"{value}\n")
        assert [type(source) for source in cloud_sources(tmp_path)] == ([cloud] if cloud else [])

    def test_a_machine_whose_firmware_facts_are_hidden_is_outside_every_cloud(self, tmp_path: Path) -> None:
        (tmp_path / "sys_vendor").mkdir()
        assert find_cloud(tmp_path) is None
        assert find_cloud(tmp_path / "none") is None

    @pytest.mark.parametrize(
        ("named", "found"), [("ec2", [Ec2]), ("GCE", [Gce]), ("azure", [Azure]), ("off", []), ("", [Ec2])]
    )
    def test_the_environment_can_name_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, found: list[type]
    ) -> None:
        monkeypatch.delenv(env.EC2_DISABLED)
        monkeypatch.setenv(env.CLOUD_NOTICES, named)
        (tmp_path / "sys_vendor").write_text("Amazon EC2")
        assert [type(source) for source in cloud_sources(tmp_path)] == found

    def test_an_unknown_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.CLOUD_NOTICES, "aws")
        with pytest.raises(ConfigurationError, match="'aws' must be one of: auto, off, ec2, gce, azure"):
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

    def test_the_default_endpoints_are_those_of_the_clouds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(env.EC2_DISABLED)
        assert (env.ec2_endpoint(), env.gce_endpoint()) == ("http://169.254.169.254",) * 2
