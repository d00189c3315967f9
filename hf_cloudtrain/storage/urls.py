"""Storage URLs: their one normal form, or the refusal that says what to type; protocol and folder; the URL as it may be shown.

Every door uses it, because `Storage` does: callback, loop, functions, environment, job files and command line. Whatever has
no `://` is a folder, so each typing error that would turn a URL into a folder is refused: a run that trains into a folder
by mistake looks green and is lost with the machine.
"""

from __future__ import annotations

import difflib
import os
import posixpath
import re

from hf_cloudtrain.errors import ConfigurationError, MissingExtraError
from hf_cloudtrain.runtime.redaction import has_user_part, redact

EXAMPLE = "s3://bucket/runs/mrpc"

EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
"""Protocols whose packages are installed by an extra of this package."""

_LOCAL = ("file", "local")
_COMMON = (*EXTRAS, "hf", "memory", *_LOCAL, "http", "https")
"""Protocols that are known without fsspec, whose import takes 0.2 s; also those that a typing error is compared with."""
_BUCKET = re.compile(r"[A-Za-z0-9._@-]+|arn:[A-Za-z0-9:._-]+")
"""Buckets, containers (with `@account`) and access points. Each cloud has further rules of its own."""
_UNEXPANDED = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\}?|\([^)]*\)?)|`[^`]*`?|\{[A-Za-z_][\w.]*\}")
"""Variables and commands of a shell, and fields of a Python text without its `f`."""
_DRIVE = re.compile(r"/?([A-Za-z]):[/\\]+")


def normal_url(url: str | os.PathLike[str]) -> str:
    """The normal form of a URL, a folder or a `pathlib.Path`: all spellings of one place give one text.

    Whitespace around it goes, and so do empty and `.` parts and slashes at the end; the protocol becomes lower-case, a
    folder absolute.

    Raises:
        ConfigurationError: it is neither a URL nor a folder, or nearly a URL; the message has the form to type.

    Example:
        >>> normal_url("S3://bucket/runs//mrpc/ ")
        's3://bucket/runs/mrpc'
    """
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"{url!r} is not a run URL. Use a URL such as {EXAMPLE!r}, or a folder.")
    text = text.strip()
    _check_characters(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _normal_folder(text)
    scheme = scheme.lower()
    _check_scheme(text, scheme, rest)
    if scheme in _LOCAL:
        return f"file://{_folder_of_url(text, rest)}"
    if scheme in ("http", "https"):  # only read; every character may matter to the server
        return f"{scheme}://{rest.rstrip('/')}"
    return f"{scheme}://{_normal_rest(text, scheme, rest)}"


def shown_url(url: str | os.PathLike[str]) -> str:
    """The normal form without credentials, as it may be shown and stored. Raises ConfigurationError."""
    return redact(normal_url(url))


def protocol_of(url: str) -> str:
    """The fsspec protocol of a normal URL."""
    return "file" if is_local(url) else url.partition("://")[0]


def is_local(url: str) -> bool:
    """Whether a URL names a folder of this machine: `file://`, or a plain path."""
    scheme, separator, _ = url.partition("://")
    return not separator or scheme.lower() in _LOCAL


def local_path(url: str) -> str:
    """The absolute folder that a plain path or a `file://` URL names."""
    scheme, separator, rest = url.partition("://")
    return os.path.abspath(rest if separator else os.path.expanduser(scheme)) or "/"


def missing_extra(protocol: str, reason: str) -> MissingExtraError:
    """The error for a protocol whose packages are missing, with the command that installs them."""
    extra = EXTRAS.get(protocol)
    command = f"pip install 'hf_cloudtrain[{extra}]'" if extra else "install the package that fsspec names"
    return MissingExtraError(
        f"{protocol + '://'!r} needs packages that are not installed: {command} ({reason})."
    )


def _refusal(text: str, reason: str, right: str, more: str = "") -> ConfigurationError:
    """The error that quotes a value, says what is wrong with it, and what to type instead."""
    text = right if has_user_part(right) else text  # a mistyped URL hides where its password is
    return ConfigurationError(
        f"{redact(text)!r} cannot be used as a URL: {reason}. Write {redact(right)!r}{more}."
    )


def _check_characters(text: str) -> None:
    """Refuse what no URL and no folder is meant to contain, wherever it stands."""
    if not text.isprintable():
        right = "".join(char for char in re.split(r"[\r\n]", text)[0] if char.isprintable())
        raise _refusal(text, "it contains a line break or an invisible character", right.strip())
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        raise _refusal(text, "the quotes are part of it", text[1:-1])
    if found := _UNEXPANDED.search(redact(text)):
        raise _refusal(
            text,
            f"{found[0]!r} stands in it as it is, and nothing here replaces it",
            EXAMPLE,
            " with the value in its place; a shell puts it in within double quotes, Python by os.path.expandvars(…) or an f-string",
        )
    if drive := _DRIVE.match(text):
        below = text[drive.end() :].replace("\\", "/")
        raise _refusal(
            text, "it is a path of Windows", f"/mnt/{drive[1].lower()}/{below}", ", its name in WSL"
        )
    if "\\" in text:
        raise _refusal(text, "it contains a backslash", _repaired(text.replace("\\", "/")))


