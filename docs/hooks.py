"""MkDocs hooks: links from a page to a file outside docs/ lead to a page made of that file, under repository/.

Markdown files (README.md, CONTRIBUTING.md) become pages as they are, other files (cluster.yaml) a page with their text.
A link to a folder becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
_SOURCES: dict[str, PurePosixPath] = {}
"""Repository path of each page under repository/."""

SYNTAX = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside docs/ that a page links to, and for those that these link to."""
    waiting = [PurePosixPath("docs", each.src_uri) for each in files.documentation_pages()]
    done: set[PurePosixPath] = set()
    while waiting:
        source = waiting.pop()
        if source in done:
            continue
        done.add(source)
        text = (ROOT / source).read_text()
        if source.parts[0] != "docs":
            _SOURCES[_page(source)] = source
            files.append(File.generated(config, _page(source), content=_content(source, text)))
        if source.suffix == ".md":
            targets = [_target(source, found["path"]) for found in LINK.finditer(text)]
            waiting += [each for each in targets if each.parts[0] != "docs" and (ROOT / each).is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of one page into links within the site."""
    source = _SOURCES.get(page.file.src_uri, PurePosixPath("docs", page.file.src_uri))
    if source.suffix != ".md":
        return markdown

    def replaced(found: re.Match[str]) -> str:
        target = _target(source, found["path"])
        if (ROOT / target).is_dir():
            return found["text"]
        inside = target.relative_to("docs") if target.parts[0] == "docs" else PurePosixPath(_page(target))
        link = os.path.relpath(inside, PurePosixPath(page.file.src_uri).parent)
        return f"{found['image']}[{found['text']}]({link}{found['anchor'] or ''})"

    return LINK.sub(replaced, markdown)


def _target(source: PurePosixPath, link: str) -> PurePosixPath:
    """Repository path of a link in a file."""
    return PurePosixPath(os.path.normpath(source.parent / link))


def _page(source: PurePosixPath) -> str:
    """Page of a file outside docs/: MkDocs skips names with a leading dot and takes README.md for an index."""
    name = source.as_posix().lstrip(".")
    return f"repository/{name.lower()}" if source.suffix == ".md" else f"repository/{name}.md"


def _content(source: PurePosixPath, text: str) -> str:
    if source.suffix == ".md":
        return text
    return f"# {source}\n\n~~~~~~ {SYNTAX.get(source.suffix, 'text')}\n{text.rstrip()}\n~~~~~~\n"
