"""All saves of the tests' trainings are staged, however small: `make test-async` runs the corpus, laws and trainings so.

STAGED_SAVES names a file, to which each process adds a line for a save that was handed to the writer. The run fails if there
is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

STAGED_SAVES = "STAGED_SAVES"


def is_on() -> bool:
    """Whether this run stages all saves."""
    return STAGED_SAVES in os.environ


def stage_all(patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Stage files of any size in this process, and count the saves.

    Args:
        patch: sets an attribute; that of `pytest.MonkeyPatch` undoes it after a test.
    """
    from hf_cloudtrain import env
    from hf_cloudtrain.staging import recorders
    from hf_cloudtrain.staging.saves import AsyncSaves

    take, wish = AsyncSaves.take, env.async_save

    def counted(self: AsyncSaves, *args: Any, **options: Any) -> bool:
        taken = take(self, *args, **options)
        if taken:
            with open(os.environ[STAGED_SAVES], "a") as file:
                file.write(f"{self.output_dir}\n")
        return taken

    # Not in the environment, which tests look at.
    patch(env, "async_save", lambda argument: wish(argument) is not False)
    patch(recorders, "SMALL_FILE", 0)
    patch(AsyncSaves, "take", counted)


def count() -> int:
    """How many saves were staged so far."""
    try:
        with open(os.environ[STAGED_SAVES]) as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0