def _normal_folder(text: str) -> str:
    if found := _missing_separator(text):
        is_known = found[1].lower() in _COMMON
        right = f"sftp://{text.replace(':', '', 1)}" if "@" in found[1] else _repaired(text)
        why = "'://' is missing, as pathlib leaves it out" if ":/" in text else "'://' is missing"
        raise _refusal(
            text, why, right, "" if is_known else f", or {'./' + text!r} for a folder of this name"
        )
    folder = os.path.expanduser(text)
    if folder.startswith("~"):
        raise _refusal(
            text, f"{folder.partition('/')[0]!r} is not a home folder of this machine", f"./{text}"
        )
    return _absolute(folder)


def _missing_separator(text: str) -> re.Match[str] | None:
    """A match whose first group is what may be a protocol, where a folder is less likely to be meant."""
    of_any = re.match(r"([^/:]+):(?:/|$)", text)
    of_known = re.match(r"([A-Za-z][A-Za-z0-9+-]*)(?::|[;.,\s]*//)", text)
    return of_any or (of_known if of_known and of_known[1].lower() in _COMMON else None)


def _check_scheme(text: str, scheme: str, rest: str) -> None:
    if "::" in scheme:
        raise _refusal(text, "chained protocols are not supported", text.rpartition("::")[2])
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise _refusal(text, f"{scheme!r} is not a protocol", _repaired(text))
    if scheme in _COMMON or _knows(scheme):
        if has_user_part(text) and scheme in EXTRAS:
            raise ConfigurationError(
                f"The run URL {redact(text)!r} contains credentials. Remove them, and use the environment, a profile or "
                "storage_options instead: URLs end up in logs."
            )
        return
    near = _nearest(scheme)
    known = "s3://, gs://, az://, hf://buckets/, file://, or one that an fsspec plug-in registers"
    if near is None:
        raise ConfigurationError(f"Unknown protocol {scheme + '://'!r} in {redact(text)!r}. Use {known}.")
    raise _refusal(
        text, f"{scheme + '://'!r} is an unknown protocol", f"{near}://{rest}", f"; known are {known}"
    )


def _folder_of_url(text: str, rest: str) -> str:
    """The absolute folder of a `file://` URL."""
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    if not path.startswith("/"):
        right = path if path.startswith("~") else f"file://{os.path.abspath(path)}"
        raise _refusal(text, "a file URL needs an absolute path, and thus three slashes", right)
    return _absolute(path)


def _absolute(path: str) -> str:
    """As abspath, which keeps two slashes at the beginning."""
    return re.sub("^/+", "/", os.path.abspath(path))


def _normal_rest(text: str, scheme: str, rest: str) -> str:
    """What follows `://`, for protocols of object stores and servers."""
    in_bucket = scheme in EXTRAS
    path = re.sub("/+", "/", rest)
    if (in_bucket or scheme == "hf") and not path.strip("/"):
        raise _refusal(text, "the bucket is missing", f"{scheme}://{EXAMPLE.partition('://')[2]}")
    if (in_bucket or scheme == "hf") and path.startswith("/"):
        raise _refusal(text, "the bucket is missing between '://' and '/'", f"{scheme}:/{path}")
    parts = [part for part in path.split("/") if part != "."]
    if ".." in parts:
        right = parts[0] + posixpath.normpath("/" + "/".join(parts[1:]))
        raise _refusal(text, "'..' has no meaning in a URL", f"{scheme}://{right.rstrip('/')}")
    if in_bucket and (query := re.search(r"\?[^/]*=", path)):
        raise _refusal(
            text,
            "a query has no meaning in it",
            f"{scheme}://{path[: query.start()]}",
            "; credentials belong in storage_options",
        )
    if in_bucket and not _BUCKET.fullmatch(parts[0]):
        right = "/".join(["bucket", *parts[1:]])
        raise _refusal(text, f"{parts[0]!r} is not the name of a bucket", f"{scheme}://{right}")
    normal = "/".join(parts).rstrip("/")
    return normal.lstrip("/") if scheme == "memory" else normal


def _repaired(text: str) -> str:
    """The URL that a mistyped one is most likely to mean; a path without `:` and `//` stays."""
    found = re.fullmatch(r"[^A-Za-z~./]*([A-Za-z][A-Za-z0-9+-]*)?[.,;\s]*(?::|//)[:/]*(.*)", text)
    if found is None or text.startswith("//"):
        return text
    scheme = (found[1] or "").lower()
    near = scheme if scheme in _COMMON or _knows(scheme) else _nearest(scheme) or "s3"
    below = found[2] or EXAMPLE.partition("://")[2]
    return f"{near}:///{below}" if near in _LOCAL else f"{near}://{below}"


def _nearest(scheme: str) -> str | None:
    renamed = {"s3n": "s3", "gcp": "gs", "azure": "az", "wasb": "az", "wasbs": "az", "huggingface": "hf"}
    near = difflib.get_close_matches(scheme, _COMMON, n=1, cutoff=0.5)
    return renamed.get(scheme) or (near[0] if near else None)


def _knows(scheme: str) -> bool:
    """Whether fsspec, or one of its plug-ins, has the protocol."""
    from fsspec.registry import known_implementations, registry

    return scheme in known_implementations or scheme in registry
