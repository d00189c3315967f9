"""`run stop`: ask the newest attempt to save and stop, and say how it stands."""

from __future__ import annotations

import time

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli.output import say
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.runtime.text import duration_text
from hf_cloudtrain.tracking.status import quiet_seconds
from hf_cloudtrain.tracking.stop import Heartbeat, request_stop, wait_until_stopped


def stop(catalog: Catalog, *, wait: bool) -> tuple[Heartbeat, str | None]:
    """Ask, and wait until the attempt has ended if asked to; its last heartbeat, and why it did not stop, if so."""
    try:
        now = request_stop(catalog)
    except ConfigurationError as error:  # it has ended: with which checkpoint, as people call it
        raise ConfigurationError(Titles(catalog).in_text(str(error))) from None
    say(
        f"Asked attempt {now.attempt} of {now.run_url!r} to stop. It reads the request with its next heartbeat (every "
        f"{duration_text(env.heartbeat())}, unless {env.HEARTBEAT} differs on its machine), then saves, uploads and exits."
    )
    silent = time.time() - (now.last_seen or 0.0)
    if silent > quiet_seconds():
        say(
            f"Warning: by this machine's clock its last heartbeat is {duration_text(silent)} old. If it has crashed, the "
            "request only keeps its launcher from restarting it."
        )
    if not wait:
        return now, None
    titles = Titles(catalog)
    say(f"Now {titles.in_text(str(now))}.")
    now, trouble = wait_until_stopped(catalog, now)
    if trouble is None:
        say(f"Now {titles.in_text(str(now))}.")
    return now, trouble and titles.in_text(trouble)
