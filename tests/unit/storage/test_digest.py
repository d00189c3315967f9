"""The digest is the one that other tools compute, and only this version's algorithm is accepted."""

from __future__ import annotations

from pathlib import Path

from hf_cloudtrain.storage.digest import file_digest, is_digest


def test_the_digest_of_a_file_is_the_one_that_xxhsum_prints(tmp_path: Path) -> None:
    """The value of no bytes: https://github.com/Cyan4973/xxHash, `xxhsum -H2 /dev/null`."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_bytes(b"hf_cloudtrain")
    assert file_digest(tmp_path / "empty") == "xxh3-128:99aa06d3014798d86001c324468d497f"
    assert file_digest(tmp_path / "text") != file_digest(tmp_path / "empty")


def test_only_the_algorithm_of_this_version_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    digest = file_digest(tmp_path / "file")
    assert is_digest(digest)
    for other in (digest[:-1], digest.upper(), digest.partition(":")[2], f"md5:{'0' * 32}", f"{digest}\n"):
        assert not is_digest(other)
