"""The format `preference`: two answers to one prompt, the better one named."""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from mtl.data.formats import Completion, Pair, RowProblem, messages

Turns = list[Mapping[str, Any]]


def preference(
    row: Mapping[str, Any],
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    tools: str = "tools",
    system: str = "system",
    roles: Mapping[str, str] | None = None,
    may_drop: Sequence[str] = (),
) -> Pair:
    """`{"prompt", "chosen", "rejected"}` as texts or as lists of messages, and, where present,
    `tools` and `system` of a chat, as in `messages`; keywords rename the keys.

    Texts are joined as in `prompt_completion`. Where anything is a list, the row is a chat. A text
    beside a list is one turn, of the user (prompt) or of the assistant. `chosen` and `rejected` may
    be whole conversations. Then the prompt is what both begin with: turns of lists, whole words of
    texts. A given `prompt` must be among these turns. Of a list, what follows the prompt is a
    target where it is the assistant's.

    Args:
        roles, may_drop: as in `messages`, whose `weight` and `train` hold for a side's turns too.

    Raises:
        RowProblem: `equal sides`; `differing prompts`: the sides part before an assistant's turn;
            or the row does not have this form.
    """
    sides = [_value(row, key, roles or {}) for key in (chosen, rejected)]
    given = None if row.get(prompt) is None else _value(row, prompt, roles or {})
    # As written. Once more below, where lists of text parts have been joined.
    if sides[0] == sides[1]:
        raise RowProblem("equal sides", f"found {chosen} and {rejected} alike, wanted two answers")
    if all(isinstance(side, str) for side in sides) and not isinstance(given, list):
        parted = [(given, side) for side in sides] if given is not None else _parted(*sides)
        return Pair(*(Completion(*parts) for parts in parted))
    if given is None and not all(isinstance(side, list) for side in sides):
        keys = ", ".join(row) or "(none)"
        raise RowProblem(
            "missing key", f"found the keys {keys}, wanted {prompt}, or both sides as conversations"
        )
    more = {"tools": row.get(tools), "system": row.get(system)}
    checked = [
        messages({"messages": _conversation(given, side, prompt), **more}, may_drop=may_drop)
        for side in sides
    ]
    whole = [each.messages for each in checked]
    if whole[0] == whole[1]:
        raise RowProblem("equal sides", f"found {chosen} and {rejected} alike, wanted two answers")
    # Counted, not compared: both answers may begin with the same turn.
    if given is not None and all(_is_answer(side) for side in sides):
        shared = len(whole[0]) - (1 if isinstance(sides[0], str) else len(sides[0]))
    else:
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*whole, strict=False))))
    for name, turns in zip((chosen, rejected), whole, strict=True):
        after = turns[shared]["role"] if shared < len(turns) else "no turn"
        if not shared or after != "assistant":
            where = f"after {shared} turns that both have, {name} goes on with {after}"
            raise RowProblem("differing prompts", f"{where}, wanted one of the assistant")
    return Pair(*checked, shared)


def _parted(chosen: str, rejected: str) -> list[tuple[str, str]]:
    """(prompt, answer) of both texts. The prompt is the words that both begin with. The space after
    it is the answers', as tokenizers have it.
    """
    common = os.path.commonprefix([chosen, rejected])
    words = re.match(r"(?s)(.*\S)(?=\s)", common)
    # A word that ends in one text and goes on in the other is the answers' too.
    if words is None:
        raise RowProblem(
            "differing prompts",
            f"found {chosen[:30]!r} and {rejected[:30]!r}, wanted whole conversations that begin "
            "alike, or a prompt",
        )
    return [(words[1], side[len(words[1]) :]) for side in (chosen, rejected)]


def _value(row: Mapping[str, Any], key: str, roles: Mapping[str, str]) -> str | Turns:
    value = row.get(key)
    if isinstance(value, str):
        return value
    if value is None:
        keys = ", ".join(row) or "(none)"
        raise RowProblem("missing key", f"found the keys {keys}, wanted {key}")
    if not isinstance(value, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value
    ):
        found = repr(value)[:60]
        raise RowProblem("bad value", f"{key}: found {found}, wanted text or a list of messages")
    # Arrow gives every turn every key, with None for what it lacks. We drop these before comparing.
    found = [{name: each for name, each in turn.items() if each is not None} for turn in value]
    return [{**turn, "role": roles.get(turn["role"], turn["role"])} for turn in found]


def _conversation(prompt: str | Turns | None, side: str | Turns, name: str) -> Turns:
    """All turns of a side. The prompt's are added where it does not begin with them already."""
    turns = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
    if prompt is None:
        return turns
    if _is_answer(turns):
        start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*start, *turns]
    # A text may name any of the turns; a list has to be their beginning.
    asked = [turn.get("content") for turn in turns if turn["role"] != "assistant"]
    if isinstance(prompt, str) and prompt not in asked or _differs(prompt, turns):
        raise RowProblem("differing prompts", f"{name}: found another one than the conversations'")
    return turns


def _is_answer(side: str | Turns) -> bool:
    """Whether a side begins with the answer, not with the conversation before it."""
    return isinstance(side, str) or bool(side) and side[0]["role"] == "assistant"


def _differs(prompt: str | Turns, turns: Sequence[Mapping[str, Any]]) -> bool:
    return isinstance(prompt, list) and turns[: len(prompt)] != prompt
