"""The records of a run, and the names they are stored under. Nothing here reads or writes anything.

What is parsed here comes from storage or from a disk and is not trusted: sizes are bounded, every key is checked, and a path
can only lead below the folder it belongs to.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.errors import ConfigurationError, ManifestError, NewerFormatError
from hf_cloudtrain.storage.digest import ALGORITHM, is_digest
from hf_cloudtrain.storage.names import clean_path

_Parser = Callable[[dict[str, Any], str, str], Any]

FORMAT = "hf_cloudtrain.manifest/1"
MAX_FILES = 100_000
"""Files in one checkpoint. The largest real ones (DCP, 2,816 ranks) have some 10,000."""
MAX_RECORD_BYTES = 64 * 2**20
"""Size of one record. 100,000 files of 200-byte names make 30 MB."""


@dataclass(frozen=True, order=True)
class CheckpointKey:
    """Which checkpoint. Keys sort as law 9 demands, so the newest is the largest."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.attempt:06d}-{self.step:010d}"

    @property
    def title(self) -> str:
        """What messages call it, where its folder is not known."""
        return f"checkpoint-{self.step} (attempt {self.attempt})"

    @classmethod
    def named(cls, name: str) -> CheckpointKey | None:
        """The key with this name; None if it is not the name of a key."""
        match = re.fullmatch(r"([0-9]{6,12})-([0-9]{10,15})", name)
        key = cls(int(match[1]), int(match[2])) if match else None
        # With too many zeros, it is the name of a different object from the one that would be read.
        return key if key and str(key) == name else None

    @classmethod
    def parse(cls, record: Any, what: str) -> CheckpointKey:
        """The attempt and step that a record names. Raises ManifestError."""
        values = (record.get("attempt"), record.get("step")) if isinstance(record, dict) else (None, None)
        if not all(type(value) is int and 0 <= value < 2**53 for value in values):
            raise ManifestError(f"The {what} is damaged: it names no attempt and step.")
        return cls(*values)  # type: ignore[arg-type]

    def may_be_in(self, folder: str) -> bool:
        """Whether a folder may be this checkpoint's: the plain name, or with `.a<attempt>`, or that of its n-th save."""
        plain = f"checkpoint-{self.step}"
        return folder == plain or re.fullmatch(rf"{plain}\.a{self.attempt}(\.\d+)?", folder) is not None


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint's folder, '/'-separated."""
    size: int
    """Bytes."""
    digest: str
    """Algorithm and value, such as `xxh3-128:99aa06d3014798d86001c324468d497f`."""

    @classmethod
    def parse(cls, item: Any, what: str) -> FileEntry:
        """Read and check one item of a record. Raises ManifestError."""
        if not isinstance(item, dict):
            raise ManifestError(f"The {what} is damaged: a file is not an object.")
        _only_known_keys(item, cls, what)
        digest = _text(item, "digest", what)
        if not is_digest(digest):
            raise ManifestError(f"The {what} has the digest {digest[:100]!r}; only {ALGORITHM!r} is known.")
        return cls(clean_path(_text(item, "path", what)), count(item, "size", what), digest)


