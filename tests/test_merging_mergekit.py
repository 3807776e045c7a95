"""The same merges by mergekit, in an environment of its own: it is LGPL, and no dependency of ours.

`MERGEKIT` names its program; without it .cache/mergekit in the repository is made, where pip can.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import test_merging
import torch
import yaml
from near import near

from mtl.merging.average import average
from mtl.merging.dare import dare
from mtl.merging.merge import merge
from mtl.merging.task_arithmetic import task_arithmetic
from mtl.merging.ties import ties

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
models = test_merging.models
ENVIRONMENT = Path(__file__).resolve().parent.parent / ".cache" / "mergekit"
WEIGHTS = [1.0, 2.0, 1.5]


@pytest.fixture(scope="module")
def program() -> str:
    if given := os.environ.get("MERGEKIT"):
        return given
    found = ENVIRONMENT / "bin" / "mergekit-yaml"
    if not found.is_file():
        for command in (
            [sys.executable, "-m", "venv", str(ENVIRONMENT)],
            [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", "mergekit==0.1.5"],
        ):
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("mergekit cannot be installed here")
    return str(found)


def theirs(program: str, models: Path, folder: Path, method: str, density: float | None) -> Path:
    more = {} if density is None else {"density": density}
    plan = {
        "merge_method": method,
        "dtype": "float32",
        "parameters": {"normalize": method in ("linear", "ties")},
        "models": [
            {"model": str(one), "parameters": {"weight": w, **more}}
            for one, w in zip(test_merging.abc(models), WEIGHTS, strict=True)
        ],
    } | ({} if method == "linear" else {"base_model": str(models / "base")})
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [program, str(folder / "plan.yaml"), str(folder / "theirs"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "theirs"


@pytest.mark.parametrize(
    "method, density, ours",
    [
        ("linear", None, partial(average, weights=WEIGHTS)),
        ("task_arithmetic", None, partial(task_arithmetic, weights=WEIGHTS)),
        ("ties", 0.4, partial(ties, density=0.4, weights=WEIGHTS)),
    ],
)
def test_agrees(program, models, tmp_path, method, density, ours):
    merge(str(models / "base"), test_merging.abc(models), ours, tmp_path / "ours", force=True)
    found = test_merging.tensors(tmp_path / "ours")
    wanted = test_merging.tensors(theirs(program, models, tmp_path, method, density))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        near(found[name], tensor, units=2)


def test_dare_drops_and_rescales_alike(program, models, tmp_path):
    """Other random numbers: the same fraction dropped everywhere, and the same length."""
    ours = partial(dare, drop=0.6, scale=sum(WEIGHTS), weights=WEIGHTS)
    merge(str(models / "base"), test_merging.abc(models), ours, tmp_path / "ours", force=True)
    base = test_merging.tensors(models / "base")
    both = (tmp_path / "ours", theirs(program, models, tmp_path, "dare_linear", 0.4))
    deltas = [
        torch.cat([(tensor - base[name]).flatten() for name, tensor in one.items()])
        for one in map(test_merging.tensors, both)
    ]
    for delta in deltas:
        assert float((delta == 0).double().mean()) == pytest.approx(0.6**3, abs=0.005)
    assert float(deltas[0].norm() / deltas[1].norm()) == pytest.approx(1, abs=0.01)
