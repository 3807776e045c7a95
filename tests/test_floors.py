"""The directions of import: a file imports from lower floors, or from its own without a cycle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file that is not named here has no floor yet: decide where it lives.
FLOORS = {
    "balancers": 0,
    "mtl": 0,  # the package itself: its version
    "mtl.process": 0,  # before torch is imported
    "mtl.config": 1, "mtl.document": 1, "mtl.words": 1, "mtl.spec": 1,
    "mtl.data": 2,
    "mtl.comm": 3, "mtl.engine": 3, "mtl.gram": 3, "mtl.head": 3, "mtl.memory": 3, "mtl.objectives": 3, "mtl.reshard": 3,
    "mtl.schedule": 3, "mtl.terms": 3,
    "mtl.card": 4, "mtl.checkpoint": 4, "mtl.export": 4, "mtl.model": 4, "mtl.packing": 4, "mtl.plugins": 4,
    "mtl.provenance": 4, "mtl.report": 4, "mtl.trackers": 4,
    "mtl.dryrun": 5, "mtl.evaluate": 5, "mtl.integrations": 5, "mtl.patience": 5, "mtl.run": 5, "mtl.step": 5,
    "launch": 6, "mtl.cli": 6,
}  # fmt: skip
FAMILIES = ("balancers", "mtl.data", "mtl.integrations", "launch")  # one floor for all that is below
EXTRAS = {"balancers.torchjd": {"torch", "torchjd"}}  # what an extra may import, once it is asked for


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    return {name_of(p, root): p for top in ("balancers", "mtl", "launch") for p in sorted((root / top).rglob("*.py"))}


def imports(name: str, path: Path, ours: dict[str, Path]) -> set[str]:
    """What a file imports, wherever in it: our modules by their own name, of the rest the top-level package."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            # `from package import module` is about the module; `from package import name` about the package.
            found |= {full if (full := f"{base}.{alias.name}") in ours else base for alias in node.names}
    return {other if other in ours else other.partition(".")[0] for other in found} - {name}


def floor(name: str) -> int:
    family = next((f for f in FAMILIES if name == f or name.startswith(f + ".")), name)
    assert family in FLOORS, f"{name} has no floor: give it one in {Path(__file__).name}"
    return FLOORS[family]


def climbs(ours: dict[str, Path]) -> list[str]:
    """Imports from a higher floor."""
    return [
        f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        for name, path in ours.items()
        for other in sorted(imports(name, path, ours) & set(ours))
        if floor(other) > floor(name)
    ]


def cycle(ours: dict[str, Path]) -> list[str]:
    """A chain of modules that import each other, or nothing."""
    try:
        TopologicalSorter({name: imports(name, path, ours) & set(ours) for name, path in ours.items()}).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_imports_go_down():
    assert len(modules()) > 30
    assert climbs(modules()) == []


def test_there_is_no_cycle():
    assert cycle(modules()) == []


def test_balancers_know_only_numpy():
    def known(name: str) -> set[str]:
        return {"numpy", *sys.stdlib_module_names} | EXTRAS.get(name, set())

    ours = modules()
    foreign = {
        name: found
        for name, path in ours.items()
        if name.startswith("balancers")
        if (found := {other for other in imports(name, path, ours) if not other.startswith("balancers")} - known(name))
    }
    assert foreign == {}


def test_balancers_leave_torch_out():
    code = "import sys, balancers\nprint(sorted({'torch', 'mtl', 'transformers', 'deepspeed'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("package, home", [("deepspeed", "mtl.engine"), ("peft", "mtl.model")])
def test_one_file_knows(package, home):
    ours = modules()
    assert [name for name, path in ours.items() if package in imports(name, path, ours)] == [home]


@pytest.mark.parametrize(
    "path, line, wanted",
    [
        ("mtl/terms.py", "from mtl import step", "mtl.terms (floor 3) imports mtl.step (floor 5)"),
        ("mtl/terms.py", "def f():\n    import mtl.evaluate", "mtl.terms (floor 3) imports mtl.evaluate (floor 5)"),
        ("mtl/data/x.py", "from ..comm import rank", "mtl.data.x (floor 2) imports mtl.comm (floor 3)"),
        ("balancers/x.py", "from mtl.config import load", "balancers.x (floor 0) imports mtl.config (floor 1)"),
    ],
)
def test_a_climb_is_seen(path, line, wanted, tmp_path):
    for name in ("mtl/__init__.py", "mtl/step.py", "mtl/evaluate.py", "mtl/comm.py", "mtl/config.py", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line if name == path else "")
    assert climbs(modules(tmp_path)) == [wanted]


def test_a_cycle_is_seen(tmp_path):
    (tmp_path / "mtl").mkdir()
    for name, line in {"a": "import mtl.b", "b": "from mtl import c", "c": "from .a import x"}.items():
        (tmp_path / "mtl" / f"{name}.py").write_text(line)
    assert set(cycle(modules(tmp_path))) == {"mtl.a", "mtl.b", "mtl.c"}
