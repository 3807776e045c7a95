"""From a source's text to rows, one function a source."""

import ast
import json
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from mtl.samples.rows import Sample, between, completion, labeled, words


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


def functions(path: str, source: bytes) -> Iterator[Sample]:
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


def nouns(index: str, data: str) -> Iterator[Sample]:
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


def translations(catalog: str, language: str = "French") -> Iterator[Sample]:
    """English -> `language`, from a gettext catalog: finished entries without plural forms or
    tags.
    """
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
        english, theirs = entry.get("msgid", "").strip(), entry.get("msgstr", "").strip()
        if entry.keys() & {"fuzzy", "msgid_plural"} or "<" in english or not words(english):
            continue
        if words(english) != words(theirs) and between(2, english, 160) and between(2, theirs, 200):
            prompt = f"Translate into {language}: {english}\n{language}:"
            yield completion(words(english), prompt, f" {theirs}")


def chats(samples: str) -> Iterator[tuple[str, str]]:
    """(what the user says, the ideal answer) of evals' samples, one JSON object a line."""
    for line in samples.splitlines():
        sample = json.loads(line)
        yield sample["input"][-1]["content"].strip(), sample["ideal"].strip()


def sarcasm(samples: str) -> Iterator[tuple[str, str]]:
    """(headline, whether it is sarcastic: yes or no); the source says 1 or 0."""
    for headline, answer in chats(samples):
        if between(20, headline, 120):
            yield headline, {"1": "yes", "0": "no"}[answer]


def headlines(samples: str) -> Iterator[Sample]:
    """A headline -> yes or no, as chat messages."""
    for headline, answer in sarcasm(samples):
        system = "Is this headline sarcastic? Answer yes or no."
        turns = {"system": system, "user": headline, "assistant": answer}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        yield Sample(words(headline), words(headline), {"messages": messages})


def labeled_headlines(samples: str) -> Iterator[Sample]:
    """A headline with the label yes or no."""
    return (labeled(*pair) for pair in sarcasm(samples))


def titles(samples: str) -> Iterator[tuple[str, str]]:
    """(job title, its occupation group); titles with several groups are left out."""
    groups = defaultdict(set)
    for question, answer in chats(samples):
        title = question.removeprefix("What is the SOC Code for the job title").strip(" '")
        groups[title].add(answer)
    for title, (answer, *others) in groups.items():
        if not others and between(3, title, 60) and between(3, answer, 80):
            yield title, answer


def occupations(samples: str) -> Iterator[Sample]:
    """A job title -> its occupation group."""
    for title, answer in titles(samples):
        prompt = f"Occupation group of the job title '{title}':"
        yield completion(words(title), prompt, f" {answer}")


def labeled_titles(samples: str, least: int = 8) -> Iterator[Sample]:
    """A job title labeled with its occupation group, of groups with `least` titles or more."""
    found = list(titles(samples))
    sizes = Counter(group for _, group in found)
    return (labeled(title, group) for title, group in found if sizes[group] >= least)


# Ten of the lexicographer files that WordNet keeps its nouns in, by their numbers.
KINDS = {
    "04": "act", "05": "animal", "06": "artifact", "09": "cognition", "10": "communication",
    "13": "food", "18": "person", "20": "plant", "26": "state", "27": "substance",
}  # fmt: skip


def glosses(data: str) -> Iterator[tuple[str, str]]:
    """(number of the lexicographer file, first gloss) of WordNet's nouns, but for names."""
    for line in data.splitlines():
        synset, _, gloss = line.partition(" | ")
        if not line.startswith(" ") and " @i " not in synset:  # the licence; an instance
            yield synset[9:11], gloss.split(";")[0].strip()


def labeled_glosses(data: str) -> Iterator[Sample]:
    """The first gloss of a WordNet noun, labeled with the lexicographer file that it stands in."""
    for file, gloss in glosses(data):
        if (kind := KINDS.get(file)) and between(12, gloss, 110):
            yield labeled(gloss, kind)


def sums(samples: str) -> Iterator[Sample]:
    """A sum of two binary numbers -> the decimal; the source's other operations are left out."""
    for question, answer in chats(samples):
        terms = question.split(" + ")
        if len(terms) == 2:
            a, b = sorted(int(term, 2) for term in terms)
            yield completion(f"{a} + {b}", f"Binary {question} in decimal:\n", answer)
