"""`vms.yml`: the machines that a user has listed, because no driver, scheduler or catalog names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hf_cloudtrain.jobs.spec.diagnostics import DocumentFormat, quoted
from hf_cloudtrain.jobs.spec.document import KeyPath
from hf_cloudtrain.jobs.spec.values import check_vm

FILE = "vms.yml"


class ListedVm(BaseModel):
    """One machine type, its count, and the hourly price of one machine, in any currency."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    vm: Annotated[str, AfterValidator(check_vm)]
    quota: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    price: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _VmsFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    vms: list[ListedVm]


def parse_vms(content: bytes, source: str = FILE) -> list[ListedVm]:
    r"""The machine types in the content of a `vms.yml`. Raises JobFileError with all problems, by line.

    Example:
        >>> parse_vms(b"vms:\n- vm: rack-80gb-h100-8g-berlin\n  quota: 4\n")[0].quota
        4
    """
    return _FORMAT.parse(content, source).vms


def _duplicates(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    rows = data.get("vms")
    found: set[str] = set()
    for index, row in enumerate(rows if isinstance(rows, list) else ()):
        name = row.get("vm") if isinstance(row, dict) else None
        if isinstance(name, str) and name in found:
            yield ("vms", index, "vm"), f"{quoted(name)} is a duplicate."
        elif isinstance(name, str):
            found.add(name)


_FORMAT = DocumentFormat(_VmsFile, _duplicates)
