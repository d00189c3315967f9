"""Bringing one committed folder to where a person wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.cli.output import transfer
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.storage.names import META


def bring(catalog: Catalog, manifest: Manifest, target: Path) -> bool:
    """Make `target` hold exactly the committed files; False where it did already.

    Raises:
        ConfigurationError: something else is there.
    """
    from hf_cloudtrain.checkpoints.download import download, is_whole

    needed = not target.exists()
    if needed:
        with (
            transfer(f"Downloading {manifest.folder}", manifest.size) as progress,
            _left_clean(target.parent),
        ):
            download(catalog, manifest, target, on_bytes=progress.add)
    elif not is_whole(target, manifest):
        raise ConfigurationError(
            f"{str(target)!r} is there already, and its files are not those of {manifest.key!r}. Remove it, or choose "
            "another folder."
        )
    return needed


@contextlib.contextmanager
def _left_clean(directory: Path) -> Iterator[None]:
    """Take away the folder that a download works in, unless something else is in it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (directory / META).rmdir()
