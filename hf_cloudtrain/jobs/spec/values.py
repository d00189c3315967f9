"""The types of the values in a job file. A check raises the end of a sentence that begins with the key: "must be …"."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import folder_name
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.spec.diagnostics import quoted
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT
from hf_cloudtrain.runtime.redaction import has_user_part, redact
from hf_cloudtrain.storage.urls import normal_url

MAX_DEVICES = 65_536
"""Largest count of nodes, processes or devices: more than the largest cluster has."""
MAX_LENGTH = 2048
"""Characters of the longest path or URL. Linux accepts 4096 bytes in a path (PATH_MAX), and files go below this one."""
MAX_MACHINE_LENGTH = 200
"""Characters of the longest machine type: the cost of parsing grows with the square of the length."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_MACHINE = (
    r"([a-z0-9]+)-([1-9][0-9]{0,3})gb-([a-z0-9]+(?:-[a-z0-9]+)*)-([1-9][0-9]{0,3})g"
    r"-(?!spot$)([a-z0-9]+(?:-[a-z0-9]+)*?)(-spot)?"
)
_WHOLE = frozenset("bin boot dev etc lib lib32 lib64 libx32 proc sbin sys".split())
"""Folders of the kernel and of the Filesystem Hierarchy Standard, with all that is below."""
_FREE_BELOW_USR = frozenset(("local", "src"))
"""Where images keep their own programs, such as `/usr/src/app`."""
_SYSTEM = frozenset(
    [
        *"home opt root run tmp usr usr/local usr/src var".split(),
        *(f"usr/local/{name}" for name in "bin etc include lib lib64 libexec sbin share".split()),
        *(f"var/{name}" for name in "cache lib lock log mail run spool tmp".split()),
    ]
)
"""Folders that programs need; folders below them may be mount paths."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine type: `[cloud]-[memory]-[gpu]-[count]g-[region][-spot]`.

    Example:
        >>> Machine.parse("azure-16gb-v100-4g-eastus-spot").gpus
        4
    """

    cloud: str
    memory_gb: int
    """Memory of one GPU."""
    gpu: str
    gpus: int
    region: str
    is_spot: bool

    @classmethod
    def parse(cls, text: str) -> Machine:
        """The machine type of a name. Raises ConfigurationError."""
        match = re.fullmatch(_MACHINE, text[: MAX_MACHINE_LENGTH + 1])
        if match is None or len(text) > MAX_MACHINE_LENGTH:
            raise ConfigurationError(
                f"{text[:100]!r} is not a machine type. Write it as [cloud]-[memory]-[gpu]-[count]g-[region][-spot], such as "
                "'azure-16gb-v100-4g-eastus-spot'."
            )
        cloud, memory, gpu, gpus, region, spot = match.groups()
        return cls(cloud, int(memory), gpu, int(gpus), region, spot is not None)

    def __str__(self) -> str:
        spot = "-spot" if self.is_spot else ""
        return f"{self.cloud}-{self.memory_gb}gb-{self.gpu}-{self.gpus}g-{self.region}{spot}"


