"""What is measured of a model's answers. A metric is one callable that the YAML names.

    def mine(answers: Sequence[Answer], *, keyword: str = "default") -> float | Sequence[float]

It is a function, or an instance of a class with the YAML's keywords. It returns a score for each
answer, of which the mean is reported, or one number for all of them. It may have these attributes:

    highest      whether more is better. Default: True
    candidates   candidates(question) -> texts that the model is to weigh by likelihood. The metric
                 then reads `Answer.candidates` and `Answer.log_p`, and needs no generated text
    runs_code    whether it runs what the model writes. It then needs `evaluate.generate.run_code`
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any, NamedTuple

import numpy as np

from mtl.data.encoded import DataError
from mtl.data.questions import Question
from mtl.losses.objective import plain

METRICS = {
    name: f"mtl.generation.metrics:{target}"
    for name, target in {
        "exact_match": "exact_match",
        "f1": "f1",
        "bleu": "bleu",
        "chrf": "chrf",
        "rouge_l": "rouge_l",
        "choice": "Choice",
        "json": "valid_json",
        "code": "code",
    }.items()
}
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Answer(NamedTuple):
    """What a model makes of a question.

    Attributes:
        question: with the right answer and the source's row.
        text: what the model wrote up to the end of its turn, without special tokens.
        finished: whether it ended its turn, within the tokens that it had.
        candidates: what the metric had weighed; empty if it has no candidates.
        log_p: of each candidate with the end of the turn, in nats.
    """

    question: Question
    text: str = ""
    finished: bool = True
    candidates: tuple[str, ...] = ()
    log_p: tuple[float, ...] = ()


Metric = Callable[[Sequence[Answer]], float | Sequence[float]]


def exact_match(answers: Sequence[Answer], *, normalize: bool = False) -> list[float]:
    """Whether the text is the answer, white space at the ends aside.

    Args:
        normalize: compare as SQuAD's evaluation does: lower case, no punctuation, no articles.
    """
    same = _normal if normalize else str.strip
    return [float(same(one.text) == same(one.question.answer)) for one in answers]


def f1(answers: Sequence[Answer]) -> list[float]:
    """F1 of the words that text and answer share, normalized as in SQuAD's evaluation (Rajpurkar
    et al. 2016, arXiv 1606.05250).
    """
    return [_f1(_normal(one.text), _normal(one.question.answer)) for one in answers]


def bleu(answers: Sequence[Answer], *, tokenize: str = "13a", lowercase: bool = False) -> float:
    """Corpus BLEU by sacrebleu, 0 to 100; keywords are its own."""
    return (
        _sacrebleu()
        .BLEU(tokenize=tokenize, lowercase=lowercase)
        .corpus_score(*_texts(answers))
        .score
    )


def chrf(answers: Sequence[Answer], *, word_order: int = 0) -> float:
    """Corpus chrF by sacrebleu, 0 to 100; `word_order: 2` is chrF++."""
    return _sacrebleu().CHRF(word_order=word_order).corpus_score(*_texts(answers)).score


def rouge_l(answers: Sequence[Answer], *, stem: bool = False) -> list[float]:
    """F-measure of ROUGE-L by rouge-score, 0 to 1. It drops every character but a-z and 0-9.

    Args:
        stem: compare stems of words (Porter).
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("rouge_l: pip install rouge-score: it is not installed.") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    return [scorer.score(one.question.answer, one.text)["rougeL"].fmeasure for one in answers]


