"""The copy of a job's folder: what belongs to it, what does not, and no incomplete copies."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.node import workspace
from hf_cloudtrain.jobs.node.workspace import Copied, copy_workspace, workspace_size

IS_ROOT = os.geteuid() == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "glue"
    folder.mkdir()
    return folder


def write(folder: Path, **files: str) -> None:
    """Files by name, with '__' for '/' and '_' for '.'."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def deny(path: object) -> None:
    if str(path).endswith("secret"):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class TestCopy:
    """The content of the copy."""

    def test_files_folders_modes_and_times_are_copied(self, source: Path, tmp_path: Path) -> None:
        write(source, main_py="print(1)", model__net_py="x" * 10)
        (source / "data").mkdir()
        (source / "run.sh").write_text("#!/bin/sh\n")
        (source / "run.sh").chmod(0o755)
        os.utime(source / "main.py", ns=(10**18, 10**18))
        (source / "model").chmod(0o555)
        counts: list[int] = []
        copied = copy_workspace(source, tmp_path / "jobs" / "1" / "workspace", on_bytes=counts.append)
        target = tmp_path / "jobs" / "1" / "workspace"
        assert content(target) == ["data", "main.py", "model", "model/net.py", "run.sh"]
        assert (target / "main.py").read_text() == "print(1)"
        assert stat.S_IMODE((target / "run.sh").stat().st_mode) == 0o755
        assert (
            stat.S_IMODE((target / "model").stat().st_mode) == 0o755
        )  # as it was, but writable for the owner
        assert (target / "data").stat().st_mtime_ns == (source / "data").stat().st_mtime_ns
        assert (target / "main.py").stat().st_mtime_ns == 10**18
        assert (copied.files, copied.size, copied.skipped) == (3, 28, ())
        assert sum(counts) == 28
        assert copied == workspace_size(source)
        assert os.listdir(target.parent) == ["workspace"]

    def test_a_large_file_is_copied_in_pieces_and_between_file_systems_too(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(workspace, "CHUNK", 1000)
        (source / "weights").write_bytes(random.Random(0).randbytes(3500))
        counts: list[int] = []
        copy_workspace(source, tmp_path / "one", on_bytes=counts.append)
        assert counts == [1000, 1000, 1000, 500]

        real, calls = os.copy_file_range, []

        def cross_device(*arguments: int) -> int:
            calls.append(arguments)
            if len(calls) > 1:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return real(*arguments)

        monkeypatch.setattr(os, "copy_file_range", cross_device)
        copy_workspace(source, tmp_path / "two")
        assert len(calls) == 2
        for name in ("one", "two"):
            assert (tmp_path / name / "weights").read_bytes() == (source / "weights").read_bytes()

    def test_the_copy_may_be_inside_the_source(self, source: Path) -> None:
        write(source, main_py="x")
        for number in (1, 2):
            copied = copy_workspace(
                source, source / "store" / str(number) / "workspace", leave_out=[source / "store"]
            )
            assert copied.files == 1
        assert content(source / "store" / "2" / "workspace") == ["main.py"]
        copy_workspace(source, source / "copy")
        assert "copy" not in content(source / "copy")

    def test_an_empty_folder_at_the_target_is_used_and_a_full_one_is_refused(
        self, source: Path, tmp_path: Path
    ) -> None:
        write(source, main_py="x")
        (tmp_path / "there").mkdir()
        copy_workspace(source, tmp_path / "there")
        write(source, other_py="x")
        with pytest.raises(OSError, match="not empty"):
            copy_workspace(source, tmp_path / "there")
        assert content(tmp_path / "there") == ["main.py"]
        assert sorted(os.listdir(tmp_path)) == ["glue", "there"]

    def test_an_interrupted_copy_leaves_nothing(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(source, a_py="x", b_py="x", sub__c_py="x")

        def cut_off(count: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            copy_workspace(source, tmp_path / "target", on_bytes=cut_off)
        assert os.listdir(tmp_path) == ["glue"]

    def test_the_incomplete_copy_of_a_killed_process_is_deleted(self, source: Path, tmp_path: Path) -> None:
        write(source, main_py="x")
        code = (
            "import os, sys; from pathlib import Path; from hf_cloudtrain.jobs.node.workspace import copy_workspace\n"
            "copy_workspace(Path(sys.argv[1]), Path(sys.argv[2]), on_bytes=lambda count: os._exit(9))"
        )
        command = [sys.executable, "-c", code, str(source), str(tmp_path / "target")]
        assert subprocess.run(command, cwd=Path(__file__).parents[4], check=False).returncode == 9
        assert len(os.listdir(tmp_path)) == 2
        copy_workspace(source, tmp_path / "target")
        assert sorted(os.listdir(tmp_path)) == ["glue", "target"]

    def test_a_full_disk_is_reported_before_anything_is_copied(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(source, main_py="x")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(
            OSError, match=r"are free\. Exclude what the job does not need in \.cloudtrainignore"
        ):
            copy_workspace(source, tmp_path / "target")
        assert os.listdir(tmp_path) == ["glue"]

    def test_a_file_that_is_deleted_during_the_copy_is_skipped(self, source: Path, tmp_path: Path) -> None:
        write(source, a_py="x", b_py="x")

        def take_away(count: int) -> None:
            (source / "b.py").unlink(missing_ok=True)

        copy_workspace(source, tmp_path / "target", on_bytes=take_away)
        assert content(tmp_path / "target") == ["a.py"]

    def test_a_source_that_is_not_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="is not a folder"):
            workspace_size(tmp_path / "glut")
        with pytest.raises(ConfigurationError, match="where jobs are stored"):
            copy_workspace(tmp_path, tmp_path / "x" / "workspace", leave_out=[tmp_path])


class TestLinksAndOthers:
    """Links, sockets, pipes, and what cannot be read."""

    def test_links_inside_stay_links_in_the_copy(self, source: Path, tmp_path: Path) -> None:
        write(source, data__train_csv="rows")
        (source / "relative").symlink_to("data/train.csv")
        (source / "data" / "absolute").symlink_to(source / "data" / "train.csv")
        (source / "data" / "around").symlink_to("../../glue/data")
        (source / "folder").symlink_to("data")
        copied = copy_workspace(source, tmp_path / "target")
        shutil.rmtree(source)
        target = tmp_path / "target"
        assert os.readlink(target / "relative") == "data/train.csv"
        for path in ("relative", "data/absolute", "data/around/train.csv", "folder/train.csv"):
            assert (target / path).read_text() == "rows"
        assert copied.skipped == ()
        assert copied.files == 1

    def test_a_link_out_keeps_its_target_and_is_reported(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "big").mkdir()
        write(tmp_path / "big", rows_csv="rows")
        (source / "data").symlink_to("../big")
        copied = copy_workspace(source, tmp_path / "jobs" / "1" / "workspace")
        assert (tmp_path / "jobs" / "1" / "workspace" / "data" / "rows.csv").read_text() == "rows"
        assert copied.skipped == (
            f"data (a link out of the workspace; only the link to {str(tmp_path / 'big')!r} is copied)",
        )
        assert copied.files == 0

    def test_what_cannot_be_copied_is_reported(self, source: Path, tmp_path: Path) -> None:
        (source / "gone").symlink_to("nowhere")
        (source / "round").symlink_to("round")
        os.mkfifo(source / "pipe")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(source / "sock"))
        copied = copy_workspace(source, tmp_path / "target")
        assert copied.skipped == (
            "gone (a broken link to 'nowhere')",
            "pipe (not a file, folder or link)",
            "round (a broken link to 'round')",
            "sock (not a file, folder or link)",
        )
        assert content(tmp_path / "target") == []

    def test_what_cannot_be_read_is_reported(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(source, a_py="x", secret__key="x")
        (source / "secret").chmod(0)
        if IS_ROOT:  # root may read everything
            real = os.scandir
            monkeypatch.setattr(os, "scandir", lambda path: deny(path) or real(path))
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.py"))
        copied = copy_workspace(source, tmp_path / "target")
        (source / "secret").chmod(0o700)
        assert copied.skipped == ("a.py (cannot be read)", "secret (cannot be read)")

    def test_a_virtual_environment_is_not_copied_and_is_reported(self, source: Path) -> None:
        write(source, main_py="x", env__pyvenv_cfg="home = /usr", env__lib__x_py="x")
        found = workspace_size(source)
        assert found.files == 1
        assert found.skipped == ("env (a virtual environment: it works only at its own path)",)
        (source / ".cloudtrainignore").write_text("!env\n")
        assert workspace_size(source).files == 4


class TestIgnoreFiles:
    """What the ignore files exclude."""

    def copied(self, source: Path) -> list[str]:
        target = source.parent / "target"
        copy_workspace(source, target)
        found = [path for path in content(target) if (target / path).is_file()]
        shutil.rmtree(target)
        return found

    def test_gitignore_counts_at_every_level(self, source: Path) -> None:
        write(
            source, a_log="x", keep_log="x", sub__a_log="x", sub__b_tmp="x", sub__deep__b_tmp="x", out__x="x"
        )
        (source / ".gitignore").write_text("*.log\n!keep.log\n/out/\n")
        (source / "sub" / ".gitignore").write_text("# ours\n!a.log\n*.tmp\n")
        assert self.copied(source) == [".gitignore", "keep.log", "sub/.gitignore", "sub/a.log"]

    def test_cloudtrainignore_replaces_all_gitignore_files(self, source: Path) -> None:
        write(source, a_log="x", weights_pt="x", sub__b_pt="x", sub__c_log="x")
        (source / ".gitignore").write_text("*.pt\n")
        (source / "sub" / ".gitignore").write_text("*.pt\n")
        (source / ".cloudtrainignore").write_text("*.log\n.*ignore\n")
        (source / "sub" / ".cloudtrainignore").write_text("!c.log\n")
        assert self.copied(source) == ["sub/b.pt", "sub/c.log", "weights.pt"]

    def test_history_caches_and_outboxes_are_excluded(self, source: Path) -> None:
        write(source, main_py="x")
        excluded = [".git/config", "sub/__pycache__/a.pyc", "out/.cloudtrain/outbox/x"]
        for name in (*excluded, "out/checkpoint-5/model"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text("x")
        assert self.copied(source) == ["main.py", "out/checkpoint-5/model"]
        (source / ".gitignore").write_text("!**\n")  # does not include them
        assert not {*excluded} & {*self.copied(source)}
        (source / ".cloudtrainignore").write_text("!.git/\n")
        assert ".git/config" in self.copied(source)

    def test_the_gitignore_of_the_repository_around_the_folder_counts(self, source: Path) -> None:
        write(source, main_py="x", out__weights="x", a_log="x")
        (source.parent / ".git").mkdir()
        (source.parent / ".gitignore").write_text("/glue/out/\n*.log\n")
        assert self.copied(source) == ["main.py"]

    def test_the_gitignore_of_a_repository_that_excludes_the_folder_does_not_count(
        self, source: Path
    ) -> None:
        write(source, main_py="x", a_log="x")
        (source.parent / ".git").mkdir()
        (source.parent / ".gitignore").write_text("/glue/\n*.log\n")
        assert self.copied(source) == ["a.log", "main.py"]

    def test_odd_ignore_files_do_no_harm(self, source: Path) -> None:
        write(source, main_py="x", b_log="x")
        (source / ".gitignore").write_bytes(b"\xef\xbb\xbf*.log\r\n!\n[\n\xff\xfe\n///\n")
        assert self.copied(source) == [".gitignore", "main.py"]

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    def test_trees_are_read_as_git_reads_them(self, tmp_path: Path) -> None:
        dice = random.Random(5)
        trees = [tmp_path / str(number) for number in range(20)]
        for tree in trees:
            plant(tree, dice, [pattern(dice) for _ in range(dice.randint(1, 3))])
        for lines in HARD:
            trees.append(tmp_path / str(len(trees)))
            plant(trees[-1], random.Random(1), lines.split())
        differ = []
        for tree in trees:
            found = subprocess.run(
                ["git", "-C", tree, "ls-files", "--others", "--exclude-standard", "-z"],
                capture_output=True,
                text=True,
                check=True,
            )
            wanted = {path for path in found.stdout.split("\0") if path}
            if (seen := set(self.copied(tree))) != wanted:
                differ.append(((tree / ".gitignore").read_text(), seen ^ wanted))
        assert differ == []


HARD = (
    # A pattern that matches a folder does not match what is in it.
    "*/* !**/[ab]/ */*.py",
    "*.py !c*/ a/",
    # Everything in a folder, but not the folder.
    "*/** !*/*.py",
    # Folders in a folder.
    "*/**/",
    "[ab]/**/",
    "* !*/ !*.py",
)
NAMES = ("a", "b", "c.py", "d.log", "build", "data")
PARTS = ("a", "b", "*.py", "*.log", "build", "data", "*", "**", "?", "[ab]", "c*")


def plant(tree: Path, dice: random.Random, lines: list[str]) -> None:
    """A repository with random files and patterns, and more patterns in some of its folders."""
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    folders = [tree]
    for _ in range(8):
        folder = dice.choice(folders) / dice.choice(NAMES)
        if not folder.exists():
            folder.mkdir()
            folders.append(folder)
    for folder in folders:
        for name in NAMES:
            if dice.random() < 0.7 and not (folder / name).exists():
                (folder / name).write_text("x")
        if folder != tree and dice.random() < 0.3:
            (folder / ".gitignore").write_text(f"{pattern(dice)}\n{pattern(dice)}\n")
    (tree / ".gitignore").write_text("\n".join(lines) + "\n")


def pattern(dice: random.Random) -> str:
    text = "/".join(dice.choice(PARTS) for _ in range(dice.randint(1, 3)))
    first = dice.choice(("", "", "", "/", "!", "!/"))
    return f"{first}{text}{dice.choice(('', '', '/'))}"


class TestAdvice:
    """A large workspace is reported with its largest files and folders."""

    def test_a_workspace_of_two_gigabytes(self, source: Path) -> None:
        for name, size in (("weights.pt", 2_100_000_000), ("data/train", 300_000_000), ("data/x", 5)):
            (source / name).parent.mkdir(exist_ok=True)
            with open(source / name, "wb") as file:
                file.truncate(size)
        found = workspace_size(source)
        assert found.largest == (("weights.pt", 2_100_000_000), ("data", 300_000_005))
        assert found.advice == (
            "The workspace has 2.4 GB in 3 files, and each job gets a copy. The largest are weights.pt (2.1 GB), data "
            "(300.0 MB). Exclude what the job does not need in .cloudtrainignore, which has the syntax of .gitignore, and "
            "upload data as a dataset (`cloudtrain data create`)."
        )

    def test_a_smaller_workspace_is_not_reported(self) -> None:
        assert Copied(3, 10**9).advice is None
