"""Yin et al.'s zero-shot sets (EMNLP 2019, arXiv 1909.00161) as files for launch/zeroae.py.

    python examples/yin.py BenchmarkingZeroShot/topic data/topic
    python examples/yin.py BenchmarkingZeroShot/emotion data/emotion --name noemo=neutral

A line of theirs is `label TAB text`; in `emotion` a source stands between both. A label is a name,
or the number of its line in classes.txt. test.txt becomes the pool, dev.txt the texts that
validation is made of. Lines of several labels, which `situation` has, are left out and counted.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

Rows = list[tuple[str, str]]


def read(path: Path, names: Mapping[str, str]) -> tuple[Rows, int]:
    """(text, label) of each line, and how many lines were left out.

    Args:
        names: label as it stands there -> the class's name.

    Raises:
        ValueError: a line has no label and text.
    """
    rows, several = [], 0
    # Not splitlines: their texts have separators of other kinds.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        label, tab, rest = line.partition("\t")
        text = rest.rpartition("\t")[2].strip()
        if not tab or not label.strip() or not text:
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, wanted label, TAB, text.")
        if len(label.split()) > 1:
            several += 1
            continue
        rows.append((text, names.get(label.strip(), label.strip())))
    return rows, several


def convert(folder: Path, out: Path, names: Mapping[str, str]) -> str:
    """Write labels.json, pool.jsonl, pool.gold.jsonl and valid.jsonl; what was done, in words."""
    classes = folder / "classes.txt"
    known = dict(names)
    if classes.is_file():
        lines = [line.strip() for line in classes.read_text(encoding="utf-8").splitlines()]
        known |= {str(n): names.get(name, name) for n, name in enumerate(filter(None, lines))}
    pool, left = read(folder / "test.txt", known)
    valid, _ = read(folder / "dev.txt", known)
    labels = sorted({label for _, label in pool})
    out.mkdir(parents=True, exist_ok=True)
    (out / "labels.json").write_text(json.dumps(labels) + "\n")
    texts = [{"text": text} for text, _ in pool]
    for name, rows in (
        ("pool", texts),
        ("pool.gold", [{"text": text, "label": label} for text, label in pool]),
        ("valid", [{"text": text} for text, _ in valid]),
    ):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"{out}: {len(pool)} texts of {', '.join(labels)}; {left} of several labels left out"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", nargs="*", default=[], metavar="OLD=NEW", help="name a class so")
    args = parser.parse_args()
    for each in args.name:
        if "=" not in each:
            parser.error(f"--name: found {each!r}, wanted OLD=NEW")
    names = dict(each.split("=", 1) for each in args.name)
    print(convert(args.folder, args.out, names))


if __name__ == "__main__":
    main()
