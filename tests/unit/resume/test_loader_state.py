"""The position that a stream or a DataLoader keeps itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.resume.dataloaders import BY_INDEX, BY_READING, BY_STATE
from hf_cloudtrain.resume.loader_state import LoaderState, storable
from tests.unit.resume._epochs import (
    Rows,
    StatefulStream,
    Stream,
    loader,
    through_a_file,
    train,
)


@pytest.mark.parametrize(
    ("dataset", "workers", "way"),
    [
        (Rows, 0, BY_INDEX),
        (Rows, 2, BY_INDEX),
        (Stream, 0, BY_READING),
        (StatefulStream, 0, BY_STATE),
        (StatefulStream, 1, BY_READING),  # its state is in the worker
    ],
)
def test_how_a_resume_reaches_a_batch_depends_on_the_data(dataset: Any, workers: int, way: str) -> None:
    assert LoaderState(loader(dataset(), num_workers=workers)).way == way


def test_the_state_of_a_stream_is_stored_as_what_torch_loads_safely() -> None:
    class Told(StatefulStream):
        def state_dict(self) -> dict[str, Any]:
            return {
                "at": np.int64(self.at),
                "order": np.arange(3),
                "files": ("a", "b"),
                "done": {1: True},
            }

    record = through_a_file(train(loader(Told()), stop=2).record)
    assert record["state"]["at"] == 8
    assert type(record["state"]["at"]) is int
    assert record["state"]["order"].tolist() == [0, 1, 2]
    assert record["state"]["files"] == ("a", "b")


def test_what_cannot_be_stored_is_an_error_that_names_its_type() -> None:
    with pytest.raises(ConfigurationError, match="a 'Rows', which cannot be stored"):
        storable({"at": [Rows()]})


def test_a_stream_whose_state_is_missing_is_an_error() -> None:
    saved = train(loader(StatefulStream()), stop=3)
    with pytest.raises(ManifestError, match="position in the stream is missing"):
        train(loader(StatefulStream()), resume=saved._replace(record={**saved.record, "state": None}))
