"""The parts of one checkpoint, and which host commits it. 1,000 simulated hosts make the requests of a real job."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import host_parts as module
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import verify
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.errors import ManifestError, StorageError
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import entry_of, write_files

DIGEST = "xxh3-128:" + "0" * 32
KEY = CheckpointKey(1, 5)


def parts_of(catalog: Catalog, *, nonce: str = "nonce", save: int = 1, hosts: int = 3) -> HostParts:
    return HostParts(catalog, KEY, nonce, save=save, hosts=hosts)


def file(name: str) -> FileEntry:
    return FileEntry(name, 1, DIGEST)


def test_the_parts_of_all_hosts_together_are_the_checkpoint(catalog: Catalog) -> None:
    parts = parts_of(catalog)
    for host in (2, 0):
        parts.put(host, [file(f"rank-{host}")])
        assert parts.has(host)
    assert not parts.has(1)
    assert parts.missing() == [1]
    parts.put(1, [file("rank-1")])
    assert parts.missing() == []
    assert [entry.path for entry in parts.files()] == ["rank-0", "rank-1", "rank-2"]


def test_a_set_consists_of_the_parts_of_one_save(catalog: Catalog) -> None:
    parts_of(catalog).put(0, [file("a")])
    again = parts_of(catalog, save=2)
    assert not again.has(0)
    assert again.missing() == [0, 1, 2]
    again.put(1, [file("b")])
    assert parts_of(catalog).missing() == [1, 2]


def test_a_part_with_a_different_nonce_does_not_count(catalog: Catalog) -> None:
    """Two attempts with one number, on a storage that does not honour exclusive create."""
    parts_of(catalog, nonce="theirs").put(0, [file("a")])
    for host in (1, 2):
        parts_of(catalog).put(host, [])
    assert not parts_of(catalog).has(0)
    with pytest.raises(ManifestError, match="a different save"):
        parts_of(catalog).files()


@pytest.mark.parametrize("data", [b'{"nonce": "nonce", "files": [{"path": "../x"}]}', b'{"nonce": "nonce"}'])
def test_a_damaged_part_is_refused(catalog: Catalog, data: bytes) -> None:
    for host in range(3):
        parts_of(catalog).put(host, [])
    catalog.storage.write(f".cloudtrain/parts/{KEY}/1-of-3.json", data)
    with pytest.raises(ManifestError, match="1-of-3"):
        parts_of(catalog).files()


def test_all_hosts_write_into_one_folder_even_if_the_claim_is_deleted(catalog: Catalog) -> None:
    """Attempt 1's checkpoint of the step may be deleted between the first host's claim and the second's."""
    catalog.claim(KEY, "first", exclusive=True)
    second = HostParts(catalog, CheckpointKey(2, 5), "second", save=1, hosts=2)
    assert second.folder(exclusive=True) == "checkpoint-5.a2"
    catalog.storage.delete([".cloudtrain/claims/checkpoint-5.json"])
    assert second.folder(exclusive=True) == "checkpoint-5.a2"
    assert catalog.storage.list(".cloudtrain/claims") == [], "a folder that is not used is not claimed"


def test_the_next_save_of_a_step_does_not_overwrite_the_files_of_a_part(catalog: Catalog) -> None:
    folders = [parts_of(catalog, save=save).folder(exclusive=True) for save in (1, 2, 3)]
    assert folders == ["checkpoint-5", "checkpoint-5.a1.2", "checkpoint-5.a1.3"]
    assert parts_of(catalog, save=2, hosts=1).folder(exclusive=True) == "checkpoint-5.a1.2"


@pytest.mark.parametrize("folder", ["checkpoint-6", "../elsewhere", "final", 5])
def test_a_record_with_the_folder_of_another_checkpoint_is_refused(catalog: Catalog, folder: object) -> None:
    text = f'{{"folder": "{folder}"}}' if isinstance(folder, str) else f'{{"folder": {folder}}}'
    catalog.storage.write(f".cloudtrain/parts/{KEY}/folder.json", text.encode())
    with pytest.raises(ManifestError):
        parts_of(catalog).folder(exclusive=True)


def test_one_host_is_elected_and_stays_elected(catalog: Catalog) -> None:
    parts = parts_of(catalog)
    assert [parts.elect(host) for host in (1, 0, 2, 1)] == [True, False, False, True]


