"""The directions of import: a file imports from lower floors, or from its own without a cycle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mtl

ROOT = Path(__file__).resolve().parent.parent

# Packages (and the modules beside them), lowest first. A file imports from lower floors, or from its
# own without a cycle. `mtl` is the package itself: its version.
FLOORS = (
    "balancers mtl mtl.process",  # the last is what is settled before torch is imported
    "mtl.config mtl.samples",
    "mtl.data mtl.migrate",
    "mtl.losses",
    "mtl.distributed",
    "mtl.models mtl.integrations",
    "mtl.generation mtl.output mtl.check mtl.merging",
    "mtl.train",
    "mtl.plugins mtl.build mtl.compare mtl.report mtl.recipes",
    "launch mtl.cli",
)
DOORS = {("mtl", "mtl.models.folder")}  # imported when it is called: `import mtl` stays light
EXTRAS = {
    "balancers.torchjd": {"torch", "torchjd"}
}  # what an extra may import, once it is asked for


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    return {
        name_of(p, root): p
        for top in ("balancers", "mtl", "launch")
        for p in sorted((root / top).rglob("*.py"))
    }


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
            found |= {
                full if (full := f"{base}.{alias.name}") in ours else base for alias in node.names
            }
    return {other if other in ours else other.partition(".")[0] for other in found} - {name}


def floor(name: str) -> int:
    parts = name.split(".")
    package = ".".join(parts[: 2 if parts[0] == "mtl" else 1])
    found = [n for n, packages in enumerate(FLOORS) if package in packages.split()]
    assert len(found) == 1, (
        f"{package} has {len(found)} floors: give it one in {Path(__file__).name}"
    )
    return found[0]


def climbs(ours: dict[str, Path]) -> list[str]:
    """Imports from a higher floor."""
    return [
        f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        for name, path in ours.items()
        for other in sorted(imports(name, path, ours) & set(ours))
        if floor(other) > floor(name) and (name, other) not in DOORS
    ]


def cycle(ours: dict[str, Path]) -> list[str]:
    """A chain of modules that import each other, or nothing."""
    try:
        TopologicalSorter(
            {name: imports(name, path, ours) & set(ours) for name, path in ours.items()}
        ).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_imports_go_down():
    assert len(modules()) > 30
    assert climbs(modules()) == []


def test_programs_are_short():
    """They read arguments, build and run; what they do lives in `mtl`."""
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("launch/*.py")}
    assert len(lines) > 8 and {name: n for name, n in lines.items() if n > 65} == {}


def test_the_package_itself_is_light():
    code = "import sys, mtl\nprint(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]" and callable(mtl.load)


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
        if (
            found := {
                other for other in imports(name, path, ours) if not other.startswith("balancers")
            }
            - known(name)
        )
    }
    assert foreign == {}


def test_balancers_leave_torch_out():
    code = "import sys, balancers\nprint(sorted({'torch', 'mtl', 'transformers', 'deepspeed'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_one_package_imports_deepspeed():
    ours = modules()
    homes = {
        name.rpartition(".")[0]
        for name, path in ours.items()
        if "deepspeed" in imports(name, path, ours)
    }
    assert homes == {"mtl.distributed"}


PUBLIC = {
    "mtl.config", "mtl.data.encode", "mtl.data.encoded", "mtl.data.examples", "mtl.data.formats",
    "mtl.data.special", "mtl.losses.objective", "mtl.losses.terms",
    "mtl.models.load", "mtl.models.errors", "mtl.models.structure", "mtl.plugins",
}  # fmt: skip


def test_recipes_use_public_points_only():
    ours = modules()
    recipes = {name for name in ours if name.startswith("mtl.recipes")}
    used = {other for name in recipes for other in imports(name, ours[name], ours) if other in ours}
    assert recipes and used - recipes - PUBLIC - {"mtl"} == set()
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    listed = page.partition("public points only")[2].partition("trained_only")[0]
    assert {word.strip("`,") for word in listed.split() if word.startswith("`mtl.")} == PUBLIC


def test_one_file_knows_peft():
    ours = modules()
    assert [name for name, path in ours.items() if "peft" in imports(name, path, ours)] == [
        "mtl.models.adapters"
    ]


@pytest.mark.parametrize("package", ["balancers", "mtl.integrations"])
def test_balancers_and_integrations_stand_without_the_trainer(package):
    """Not even by way of another module of ours."""
    ours = modules()
    seen, coming = (
        set(),
        [name for name in ours if name == package or name.startswith(package + ".")],
    )
    while coming:
        name = coming.pop()
        if name not in seen:
            seen.add(name)
            coming += imports(name, ours[name], ours) & set(ours) if name in ours else []
    foreign = {other for name in seen for other in imports(name, ours[name], ours) - set(ours)}
    assert "deepspeed" not in foreign
    assert not [name for name in seen if name.startswith(("mtl.train", "mtl.output", "mtl.build"))]


@pytest.mark.parametrize(
    "path, line, wanted",
    [
        (
            "mtl/losses/terms.py",
            "from mtl.train import step",
            "mtl.losses.terms (floor 3) imports mtl.train.step (floor 7)",
        ),
        (
            "mtl/losses/terms.py",
            "def f():\n    import mtl.train.evaluate",
            "mtl.losses.terms (floor 3) imports mtl.train.evaluate (floor 7)",
        ),
        (
            "mtl/data/x.py",
            "from ..distributed.comm import rank",
            "mtl.data.x (floor 2) imports mtl.distributed.comm (floor 4)",
        ),
        (
            "balancers/x.py",
            "from mtl.config import load",
            "balancers.x (floor 0) imports mtl.config (floor 1)",
        ),
    ],
)
def test_a_climb_is_seen(path, line, wanted, tmp_path):
    names = ("__init__", "config/__init__", "train/step", "train/evaluate", "distributed/comm")
    for name in (*(f"mtl/{each}.py" for each in names), path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line if name == path else "")
    assert climbs(modules(tmp_path)) == [wanted]


def test_a_cycle_is_seen(tmp_path):
    (tmp_path / "mtl").mkdir()
    for name, line in {
        "a": "import mtl.b",
        "b": "from mtl import c",
        "c": "from .a import x",
    }.items():
        (tmp_path / "mtl" / f"{name}.py").write_text(line)
    assert set(cycle(modules(tmp_path))) == {"mtl.a", "mtl.b", "mtl.c"}
