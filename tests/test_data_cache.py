"""Sources, the encoded cache and its lock: nothing dropped silently, nothing encoded twice, nobody left waiting."""

import gzip
import importlib.util
import json
import linecache
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import attack_files
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from toys import CHAT, tokenizer, write_tasks
from transformers import AutoTokenizer

from mtl import build
from mtl.check import dryrun
from mtl.config import parse
from mtl.data import cache, formats, lock, source
from mtl.data.cache import encode_split, prepare
from mtl.data.encode import Encoder, dates, tokenizer_fingerprint
from mtl.data.encoded import DataError, Encoded
from mtl.data.lock import Owner, build_once
from mtl.data.next_token import NextToken
from mtl.data.source import open_source, open_sources

TOK = tokenizer()
ROWS = [{"text": "abc"}, {"text": "de"}]


def write(path: Path, *lines: str | bytes) -> str:
    path.write_bytes(
        b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    )
    return str(path)


def values(name: str) -> list[dict | None]:
    return [row.value for row in open_source(name).rows()]


# Sources


def test_jsonl_hands_on_what_it_cannot_read(tmp_path):
    name = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + b'{"text": "a"}',
        "",
        '{"text": "b"',
        "[1]",
        b'{"text": "\xff"}',
        r'{"text": "\ud800"}',
        "[" * 100_000,
        '{"text": "\u00e9"}',
    )
    read = open_source(name)
    found = [(read.where(row.number), row.value, row.problem) for row in read.rows()]
    assert [(where.removeprefix(name), value) for where, value, _ in found] == [
        (":1", {"text": "a"}),
        (":3", None),
        (":4", None),
        (":5", None),
        (":6", None),
        (":7", None),
        (":8", {"text": "é"}),
    ]
    starts = [
        "not JSON: Expecting ',' delimiter",
        "found a JSON list, wanted an object",
        "not UTF-8: invalid start byte",
    ]
    starts += ["not Unicode: half of a surrogate pair", "not JSON: "]
    assert all(
        problem.startswith(start) for (_, _, problem), start in zip(found[1:6], starts, strict=True)
    )


def test_every_kind_of_source_reads_the_same(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", *map(json.dumps, ROWS))
    array = write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    lines = write(tmp_path / "b.json", *map(json.dumps, ROWS))
    zipped = tmp_path / "c.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in (
        jsonl,
        array,
        lines,
        str(zipped),
        str(tmp_path / "a.parquet"),
        str(tmp_path / "saved"),
    ):
        assert values(name) == ROWS, name
    assert open_source(str(tmp_path / "a.parquet")).where(1) == f"{tmp_path}/a.parquet, row 2"


def test_a_hub_name_goes_through_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/name", "name:config", "name:config:part", "name::part", "o/n::a[:10%]+b"):
        (found,) = open_sources(name, split="validation")
        assert [row.value for row in found.rows()] == ROWS
    assert asked == [
        ("owner/name", None, {"split": "validation"}),
        ("name", "config", {"split": "validation"}),
        ("name", "config", {"split": "part"}),
        ("name", None, {"split": "part"}),
        ("o/n", None, {"split": "a[:10%]+b"}),
    ]


def test_delimited_files_are_text(tmp_path):
    long = "x" * 200_000
    lines = ["\ufeffprompt,completion", '"a, ""b""\nc",007', "", "d,", "e", f"f,{long}"]
    name = write(tmp_path / "a.csv", *lines)
    rows = list(open_source(name).rows())
    assert [row.value for row in rows] == [
        {"prompt": 'a, "b"\nc', "completion": "007"},
        {"prompt": "d", "completion": ""},
        None,
        {"prompt": "f", "completion": long},
    ]
    assert rows[2].problem == "found 1 values up to line 6, wanted 2: prompt, completion"
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"text\tid\na,b\t1\n"))
    assert values(str(tmp_path / "a.tsv.gz")) == [{"text": "a,b", "id": "1"}]
    with pytest.raises(DataError, match="b.csv:1: found a column twice in a, a"):
        values(write(tmp_path / "b.csv", "a,a", "1,2"))


