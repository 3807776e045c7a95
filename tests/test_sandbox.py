"""Programs that a model wrote: they pass where their tests do, and are kept apart, whoever starts them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from mtl.data.encoded import DataError
from mtl.data.formats import Completion
from mtl.data.questions import Question
from mtl.generation import metrics, sandbox
from mtl.generation.metrics import Answer


def solved(text: str, row: dict, **keywords: object) -> list[float]:
    question = Question(0, np.zeros(0, np.int32), "", Completion("", ""), row)
    return metrics.code([Answer(question, text)], **keywords)


@pytest.fixture
def jail():
    try:
        sandbox.available()
    except sandbox.NoSandbox as why:
        pytest.skip(str(why))
    return sandbox


def test_code_passes_where_its_tests_do(jail):
    row = {"tests": ["assert double(2) == 4", "assert double(0) == 0"], "stub": "def double(x):\n"}
    text = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
    assert solved(text, row) == [1]
    assert solved("def double(x): return x", row) == [0]
    assert solved("    return 2 * x", row, prompt="stub") == [1]
    assert solved("def double(x) return", row) == [0]
    assert solved("import sys; sys.exit(0)", row) == [0]  # the tests are not reached
    assert solved("def double(x): return 2 * x", {}, tests=None) == [1]
    with pytest.raises(DataError, match="code: tests: found None, wanted a text in each row"):
        solved("1", {})


def test_without_namespaces_no_code_runs(jail, monkeypatch):
    monkeypatch.setattr(jail, "NAMESPACES", ["--no-such-option"])
    jail.available.cache_clear()
    try:
        with pytest.raises(jail.NoSandbox, match="needs namespaces, which this machine does not"):
            solved("1", {}, tests=None)
    finally:
        jail.available.cache_clear()


OUTSIDE = """
import os, socket, time
def refused(work):
    try:
        work()
    except (OSError, MemoryError):
        return True
def big():
    with open('/tmp/x', 'wb') as file:
        file.write(bytes(2 ** 20 + 1))
def many():
    for number in range(40):
        with open(f'/tmp/{number}', 'wb') as file:
            file.write(bytes(2 ** 19))
def fork():
    for _ in range(64):
        if os.fork() == 0:
            time.sleep(60)
"""
APART = [
    "sorted(os.listdir('/')) == sorted({'usr', 'lib', 'lib64', 'bin', 'tmp', 'dev'} & "
    "set(os.listdir('/')) | {PREFIX})",
    "os.listdir('/tmp') == ['main.py'] and dict(os.environ).keys() <= {'PATH', 'LC_CTYPE'}",
    "not os.path.exists(HERE)",
    "refused(lambda: open('/usr/x', 'w'))",
    "refused(lambda: os.remove('/usr/bin/env'))",
    "refused(lambda: os.chroot('/tmp'))",
    "refused(big)",
    "refused(many)",
    "refused(lambda: bytearray(2 ** 29))",
    "refused(lambda: [open('/dev/null') for _ in range(64)])",
    "refused(lambda: socket.create_connection(('127.0.0.1', PORT), 1))",
    "os.getpid() == 1 and open('/dev/null', 'w').write('x') == 1",
]
STARTS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox.available()
programs, seconds = json.load(sys.stdin)
print(json.dumps([sandbox.run(program, seconds, 256) for program in programs]))
"""


@pytest.fixture(params=["this user", "another user than root"])
def start(request, jail):
    """`start(lines, seconds)`: whether each runs to its end, started by that user.

    It stands in a folder that every user may read, and so does a file whose existence is a secret.
    """
    with TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        for source in (sandbox.__file__, sandbox.JAIL):
            shutil.copy(source, folder)
        (folder / "secret").write_text("x")
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        is_other = request.param != "this user" and os.geteuid() == 0
        user = {"user": 65534, "group": 65534, "extra_groups": []} if is_other else {}
        python = _python(user)

        def start(lines: list[str], seconds: float = 20) -> list[bool]:
            root = Path(json.loads(_said(python, "sys.base_prefix", user))).parts[1]
            known = {"HERE": f"{folder}/secret", "PORT": server.getsockname()[1], "PREFIX": root}
            names = "\n".join(f"{key} = {value!r}" for key, value in known.items())
            programs = [f"{names}\n{OUTSIDE}\n{line}" for line in lines]
            given = json.dumps([programs, seconds])
            command = [python, "-I", "-c", STARTS, name]
            done = subprocess.run(command, input=given, capture_output=True, text=True, **user)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        yield start


def _said(python: str, what: str, user: dict) -> str:
    command = [python, "-I", "-c", f"import json, sys; print(json.dumps({what}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True, **user).stdout


def _python(user: dict) -> str:
    """One that the user may run: root's own may be out of reach."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            _said(python, "0", user)
            return python
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip("no Python that another user than root may run")


def test_code_is_kept_apart(start):
    seen = start([f"assert {line}" for line in APART])
    assert [line for line, held in zip(APART, seen, strict=True) if not held] == []
    assert start(["assert not refused(lambda: 1)", "assert refused(lambda: 1)"]) == [True, False]


def test_processes_are_limited_but_for_root(start, request):
    is_root = os.geteuid() == 0 and "this" in request.node.name
    assert start(["assert not refused(fork)" if is_root else "assert refused(fork)"]) == [True]


def test_code_that_does_not_end_is_killed_with_its_processes(start):
    assert start(["os.fork()\nwhile True: pass", "time.sleep(60)"], seconds=1) == [False, False]
