"""Ask a model the questions of some tasks' rows, and measure its answers.

Answers are greedy, so they depend on the model alone: not on the number of processes, and up to
rounding not on the rows that share a batch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mtl.config.schema import GenerateSection
from mtl.data.collate import collate
from mtl.data.encode import Encoder
from mtl.data.encoded import DataError, Encoded
from mtl.data.formats import Format
from mtl.data.questions import Question, questions
from mtl.data.source import Source
from mtl.data.special import Specials
from mtl.distributed import comm
from mtl.generation.metrics import Answer, Metric, is_highest, scored
from mtl.losses.causal_lm import token_losses
from mtl.losses.objective import Measure, plain
from mtl.losses.terms import Terms

ENDLESS = 2**24  # most tokens of a question with a choice: no row is left out here


class Model(Protocol):
    """What is asked: an `Engine`, or `evaluation.Bare`."""

    module: nn.Module
    device: torch.device
    in_step: bool

    def eval(self) -> None: ...

    def evaluate(self, **inputs: Any) -> Any: ...

    def generate(self, **inputs: Any) -> Tensor: ...


@dataclass(frozen=True)
class Asked:
    """A task's questions, and what is measured of the answers.

    Attributes:
        task, number: its name, and its place among the K tasks.
        metrics: by name.
        places: `file:line` of each question.
        stops: ids that end an answer: eos, and the special tokens that end the rows' right answers.
        encoder: what makes tokens of an answer to choose from.
    """

    task: str
    number: int
    metrics: Mapping[str, Metric]
    questions: Sequence[Question]
    places: Sequence[str]
    stops: frozenset[int]
    encoder: Encoder

    @property
    def is_generated(self) -> bool:
        """Whether a metric reads generated text."""
        return any(not hasattr(plain(one), "candidates") for one in self.metrics.values())


def ask(
    task: str,
    number: int,
    metrics: Mapping[str, Metric],
    split: Encoded,
    sources: Sequence[Source],
    to_example: Format,
    encoder: Encoder,
    rows: int | None = None,
) -> Asked:
    """Read a task's questions. It is slow where sources are large.

    Args:
        split, sources, to_example: as `questions` takes them.
        encoder: with the run's tokenizer, of any length.
        rows: how many questions at most, spread evenly over the split; None: all.

    Raises:
        DataError: a row has no question, or the sources have changed.
    """
    some = evenly(len(split), rows)
    found = list(questions(split, sources, to_example, encoder, some))
    places = [split.where(one.number) for one in found]
    for one, place in zip(found, places, strict=True):
        if not len(one.prompt):
            raise DataError(f"{place}: found a prompt without a token, wanted one to go on from")
    stops = ends(last_ids(split, "ids", [one.number for one in found]), encoder.tokenizer)
    return Asked(task, number, metrics, found, places, stops, encoder)


class Written(NamedTuple):
    """What a model wrote for question `row` of the `asked`-th task."""

    asked: int
    row: int
    text: str
    finished: bool


class Weighed(NamedTuple):
    """What a model gives the `candidate`-th text of metric `name`, in nats."""

    asked: int
    row: int
    name: str
    candidate: int
    log_p: float


class Asking:
    """The questions of some tasks. It takes a model and measures its answers.

    Args:
        asked: a task each, in the order of the K tasks.
        k: number of tasks.

    Attributes:
        kinds: by name, what is measured.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        k: int,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerateSection,
    ):
        self.asked, self.k, self.tokenizer, self.settings = list(asked), k, tokenizer, settings
        # Tasks with a metric of the same name share its kind; their values stay apart.
        self.kinds = {
            name: Measure(_only, is_highest(metric))
            for one in asked
            for name, metric in one.metrics.items()
        }
        # Encoded once: every evaluation weighs the same texts.
        self._candidates = [list(_candidates(one)) for one in asked]

    def measure(
        self,
        model: Model,
        file: Path | None = None,
        *,
        append: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Each metric by name, (K, 1) float64; nan where a task does not have it. A collective.

        Args:
            file: where rank 0 writes every prediction, a JSON object a line; None: nowhere.
            append: the lines that the file has stay.
            about: what each line begins with.

        Raises:
            ValueError: a question does not fit into the model, or a metric cannot be computed.
        """
        model.eval()
        with torch.no_grad():
            texts, weighed = self._generate(model), self._weigh(model)
        return comm.on_first(lambda: self._scored(texts, weighed, file, append, about or {}))

    def _generate(self, model: Model) -> list[Written]:
        # Before anything is generated, so that all ranks stop together.
        comm.together(lambda: self._look_at(model.module))
        batches: list[tuple[int, list[int]]] = []
        for a, one in enumerate(self.asked):
            if one.is_generated:
                size = [len(question.prompt) for question in one.questions]
                batches += [(a, some) for some in _cut(size, self.settings.batch)]
        found = []
        for (a, some), is_dummy in _mine(batches, model.in_step):
            ends = self._answer(model, self.asked[a], some)
            found += (
                [] if is_dummy else [Written(a, i, *e) for i, e in zip(some, ends, strict=True)]
            )
        return [one for mine in comm.gather(found) for one in mine]

    def _answer(self, model: Model, asked: Asked, some: Sequence[int]) -> list[tuple[str, bool]]:
        """The text that each of some questions is answered with, and whether it ends its turn."""
        prompts = [asked.questions[i].prompt for i in some]
        width = max(map(len, prompts))
        pad = next(iter(sorted(asked.stops)), 0)  # hidden by the mask
        ids = torch.full((len(some), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for r, prompt in enumerate(prompts):  # padded on the left: the answer follows the prompt
            ids[r, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[r, width - len(prompt) :] = 1
        # Ends of the rows' answers, and those that the model came with.
        stops = asked.stops | _model_stops(model.module)
        settings = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad,
        )
        with _bare(model.module):
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
        ends = []
        # What follows the prompts: they are padded on the left, so all end at `width`.
        for row in made[:, width:].tolist():
            stop = next((i for i, one in enumerate(row) if one in stops), None)
            ends.append((self._text(row[:stop]), stop is not None))
        return ends

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _look_at(self, module: nn.Module) -> None:
        if not hasattr(module, "generate"):
            raise ValueError(
                f"tasks.<task>.metrics: found a model of type {type(module).__name__}, wanted one "
                "with transformers' `generate`"
            )
        most = getattr(_causal(module).config.get_text_config(), "max_position_embeddings", None)
        for one in self.asked if most else ():
            for question, place in zip(one.questions, one.places, strict=True):
                needed = len(question.prompt) + self.settings.max_new_tokens
                if one.is_generated and needed > most:
                    raise ValueError(
                        f"{place}: found a prompt of {len(question.prompt)} tokens, and "
                        f"evaluate.generate.max_new_tokens is {self.settings.max_new_tokens}: more "
                        f"than the model's {most} positions. Lower it, or leave the row out."
                    )

    def _weigh(self, model: Model) -> list[Weighed]:
        every = [one for each in self._candidates for one in each]
        places = [(a, *key) for a, each in enumerate(self._candidates) for *key, _, _ in each]
        some = _cut([len(ids) for *_, ids, _ in every], self.settings.batch)
        mine = list(_mine(some, model.in_step))
        sizes = [sum(int(every[i][-1].sum()) for i in batch) for batch, _ in mine]
        most = (
            [max(each) for each in zip(*comm.gather(sizes), strict=True)]
            if model.in_step
            else sizes
        )
        found = []
        for (batch, is_dummy), largest in zip(mine, most, strict=True):
            rows = [[(*every[i][-2:], r)] for r, i in enumerate(batch)]
            made = collate(rows, 0, packed=False, most=largest).to(model.device)
            losses = token_losses(model.evaluate, made)
            sums = Terms.by_task(losses, made.task, len(batch)).sums.tolist()
            if not is_dummy:
                found += [Weighed(*places[i], -nats) for i, nats in zip(batch, sums, strict=True)]
        return [one for mine in comm.gather(found) for one in mine]

    def _scored(
        self,
        texts: Sequence[Written],
        weighed: Sequence[Weighed],
        file: Path | None,
        append: bool,
        about: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        written = {(one.asked, one.row): one for one in texts}
        # A metric's candidates by number: the text itself may stand there twice.
        log_p = {(one.asked, one.row, one.name, one.candidate): one.log_p for one in weighed}
        values = {name: np.full((self.k, 1), np.nan) for name in self.kinds}
        lines: list[dict[str, Any]] = []
        for a, one in enumerate(self.asked):
            plain_answers, mine = [], []
            for row, (question, place) in enumerate(zip(one.questions, one.places, strict=True)):
                made = written.get((a, row))
                line = {**about, "task": one.task, "row": place, "answer": question.answer}
                line["prompt"] = self.tokenizer.decode(question.prompt, skip_special_tokens=False)
                if made:
                    line |= {"prediction": made.text, "finished": made.finished}
                # A task that only weighs candidates has no generated text.
                text, finished = (made.text, made.finished) if made else ("", True)
                plain_answers.append(Answer(question, text, finished))
                mine.append(line | {"scores": {}})
            for name, metric in one.metrics.items():
                answers = plain_answers
                if hasattr(plain(metric), "candidates"):
                    answers = [
                        answer._replace(
                            candidates=(given := tuple(metric.candidates(answer.question))),
                            log_p=tuple(log_p[a, r, name, c] for c in range(len(given))),
                        )
                        for r, answer in enumerate(plain_answers)
                    ]
                    for line, answer in zip(mine, answers, strict=True):
                        weights = zip(answer.candidates, answer.log_p, strict=True)
                        line.setdefault("log_p", {})[name] = dict(weights)
                values[name][one.number, 0], each = scored(name, metric, answers)
                for line, score in zip(mine, each or [], strict=bool(each)):
                    line["scores"][name] = score
            lines += mine
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a" if append else "w", encoding="utf-8") as out:
                out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return values


# The measure of a sum that is the value already: `scored` has taken the mean.
def _only(sums: np.ndarray) -> float:
    return float(sums[0])


def evenly(n: int, most: int | None) -> Sequence[int]:
    """Numbers of at most so many of n rows, spread evenly over them; None: of all."""
    return range(n) if most is None or most >= n else [i * n // most for i in range(most)]


def last_ids(split: Encoded, column: str, rows: Iterable[int]) -> list[list[int]]:
    """The last few ids of some rows: an end of turn, and white space that a template puts after it.

    A row that was cut may end anywhere. Where there are such rows, the longest are left out.
    """
    texts = [split.columns(row)[column] for row in rows]
    longest = max(map(len, texts), default=0)
    whole = (ids for ids in texts if len(ids) < longest or not split.report.truncated)
    return [ids[-8:].tolist() for ids in whole]


def ends(tails: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Eos, and the special tokens that end the tails, white space after them aside."""
    special = Specials(tokenizer).ids
    found = {tokenizer.eos_token_id} - {None}
    for tail in tails:
        at = next((i for i in reversed(range(len(tail))) if tail[i] in special), None)
        if at is not None and not tokenizer.decode(tail[at + 1 :]).strip():
            found.add(tail[at])
    return frozenset(found)


def _cut(sizes: Sequence[int], batch: int) -> list[list[int]]:
    """Numbers in batches of like size, the largest first."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def _mine(batches: Sequence[Any], in_step: bool) -> Iterator[tuple[Any, bool]]:
    """This rank's part of the batches, and whether it is a dummy: one that only keeps ranks in
    step.
    """
    mine, world = batches[comm.rank() :: comm.world()], comm.world()
    yield from ((one, False) for one in mine)
    # Generation is a collective at ZeRO 3: this rank goes along with some batch.
    if in_step and len(mine) < -(-len(batches) // world):
        yield batches[0], True


def _candidates(asked: Asked) -> Iterator[tuple[int, str, int, np.ndarray, np.ndarray]]:
    """Row, metric, number, ids and target mask of every text that a model is to weigh."""
    for name, metric in asked.metrics.items():
        if not hasattr(plain(metric), "candidates"):
            continue
        for row, (question, place) in enumerate(zip(asked.questions, asked.places, strict=True)):
            try:
                for c, text in enumerate(metric.candidates(question)):
                    coded = asked.encoder(question.saying(text))
                    yield row, name, c, coded.ids, coded.target
            except ValueError as error:
                raise DataError(f"{place}: tasks.{asked.task}.metrics: {error}") from error


def stop_at(module: nn.Module, stops: frozenset[int]) -> frozenset[int]:
    """Let the model's own settings for generation, which are saved with it, stop at these ids too.

    Returns:
        Those that are new to it; none where the model has no such settings.
    """
    settings = getattr(_causal(module), "generation_config", None)
    new = stops - _model_stops(module) if settings is not None else frozenset()
    if new:
        settings.eos_token_id = sorted(_model_stops(module) | new)
    return new


def _causal(module: nn.Module) -> Any:
    """The model inside an adapter, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _model_stops(module: nn.Module) -> frozenset[int]:
    """What the model's own settings say ends a turn."""
    found = getattr(_causal(module).generation_config, "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or ())


@contextmanager
def _bare(module: nn.Module) -> Iterator[None]:
    """Within this context the model has no settings of its own for generation, such as a penalty on
    repetitions, which `generate` would mix into ours.
    """
    causal = _causal(module)
    own, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own
