"""mtl/samples on small made-up inputs: readers, split, cache and errors. Nothing is downloaded."""

import hashlib
import importlib.util
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import transformers
import yaml
from safetensors.torch import load_file

from mtl.samples import even, strings, tasks
from mtl.samples.archives import Archive, BuildError, fetch, member
from mtl.samples.build import part, recipe, whole
from mtl.samples.rows import SampleSource, completion, split

ROOT = Path(__file__).parents[1]


def pairs(found) -> list[tuple[str, str]]:
    return [(row.data["prompt"], row.data["completion"]) for row in found]


# ------------------------------------------------------------------------------------------------------------ readers


def test_functions_keep_short_documented_ones():
    source = b'''
class Box:
    async def get(self, key: str, *, default=None) -> str:
        """Return the value of `key`.

        Longer talk that is left out.
        """
        # kept: it belongs to the body
        if key in self:
            return self[key]
        return default

def undocumented(x):
    return x + 1 + 2 + 3 + 4

def too_short(x):
    """Return nothing of note at all."""
    return x

def documented_only():
    """Nothing follows this docstring."""

def beside(): """A docstring with a statement beside it."""; return 1234567890
'''
    assert pairs(tasks.functions("box.py", source)) == [
        (
            'async def get(self, key: str, *, default=None) -> str:\n    """Return the value of `key`."""',
            "\n    # kept: it belongs to the body\n    if key in self:\n        return self[key]\n    return default",
        )
    ]
    (row,) = tasks.functions("box.py", source)
    assert row.group == "box.py"


def test_every_function_of_a_real_module_is_valid_python_again():
    path = Path(importlib.util.find_spec("textwrap").origin)
    rows = pairs(tasks.functions("textwrap.py", path.read_bytes()))
    assert rows
    for prompt, answer in rows:
        compile(prompt + answer, "row", "exec")


SYNSETS = """  1 This software is licensed
00001000 03 n 02 dog 0 hound 1 002 @ 00002000 n 0000 ~ 00003000 n 0000 | a friendly animal; "the dog barked"
00002000 03 n 01 animal 0 000 | short
00003000 15 n 01 Rex 0 001 @i 00001000 n 0000 | a dog that was famous in films
00004000 03 n 01 hot_dog 0 001 @ 00002000 n 0000 | a sausage in a roll; also called a frank
"""
INDEX = """  1 This software is licensed
animal n 1 0 1 1 00002000
dog n 2 2 @ ~ 2 1 00001000 00004000
hot_dog n 1 1 @ 1 0 00004000
rex n 1 1 @i 1 0 00003000
2_step n 1 1 @ 1 0 00004000
"""


def test_nouns_take_the_first_gloss_of_the_first_sense():
    assert pairs(tasks.nouns(INDEX, SYNSETS)) == [
        ("Define the noun 'dog':", " a friendly animal"),
        ("Define the noun 'hot dog':", " a sausage in a roll"),
    ]


CATALOG = r"""# A header
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#, python-format
msgid "Delete \"%(name)s\""
msgstr "Supprimer « %(name)s »"

msgctxt "one of seven"
msgid ""
"two "
"lines"
msgstr "deux "
"lignes"

#, fuzzy
msgid "guess"
msgstr "supposition"

msgid "untranslated"
msgstr ""

msgid "same"
msgstr "Same."

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d jour"
msgstr[1] "%d jours"

msgid "<b>bold</b>"
msgstr "<b>gras</b>"

#~ msgid "obsolete"
#~ msgstr "obsolète"
"""


def test_translations_keep_finished_plain_entries():
    assert pairs(tasks.translations(CATALOG)) == [
        ('Translate into French: Delete "%(name)s"\nFrench:', " Supprimer « %(name)s »"),
        ("Translate into French: two lines\nFrench:", " deux lignes"),
    ]


def samples(*rows: tuple[str, str]) -> str:
    chat = [{"role": "system", "content": "Be terse."}]
    return "".join(
        json.dumps({"input": [*chat, {"role": "user", "content": user}], "ideal": ideal}) + "\n"
        for user, ideal in rows
    )


def test_headlines_become_chats():
    rows = list(tasks.headlines(samples(("area man is the only one left", "1"), ("short", "0"))))
    assert [row.data for row in rows] == [
        {
            "messages": [
                {"role": "system", "content": "Is this headline sarcastic? Answer yes or no."},
                {"role": "user", "content": "area man is the only one left"},
                {"role": "assistant", "content": "yes"},
            ]
        }
    ]
    assert (
        rows[0].key == next(tasks.headlines(samples(("Area man: is the only one LEFT!", "0")))).key
    )


