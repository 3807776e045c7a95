"""The README's balancer works as printed: it passes the contract, and its YAML line makes it."""

import re
from pathlib import Path

import pytest
from contract import CHECKS

from mtl.config import load

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


def test_every_page_the_readme_links_to_exists():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    missing = [target for target in targets if not (Path(__file__).parent.parent / target).exists()]
    assert targets and not missing
    assert "@@" not in README, "a figure still to be filled in"


def test_the_quickstarts_configurations_differ_in_the_balancer_and_the_folder_only():
    configs = Path(__file__).parent.parent / "configs"
    first, *others = (
        load(configs / f"quickstart{name}.yaml").resolved() for name in ("", "-equal", "-tokens")
    )
    for other in others:
        assert {key for key in first if first[key] != other[key]} == {"balancer", "output"}
