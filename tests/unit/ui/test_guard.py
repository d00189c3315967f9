"""Who gets an answer: hosts, origins, the token; and what a page may load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.ui.guard import Guard
from tests.recorded import BEGAN, record_attempt
from tests.served import Served

TOKEN = "a-token-of-24-characters"
PATHS = ("/api/stream/runs", "/api/details?id=0/mnli", "/")
EVERYWHERE = "0.0.0.0"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_cloudtrain.ui.app.GUESS_SECONDS", 0.0)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    catalog = Catalog(Storage(f"{tmp_path}/runs/mnli"))
    record_attempt(catalog, began=BEGAN, steps=range(1, 61), state="finished")


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Served]:
    """As `cloudtrain ui` serves it on this machine."""
    with Served([str(tmp_path / "runs")]) as served:
        yield served


@pytest.fixture
def closed_page(tmp_path: Path) -> Iterator[Served]:
    """As `cloudtrain ui --host 0.0.0.0 --actions` serves it."""
    with Served([str(tmp_path / "runs")], TOKEN, host=EVERYWHERE, reading=True, may_act=True) as served:
        yield served


class TestHosts:
    """DNS may lead any name to this machine; the page answers to its own only."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::"]
    )
    def test_a_foreign_host_is_refused(self, open_page: Served, path: str, host: str) -> None:
        status, _, text = open_page.ask(path, Host=host)
        assert status in (400, 403)  # h11 refuses some of them itself
        assert "mnli" not in text

    def test_the_refusal_says_what_to_do(self, open_page: Served) -> None:
        _, _, text = open_page.ask("/", Host="evil.example")
        assert "'evil.example' is not this server's" in text
        assert "--host" in text

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:8620"])
    def test_names_of_this_machine_are_answered_through_a_forwarded_port_too(
        self, open_page: Served, host: str
    ) -> None:
        assert open_page.ask("/", Host=host)[0] == 200

    def test_an_address_of_a_network_is_answered_only_where_the_page_listens_to_it(
        self, open_page: Served, closed_page: Served
    ) -> None:
        assert open_page.ask("/", Host="10.0.0.7")[0] == 403
        assert closed_page.ask("/", Host="10.0.0.7")[0] == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://[evil"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ],
    )
    def test_a_foreign_origin_is_refused(self, open_page: Served, headers: dict[str, str]) -> None:
        status, _, text = open_page.ask("/api/stream/runs", **headers)
        assert status == 403
        assert "not answered" in text

    def test_the_own_origin_is_answered(self, open_page: Served) -> None:
        host = f"127.0.0.1:{open_page.port}"
        headers = {"Host": host, "Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
        assert open_page.ask("/api/session", **headers)[0] == 200


class TestToken:
    """Reading needs it where other machines reach the page, and actions need it everywhere."""

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Cookie": f"cloudtrain={TOKEN}"},
            {"Cookie": "=;;\x80"},
        ],
    )
    @pytest.mark.parametrize("path", PATHS[:2])
    def test_without_it_nothing_from_storage_is_answered(
        self, closed_page: Served, path: str, headers: dict[str, str]
    ) -> None:
        status, _, text = closed_page.ask(path, **headers)
        assert status == 401
        assert text == (
            "The token is missing or wrong. `cloudtrain ui` printed it with the address of the page."
        )

    def test_the_page_itself_holds_nothing_from_storage(self, closed_page: Served) -> None:
        status, _, text = closed_page.ask("/")
        assert status == 200
        assert "mnli" not in text
        assert TOKEN not in text

    def test_a_browser_gets_a_cookie_for_it(self, closed_page: Served) -> None:
        status, headers, _ = closed_page.ask("/api/session", {"token": TOKEN})
        assert status == 204
        cookie, *rules = headers["set-cookie"].split("; ")
        assert rules == ["Path=/", "HttpOnly", "SameSite=Strict"]
        assert TOKEN not in cookie
        assert "mnli" in str(closed_page.first("runs", Cookie=cookie)["runs"])
        assert closed_page.ask("/api/session", Cookie=cookie)[2] == '{"read":true,"act":true,"actions":true}'

    @pytest.mark.parametrize("token", ["", "wrong", None, 7, TOKEN + "x", "\x00", "\ud800" * 16])
    def test_a_wrong_one_gets_none(self, closed_page: Served, token: object) -> None:
        status, headers, text = closed_page.ask("/api/session", {"token": token})
        assert status == 401
        assert text == '{"error":"The token is wrong."}'
        assert "set-cookie" not in headers

    def test_a_short_one_is_refused_at_the_start(self) -> None:
        with pytest.raises(ConfigurationError, match="has 5 characters"):
            Guard("127.0.0.1", "12345", reading=True, policy="")

    def test_actions_need_it_on_this_machine_too(self, tmp_path: Path) -> None:
        stop = {"action": "stop", "run": "0/mnli"}
        with Served([str(tmp_path / "runs")], TOKEN, may_act=True) as served:
            assert served.first("runs")["runs"]["0/mnli"]["state"] == "finished"
            assert served.ask("/api/act", stop)[0] == 401
            status, _, text = served.ask("/api/act", stop, Authorization=f"Bearer {TOKEN}")
        assert status == 400
        assert "attempt 1 finished" in text

    def test_without_actions_no_token_helps(self, open_page: Served, tmp_path: Path) -> None:
        given = {"Authorization": f"Bearer {TOKEN}"}
        assert open_page.ask("/api/act", {"action": "stop"}, **given)[0] == 401
        with Served([str(tmp_path / "runs")], TOKEN, reading=True) as served:
            status, _, text = served.ask("/api/act", {"action": "stop"}, **given)
        assert status == 403
        assert "--actions" in text


class TestHeaders:
    """Every answer forbids what the page does not need."""

    @pytest.mark.parametrize("path", [*PATHS[1:], "/static/page.js", "/nothing", "/static/..%2Fapp.py"])
    def test_the_policy_allows_our_own_files_only(self, open_page: Served, path: str) -> None:
        _, headers, text = open_page.ask(path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self' 'sha256-" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "import annotations" not in text

    def test_a_refusal_has_them_too(self, open_page: Served) -> None:
        assert "content-security-policy" in open_page.ask("/", Host="evil.example")[1]