class Cluster:
    """Hosts with a file each, and a storage that counts."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.storage = FaultyStorage(f"memory://{folder.name}/run")
        self.storage.check()
        self.storage.calls.clear()
        self._folder = folder

    def entry(self, host: int, step: int = 5) -> OutboxEntry:
        outbox = self.outbox(host)
        folder = outbox.output_dir / f"checkpoint-{step}"
        write_files(folder, {f"shard-{host}": f"of {host}".encode()})
        return outbox.accept(folder, entry_of(self.storage.url, 1, step, host=host, hosts=self.size))

    def outbox(self, host: int) -> Outbox:
        return Outbox(self._folder / f"host-{host}")

    def send(self, entry: OutboxEntry) -> Counter[str]:
        """The requests of one host's upload."""
        before = len(self.storage.calls)
        EntrySender(Catalog(self.storage)).send(entry, lambda count: None)
        return Counter(call.kind for call in self.storage.calls[before:])

    def manifest_files(self, step: int = 5) -> list[str]:
        catalog = Catalog(self.storage)
        manifest = catalog.read(CheckpointKey(1, step))
        assert verify(catalog, manifest) == []
        return [entry.path for entry in manifest.files]


@pytest.mark.slow
def test_requests_of_a_host_do_not_grow_with_the_number_of_hosts(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 1_000)
    counts = [cluster.send(cluster.entry(host)) for host in range(cluster.size)]
    assert len(cluster.manifest_files()) == cluster.size
    *others, last = counts
    for count in others:
        assert count["upload"] == 1
        assert count["list"] == 2, "what arrived, and whose parts are there"
        assert sum(count.values()) <= 3 + module.MOST_REQUESTS
    assert sum(last.values()) <= 3 + module.MOST_REQUESTS + cluster.size
    assert last["read"] >= cluster.size, "only the host that commits has read the parts"


def test_if_hosts_finish_at_one_moment_one_of_them_reads_the_parts_and_commits(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 40)
    entries = [cluster.entry(host) for host in range(cluster.size)]
    waiting = _Rendezvous(cluster.size)
    missing = HostParts.missing
    with pytest.MonkeyPatch.context() as patched:
        # All parts are written before the first host lists them.
        patched.setattr(HostParts, "missing", lambda parts: (waiting.meet(), missing(parts))[1])
        in_threads(
            lambda entry: EntrySender(Catalog(cluster.storage)).send(entry, lambda count: None), (entries, 40)
        )
    assert len(cluster.manifest_files()) == cluster.size
    assert cluster.storage.count("create", "*/committer.json") == cluster.size
    assert cluster.storage.count("create", "*/checkpoints/*") == 1
    parts_read = cluster.storage.count("read", "*-of-40.json")
    assert parts_read == 2 * cluster.size, "each looks for its own once, and one reads all"


class _Rendezvous:
    def __init__(self, size: int) -> None:
        import threading

        self._barrier = threading.Barrier(size, timeout=30.0)

    def meet(self) -> None:
        self._barrier.wait()


def test_a_host_that_was_killed_before_its_part_completes_the_set_after_its_restart(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3)
    entries = [cluster.entry(host) for host in range(3)]
    for host in (0, 2):
        cluster.send(entries[host])
    catalog = Catalog(cluster.storage)
    assert catalog.checkpoints() == []
    flush(catalog, cluster.outbox(1), Progress())
    assert cluster.manifest_files() == ["shard-0", "shard-1", "shard-2"]


@pytest.mark.parametrize("path", ["*/committer.json", "*/checkpoints/*"])
def test_an_elected_host_whose_commit_fails_commits_at_its_next_try(tmp_path: Path, path: str) -> None:
    cluster = Cluster(tmp_path, 2)
    entries = [cluster.entry(host) for host in range(2)]
    cluster.send(entries[0])
    cluster.storage.fail("create", StorageError("for now"), path=path)
    with pytest.raises(StorageError):
        cluster.send(entries[1])
    before = cluster.storage.count("upload")
    cluster.send(entries[1])
    assert cluster.manifest_files() == ["shard-0", "shard-1"]
    assert cluster.storage.count("upload") == before, "files of a part are not sent again"


def test_a_part_whose_answer_was_lost_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(tmp_path, 2)
    cluster.storage.lose_answer("write", path="*/0-of-2.json")
    for host in range(2):
        cluster.send(cluster.entry(host))
    assert cluster.manifest_files() == ["shard-0", "shard-1"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