class Choice:
    """Whether the likeliest of a row's choices, each with the end of its turn, is the answer.

    Args:
        choices: key of the row that lists their texts, or the list itself.
        per: what log-probabilities are divided by: nothing, or the text's `character`s.
    """

    def __init__(self, choices: str | Sequence[str] = "choices", per: str | None = None):
        if per not in (None, "character"):
            raise ValueError(f"per: found {per!r}, wanted null or character")
        self.choices, self.per = choices, per

    def candidates(self, question: Question) -> tuple[str, ...]:
        """The texts, with the answer's own white space before them."""
        given = self.choices
        found = question.row.get(given) if isinstance(given, str) else given
        if not isinstance(found, list | tuple) or len(found) < 2:
            raise DataError(f"choice: {given}: found {found!r}, wanted a list of two or more texts")
        said = question.said
        lead = said[: len(said) - len(said.lstrip())]
        texts = tuple(lead + str(one).strip() for one in found)
        # Twice would be as bad as never: which of the two is right is unknown.
        if texts.count(said.rstrip()) != 1:
            found = f"found the answer {said!r} for the choices {list(texts)}"
            raise DataError(f"choice: {found}, wanted it among them once")
        return texts

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self.chosen(one) == one.question.said.rstrip()) for one in answers]

    def chosen(self, answer: Answer) -> str:
        size = [max(1, len(one.strip())) if self.per else 1 for one in answer.candidates]
        return answer.candidates[int(np.argmax(np.array(answer.log_p) / size))]


def valid_json(answers: Sequence[Answer], *, fenced: bool = False) -> list[float]:
    """Whether the text is JSON (RFC 8259: no NaN, no trailing comma).

    Args:
        fenced: look at the first ``` block only, where there is one.
    """
    return [float(_is_json(_block(one.text) if fenced else one.text)) for one in answers]


def code(
    answers: Sequence[Answer],
    *,
    tests: str | None = "tests",
    prompt: str | None = None,
    seconds: float = 10.0,
    memory: int = 512,
    file: int = 1,
) -> list[float]:
    """Whether the Python code in the text (its first ``` block, or all of it), followed by the
    row's tests, runs to its end without an error. `mtl.generation.sandbox` says what keeps it
    apart, and what does not.

    Args:
        tests: key of the row with code that fails where the answer is wrong; null: no tests.
        prompt: key of the row with code that stands before the answer; null: nothing does.
        seconds: of clock and CPU for each answer.
        memory: MiB of each process.
        file: MiB of the largest file.
    """
    # Here, as other metrics have no need of Linux's namespaces.
    from mtl.generation import sandbox

    def program(one: Answer) -> str:
        before = "" if prompt is None else _key(one, prompt)
        after = "" if tests is None else _key(one, tests)
        return f"{before}{_block(one.text)}\n\n{after}\n"

    programs = [program(one) for one in answers]
    sandbox.available()
    with ThreadPoolExecutor(max(1, (cpu_count() or 2) // 2)) as pool:
        ran = pool.map(lambda one: sandbox.run(one, seconds, memory, file), programs)
        return [float(did) for did in ran]


code.runs_code = True


def is_highest(metric: Any) -> bool:
    return getattr(plain(metric), "highest", True)


def scored(
    name: str, metric: Metric, answers: Sequence[Answer]
) -> tuple[float, Sequence[float] | None]:
    """A metric's value, and the score of each answer if it has such.

    Raises:
        ValueError: it gave something else.
    """
    found = metric(answers)
    if isinstance(found, float | int):
        return float(found), None
    each = [float(one) for one in found]
    if len(each) != len(answers):
        raise ValueError(
            f"metric {name}: gave {len(each)} scores for {len(answers)} answers, wanted one each, "
            "or one number for all"
        )
    return float(np.mean(each)), each


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ValueError("bleu, chrf: pip install sacrebleu: it is not installed.") from error
    return metrics


def _texts(answers: Sequence[Answer]) -> tuple[list[str], list[list[str]]]:
    return [one.text.strip() for one in answers], [[one.question.answer.strip() for one in answers]]


def _normal(text: str) -> str:
    """Lower case without punctuation, articles and double spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(text: str, answer: str) -> float:
    found, wanted = text.split(), answer.split()
    if not found or not wanted:
        # Both empty is right, one empty is wrong: there is no word to share.
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _block(text: str) -> str:
    found = FENCED.search(text)
    return found[1] if found else text


def _key(answer: Answer, key: str) -> str:
    row: Mapping[str, Any] = answer.question.row
    found = row.get(key)
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        return "\n".join(found)  # as MBPP has them
    if not isinstance(found, str):
        raise DataError(f"code: {key}: found {found!r}, wanted a text in each row")
    return found
