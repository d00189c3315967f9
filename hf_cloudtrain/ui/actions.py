"""What a person may do from a page, with `--actions` and the token: each action leaves a record in the run that it concerns."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, encode_record
from hf_cloudtrain.checkpoints.paths import ACTIONS
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoCheckpointError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.report.prune import PrunePlan
from hf_cloudtrain.report.summary import CheckpointInfo
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.text import count_text, size_text
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.stop import request_stop
from hf_cloudtrain.ui.places import Places

Asked = Mapping[str, Any]
Act = Callable[[Places, Asked], dict[str, Any]]


def act(places: Places, asked: Asked) -> dict[str, Any]:
    """Do what a browser asks for; what to show then.

    Raises:
        CloudTrainError: it cannot be done, with the reason.
    """
    do = ACTS.get(str(asked.get("action")))
    if do is None:
        raise ConfigurationError(f"{str(asked.get('action'))[:80]!r} must be one of: {', '.join(ACTS)}.")
    return do(places, asked)


def _stop(places: Places, asked: Asked) -> dict[str, Any]:
    catalog = _catalog(places, asked)
    now = request_stop(catalog)
    _note(catalog, f"asked attempt {now.attempt} to save and stop")
    return {"text": f"Asked attempt {now.attempt} to save and stop. It reads this with its next heartbeat."}


def _pin(places: Places, asked: Asked) -> dict[str, Any]:
    catalog, key = _catalog(places, asked), CheckpointKey.named(str(asked.get("key")))
    if key is None:
        raise ConfigurationError(f"{str(asked.get('key'))[:80]!r} is not the key of a checkpoint.")
    title, is_pin = Titles(catalog).of(key), asked["action"] == "pin"
    (retention.pin if is_pin else retention.unpin)(catalog, key)
    _note(catalog, f"{asked['action']}ned {title}")
    kept = "No automatic deletion touches it now." if is_pin else "Retention may delete it now."
    return {"text": f"{asked['action'].capitalize()}ned {title}. {kept}"}


def _prune(places: Places, asked: Asked) -> dict[str, Any]:
    """Without `sure`, only what would be deleted; with it, exactly the checkpoints that were shown."""
    catalog, keep = _catalog(places, asked), asked.get("keep", 0)
    plan = PrunePlan(catalog, retention.Policy(keep))
    going = [info.key for info in plan.going]
    if asked.get("sure") != going:
        why = "The checkpoints have changed since they were shown. " if asked.get("sure") else ""
        damaged = f" {count_text(len(plan.damaged), 'damaged one')} will stay." if plan.damaged else ""
        text = f"{why}{plan.going_text} would be deleted; {len(plan.protected)} more are protected.{damaged}"
        sizes = [f"{info.title}  {size_text(info.manifest.size)}" for info in plan.going if info.manifest]
        return {"text": text, "going": going, "lines": sizes}
    done: list[tuple[CheckpointInfo, str | None]] = []
    try:
        done.extend(plan.carry_out())
    finally:  # also of those before an error
        kept = [f"Kept {info.title}: {reason}" for info, reason in done if reason]
        gone = count_text(len(done) - len(kept), "checkpoint")
        _note(catalog, f"deleted {gone}, all but the newest {keep}")
    return {"text": " ".join([f"Deleted {gone}.", *kept])}


def _cancel(_places: Places, asked: Asked) -> dict[str, Any]:
    record, noted = lifecycle.cancel(JobStore(), str(asked.get("job"))), ""
    try:
        catalog = Catalog(Storage(record.run_url, env.storage_options(None)))
        catalog.attempts.check_any()
        _note(catalog, f"asked the job {record.id} to end")
    except NoCheckpointError:
        pass  # it has not begun its run
    except (CloudTrainError, OSError) as error:
        noted = f" Its run has no line of this: {error}"
    return {"text": f"Asked {record.id} to save and end.{noted}"}


ACTS: dict[str, Act] = {"stop": _stop, "pin": _pin, "unpin": _pin, "prune": _prune, "cancel": _cancel}


def _catalog(places: Places, asked: Asked) -> Catalog:
    root, name = places.find(str(asked.get("run")))
    url, options = root.connection
    catalog = Catalog(Storage(f"{url.rstrip('/')}/{name}" if name else url, options))
    catalog.attempts.check_any()
    return catalog


def _note(catalog: Catalog, action: str) -> None:
    """A line in the run's records: who did what, when."""
    name = f"{time.time() * 1000:013.0f}-{secrets.token_hex(4)}"
    record = {"time": time.time(), "action": action, "how": "cloudtrain ui", **person()}
    catalog.storage.write(f"{ACTIONS}/{name}.json", encode_record(record))