@dataclass(frozen=True)
class Position:
    """Where in the data and the schedule a checkpoint stands."""

    global_step: int
    epoch: float | None = None
    """As the framework counts it: 1.5 is half-way through the second epoch."""
    samples_seen: int | None = None
    world_size: int | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    """Length of the schedule in steps."""
    dataset_length: int | None = None
    """Samples in one epoch."""
    fingerprint: str | None = None
    """Of the indices that the sampler has handed out in this epoch so far, 16 hexadecimal digits."""
    epoch_steps: int | None = None
    """Optimizer steps in one epoch."""
    data_seed: int | None = None
    """The order of each epoch is drawn from this and the number of the epoch."""
    lr_scheduler: str | None = None
    """Class of the learning rate schedule."""

    @classmethod
    def parse(cls, record: Any, what: str) -> Position:
        """Read and check the position in a record. Raises ManifestError."""
        if not isinstance(record, dict):
            raise ManifestError(f"The {what} is damaged: 'position' is missing.")
        _only_known_keys(record, cls, what)
        values: dict[str, Any] = {"global_step": count(record, "global_step", what)}
        for key, value in record.items():
            if value is not None and key != "global_step":
                parse: _Parser = _PARSERS.get(key, count)
                values[key] = parse(record, key, what)
        return cls(**values)


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds: its files, its position, its origin. The existence of the manifest is the commit.

    Example:
        >>> manifest = Manifest.parse(data)
        >>> manifest.key, manifest.folder, manifest.size
        ('000003-0000000500', 'checkpoint-500', 1317921234)
    """

    key: str
    """Name of the record: attempt and step of a checkpoint, or name and version of any other folder."""
    folder: str
    """Where the files are, below the run URL."""
    attempt: int
    step: int
    nonce: str
    """Chosen when the folder was saved. Equal nonces mean the same save, so a repeated commit is not a second one."""
    files: tuple[FileEntry, ...]
    position: Position
    exact: bool | None = True
    """Whether a resume from here equals an uninterrupted run; None: not verified. Older readers take None for False."""
    inexact_reason: str | None = None
    """Why `exact` is not True."""
    created: float = 0.0
    """Seconds since 1970 on the machine that saved it. Shown, never compared."""
    metrics: dict[str, float] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    """Host, library versions and the like, for people."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def exactness(self) -> Exactness:
        """Whether a resume from here equals an uninterrupted run, and why not."""
        return Exactness(self.exact, self.inexact_reason)

    def object_path(self, entry: FileEntry) -> str:
        """Where a file's bytes are, below the run URL."""
        return f"{self.folder}/{entry.path}"

    def encode(self) -> bytes:
        """The JSON that is stored."""
        return encode_record({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def parse(cls, data: bytes, key: str) -> Manifest:
        """Read and check the JSON stored under `key`. Raises ManifestError with the first problem."""
        what = f"manifest {key!r}"
        record = decode_record(data, what)
        version = record.pop("format", None)
        if version != FORMAT:
            _raise_unknown_format(version, what)
        _only_known_keys(record, cls, what)
        files = record.get("files")
        if not isinstance(files, list):
            raise ManifestError(f"The {what} is damaged: 'files' is missing.")
        if len(files) > MAX_FILES:
            raise ManifestError(
                f"The {what} names {len(files)} files, more than the {MAX_FILES} that are accepted."
            )
        manifest = cls(
            key=_text(record, "key", what),
            folder=clean_path(_text(record, "folder", what)),
            attempt=count(record, "attempt", what),
            step=count(record, "step", what),
            nonce=_matching(record, "nonce", what, r"[0-9A-Za-z-]{1,100}"),
            files=tuple(FileEntry.parse(item, what) for item in files),
            position=Position.parse(record.get("position"), what),
            exact=as_exact(record.get("exact", False)),
            inexact_reason=_optional_text(record.get("inexact_reason")),
            created=_number(record.get("created", 0.0), "created", what),
            metrics=_numbers(record.get("metrics", {}), what),
            origin=_texts(record.get("origin", {}), what),
        )
        if manifest.key != key:
            raise ManifestError(f"The {what} has the key {manifest.key[:100]!r}: it was moved or forged.")
        check_paths([entry.path for entry in manifest.files], what)
        return manifest


def parse_folder_key(key: str) -> tuple[str, int] | None:
    """(name, version) from the key of a named folder; None if it is not one."""
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})-([0-9]{6,9})", key)
    found = (match[1], int(match[2])) if match else None
    return found if found and found[1] and f"{found[0]}-{found[1]:06d}" == key else None


def folder_name(name: str) -> str:
    """A name for `cloud.save`, checked: one path part that no checkpoint uses."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name.startswith("checkpoint-"):
        raise ConfigurationError(
            f"{name!r} cannot name a folder of a run. Use letters, digits, '.', '_' and '-', and do not begin with "
            "'checkpoint-', for example name='final'."
        )
    return name


def check_paths(paths: list[str], what: str) -> None:
    """Raise ManifestError for names that occur twice, or that are both a file and a folder."""
    seen = set()
    for path in paths:
        if path in seen:
            raise ManifestError(f"The {what} names the file {path!r} twice.")
        seen.add(path)
    for path in paths:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in seen:
                raise ManifestError(f"The {what} names {parent!r} as a file and as a folder.")
            parent = parent.rpartition("/")[0]


def encode_record(record: dict[str, Any]) -> bytes:
    """JSON as we store it: one line, readable, with a newline."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) + "\n").encode(
            "utf-8", "backslashreplace"
        )
    except (TypeError, ValueError, RecursionError) as error:  # a NaN, or a key that is not a text
        raise ManifestError(f"A record cannot be written as JSON ({error}).") from None


