"""A plug-in of axolotl: the callback joins its Trainer, and training resumes from what is restored.

axolotl imports it where a configuration names it:

    plugins:
      - hf_cloudtrain.integrations.axolotl.CloudTrainPlugin
    cloudtrain_run_url: s3://bucket/runs/sft     # or the environment variable HF_CLOUDTRAIN_RUN_URL

The events and their order are those of axolotl 0.21.0: `integrations/base.py` and `train.py`.
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from hf_cloudtrain.integrations.trainer.cloud_callback import CloudTrainCallback
from hf_cloudtrain.runtime.tracebacks import short_traceback

logger = logging.getLogger(__name__)


class CloudTrainSettings(BaseModel):
    """The keys that the plug-in adds to axolotl's configuration."""

    cloudtrain_run_url: str | None = None


class CloudTrainPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not installed where types are checked
    """Uploads every checkpoint of axolotl and restores the newest. Named in its configuration under `plugins`.

    Example:
        >>> # plugins: [hf_cloudtrain.integrations.axolotl.CloudTrainPlugin]
        >>> # cloudtrain_run_url: s3://bucket/runs/sft
    """

    _cloud: CloudTrainCallback | None = None

    def get_input_args(self) -> str:
        """The class with the keys of this plug-in."""
        return f"{__name__}.{CloudTrainSettings.__name__}"

    @short_traceback
    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[CloudTrainCallback]:
        """Join the Trainer before it is made, so that no event is missed."""
        # A configuration has no other place for the limit on storage; for transformers, 0 and less are none.
        limit = cfg.save_total_limit or 0
        self._cloud = CloudTrainCallback(
            cfg.cloudtrain_run_url, save_total_limit=limit if limit > 0 else None
        )
        return [self._cloud]

    @short_traceback
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Restore the newest checkpoint. A checkpoint that the configuration names wins."""
        if self._cloud is None:
            return
        if cfg.resume_from_checkpoint:
            logger.warning(
                "The configuration names the checkpoint %r, so training resumes from it.",
                cfg.resume_from_checkpoint,
            )
        elif (restored := self._cloud.restore(trainer.args)) is not None:
            cfg.resume_from_checkpoint = restored
