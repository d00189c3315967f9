"""Folders at a job's paths: the job sees them, the machine does not, and the command behaves as without a mount."""

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
from hf_cloudtrain.jobs.node.mounts import Mount, argv, check, link

IS_ROOT = os.geteuid() == 0
OVERFLOW_ID = 65534
ORDINARY = (
    *(
        "setpriv",
        f"--reuid={OVERFLOW_ID}",
        f"--regid={OVERFLOW_ID}",
        "--clear-groups",
        "--bounding-set=-sys_admin",
    ),
    # The interpreter may be in the home folder of root: this lets the user read it there, and no more.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
PATIENCE = 20.0

needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")


@pytest.fixture
def namespaces() -> None:
    if not unshares("--mount") and not unshares("--user", "--map-root-user", "--mount"):
        pytest.skip("this machine allows no namespaces")
    assert mounts._failure(mounts._NAMESPACE_PROBE) is None


def unshares(*options: str, before: Sequence[str] = ()) -> bool:
    """Whether the machine allows it, probed without the code under test."""
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
    """What to put before the command: as root or as an ordinary user, in a namespace of ours or in bubblewrap."""
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
    """A folder that any user may enter; those of pytest are private."""
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
    """A path in the root folder that no machine has."""
    path = f"/cloudtrain-test-{os.getpid()}"
    assert not os.path.lexists(path)
    return path


@pytest.fixture
def host_is_unchanged() -> Iterator[None]:
    before = host()
    yield
    assert host() == before


def host() -> tuple[list[str], str]:
    return sorted(os.listdir("/")), Path("/proc/self/mountinfo").read_text()


def bash(text: str) -> list[str]:
    return ["bash", "-c", text]


def output(command: Sequence[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("host_is_unchanged")
class TestArgv:
    """What a job sees, and what stays after it."""

    def test_a_job_sees_each_folder_at_its_path(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        wanted = [  # in any order
            Mount(sources["ckpt"], f"{free}/ckpt"),
            Mount(sources["workspace"], free),
            Mount(sources["data"], f"{free}-data/mnli", read_only=True),
        ]
        text = f"cd {free}; pwd; echo *; cat {free}-data/mnli/*; echo x > ckpt/new; touch {free}-data/mnli/new || echo refused"
        seen = output([*user, *argv(wanted, bash(text))])
        assert seen.split() == [free, "ckpt", "of_workspace", "datarefused"]
        assert (sources["ckpt"] / "new").read_text() == "x\n"
        assert not os.path.lexists(free)

    def test_everything_else_of_the_machine_looks_as_before(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        text = "ls -a /; readlink /bin; id -un; cat /proc/$$/comm; : > /dev/null; cat $0"
        command = [*bash(text), str(Path(__file__))]
        seen = output([*user, *argv([Mount(sources["workspace"], free)], command)]).splitlines()
        outside = output([*user, *command]).splitlines()
        assert sorted(seen) == sorted([*outside, free[1:]])

    def test_a_new_folder_in_the_root_is_an_error_instead_of_lost_files(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        text = f"mkdir {free}-other 2>&1 || true"
        assert "Read-only" in output([*user, *argv([Mount(sources["workspace"], free)], bash(text))])

    def test_signals_to_the_group_reach_the_command_and_its_exit_code_is_returned(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str
    ) -> None:
        text = (
            f"cd {free}; trap 'echo saved > saved; exit 75' TERM; touch ready; while :; do sleep 0.02; done"
        )
        command = [*user, *argv([Mount(sources["workspace"], free)], bash(text))]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            wait_for((sources["workspace"] / "ready").exists)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE) == 75
        finally:
            process.kill()
        assert (sources["workspace"] / "saved").exists()

    def test_a_killed_job_leaves_nothing_behind(
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

    def test_environment_and_signals_are_passed_on_unchanged(
        self, sources: dict[str, Path], namespaces: None, free: str
    ) -> None:
        # Python would add LC_CTYPE, and ignores SIGPIPE.
        given = {"PATH": os.environ["PATH"], "SECRET": "a=b\nc", "LANG": "C"}
        text = "tr '\\0' '|' < /proc/$$/environ; grep SigIgn /proc/self/status"
        seen = output(argv([Mount(sources["workspace"], free)], bash(text)), env=given)
        alone = output(bash(text), env=given)
        assert "SECRET=a=b" in seen
        assert seen == alone

    def test_modules_of_the_user_are_not_imported(
        self, sources: dict[str, Path], namespaces: None, free: str
    ) -> None:
        for name in ("json.py", "ctypes.py", "signal.py", "sitecustomize.py"):
            (sources["workspace"] / name).write_text("raise SystemExit('of the user')")
        command = argv([Mount(sources["workspace"], free)], bash("echo fine"))
        folder = sources["workspace"]
        assert output(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}) == "fine\n"

    def test_a_missing_command_and_a_missing_folder_have_their_own_exit_codes(
        self, sources: dict[str, Path], namespaces: None, free: str
    ) -> None:
        wanted = [Mount(sources["workspace"], free)]
        done = subprocess.run(argv(wanted, ["no-such-command"]), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (127, "cloudtrain: 'no-such-command' was not found.\n")
        gone = [Mount(sources["workspace"] / "gone", free)]
        done = subprocess.run(argv(gone, bash("echo ran")), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (125, "")
        assert str(sources["workspace"] / "gone") in done.stderr

    def test_an_empty_folder_of_the_machine_is_used_as_it_is(
        self, sources: dict[str, Path], user: tuple[str, ...], open_folder: Path
    ) -> None:
        empty = open_folder / "empty"
        empty.mkdir()
        text = f"cat {empty}/*; touch {empty}/new"
        assert output([*user, *argv([Mount(sources["data"], str(empty))], bash(text))]) == "data"
        assert (sources["data"] / "new").exists()
        assert os.listdir(empty) == []

    @needs_root
    def test_nothing_leaks_where_the_machine_shares_its_mounts_and_their_options_stay(
        self, sources: dict[str, Path], user: tuple[str, ...], free: str, open_folder: Path
    ) -> None:
        # Shared mounts, as with systemd, and a disk whose options an ordinary user cannot remove.
        (open_folder / "disk").mkdir()
        text = f"touch {free}/new 2>&1; findmnt -n -o OPTIONS {free}"
        order = argv([Mount(open_folder / "disk", free, read_only=True)], bash(text))
        script = (
            f"mount -t tmpfs -o nosuid,nodev,noexec,noatime disk {open_folder}/disk\n"
            'before=$(cat /proc/self/mountinfo)\n"$@"\n[ "$before" = "$(cat /proc/self/mountinfo)" ]'
        )
        machine = ["unshare", "--mount", "--propagation", "shared", "bash", "-c", script, "bash"]
        seen = output([*machine, *user, *order])
        assert "Read-only" in seen
        assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(seen.split("\n")[-2].split(","))

    @needs_root
    def test_a_system_folder_without_the_target_keeps_what_it_holds(
        self, sources: dict[str, Path], user: tuple[str, ...], open_folder: Path
    ) -> None:
        system = open_folder / "mnt"
        (system / "disk").mkdir(parents=True)
        (system / "disk").chmod(0o777)
        (system / "disk" / "file").write_text("kept")
        (system / "link").symlink_to("disk/file")
        text = f"cat {system}/link {system}/sets/a/*; echo new > {system}/disk/new; touch {system}/lost || echo refused"
        command = [*user, *argv([Mount(sources["data"], f"{system}/sets/a")], bash(text))]
        assert output(command) == "keptdatarefused\n"
        assert sorted(os.listdir(system)) == ["disk", "link"]
        assert (system / "disk" / "new").exists()

    def test_a_folder_at_its_own_path_needs_no_mount(self, sources: dict[str, Path], tmp_path: Path) -> None:
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


class TestCheck:
    """What is not possible is refused before anything is started."""

    def test_a_path_that_hides_a_folder_of_the_machine(
        self, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        for target in (sources["data"], sources["data"] / "of_data", Path("/etc")):
            with pytest.raises(ConfigurationError, match="would hide what this machine has there"):
                check([Mount(sources["workspace"], str(target))])

    def test_a_path_in_a_file(self, sources: dict[str, Path]) -> None:
        with pytest.raises(ConfigurationError, match="is a file"):
            check([Mount(sources["workspace"], f"{sources['data']}/of_data/below")])

    def test_a_path_that_hides_a_folder_of_the_workspace(self, sources: dict[str, Path], free: str) -> None:
        workspace = Mount(sources["workspace"], free)
        (sources["workspace"] / "data").mkdir()
        wanted = [Mount(sources["data"], f"{free}/data"), workspace]
        check(wanted)
        (sources["workspace"] / "data" / "train.csv").write_text("mine")
        with pytest.raises(ConfigurationError, match=f"would hide what the folder at '{free}' has"):
            check(wanted)
        (sources["workspace"] / "link").symlink_to("data")
        with pytest.raises(ConfigurationError, match="would hide"):
            check([workspace, Mount(sources["data"], f"{free}/link")])

    def test_two_folders_at_one_path(self, sources: dict[str, Path], free: str) -> None:
        with pytest.raises(ConfigurationError, match="the mount path of two folders"):
            check([Mount(sources["workspace"], free), Mount(sources["data"], free)])

    def test_a_path_in_a_read_only_folder(self, sources: dict[str, Path], free: str) -> None:
        with pytest.raises(ConfigurationError, match="read-only"):
            check([Mount(sources["data"], free, read_only=True), Mount(sources["ckpt"], f"{free}/ckpt")])

    def test_a_path_in_a_folder_that_users_write_to(
        self, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"mkdir -p /tmp/.*'/tmp' is in use|'/tmp' is in use"):
            check([Mount(sources["data"], f"/tmp/cloudtrain-test-{os.getpid()}")])
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(ConfigurationError, match="is in use"):
            check([Mount(sources["data"], str(tmp_path / "new"))])

    def test_checking_changes_nothing(self, sources: dict[str, Path], free: str, namespaces: None) -> None:
        before = host(), sorted(sources["workspace"].rglob("*"))
        check([Mount(sources["workspace"], free), Mount(sources["data"], f"{free}/data")])
        assert (host(), sorted(sources["workspace"].rglob("*"))) == before

    @needs_root
    def test_a_machine_that_allows_no_namespace(
        self, sources: dict[str, Path], free: str, namespaces: None
    ) -> None:
        # A user without capabilities in a user namespace that allows no further one stands for such a machine.
        code = (
            "import sys; from pathlib import Path; from hf_cloudtrain.jobs.node.mounts import Mount, check\n"
            "try:\n    check([Mount(Path(sys.argv[1]), sys.argv[2])])\n"
            "except ValueError as error:\n    print(error)"
        )
        seen = output(
            [
                *("unshare", "--user", "--map-root-user", "sh", "-c"),
                'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all "$@"',
                *("sh", sys.executable, "-c", code, str(sources["workspace"]), free),
            ],
            cwd=Path(__file__).parents[4],
        )
        assert f"'{sources['workspace']}' cannot be mounted at '{free}'" in seen
        assert "Run the job as root, install bubblewrap, or use docker" in seen


def test_bubblewrap_shows_the_machine_with_the_folders_and_receives_no_signal(
    sources: dict[str, Path], free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_failure", lambda command: None if command[0] == "bwrap" else "not allowed")
    wanted = [Mount(sources["workspace"], free), Mount(sources["data"], f"{free}/data", read_only=True)]
    check(wanted)
    found = argv(wanted, ["train"])
    start, end = found.index("bwrap"), found.index("--")
    assert found[:start][-1] == '{"block": true}'
    assert found[end:][-2:] == ['{"block": false}', "train"]
    options = " ".join(found[start:end])
    assert "--dev-bind /dev /dev" in options
    assert options.endswith(
        f"--dev-bind {sources['workspace']} {free} --ro-bind {sources['data']} {free}/data --remount-ro /"
    )


class TestLink:
    """A machine that belongs to the job."""

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

    def test_sudo_makes_the_links_where_only_root_may(
        self, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sudo = tmp_path / "bin" / "sudo"
        sudo.parent.mkdir()
        sudo.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/asked\nshift\nexec "$@"\n')
        sudo.chmod(0o755)
        monkeypatch.setenv("PATH", f"{sudo.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(mounts.os, "access", lambda *_: False)
        target = tmp_path / "theirs" / "workspace"
        target.mkdir(parents=True)
        for _ in range(2):
            link([Mount(sources["workspace"], str(target))])
        assert target.resolve() == sources["workspace"]
        assert (tmp_path / "asked").read_text().splitlines() == [
            f"-n mkdir -p -- {target.parent}",
            f"-n rmdir -- {target}",
            f"-n ln -sT -- {sources['workspace']} {target}",
        ]
        sudo.write_text("#!/bin/sh\necho 'a password is required' >&2\nexit 1\n")
        with pytest.raises(ConfigurationError, match=r"cannot be made a link .* a password is required"):
            link([Mount(sources["workspace"], f"{tmp_path}/other")])

    def test_a_path_that_cannot_be_made_is_refused(self, sources: dict[str, Path]) -> None:
        with pytest.raises(ConfigurationError, match="cannot be made a link"):
            link([Mount(sources["workspace"], f"{sources['data']}/of_data/below")])
