"""Hook of mkdocs.yml: pages that lie outside of docs/ join the site, and links between them and docs/ lead there.

    README.md                              index.md
    CHANGELOG.md, CONTRIBUTING.md          the same
    examples/<name>/README.md              the same
    docs/<page>.md                         <page>.md
    any other file that a page links to    the same, as a file to read

So all pages have links that work in the repository, and `mkdocs build --strict` checks those links.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
"""The target of a relative Markdown link or image, without its anchor."""


def on_config(config: MkDocsConfig) -> None:
    """Name the anchors of headings as GitHub does, so that one link works in both places."""
    config.mdx_configs["toc"] = {"slugify": slugify(case="lower"), "permalink": True}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that lie outside of docs/."""
    root = _root(config)
    outside = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    outside += sorted(path.relative_to(root).as_posix() for path in root.glob("examples/*/README.md"))
    for path in outside:
        _add(files, config, path)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each relative link to where its target is in the site."""
    here = posixpath.dirname(_path_of(page.file, config))

    def resolved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[2]))
        if (_root(config) / target / "README.md").is_file():
            target = f"{target}/README.md"
        elif not (_root(config) / target).is_file():
            return link[0]  # mkdocs reports it
        uri = _uri_of(target)
        if files.get_file_from_path(uri) is None:
            _add(files, config, target)
        return link[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(resolved, markdown)


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    files.append(File.generated(config, _uri_of(path), abs_src_path=str(_root(config) / path)))


def _uri_of(path: str) -> str:
    """Where a file of the repository is in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _path_of(file: File, config: MkDocsConfig) -> str:
    """Where a file of the site is in the repository."""
    source: Any = file.abs_src_path
    return Path(source).relative_to(_root(config)).as_posix()


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent
