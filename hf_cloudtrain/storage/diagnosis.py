"""What a user's set-up says about a storage, for `cloudtrain doctor`: where credentials were found, region, server, its clock.

None of it is needed to move bytes. The provider's own library is asked, as `native_stores` does.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.storage.native_stores import resolved_s3_client
from hf_cloudtrain.storage.urls import is_local, normal_url, protocol_of

CLOCK_TIMEOUT = 5.0
"""Seconds that a server has to tell its time."""

_OPTIONS = "storage options"
_METHODS = {
    "env": "environment variables (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "~/.aws/credentials",
    "config-file": "~/.aws/config",
    "iam-role": "the role of this instance",
    "container-role": "the role of this container",
    "assume-role-with-web-identity": "a web identity (AWS_WEB_IDENTITY_TOKEN_FILE)",
}
"""What botocore calls the places where it looks."""


@dataclass(frozen=True)
class SetUp:
    """How a storage is reached from this machine."""

    bucket: str | None
    """Bucket or container; None for folders and servers without them."""
    credentials: str | None
    """Where they were found; None where there are none."""
    log_in: str
    """The command that makes credentials."""
    make_bucket: str
    """The command that creates the bucket."""
    permissions: dict[str, str]
    """The permission to grant, by what it allows: `write`, `read`, `list`, `delete`."""
    region: str | None = None
    endpoint: str | None = None
    """URL of the server; None where there is none or it is unknown."""
    endpoint_setting: str = "that of its client"
    """The variable that names another server."""
    is_here: bool = False
    """Whether the storage is this machine."""

    @property
    def server(self) -> str:
        """What is known of a server without a URL."""
        return "this machine" if self.is_here else "that in the URL"

    @property
    def is_billed(self) -> bool:
        """Whether requests are likely to cost money."""
        return self.bucket is not None


def set_up(url: str, options: dict[str, Any]) -> SetUp:
    """The set-up for a URL and its storage options. Raises what the provider's library raises."""
    url = normal_url(url)
    protocol = protocol_of(url)
    bucket = url.partition("://")[2].partition("/")[0].partition("@")[0]
    find: Callable[[str, dict[str, Any]], SetUp] | None = _SET_UPS.get(protocol)
    if find is not None:
        return find(bucket, options)
    is_here = is_local(url) or protocol == "memory"
    what = "none needed" if is_here else f"left to fsspec's {protocol}://"
    permission = "permission to write there" if is_here else f"what the documentation of {protocol}:// says"
    permissions = dict.fromkeys(("write", "read", "list", "delete"), permission)
    return SetUp(None, what, "", "", permissions, is_here=is_here)


def clock_offset(endpoint: str) -> float | None:
    """Seconds by which this machine's clock is ahead of a server's; None if the server does not tell its time.

    From the header Date, which any answer has, also a refusal: https://www.rfc-editor.org/rfc/rfc9110#section-6.6.1
    """
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the server of the storage
    before = _now()
    try:
        with urllib.request.urlopen(request, timeout=CLOCK_TIMEOUT) as answer:  # noqa: S310
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
        error.close()
    except (OSError, ValueError):
        return None
    after = _now()
    with contextlib.suppress(TypeError, ValueError):
        told = email.utils.parsedate_to_datetime(date).timestamp()
        # The header has whole seconds: the middle of the one that it names.
        return (before + after) / 2 - (told + 0.5)
    return None


def _now() -> float:
    return time.time()


def _s3(bucket: str, options: dict[str, Any]) -> SetUp:
    import botocore.session

    session = botocore.session.Session(profile=options.get("profile"))
    client = resolved_s3_client(session, options)
    on_bucket, in_bucket = f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"
    return SetUp(
        bucket,
        _s3_credentials(session, options),
        "aws configure",
        f"aws s3 mb s3://{bucket}",
        {
            "write": f"s3:PutObject on {in_bucket}",
            "read": f"s3:GetObject on {in_bucket}",
            "list": f"s3:ListBucket on {on_bucket}",
            "delete": f"s3:DeleteObject on {in_bucket}",
        },
        region=client.meta.region_name,
        endpoint=client.meta.endpoint_url,
        endpoint_setting="AWS_ENDPOINT_URL",
    )


