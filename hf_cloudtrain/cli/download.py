"""`checkpoint download` and `data download`: put one committed folder where the user wants it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.cli.output import say, transfer
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.storage.names import LOCAL


def bring(catalog: Catalog, manifest: Manifest, target: Path, title: str) -> bool:
    """Make `target` hold exactly the committed files, and say so; False if it did already.

    Args:
        title: what it is, for the message.

    Raises:
        ConfigurationError: `target` exists and has different files.
    """
    from hf_cloudtrain.checkpoints.download import download, is_whole

    if target.exists():
        if not is_whole(target, manifest):
            raise ConfigurationError(
                f"{str(target)!r} exists, and its files differ from {manifest.key!r}. Remove it, or choose a different "
                "folder."
            )
        say(f"{title} is already there and intact.")
        return False
    try:
        with transfer(f"Downloading {manifest.folder}", manifest.size) as progress:
            download(catalog, manifest, target, on_bytes=progress.add)
    finally:
        with contextlib.suppress(OSError):  # where the download worked; it stays if something else is in it
            (target.parent / LOCAL).rmdir()
    say(f"Downloaded and verified {title}.")
    return True
