"""Multiple-choice rows with knowledge: their format, their arrays, their batches."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mtl.config import Config, ConfigError
from mtl.data.encode import tokenizer_fingerprint
from mtl.data.encoded import DataError, Encoded
from mtl.data.examples import Batch, Book, Piece, Row
from mtl.data.formats import RowProblem
from mtl.data.special import Note, Specials

QA, SPAN, RELATION = LOSSES = "qa", "span", "relation"
NONE = -1


@dataclass(frozen=True)
class Item:
    """A knowledge text. With a relation it is an entity item: head and tail stand in the text.

    Attributes:
        text: read beside every option, or beside one.
        head, tail: (start, end) in characters; None: a query item.
        relation: between them, in words.
        option: the number of the option that reads it; None: all do.
    """

    text: str
    head: tuple[int, int] | None = None
    tail: tuple[int, int] | None = None
    relation: str | None = None
    option: int | None = None


@dataclass(frozen=True)
class MultipleChoice:
    """A question whose option number `answer` is right, as C texts, and its knowledge."""

    candidates: tuple[str, ...]
    answer: int
    items: tuple[Item, ...]


def choices(row: Mapping[str, Any], *, template: str = "{question} {option}") -> MultipleChoice:
    """`{"question", "options", "answer", "knowledge": [{"text", "head", "tail", "relation"}]}`.

    `answer` is the right option's number from 0. `head`, `tail` and `relation` go together or are
    absent. Where an item has `option`, the number of the option that it is for, all items have it,
    and every option has an item.

    Args:
        template: how question and option become the text that is scored.

    Raises:
        RowProblem: the row does not have this form.
    """
    question, options = row.get("question"), row.get("options")
    if not isinstance(question, str):
        raise RowProblem("missing key", f"found the keys {', '.join(row)}, wanted question")
    texts = isinstance(options, list) and all(isinstance(one, str) for one in options)
    if not texts or len(options) < 2:
        found = repr(options)[:60]
        raise RowProblem(
            "no options", f"options: found {found}, wanted a list of two texts or more"
        )
    answer, c = row.get("answer"), len(options)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < c:
        wanted = f"a number, 0 to {c - 1}"
        raise RowProblem("answer out of range", f"answer: found {answer!r}, wanted {wanted}")
    known = row.get("knowledge")
    if not isinstance(known, list) or not known:
        found = repr(known)[:60]
        raise RowProblem("no knowledge", f"knowledge: found {found}, wanted a list of one or more")
    items = tuple(_item(one, f"knowledge.{i}", c) for i, one in enumerate(known))
    of = {item.option for item in items}
    if of != {None} and None in of:
        raise RowProblem("bad value", "knowledge: found items with and without option")
    if of != {None} and (lacking := set(range(c)) - of):
        found = f"found no item for option {min(lacking)}, wanted one for each"
        raise RowProblem("no knowledge", f"knowledge: {found}")
    try:
        made = tuple(template.format(question=question, option=one).strip() for one in options)
    except (KeyError, IndexError, ValueError) as error:
        wanted = "a text with {question} and {option}"
        raise RowProblem("template", f"template: found {template!r}, wanted {wanted}") from error
    return MultipleChoice(made, answer, items)


def _item(value: Any, name: str, options: int) -> Item:
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        found = repr(value)[:60]
        raise RowProblem("bad value", f"{name}: found {found}, wanted a mapping with a text")
    text, option = value["text"], value.get("option")
    if option is not None and (not isinstance(option, int) or not 0 <= option < options):
        wanted = f"a number, 0 to {options - 1}"
        raise RowProblem("bad value", f"{name}.option: found {option!r}, wanted {wanted}")
    parts = [value.get(key) for key in ("head", "tail", "relation")]
    if parts == [None] * 3:
        return Item(text, option=option)
    if not all(isinstance(part, str) and part.strip() for part in parts):
        found = ", ".join(map(repr, parts))
        raise RowProblem("bad value", f"{name}: found {found}, wanted head, tail and relation")
    # The tail is looked for apart from the head: it is masked, and the head must stay readable.
    head = _find(text, parts[0], name, "head", None)
    return Item(text, head, _find(text, parts[1], name, "tail", head), parts[2].strip(), option)


def _find(
    text: str, words: str, name: str, key: str, other: tuple[int, int] | None
) -> tuple[int, int]:
    """Where whole words stand in a text first, apart from another place."""
    # Not \b: words may begin or end with a character that is no letter.
    for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE):
        if other is None or match.end() <= other[0] or match.start() >= other[1]:
            return match.span()
    found = f"found {words!r}, which is not in {text[:60]!r}"
    raise RowProblem("span not in text", f"{name}.{key}: {found}, wanted words of the text")


@dataclass(frozen=True)
class ChoiceBatch(Batch):
    """B examples of N candidates in all, and the M knowledge texts that were drawn.

    Attributes:
        input_ids, attention_mask: (N, T) int64.
        knowledge, knowledge_mask: (M, U) int64; masked words have the mask's id.
        of: (N,) int64, the knowledge text that a candidate reads.
        example, place: (N,) int64, whose option a candidate is, and which.
        answer: (B,) int64. seen: (B,) int64, the candidate beside which knowledge is read out.
        at, labels: (S, 2) example and position of each masked token, (S,) its id.
        spans, relation: (E, 5), (E,): see `Knowledgeable.forward`; the relation's number.
        qa, span, relates: (B,), (S,), (E,) int64, the task of each target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    knowledge: Tensor
    knowledge_mask: Tensor
    of: Tensor
    example: Tensor
    place: Tensor
    answer: Tensor
    seen: Tensor
    at: Tensor
    labels: Tensor
    spans: Tensor
    relation: Tensor
    qa: Tensor
    span: Tensor
    relates: Tensor

    @property
    def positions(self) -> int:
        """The adapter reads text and knowledge of every candidate."""
        n, t = self.input_ids.shape
        return n * (t + self.knowledge.shape[1])

    def counts(self, k: int) -> Tensor:
        """(k,) int64: examples, masked tokens and relations of each task."""
        return self.tally(torch.cat([self.qa, self.span, self.relates]), k)


