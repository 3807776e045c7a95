"""Models of a hub that asks for something: the libraries' own way there, to a server on this machine that answers as the hub."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forks
import pytest
import runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As the hub words it, with the header that its client goes by
ERRORS = {
    "owner/gated": (
        401,
        "GatedRepo",
        "Access to model owner/gated is restricted. You must have access to it and be authenticated.",
    ),
    "owner/asked": (
        403,
        "GatedRepo",
        "Access to model owner/asked is restricted and you are not in the authorized list.",
    ),
    "owner/missing": (401, "RepoNotFound", "Repository not found"),
}
CHECK = f"""
import runpy, sys
from mtl import process
main = runpy.run_path({str(runs.ROOT / "launch" / "check.py")!r}, run_name="check")["main"]
yaml, *names = sys.argv[1:]
for name in names:
    sys.argv = ["check.py", "--config", yaml, "--set", "model.name=" + name]
    print("=== " + name, file=sys.stderr)
    print("exit " + str(process.exit_code(main)), file=sys.stderr)
"""


class Hub(ThreadingHTTPServer):
    def __init__(self, folder: Path):
        self.folder, self.asked = folder, []
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        match = re.match(r"/(?:api/models/)?(owner/\w+)(?:/resolve/[^/]+/([^?]+))?", self.path)
        name, file = match.groups() if match else ("", None)
        if name in ERRORS:
            status, code, text = ERRORS[name]
            return self.answer(
                status,
                json.dumps({"error": text}).encode(),
                {"X-Error-Code": code, "X-Error-Message": text},
            )
        path = self.server.folder / (file or "")
        if not path.is_file():
            return self.answer(
                404,
                b"Entry not found",
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            )
        return self.answer(200, path.read_bytes(), {"ETag": f'"{file}"'})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            **headers,
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None: ...


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Iterator[tuple[dict[str, str], Hub, Path]]:
    """What launch/check.py says of each model, the hub, and the YAML."""
    yaml = runs.write(tmp_path_factory.mktemp("hub"))
    folder = yaml.parent / "model"
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.Odd", "AutoModelForCausalLM": "code.OddForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps(
            config | {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": auto}
        )
    )
    (folder / "code.py").write_text(f"open({str(yaml.parent / 'it ran')!r}, 'w')\n")
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {
        **os.environ, **forks.ENVIRONMENT, "PYTHONPATH": str(runs.ROOT), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(yaml.parent / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", CHECK, str(yaml), *ERRORS, "owner/remote"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=runs.TIMEOUT
    )
    hub.shutdown()
    hub.server_close()
    said = dict(re.findall(r"^=== (\S+)\n(.*?^exit \d+)$", ended.stderr, re.MULTILINE | re.DOTALL))
    assert said.keys() == {*ERRORS, "owner/remote"}, ended.stderr
    return said, hub, yaml


@pytest.mark.parametrize(
    "name, texts",
    [
        ("owner/gated", ["gated repo", "hf auth login", "HF_TOKEN"]),
        ("owner/asked", ["gated repo", "Ask its owner for access", "hf auth login"]),
        (
            "owner/missing",
            ["is not a local folder and is not a valid model identifier", "hf auth login"],
        ),
        ("owner/remote", ["needs code that comes with it", "model.allow_remote_code: true"]),
    ],
)
def test_it_says_the_model_the_line_and_the_next_move(checked, name, texts):
    said, hub, yaml = checked
    *_, text, code = said[name].splitlines()
    assert (
        text.startswith(f"error: --set model.name={name}: model.name: ") and repr(name) in text
    ), text
    assert all(one in text for one in texts), text
    assert code == "exit 1" and "Traceback" not in said[name], said[name]
    assert any(f"{name}/resolve/main/" in path for path in hub.asked), "it has asked the hub"


def test_code_that_comes_with_a_model_did_not_run(checked):
    _, hub, yaml = checked
    assert not (yaml.parent / "it ran").exists()
    assert not any(path.endswith("code.py") for path in hub.asked)
