"""Serious findings of axe-core on a page (https://github.com/dequelabs/axe-core)."""

from __future__ import annotations

from pathlib import Path

from tests.browser import Page
from tests.conftest import missing

AXE = Path(__file__).resolve().parents[1] / ".servers" / "node_modules" / "axe-core" / "axe.min.js"
FINDINGS = """axe.run(document, {resultTypes: ["violations"]}).then((found) => found.violations
  .filter((rule) => ["serious", "critical"].includes(rule.impact))
  .map((rule) => `${rule.id}: ${rule.nodes.map((node) => node.html.slice(0, 200)).join(" | ")}`))"""


def findings(page: Page) -> list[str]:
    """What axe-core finds on the page as it is now."""
    if not AXE.is_file():
        missing("axe-core is not installed (make test installs it into .servers)")
    page.ask(AXE.read_text() + "; true")
    found: list[str] = page.ask(FINDINGS)
    return found
