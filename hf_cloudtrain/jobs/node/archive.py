"""The copy of a workspace as one archive, which keeps modes, links and empty folders; object storage does not."""

from __future__ import annotations

import logging
import tarfile
from pathlib import Path

logger = logging.getLogger(__name__)


def pack(folder: Path, archive: Path) -> None:
    """Pack a folder."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
        packed.add(folder, arcname=".")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack it, without links that lead out of it: their targets are on a different machine."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(
            "This Python unpacks archives unsafely. Use 3.10.12, 3.11.4 or newer in the image."
        )

    def inside(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo | None:
        try:
            return tarfile.data_filter(member, target)
        except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
            logger.warning("Leaving out %r, which links to a file outside the workspace.", member.name)
            return None

    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter=inside)  # noqa: S202 - `inside` looks at each member
