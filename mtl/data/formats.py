"""What a row holds. A format is one function from a row to an Example; a user's own is named
`package.module:function`.

    def mine(row: Mapping[str, Any], *, keyword: str = "default") -> Example

It raises RowProblem for a row it cannot use, which is then counted and reported.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = {
    "messages": "mtl.data.formats:messages",
    "prompt_completion": "mtl.data.formats:prompt_completion",
    "text": "mtl.data.formats:text",
    "labeled": "mtl.data.formats:labeled",
    "alpaca": "mtl.data.formats:alpaca",
    "sharegpt": "mtl.data.formats:sharegpt",
    "chat_rounds": "mtl.data.formats:chat_rounds",
    "preference": "mtl.data.preference:preference",
}


@dataclass(frozen=True)
class Messages:
    """A conversation for the chat template. Every assistant turn is a target, its end-of-turn token
    included.
    """

    messages: Sequence[
        Mapping[str, Any]
    ]  # role, content, and whatever else the template reads (tool_calls, name ...)
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions


@dataclass(frozen=True)
class Completion:
    """Two texts that are put together as they are: no template and no space between. The completion
    is the target.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text of which every token is a target."""

    text: str


@dataclass(frozen=True)
class Labeled:
    """A text, or a pair of texts, with the name of its label."""

    text: str
    label: str
    pair: str | None = None
    labels: Sequence[str] | None = None  # the names there are, in their order; None: as found


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first: examples that differ in their answers alone.

    Attributes:
        chosen, rejected: two Completions of one prompt, or two Messages of the same first turns.
        shared: turns of the prompt; 0 for Completions.
    """

    chosen: "Messages | Completion"
    rejected: "Messages | Completion"
    shared: int = 0


Example = Messages | Completion | Text | Labeled | Preference
Format = Callable[[Mapping[str, Any]], Example]


class RowProblem(ValueError):
    """Why a row cannot be used: a short `reason` rows are counted by, and a text about this one."""

    def __init__(self, reason: str, text: str):
        super().__init__(reason, text)  # both, so that it can be sent from process to process
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


def messages(
    row: Mapping[str, Any], *, messages: str = "messages", tools: str = "tools"
) -> Messages:
    """`{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}`; keywords rename
    the keys.
    """
    turns = [_without_none(turn, messages) for turn in _get(row, messages, list)]
    for i, turn in enumerate(turns, 1):
        _get(turn, "role", str, f"{messages}, turn {i}: ")
        if "tool_calls" not in turn:
            _get(turn, "content", (str, list), f"{messages}, turn {i}: ")
    return _conversation(turns, _tools(row, tools))


def prompt_completion(
    row: Mapping[str, Any], *, prompt: str = "prompt", completion: str = "completion"
) -> Completion:
    """`{"prompt": "...", "completion": "..."}`; keywords rename the keys."""
    return Completion(_get(row, prompt, str), _get(row, completion, str))


def text(row: Mapping[str, Any], *, text: str = "text") -> Text:
    """`{"text": "..."}`; the keyword renames the key."""
    return Text(_get(row, text, str))


def labeled(
    row: Mapping[str, Any],
    *,
    text: str = "text",
    label: str = "label",
    pair: str | None = None,
    labels: Sequence[str] | None = None,
) -> Labeled:
    """`{"text": "...", "label": "..."}`, for a classifier; keywords rename the keys.

    A label is text or a whole number. `pair` names the key of a second text. `labels` lists the
    names in their order; without it they are those of the training rows, sorted.
    """
    found = row.get(label)
    if isinstance(found, bool) or not isinstance(found, str | int):
        found = _get(row, label, str)
    name = str(found).strip()
    if labels is not None and name not in [str(each) for each in labels]:
        known = ", ".join(map(str, labels))
        raise RowProblem("unknown label", f"{label}: found {_show(found)}, wanted one of {known}")
    second = None if pair is None else _get(row, pair, str)
    return Labeled(_get(row, text, str), name, second, labels and tuple(map(str, labels)))


