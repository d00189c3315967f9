"""Folders at a job's paths: seen by the job, never on the machine, and the command is as if nothing were between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.node import mounts
from hf_cloudtrain.jobs.node.mounts import Mount, argv, check, docker_argv, has_docker, link

IS_ROOT = os.geteuid() == 0
NOBODY = 65534
ORDINARY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-sys_admin"),
    # The interpreter may be in root's home: it may be read there, and nothing else.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
PATIENCE = 20.0

needs_root = pytest.mark.skipif(not IS_ROOT, reason="an ordinary user may not")


@pytest.fixture
def namespaces() -> None:
    if not unshares("--mount") and not unshares("--user", "--map-root-user", "--mount"):
        pytest.skip("this machine allows no namespaces")
    assert mounts._problem(mounts._NAMESPACE_PROBE) is None


def unshares(*options: str, before: Sequence[str] = ()) -> bool:
    """Whether the machine allows it, asked of somebody else than what is tested."""
    command = [*before, "unshare", *options, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(
    params=[
        pytest.param((), id="as_is"),
        pytest.param(ORDINARY, id="ordinary_user", marks=needs_root),
        pytest.param("bwrap", id="bubblewrap"),
    ]
)
def user(
    request: pytest.FixtureRequest, namespaces: None, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """What stands before the words: with root's rights or without, in a namespace of ours or in bubblewrap."""
    if request.param == "bwrap":
        if shutil.which("bwrap") is None:
            pytest.skip("bubblewrap is not installed")
        monkeypatch.setattr(mounts, "_NAMESPACE_PROBE", ("false",))
        return ()
    if request.param and not unshares("--user", "--map-root-user", "--mount", before=ORDINARY):
        pytest.skip("this machine allows no user namespaces")
    return tuple(request.param)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter; pytest's own are for one alone."""
    with tempfile.TemporaryDirectory(prefix="cloudtrain-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def sources(open_folder: Path) -> dict[str, Path]:
    found = {}
    for name in ("workspace", "data", "ckpt"):
        found[name] = open_folder / name
        found[name].mkdir()
        found[name].chmod(0o777)
        (found[name] / f"of_{name}").write_text(name)
    (found["ckpt"] / "of_ckpt").unlink()
    return found


@pytest.fixture
def free() -> str:
    """A path of the root that no machine has."""
    path = f"/cloudtrain-test-{os.getpid()}"
    assert not os.path.lexists(path)
    return path


@pytest.fixture
def host_stays_as_it_is() -> Iterator[None]:
    before = host()
    yield
    assert host() == before


def host() -> tuple[list[str], str]:
    return sorted(os.listdir("/")), Path("/proc/self/mountinfo").read_text()


def bash(text: str) -> list[str]:
    return ["bash", "-c", text]


def said(command: Sequence[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("host_stays_as_it_is")
class TestWords:
    """What a job sees, and what is left of it."""

    def test_a_job_sees_each_folder_at_its_path(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        wanted = [  # in any order
            Mount(sources["ckpt"], f"{free}/ckpt"),
            Mount(sources["workspace"], free),
            Mount(sources["data"], f"{free}-data/mnli", read_only=True),
        ]
        text = f"pwd; echo *; cat {free}-data/mnli/*; echo x > ckpt/new; touch {free}-data/mnli/new || echo refused"
        seen = said([*user, *argv(wanted, bash(text), cwd=free)])
        assert seen.split() == [free, "ckpt", "of_workspace", "datarefused"]
        assert (sources["ckpt"] / "new").read_text() == "x\n"
        assert not os.path.lexists(free)

    def test_what_a_machine_has_is_seen_as_ever(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        text = "ls -a /; readlink /bin; id -un; cat /proc/$$/comm; : > /dev/null; cat $0"
        command = [*bash(text), str(Path(__file__))]
        seen = said([*user, *argv([Mount(sources["workspace"], free)], command)]).splitlines()
        outside = said([*user, *command]).splitlines()
        assert sorted(seen) == sorted([*outside, free[1:]])

    def test_a_new_folder_of_the_root_is_refused_rather_than_lost(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        text = f"mkdir {free}-other 2>&1 || true"
        assert "Read-only" in said([*user, *argv([Mount(sources["workspace"], free)], bash(text))])

    def test_signals_to_the_group_reach_the_command_and_its_exit_code_comes_back(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        text = "trap 'echo saved > saved; exit 75' TERM; touch ready; while :; do sleep 0.02; done"
        command = [*user, *argv([Mount(sources["workspace"], free)], bash(text), cwd=free)]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            wait_for((sources["workspace"] / "ready").exists)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE) == 75
        finally:
            process.kill()
        assert (sources["workspace"] / "saved").exists()

    def test_nothing_stays_after_a_job_that_is_killed(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        command = [*user, *argv([Mount(sources["workspace"], free)], bash(f"touch {free}/ready; sleep 60"))]
        before = host()
        process = subprocess.Popen(command, start_new_session=True)
        wait_for((sources["workspace"] / "ready").exists)
        assert host() == before
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
        wait_for(lambda: not is_group(process.pid))

    def test_the_environment_and_the_signals_are_those_that_were_given(
        self, sources: dict[str, Path], namespaces: None, free: str
    ) -> None:
        # Python would add LC_CTYPE, and ignores SIGPIPE.
        given = {"PATH": os.environ["PATH"], "SECRET": "a=b\nc", "LANG": "C"}
        text = "tr '\\0' '|' < /proc/$$/environ; grep SigIgn /proc/self/status"
        seen = said(argv([Mount(sources["workspace"], free)], bash(text)), env=given)
        alone = said(bash(text), env=given)
        assert "SECRET=a=b" in seen
        assert seen == alone

    def test_modules_of_the_user_are_not_taken_for_ours(
        self, sources: dict[str, Path], namespaces: None, free: str
    ) -> None:
        for name in ("json.py", "ctypes.py", "signal.py", "sitecustomize.py"):
            (sources["workspace"] / name).write_text("raise SystemExit('of the user')")
        command = argv([Mount(sources["workspace"], free)], bash("echo fine"))
        place = sources["workspace"]
        assert said(command, cwd=place, env={**os.environ, "PYTHONPATH": str(place)}) == "fine\n"

    def test_a_command_that_is_not_there_and_a_folder_that_is_not_there_have_codes_of_their_own(
        self, sources: dict[str, Path], namespaces: None, free: str
    ) -> None:
        wanted = [Mount(sources["workspace"], free)]
        done = subprocess.run(argv(wanted, ["no-such-command"]), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (127, "cloudtrain: 'no-such-command' is not found.\n")
        gone = [Mount(sources["workspace"] / "gone", free)]
        done = subprocess.run(argv(gone, bash("echo ran")), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (125, "")
        assert str(sources["workspace"] / "gone") in done.stderr

    def test_an_empty_folder_of_the_machine_serves_as_it_is(
        self, sources: dict[str, Path], user: tuple[str, ...], open_folder: Path
    ) -> None:
        place = open_folder / "empty"
        place.mkdir()
        text = f"cat {place}/*; touch {place}/new"
        assert said([*user, *argv([Mount(sources["data"], str(place))], bash(text))]) == "data"
        assert (sources["data"] / "new").exists()
        assert os.listdir(place) == []

    @needs_root
    def test_nothing_leaks_where_the_machine_shares_its_mounts_and_their_options_stay(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str, open_folder: Path
    ) -> None:
        # As systemd has it, and with a disk whose options an ordinary user cannot take away.
        (open_folder / "disk").mkdir()
        text = f"touch {free}/new 2>&1; findmnt -n -o OPTIONS {free}"
        order = argv([Mount(open_folder / "disk", free, read_only=True)], bash(text))
        script = (
            f"mount -t tmpfs -o nosuid,nodev,noexec,noatime disk {open_folder}/disk\n"
            'before=$(cat /proc/self/mountinfo)\n"$@"\n[ "$before" = "$(cat /proc/self/mountinfo)" ]'
        )
        machine = ["unshare", "--mount", "--propagation", "shared", "bash", "-c", script, "bash"]
        seen = said([*machine, *user, *order])
        assert "Read-only" in seen
        assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(seen.split("\n")[-2].split(","))

    @needs_root
    def test_a_folder_of_the_system_that_lacks_the_place_keeps_what_it_holds(
        self, sources: dict[str, Path], user: tuple[str, ...], open_folder: Path
    ) -> None:
        place = open_folder / "mnt"
        (place / "disk").mkdir(parents=True)
        (place / "disk").chmod(0o777)
        (place / "disk" / "file").write_text("kept")
        (place / "link").symlink_to("disk/file")
        text = f"cat {place}/link {place}/sets/a/*; echo new > {place}/disk/new; touch {place}/lost || echo refused"
        command = [*user, *argv([Mount(sources["data"], f"{place}/sets/a")], bash(text))]
        assert said(command) == "keptdatarefused\n"
        assert sorted(os.listdir(place)) == ["disk", "link"]
        assert (place / "disk" / "new").exists()

    def test_what_is_where_it_belongs_needs_no_mount(self, sources: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(sources["data"])
        wanted = [
            Mount(sources["workspace"], str(sources["workspace"])),
            Mount(sources["data"], f"{tmp_path}/link"),
        ]
        check(wanted)
        assert argv(wanted, ["train"]) == ["train"]


def is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


class TestRefuse:
    """What cannot be is said before anything is started."""

    def test_a_path_that_hides_something_of_the_machine(
        self, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        for target in (sources["data"], sources["data"] / "of_data", Path("/etc")):
            with pytest.raises(ConfigurationError, match="would hide what this machine has there"):
                check([Mount(sources["workspace"], str(target))])

    def test_a_path_in_a_file(self, sources: dict[str, Path]) -> None:
        with pytest.raises(ConfigurationError, match="is a file"):
            check([Mount(sources["workspace"], f"{sources['data']}/of_data/below")])

    def test_a_path_that_hides_something_of_the_workspace(self, sources: dict[str, Path], free: str) -> None:
        workspace = Mount(sources["workspace"], free)
        (sources["workspace"] / "data").mkdir()
        wanted = [Mount(sources["data"], f"{free}/data"), workspace]
        check(wanted)
        (sources["workspace"] / "data" / "train.csv").write_text("mine")
        with pytest.raises(ConfigurationError, match=f"would hide what the folder that is at '{free}' has"):
            check(wanted)
        (sources["workspace"] / "link").symlink_to("data")
        with pytest.raises(ConfigurationError, match="would hide"):
            check([workspace, Mount(sources["data"], f"{free}/link")])

    def test_two_folders_at_one_path(self, sources: dict[str, Path], free: str) -> None:
        with pytest.raises(ConfigurationError, match="Two folders"):
            check([Mount(sources["workspace"], free), Mount(sources["data"], free)])

    def test_a_path_in_a_folder_that_is_read_only(self, sources: dict[str, Path], free: str) -> None:
        with pytest.raises(ConfigurationError, match="read only"):
            check([Mount(sources["data"], free, read_only=True), Mount(sources["ckpt"], f"{free}/ckpt")])

    def test_a_path_in_a_folder_that_people_write_to(
        self, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"mkdir -p /tmp/.*'/tmp' is in use|'/tmp' is in use"):
            check([Mount(sources["data"], f"/tmp/cloudtrain-test-{os.getpid()}")])
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(ConfigurationError, match="is in use"):
            check([Mount(sources["data"], str(tmp_path / "new"))])

    def test_nothing_is_made_by_asking(self, sources: dict[str, Path], free: str, namespaces: None) -> None:
        before = host(), sorted(sources["workspace"].rglob("*"))
        check([Mount(sources["workspace"], free), Mount(sources["data"], f"{free}/data")])
        assert (host(), sorted(sources["workspace"].rglob("*"))) == before

    @needs_root
    def test_a_machine_that_allows_no_namespace(
        self, sources: dict[str, Path], free: str, namespaces: None
    ) -> None:
        # A user namespace in which there may be no other, for a user without rights: that is such a machine.
        code = (
            "import sys; from pathlib import Path; from hf_cloudtrain.jobs.node.mounts import Mount, check\n"
            "try:\n    check([Mount(Path(sys.argv[1]), sys.argv[2])])\n"
            "except ValueError as error:\n    print(error)"
        )
        seen = said(
            [
                *("unshare", "--user", "--map-root-user", "sh", "-c"),
                'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all "$@"',
                *("sh", sys.executable, "-c", code, str(sources["workspace"]), free),
            ],
            cwd=Path(__file__).parents[4],
        )
        assert f"lets no process see '{sources['workspace']}' at '{free}'" in seen
        assert "Run the job as root, install bubblewrap, or use docker" in seen


def test_bubblewrap_gets_the_machine_with_the_folders_and_no_signal_of_ours(
    sources: dict[str, Path], free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_problem", lambda words: None if words[0] == "bwrap" else "not allowed")
    wanted = [Mount(sources["workspace"], free), Mount(sources["data"], f"{free}/data", read_only=True)]
    check(wanted)
    found = argv(wanted, ["train"], cwd=free)
    start, end = found.index("bwrap"), found.index("--")
    assert found[:start][-1] == '{"block": true}'
    assert found[end:][-2:] == ['{"block": false}', "train"]
    options = " ".join(found[start:end])
    assert "--dev-bind /dev /dev" in options
    assert options.endswith(
        f"--dev-bind {sources['workspace']} {free} --ro-bind {sources['data']} {free}/data --remount-ro / --chdir {free}"
    )


class TestDocker:
    """No engine is here: the words, and the first process of a container as the first of a namespace."""

    def test_the_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        found = docker_argv(
            "me/train:1",
            [Mount(Path("/s/data"), "/workspace/data", read_only=True), Mount(Path("/s/a,b"), "/workspace")],
            ["bash", "-c", "torchrun main.py"],
            ["RANK", "KEY", "RANK"],
            Path("/home/me/jobs/mnli-1"),
            cwd="/workspace",
            name="mnli-1-0",
        )
        assert found == [
            *("docker", "run", "--rm", "--init=false", "--network", "host", "--ipc", "host", "--gpus", "all"),
            *("--mount", "type=bind,source=/home/me/jobs/mnli-1,target=/home/me/jobs/mnli-1"),
            *("--mount", 'type=bind,"source=/s/a,b",target=/workspace'),
            *("--mount", "type=bind,source=/s/data,target=/workspace/data,readonly"),
            *("--env", "KEY", "--env", "RANK", "--workdir", "/workspace", "--name", "mnli-1-0"),
            *("--entrypoint", "sh", "me/train:1", "-c", mounts.FIRST, "sh", "bash", "-c", "torchrun main.py"),
        ]

    def test_without_a_gpu_none_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert "--gpus" not in docker_argv("image", [], ["true"], [], Path("/home/me/job"))

    @pytest.mark.parametrize(
        ("script", "answer"),
        [("echo 24.0", True), ("echo; echo no engine >&2; exit 1", False), ("echo", False), (None, False)],
    )
    def test_a_client_without_an_engine_is_no_docker(
        self, script: str | None, answer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if script is not None:
            (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script is not None else str(tmp_path))
        assert has_docker() is answer

    @needs_root
    def test_the_first_process_hands_sigterm_on_and_gives_the_commands_exit_code(
        self, tmp_path: Path, namespaces: None
    ) -> None:
        text = f"trap 'touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.02; done"
        first = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", mounts.FIRST, "sh"]
        process = subprocess.Popen([*first, *bash(text)], stderr=subprocess.DEVNULL)
        try:
            wait_for((tmp_path / "ready").exists)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGTERM)
            assert process.wait(PATIENCE) == 75
        finally:
            process.kill()
        assert (tmp_path / "saved").exists()


class TestLink:
    """A machine that is the job's own."""

    def test_each_path_becomes_a_link_and_stays_one(self, sources: dict[str, Path], tmp_path: Path) -> None:
        root = tmp_path / "root"
        (root / "workspace").mkdir(parents=True)  # as an image has it
        wanted = [
            Mount(sources["data"], f"{root}/workspace/sets/mnli", read_only=True),
            Mount(sources["workspace"], f"{root}/workspace"),
        ]
        for _ in range(2):
            link(wanted)
            assert (root / "workspace" / "of_workspace").read_text() == "workspace"
            assert (root / "workspace" / "sets" / "mnli" / "of_data").read_text() == "data"
            assert (root / "workspace").is_symlink()

    def test_a_path_that_holds_something_is_refused(self, sources: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "other").symlink_to(sources["ckpt"])
        for target in (sources["data"], tmp_path / "other"):
            with pytest.raises(ConfigurationError, match="would hide"):
                link([Mount(sources["workspace"], str(target))])
        assert (sources["data"] / "of_data").exists()

    def test_a_path_that_cannot_be_made_is_refused(self, sources: dict[str, Path]) -> None:
        with pytest.raises(ConfigurationError, match="cannot be made a link"):
            link([Mount(sources["workspace"], f"{sources['data']}/of_data/below")])
