"""What a value in a job file may be: checks that raise a sentence without its subject, and the types made of them."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.job_problems import quoted
from hf_cloudtrain.machine import Machine
from hf_cloudtrain.plan import CONTRACT
from hf_cloudtrain.redaction import has_user_part, redact

MAX_DEVICES = 65_536
"""Largest count of anything: more than the largest cluster has."""


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", redact(text))[:63].strip("-._")
        hint = f" Try {better!r}." if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", better) else ""
        raise ValueError(
            f"is {quoted(text)}: up to 63 letters, digits, '.', '_' and '-', of which the first is a letter or digit."
            + hint
        )
    return text


def _dataset(text: str) -> str:
    if text.startswith("huggingface:"):
        raise ValueError(
            f"is {quoted(text)}: PeriFlow's public datasets are not here. Load it in the script, or make a dataset of it."
        )
    name, separator, version = text.partition("@")
    _name(name)
    if separator:
        _name(version)
    return text


def check_vm(text: str) -> str:
    """The name of a machine. Raises ValueError."""
    try:
        Machine.parse(text)
    except ConfigurationError as error:
        raise ValueError(f"is wrong: {error}") from None
    return text


def check_mount(text: str) -> str:
    """An absolute path that hides nothing a program needs, without '//' and a last '/'. Raises ValueError."""
    path = _path(text)
    if not path.startswith("/"):
        raise ValueError(f"is {quoted(text)}: an absolute path is needed, such as '/workspace'.")
    top = path.split("/")[1]
    if top in _KERNEL or (posixpath.dirname(path) == "/" and top in _SYSTEM):
        raise ValueError(
            f"is {quoted(text)}, which would hide the machine's own {'/' + top!r}. Name another, such as '/workspace'."
        )
    return path


def check_folder(text: str) -> str:
    """Such a path, or a relative one that stays below. Raises ValueError."""
    return check_mount(text) if text.startswith("/") else _path(text)


def _path(text: str) -> str:
    if not text or not text.isprintable() or ".." in text.split("/"):
        raise ValueError(f"is {quoted(text)}: a path without '..' and control characters is needed.")
    return posixpath.normpath(re.sub("/+", "/", text))


_SYSTEM = frozenset("bin boot etc home lib lib32 lib64 libx32 opt root run sbin tmp usr var".split()) | {""}
"""Folders of the Filesystem Hierarchy Standard that programs need; what is below them may be used."""
_KERNEL = frozenset(("dev", "proc", "sys"))
"""File systems of the kernel, with all that is below."""


def _command(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty.")
    return text


def _run_url(text: str) -> str:
    if has_user_part(text):
        raise ValueError(
            "has a user and a password in it, and would be in every log. Give them as the storage's own variables, or "
            f"in {env.STORAGE_OPTIONS}."
        )
    if not re.match(r"[a-z][a-z0-9+.-]*://[^/]|(?:file|local)://|/|~/", text) or not text.isprintable():
        raise ValueError(
            f"is {quoted(text)}: a URL is needed, such as 's3://bucket/runs/mnli', or an absolute path. The script "
            "does not run in this folder."
        )
    return text


def _s3_url(text: str) -> str:
    if not re.fullmatch(r"s3://[^/\s]\S*", text):
        raise ValueError(f"is {quoted(text)}: it is at S3 alone, such as 's3://bucket/folder'.")
    return text


def _word(text: str) -> str:
    # It becomes one argument, or a line of a script.
    if not re.fullmatch(r"[^\s-]\S*", text) or not text.isprintable():
        raise ValueError(f"is {quoted(text)}: one word is needed, without spaces, that begins with no '-'.")
    return text


def _slurm_time(text: str) -> str:
    if not re.fullmatch(r"(?:\d{1,4}-\d{1,2}(?::\d{1,2}){0,2})|\d{1,6}(?::\d{1,2}){0,2}", text):
        raise ValueError(
            f"is {quoted(text)}: minutes, 'minutes:seconds', 'hours:minutes:seconds' or 'days-hours:minutes:seconds'."
        )
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("is no name of a variable: letters, digits and '_', of which the first is no digit.")
    if name == env.RUN_URL:
        raise ValueError("is set by the engine. Write `run_url`, at the top.")
    if name == env.CHECKPOINT_DIR:
        raise ValueError("is set by the engine. Write `output_checkpoint_dir`, below `checkpoint`.")
    if name in CONTRACT and name != env.GRACE:
        raise ValueError("is set by the engine. Leave it out.")
    return name


def _text_schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern})


Name = Annotated[str, AfterValidator(_name), _text_schema(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Mount = Annotated[str, AfterValidator(check_mount), _text_schema("^/")]
Word = Annotated[str, AfterValidator(_word), _text_schema(r"^[^\s-]\S*$")]
Count = Annotated[int, Field(ge=1, le=MAX_DEVICES)]
S3Url = Annotated[str, AfterValidator(_s3_url), _text_schema("^s3://")]
Seconds = Annotated[int, Field(ge=1, le=10**9)]
VmName = Annotated[
    str, AfterValidator(check_vm), _text_schema(r"^[a-z0-9]+-[0-9]+gb-[a-z0-9-]+-[1-9][0-9]*g-[a-z0-9-]+$")
]
Folder = Annotated[str, AfterValidator(check_folder)]
DatasetName = Annotated[str, AfterValidator(_dataset)]
CommandText = Annotated[str, AfterValidator(_command)]
RunUrl = Annotated[str, AfterValidator(_run_url)]
SlurmTime = Annotated[str, AfterValidator(_slurm_time)]
Variable = Annotated[str, AfterValidator(_variable)]
# Editors read `DEBUG: 1` as a number; here it is the text "1".
Value = Annotated[str, WithJsonSchema({"type": ["string", "number", "boolean"]})]