class ChoiceExamples:
    """Columns of a row with C options and n items: `options` (C * T,) ids, padded, with `length`
    (C,); `known` (n * U,) ids, padded, with `known_length` (n,), `places` (4 n,): first and last +
    1 token of head and tail, -1: a query item, `option` (n,), -1: all; `right` (1,), the answer;
    `relation`, n names in UTF-8 bytes, a line each.

    Args:
        mask: share of a query item's tokens that are masked; an entity item's tail is, whole.
        length: tokens of the longest knowledge text.

    Attributes:
        relations: the R names of the training rows, sorted, after `settle`.
    """

    packs = False
    makes_dummies = False
    notes = True
    losses = LOSSES
    columns: Mapping[str, pa.DataType] = {
        "options": pa.int32(), "length": pa.int32(), "right": pa.int32(), "known": pa.int32(),
        "known_length": pa.int32(), "places": pa.int32(), "option": pa.int32(),
        "relation": pa.uint8(),
    }  # fmt: skip

    def __init__(self, book: Book, tokenizer: Any, config: Config, mask: float, length: int):
        if not tokenizer.is_fast:
            found, wanted = (
                type(tokenizer).__name__,
                "a fast tokenizer, which tells where words are",
            )
            raise ConfigError([config.error("model.name", found, wanted)])
        self.book, self.tokenizer, self.mask, self.length = book, tokenizer, mask, length
        self.max_length, self.too_long = config.batch.max_length, config.batch.too_long
        self.specials = Specials(tokenizer, config.batch.special_text)
        self.pad_id = tokenizer.pad_token_id or 0
        # A model without a mask reads its unknown token, or its padding, in its place.
        # 0 last, since a tokenizer may have none of the others.
        ids = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, 0)
        self.mask_id = next(one for one in ids if one is not None)
        self.relations: list[str] = []

    @property
    def identity(self) -> Any:
        length = [self.max_length, self.length, self.too_long == "truncate"]
        return [tokenizer_fingerprint(self.tokenizer), length, self.specials.policy]

    def encode(self, example: Any, note: Note = lambda text, times: None) -> Row:
        if not isinstance(example, MultipleChoice):
            found = type(example).__name__
            raise RowProblem("bad value", f"found a {found}, wanted a choice (format: choices)")
        texts = [*example.candidates, *(item.text for item in example.items)]
        self.specials.look(texts, note)
        candidates = [
            self._ids(text, f"options.{i}", self.max_length, "batch.max_length")
            for i, text in enumerate(example.candidates)
        ]
        known = [
            self._ids(item.text, f"knowledge.{i}", self.length, "objective.knowledge")
            for i, item in enumerate(example.items)
        ]
        items = zip(example.items, known, strict=True)
        places = [_places(item, one[1]) for item, one in items]
        names = [
            item.relation if item.relation and place[0] >= 0 else ""
            for item, place in zip(example.items, places, strict=True)
        ]
        text = "\n".join(" ".join(name.split()) for name in names)
        option = [NONE if item.option is None else item.option for item in example.items]
        columns = {
            "options": _padded([ids for ids, *_ in candidates], self.pad_id),
            "length": np.array([len(ids) for ids, *_ in candidates], np.int32),
            "right": np.array([example.answer], np.int32),
            "known": _padded([ids for ids, *_ in known], self.pad_id),
            "known_length": np.array([len(ids) for ids, *_ in known], np.int32),
            "places": np.array(places, np.int32).reshape(-1),
            "option": np.array(option, np.int32),
            "relation": np.array(bytearray(text.encode()), np.uint8),
        }
        truncated = any(cut for *_, cut in (*candidates, *known))
        counts = 1, 1, int(any(names))
        # + 1, because 0 means that there is no answer (`Row.answer`).
        return Row(columns, counts, example.answer + 1, truncated)

    def _ids(
        self, text: str, name: str, most: int, key: str
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Token ids, where each stands in the text, and whether they were cut."""
        options = {"verbose": False, "return_offsets_mapping": True, **self.specials.options}
        made = self.tokenizer(text, **options)
        ids = made["input_ids"]
        is_long = len(ids) > most
        if is_long and self.too_long != "truncate":
            found = f"{name}: found {len(ids)} tokens, wanted at most {key} = {most}"
            raise RowProblem("too long", found)
        if is_long:
            made = self.tokenizer(text, truncation=True, max_length=most, **options)
            ids = made["input_ids"]
        if not ids:
            raise RowProblem("no target", f"{name}: the text is empty")
        return ids, made["offset_mapping"], is_long

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        known = lengths["known"] // np.maximum(lengths["known_length"], 1)
        return lengths["options"] + lengths["length"] * known

    def settle(self, splits: Mapping[int, tuple[Encoded, Encoded]]) -> None:
        names: set[str] = set()
        for train, _ in splits.values():
            for i in range(len(train)):
                names |= {*_names(train.columns(i))}
        self.relations = sorted(names - {""})
        known = {*self.relations, ""}
        for stream, (_, validation) in splits.items():
            task = self.book.streams[stream]
            found = {name for i in range(len(validation)) for name in _names(validation.columns(i))}
            if new := sorted(found - known):
                raise DataError(
                    f"tasks.{task}: found relations in the validation rows that no training row "
                    f"has: {new[:5]}. Wanted some of {self.relations[:10]}."
                )
            number = self.book.task(RELATION, stream)
            if number >= 0 and not found - {""}:
                raise DataError(
                    f"tasks.{self.book.tasks[number]}: found no item with a relation in the "
                    f"validation rows of {task}, wanted one at least. Leave {task} out of its `of`."
                )
        # The relation's number is its key's row in the model (`relations`, sorted).
        self._numbers = {name: i for i, name in enumerate(self.relations)}

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> ChoiceBatch:
        laid = _Laid(self)
        for row in rows:
            for piece in row:
                laid.add(piece)
        return laid.batch()

    def masked(
        self, ids: np.ndarray, place: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids with masks, and the positions masked: the tail, or a share of all, of which 80 %
        get the mask, 10 % any token, 10 % stay.
        """
        ids = ids.astype(np.int64)
        if place[2] >= 0:
            at = np.arange(place[2], place[3])
            ids[at] = self.mask_id
            return ids, at
        # Never [CLS] and the like: they are the same in every text.
        able = np.flatnonzero(~np.isin(ids, list(self.specials.ids)))
        count = min(len(able), max(1, round(self.mask * len(able)))) if self.mask else 0
        at = np.sort(rng.choice(able, count, replace=False)) if count else able[:0]
        kind = rng.random(len(at))
        any_token = rng.integers(len(self.tokenizer), size=len(at))
        ids[at] = np.where(kind < 0.8, self.mask_id, np.where(kind < 0.9, any_token, ids[at]))
        return ids, at

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        c, answer = len(columns["length"]), int(columns["right"][0])
        options = columns["options"].reshape(c, -1)
        known = columns["known"].reshape(len(columns["known_length"]), -1)
        lines = []
        for i, (ids, n) in enumerate(zip(options, columns["length"], strict=True)):
            mark = "*" if i == answer else " "
            lines.append(f"{mark} {self.tokenizer.decode(ids[:n].tolist())}")
        for ids, n, name in zip(known, columns["known_length"], _names(columns), strict=True):
            said = f" [{name}]" if name else ""
            lines.append(f"  knows{said}: {self.tokenizer.decode(ids[:n].tolist())}")
        return "\n".join(lines)


class _Laid:
    """A batch as it grows, example by example."""

    def __init__(self, examples: ChoiceExamples):
        self.examples = examples
        self.texts: list[np.ndarray] = []
        self.known: list[np.ndarray] = []
        self.lists: dict[str, list[Any]] = {
            name: []
            for name in (
                "of", "example", "place", "answer", "seen", "at", "labels", "spans", "relation",
                "qa", "span", "relates",
            )
        }  # fmt: skip

    def add(self, piece: Piece) -> None:
        columns, rng, e = piece.columns, piece.rng, self.examples
        c, n = len(columns["length"]), len(columns["known_length"])
        b, first, texts = len(self.lists["answer"]), len(self.texts), len(self.known)
        # One draw an example, before there are candidates: all of them read the same.
        option = columns["option"]
        slots = (
            [np.arange(n)] if option[0] == NONE else [np.flatnonzero(option == i) for i in range(c)]
        )
        drawn = [int(slot[rng.integers(len(slot))]) for slot in slots]
        seen = int(rng.integers(c))
        known, places = columns["known"].reshape(n, -1), columns["places"].reshape(n, 4)
        # Slot i has option i's item; else one slot serves all options.
        beside = seen if len(slots) > 1 else 0
        for slot, item in enumerate(drawn):
            # In the order of the slots, as every call draws from the row's one generator.
            ids, at = e.masked(known[item][: columns["known_length"][item]], places[item], rng)
            self.known.append(ids)
            if slot == beside:
                self._targets(b, piece, item, known[item], at, places[item])
        options = columns["options"].reshape(c, -1)
        self.texts += [ids[:m] for ids, m in zip(options, columns["length"], strict=True)]
        more = {
            "of": [texts + (i if len(slots) > 1 else 0) for i in range(c)],
            "example": [b] * c,
            "place": range(c),
            "answer": [int(columns["right"][0])],
            "seen": [first + seen],
            "qa": [e.book.task(QA, piece.stream)],
        }
        for name, values in more.items():
            self.lists[name] += values

    def _targets(
        self, b: int, piece: Piece, item: int, ids: np.ndarray, at: np.ndarray, place: np.ndarray
    ) -> None:
        """Those of the item beside the candidate that is seen, for tasks that there are."""
        e, lists = self.examples, self.lists
        if (task := e.book.task(SPAN, piece.stream)) >= 0:
            lists["at"] += [[b, int(position)] for position in at]
            lists["labels"] += ids[at].tolist()
            lists["span"] += [task] * len(at)
        name = _names(piece.columns)[item]
        if (task := e.book.task(RELATION, piece.stream)) >= 0 and name:
            lists["spans"].append([b, *map(int, place)])
            lists["relation"].append(e._numbers[name])
            lists["relates"].append(task)

    def batch(self) -> ChoiceBatch:
        made = {
            name: torch.tensor(values, dtype=torch.int64) for name, values in self.lists.items()
        }
        # A batch without any has the shape (0,), which a forward cannot index.
        made["at"], made["spans"] = made["at"].view(-1, 2), made["spans"].view(-1, 5)
        ids, mask = _stacked(self.texts, self.examples.pad_id)
        known, known_mask = _stacked(self.known, self.examples.pad_id)
        return ChoiceBatch(ids, mask, known, known_mask, **made)


def _stacked(each: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Padded ids and their mask, (n, longest) int64 each."""
    width = max(map(len, each))
    ids = np.full((len(each), width), pad, np.int64)
    for row, one in zip(ids, each, strict=True):
        row[: len(one)] = one
    mask = np.arange(width) < np.array([len(one) for one in each])[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def _padded(each: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    width = max(map(len, each))
    rows = [[*ids, *[pad] * (width - len(ids))] for ids in each]
    return np.array(rows, np.int32).reshape(-1)


def _names(columns: Mapping[str, np.ndarray]) -> list[str]:
    """The relation of each item; "": a query item."""
    return columns["relation"].tobytes().decode().split("\n")


def _places(item: Item, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """First and last + 1 token of head and tail; -1 where there are none, or they were cut off."""
    found: list[int] = []
    for part in (item.head, item.tail):
        inside = [
            i
            for i, (start, end) in enumerate(offsets)
            # end > start: special tokens stand nowhere in the text.
            if part is not None and start < part[1] and end > part[0] and end > start
        ]
        if not inside:
            return [NONE] * 4
        found += [inside[0], inside[-1] + 1]
    return found