def alpaca(
    row: Mapping[str, Any],
    *,
    instruction: str = "instruction",
    input: str = "input",
    output: str = "output",
    system: str = "system",
    history: str = "history",
    separator: str = "\n",
) -> Messages:
    """`{"instruction", "output"}` and, where present, `input`, `system`, `history` (pairs of
    earlier turns), as a chat.

    The user's turn is the instruction and, if there is an input, the separator and the input.
    """
    said = [_get(row, instruction, str), *([_get(row, input, str)] if row.get(input) else [])]
    turns = [("system", _get(row, system, str))] if row.get(system) else []
    for pair in _get(row, history, list) if row.get(history) else []:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(part, str) for part in pair)
        ):
            raise RowProblem(
                "bad value", f"{history}: found {_show(pair)}, wanted pairs [question, answer]"
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns += [("user", separator.join(said)), ("assistant", _get(row, output, str))]
    return _conversation([{"role": role, "content": content} for role, content in turns])


def sharegpt(
    row: Mapping[str, Any],
    *,
    conversations: str = "conversations",
    role: str = "from",
    content: str = "value",
    system: str = "system",
    tools: str = "tools",
) -> Messages:
    """`{"conversations": [{"from": "human" | "gpt" ..., "value": "..."}, ...]}` and, where present,
    `system`, `tools`.

    A `function_call` turn is the assistant's: JSON of `{"name", "arguments"}`, or of a list of
    them.
    """
    turns: list[Mapping[str, Any]] = []
    if row.get(system):
        turns.append({"role": "system", "content": _get(row, system, str)})
    for i, turn in enumerate(_get(row, conversations, list), 1):
        at = f"{conversations}, turn {i}: "
        said = _get(_without_none(turn, conversations), content, str, at)
        if turn.get(role) == "function_call":
            turns.append({"role": "assistant", "content": "", "tool_calls": _calls(said, at)})
        else:
            turns.append(
                {"role": _role(_get(turn, role, str, at), SHAREGPT_ROLES, at), "content": said}
            )
    return _conversation(turns, _tools(row, tools))


def chat_rounds(row: Mapping[str, Any], *, chat_rounds: str = "chat_rounds") -> Messages:
    """MFTCoder's `{"chat_rounds": [{"role": "system" | "human" | "bot", "content": "..."}, ...]}`,
    in list order.
    """
    turns = []
    for i, turn in enumerate(_get(row, chat_rounds, list), 1):
        at = f"{chat_rounds}, turn {i}: "
        turn = _without_none(turn, chat_rounds)
        role, content = _get(turn, "role", str, at), _get(turn, "content", str, at)
        turns.append({"role": _role(role, MFTCODER_ROLES, at), "content": content})
    return _conversation(turns)


MFTCODER_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "bot": "assistant",
    "assistant": "assistant",
}
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


def _conversation(
    turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> Messages:
    if all(turn["role"] != "assistant" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns) or "no turns"
        raise RowProblem("no target", f"found {roles}, wanted at least one turn of the assistant")
    return Messages(turns, tools)


def _get(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], at: str = "") -> Any:
    value = row.get(key)
    if value is None:
        raise RowProblem(
            "missing key", f"{at}found the keys {', '.join(row) or '(none)'}, wanted {key}"
        )
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join({str: "text", list: "a list"}[k] for k in kinds)
        raise RowProblem("bad value", f"{at}{key}: found {_show(value)}, wanted {wanted}")
    return value


def _without_none(turn: Any, key: str) -> Mapping[str, Any]:
    """Arrow gives every turn every key; what a turn does not have is None."""
    if not isinstance(turn, Mapping):
        raise RowProblem("bad value", f"{key}: found the turn {_show(turn)}, wanted an object")
    return {name: value for name, value in turn.items() if value is not None}


def _role(name: str, roles: Mapping[str, str], at: str) -> str:
    if name not in roles:
        raise RowProblem(
            "bad value", f"{at}found the role {name!r}, wanted one of {', '.join(roles)}"
        )
    return roles[name]


def _tools(row: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]] | None:
    """A list of schemas; where columns cannot hold one, it is stored as its JSON."""
    tools = row.get(key) or None
    if isinstance(tools, str):
        tools = _json(tools, key)
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise RowProblem("bad value", f"{key}: found {_show(tools)}, wanted a list of schemas")
    return tools


def _calls(said: str, at: str) -> list[Mapping[str, Any]]:
    found = _json(said, at.rstrip(": "))
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowProblem(
            "bad value", f'{at}found {_show(found)}, wanted {{"name": ..., "arguments": ...}}'
        )
    return [{"type": "function", "function": call} for call in calls]


def _json(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(
            "bad value", f"{at}: found {_show(text)}, wanted JSON ({error})"
        ) from error


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
