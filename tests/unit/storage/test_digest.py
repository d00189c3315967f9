"""The digest is the one that other tools compute, and only this version's algorithm is accepted."""

from __future__ import annotations

from pathlib import Path

from hf_cloudtrain.storage import digest
from hf_cloudtrain.storage.digest import file_digest, is_digest


def test_the_digest_of_a_file_is_the_one_that_xxhsum_prints(tmp_path: Path) -> None:
    """The value of no bytes: https://github.com/Cyan4973/xxHash, `xxhsum -H2 /dev/null`."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_bytes(b"hf_cloudtrain")
    assert file_digest(tmp_path / "empty") == "xxh3-128:99aa06d3014798d86001c324468d497f"
    assert file_digest(tmp_path / "text") != file_digest(tmp_path / "empty")


def test_only_the_algorithm_of_this_version_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    known = file_digest(tmp_path / "file")
    assert is_digest(known)
    for other in (known[:-1], known.upper(), known.partition(":")[2], f"md5:{'0' * 32}", f"{known}\n"):
        assert not is_digest(other)


def test_one_module_knows_the_algorithm() -> None:
    """Besides the fingerprint of sample indices in `resume/`, which identifies an order of samples and no file."""
    package = Path(digest.__file__).parents[1]
    users = [path.relative_to(package) for path in package.rglob("*.py") if "xxhash" in path.read_text()]
    assert [str(path) for path in users if path.parts[0] != "resume"] == ["storage/digest.py"]
