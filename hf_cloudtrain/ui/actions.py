"""What a person may do from a page, with `--actions` and the token: each action leaves a record in the run that it concerns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoCheckpointError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.report.page import shown
from hf_cloudtrain.report.prune import PrunePlan
from hf_cloudtrain.report.summary import CheckpointInfo
from hf_cloudtrain.runtime.text import count_text, size_text
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.actions import note_action
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
    note_action(catalog, f"asked attempt {now.attempt} to save and stop")
    return {"text": f"Asked attempt {now.attempt} to save and stop. It reads this with its next heartbeat."}


def _pin(places: Places, asked: Asked) -> dict[str, Any]:
    catalog, key = _catalog(places, asked), CheckpointKey.named(str(asked.get("key")))
    if key is None:
        raise ConfigurationError(f"{str(asked.get('key'))[:80]!r} is not the key of a checkpoint.")
    title, is_pin = Titles(catalog).of(key), asked["action"] == "pin"
    (retention.pin if is_pin else retention.unpin)(catalog, key)
    note_action(catalog, f"{asked['action']}ned {title}")
    kept = "No automatic deletion touches it now." if is_pin else "Retention may delete it now."
    return {"text": f"{asked['action'].capitalize()}ned {title}. {kept}"}


def _prune(places: Places, asked: Asked) -> dict[str, Any]:
    """Without `sure`, only what would be deleted; with it, exactly the checkpoints that were shown."""
    catalog, keep = _catalog(places, asked), asked.get("keep", 0)
    plan = PrunePlan(catalog, retention.Policy(keep))
    going = [info.key for info in plan.going]
    if asked.get("sure") != going:
        why = "The checkpoints have changed since they were shown. " if asked.get("sure") else ""
        damaged = f" {count_text(len(plan.damaged), 'damaged checkpoint')} kept." if plan.damaged else ""
        text = f"{why}{plan.going_text} would be deleted; {count_text(len(plan.protected), 'other')} protected.{damaged}"
        sizes = [f"{info.title}  {size_text(info.manifest.size)}" for info in plan.going if info.manifest]
        return {"text": text, "going": going, "lines": sizes}
    done: list[tuple[CheckpointInfo, str | None]] = []
    try:
        done.extend(plan.carry_out())
    except Exception as error:
        gone = count_text(sum(not reason for _, reason in done), "checkpoint")
        with contextlib.suppress(CloudTrainError, OSError):
            note_action(catalog, f"deleted {gone}, then failed: {shown(error)}")
        raise
    kept = [f"Kept {info.title}: {reason}" for info, reason in done if reason]
    gone = count_text(len(done) - len(kept), "checkpoint")
    note_action(catalog, f"deleted {gone}, all but the newest {keep}")
    return {"text": " ".join([f"Deleted {gone}.", *kept])}


def _cancel(places: Places, asked: Asked) -> dict[str, Any]:
    store = JobStore()
    record, text = lifecycle.cancel(store, str(asked.get("job"))), ""
    try:
        # A record comes from storage: the server writes to no URL that only the record names.
        run_id = places.id_of(record.run_url)
        if run_id is not None:
            note_action(_catalog(places, {"run": run_id}), f"asked the job {record.id} to end")
        elif record.run_url == store.below("runs", record.id):
            note_action(
                _checked(Storage(record.run_url, env.storage_options(None))),
                f"asked the job {record.id} to end",
            )
        else:
            text = " Its run is not on this page, so the action is not recorded there."
    except NoCheckpointError:
        pass  # its run has not started
    except (CloudTrainError, OSError) as error:
        text = f" The action could not be recorded in its run: {shown(error)}"
    return {"text": f"Asked {record.id} to save and end.{text}"}


ACTS: dict[str, Act] = {"stop": _stop, "pin": _pin, "unpin": _pin, "prune": _prune, "cancel": _cancel}


def _catalog(places: Places, asked: Asked) -> Catalog:
    root, name = places.find(str(asked.get("run")))
    url, options = root.connection
    return _checked(Storage(f"{url.rstrip('/')}/{name}" if name else url, options))


def _checked(storage: Storage) -> Catalog:
    """Of a run that has begun. Raises NoCheckpointError for any other."""
    catalog = Catalog(storage)
    catalog.attempts.check_any()
    return catalog
