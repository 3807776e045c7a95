"""The README's balancer works as printed: it passes the contract, and its YAML line makes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from contract import CHECKS

from balancers.methods import METHODS, method
from balancers.wrapper import Wrapper

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def worst():
    (code,) = re.findall(r"```python\n# mybalancers\.py\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 25, "the README promises a small one"
    namespace: dict = {"__name__": "mybalancers"}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace["Worst"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_balancer_in_the_readme_passes_the_contract(worst, check):
    check(lambda tasks: worst(temperature=0.5))


def test_the_balancer_in_the_readme_is_found_where_the_command_runs(tmp_path):
    """As printed: a file in the current directory, `--allow-code`, and no PYTHONPATH."""
    root = Path(__file__).parent.parent
    (code,) = re.findall(r"```python\n# mybalancers\.py\n(.*?)```", README, re.DOTALL)
    (line,) = re.findall(r"balancer: \{name: mybalancers:Worst.*\}", README)
    (tmp_path / "mybalancers.py").write_text(code)
    (tmp_path / "x.yaml").write_text(
        "model: {name: m}\noutput: run\noptimizer: {lr: 1e-3}\ntrain: {steps: 1}\n"
        "tasks: {a: {train: a.jsonl, validation: a.jsonl, format: text}}\n"
        f"batch: {{examples: 1, tokens: 2048}}\n{line}\n"
    )
    (tmp_path / "json.py").write_text("raise RuntimeError('what is here replaces nothing')")
    command = [sys.executable, str(root / "launch" / "check.py"), "--config", "x.yaml"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ended = subprocess.run(
        [*command, "--allow-code", "mybalancers"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "mybalancers" in ended.stdout, ended.stderr  # the YAML with its defaults
    assert "model.name" in ended.stderr, "nothing is wrong but the model, which is not there"


def test_the_readme_counts_the_other_methods():
    wrappers = {name for name in METHODS if issubclass(method(name), Wrapper)}
    assert wrappers == {"Apart", "Bounded", "Grouped", "Scheduled"}
    others = METHODS.keys() - wrappers - {"CoBa"}
    (word,) = re.findall(r"(\w+) \[other methods\]", README)
    assert {"Fourteen": 14, "Fifteen": 15, "Sixteen": 16, "Seventeen": 17}[word] == len(others)


def test_every_page_the_readme_links_to_exists():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    missing = [target for target in targets if not (Path(__file__).parent.parent / target).exists()]
    assert targets and not missing
    assert "@@" not in README, "a figure still to be filled in"