def test_occupations_leave_out_titles_with_several_groups():
    ask = "What is the SOC Code for the job title {}'"
    answers = [("Baker", " Bakers"), ("Miner", " Miners"), ("Miner", " Bolters")]
    rows = tasks.occupations(samples(*[(ask.format(title), answer) for title, answer in answers]))
    assert pairs(rows) == [("Occupation group of the job title 'Baker':", " Bakers")]


def test_sums_are_right_and_know_their_mirror():
    rows = list(
        tasks.sums(
            samples(("0110 + 01", "7"), ("01 + 110", "7"), ("11 * 01", "3"), ("11 - 01", "2"))
        )
    )
    assert pairs(rows) == [
        ("Binary 0110 + 01 in decimal:\n", "7"),
        ("Binary 01 + 110 in decimal:\n", "7"),
    ]
    assert rows[0].key == rows[1].key == "1 + 6"


# -------------------------------------------------------------------------------------------------------------- split


def numbered(count: int, group=lambda i: None):
    return [completion(f"unique{i} word{i}", str(i), "answer", group(i)) for i in range(count)]


def test_split_holds_out_exactly_so_many_rows_and_ignores_the_order_of_the_source():
    train, valid, test = split(numbered(300), limit=200, validation=56)
    assert (len(train), len(valid)) == (200 - even.VALIDATION, even.VALIDATION)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    assert [train, valid, test] == split(numbered(300)[::-1], limit=200, validation=56)
    assert [row["prompt"] for row in train] != sorted((row["prompt"] for row in train), key=int)


