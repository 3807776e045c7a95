"""M1 to M3: their rows, wrong answers among them, and the configs and studies that read them."""

import json
from collections import Counter
from math import log
from pathlib import Path

import pytest
import runs
import yaml
from test_quickstart import CATALOG, SYNSETS, pairs

from mtl.compare import study
from mtl.samples import even, mixtures, strings, tasks
from mtl.samples.rows import SampleSource, completion

STUDIES = sorted((runs.ROOT / "benchmarks" / "evidence").glob("m*.yaml"))


@pytest.mark.parametrize("part", [0.0, 0.2, 0.4, 1.0])
def test_so_many_answers_are_wrong_and_nothing_else_is_changed(part):
    rows = [{"prompt": f"row {i}", "completion": " abc"[i % 3 + 1]} for i in range(200)]
    noisy = mixtures.with_wrong_answers(rows, part)
    assert [row["prompt"] for row in noisy] == [row["prompt"] for row in rows]
    changed = [new for old, new in zip(rows, noisy, strict=True) if old != new]
    assert len(changed) == round(part * 200) and {row["completion"] for row in noisy} == set("abc")
    assert noisy == mixtures.with_wrong_answers(rows, part), "by their text, not by luck"
    assert rows[0]["completion"] == "a", "the rows given stay"


def test_a_chats_last_turn_is_what_is_wrong():
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": word}]}
        for i, word in enumerate(("yes", "no") * 20)
    ]
    noisy = mixtures.with_wrong_answers(rows, 0.5)
    flipped = sum(a["messages"][1] != b["messages"][1] for a, b in zip(rows, noisy, strict=True))
    assert flipped == 20 and all(a["messages"][0] == b["messages"][0] for a, b in zip(rows, noisy, strict=True))  # fmt: skip


def test_products_are_right_and_of_four_digits():
    rows = list(mixtures.products(300))
    for prompt, answer in pairs(rows):
        a, b = (int(text) for text in prompt.removesuffix(" =").split(" * "))
        assert 1000 <= a <= b <= 9999 and a * b == int(answer)
    last = Counter(answer[-1] for _, answer in pairs(rows))
    entropy = -sum(n / 300 * log(n / 300) for n in last.values())
    assert 1.9 < entropy < log(10), "no digit gives the last one away"


def test_glosses_catalogs_and_words_as_prompts():
    assert pairs(mixtures.kinds(SYNSETS.replace(" 03 n", " 05 n")))[0] == (
        "Kind of thing: a friendly animal\nKind:",
        " animal",
    )
    german = pairs(tasks.translations(CATALOG, "German"))
    assert german[1] == ("Translate into German: two lines\nGerman:", " deux lignes")
    source = '  cat: "K AE1 T",\n'
    assert pairs(strings.pronunciations(source, "Sounds of '{}':", " ")) == [
        ("Sounds of 'cat':", " K AE1 T")
    ]


@pytest.mark.parametrize("name", mixtures.SIZES)
def test_the_config_reads_what_the_builder_writes(name, tmp_path, monkeypatch):
    def made_up(archives: Path, wanted) -> dict[str, SampleSource]:
        return {
            task: SampleSource([completion(f"{task}{i}", str(i), f"{i % 7}") for i in range(600)], "made up", "none")
            for task in wanted
        }  # fmt: skip

    small = {
        task: mixtures.Size(size.train // 50, 4, 6, size.wrong)
        for task, size in mixtures.SIZES[name].items()
    }
    monkeypatch.setattr(mixtures, "sources", made_up)
    monkeypatch.setitem(mixtures.SIZES, name, small)
    note = mixtures.builder(name)(tmp_path, tmp_path)
    assert {task: (row["train"], row["valid"], row["test"]) for task, row in note.items()} == {
        task: (size.train, 4, 6) for task, size in small.items()
    }
    config = yaml.safe_load((runs.ROOT / "configs" / f"{name}.yaml").read_text())
    assert list(config["tasks"]) == list(note)
    paths = [
        Path(task[side])
        for task in config["tasks"].values()
        for side in ("train", "validation", "test")
    ]
    assert {path.parent for path in paths} == {Path(f".cache/quickstart/{name}")}
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    for task, size in small.items():
        wrong = sum(
            int(row["completion"]) != int(row["prompt"]) % 7
            for row in map(json.loads, (tmp_path / f"{task}.train.jsonl").read_text().splitlines())
        )
        assert wrong == round(size.wrong * size.train)


def test_the_quickstart_is_m1_the_even_tasks_and_the_model(tmp_path, monkeypatch):
    def made(text: str):
        def build(archives: Path, out: Path) -> dict:
            (out / "x").write_text(text)
            return {"define": {"train": text}}

        return build

    monkeypatch.setattr(mixtures, "builder", made)
    monkeypatch.setattr(even, "build_data", made("even"))
    monkeypatch.setattr(even, "build_model", lambda archives, out: {"folder": "model"})
    data, model = mixtures.quickstart(tmp_path)
    assert data == {"define": {"train": "m1"}, "data/define": {"train": "even"}}
    assert model == {"folder": "model"}
    assert [(tmp_path / name / "x").read_text() for name in ("m1", "data")] == ["m1", "even"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_resolves(path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    found = study.read(path)
    arms = set(found.arms["arms"])
    assert found.against == "strong-equal"
    if path.stem == "m0-tuning":  # two seeds, for no claim, that no other study has
        assert found.explore and found.seeds["arms"] == (100, 101) and len(arms) == 1 + 8 + 18 + 12
        return
    assert {"equal", "strong-equal", "coba", "anchor-average"} <= arms
    assert len(found.seeds["arms"]) >= 6
