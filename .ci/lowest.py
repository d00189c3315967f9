"""Print constraints that hold every dependency at the lower bound setup.cfg declares (`make test-lowest`).

The tools of the `dev` extra are pinned as constraints.txt pins them; what neither names is for pip to choose.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("s3", "gcs", "azure", "report")
TESTED = "torch"
"""Its lowest version has no CPU build in every index, so it stays the one of constraints.txt."""
UNPINNED = "boto3"
"""Moves in step with botocore, which stands at its lower bound."""


def main() -> None:
    """Write one line a package."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    pins = dict(_pins())
    lines = [f"{TESTED}=={pins[TESTED]}"]
    for text in [
        config["options"]["install_requires"],
        *(config["options.extras_require"][e] for e in EXTRAS),
    ]:
        lines += [_lowest(requirement) for requirement in _requirements(text) if requirement.name != TESTED]
    for tool in _requirements(config["options.extras_require"]["dev"]):
        name = canonicalize_name(tool.name)
        if name != UNPINNED:
            lines.append(f"{name}=={pins[name]}")
    print("\n".join(sorted(set(lines))))  # noqa: T201 - the constraints are the output


def _requirements(text: str) -> list[Requirement]:
    lines = (line.strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _lowest(requirement: Requirement) -> str:
    bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"setup.cfg: '{requirement}' needs exactly one '>=', its lowest tested version")
    return f"{requirement.name}=={bounds[0]}"


def _pins() -> Iterator[tuple[str, str]]:
    for requirement in _requirements((ROOT / "constraints.txt").read_text()):
        (spec,) = requirement.specifier
        yield canonicalize_name(requirement.name), spec.version


if __name__ == "__main__":
    main()
