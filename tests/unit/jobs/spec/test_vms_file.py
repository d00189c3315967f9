"""`vms.yml`: what is not a list of machine types is refused, by line."""

from __future__ import annotations

import pytest

from hf_cloudtrain.errors import JobFileError
from hf_cloudtrain.jobs.spec.vms_file import parse_vms


@pytest.mark.parametrize(
    "content", [b"", b"- a", b"vms: 3", b"\xff", b"vms: &a []", b"machines: []", b"x" * 200_000]
)
def test_a_file_of_another_kind_is_refused(content: bytes) -> None:
    with pytest.raises(JobFileError, match=r"vms.yml:1: "):
        parse_vms(content)


def test_each_duplicate_is_reported_once_and_a_quota_may_be_missing() -> None:
    one = b"- vm: rack-80gb-h100-8g-berlin\n"
    assert [listed.quota for listed in parse_vms(b"vms:\n" + one + b"  quota: 0\n")] == [0]
    assert parse_vms(b"vms:\n" + one)[0].quota is None
    with pytest.raises(JobFileError) as caught:
        parse_vms(b"vms:\n" + one * 3)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["vms.yml:3", "vms.yml:4"]
