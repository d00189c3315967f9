"""What a script passes to a tracker that it starts itself, so that it goes on in the tracker run of the run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.tracking.services.choice import choose_run
from hf_cloudtrain.tracking.services.guard import TrackerGuard
from hf_cloudtrain.tracking.services.service import TrackerService, TrackerStart, tracker_services


def known_services(names: Iterable[str], *, arguments: bool) -> list[TrackerService]:
    """The services with these names.

    Args:
        arguments: whether their starts get arguments; else variables.

    Raises:
        ConfigurationError: one is not known, or takes no variables.
    """
    services = tracker_services()
    for name in names:
        if name not in services:
            near = difflib.get_close_matches(name, services, n=1)
            did_you_mean = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"{name!r} must be one of: {', '.join(services)}.{did_you_mean}")
        if not arguments and type(services[name]).environment is TrackerService.environment:
            raise ConfigurationError(
                f"{name!r} takes no variables. Pass **tracker_arguments({name!r}) to its start instead."
            )
    return [services[name] for name in names]


def continued(
    checkpointer: Checkpointer, service: TrackerService, step: int, *, arguments: bool
) -> tuple[str, dict[str, Any]]:
    """The id of the tracker run of a run, and arguments or variables with which it goes on; nothing if the service fails.

    Args:
        step: from which the training resumes.
    """
    start = TrackerStart(step, checkpointer.output_dir, checkpointer.storage.url.rpartition("/")[2] or "run")
    tracker_id, settings = "", {}
    with TrackerGuard(service.name)("does not go on in the run of earlier attempts"):
        run = choose_run(checkpointer.storage, service, start)
        found = service.arguments(run.id, start) if arguments else service.environment(run.id)
        tracker_id, settings = run.id, dict(found)
    return tracker_id, settings
