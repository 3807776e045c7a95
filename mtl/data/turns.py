"""Where the turns of a conversation stand in the text that a chat template renders of it.

The template is somebody else's program: it strips, merges, reorders and drops. So we render the
conversation twice: as it is, and with marks of private-use characters in its contents. Where both
agree except for the marks, the marks tell which characters came from which turn.
"""

import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from os.path import commonprefix
from typing import Any, NamedTuple, Protocol

from mtl.data.formats import REASONING, Messages, RowProblem

PRIVATE = range(0xF0000, 0xFFF00, 2)  # two characters a mark; no standard gives them a meaning
# Marks stand inside tags such as <think>: templates ask whether a content begins or ends with one.
OPENING = re.compile(r"\s*(?:<[^<>\n]{1,40}>\s*)*")
ENDING = re.compile(r"(?:\s*<[^<>\n]{1,40}>)*\s*\Z")
NEAR = 200  # characters from a content's end within which such tags are looked for


class Render(Protocol):
    """The text that the template renders of an example, with the generation prompt or without."""

    def __call__(self, example: Messages, prompt: bool = False) -> str: ...


class Span(NamedTuple):
    """What the model is to generate in a turn of the assistant."""

    turn: int  # from 0
    start: int  # in characters of the text
    stop: int
    # A token of others that ends it, where the template has none of its own; "": nothing does.
    borrowed: str | None = None


