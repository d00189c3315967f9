"""`cloudtrain data`: its results, its messages and its questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import leftovers
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.cli import app, output
from hf_cloudtrain.datasets.store import DatasetStore
from tests.unit.datasets.test_store import contents

ESC = "\x1b[31m"


def cloudtrain(*words: str, code: int = 0, typed: str | None = None) -> Any:
    result = CliRunner().invoke(app, ["data", *words], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def answer(*words: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(cloudtrain(*words, "--json").stdout)
    return record


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetStore:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    return DatasetStore()


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    folder = tmp_path / "glue"
    (folder / "mrpc").mkdir(parents=True)
    (folder / "mrpc" / "train.parquet").write_bytes(b"x" * 1500)
    (folder / "README.md").write_bytes(b"hello")
    return folder


def test_create_reports_the_upload_and_that_nothing_has_changed(glue: Path, tmp_path: Path) -> None:
    first = cloudtrain("create", "glue", str(glue))
    assert first.stderr == "Stored glue, version 1: 2 files, 1.5 kB (1.5 kB uploaded).\n"
    assert first.stdout == ""
    again = cloudtrain("create", "glue", str(glue))
    assert again.stderr == "Nothing has changed since glue, version 1: 2 files, 1.5 kB.\n"
    (glue / "README.md").write_bytes(b"hello there")
    record = answer("create", "glue", str(glue))
    assert record.pop("created") > 1.7e9
    assert record == {
        "store": str(tmp_path / "store"),
        "dataset": "glue",
        "version": 2,
        "file_count": 2,
        "size": 1511,
        "url": f"{tmp_path}/store/datasets/glue.2",
        "created_now": True,
        "sent": 11,
    }
    assert answer("create", "glue", str(glue))["created_now"] is False


def test_list_shows_the_newest_version_of_each(store: DatasetStore, glue: Path) -> None:
    assert "No datasets in" in cloudtrain("list").stderr
    assert answer("list")["datasets"] == []
    store.create("nsmc", glue)
    store.create("glue", glue)
    (glue / "more").write_bytes(b"")
    store.create("glue", glue)
    lines = [line.split()[:6] for line in cloudtrain("list").stdout.splitlines()]
    assert lines == [
        ["dataset", "version", "versions", "files", "size", "stored"],
        ["glue", "2", "2", "3", "1.5", "kB"],
        ["nsmc", "1", "1", "2", "1.5", "kB"],
    ]
    records = answer("list")["datasets"]
    assert [(item["dataset"], item["version"], item["versions"]) for item in records] == [
        ("glue", 2, [1, 2]),
        ("nsmc", 1, [1]),
    ]


def test_a_damaged_dataset_is_listed_with_what_is_wrong(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    store.create("nsmc", glue)
    store.catalog.storage.write(".cloudtrain/folders/glue-000001.json", b"{" + ESC.encode())
    shown = cloudtrain("list")
    assert "Warning: The manifest 'glue-000001' is damaged" in shown.stderr
    assert ESC not in shown.output
    assert [line.split()[:4] for line in shown.stdout.splitlines()[1:]] == [
        ["glue", "1", "1", "damaged"],
        ["nsmc", "1", "1", "2"],
    ]


def test_view_shows_an_overview_the_tree_and_the_metadata(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    (glue / "mrpc" / "test.parquet").write_bytes(b"y" * 500)
    store.create("glue", glue)
    shown = cloudtrain("view", "glue").stdout
    overview, files, metadata = (panel.splitlines() for panel in shown.split("╭")[1:])
    lines = [line.strip("│ ").split(None, 1) for line in overview[1:-1]]
    facts = dict(line for line in lines if len(line) == 2)  # a long path stands on a line of its own
    assert facts["dataset"] == "glue"
    assert (facts["version"], facts["versions"]) == ("2", "1, 2")
    assert (facts["files"], facts["kinds"]) == ("3 files, 2.0 kB", "2 .parquet, 1 .md")
    assert [line.strip("│├└─ ") for line in files[1:-1]] == [
        "glue/  2.0 kB",
        "README.md  5 B",
        "mrpc/  2.0 kB",
        "test.parquet  500 B",
        "train.parquet  1.5 kB",
    ]
    assert any(str(glue) in line for line in metadata)
    record = answer("view", "glue", "--version", "1")
    assert (record["version"], record["metadata"]["source"]) == (1, str(glue))
    assert [file["path"] for file in record["files"]] == ["README.md", "mrpc/train.parquet"]


def test_download_prints_the_folder_and_leaves_nothing_else(
    store: DatasetStore, glue: Path, tmp_path: Path
) -> None:
    store.create("glue", glue)
    (glue / "README.md").write_bytes(b"hello there")
    store.create("glue", glue)
    shown = cloudtrain("download", "glue", str(tmp_path / "data"), "--version", "1")
    assert shown.stdout == f"{tmp_path}/data/glue\n"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["glue"]
    assert (tmp_path / "data" / "glue" / "README.md").read_bytes() == b"hello"
    assert answer("download", "glue", str(tmp_path / "data"), "--version", "1")["downloaded"] is False
    refused = cloudtrain("download", "glue", str(tmp_path / "data"), code=1)
    assert "its files differ from 'glue-000002'" in refused.stderr


def test_delete_asks_and_takes_one_version_or_all(
    store: DatasetStore, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        (glue / "README.md").write_text(str(number))
        store.create("glue", glue)
    refused = cloudtrain("delete", "glue", code=1)
    assert "Nothing was deleted: stdin is not a terminal" in refused.stderr
    asked: list[str] = []

    def confirm(question: str, yes: bool) -> None:
        asked.append(question)
        if len(asked) == 1:
            output.fail("Nothing was deleted.")

    monkeypatch.setattr("hf_cloudtrain.cli.commands.data.confirm", confirm)
    cloudtrain("delete", "glue", "--version", "2", code=1)
    assert store.versions() == {"glue": [1, 2, 3]}
    assert answer("delete", "glue", "--version", "2")["deleted"] == [2]
    assert store.versions() == {"glue": [1, 3]}
    gone: list[int] = []
    delete = DatasetStore.delete
    monkeypatch.setattr(
        DatasetStore, "delete", lambda self, name, number: gone.append(number) or delete(self, name, number)
    )
    assert answer("delete", "glue")["deleted"] == [1, 3]
    assert gone == [1, 3], "what is interrupted leaves the newer ones"
    assert store.versions() == {}
    assert ["version 2 of" in text for text in asked] == [True, True, False]
    assert "all 2 versions of the dataset 'glue'" in asked[2]


def test_delete_finishes_an_interrupted_deletion(store: DatasetStore, glue: Path) -> None:
    dataset, _ = store.create("glue", glue)
    store.catalog.storage.write(".cloudtrain/retiring/glue-000001.json", dataset.manifest.encode())
    store.catalog.storage.delete([".cloudtrain/folders/glue-000001.json"])
    assert answer("delete", "glue", "--yes")["deleted"] == [1]
    assert store.catalog.storage.list("glue") == []
    assert store.half_deleted("glue") == []
    assert "Dataset 'glue' does not exist" in cloudtrain("delete", "glue", "--yes", code=1).stderr


def test_clean_deletes_what_was_interrupted_and_keeps_versions(
    store: DatasetStore, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "WATCH_SECONDS", 0.0)
    monkeypatch.setenv(env.HEARTBEAT, "0.0001")
    assert "Nothing is left over." in cloudtrain("clean", "--yes").stderr
    going, _ = store.create("nsmc", glue)
    store.create("glue", glue)
    records = store.catalog.storage
    records.write(".cloudtrain/retiring/nsmc-000001.json", going.manifest.encode())
    records.delete([".cloudtrain/folders/nsmc-000001.json"])
    _, folder = NamedFolders(store.catalog).begin("glue", "of a machine that is no more")
    records.write(f"{folder}/meta.json", b"{}")
    shown = cloudtrain("clean", "--dry-run").stdout.splitlines()[1:]
    assert [(line.split()[0], line.split("  ")[-1]) for line in shown] == [
        ("glue.2", "delete if idle"),
        ("nsmc", "delete"),
    ]
    assert records.list("nsmc") != []
    assert "--yes" in cloudtrain("clean", code=1).stderr
    states = {item["name"]: (item["what"], item["state"]) for item in answer("clean", "--yes")["left_over"]}
    assert states == {"glue.2": ("upload", "deleted"), "nsmc": ("deletion", "deleted")}
    assert answer("clean", "--dry-run")["left_over"] == []
    assert (store.half_deleted("nsmc"), records.list("nsmc"), records.list("glue.2")) == ([], [], [])
    assert contents(store.local_copy(store.find("glue"))) == contents(glue)
    assert store.create("glue", glue)[0].version == 1


def test_clean_finishes_a_deletion_whose_files_are_gone(store: DatasetStore, glue: Path) -> None:
    dataset, _ = store.create("glue", glue)
    store.delete("glue", 1)
    store.catalog.storage.write(".cloudtrain/retiring/glue-000001.json", dataset.manifest.encode())
    assert [item["name"] for item in answer("clean", "--yes")["left_over"]] == ["glue"]
    assert store.half_deleted("glue") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("view", "glu"), "Dataset 'glu' does not exist in "),
        (("view", "glue", "--version", "3"), "Dataset 'glue' in "),
        (("download", "nsmc", "."), "Dataset 'nsmc' does not exist in "),
        (("create", "a/b", "."), "'a/b' is not a valid dataset name"),
        (("create", "glue", "/missing"), "'/missing' is neither a folder nor a file"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    store: DatasetStore, glue: Path, words: tuple[str, ...], expected: str
) -> None:
    store.create("glue", glue)
    stderr = cloudtrain(*words, code=1).stderr
    assert stderr.startswith("Error: ")
    assert expected in stderr
    assert stderr.count("\n") == 1


def test_credentials_in_the_url_of_a_store_or_a_source_are_not_shown(
    glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3tvalue"
    refused = cloudtrain("create", "glue", f"s3://user:{secret}@bucket/data", code=1)
    assert "contains credentials" in refused.stderr
    monkeypatch.setenv(env.STORE, f"s3://user:{secret}@bucket/store")
    told = cloudtrain("list", code=1)
    assert secret not in refused.output + told.output
