"""Draw the picture of README.md from a real run: examples/glue/demo.py kills it once and resumes it.

    .venv/bin/python docs/pictures/make.py

The run takes about a minute on two cores. Its folder is temporary; only the picture stays.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "two-attempts.png"
sys.path.insert(0, str(HERE.parents[1] / "examples" / "glue"))

import demo  # noqa: E402 - the examples are scripts, not a package


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = demo.main(Path(folder))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    demo.draw_loss(axes, found)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