def test_a_pattern_is_every_file_that_it_matches(tmp_path):
    for name in ("b", "a", "in/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    found = [one.name for one in open_sources(f"{tmp_path}/*.jsonl")]
    assert found == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert len(open_sources(f"{tmp_path}/**/*.jsonl")) == 3
    with pytest.raises(DataError, match=r"found no file that matches .*\*.parquet"):
        open_sources(f"{tmp_path}/*.parquet")
    write(tmp_path / "d[1].jsonl", json.dumps(ROWS[0]))  # a name that is there is no pattern
    assert len(open_sources(f"{tmp_path}/d[1].jsonl")) == 1


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    write(tmp_path / "bad.parquet", "no")
    write(tmp_path / "bad.json", "[1,")
    write(tmp_path / "a.xlsx", "a")
    write(tmp_path / "bad.csv", "a,b", '"x')
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    for name, text in {
        "gone.jsonl": "nothing found under '.*gone.jsonl', tried the file or folder /.*gone.jsonl. Wanted a .jsonl",
        "a.xlsx": "found the file .*a.xlsx, wanted a .jsonl",
        "bad.csv": "bad.csv, row 1: not readable as CSV",
        "splits": "found a folder of splits, wanted one of them: .*splits/train",
        "empty": "found the folder .*empty with nothing in it",
        "pipe.jsonl": "found the stream .*streaming is not supported",
        "bad.parquet": "bad.parquet, row 1: not readable as Parquet",
        "bad.json": "bad.json: not a JSON array",
    }.items():
        with pytest.raises(DataError, match=text):
            values(str(tmp_path / name))
    with pytest.raises(
        DataError,
        match=r"tried the file or folder .*owner/name and the hub \(ConnectionError: offline\)",
    ):
        open_source("owner/name")
    with pytest.raises(DataError, match="streaming is not supported"):
        open_source("https://host/a.jsonl")


def test_a_broken_archive_ends_the_reading_with_its_line(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    read = []
    with pytest.raises(DataError) as caught:
        for row in open_source(str(tmp_path / "a.jsonl.gz")).rows():
            read.append(row.number)
    assert read == list(range(len(read))) and 0 < len(read) < 5000
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl.gz:{len(read) + 1}: Compressed file")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_damaged_bytes_of_a_compressed_file_are_an_error_with_its_place(name, tmp_path):
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(9000))
    broken = bytearray(gzip.compress(content if "jsonl" in name else b"[" + content + b"]"))
    broken[200:260] = bytes(60)  # zlib.error, which is no OSError
    (tmp_path / name).write_bytes(bytes(broken))
    with pytest.raises(DataError, match=rf"{name}.*Error -3 while decompressing"):
        list(open_source(str(tmp_path / name)).rows())


def test_a_comment_does_not_encode_rows_again(tmp_path, monkeypatch):
    def hashed(text: str) -> str:
        (tmp_path / "made_up.py").write_text(text)
        module = importlib.util.spec_from_file_location("made_up", tmp_path / "made_up.py")
        loaded = importlib.util.module_from_spec(module)
        monkeypatch.setitem(sys.modules, "made_up", loaded)
        module.loader.exec_module(loaded)
        linecache.checkcache()
        return cache.module_hash(loaded.f)

    plain = hashed('def f():\n    return "# no comment"\n')
    said = hashed('# why\ndef f():\n\n    # so\n    return "# no comment"  # and so\n')
    assert plain == said != hashed('def f():\n    return "# a comment"\n') and plain


def test_what_a_format_imports_of_its_package_is_part_of_the_key(tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    files = {
        "__init__.py": "",
        "made.py": "from .words import ONE\n\n\ndef made(row):\n    from my_package.late import THREE\n",
        "words.py": "import json\n\nfrom my_package import deep\n\nONE = 1  # one\n",
        "deep.py": "TWO = 2\n",
        "late.py": "THREE = 3\n",
        "other.py": "FOUR = 4\n",
    }
    for file, text in files.items():
        (package / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    name = write(tmp_path / "a.jsonl", *map(json.dumps, ROWS))
    made = importlib.import_module("my_package.made").made
    examples = NextToken(None, 0, Encoder(TOK, 20))

    def key(file: str, text: str) -> str:
        (package / file).write_text(text)
        found = cache._key(open_sources(name), made, examples, None, None)
        (package / file).write_text(files[file])
        return found

    plain = key("other.py", "FOUR = 5\n")  # nothing imports it
    # Nothing is run to find what is imported.
    assert not {"my_package.late", "my_package.other"} & sys.modules.keys()
    assert plain == key("words.py", files["words.py"] + "# said\n")
    changed = {key(file, files[file] + "FIVE = 5\n") for file in ("words.py", "deep.py", "late.py")}
    assert len(changed | {plain}) == 4
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_file_under_another_suffix_is_encoded_anew(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.csv").write_text("text\tmore\nabc\td\n")
    for before, after in (("a.jsonl", "a.json"), ("b.csv", "b.tsv")):
        with pytest.raises(DataError, match="no usable row"):
            encode(tmp_path, str(tmp_path / before))
        (tmp_path / before).rename(tmp_path / after)
        assert len(encode(tmp_path, str(tmp_path / after)))


def test_fingerprints_follow_content_not_place(tmp_path, monkeypatch):
    one, same = write(tmp_path / "a.jsonl", "{}"), write(tmp_path / "b.jsonl", "{}")
    other = write(tmp_path / "c.jsonl", "[]")
    prints = [open_source(name).fingerprint() for name in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    for name in "de":
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    assert len({open_source(str(tmp_path / name)).fingerprint() for name in "de"}) == 1
    monkeypatch.setattr(source, "WHOLE", 10)  # from here on files are sampled
    monkeypatch.setattr(source, "BLOCK", 16)
    big = tmp_path / "big.jsonl"
    prints = set()
    for end in (b"a", b"b"):
        big.write_bytes(b" " * 100_000 + end)
        os.utime(big, ns=(0, 0))
        prints.add(open_source(str(big)).fingerprint())
    os.utime(big, ns=(0, 1))
    assert len(prints | {open_source(str(big)).fingerprint()}) == 3


# The encoded cache


def encode(
    root: Path,
    *names: str,
    cap=None,
    form=formats.text,
    encoder=None,
    say=lambda text: None,
    rebuild=False,
) -> Encoded:
    return encode_split(
        root,
        [open_source(n) for n in names],
        form,
        NextToken(None, 0, encoder or Encoder(TOK, 20)),
        cap,
        "task (train)",
        say,
        rebuild=rebuild,
    )


def test_rows_come_back_and_what_was_dropped_is_reported(tmp_path):
    one = write(
        tmp_path / "a.jsonl",
        '{"text": "abc"}',
        "oops",
        '{"texts": 1}',
        '{"text": ""}',
        '{"text": "de"}',
    )
    two = write(tmp_path / "b.jsonl", *['{"text": "%s"}' % ("x" * 30)] * 5, '{"text": "fgh"}')
    split = encode(tmp_path / "cache", one, two)
    assert [TOK.decode(split.ids(i)) for i in range(len(split))] == [
        "abc<|end|>",
        "de<|end|>",
        "fgh<|end|>",
    ]
    assert split.target(0).tolist() == [False, True, True, True]
    assert [split.where(i) for i in range(3)] == [f"{one}:1", f"{one}:5", f"{two}:6"]
    assert split.lengths.tolist() == [4, 3, 4] and split.targets.tolist() == [3, 2, 3]
    assert split.lengths.dtype == split.targets.dtype == np.int64
    report = split.report
    assert (report.read, report.kept, report.tokens, report.targets, report.truncated) == (
        11,
        3,
        11,
        8,
        0,
    )
    assert report.dropped == {"unreadable": 1, "missing key": 1, "no target": 1, "too long": 5}
    lines = split.problems()
    assert lines[0] == "3 of 11 rows kept: 11 tokens, 8 of them targets"
    assert f"  {one}:2: not JSON: Expecting value: line 1 column 1 (char 0)" in lines
    assert f"  {one}:3: found the keys texts, wanted text" in lines
    at = lines.index("5 rows dropped: too long")
    assert lines[at + 1] == f"  {two}:1: found 31 tokens, wanted at most batch.max_length = 20"
    assert lines[at + 4] == "  and 2 more"


def test_the_cache_is_read_again_and_is_arrow_that_datasets_reads(tmp_path):
    said = []
    name = write(tmp_path / "a.jsonl", *map(json.dumps, ROWS))
    first = encode(tmp_path / "cache", name, say=said.append)
    moved = write(tmp_path / "moved.jsonl", *map(json.dumps, ROWS))
    again = encode(tmp_path / "cache", moved, say=said.append)
    assert said == [f"encoding task (train): {name}"]
    assert again.fingerprint == first.fingerprint and again.ids(1).tolist() == first.ids(1).tolist()
    assert again.where(0) == f"{moved}:1"  # the place the user knows now
    rows = datasets.Dataset.from_file(str(tmp_path / "cache" / first.fingerprint / "rows.arrow"))
    assert rows[0]["ids"] == first.ids(0).tolist()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [first.fingerprint]
    assert not first.ids(0).flags.writeable


def shout(row):
    return formats.Text(row["text"].upper())


def test_what_changes_the_content_changes_the_key_and_nothing_else_does(tmp_path):
    name = write(tmp_path / "a.jsonl", *map(json.dumps, ROWS))
    other = write(tmp_path / "b.jsonl", *map(json.dumps, ROWS[:1]))
    more = tokenizer()
    more.add_tokens(["ab"])
    prints = [
        encode(tmp_path, name),
        encode(tmp_path, other),
        encode(tmp_path, name, other),
        encode(tmp_path, name, cap=1),
        encode(tmp_path, name, form=shout),
        encode(
            tmp_path,
            name,
            form=partial(formats.prompt_completion, prompt="text", completion="text"),
        ),
        encode(tmp_path, name, form=partial(formats.text, text="text")),
        encode(tmp_path, name, encoder=Encoder(TOK, 21)),
        encode(tmp_path, name, encoder=Encoder(TOK, 20, "truncate")),
        encode(tmp_path, name, encoder=Encoder(more, 20)),
        encode(tmp_path, name, encoder=Encoder(tokenizer(template=CHAT + " "), 20)),
    ]
    assert len({split.fingerprint for split in prints}) == len(prints)
    same = encode(
        tmp_path, name, encoder=Encoder(tokenizer(), 20, "error")
    )  # drop and error keep the same rows
    assert same.fingerprint == prints[0].fingerprint


@pytest.mark.parametrize("left", [0, 100, -200])
def test_a_damaged_cache_is_an_error_that_says_what_to_do(tmp_path, left):
    name = write(tmp_path / "a.jsonl", *[json.dumps(ROWS[0])] * 600)
    file = tmp_path / encode(tmp_path, name).fingerprint / "rows.arrow"
    file.write_bytes(file.read_bytes()[:left])
    found = rf"task \(train\): the encoded data in {file} is damaged: found [\d,]+ bytes, "
    with pytest.raises(DataError, match=found + ".*--rebuild-cache"):
        encode(tmp_path, name)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> tuple[Path, str, bytes]:
    """The folder of 600 encoded rows of up to 1,500 tokens, their source, and all they are."""
    root = tmp_path_factory.mktemp("cached")
    lines = [json.dumps({"text": chr(97 + i % 26) * (i * 53 % 1500 + 1)}) for i in range(600)]
    name = write(root / "a.jsonl", *lines)
    split = encode(root, name, encoder=Encoder(TOK, 2000))
    return root / split.fingerprint, name, everything(split)


def everything(split: Encoded) -> bytes:
    """All that a run can read of a split."""
    rows = [part.tobytes() for i in range(len(split)) for part in split.columns(i).values()]
    table = [split.lengths, split.positions, split.counts, split.answers]
    places = repr([split.origin(i) for i in range(len(split))]) + repr(split.report)
    return b"".join([*rows, *(one.tobytes() for one in table), places.encode()])


def test_no_flipped_bit_of_the_cache_is_read_in_silence(cached, tmp_path):
    """Anywhere in its three files; most of them are found only when the row is read."""
    folder, name, whole = cached
    here = shutil.copytree(folder, tmp_path / folder.name)
    late = 0
    for path, tries in (("rows.arrow", 60), ("report.json", 16), ("checksums.json", 16)):
        for content in attack_files.flips(folder / path, tries):
            (here / path).write_bytes(content)
            opened = False
            try:
                split = encode(tmp_path, name, encoder=Encoder(TOK, 2000))
                opened = True
                assert everything(split) == whole
            except DataError as error:
                assert f"task (train): the encoded data in {here}/rows.arrow is dam" in str(error)
                late += opened
        shutil.copy(folder / path, here / path)
    assert late > 40


def test_a_block_is_compared_when_its_row_is_first_read(cached, tmp_path):
    folder, name, _ = cached
    here = shutil.copytree(folder, tmp_path / folder.name)
    split = encode(tmp_path, name, encoder=Encoder(TOK, 2000))
    first, times = split.ids(3).tolist(), (here / "rows.arrow").stat()
    with (here / "rows.arrow").open("r+b") as file:  # as a bad disk would, which tells nobody
        file.seek(-(2**15), 2)
        (byte,) = file.read(1)
        file.seek(-(2**15), 2)
        file.write(bytes([byte ^ 1]))
    os.utime(here / "rows.arrow", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert split.ids(3).tolist() == first
    with pytest.raises(DataError, match="are not what was written"):
        everything(split)


def test_a_cache_cut_or_changed_under_a_run_is_an_error(cached, tmp_path):
    """It is memory-mapped: reading behind its end would kill the process (SIGBUS)."""
    folder, name, whole = cached
    for change in (
        lambda path: os.truncate(path, 5000),
        lambda path: path.write_bytes(path.read_bytes()),
    ):
        here = shutil.copytree(folder, tmp_path / folder.name, dirs_exist_ok=True)
        split = encode(tmp_path, name, encoder=Encoder(TOK, 2000))
        change(here / "rows.arrow")
        with pytest.raises(DataError, match="it was changed while it was in use"):
            split.columns(len(split) - 1)
        with pytest.raises(DataError, match="it was changed while it was in use"):
            split.where(len(split) - 1)
    shutil.copytree(folder, here, dirs_exist_ok=True)
    split = encode(tmp_path, name, encoder=Encoder(TOK, 2000))
    shutil.rmtree(here)
    assert everything(split) == whole, "what is open stays readable"


def test_a_damaged_cache_is_made_again_when_asked(cached, tmp_path):
    folder, name, whole = cached
    here = shutil.copytree(folder, tmp_path / folder.name)
    (damaged,) = attack_files.flips(here / "rows.arrow", 1)
    (here / "rows.arrow").write_bytes(damaged)
    said = []
    again = partial(encode, tmp_path, name, encoder=Encoder(TOK, 2000), say=said.append)
    assert everything(again(rebuild=True)) == whole
    assert said[0].startswith(f"task (train): the encoded data in {here} is damaged (the ")
    assert said[1:] == [f"encoding task (train): {name}"]
    inode = (here / "rows.arrow").stat().st_ino
    assert everything(again(rebuild=True)) == whole, "and what is whole stays"
    assert (here / "rows.arrow").stat().st_ino == inode and len(said) == 2
    assert [one.name for one in tmp_path.iterdir()] == [folder.name]


def test_cap_keeps_the_first_usable_rows_and_reads_no_further(tmp_path):
    name = write(tmp_path / "a.jsonl", "oops", *[f'{{"text": "r{i}"}}' for i in range(9)], "oops")
    split = encode(tmp_path, name, cap=4)
    assert [split.where(i) for i in range(4)] == [f"{name}:{i}" for i in (2, 3, 4, 5)]
    assert (len(split), split.report.read, split.report.dropped) == (4, 5, {"unreadable": 1})
    assert encode(tmp_path, name, cap=400).report.dropped == {"unreadable": 2}


def test_a_format_that_raises_is_a_problem_of_the_row(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": "a"}', '{"text": 1}')
    split = encode(tmp_path, name, form=shout)
    assert split.problems()[1:] == [
        "1 row dropped: bad value",
        f"  {name}:2: the format raises AttributeError: 'int' object has no attribute 'upper'",
    ]


def test_truncation_is_counted_and_error_is_one(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": "abcdefgh"}', '{"text": "a"}')
    assert encode(tmp_path, name, encoder=Encoder(TOK, 5, "truncate")).problems() == [
        "2 of 2 rows kept: 7 tokens, 5 of them targets",
        "1 row truncated",
    ]
    with pytest.raises(
        DataError,
        match=rf"found 1 rows? above batch.max_length(.|\n)*{name}:1: found 9 tokens, wanted",
    ):
        encode(tmp_path, name, encoder=Encoder(TOK, 5, "error"))


def test_processes_give_what_one_gives(tmp_path, monkeypatch):
    lines = ['{"text": "%s"}' % ("ab" * (i % 12)) for i in range(3000)]
    lines[700] = "oops"
    name = write(tmp_path / "a.jsonl", *lines)
    alone = encode(tmp_path / "one", name)
    monkeypatch.setattr(cache, "PARALLEL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    together = encode(tmp_path / "two", name)
    assert together.report == alone.report and together.fingerprint == alone.fingerprint
    assert together.lengths.tolist() == alone.lengths.tolist()
    one, two = (tmp_path / folder / alone.fingerprint / "rows.arrow" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def read_all(tmp_path, rows, form, template=None, **keywords):
    """The rows from JSONL, from Parquet and from a saved folder, encoded."""
    name = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    encoder = Encoder(tokenizer(template=template), 4000)
    return [
        encode(tmp_path / "cache", one, form=partial(form, **keywords), encoder=encoder)
        for one in (name, str(tmp_path / "a.parquet"), str(tmp_path / "saved"))
    ]


TOOL_CHAT = (
    "{% if tools %}<|start|>system\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for t in m.tool_calls or [] %}({{ t.function.name }} {{ t.function.arguments | tojson }})"
    "{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tools", ["tools", "functions"])
def test_nulls_that_arrow_fills_in_are_no_tokens(tmp_path, tools):
    schemas = [
        {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
        {"name": "add", "parameters": {"properties": {"a": {"type": "n"}, "b": {"type": "n"}}}},
    ]
    rows = []
    for name, arguments in (("weather", {"city": "Oslo"}), ("add", {"a": 2, "b": 5})):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        said = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "4"},
        ]
        rows.append({"messages": said, tools: schemas})
    renamed = {} if tools == "tools" else {"tools": tools}  # the default has no keyword
    one, *others = read_all(tmp_path, rows, formats.messages, TOOL_CHAT, **renamed)
    text = TOK.decode(one.ids(0))
    assert "null" not in text and '(weather {"city": "Oslo"})' in text
    for two in others:
        assert [one.ids(i).tolist() for i in (0, 1)] == [two.ids(i).tolist() for i in (0, 1)]


def test_a_null_that_a_row_of_jsonl_has_stays(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    name = write(tmp_path / "a.jsonl", json.dumps({"messages": said}))
    encoder = Encoder(tokenizer(template=TOOL_CHAT), 400)
    split = encode(tmp_path / "cache", name, form=formats.messages, encoder=encoder)
    assert '(f {"x": null})' in TOK.decode(split.ids(0))


def test_what_nothing_reads_is_said_once_with_a_count(tmp_path):
    rounds = [
        {"role": "human", "content": "a", "chat_round_id": 0},
        {"role": "bot", "content": "b", "chat_round_id": 1},
    ]
    rows = [{"id": i, "chat_rounds": rounds} for i in range(3)] + [{"chat_rounds": rounds}]
    name = write(tmp_path / "a.jsonl", *map(json.dumps, rows), '{"id": 1}')
    encoder = Encoder(TOK, 400)
    split = encode(tmp_path / "cache", name, form=formats.chat_rounds, encoder=encoder)
    assert split.report.notes == {
        "rows with the key chat_rounds[].chat_round_id, which nothing reads": 4,
        "rows with the key id, which nothing reads": 3,
    }

    def everything(row):
        return formats.Text(str({**row}))

    assert encode(tmp_path / "cache", name, form=everything, encoder=encoder).report.notes == {}


def test_a_last_turn_that_trains_nothing_is_said(tmp_path):
    def row(*roles: str) -> str:
        turns = [{"role": role, "content": "a"} for role in roles]
        return json.dumps({"messages": turns})

    asked, told = ("user", "assistant", "user"), ("user", "assistant", "tool")
    rows = row("user", "assistant"), row(*asked), row(*asked, "user"), row(*told)
    name = write(tmp_path / "a.jsonl", *rows)
    split = encode(tmp_path / "cache", name, form=formats.messages, encoder=Encoder(TOK, 400))
    assert len(split) == 4 and split.report.notes == {
        "rows that end with a turn of the tool, from which nothing is learned": 1,
        "rows that end with a turn of the user, from which nothing is learned": 2,
    }


def test_equal_keys_are_said(tmp_path):
    lines = ['{"text": "a", "text": "b"}', '{"text": "c"}']
    said = "rows with the key text twice; the last one counts"
    for name in (
        write(tmp_path / "a.jsonl", *lines),
        write(tmp_path / "a.json", f"[{', '.join(lines)}]"),
    ):
        split = encode(tmp_path / "cache", name)
        assert split.report.notes == {said: 1} and TOK.decode(split.ids(0)) == "b<|end|>"


def test_a_long_row_gives_signs_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "NEWS", 0.01)
    signs, in_time, enough = [], [], threading.Event()

    def progress(text):
        signs.append(text)
        enough.set()

    def slow(row):
        in_time.append(enough.wait(60))
        return formats.Text(row["text"])

    name = write(tmp_path / "a.jsonl", '{"text": "a"}')
    cache._write(
        tmp_path, [open_source(name)], slow, NextToken(None, 0, Encoder(TOK, 20)), None, progress
    )
    assert in_time == [True] and signs[0] == "0 rows"


def test_long_rows_make_short_chunks():
    rows = [source.SourceRow(i, {}, size=3 * 2**20) for i in range(5)] + [
        source.SourceRow(5, {})
    ] * 300
    assert [len(chunk) for chunk in cache._chunks(iter(rows))] == [2, 2, 256, 45]


def test_a_tokenizers_fingerprint_is_the_same_before_and_after_a_call(tmp_path):
    """A process that waited for another's encoding has made no call."""
    fresh = tokenizer()
    fresh.backend_tokenizer.enable_truncation(max_length=8)
    fresh.backend_tokenizer.enable_padding(length=8)
    fresh.save_pretrained(tmp_path)
    made, plain = AutoTokenizer.from_pretrained(tmp_path), tokenizer_fingerprint(tokenizer())
    assert made.backend_tokenizer.truncation["max_length"] == 8, "the file's own"
    assert tokenizer_fingerprint(made) == tokenizer_fingerprint(made) == plain
    assert made.backend_tokenizer.padding["length"] == 8, "it leaves the tokenizer as it was"
    made("a text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(made) == plain


def test_a_date_in_the_template_is_part_of_the_key_and_is_said(tmp_path, monkeypatch):
    def prints(call):
        made = tokenizer(
            template=CHAT + "{% if false %}{{ strftime_now(" + call + ") }}{% endif %}"
        )
        return [tokenizer_fingerprint(made) for _ in range(2)], made

    (one, two), _ = prints("'%Y'")
    assert one == two
    (one, two), made = prints('"%f"')
    assert one != two and dates(made) == ["%f"]
    assert dates(prints("what")[1]) == ["%Y-%m-%d"] and dates(TOK) == []
    said, tasks = [], write_tasks(tmp_path / "data")
    monkeypatch.setattr(build, "load_tokenizer", lambda model, where: prints("'%Y'")[1])
    build.encode(config(tmp_path, tasks), say=said.append)
    assert [text for text in said if "reads today's date (%Y)" in text] == said[:1]


# prepare


def config(tmp_path: Path, tasks: dict, **batch):
    return parse(
        json.dumps(
            {
                "model": {"name": "m"},
                "tasks": tasks,
                "train": {"steps": 1},
                "batch": {"max_length": 200, **batch},
                "output": str(tmp_path / "out"),
                "cache": str(tmp_path / "cache"),
            },
            indent=1,
        ),
        origin="x.yaml",
    )


def encoders(tasks: dict) -> dict:
    return dict.fromkeys(tasks, NextToken(None, 0, Encoder(TOK, 128)))


def bound(tasks: dict) -> dict:
    return {name: getattr(formats, task["format"]) for name, task in tasks.items()}


def test_prepare(tmp_path):
    tasks = write_tasks(tmp_path / "data", train=12, validation=6)
    tasks["copy"]["cap"] = 5
    made = prepare(config(tmp_path, tasks), encoders(tasks), bound(tasks), say=lambda text: None)
    assert [task.name for task in made] == ["copy", "chat", "prose"]
    assert [(len(task.train), len(task.validation)) for task in made] == [(5, 6), (6, 3), (4, 2)]
    for task in made:
        for split in (task.train, task.validation):
            for i in range(len(split)):
                ids, target = split.ids(i), split.target(i)
                assert ids.shape == target.shape == (split.lengths[i],) and not target[0]
                assert target.sum() == split.targets[i] >= 1


def test_prepare_reports_every_problem_of_every_task(tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    masked = write(tmp_path / "masked.jsonl", '{"prompt": "a", "completion": ""}')
    good = write(tmp_path / "good.jsonl", '{"prompt": "a", "completion": "b"}')
    tasks = {
        "one": {
            "train": empty,
            "validation": str(tmp_path / "gone.jsonl"),
            "format": "prompt_completion",
        },
        "two": {"train": [good, masked], "validation": masked, "format": "prompt_completion"},
    }
    with pytest.raises(DataError) as error:
        prepare(config(tmp_path, tasks), encoders(tasks), bound(tasks), say=lambda text: None)
    text = str(error.value)
    assert "tasks.one.train: found no usable row\n  0 of 0 rows kept" in text
    assert "tasks.one.validation: nothing found under" in text
    assert (
        "tasks.two.validation: found no usable row" in text
        and f"{masked}:1: the completion is empty" in text
    )
    assert "tasks.two.train" not in text
    assert text.count("x.yaml:") == 3


def held_out(tmp_path, rows, part, **task) -> tuple[list[str], list[str], list[str]]:
    """Texts of training and validation rows, and what was said."""
    name = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    said, tasks = [], {"a": {"train": name, "validation": part, "format": "text", **task}}
    (made,) = prepare(config(tmp_path, tasks), encoders(tasks), bound(tasks), said.append)
    return *(
        [TOK.decode(split.ids(i)[:-1]) for i in range(len(split))]
        for split in (made.train, made.validation)
    ), said


def test_a_part_of_the_training_rows_is_held_out(tmp_path):
    rows = [{"text": f"row {i}", "id": i} for i in range(400)]
    train, valid, _ = held_out(tmp_path, rows, "25%")
    assert sorted(train + valid) == sorted(row["text"] for row in rows)
    assert 70 < len(valid) < 130 and not {*train} & {*valid}
    # Copies stand together, whatever nothing reads of them, and appended rows move none.
    more = [*rows, *({**row, "id": 1000} for row in rows)]
    more += [{"text": f"new {i}"} for i in range(100)]
    later, held, said = held_out(tmp_path, more, "25%")
    mine = [sorted(text for text in side if text.startswith("row")) for side in (later, held)]
    assert mine == [sorted(2 * train), sorted(2 * valid)]
    assert not {*later} & {*held} and not any("are among" in one for one in said)


def test_a_part_that_holds_out_no_row_is_named(tmp_path):
    said = "no usable row among the 0.01 of the training rows .* how many to hold out, such as 20"
    with pytest.raises(DataError, match=said):
        held_out(tmp_path, [{"text": "a"}, {"text": "b"}], "1%")


def test_a_number_of_the_training_rows_is_held_out(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(50)]
    train, valid, _ = held_out(tmp_path, [*rows, {"texts": ""}], 7)
    assert len(valid) == 7 and len(train) == 43 and not {*train} & {*valid}
    with pytest.raises(DataError, match="found 50 usable rows, wanted more than validation: 50"):
        held_out(tmp_path, rows, 50)


def test_a_part_needs_examples_that_show_what_they_hold(tmp_path):
    class Opaque:
        pass

    name = write(tmp_path / "a.jsonl", *map(json.dumps, ROWS))
    tasks = {"a": {"train": name, "validation": "50%", "format": "text"}}
    with pytest.raises(DataError, match="found Opaque from the format, whose repr does not show"):
        prepare(config(tmp_path, tasks), encoders(tasks), {"a": lambda row: Opaque()}, print)


def test_unreadable_rows_are_reported_once_beside_a_part(tmp_path):
    name = write(tmp_path / "a.jsonl", *[f'{{"text": "{i}"}}' for i in range(40)], "oops")
    tasks = {"a": {"train": name, "validation": "50%", "format": "text"}}
    (made,) = prepare(config(tmp_path, tasks), encoders(tasks), bound(tasks), lambda text: None)
    assert made.train.report.dropped == {"unreadable": 1}
    assert made.validation.report.dropped == {}


def test_rows_on_both_sides_are_said(tmp_path):
    one = write(tmp_path / "one.jsonl", '{"text": "a"}', '{"text": "b"}', '{"text": "c"}')
    two = write(tmp_path / "two.jsonl", '{"text": "b"}', '{"text": "d"}')
    three = write(tmp_path / "three.jsonl", '{"text": "e"}')
    said = []
    tasks = {name: {"train": one, "validation": two, "format": "text"} for name in "ab"}
    tasks["b"]["validation"] = three
    made = prepare(config(tmp_path, tasks), encoders(tasks), bound(tasks), said.append)
    assert not any("among" in line for line in said), "above the data nobody knows of which it is"
    build._describe(config(tmp_path, tasks), made, (0.5, 0.5), 9, said.append)
    told = "1 of 2 rows are among the training rows: their loss says little about new rows"
    places = (said, "a: 50.0%", "b: 50.0%"), (dryrun.data(made), "a (validation)", "b (train)")
    for lines, mine, other in places:
        text = "\n".join(lines)
        assert text.count(told) == 1 and text.index(mine) < text.index(told) < text.index(other)


def test_a_remark_on_rows_is_said_once_a_task(tmp_path):
    def rows(name: str, ids: int, more: str = "") -> str:
        lines = [f'{{"text": "{name} {i}", "id": {i}}}' for i in range(ids)]
        return write(tmp_path / f"{name}.jsonl", *lines, f'{{"text": "{name}"{more}}}')

    twice = ', "text": "b"'
    ends = {"train": rows("one", 3), "validation": rows("two", 2, twice), "format": "text"}
    tasks = {"a": ends, "b": {**ends, "validation": rows("three", 1)}}
    settings, said = config(tmp_path, tasks), []
    made = prepare(settings, encoders(tasks), bound(tasks), lambda text: None)
    key, equal = "rows with the key id, which nothing reads", "rows with the key text twice"
    assert [task.remarks() for task in made] == [
        [f"{key}: 5", f"{equal}; the last one counts: 1"],
        [f"{key}: 4"],
    ]
    build._describe(settings, made, (0.5, 0.5), 9, said.append)
    places = ("\n".join(said), "  "), ("\n".join(dryrun.data(made)), "{}: ")
    for text, lead in places:
        assert text.count(key) == 2 and text.count(equal) == 1
        for name, count in (("a", 5), ("b", 4)):
            assert f"\n{lead.format(name)}{key}: {count}" in text


# The lock


def build_slowly(folder: str, log: str, fail: bool) -> None:
    def build(partial: Path, progress) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        progress("half of it")
        time.sleep(0.8)
        if fail:
            raise ValueError("the disk is full")
        (partial / "done").write_text("yes")

    try:
        build_once(Path(folder), build, say=lambda text: print(text, flush=True))
    except ValueError as error:
        Path(f"{log}.{os.getpid()}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("fail", [False, True])
def test_one_process_builds_and_the_others_wait(tmp_path, fail):
    context = multiprocessing.get_context("fork" if sys.version_info < (3, 12) else "spawn")
    args = (str(tmp_path / "folder"), str(tmp_path / "log"), fail)
    processes = [context.Process(target=build_slowly, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1
    errors = sorted(path.read_text() for path in tmp_path.glob("log.*"))
    if fail:
        (writer,) = (tmp_path / "log").read_text().split()
        assert errors[2] == "ValueError: the disk is full"
        assert all(
            e.startswith(f"DataError: process {writer} on ")
            and e.endswith("failed: the disk is full")
            for e in errors[:2]
        )
        assert not (tmp_path / "folder").exists()
        build_once(
            tmp_path / "folder", lambda partial, progress: None, say=print
        )  # another try is free to succeed
    else:
        assert errors == []
    assert (tmp_path / "folder").is_dir()
    assert not list(tmp_path.glob("*.lock*")) and not list(tmp_path.glob("*.partial"))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("pid", ["dead", "used again"])
def test_a_lock_left_behind_on_this_host_is_taken_over_and_that_is_said(tmp_path, pid):
    left = Owner(
        socket.gethostname(),
        dead_process() if pid == "dead" else os.getpid(),
        "1",
        "yesterday",
        "7 rows",
    )
    (tmp_path / "folder.lock").write_text(json.dumps(asdict(left)))
    (tmp_path / f"folder.{left.host}.{left.pid}.partial").mkdir()
    said = []
    build_once(
        tmp_path / "folder", lambda partial, progress: (partial / "done").touch(), said.append
    )
    assert (tmp_path / "folder" / "done").exists() and [p.name for p in tmp_path.iterdir()] == [
        "folder"
    ]
    assert said == [
        f"{left} was encoding {tmp_path}/folder and no longer runs: this process does it now"
    ]


def test_a_silent_lock_of_another_host_is_taken_over_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT", 1.2)
    monkeypatch.setattr(lock, "REMIND", 0.8)
    left = Owner("elsewhere", 1, "1", "yesterday")
    (tmp_path / "folder.lock").write_text(json.dumps(asdict(left)))
    said = []
    build_once(tmp_path / "folder", lambda partial, progress: None, said.append)
    assert said[0].startswith(
        "waiting 1 s for process 1 on elsewhere (since yesterday), which is encoding "
    )
    assert (
        said[1].endswith("has given no sign for 1 s: this process does it now")
        and (tmp_path / "folder").is_dir()
    )


def test_a_short_wait_is_not_said(tmp_path, monkeypatch):
    """As that of a rank for another one of its run."""
    monkeypatch.setattr(lock, "SILENT", 0.5)
    left = Owner("elsewhere", 1, "1", "yesterday")
    (tmp_path / "folder.lock").write_text(json.dumps(asdict(left)))
    said = []
    build_once(tmp_path / "folder", lambda partial, progress: None, said.append)
    assert len(said) == 1 and said[0].endswith("this process does it now")


def test_this_process_is_alive_and_a_dead_one_is_not():
    ticks = lock._ticks(os.getpid())
    assert ticks.isdigit() and not Owner(socket.gethostname(), os.getpid(), ticks, "").gone
    assert Owner(socket.gethostname(), dead_process(), ticks, "").gone
    assert not Owner("elsewhere", os.getpid(), "0", "").gone
