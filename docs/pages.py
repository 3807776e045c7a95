"""The files of the site (mkdocs.yml names this as a hook).

A page stands in the site where it stands in the repository, and so does every file that a page
links to. So one relative link serves both.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/*.md", "benchmarks/*.md")
LINK = re.compile(r"\]\(([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what mkdocs found in docs/ by the pages of the repository and what they link to.

    A file that mkdocs has not found in docs/ stays: the theme brings its own.
    """
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {
        (page.parent / target).resolve()
        for page in pages
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target
    }
    found = [*pages, *sorted(path for path in linked - set(pages) if path.is_file())]
    kept = [each for each in files if each.src_dir != config.docs_dir]
    return Files(kept + [_file(path, config) for path in found if path.is_relative_to(ROOT)])


def _file(path: Path, config: MkDocsConfig) -> File:
    name = path.relative_to(ROOT).as_posix()
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls)
