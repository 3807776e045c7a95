"""SuperGLUE (Wang et al. 2019, arXiv 1905.00537) as texts, for configs/superglue.yaml.

    curl -O https://dl.fbaipublicfiles.com/glue/superglue/data/v2/combined.zip
    python examples/superglue.py combined.zip

Writes prompt and completion of every row into .cache/superglue. The benchmark keeps its test
answers to itself, so its validation rows are divided by a hash of their text: one half chooses, the
other is reported.
"""

import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(".cache/superglue")
Row = dict[str, Any]
Pairs = Iterator[tuple[str, str]]


def boolq(row: Row) -> Pairs:
    yield f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", _yes(row["label"])


def cb(row: Row) -> Pairs:
    answer = {"entailment": "yes", "contradiction": "no", "neutral": "unclear"}[row["label"]]
    yield f"{row['premise']}\nDoes it follow that {row['hypothesis']}?\nAnswer:", f" {answer}"


def copa(row: Row) -> Pairs:
    asked = {"cause": "What caused it?", "effect": "What happened then?"}[row["question"]]
    choices = f"1. {row['choice1']}\n2. {row['choice2']}"
    yield f"{row['premise']} {asked}\n{choices}\nAnswer:", f" {1 + row['label']}"


def multirc(row: Row) -> Pairs:
    for asked in row["passage"]["questions"]:
        for answer in asked["answers"]:
            text = f"{row['passage']['text']}\nQuestion: {asked['question']}"
            yield f"{text}\nIs this right: {answer['text']}\nAnswer:", _yes(answer["label"])


def record(row: Row) -> Pairs:
    for asked in row["qas"]:
        text = row["passage"]["text"].replace("@highlight", "-")
        answer = asked["answers"][0]["text"]
        yield f"{text}\n{asked['query']}\nWho or what is @placeholder?\nAnswer:", f" {answer}"


def rte(row: Row) -> Pairs:
    text = f"{row['premise']}\nDoes it follow that {row['hypothesis']}\nAnswer:"
    yield text, _yes(row["label"] == "entailment")


def wic(row: Row) -> Pairs:
    text = f"{row['sentence1']}\n{row['sentence2']}"
    asked = f"Does '{row['word']}' mean the same in both?"
    yield f"{text}\n{asked}\nAnswer:", _yes(row["label"])


def wsc(row: Row) -> Pairs:
    spans = row["target"]
    asked = f"Does '{spans['span2_text']}' stand for '{spans['span1_text']}'?"
    yield f"{row['text']}\n{asked}\nAnswer:", _yes(row["label"])


TASKS: dict[str, tuple[str, Callable[[Row], Pairs]]] = {
    "boolq": ("BoolQ", boolq),
    "cb": ("CB", cb),
    "copa": ("COPA", copa),
    "multirc": ("MultiRC", multirc),
    "record": ("ReCoRD", record),
    "rte": ("RTE", rte),
    "wic": ("WiC", wic),
    "wsc": ("WSC", wsc),
}


def _yes(label: Any) -> str:
    return " yes" if label else " no"


def _reported(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 1


def rows(archive: zipfile.ZipFile, name: str, part: str) -> Iterator[Row]:
    """The rows of a task's file in the archive; `part` is train or val.

    Raises:
        ValueError: there is no such file.
    """
    wanted = f"{name}/{part}.jsonl"
    for member in archive.namelist():
        if member.endswith(wanted) and "__MACOSX" not in member:
            with archive.open(member) as file:
                yield from map(json.loads, io.TextIOWrapper(file, encoding="utf-8"))
            return
    raise ValueError(
        f"{archive.filename}: found no {wanted}, wanted SuperGLUE's combined.zip, version 2"
    )


def main(path: Path, folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path) as archive:
        for task, (name, pairs) in TASKS.items():
            sides: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
            for part in ("train", "val"):
                for row in rows(archive, name, part):
                    # By the whole row: the questions of one passage stand on one side.
                    held_out = "test" if _reported(json.dumps(row)) else "valid"
                    for prompt, completion in pairs(row):
                        line = {"prompt": prompt, "completion": completion}
                        side = "train" if part == "train" else held_out
                        sides[side].append(json.dumps(line, ensure_ascii=False))
            for side, lines in sides.items():
                text = "".join(f"{line}\n" for line in lines)
                (folder / f"{task}.{side}.jsonl").write_text(text, encoding="utf-8")
            print(f"{task:<10}" + "".join(f"{len(lines):>9,}" for lines in sides.values()))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {sys.argv[0]} combined.zip [FOLDER]")
    main(*map(Path, sys.argv[1:]))
