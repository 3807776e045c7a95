"""SuperGLUE as texts: the archive's rows, and the study of configs/superglue.yaml on a tiny model."""

import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import runs
import toys
import yaml

from mtl.compare import study

EXAMPLE = runpy.run_path(str(runs.ROOT / "examples/superglue.py"))
ROWS = {  # one of each, as the archive has them
    "BoolQ": {"question": "is ice water", "passage": "Ice is frozen water.", "label": True, "idx": 0},
    "CB": {"premise": "It rained.", "hypothesis": "it was wet", "label": "neutral", "idx": 0},
    "COPA": {
        "premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.",
        "question": "effect", "label": 0, "idx": 0,
    },
    "MultiRC": {
        "idx": 0,
        "passage": {
            "text": "Ann met Bob.",
            "questions": [
                {"question": "Who met Bob?", "answers": [{"text": "Ann", "label": 1}, {"text": "Eve", "label": 0}]}
            ],
        },
    },
    "ReCoRD": {
        "passage": {"text": "Ann met Bob.\n@highlight\nThey sang.", "entities": []},
        "qas": [{"query": "@placeholder met Bob.", "answers": [{"text": "Ann"}, {"text": "ann"}]}],
    },
    "RTE": {"premise": "Ann met Bob.", "hypothesis": "Bob was met.", "label": "not_entailment", "idx": 0},
    "WiC": {"word": "run", "sentence1": "A long run.", "sentence2": "They run.", "label": False},
    "WSC": {"text": "Ann saw Bob when he sang.", "label": True,
            "target": {"span1_text": "Bob", "span2_text": "he", "span1_index": 2, "span2_index": 4}},
}  # fmt: skip
WANTED = {  # the end of each prompt, and its completion
    "boolq": [("Question: is ice water?\nAnswer:", " yes")],
    "cb": [("Does it follow that it was wet?\nAnswer:", " unclear")],
    "copa": [("What happened then?\n1. I got wet.\n2. I sang.\nAnswer:", " 1")],
    "multirc": [("right: Ann\nAnswer:", " yes"), ("right: Eve\nAnswer:", " no")],
    "record": [("@placeholder met Bob.\nWho or what is @placeholder?\nAnswer:", " Ann")],
    "rte": [("Does it follow that Bob was met.\nAnswer:", " no")],
    "wic": [("Does 'run' mean the same in both?\nAnswer:", " no")],
    "wsc": [("Does 'he' stand for 'Bob'?\nAnswer:", " yes")],
}


def archive(folder: Path, copies: int) -> Path:
    """As the benchmark's own: each file has `copies` rows that differ in a number."""
    path = folder / "combined.zip"
    with zipfile.ZipFile(path, "w") as made:
        for name, row in ROWS.items():
            lines = "".join(f"{json.dumps({**row, 'idx': i})}\n" for i in range(copies))
            for part in ("train", "val"):
                made.writestr(f"combined/{name}/{part}.jsonl", lines)
    return path


def test_the_rows_are_prompts_and_completions(tmp_path):
    EXAMPLE["main"](archive(tmp_path, 20), tmp_path / "rows")
    for task, wanted in WANTED.items():
        found = {
            side: [
                json.loads(line)
                for line in (tmp_path / f"rows/{task}.{side}.jsonl").read_text().splitlines()
            ]
            for side in ("train", "valid", "test")
        }
        for line, (end, completion) in zip(found["train"], wanted, strict=False):
            assert line["prompt"].endswith(end) and line["completion"] == completion
        assert len(found["train"]) == 20 * len(wanted)
        held_out = [len(found[side]) for side in ("valid", "test")]
        assert sum(held_out) == 20 * len(wanted) and min(held_out) > 0


def test_another_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as made:
        made.writestr("combined/CB/train.jsonl", "{}\n")
    with pytest.raises(ValueError, match=r"found no BoolQ/train.jsonl, wanted SuperGLUE's"):
        EXAMPLE["main"](tmp_path / "x.zip", tmp_path / "rows")


@pytest.mark.slow
def test_the_study_runs_from_end_to_end_on_a_tiny_model(tmp_path):
    """Two of its arms with one seed, through the programs; only model, length and rows are others."""
    toys.save(toys.tiny_llama(), tmp_path / "model")
    EXAMPLE["main"](archive(tmp_path, 20), tmp_path / "rows")
    given = yaml.safe_load((runs.ROOT / "benchmarks/evidence/superglue.yaml").read_text())
    base = (runs.ROOT / "configs/superglue.yaml").read_text()
    (tmp_path / "base.yaml").write_text(base.replace(".cache/superglue", str(tmp_path / "rows")))
    arms = ("equal", "coba-gate-follow-average", "anchor-average")
    smaller = {
        "base": str(tmp_path / "base.yaml"),
        "set": [
            f"model.name={tmp_path / 'model'}", "model.precision=fp32", "train.steps=8",
            "schedule.warmup=2", "evaluate.every=4", "batch.examples=8", "batch.max_length=300",
            "batch.tokens=1024", "evaluate.tokens=1024", f"cache={tmp_path / 'cache'}",
        ],
        "explore": True, "seeds": 1, "against": "equal", "first": [], "primary": [], "references": {},
        "arms": {arm: given["arms"][arm] for arm in arms},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({**given, **smaller}))
    program = [sys.executable, str(runs.ROOT / "launch/compare.py"), str(path)]
    ended = subprocess.run(
        [*program, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=runs.ROOT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert set(found["arms"]) == set(arms)
    for arm in arms:
        result = json.loads((tmp_path / f"out/results/arms.{arm}.0.json").read_text())
        assert result["steps"]["last"] == 8 and set(result["test"]["best"]) == set(WANTED)


def test_the_shipped_study_resolves(monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    found = study.read(Path("benchmarks/evidence/superglue.yaml"))
    assert len(found.runs()) == 6 * 6 + 3 * 2 * 8
