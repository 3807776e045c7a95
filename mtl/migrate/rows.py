"""MFTCoder's task folders as files of ours."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mtl.migrate.given import Migration, MigrationError

PAIRS = (
    "prompt answer",
    "prompt response",
    "input output",
    "instruction output",
    "instruction response",
    "question response",
    "question answer",
)
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "bot": "assistant",
    "assistant": "assistant",
}


class Converted(NamedTuple):
    """A row of ours, the format it has here, and the keys that were read for it."""

    format: str
    row: dict[str, Any]
    read: set[str]


def paths_of(data_paths: str | list[str]) -> list[Path]:
    """The paths of a list, or of a text like `[a,b]`."""
    paths = (
        data_paths if isinstance(data_paths, list) else data_paths.strip().strip("[]").split(",")
    )
    # A text may quote its parts: `['a','b']`.
    return [Path(part.strip().strip("'\"")) for part in paths if part.strip()]


def tasks_of(data_paths: str | list[str]) -> dict[str, Path]:
    """MFTCoder's tasks: a folder each, named as the folder. What a task's name cannot hold becomes
    `_`, a letter beyond ASCII its code point: folders that differ stay apart.
    """
    tasks: dict[str, Path] = {}
    for folder in paths_of(data_paths):
        if not folder.is_dir():
            raise MigrationError(f"data_paths: found {folder}, wanted a folder of JSONL files")
        name = re.sub(r"[^A-Za-z0-9_.-]", _spelled, folder.name)
        if name in tasks:
            raise MigrationError(
                f"data_paths: found {tasks[name]} and {folder}, which would both be the task "
                f"{name}; wanted folders with different names. Rename one."
            )
        tasks[name] = folder
    return tasks


def _spelled(match: re.Match[str]) -> str:
    return "_" if match[0].isascii() else f"u{ord(match[0]):x}"


def convert(row: Any, where: str) -> Converted:
    """A row of MFTCoder's as one of ours: `messages` for chats and pairs, `text` for plain text.

    Where a pair's row has instruction and input, both make the question, as in Alpaca's format;
    MFTCoder reads one of them only.
    """
    if not isinstance(row, dict):
        raise MigrationError(f"{where}: found {type(row).__name__}, wanted an object")
    for question, answer in (pair.split() for pair in PAIRS):
        if question in row and answer in row:
            both = ("instruction", "input")
            asked = [key for key in both if row.get(key)] if question in both else []
            asked = asked or [question]
            turns = [
                {"role": "user", "content": "\n".join(_text(row, key, where) for key in asked)},
                {"role": "assistant", "content": _text(row, answer, where)},
            ]
            if row.get("system"):
                turns.insert(0, {"role": "system", "content": _text(row, "system", where)})
            return Converted("messages", {"messages": turns}, {*asked, question, answer, "system"})
    if row.get("chat_rounds"):
        turns = turns_of(row["chat_rounds"], where)
        return Converted("messages", {"messages": turns}, {"chat_rounds"})
    if isinstance(row.get("text"), str):
        return Converted("text", {"text": row["text"]}, {"text"})
    raise MigrationError(
        f"{where}: found the keys {', '.join(row)}, wanted chat_rounds, text or one of the pairs "
        f"{', '.join(PAIRS)}"
    )


def turns_of(chat: list[dict[str, Any]], where: str) -> list[dict[str, str]]:
    """The turns of a chat with our names of roles."""
    for turn in chat:
        if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise MigrationError(
                f"{where}: found the turn {turn!r}, wanted a content and a role of "
                f"{', '.join(ROLES)}"
            )
    return [{"role": ROLES[turn["role"]], "content": turn["content"]} for turn in chat]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise MigrationError(f"{where}: {key}: found {row[key]!r}, wanted text")
    return row[key]


def rows_of(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """(place, row) of every line, in the order of the files."""
    for file in files:
        number = 0
        try:
            with file.open(encoding="utf-8-sig") as lines:  # not splitlines: U+2028 is text
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{file}:{number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise MigrationError(
                f"{file}:{number + 1}: found bytes that are not UTF-8 ({error})"
            ) from error
        except json.JSONDecodeError as error:
            raise MigrationError(f"{file}:{number}: found no JSON ({error})") from error


def _files(name: str, folder: Path, migration: Migration) -> list[Path]:
    """A task's files, as MFTCoder reads them: whatever their names. Hidden ones are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    hidden = [file.name for file in files if file.name.startswith(".")]
    if hidden:
        migration.note(f"task {name}", f"left out, by their names: {', '.join(hidden)}")
    return [file for file in files if file.name not in hidden]


def write_task(name: str, folder: Path, migration: Migration) -> dict[str, Any]:
    """Write a task's rows, split. Returns its entry of the YAML and notes its rows."""
    rows, kinds, unread, joined = [], set(), Counter(), 0
    for where, row in rows_of(_files(name, folder, migration)):
        converted = convert(row, where)
        rows.append(converted.row)
        kinds.add(converted.format)
        unread.update(row.keys() - converted.read)
        # A bool counts as 0 or 1.
        joined += {"instruction", "input"} <= converted.read and bool(row["input"])
    note_unread(name, unread, migration)
    if joined:
        migration.note(
            f"task {name}",
            f"in {joined} rows instruction and input make the question together; MFTCoder reads "
            "one of them only",
        )
    if len(kinds) != 1:
        raise MigrationError(
            f"{folder}: found rows of {sorted(kinds) or 'no kind'}, wanted rows of one kind in a "
            "task"
        )
    return {**write_split(name, rows, str(folder), migration), "format": kinds.pop()}


def note_unread(name: str, unread: Counter, migration: Migration) -> None:
    if unread:
        keys = ", ".join(f"{key} ({count} rows)" for key, count in sorted(unread.items()))
        migration.note(f"task {name}", f"keys that nothing reads: {keys}")


def write_split(
    name: str, rows: list[dict[str, Any]], source: str, migration: Migration
) -> dict[str, Any]:
    """Write rows in two files, as `data_split` says. Returns the task's `train` and `validation`,
    and the number of `rows` to train on.
    """
    parts = [float(part) for part in re.split("[,/]", migration["data_split"])]
    # By a hash of the row, so that the same row never stands on both sides.
    key = f"{migration['seed']}/".encode()
    rows.sort(
        key=lambda row: hashlib.blake2b(
            key + json.dumps(row, sort_keys=True).encode(), digest_size=8
        ).digest()
    )
    train = math.ceil(parts[0] / sum(parts) * len(rows))
    # Equal rows are neighbours now: the border must not fall between two of them.
    while 0 < train < len(rows) and rows[train] == rows[train - 1]:
        train += 1
    if train == len(rows):
        raise MigrationError(
            f"{source}: data_split {migration['data_split']} of {len(rows)} rows leaves none for "
            "validation"
        )
    # What comes after is MFTCoder's test part, which is not written.
    stop = train + math.ceil((parts[1] if len(parts) > 1 else 0) / sum(parts) * len(rows))
    entry: dict[str, Any] = {}
    (migration.out / "data").mkdir(parents=True, exist_ok=True)
    for split, some in (
        ("train", rows[:train]),
        ("validation", rows[train : max(stop, train + 1)]),
    ):
        path = migration.out / "data" / f"{name}.{split}.jsonl"
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8"
        )
        entry[split] = str(path)
    migration.note(
        f"task {name}",
        f"{train} rows to train on, {len(rows) - train} for validation (and test) of {source}",
    )
    return {**entry, "rows": train}
