"""obstore's clients for S3, GCS and Azure: credentials, region, endpoint, timeouts.

The provider's own library resolves them (botocore, google-auth, azure-identity), because obstore alone reads neither
profiles nor `~/.aws`. Each function returns None where a storage option has no counterpart in obstore; fsspec then
moves the bytes.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import urllib.parse
from collections.abc import Callable
from typing import Any

from hf_cloudtrain.storage.retries import NATIVE_RETRIES

REQUEST_TIMEOUT = datetime.timedelta(minutes=5)
"""One part on a link of 0.5 MB/s that 8 parts share."""

# Options of s3fs that say how s3fs reads and caches, which does not matter here.
_S3_IRRELEVANT = (
    "default_block_size default_fill_cache default_cache_type cache_regions max_concurrency fixed_upload_size "
    "use_listings_cache skip_instance_cache listings_expiry_time max_paths"
).split()
_S3_KNOWN = (
    "key username secret password token profile anon endpoint_url use_ssl client_kwargs config_kwargs "
    "s3_additional_kwargs requester_pays"
).split()
_S3_CLIENT_KNOWN = (
    "endpoint_url region_name verify use_ssl aws_access_key_id aws_secret_access_key aws_session_token"
).split()
_S3_EXTRA_KNOWN = {
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}


def s3_store(bucket: str, options: dict[str, Any]) -> Any:
    """A client for a bucket of S3, or of a server that speaks its protocol."""
    import botocore.session
    from obstore.store import S3Store

    if not _s3_options_known(options):
        return None
    session = botocore.session.Session(profile=options.get("profile"))
    resolved = resolved_s3_client(session, options)
    endpoint = resolved.meta.endpoint_url
    style = ((options.get("config_kwargs") or {}).get("s3") or {}).get("addressing_style")
    if style == "virtual" and not _is_aws(endpoint):
        return None
    config: Any = {"region": resolved.meta.region_name or "us-east-1"}
    if _is_aws(endpoint):
        config["virtual_hosted_style_request"] = style != "path" and "." not in bucket
    else:
        config["endpoint"] = endpoint
    for name, value in (options.get("s3_additional_kwargs") or {}).items():
        config[_S3_EXTRA_KNOWN[name]] = value
    if options.get("requester_pays"):
        config["request_payer"] = True
    # TLS or loopback keeps the payload intact, and our own digest checks it: signing would double the CPU time.
    config["unsigned_payload"] = endpoint.startswith("https://") or _is_loopback(endpoint)
    provider = None
    if options.get("anon"):
        config["skip_signature"] = True
    elif (provider := _s3_credentials(session, options)) is None:
        return None
    verify = (options.get("client_kwargs") or {}).get("verify", session.get_config_variable("ca_bundle"))
    return S3Store(
        bucket,
        config=config,
        client_options=_client_options(endpoint, verify),
        retry_config=NATIVE_RETRIES,
        credential_provider=provider,
    )


def _s3_options_known(options: dict[str, Any]) -> bool:
    return not (
        set(options).difference(_S3_KNOWN, _S3_IRRELEVANT)
        or set(options.get("client_kwargs") or {}).difference(_S3_CLIENT_KNOWN)
        or set(options.get("s3_additional_kwargs") or {}).difference(_S3_EXTRA_KNOWN)
        or (options.get("config_kwargs") or {}).get("proxies")
    )


def resolved_s3_client(session: Any, options: dict[str, Any]) -> Any:
    """A client made only to see what botocore resolves from variables, profiles, services sections and regions."""
    import botocore.config

    arguments = {"use_ssl": options.get("use_ssl"), **(options.get("client_kwargs") or {})}
    arguments["endpoint_url"] = options.get("endpoint_url") or arguments.get("endpoint_url")
    # Without these, botocore would look for credentials, which may cost a request to a metadata service.
    arguments.update(aws_access_key_id="unused", aws_secret_access_key="unused")  # noqa: S106 - not a secret
    config = botocore.config.Config(**(options.get("config_kwargs") or {}))
    return session.create_client(
        "s3", config=config, **{name: value for name, value in arguments.items() if value is not None}
    )


def _s3_credentials(session: Any, options: dict[str, Any]) -> Any:
    """A provider of the credentials in the options, else of those that botocore finds.

    Fixed keys need a provider too: obstore would add the session token of the environment to them.
    """
    import botocore.credentials

    client_kwargs = options.get("client_kwargs") or {}
    key = options.get("key") or options.get("username") or client_kwargs.get("aws_access_key_id")
    secret = options.get("secret") or options.get("password") or client_kwargs.get("aws_secret_access_key")
    token = options.get("token") or client_kwargs.get("aws_session_token")
    found = (
        botocore.credentials.Credentials(key, secret, token) if key and secret else session.get_credentials()
    )
    if found is None:
        return None

    def provide() -> dict[str, Any]:
        """Ask botocore again every few minutes, because it renews credentials that expire."""
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5),
        }

    return provide


def gcs_store(bucket: str, options: dict[str, Any]) -> Any:
    """A client for a bucket of Google Cloud Storage."""
    from obstore.store import GCSStore

    if set(options) - {"token", "project", "endpoint_url"} or options.get("endpoint_url"):
        return None
    token = options.get("token")
    arguments: dict[str, Any] = {
        "client_options": _client_options(None, None),
        "retry_config": NATIVE_RETRIES,
    }
    if token == "anon":  # noqa: S105 - what gcsfs calls "no token"
        return GCSStore(bucket, config={"skip_signature": True}, **arguments)
    if isinstance(token, str) and os.path.isfile(token):
        return GCSStore(bucket, config={"service_account": token}, **arguments)
    if token not in (None, "google_default"):
        return None
    from obstore.auth.google import GoogleCredentialProvider

    return GCSStore(bucket, credential_provider=GoogleCredentialProvider(), **arguments)


def azure_store(container: str, options: dict[str, Any]) -> Any:
    """A client for a container of Azure Blob Storage."""
    from obstore.store import AzureStore

    text = options.get("connection_string") or os.environ.get("AZURE_STORAGE_CONNECTION_STRING") or ""
    given = dict(item.split("=", 1) for item in text.split(";") if "=" in item)
    if set(options) - {"connection_string", "account_name", "account_key", "sas_token"}:
        return None

    def setting(option: str, name_in_text: str) -> Any:
        variable = f"AZURE_STORAGE_{option.upper()}"
        return options.get(option) or given.get(name_in_text) or os.environ.get(variable)

    account = setting("account_name", "AccountName")
    if not account:
        return None
    config: Any = {"account_name": account}
    endpoint = given.get("BlobEndpoint")
    if endpoint:
        config["endpoint"] = endpoint
    provider: Any = None
    if key := setting("account_key", "AccountKey"):
        config["account_key"] = key
    elif sas := setting("sas_token", "SharedAccessSignature"):
        config["sas_key"] = sas.lstrip("?")
    else:
        from obstore.auth.azure import AzureCredentialProvider

        provider = AzureCredentialProvider()
    return AzureStore(
        container,
        config=config,
        client_options=_client_options(endpoint, None),
        retry_config=NATIVE_RETRIES,
        credential_provider=provider,
    )


def _client_options(endpoint: str | None, verify: Any) -> Any:
    options: dict[str, Any] = {"timeout": REQUEST_TIMEOUT, "connect_timeout": datetime.timedelta(seconds=10)}
    if endpoint and endpoint.startswith("http://"):
        options["allow_http"] = True
    if verify is False:
        options["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        with open(verify, "rb") as bundle:
            options["root_certificate"] = bundle.read()
    return options


def _is_aws(endpoint: str) -> bool:
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _is_loopback(endpoint: str) -> bool:
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


STORES: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "s3": s3_store,
    "s3a": s3_store,
    "gs": gcs_store,
    "gcs": gcs_store,
    "az": azure_store,
}
"""What builds the client, by protocol of the URL."""
