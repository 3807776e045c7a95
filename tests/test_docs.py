"""What the docs name exists: files, functions, config keys, pages and headings."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mtl.config import Config, foreign
from mtl.config.words import branches, fields, is_section, type_at
from mtl.data.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
TOP = ("mtl", "balancers", "launch", "benchmarks", "examples", "configs", "tests")
PATH = re.compile(rf"(?:{'|'.join(TOP)})/[\w/.-]*\w\.(?:py|yaml|sh|md)|(?:{'|'.join(TOP)})/")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(
    r".*\.(?:py|json|jsonl|yaml|md|safetensors|npz|png|parquet|html|txt|js|arrow|npy)"
)


@cache
def names(root: Path) -> dict[str, set[str]]:
    """Of every module by its last name, and of every class: the names that it defines."""
    found: dict[str, set[str]] = {}
    files = [path for top in TOP[:3] for path in (root / top).rglob("*.py")]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = path.parent.name if path.name == "__init__.py" else path.stem
        found.setdefault(module, set()).update(_defined(tree.body))
        if path.name == "__init__.py":
            found[module] |= {each.stem for each in path.parent.iterdir()}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(_defined(node.body), _set_on_self(node))
    found["mtl"] = found.get("mtl", set()) | {each.stem for each in (root / "mtl").iterdir()}
    return found


def _defined(body: list[ast.stmt]) -> set[str]:
    found = set()
    for node in body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Assign():
                found |= {each.id for each in node.targets if isinstance(each, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


def _set_on_self(node: ast.ClassDef) -> set[str]:
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
        if isinstance(each.value, ast.Name) and each.value.id == "self"
    }


def is_key(keys: tuple[str, ...]) -> bool:
    """Whether the YAML knows this path; below a free mapping, such as a balancer's, any."""
    for depth in range(len(keys)):
        for branch in branches(type_at(Config, keys[:depth]) if depth else Config):
            if is_section(branch) and keys[depth] not in branch.model_fields:
                return False
    return True


def unknown(text: str, root: Path = ROOT) -> list[str]:
    """What stands in backticks, looks like ours and does not exist."""
    known: dict[str, Any] = names(root)
    missing = []
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        for path in PATH.findall(quoted):
            if not (root / path).exists():
                missing.append(path)
        token = quoted.removesuffix("()")
        if not NAME.fullmatch(token) or FILE.fullmatch(token):
            continue
        *above, name = token.split(".")
        is_ours = above[-1] in known and (len(above) == 1 or above[0] in TOP)
        is_config = above[0] in Config.model_fields
        if (is_ours or is_config) and not (
            (is_ours and name in known[above[-1]]) or (is_config and is_key((*above, name)))
        ):
            missing.append(token)
    return missing


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def broken(page: Path) -> list[str]:
    """Relative links that lead nowhere."""
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            missing.append(target)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert unknown(page.read_text(encoding="utf-8")) == []


def test_every_test_that_a_page_names_exists():
    there = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    named = {page: set(re.findall(r"`(test_\w+)`", text)) for page, text in pages.items()}
    assert len(named["guarantees.md"]) > 60
    assert {page: names - there for page, names in named.items() if names - there} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_resolves(page):
    assert broken(page) == []


def test_the_page_for_others_has_every_key_and_names_ours():
    page = (ROOT / "docs" / "from-others.md").read_text(encoding="utf-8")
    ours = {".".join(keys) for keys, _, _ in fields(Config)}
    for wanted, names in foreign.NAMES.items():
        cells = ", ".join(f"`{name}`" for name in names.split())
        assert f"| {cells} | {wanted} |" in page
        for key in re.findall(r"(?:[a-z_]+\.)+[a-z_]+|^[a-z_]+$", wanted.replace("tasks.<name>", "tasks.*")):
            assert key in ours | {"launch/train.py", "train.py"}, key
    assert not foreign.HERE.keys() & ours, "a key of ours is no other's"


def test_the_page_about_rows_has_every_format():
    """What is read, what becomes a target, what refuses a row."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("\n## Formats\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.MULTILINE))
    assert rows.keys() == FORMATS.keys()
    assert all(cell.strip() for row in rows.values() for cell in row.split(" | "))


def test_the_walks_name_functions():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = [each for each in re.findall(r"`([\w.]+)`", text) if NAME.fullmatch(each)]
    assert len([each for each in named if each.split(".")[0] in names(ROOT)]) > 25
    for package in sorted(path.parent for path in (ROOT / "mtl").glob("*/__init__.py")):
        assert f"`mtl/{package.name}/`" in text, "the map lacks a package"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("`mtl/train/step.py` `step.train_step` `Engine.backward` `evaluate.probe.every`", []),
        ("`mtl/steps.py`", ["mtl/steps.py"]),
        ("`loop.trane`", ["loop.trane"]),
        ("`Engine.forwards()`", ["Engine.forwards"]),
        ("`mtl.train.step.trane`", ["mtl.train.step.trane"]),
        ("`evaluate.probe.evry` and `balancer.window`", ["evaluate.probe.evry"]),
        ("`torch.compile`, `state.json`, `plain words`", []),
    ],
)
def test_what_does_not_exist_is_found(text, wanted):
    assert unknown(text) == wanted


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](#two) [c](none.md) [d](https://x.y)\n")
    assert broken(page) == ["#two", "none.md"]