def is_below(path: str, folder: str) -> bool:
    """Whether an absolute path is a folder or in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_vm(text: str) -> str:
    """The name of a machine type. Raises ValueError."""
    try:
        Machine.parse(text)
    except ConfigurationError as error:
        raise ValueError(f"is invalid: {error}") from None
    return text


def check_mount_path(text: str) -> str:
    """An absolute path that hides nothing programs need, without '//' and the '/' at its end. Raises ValueError."""
    path = _path(text)
    if not path.startswith("/"):
        raise _invalid(text, "an absolute path, such as '/workspace'")
    top, *inner = path.split("/")[1:3]
    hides_top = top in _WHOLE or (top == "usr" and inner and inner[0] not in _FREE_BELOW_USR)
    if hides_top or path == "/" or path[1:] in _SYSTEM:
        raise ValueError(
            f"is {quoted(text)}, which would hide the machine's own {f'/{top}' if hides_top else path!r}. Use a different path, "
            "such as '/workspace'."
        )
    return path


def check_folder(text: str) -> str:
    """A mount path, or a relative path without '..'. Raises ValueError."""
    return check_mount_path(text) if text.startswith("/") else _path(text)


def _invalid(text: str, valid: str) -> ValueError:
    return ValueError(f"must be {valid}, not {quoted(text)}.")


def _matching(pattern: str, valid: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text) or not text.isprintable():
            raise _invalid(text, valid)
        return text

    return AfterValidator(check)


def _name(text: str) -> str:
    if not re.fullmatch(_NAME, text):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", redact(text))[:63].strip("-._")
        hint = f" Try {better!r}." if re.fullmatch(_NAME, better) else ""
        valid = "at most 63 letters, digits, '.', '_' and '-', the first a letter or digit"
        raise ValueError(f"{_invalid(text, valid)}{hint}")
    return text


def _dataset(text: str) -> str:
    if text.startswith("huggingface:"):
        raise ValueError(
            f"is {quoted(text)}: PeriFlow's public datasets are not available. Load it in the script, or upload it as a dataset."
        )
    name, separator, version = text.partition("@")
    try:
        folder_name(name)
    except ConfigurationError:
        valid = "the name of a dataset, such as 'mnli', or of one of its versions, such as 'mnli@2'"
        raise ValueError(f"{_invalid(text, valid)} List them with `cloudtrain data list`.") from None
    if separator and not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ValueError(f"is {quoted(text)}: the version must be a whole number from 1, such as 'mnli@2'.")
    return text


def _path(text: str) -> str:
    if not text or not text.isprintable() or ".." in text.split("/") or len(text) > MAX_LENGTH:
        raise _invalid(text, "a path without '..' and control characters")
    if text.startswith("~") or re.search(r"\$[A-Za-z_{(]", text):
        # The command's shell would replace them, with values of its machine; the folder would be a different one.
        valid = (
            "a path without '~' and '$', which a job file does not replace, such as '/root/ckpt' or 'ckpt'"
        )
        raise _invalid(text, valid)
    return posixpath.normpath(re.sub("/+", "/", text))


def _command(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty.")
    return text


def _run_url(text: str) -> str:
    """The normal form: `~/runs` is a folder of the user who submits. Raises ValueError."""
    if len(text) > MAX_LENGTH:
        raise _invalid(text, f"at most {MAX_LENGTH} characters long")
    if has_user_part(text):
        raise ValueError(
            "contains a user and a password, which would appear in every log. Set them in the storage's own variables, or "
            f"in {env.STORAGE_OPTIONS}."
        )
    try:
        url = normal_url(text) if text.strip() else ""
    except ConfigurationError as error:
        raise ValueError(f"is invalid: {error}") from None
    if not re.match(r"\s*(?:[/~]|\S+://)", text):
        valid = "a URL, such as 's3://bucket/runs/mnli', or an absolute path"
        raise ValueError(f"{_invalid(text, valid)} The script does not run in this folder.")
    return url


def _whole(value: Any) -> Any:
    # pydantic accepts 6_0 and 6.0 too, which other programs read as something else, or not at all.
    if isinstance(value, str) and not re.fullmatch("-?[0-9]+", value):
        raise PydanticCustomError("int_parsing", "not a whole number")
    return value


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("is not the name of a variable: use letters, digits and '_', the first not a digit.")
    if name in CONTRACT and name != env.GRACE:
        instead = {
            env.RUN_URL: "Write `run_url` at the top level.",
            env.EXPERIMENT: "Write `experiment` at the top level.",
            env.CHECKPOINT_DIR: "Write `output_checkpoint_dir` below `checkpoint`.",
        }
        raise ValueError(f"is set by the engine. {instead.get(name, 'Remove it.')}")
    return name


def _text_schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern})


Name = Annotated[str, AfterValidator(_name), _text_schema(f"^{_NAME}$")]
MountPath = Annotated[str, AfterValidator(check_mount_path), _text_schema("^/")]
# A word becomes one argument, or a line of a script.
Word = Annotated[
    str,
    _matching(r"[^\s-]\S*", "one word without spaces that does not begin with '-'"),
    _text_schema(r"^[^\s-]\S*$"),
]
Whole = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
Count = Annotated[Whole, Field(ge=1, le=MAX_DEVICES)]
S3Url = Annotated[
    str, _matching(r"s3://[^/\s]\S*", "an S3 URL, such as 's3://bucket/folder'"), _text_schema("^s3://")
]
Seconds = Annotated[Whole, Field(ge=1, le=10**9)]
VmName = Annotated[
    str, AfterValidator(check_vm), _text_schema(r"^[a-z0-9]+-[0-9]+gb-[a-z0-9-]+-[1-9][0-9]*g-[a-z0-9-]+$")
]
Folder = Annotated[str, AfterValidator(check_folder)]
DatasetName = Annotated[str, AfterValidator(_dataset)]
CommandText = Annotated[str, AfterValidator(_command)]
RunUrl = Annotated[str, AfterValidator(_run_url)]
SlurmTime = Annotated[
    str,
    _matching(
        r"(?:[0-9]{1,4}-[0-9]{1,2}|[0-9]{1,6})(?::[0-9]{1,2}){0,2}",
        "minutes, 'minutes:seconds', 'hours:minutes:seconds' or 'days-hours:minutes:seconds'",
    ),
]
Variable = Annotated[str, AfterValidator(_variable)]
# Editors read `DEBUG: 1` as a number; here it is the text "1".
Value = Annotated[str, WithJsonSchema({"type": ["string", "number", "boolean"]})]