def decode_record(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes. Raises ManifestError."""
    if len(data) > MAX_RECORD_BYTES:
        raise ManifestError(
            f"The {what} has {len(data)} bytes, more than the {MAX_RECORD_BYTES} that are accepted."
        )
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"The {what} is damaged: it is not JSON ({str(error)[:100]}).") from None
    if not isinstance(record, dict):
        raise ManifestError(f"The {what} is damaged: it is not a JSON object.")
    return record


def as_exact(value: object) -> bool | None:
    """`exact` in a record; what is neither true nor null is False."""
    return value if value is True or value is None else False


def texts(record: dict[Any, Any]) -> dict[str, str]:
    """Names and values for people, from an untrusted record."""
    return {str(key)[:200]: str(item)[:2000] for key, item in record.items()}


def _raise_unknown_format(version: Any, what: str) -> NoReturn:
    name, _, ours = FORMAT.rpartition("/")
    match = re.fullmatch(re.escape(name) + r"/(\d{1,9})", version) if isinstance(version, str) else None
    if match and int(match[1]) > int(ours):
        raise NewerFormatError(
            f"The {what} has the format {version!r}, and this version reads {FORMAT!r}. Upgrade hf_cloudtrain, or "
            "choose another checkpoint."
        )
    raise ManifestError(f"The {what} is damaged: its format is {str(version)[:50]!r}, not {FORMAT!r}.")


def _only_known_keys(record: dict[str, Any], kind: type[Any], what: str) -> None:
    known = [item.name for item in dataclasses.fields(kind)]
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key[:100], known, n=1)
            hint = f" (nearest known key: {near[0]!r})" if near else ""
            raise ManifestError(f"The {what} has the unknown key {key[:100]!r}{hint}.")


def count(record: dict[str, Any], key: str, what: str) -> int:
    """A whole number from 0 on. Raises ManifestError."""
    value = record.get(key)
    if type(value) is not int or not 0 <= value < 2**53:
        raise _wrong(value, key, what, "a count")
    return value


def _text(record: dict[str, Any], key: str, what: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ManifestError(f"The {what} is damaged: {key!r} is not a text.")
    return value


def _matching(record: dict[str, Any], key: str, what: str, pattern: str) -> str:
    value = _text(record, key, what)
    if not re.fullmatch(pattern, value):
        raise ManifestError(f"The {what} is damaged: {key!r} is {value[:50]!r}.")
    return value


def _optional_text(value: Any) -> str | None:
    return value[:1000] if isinstance(value, str) else None


def _seed(record: dict[str, Any], key: str, what: str) -> int:
    value = record[key]
    # The seeds of torch have 64 bits, with or without a sign.
    if type(value) is not int or not -(2**64) < value < 2**64:
        raise _wrong(value, key, what, "a seed")
    return value


def _number(value: Any, key: str, what: str) -> float:
    if type(value) not in (int, float) or not -1e300 < value < 1e300:  # excludes NaN, too
        raise _wrong(value, key, what, "a number")
    return float(value)


def _numbers(value: Any, what: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ManifestError(f"The {what} is damaged: 'metrics' is not an object.")
    return {key[:200]: _number(item, key[:200], what) for key, item in value.items()}


def _texts(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ManifestError(f"The {what} is damaged: 'origin' is not an object.")
    return texts(value)


def _wrong(value: Any, key: str, what: str, kind: str) -> ManifestError:
    return ManifestError(f"The {what} is damaged: {key!r} is {str(value)[:50]!r}, not {kind}.")


_PARSERS: dict[str, _Parser] = {
    "epoch": lambda record, key, what: _number(record[key], key, what),
    "num_train_epochs": lambda record, key, what: _number(record[key], key, what),
    "fingerprint": lambda record, key, what: _matching(record, key, what, r"[0-9a-f]{16}"),
    "data_seed": _seed,
    "lr_scheduler": lambda record, key, what: _text(record, key, what)[:200],
}
"""For the fields of a position that are not counts."""
