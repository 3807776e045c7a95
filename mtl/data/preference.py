"""The format `preference`: two answers to one prompt, the better one named."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from mtl.data.formats import Completion, Preference, RowProblem, messages

Turns = list[Mapping[str, Any]]


def preference(
    row: Mapping[str, Any],
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    tools: str = "tools",
) -> Preference:
    """`{"prompt", "chosen", "rejected"}` as texts or as lists of messages, and, where present,
    `tools`; keywords rename the keys.

    Texts are joined as in `prompt_completion`. Where anything is a list, the row is a chat. A text
    beside a list is one turn, of the user (prompt) or of the assistant. Lists `chosen` and
    `rejected` may be whole conversations. Then the prompt is the turns that both begin with, and a
    given `prompt` must be among them.

    Raises:
        RowProblem: `equal sides`; `differing prompts`: the sides part before an assistant's turn;
            or the row does not have this form.
    """
    sides = [_value(row, key) for key in (chosen, rejected)]
    given = None if row.get(prompt) is None else _value(row, prompt)
    if sides[0] == sides[1]:
        raise RowProblem("equal sides", f"found {chosen} and {rejected} alike, wanted two answers")
    if all(isinstance(side, str) for side in sides) and isinstance(given, str):
        return Preference(*(Completion(given, side) for side in sides))
    if given is None and not all(isinstance(side, list) for side in sides):
        keys = ", ".join(row) or "(none)"
        raise RowProblem(
            "missing key", f"found the keys {keys}, wanted {prompt}, or both sides as conversations"
        )
    whole = [_conversation(given, side, prompt) for side in sides]
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*whole, strict=False))))
    for name, turns in zip((chosen, rejected), whole, strict=True):
        after = turns[shared]["role"] if shared < len(turns) else "no turn"
        if not shared or after != "assistant":
            where = f"after {shared} turns that both have, {name} goes on with {after}"
            raise RowProblem("differing prompts", f"{where}, wanted one of the assistant")
    checked = [messages({"messages": turns, "tools": row.get(tools)}) for turns in whole]
    return Preference(*checked, shared)


def _value(row: Mapping[str, Any], key: str) -> str | Turns:
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
    return [{name: each for name, each in turn.items() if each is not None} for turn in value]


def _conversation(prompt: str | Turns | None, side: str | Turns, name: str) -> Turns:
    """All turns of a side. The prompt's are added where it does not begin with them already."""
    turns = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
    if prompt is None:
        return turns
    if turns and turns[0]["role"] == "assistant":
        start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*start, *turns]
    asked = [turn.get("content") for turn in turns if turn["role"] != "assistant"]
    if isinstance(prompt, str) and prompt not in asked or _differs(prompt, turns):
        raise RowProblem("differing prompts", f"{name}: found another one than the conversations'")
    return turns


def _differs(prompt: str | Turns, turns: Sequence[Mapping[str, Any]]) -> bool:
    return isinstance(prompt, list) and turns[: len(prompt)] != prompt
