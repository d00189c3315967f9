"""Workspace, checkpoint folder and dataset at the paths where the job expects them.

They are links: a container of SageMaker may mount nothing, and no other job uses its file system.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from hf_cloudtrain.checkpoints.download import is_whole
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.errors import CorruptCheckpointError
from hf_cloudtrain.jobs.engines.sagemaker.request import DATA_CHANNEL, DATASET, OWN_CHANNEL, WORKSPACE
from hf_cloudtrain.jobs.node.archive import unpack
from hf_cloudtrain.jobs.node.mounts import Mount, link
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.names import LOCAL, META

logger = logging.getLogger(__name__)


class Layout:
    """The job's paths in a container.

    Args:
        root: SageMaker's folder.
    """

    def __init__(self, root: Path, submission: Submission) -> None:
        self._root = root
        self._own = root / "input/data" / OWN_CHANNEL
        self._submission = submission

    def make(self) -> None:
        """Make all of it. Raises OSError, ConfigurationError, CorruptCheckpointError."""
        self._make_workspace()
        self._make_checkpoint_folder()
        self._make_dataset()

    def _make_workspace(self) -> None:
        submission = self._submission
        target = Path(submission.job.job_setting.workspace.mount_path)
        if not submission.has_workspace and target.is_dir() and any(target.iterdir()):
            link([Mount(target, str(submission.workspace))])  # the code is in the image
            return
        submission.workspace.mkdir(parents=True, exist_ok=True)
        if submission.has_workspace:
            unpack(self._own / WORKSPACE, submission.workspace)
        link([Mount(submission.workspace, str(target))])

    def _make_checkpoint_folder(self) -> None:
        path = self._submission.job.checkpoint_dir
        synced = self._root / "checkpoints"
        if path is None:
            return
        synced.mkdir(parents=True, exist_ok=True)
        # SageMaker has synced our outbox, too, but its files are no longer those that the records describe.
        for copied in [*synced.rglob(LOCAL), *synced.rglob(META)]:
            shutil.rmtree(copied, ignore_errors=True)
        folder = Path(path)
        if folder.resolve() != synced.resolve() and folder.is_dir() and any(folder.iterdir()):
            logger.warning(
                "%r is not empty, so SageMaker does not sync it; the run has all checkpoints.", path
            )
        else:
            link([Mount(synced, path)])

    def _make_dataset(self) -> None:
        data = self._submission.job.data
        if data is None:
            return
        record = (self._own / DATASET).read_bytes()
        manifest = Manifest.parse(record, str(json.loads(record)["key"]))
        folder = self._root / "input/data" / DATA_CHANNEL
        if not is_whole(folder, manifest):
            raise CorruptCheckpointError(
                f"The dataset {data.name!r} arrived damaged: SageMaker's copy differs from what was stored. Run the "
                "job again; if that fails, create the dataset again with `cloudtrain data create`."
            )
        logger.info("Dataset %r at %s.", data.name, data.mount_path)
        link([Mount(folder, data.mount_path)])