def test_split_keeps_groups_whole():
    train, valid, test = split(
        numbered(300, group=lambda i: f"file{i // 7}"), limit=300, validation=56
    )
    files = [{int(row["prompt"]) // 7 for row in side} for side in (train, valid)]
    assert len(valid) == 56 and len(files[1]) == 8 and not files[0] & files[1]


def test_split_keeps_one_row_of_a_key_and_no_training_row_close_to_a_held_out_one():
    same = [completion("the same key", str(i), "") for i in range(5)]
    assert sum(map(len, split(same, limit=100, validation=56))) == 1
    near = [
        completion(f"a b c d e f g h i x{i}", str(i), "") for i in range(100)
    ]  # 9 of 11 words shared
    train, valid, test = split(near, limit=100, validation=56)
    assert (len(train), len(valid)) == (0, 56)


# ------------------------------------------------------------------------------------------------- archives and cache


def test_members_of_wheels_and_tarballs(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("package/été.txt", "oui\n")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name, text in {
            "package/index.noun": b"index\n",
            "package/data.noun": b"data\n",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    assert member(tmp_path / "a.whl", "package/été.txt") == "oui\n"
    assert member(tmp_path / "a.tgz", "/data.noun") == "data\n"


def archive(name: str, script: str, sha256: str) -> Archive:
    return Archive(name, sha256, (sys.executable, "-c", script))


HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # SHA-256 of hello


def test_fetch_checks_sums_and_falls_back_aloud(tmp_path, capsys):
    right = archive("right", "open('right', 'w').write('hello')", HELLO)
    wrong = archive("wrong", "open('wrong', 'w').write('HELLO')", HELLO)
    offline = archive("offline", "raise SystemExit('no route to host')", HELLO)
    missing = Archive("missing", HELLO, ("no-such-program",))
    assert fetch(tmp_path, offline, right) == tmp_path / "right"
    assert (
        "no route to host" in (said := capsys.readouterr().err) and "trying right instead" in said
    )
    with pytest.raises(BuildError, match=f"wrong: found SHA-256 3733.*, wanted {HELLO}"):
        fetch(tmp_path, wrong)
    with pytest.raises(
        BuildError, match="exit code 1(?s:.*)no route to host(?s:.*)by hand"
    ) as error:
        fetch(tmp_path, missing, offline)
    assert "no-such-program is not installed" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_fetch_takes_what_is_there_but_not_when_it_is_broken(tmp_path, capsys):
    counting = archive("file", "open('file', 'w').write('hello'); print('ran')", HELLO)
    (tmp_path / "file").write_text("hello")
    fetch(tmp_path, counting)
    assert capsys.readouterr().err == ""
    (tmp_path / "file").write_text("half")
    fetch(tmp_path, counting)
    assert (
        "wrong checksum" in capsys.readouterr().err and (tmp_path / "file").read_text() == "hello"
    )


def test_a_part_is_built_once_and_again_only_when_it_is_not_whole(tmp_path):
    built = []

    def build(archives: Path, out: Path) -> dict:
        (out / "a.txt").write_text("content")
        built.append(out)
        return {"rows": 3}

    def get(key="v1") -> int:
        assert part(tmp_path / "part", build, key) == {"rows": 3}
        assert (tmp_path / "part" / "a.txt").read_text() == "content"
        assert [path.name for path in tmp_path.iterdir()] == ["part"]
        return len(built)

    assert [get(), get()] == [1, 1]
    os.utime(tmp_path / "part" / "a.txt")  # touched, or copied: its content is the same
    assert get() == 1
    (tmp_path / "part" / "a.txt").write_text("CONTENT")  # as long, other content
    assert get() == 2
    (tmp_path / "part" / "a.txt").unlink()
    assert get() == 3
    (tmp_path / "part" / "manifest.json").write_text("{")
    assert get() == 4
    assert get(key="v2") == 5
    (tmp_path / ".part.new").mkdir()  # a builder that was killed
    (tmp_path / ".part.new" / "b.txt").write_text("half")
    assert get(key="v3") == 6


def test_every_file_of_the_package_decides_what_is_built(tmp_path, monkeypatch):
    from mtl.samples import build

    for path in Path(build.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    keys = {recipe()}
    assert keys == {recipe()}, "the same files, the same key"
    for path in sorted(tmp_path.glob("*.py")):
        path.write_text(path.read_text() + "# changed\n")
        keys.add(recipe())
    assert len(keys) == 1 + len(list(tmp_path.glob("*.py"))) >= 8


def test_a_failed_build_leaves_the_old_part_alone(tmp_path):
    def build(archives: Path, out: Path) -> dict:
        (out / "a.txt").write_text("content")
        return {}

    def fail(archives: Path, out: Path) -> dict:
        (out / "a.txt").write_text("half")
        raise BuildError("offline")

    part(tmp_path / "part", build, "v1")
    with pytest.raises(BuildError, match="offline"):
        part(tmp_path / "part", fail, "v2")
    assert whole(tmp_path / "part", "v1") == {}


# ------------------------------------------------------------------------------------------------------------ configs


def test_the_three_configs_differ_in_what_balances_and_the_output_only():
    first, equal, coba = (
        yaml.safe_load((ROOT / "configs" / f"quickstart{name}.yaml").read_text())
        for name in ("", "-equal", "-coba")
    )
    outputs = [config.pop("output") for config in (first, equal, coba)]
    assert outputs == ["runs/quickstart", "runs/quickstart-equal", "runs/quickstart-coba"]
    assert first["evaluate"].pop("patience")["action"] == "anchor"
    assert first == equal
    assert coba.pop("balancer")["name"] == "CoBa" and equal.pop("balancer") == "Equal"
    assert coba["evaluate"].pop("probe")["every"] == 2
    assert coba.pop("mix") == {"follow": "balancer", "every": 10} | equal.pop("mix")
    assert coba == equal


def test_the_configs_read_what_the_builder_writes(tmp_path, monkeypatch):
    # 400 made-up rows a task, so that no archive is needed
    monkeypatch.setattr(even, "fetch", lambda folder, *choices: tmp_path / choices[0].name)
    monkeypatch.setattr(even, "member", lambda archive, name: "")
    for reader in ("nouns", "translations", "headlines", "occupations", "sums"):
        monkeypatch.setattr(tasks, reader, lambda *texts: numbered(400))
    monkeypatch.setattr(tasks, "functions", lambda path, source: numbered(400))
    monkeypatch.setattr(tasks, "standard_library", lambda: [("a.py", b"")])
    with zipfile.ZipFile(tmp_path / even.DJANGO.name, "w") as wheel:
        wheel.writestr("django/conf/locale/fr/LC_MESSAGES/django.po", "")
    out = tmp_path / "data"
    out.mkdir()
    note = even.build_data(tmp_path, out)
    config = yaml.safe_load((ROOT / "configs" / "even.yaml").read_text())
    assert list(note) == list(config["tasks"])
    paths = [
        Path(task[side]) for task in config["tasks"].values() for side in ("train", "validation")
    ]
    assert {path.parent for path in paths} == {Path(".cache/quickstart/data")}
    assert sorted(path.name for path in paths) == sorted(path.name for path in out.iterdir())
    assert all(
        row["valid"] == even.VALIDATION and row["train"] == 344 for row in note.values()
    )


def test_too_few_rows_are_an_error_that_names_the_task(tmp_path, monkeypatch):
    monkeypatch.setattr(even, "fetch", lambda folder, *choices: tmp_path / choices[0].name)
    monkeypatch.setattr(even, "member", lambda archive, name: "")
    monkeypatch.setattr(tasks, "standard_library", lambda: [])
    with zipfile.ZipFile(tmp_path / even.DJANGO.name, "w"):
        pass
    with pytest.raises(
        BuildError, match="doc2code: found 0 training, 0 validation and 0 test rows"
    ):
        even.build_data(tmp_path, tmp_path)


def test_labels_are_those_of_the_sources():
    assert [row.data for row in tasks.labeled_glosses(SYNSETS.replace(" 03 n", " 05 n"))] == [
        {"text": "a friendly animal", "label": "animal"},
        {"text": "a sausage in a roll", "label": "animal"},
    ]
    assert list(tasks.labeled_glosses(SYNSETS)) == [], "03 is none of the ten"

    def sample(question: str, answer: str) -> str:
        return json.dumps({"input": [{"content": question}], "ideal": answer}) + "\n"

    ask = "What is the SOC Code for the job title '{}'"
    groups = [("baker", "Food"), ("cook", "Food"), ("roofer", "Roofs"), ("chef", "Food")]
    lines = "".join(sample(ask.format(title), group) for title, group in groups)
    assert [row.data for row in tasks.labeled_titles(lines, least=2)] == [
        {"text": title, "label": "Food"} for title in ("baker", "cook", "chef")
    ]
    headline = "man walks dog through the park"
    assert [row.data for row in tasks.labeled_headlines(sample(headline, "1"))] == [
        {"text": headline, "label": "yes"}
    ]


# ------------------------------------------------------------------------------------------------------------ strings


def test_words_become_strings_to_spell():
    source = 'export const dictionary = {\n  "\'em": "AH0 M",\n  "a(2)": "EY1",\n  ab: "AE1 B",\n'
    source += '  cat: "K AE1 T",\n  "dog": "D AO1 G"\n}\n'
    assert pairs(strings.pronunciations(source)) == [
        ("g2p cat:", "K AE1 T"),
        ("g2p dog:", "D AO1 G"),
    ]
    lookup = {"cats": "cat", "cat": "cat", "x-ray": "xray", "ab": "abc", "fünfzehnjährigen": "alt"}
    assert pairs(strings.lemmas("en", lookup)) == [("en cats:", "cat")]


def test_m0s_rows_are_known_by_their_hash_and_its_config_reads_them(tmp_path, monkeypatch):
    def rows(task: str, count: int):
        return [completion(f"{task}{i}", f"{task} {i}:", str(i)) for i in range(count)]

    held, counts = strings.VALIDATION + strings.TEST, dict.fromkeys(strings.TRAIN, 30)
    monkeypatch.setattr(strings, "TRAIN", counts)
    found = {task: SampleSource(rows(task, held + 40), "made up", "none") for task in counts}
    monkeypatch.setattr(strings, "sources", lambda archives: found)
    with pytest.raises(BuildError, match="found rows with SHA-256 [0-9a-f]{64}, wanted "):
        strings.build_data(tmp_path, tmp_path)
    files = sorted(tmp_path.glob("*.jsonl"))
    sum_ = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    monkeypatch.setattr(strings, "ROWS", sum_)
    note = strings.build_data(tmp_path, tmp_path)
    assert note["lt"] == {"train": 30, "valid": 150, "test": 300, "characters": 42} | {
        "source": "made up", "licence": "none"
    }  # fmt: skip
    sides = [
        {line for line in (tmp_path / f"lt.{side}.jsonl").read_text().splitlines()}
        for side in ("train", "valid", "test")
    ]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 30 + held

    config = yaml.safe_load((ROOT / "configs" / "m0.yaml").read_text())
    assert list(config["tasks"]) == list(counts)
    paths = [
        Path(task[side])
        for task in config["tasks"].values()
        for side in ("train", "validation", "test")
    ]
    assert {path.parent for path in paths} == {Path(".cache/quickstart/strings")}
    assert sorted(path.name for path in paths) == [file.name for file in files]


def test_m0s_model_is_seeded_and_its_tokenizer_reads_bytes(tmp_path):
    note = strings.build_model(tmp_path, tmp_path)
    assert note["parameters"] == 257 * 128 + 3 * (4 * 128**2 + 3 * 128 * 320 + 2 * 128) + 128
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("de Häuser:").input_ids
    assert len(ids) == len("de Häuser:".encode()) and tokenizer.decode(ids) == "de Häuser:"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    weights = load_file(tmp_path / "model.safetensors")
    again = tmp_path / "again"
    again.mkdir()
    strings.build_model(tmp_path, again)
    other = load_file(again / "model.safetensors")
    assert weights.keys() == other.keys() and "lm_head.weight" not in weights
    assert all((weights[name] == other[name]).all() for name in weights)
