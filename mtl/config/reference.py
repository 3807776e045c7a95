"""docs/config.md and docs/config.schema.json, written from the schema: `python -m
mtl.config.reference`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mtl.config.document import dotted, dump
from mtl.config.schema import Config, plain
from mtl.config.words import branches, fields, is_section, wanted

_INTRO = """\
# Config

<!-- Written by `python -m mtl.config.reference` from mtl/config/schema.py. Do not edit. -->

One YAML file describes one experiment; `--set key.path=value` on the command line overrides it, as
often as needed. A key without a default is required. Everything that is wrong is reported at once,
with its file and line.

- YAML 1.2: `1e-4` is a number; `no`, `on` and dates are text; only `true` and `false` are booleans.
  Keys are text, as written. The same key twice is an error. Anchors and merge keys (`<<`) work.
- Paths start at the current directory, whatever folder the file is in; `~` is expanded where a path
  is used.
- A value of `--set` is YAML too: `--set train.steps=10`, `--set 'optimizer.betas=[0.9, 0.95]'`,
  `--set model.lora.r=8`. Items of lists go by number, from 0: `--set trackers.0=tensorboard`. A
  task's name that contains dots may be written as it is (the longest key in the file wins) or in
  quotes: `--set 'tasks."v1.5".cap=100'`.
- Where a name is wanted (balancer, objective, format, tracker), write it alone or with keywords:
  `CoBa` or `{name: CoBa, window: 48}`. `--set balancer.window=60` adds a keyword,
  `--set balancer=Equal` replaces name and keywords. `package.module:attribute` names code of yours,
  which runs only with `--allow-code package`.
"""


def markdown() -> str:
    """docs/config.md: a table for each section."""
    tables: dict[str, list[str]] = {}
    for keys, kind, field in fields(Config):
        section = dotted(keys[:-1]).replace("*", "<task>")
        default = (
            ""
            if field.is_required()
            else _code(plain(field.get_default(call_default_factory=True)))
        )
        if any(map(is_section, branches(kind))):
            default = (
                ""
                if field.is_required()
                else "null"
                if type(None) in branches(kind)
                else "see below"
            )
        meaning = " ".join(field.description.split()).replace("|", "\\|")
        tables.setdefault(section, []).append(
            f"| `{keys[-1]}` | {wanted(kind)} | {default} | {meaning} |"
        )
    head = "| key | value | default | meaning |\n|---|---|---|---|\n"
    parts = [
        f"\n## {section or 'Top level'}\n\n{head}" + "\n".join(rows) + "\n"
        for section, rows in tables.items()
    ]
    return _INTRO + "".join(parts)


def json_schema() -> dict[str, Any]:
    """docs/config.schema.json: what editors check and complete YAML by."""
    schema = Config.model_json_schema()
    schema["properties"]["tasks"]["additionalProperties"] = (
        False  # no name but those of the pattern
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _code(value: Any) -> str:
    text = (
        json.dumps(value)
        if isinstance(value, list | dict)
        # PyYAML ends a lone scalar with a line of three dots.
        else dump(value).removesuffix("...\n").strip()
    )
    return f"`{text}`"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.md").write_text(markdown(), encoding="utf-8")
    (folder / "config.schema.json").write_text(
        json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8"
    )
