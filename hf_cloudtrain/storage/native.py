"""Bytes of large files through obstore, a native client for `s3://`, `gs://` and `az://`.

It costs an eighth of the CPU of s3fs or boto3 a byte and releases the GIL, so a thread beside the training loop is
enough. Credentials, region and endpoint are resolved by the provider's own library (botocore, google-auth,
azure-identity), because obstore alone reads neither profiles nor `~/.aws`. Where an option has no counterpart here,
the answer is None and the fsspec file system moves the bytes.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import mmap
import os
import re
import stat
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from typing import IO, TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from obstore import GetOptions

PART_SIZE = 16 * 2**20
"""Bytes in one part. Parts of 5 to 16 MiB were fastest, 32 MiB slower."""
PARTS_IN_FLIGHT = 4
"""Parts of one file under way at once: 64 MiB of memory a file."""
MAX_PARTS = 9_000
"""S3 takes 10,000 parts; above 140 GB the parts grow."""
REQUEST_TIMEOUT = datetime.timedelta(minutes=5)
"""One part on a link of 0.5 MB/s shared by 8."""

BLOCK_SIZE = 256 * 2**10
"""Bytes handled at a time in a download: still in the processor's cache when they are hashed and written. Blocks of
1 MiB and more cost twice the CPU a byte, because malloc gives their memory back to the system each time."""

_first_pid: list[int] = []
"""The process that used a native client first."""


class NativeTransfer:
    """Uploads and downloads whole files with obstore."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._ranged = True
        """Whether the storage answers ranges as the protocol says; known after the first one."""

    @staticmethod
    def can_name(path: str) -> bool:
        """Whether the client keeps this name as it is; it would percent-encode other characters."""
        return re.fullmatch(r"[A-Za-z0-9_./=+-]+", path) is not None

    def upload(self, source: IO[bytes], size: int, path: str, on_bytes: Callable[[int], None]) -> str:
        """Send an open file; returns the digest value of what was sent."""
        import obstore

        hasher = xxhash.xxh3_128()
        part = max(PART_SIZE, -(-size // MAX_PARTS))
        if size <= part:
            data = source.read()
            hasher.update(data)
            obstore.put(self._store, self._key(path), data, use_multipart=False)
            on_bytes(len(data))
        else:
            obstore.put(
                self._store,
                self._key(path),
                _hashed_blocks(source, part, hasher, on_bytes),
                use_multipart=True,
                chunk_size=part,
                max_concurrency=PARTS_IN_FLIGHT,
            )
        return hasher.hexdigest()

    def download(self, path: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        """Fetch `size` bytes into an empty file, open for both; returns the digest value of what was written."""
        key = self._key(path)
        # A device keeps nothing that could be read back.
        ranged = size > PART_SIZE and self._ranged and stat.S_ISREG(os.fstat(target.fileno()).st_mode)
        if ranged:
            try:
                return self._download_ranges(key, target, size, on_bytes)
            except Exception as error:
                # `rclone serve s3` sends the range and calls it 200: refused at the first one, so nothing is counted.
                if "non-partial" not in str(error):
                    raise
                self._ranged = False
        return self._download_stream(key, target, size, on_bytes)

    def _download_stream(self, key: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        hasher = xxhash.xxh3_128()
        position = 0
        for block in self._blocks(key):
            hasher.update(block)
            position = _write_at(target, block, position)
            on_bytes(len(block))
            if position > size:
                break  # not what was committed; the caller counts
        return hasher.hexdigest()

    def _download_ranges(self, key: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        """Ranges are written where they belong, in parallel, and hashed in order while the page cache has them."""
        hasher = xxhash.xxh3_128()
        starts = iter(range(0, size, PART_SIZE))
        waiting: deque[Future[int]] = deque()
        position = 0
        with ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="cloudtrain-range") as pool:
            while True:
                # One more than there are threads, so that none waits for the digest.
                while len(waiting) <= PARTS_IN_FLIGHT and (start := next(starts, None)) is not None:
                    stop = min(start + PART_SIZE, size)
                    waiting.append(pool.submit(self._fetch_range, key, target, start, stop))
                if not waiting:
                    return hasher.hexdigest()
                stop = waiting.popleft().result()
                on_bytes(stop - position)
                _hash_span(target, position, stop, hasher)
                position = stop

    def _fetch_range(self, key: str, target: FileIO, start: int, stop: int) -> int:
        position = start
        for block in self._blocks(key, {"range": (start, stop)}):
            position = _write_at(target, block, position)
        if position != stop:
            raise EOFError(f"a range ends at byte {position}, not {stop}")
        return stop

    def _blocks(self, key: str, options: GetOptions | None = None) -> Iterator[bytes]:
        import obstore

        return iter(obstore.get(self._store, key, options=options).stream(min_chunk_size=BLOCK_SIZE))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path


def native_transfer(protocol: str, root: str, options: dict[str, Any]) -> NativeTransfer | None:
    """A native client for `root` ("bucket/prefix"), or None where fsspec must move the bytes.

    None after a fork of a process that has used one: the threads of the client do not exist in the child, and a call
    would hang for ever.
    """
    build = {"s3": _s3_store, "s3a": _s3_store, "gs": _gcs_store, "gcs": _gcs_store, "az": _azure_store}.get(
        protocol
    )
    if build is None or not _usable_in_this_process():
        return None
    bucket, _, prefix = root.partition("/")
    if prefix and not NativeTransfer.can_name(prefix):
        return None
    try:
        store = build(bucket, options)
    except ImportError:
        return None
    return NativeTransfer(store, prefix) if store is not None else None


def _usable_in_this_process() -> bool:
    if not _first_pid:
        _first_pid.append(os.getpid())
    return _first_pid[0] == os.getpid()


def _write_at(target: FileIO, block: bytes, position: int) -> int:
    """Write all of a block at a position, whatever the file's own; returns where it ends."""
    view = memoryview(block)
    while view:
        written = os.pwrite(target.fileno(), view, position)
        view, position = view[written:], position + written
    return position


def _hash_span(file: FileIO, start: int, stop: int, hasher: Any) -> None:
    """Hash what was written between two positions; `start` is a multiple of the page size.

    Mapped, because copying it out of the page cache again costs as much as the digest does.
    """
    try:
        span = mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start)
    except (OSError, ValueError):  # nothing is mapped here, or the file was cut: reading tells which
        _hash_read(file, start, stop, hasher)
        return
    with span:
        hasher.update(span)


def _hash_read(file: FileIO, start: int, stop: int, hasher: Any) -> None:
    view = memoryview(bytearray(BLOCK_SIZE))
    while start < stop:
        got = os.preadv(file.fileno(), [view[: stop - start]], start)
        if not got:
            raise OSError(errno.EIO, f"{file.name!r} lost what was written to it")
        hasher.update(view[:got])
        start += got


def _hashed_blocks(
    source: IO[bytes], size: int, hasher: Any, on_bytes: Callable[[int], None]
) -> Iterator[bytes]:
    while block := source.read(size):
        hasher.update(block)
        yield block
        on_bytes(len(block))


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


_RETRIES: Any = {"max_retries": 4, "retry_timeout": datetime.timedelta(minutes=3)}

# Options of s3fs that say how s3fs reads and caches, and mean nothing here.
_S3_IRRELEVANT = {
    "default_block_size",
    "default_fill_cache",
    "default_cache_type",
    "cache_regions",
    "max_concurrency",
    "fixed_upload_size",
    "use_listings_cache",
    "skip_instance_cache",
    "listings_expiry_time",
    "max_paths",
}
_S3_KNOWN = {
    "key",
    "username",
    "secret",
    "password",
    "token",
    "profile",
    "anon",
    "endpoint_url",
    "use_ssl",
} | {
    "client_kwargs",
    "config_kwargs",
    "s3_additional_kwargs",
    "requester_pays",
}
_S3_CLIENT_KNOWN = {"endpoint_url", "region_name", "verify", "use_ssl"} | {
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
}
_S3_EXTRA_KNOWN = {
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}


def _s3_store(bucket: str, options: dict[str, Any]) -> Any:
    import botocore.session
    from obstore.store import S3Store

    if not _s3_options_known(options):
        return None
    session = botocore.session.Session(profile=options.get("profile"))
    resolved = _resolved_s3_client(session, options)
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
    # TLS or loopback keeps the payload whole, and our own digest checks it: signing would double the CPU.
    config["unsigned_payload"] = endpoint.startswith("https://") or _is_loopback(endpoint)
    if options.get("anon"):
        config["skip_signature"] = True
    provider = None if options.get("anon") else _s3_credentials(session, options)
    if provider is None and not options.get("anon"):
        return None
    verify = (options.get("client_kwargs") or {}).get("verify", session.get_config_variable("ca_bundle"))
    return S3Store(
        bucket,
        config=config,
        client_options=_client_options(endpoint, verify),
        retry_config=_RETRIES,
        credential_provider=provider,
    )


def _s3_options_known(options: dict[str, Any]) -> bool:
    return not (
        set(options) - _S3_KNOWN - _S3_IRRELEVANT
        or set(options.get("client_kwargs") or {}) - _S3_CLIENT_KNOWN
        or set(options.get("s3_additional_kwargs") or {}) - set(_S3_EXTRA_KNOWN)
        or (options.get("config_kwargs") or {}).get("proxies")
    )


def _resolved_s3_client(session: Any, options: dict[str, Any]) -> Any:
    """A client made only to hear what botocore resolves: variables, profiles, services sections, regions."""
    import botocore.config

    arguments = {"use_ssl": options.get("use_ssl"), **(options.get("client_kwargs") or {})}
    arguments["endpoint_url"] = options.get("endpoint_url") or arguments.get("endpoint_url")
    # Not asked for credentials, which may cost a request to a metadata service.
    arguments.update(aws_access_key_id="unused", aws_secret_access_key="unused")  # noqa: S106 - no secret
    config = botocore.config.Config(**(options.get("config_kwargs") or {}))
    return session.create_client(
        "s3", config=config, **{name: value for name, value in arguments.items() if value is not None}
    )


def _s3_credentials(session: Any, options: dict[str, Any]) -> Any:
    """A provider of what the options name, else of what botocore finds.

    A provider for fixed keys too: obstore would add the session token of the environment to them.
    """
    import botocore.credentials

    key, secret, token = _static_s3_credentials(options)
    found = (
        botocore.credentials.Credentials(key, secret, token) if key and secret else session.get_credentials()
    )
    return None if found is None else _S3Credentials(found)


def _static_s3_credentials(options: dict[str, Any]) -> tuple[Any, Any, Any]:
    client_kwargs = options.get("client_kwargs") or {}
    return (
        options.get("key") or options.get("username") or client_kwargs.get("aws_access_key_id"),
        options.get("secret") or options.get("password") or client_kwargs.get("aws_secret_access_key"),
        options.get("token") or client_kwargs.get("aws_session_token"),
    )


class _S3Credentials:
    """Credentials as botocore has them, asked again every few minutes: botocore renews what expires."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5),
        }


def _gcs_store(bucket: str, options: dict[str, Any]) -> Any:
    from obstore.store import GCSStore

    if set(options) - {"token", "project", "endpoint_url"} or options.get("endpoint_url"):
        return None
    token = options.get("token")
    arguments: dict[str, Any] = {"client_options": _client_options(None, None), "retry_config": _RETRIES}
    if token == "anon":  # noqa: S105 - gcsfs's word for no token
        return GCSStore(bucket, config={"skip_signature": True}, **arguments)
    if isinstance(token, str) and os.path.isfile(token):
        return GCSStore(bucket, config={"service_account": token}, **arguments)
    if token not in (None, "google_default"):
        return None
    from obstore.auth.google import GoogleCredentialProvider

    return GCSStore(bucket, credential_provider=GoogleCredentialProvider(), **arguments)


def _azure_store(container: str, options: dict[str, Any]) -> Any:
    from obstore.store import AzureStore

    text = options.get("connection_string") or os.environ.get("AZURE_STORAGE_CONNECTION_STRING") or ""
    given = dict(item.split("=", 1) for item in text.split(";") if "=" in item)
    if set(options) - {"connection_string", "account_name", "account_key", "sas_token"}:
        return None
    account = (
        options.get("account_name")
        or given.get("AccountName")
        or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    )
    key = options.get("account_key") or given.get("AccountKey") or os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    sas = (
        options.get("sas_token")
        or given.get("SharedAccessSignature")
        or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    )
    endpoint = given.get("BlobEndpoint")
    if not account:
        return None
    config: Any = {"account_name": account}
    if endpoint:
        config["endpoint"] = endpoint
    provider: Any = None
    if key:
        config["account_key"] = key
    elif sas:
        config["sas_key"] = sas.lstrip("?")
    else:
        from obstore.auth.azure import AzureCredentialProvider

        provider = AzureCredentialProvider()
    return AzureStore(
        container,
        config=config,
        client_options=_client_options(endpoint, None),
        retry_config=_RETRIES,
        credential_provider=provider,
    )


def _is_aws(endpoint: str) -> bool:
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _is_loopback(endpoint: str) -> bool:
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