def _s3_credentials(session: Any, options: dict[str, Any]) -> str | None:
    if options.get("anon"):
        return f"{_OPTIONS} (anonymous)"
    if (
        options.get("key")
        or options.get("username")
        or (options.get("client_kwargs") or {}).get("aws_access_key_id")
    ):
        return _OPTIONS
    found = session.get_credentials()
    if found is None:
        return None
    profile = options.get("profile") or os.environ.get("AWS_PROFILE")
    place = _METHODS.get(found.method, str(found.method))
    return f"{place}, profile {profile!r}" if profile else place


def _gcs(bucket: str, options: dict[str, Any]) -> SetUp:
    role = f"roles/storage.objectAdmin on gs://{bucket}"
    return SetUp(
        bucket,
        _OPTIONS if options.get("token") else _google_credentials(),
        "gcloud auth application-default login",
        f"gcloud storage buckets create gs://{bucket}",
        dict.fromkeys(("write", "read", "list", "delete"), role),
        endpoint=options.get("endpoint_url")
        or os.environ.get("STORAGE_EMULATOR_HOST")
        or "https://storage.googleapis.com",
        endpoint_setting="STORAGE_EMULATOR_HOST",
    )


def _google_credentials() -> str | None:
    import google.auth
    import google.auth.exceptions

    try:
        credentials, _ = google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        return None
    if file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return f"{file} (GOOGLE_APPLICATION_CREDENTIALS)"
    return f"google-auth ({type(credentials).__module__.rpartition('.')[0]})"


def _azure(container: str, options: dict[str, Any]) -> SetUp:
    variable = "AZURE_STORAGE_CONNECTION_STRING"
    text = options.get("connection_string") or os.environ.get(variable) or ""
    given = dict(item.split("=", 1) for item in text.split(";") if "=" in item)
    account = (
        options.get("account_name")
        or given.get("AccountName")
        or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    )
    if options.keys() & {"connection_string", "account_key", "sas_token"}:
        found: str | None = _OPTIONS
    elif text:
        found = f"environment variable {variable}"
    elif os.environ.get("AZURE_STORAGE_ACCOUNT_KEY") or os.environ.get("AZURE_STORAGE_SAS_TOKEN"):
        found = "environment variables (AZURE_STORAGE_…)"
    else:
        found = "azure-identity (DefaultAzureCredential)" if account else None
    role = f"the role 'Storage Blob Data Contributor' on container {container}"
    return SetUp(
        container,
        found,
        f"export {variable}=…",
        f"az storage container create --name {container}",
        dict.fromkeys(("write", "read", "list", "delete"), role),
        endpoint=given.get("BlobEndpoint")
        or (f"https://{account}.blob.core.windows.net" if account else None),
        endpoint_setting=variable,
    )


def _hugging_face(_: str, options: dict[str, Any]) -> SetUp:
    import huggingface_hub

    token = _OPTIONS if options.get("token") else "huggingface_hub" if huggingface_hub.get_token() else None
    return SetUp(
        None,
        token,
        "hf auth login",
        "",
        dict.fromkeys(("write", "read", "list", "delete"), "a token with write permission"),
        endpoint=huggingface_hub.constants.ENDPOINT,
        endpoint_setting="HF_ENDPOINT",
    )


_SET_UPS: dict[str, Callable[[str, dict[str, Any]], SetUp]] = {
    **dict.fromkeys(("s3", "s3a"), _s3),
    **dict.fromkeys(("gs", "gcs"), _gcs),
    **dict.fromkeys(("az", "abfs", "abfss"), _azure),
    "hf": _hugging_face,
}
