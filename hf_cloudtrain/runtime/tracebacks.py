"""Short tracebacks: an error of ours, or Ctrl-C, ends a script with the user's line and one sentence."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from hf_cloudtrain.errors import CloudTrainError

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])


def short_traceback(function: F) -> F:
    """Decorate a public function or constructor: a CloudTrainError or Ctrl-C leaves it without inner frames and causes.

    The whole traceback goes to the log at DEBUG level. Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(function)
    def public(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (CloudTrainError, KeyboardInterrupt) as error:
            logger.debug("Full traceback of the error below:", exc_info=error)
            raise error.with_traceback(None) from None

    return cast("F", public)
