"""The docs as a site: it builds without a warning, holds every page, and loads nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("material", reason="mkdocs-material is not installed")
ROOT = Path(__file__).resolve().parent.parent
PAGES = [path for each in ("*.md", "docs/*.md", "benchmarks/*.md") for path in ROOT.glob(each)]


def build(root: Path, site: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("docs") / "site"
    built = build(ROOT, made)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return made


class Tags(HTMLParser):
    """What a page loads, what it links to, and its tables."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded, self.linked, self.tables = [], [], 0
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tables += tag == "table"
        if tag == "link" or "src" in given:
            self.loaded.append(given.get("href") or given.get("src"))
        elif tag == "a" and "href" in given:
            self.linked.append(given["href"])


def html(page: Path, site: Path) -> Path:
    name = page.relative_to(ROOT).with_suffix(".html")
    return site / (name.with_name("index.html") if page.name == "README.md" else name)


def test_every_page_is_there_with_its_tables(site):
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        tables = len(re.findall(r"^\|(?: *:?-+:? *\|)+$", text, re.MULTILINE))
        assert Tags(html(page, site)).tables == tables, page


def test_links_lead_to_files_of_the_site_and_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES), "the pages, and one for what is not found"
    for page in pages:
        if page.name == "404.html" or page.parent != site and not is_ours(page, site):
            continue
        tags = Tags(page)
        assert tags.loaded and not [one for one in tags.loaded if "//" in one], page
        inside = [one.split("#")[0] for one in tags.linked if "//" not in one]
        assert not [one for one in inside if one and not (page.parent / one).exists()], page


def is_ours(page: Path, site: Path) -> bool:
    """Whether it was made from a page; a report that a page links to was not."""
    return page in {html(each, site) for each in PAGES}


def test_links_to_sources_hold(site):
    assert (site / "mtl" / "data" / "formats.py").read_bytes() == (
        ROOT / "mtl" / "data" / "formats.py"
    ).read_bytes()
    assert "../mtl/data/formats.py" in Tags(site / "docs" / "extend.html").linked


@pytest.mark.parametrize(
    "added, told",
    [
        ({}, None),
        ({"README.md": "[a](docs/none.md)"}, "docs/none.md"),
        ({"docs/a.md": "[a](../README.md#none)"}, "#none"),
        ({"docs/new.md": "# New"}, 'not included in the "nav"'),
    ],
)
def test_what_leads_nowhere_fails_the_build(tmp_path, added, told):
    settings, _, _ = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "pages.py", tmp_path / "docs")
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav: [README.md, docs/a.md]\n")
    pages = {"README.md": "# One\n[a](docs/a.md#two)", "docs/a.md": "# A\n## Two\n[b](pages.py)"}
    for name, text in (pages | added).items():
        (tmp_path / name).write_text(f"{pages.get(name, '')}\n{text}\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == (told is not None), built.stderr
    assert told is None or told in built.stderr
