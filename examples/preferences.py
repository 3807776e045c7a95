"""Two preference tasks from the quickstart's rows, for configs/sft-and-preference.yaml.

    python launch/quickstart.py && python examples/preferences.py

Each row's own completion is the chosen side; the next different one of the same file is rejected.
doc2code: functions of the running Python's standard library; rejected is another function's body.
occupation: job titles of the package `evals` (soc_codes); rejected is another occupation group.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(".cache/quickstart/data")
TASKS = ("doc2code", "occupation")


def pairs(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Prompt, chosen and rejected of each row; rejected is the next other completion."""
    found = []
    for i, row in enumerate(rows):
        later = rows[i + 1 :] + rows[:i]
        others = (one["completion"] for one in later if one["completion"] != row["completion"])
        sides = {"chosen": row["completion"], "rejected": next(others)}
        found.append({"prompt": row["prompt"], **sides})
    return found


def main(folder: Path) -> None:
    for task in TASKS:
        for split in ("train", "valid"):
            lines = (folder / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            made = pairs([json.loads(line) for line in lines])
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            (folder / f"{task}_pairs.{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