class Turns(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: the rendering, and `added`.
        spans: of the assistant's turns, `Messages.context` included.
        unreasoned: turns before the last question that are rendered without their reasoning. Some
            templates show a model none of its earlier thoughts.
        added: the borrowed end of the last turn.
    """

    text: str
    spans: list[Span]
    unreasoned: int
    added: str = ""


def where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Of two texts the 40 characters around the first that is not the same."""
    at = len(commonprefix([one, other]))
    return one[max(0, at - 20) : at + 20], other[max(0, at - 20) : at + 20]


def find_turns(example: Messages, render: Render, eos: str, specials: re.Pattern[str]) -> Turns:
    """Find each assistant turn, from the end of the generation prompt to the end of the turn.

    A turn ends with its last eos, if it has one: nothing after that is ever generated. Some
    templates begin a turn in another way than their generation prompt says. Then it begins after
    what both share. Others end earlier turns in another way than the last one. Then it ends with
    the first of `specials`. Some have no token for the end (GLM's). Then the token that lets the
    next one speak ends it, where no turn of the assistant begins with that; the last turn may end
    with eos as well. Cost: two renderings, and a short one for every kind of turn.

    Raises:
        RowProblem: the template leaves out what `example.may_drop` does not name, or the turns
            cannot be told apart.
    """
    text = render(example)
    marks = _Marks(text)
    plain, found = marks.found(render(marks.put(example)))
    if plain != text:
        one, other = where_they_differ(text, plain)
        raise RowProblem(
            "template",
            "the chat template changes a text when only a mark is added to it: found "
            f"{one!r} and {other!r}, so its turns cannot be found. Set model.chat_template",
        )
    unreasoned = _left_out(example, marks.pieces, {mark for _, mark in found})
    places = [place for place, _ in found]
    of: dict[int, list[int]] = {}  # turn -> its marks, as numbers into `found`
    for number, (_, mark) in enumerate(found):
        of.setdefault(marks.pieces[mark // 2].turn, []).append(number)
    kinds: dict[Any, str] = {}  # what follows a kind of turn
    spans, added = [], ""
    for i, turn in enumerate(example.messages):
        if turn["role"] != "assistant" or i not in of:
            continue
        name, first, last = f"turn {i + 1} (assistant)", of[i][0], of[i][-1]
        if i == 0:
            raise RowProblem(
                "template", f"{name} is the first: there is no prompt that a template could render"
            )
        if last - first + 1 != len(of[i]) or len({found[n][1] for n in of[i]}) != len(of[i]):
            raise RowProblem("template", f"the chat template renders {name} in several places")
        # The scaffold before a turn begins at the last mark of another turn;
        # what follows it ends at the next mark.
        before, after = places[first - 1] if first else 0, [*places[last + 1 : last + 2], len(text)]
        head = _head(example, i, render, kinds)
        start = _start(text[before : places[first]], head, specials)
        if start is None:
            raise RowProblem(
                "template",
                f"the chat template's generation prompt is not how {name} begins: found "
                f"{text[before : places[first]][-60:]!r}. Set model.chat_template",
            )
        rest = text[places[last] : after[0]]
        is_end = i + 1 == len(example.messages)
        closing = rest if is_end else _closing(example, i, render, kinds)
        stop, borrowed = _stop(rest, closing, eos, specials), None
        if not _is_ended(text, places[last] + stop, specials):
            if is_end:
                borrowed = added = _next(example, rest, render, kinds, specials, head) or eos
            else:
                borrowed = _token(rest, stop, specials, head)
            stop += len(borrowed)
        spans.append(Span(i, before + start, places[last] + stop, borrowed))
    return Turns(text + added, spans, unreasoned, added)


def _is_ended(text: str, stop: int, specials: re.Pattern[str]) -> bool:
    """Whether a special token stands before a place, white space aside."""
    near = text[max(0, stop - NEAR) : stop].rstrip()
    return any(match.end() == len(near) for match in specials.finditer(near))


def _token(text: str, at: int, specials: re.Pattern[str], head: str) -> str:
    """The special token at a place; "" where a turn of the assistant begins with it too."""
    match = specials.match(text, at)
    return match[0] if match and match[0] not in head else ""


def _next(
    example: Messages,
    closing: str,
    render: Render,
    kinds: dict[Any, str],
    specials: re.Pattern[str],
    head: str,
) -> str:
    """The token that would follow the last turn if somebody else spoke next."""
    turn = example.messages[-1]
    role = "tool" if turn.get("tool_calls") else "user"
    key = ("next", role, closing, head)
    if key not in kinds:
        turns = [{"role": "user", "content": "x"}, turn, {"role": role, "content": "x"}]
        marks = _Marks("")
        try:
            text, found = marks.found(render(marks.put(replace(example, messages=turns))))
        except RowProblem:  # the template wants more
            return ""
        at = found[-3][0] if len(found) > 2 else 0
        follows = text.startswith(closing, at)
        kinds[key] = _token(text, at + len(closing), specials, head) if follows else ""
    return kinds[key]


def _start(scaffold: str, head: str, specials: re.Pattern[str]) -> int | None:
    """How many of the characters between two contents come before the turn itself."""
    if scaffold.startswith(head):
        return len(head)
    shared = commonprefix([scaffold, head])
    # Not at any character: two different texts may share the first letters of a word.
    ends = [m.end() for m in specials.finditer(shared)]
    ends += [m.end() for m in re.finditer(r"\s", shared)]
    return max(ends, default=None)


def _stop(rest: str, closing: str | None, eos: str, specials: re.Pattern[str]) -> int:
    """How many of the characters after a turn's content are its closing."""
    if closing is not None and rest.startswith(closing):
        at = closing.rfind(eos) if eos else -1
        return at + len(eos) if at >= 0 else len(closing)
    end = specials.search(rest)
    return end.end() if end else len(commonprefix([rest, closing or ""]))


def _head(example: Messages, i: int, render: Render, kinds: dict[Any, str]) -> str:
    """The text between the content before turn i and what is generated: the end of its prompt."""
    # Turns without any text have no mark: go back to the last one that has.
    start = i - 1
    while start > 0 and not any(_pieces(example.messages[start])):
        start -= 1
    # None: a call's arguments stand behind its last mark, and differ from row to row.
    key = None
    if not any(turn.get("tool_calls") for turn in example.messages[start:i]):
        key = tuple((turn["role"], _trailing(turn)) for turn in example.messages[start:i])
    if key is None or key not in kinds:
        kinds[key] = _behind(replace(example, messages=example.messages[:i]), render, prompt=True)
    return kinds[key]


def _closing(example: Messages, i: int, render: Render, kinds: dict[Any, str]) -> str | None:
    """What the template would put after the content of turn i if that were the last one."""
    turn = example.messages[i]
    key = None if turn.get("tool_calls") else ("closing", _trailing(turn))
    if key is None or key not in kinds:
        # Templates want a question before an answer; its text does not matter.
        question = {"role": "user", "content": "x"}
        try:
            kinds[key] = _behind(replace(example, messages=[question, turn]), render)
        except RowProblem:  # the template wants more before such a turn
            return None
    return kinds[key]


def _behind(example: Messages, render: Render, prompt: bool = False) -> str:
    """The text after the last content."""
    marks = _Marks("")
    plain, found = marks.found(render(marks.put(example), prompt=prompt))
    return plain[found[-1][0] if found else 0 :]


class _Piece(NamedTuple):
    """A text of a turn: where it stands, and which of its characters the marks enclose."""

    path: tuple[str | int, ...]
    kind: str  # reasoning, content, call
    start: int
    stop: int


class _Shown(NamedTuple):
    turn: int
    kind: str
    text: str


class _Marks:
    """Puts marks into the contents of an example, and finds them in what is rendered of it."""

    def __init__(self, text: str):
        used = set(text)
        pairs = ((chr(code), chr(code + 1)) for code in PRIVATE)
        self._open, self._close = next(pair for pair in pairs if used.isdisjoint(pair))
        self._mark = re.compile(f"{self._open}([0-9]+){self._close}")
        self.pieces: list[_Shown] = []  # piece n has the marks 2 n and 2 n + 1

    def put(self, example: Messages) -> Messages:
        turns = []
        for i, turn in enumerate(example.messages):
            turn = deepcopy(dict(turn))
            inserts: list[tuple[_Piece, int]] = []
            for piece in _pieces(turn):
                text = reduce(operator.getitem, piece.path, turn)
                inserts.append((piece, len(self.pieces)))
                self.pieces.append(_Shown(i, piece.kind, text[piece.start : piece.stop]))
            for piece, n in reversed(inserts):  # from the end, so that places stay as they are
                *above, key = piece.path
                inside = reduce(operator.getitem, above, turn)
                text = inside[key]
                inside[key] = "".join(
                    (
                        text[: piece.start],
                        self._text(2 * n),
                        text[piece.start : piece.stop],
                        self._text(2 * n + 1),
                        text[piece.stop :],
                    )
                )
            turns.append(turn)
        return replace(example, messages=turns)

    def found(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text without marks, and the marks in it: (place, number), in order."""
        plain, marks, end, length = [], [], 0, 0
        for match in self._mark.finditer(text):
            plain.append(text[end : match.start()])
            length += match.start() - end
            end = match.end()
            marks.append((length, int(match[1])))
        return "".join([*plain, text[end:]]), marks

    def _text(self, number: int) -> str:
        return f"{self._open}{number}{self._close}"


def _pieces(turn: Mapping[str, Any]) -> Iterator[_Piece]:
    """The texts of a turn that a template shows, without space and tags at their ends."""
    for key in REASONING:
        if isinstance(turn.get(key), str) and turn[key].strip():
            yield _inner((key,), "reasoning", turn[key], 0)
            break  # transformers gives it the other names
    content = turn.get("content")
    if isinstance(content, str):
        # At the last </think>, as templates split reasoning that stands in the content.
        head, end, _ = (
            content.rpartition("</think>") if turn["role"] == "assistant" else ("", "", "")
        )
        if head.replace("<think>", "").strip():
            yield _inner(("content",), "reasoning", head, 0)
        if content[len(head) + len(end) :].strip():
            yield _inner(("content",), "content", content, len(head) + len(end))
    for k, call in enumerate(turn.get("tool_calls") or ()):
        inside = "function" in call
        name = (call["function"] if inside else call).get("name")
        if isinstance(name, str) and name:
            path = ("tool_calls", k, "function", "name") if inside else ("tool_calls", k, "name")
            yield _Piece(path, "call", 0, len(name))


def _inner(path: tuple[str | int, ...], kind: str, text: str, begin: int) -> _Piece:
    start = OPENING.match(text, begin).end()
    stop = len(text) - len(_ending(text))
    if start >= stop:  # it has nothing but tags
        start = begin + len(text[begin:]) - len(text[begin:].lstrip())
        stop = len(text.rstrip())
    return _Piece(path, kind, start, stop)


def _ending(text: str) -> str:
    space = len(text.rstrip())
    near = text[max(0, space - NEAR) : space]
    return near[ENDING.search(near).start() :] + text[space:]


def _trailing(turn: Mapping[str, Any]) -> tuple[Any, ...]:
    """The parts of a turn that decide what follows its last mark; calls do not count."""
    *_, last = [None, *_pieces(turn)]
    if last is None:
        return ("nothing",)
    return last.kind, reduce(operator.getitem, last.path, turn)[last.stop :]


def _left_out(example: Messages, pieces: Sequence[_Shown], found: Collection[int]) -> int:
    """Count the reasoning left out before the last question. Refuse whatever else is left out."""
    asked = max((i for i, t in enumerate(example.messages) if t["role"] == "user"), default=-1)
    unreasoned = 0
    for n, (i, kind, text) in enumerate(pieces):
        if 2 * n in found and 2 * n + 1 in found:
            continue
        role = example.messages[i]["role"]
        # may_drop has no `developer`: its turns count as the system's.
        name = "reasoning" if kind == "reasoning" else "system" if role == "developer" else role
        if kind == "reasoning" and i < asked:
            unreasoned += 1
        elif name not in example.may_drop:
            whose = "the reasoning" if kind == "reasoning" else "text"
            shown = repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
            raise RowProblem(
                "template",
                f"the chat template leaves out {whose} of turn {i + 1} ({role}): {shown}. Set "
                "model.chat_template, or allow it with "
                f"format: {{name: ..., may_drop: [{name}]}}",
            )
    return unreasoned
