"""What a client's error means: which of our errors it becomes, and what the user can do."""

from __future__ import annotations

import errno
import logging
import re
import traceback

from hf_cloudtrain.errors import (
    CloudTrainError,
    ObjectNotFoundError,
    ObjectTruncatedError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.storage.urls import missing_extra

logger = logging.getLogger(__name__)

ASK_DOCTOR = "`cloudtrain doctor` says where to put them."
_REFUSED = set(
    "PermissionDeniedError UnauthenticatedError NoCredentialsError ClientAuthenticationError UnauthorizedSSOTokenError "
    "SSOTokenLoadError PartialCredentialsError CredentialRetrievalError TokenRetrievalError DefaultCredentialsError RefreshError "
    "CredentialUnavailableError".split()
)
# A status code, and not the number in a name such as checkpoint-403 or 301-of-1000.json.
_CODE = r"(?<![\w./-])(?:{})(?![\w/-]|\.\w)"
_THROTTLED = re.compile(
    _CODE.format("503|429")
    + r"|\b(?:SlowDown|Throttl\w*|TooManyRequests|ServerBusy|rateLimitExceeded|RequestLimitExceeded)\b"
)
_BEYOND_END = re.compile(
    _CODE.format("416")
    + r"|InvalidRange|RangeNotSatisfiable|not satisfiable|range (?:started|starting) at|EOFError",
    re.IGNORECASE,
)
_REFUSED_TEXT = re.compile(
    _CODE.format("403|401")
    + r"|\b(?:Forbidden|AccessDenied|AuthorizationFailure|AuthenticationFailed|InvalidAccessKeyId|SignatureDoesNotMatch|"
    r"ExpiredToken(?:Exception)?|TokenRefreshRequired|RequestExpired|InvalidToken|Unable to locate credentials|"
    r"DefaultCredentialsError)\b"
)
_NO_CREDENTIALS = re.compile(r"NoCredentialsError|Unable to locate credentials|DefaultCredentialsError")
_OTHER_REGION = re.compile(
    r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|configured region|"
    + _CODE.format("301")
)


def explain(error: Exception, what: str, protocol: str, secrets: tuple[str, ...]) -> CloudTrainError:
    """One of our errors for a client's error, which starts with "Could not <what>" and contains none of the secrets.

    The client's traceback goes to the log at DEBUG level, also without secrets.
    """
    if isinstance(error, CloudTrainError):
        return error
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("Could not %s:\n%s", what, redact("".join(traceback.format_exception(error)), secrets))
    said = str(error).partition("\n\nDebug source:")[0].strip()  # obstore appends a dump of its own objects
    reason = redact(f"{type(error).__name__}: {said}", secrets)[:500]
    names = {kind.__name__ for kind in type(error).__mro__}
    number = getattr(error, "errno", None)
    if _OTHER_REGION.search(reason):
        return StorageError(
            f"Could not {what}: the bucket is in another region ({reason}). Set AWS_REGION, or pass "
            "storage_options={'client_kwargs': {'region_name': …}}."
        )
    if isinstance(error, OSError) and number in (errno.ENOSPC, errno.EDQUOT):
        full = StorageError(f"Could not {what}: no space is left on the disk. Free some and try again.")
        full.errno = number  # as an argument, it would stand in front of the message
        return full
    if isinstance(error, FileNotFoundError) or names & {"NotFoundError", "ResourceNotFoundError"}:
        hint = "Create the bucket, or correct the URL." if re.search("ucket|ontainer", reason) else ""
        return ObjectNotFoundError(f"Could not {what}: it does not exist ({reason}). {hint}")
    if _BEYOND_END.search(reason):
        return ObjectTruncatedError(f"Could not {what}: it is shorter than expected ({reason}).")
    if isinstance(error, PermissionError) or names & _REFUSED or _REFUSED_TEXT.search(reason):
        return _refused(what, reason)
    if isinstance(error, ImportError):
        return missing_extra(protocol, reason)
    if (
        isinstance(error, (TypeError, NotImplementedError, NotADirectoryError, IsADirectoryError))
        or number in (errno.EROFS, errno.ENAMETOOLONG)
        or names & {"ProfileNotFound", "ConfigParseError", "PartialCredentialsError"}
    ):
        return StorageError(f"Could not {what} ({reason}).")
    return StorageUnavailableError(f"Could not {what} ({reason}). Check the network and the endpoint.")


def _refused(what: str, reason: str) -> StoragePermissionError:
    if _NO_CREDENTIALS.search(reason):
        return StoragePermissionError(f"Could not {what}: no credentials were found ({reason}). {ASK_DOCTOR}")
    return StoragePermissionError(
        f"Could not {what}: the storage refused access ({reason}). Check the credentials and their permissions."
    )


def is_throttled(error: Exception) -> bool:
    """Whether the storage says that it receives too many requests."""
    return _THROTTLED.search(str(error)) is not None
