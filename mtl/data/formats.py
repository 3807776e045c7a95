"""What a row holds. A format is one function from a row to an Example; a user's own is named
`package.module:function`.

    def mine(row: Mapping[str, Any], *, keyword: str = "default") -> Example

It raises RowProblem for a row it cannot use, which is then counted and reported.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

# Text, resolved when used: this floor cannot import mtl.recipes.
FORMATS = {
    "messages": "mtl.data.formats:messages",
    "prompt_completion": "mtl.data.formats:prompt_completion",
    "text": "mtl.data.formats:text",
    "labeled": "mtl.data.formats:labeled",
    "alpaca": "mtl.data.formats:alpaca",
    "sharegpt": "mtl.data.formats:sharegpt",
    "chat_rounds": "mtl.data.formats:chat_rounds",
    "preference": "mtl.data.preference:preference",
    "choices": "mtl.recipes.kpe.examples:choices",
}

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a turn, by model family


@dataclass(frozen=True)
class Messages:
    """A conversation for the chat template.

    Every assistant turn is a target with its end-of-turn token, except those in `context`.

    Attributes:
        messages: role, content, and whatever else the template reads (tool_calls, name ...).
        tools: JSON schemas of functions.
        context: numbers (from 0) of assistant turns that are no targets.
        may_drop: of LEFT_OUT, what the template may leave out.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    context: frozenset[int] = field(default=frozenset())
    may_drop: tuple[str, ...] = ()

    @property
    def last(self) -> int:
        """The number of the last turn that is a target."""
        said = (i for i, turn in enumerate(self.messages) if turn["role"] == "assistant")
        return max(i for i in said if i not in self.context)


@dataclass(frozen=True)
class Completion:
    """Two texts that are joined as they are, without a template or a space. The completion is the
    target.
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
class Pair:
    """Two answers to one prompt, the better one first. The two examples differ in their answers
    alone.

    Attributes:
        chosen, rejected: two Completions of one prompt, or two Messages of the same first turns.
        shared: turns of the prompt; 0 for Completions.
    """

    chosen: "Messages | Completion"
    rejected: "Messages | Completion"
    shared: int = 0


Example = Messages | Completion | Text | Labeled | Pair
Format = Callable[[Mapping[str, Any]], Example]


class RowProblem(ValueError):
    """Why a row cannot be used: a short `reason` that rows are counted by, and a text about this
    row.
    """

    def __init__(self, reason: str, text: str):
        super().__init__(reason, text)  # both, so that it can be sent from process to process
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


def messages(
    row: Mapping[str, Any],
    *,
    messages: str = "messages",
    tools: str = "tools",
    system: str = "system",
    roles: Mapping[str, str] | None = None,
    may_drop: Sequence[str] = (),
) -> Messages:
    """`{"messages": [{"role": "user", "content": "..."}, ...]}` and, where present, `tools`,
    `system` (the first turn).

    Content is text, or a list of text parts, which are joined. `weight: 0` or `train: false` makes
    a turn of the assistant context. `arguments` of `tool_calls` are an object or its JSON.

    Args:
        messages, tools, system: keys of the row.
        roles: further names of roles, and which of ROLES each is.
        may_drop: of LEFT_OUT, what the chat template may leave out of a row.
    """
    turns, context = _turns(_get(row, messages, list), messages, roles)
    turns, context = _led(row, system, turns, context, messages)
    return _conversation(turns, _tools(row, tools), context, may_drop)


def prompt_completion(
    row: Mapping[str, Any],
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    tools: str = "tools",
    may_drop: Sequence[str] = (),
) -> Completion | Messages:
    """`{"prompt": "...", "completion": "..."}`, two texts, or two lists of messages (TRL's
    conversational form).

    Of lists, the assistant's turns in the completion are the targets. Keywords rename the keys;
    `may_drop` as in `messages`.
    """
    if not isinstance(row.get(prompt), list):
        return Completion(_get(row, prompt, str), _get(row, completion, str))
    before, _ = _turns(_get(row, prompt, list), prompt)
    after, context = _turns(_get(row, completion, list), completion)
    context = {len(before) + i for i in context} | {
        i for i, turn in enumerate(before) if turn["role"] == "assistant"
    }
    return _conversation([*before, *after], _tools(row, tools), frozenset(context), may_drop)


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
    names in their order. Without it the names are those of the training rows, sorted.
    """
    # bool is an int in Python; `_get` refuses it as not text.
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
    may_drop: Sequence[str] = (),
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
    return _conversation(
        [{"role": role, "content": content} for role, content in turns], may_drop=may_drop
    )


def sharegpt(
    row: Mapping[str, Any],
    *,
    conversations: str = "conversations",
    role: str = "from",
    content: str = "value",
    system: str = "system",
    tools: str = "tools",
    may_drop: Sequence[str] = (),
) -> Messages:
    """`{"conversations": [{"from": "human" | "gpt" ..., "value": "..."}, ...]}` and, where present,
    `system`, `tools`.

    A `function_call` turn is the assistant's: JSON of `{"name", "arguments"}`, or of a list of
    them. `weight`, `train` and `may_drop` as in `messages`.
    """
    turns: list[Mapping[str, Any]] = []
    context = set()
    for i, turn in enumerate(_get(row, conversations, list), 1):
        at = f"{conversations}, turn {i}: "
        said = _get(_object(turn, conversations), content, str, at)
        # The number that this turn is about to get.
        if not _trained(turn, at):
            context.add(len(turns))
        if turn.get(role) == "function_call":
            turns.append({"role": "assistant", "content": "", "tool_calls": _calls(said, at)})
        else:
            turns.append(
                {"role": _role(_get(turn, role, str, at), SHAREGPT_ROLES, at), "content": said}
            )
    turns, context = _led(row, system, turns, context, conversations)
    return _conversation(turns, _tools(row, tools), context, may_drop)


def chat_rounds(
    row: Mapping[str, Any], *, chat_rounds: str = "chat_rounds", may_drop: Sequence[str] = ()
) -> Messages:
    """MFTCoder's `{"chat_rounds": [{"role": "system" | "human" | "bot", "content": "..."}, ...]}`,
    in list order; `may_drop` as in `messages`.
    """
    turns = []
    for i, turn in enumerate(_get(row, chat_rounds, list), 1):
        at = f"{chat_rounds}, turn {i}: "
        turn = _object(turn, chat_rounds)
        role, content = _get(turn, "role", str, at), _get(turn, "content", str, at)
        turns.append({"role": _role(role, MFTCODER_ROLES, at), "content": content})
    return _conversation(turns, may_drop=may_drop)


LEFT_OUT = ("reasoning", "system", "user", "tool", "assistant")
ROLES = ("system", "developer", "user", "assistant", "tool")
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


def wrong_values(
    keywords: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, ...], Any, str, Sequence[str]]]:
    """What `roles` and `may_drop` of a format here cannot hold: the path, what is found, what is
    wanted, and the words there are.
    """
    roles, may_drop = keywords.get("roles") or {}, keywords.get("may_drop", ())
    if not isinstance(roles, Mapping):
        yield ("roles",), roles, "a mapping of names to roles", ()
        roles = {}
    for name, role in roles.items():
        if role not in ROLES:
            yield ("roles", name), role, f"one of {', '.join(ROLES)}", ROLES
    for one in may_drop if isinstance(may_drop, list | tuple) else [may_drop]:
        if one not in LEFT_OUT:
            yield ("may_drop",), one, f"some of {', '.join(LEFT_OUT)}", LEFT_OUT


def _turns(
    said: Sequence[Any], key: str, roles: Mapping[str, str] | None = None
) -> tuple[list[Mapping[str, Any]], frozenset[int]]:
    """OpenAI's turns as the template gets them, and which of them are context, by number."""
    turns, context = [], set()
    for i, given in enumerate(said):
        at = f"{key}, turn {i + 1}: "
        # Arrow gives every turn every key; what a turn does not have is None.
        turn = {name: value for name, value in _object(given, key).items() if value is not None}
        turn["role"] = _role(
            _get(turn, "role", str, at),
            {**dict(zip(ROLES, ROLES, strict=True)), **(roles or {})},
            at,
        )
        if not _trained(turn, at):
            context.add(i)
        turn.pop("weight", None), turn.pop("train", None)
        # A turn with calls may lack content.
        if calls := turn.pop("tool_calls", None):
            turn["tool_calls"] = _objects(calls, f"{at}tool_calls")
        else:
            _get(turn, "content", (str, list), at)
        if isinstance(turn.get("content"), list):
            turn["content"] = "".join(_part(part, at) for part in turn["content"])
        turns.append(turn)
    return turns, frozenset(context)


def _led(
    row: Mapping[str, Any],
    system: str,
    turns: list[Mapping[str, Any]],
    context: Collection[int],
    key: str,
) -> tuple[list[Mapping[str, Any]], Collection[int]]:
    """Turns and their context, after the row's `system` where it has one."""
    if not row.get(system):
        return turns, context
    if turns and turns[0]["role"] == "system":
        raise RowProblem(
            "bad value", f"found {system} and a system turn in {key}, wanted one of them"
        )
    first = {"role": "system", "content": _get(row, system, str)}
    return [first, *turns], {i + 1 for i in context}


def _trained(turn: Mapping[str, Any], at: str) -> bool:
    """Whether a turn is trained: OpenAI's `weight` (0 or 1), axolotl's and others' `train`."""
    for key, wanted in (("weight", "0 or 1"), ("train", "true or false")):
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise RowProblem("bad value", f"{at}{key}: found {_show(value)}, wanted {wanted}")
    return turn.get("weight") != 0 and turn.get("train") in (None, 1)


def _part(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        raise RowProblem("bad value", f"{at}content: found the part {_show(part)}, wanted text")
    return text


def _conversation(
    turns: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    context: Collection[int] = (),
    may_drop: Sequence[str] = (),
) -> Messages:
    targets = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not targets:
        roles = ", ".join(turn["role"] for turn in turns) or "no turns"
        raise RowProblem("no target", f"found {roles}, wanted at least one turn of the assistant")
    context = frozenset(context).intersection(targets)
    if len(context) == len(targets):
        raise RowProblem("no target", "every turn of the assistant is context (weight 0, train)")
    for i in targets:
        texts = (turns[i].get(key) or "" for key in ("content", *REASONING))
        if i not in context and not turns[i].get("tool_calls") and not "".join(texts).strip():
            raise RowProblem("no target", f"turn {i + 1} (assistant) is empty")
    # The YAML may give one name alone.
    may_drop = (may_drop,) if isinstance(may_drop, str) else tuple(may_drop)
    # ValueError, not RowProblem: the config is wrong, not this row.
    if unknown := [one for one in may_drop if one not in LEFT_OUT]:
        raise ValueError(f"may_drop: found {unknown[0]!r}, wanted some of {', '.join(LEFT_OUT)}")
    return Messages(turns, tools, context, may_drop)


class Watched(dict):
    """A row, or an object within, that knows which of its keys have been read."""

    def __init__(self, row: Mapping[str, Any]):
        self._read: set[str] = set()
        # Lists go one level deep: that is where a conversation's turns stand.
        super().__init__(
            (key, [_watched(one) for one in value] if isinstance(value, list) else value)
            for key, value in row.items()
        )

    def unread(self) -> set[str]:
        """Keys that have not been read, a turn's as `conversations[].id`. An object without any
        read key was handed on as it is, so it does not count.
        """
        keys = set(super().keys()) - self._read
        for key in self._read & set(super().keys()):
            value = super().__getitem__(key)
            for one in value if isinstance(value, list) else ():
                if isinstance(one, Watched) and one._read:
                    keys |= {f"{key}[].{inner}" for inner in one.unread()}
        return keys

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self._read.update(super().keys())
        return super().keys()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    # A copy is a plain dict, and taking one counts as reading every key.
    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: deepcopy(value, memo) for key, value in self.items()}

    def __reduce__(self) -> Any:
        return dict, (list(self.items()),)


def _watched(turn: Any) -> Any:
    return Watched(turn) if isinstance(turn, dict) else turn


def without_nulls(row: Any, keys: Collection[str], inside: bool = False) -> Any:
    """A row without Arrow's nulls, at every depth below `keys`. Arrow puts a null where an object
    of a column lacks a key that others have.
    """
    if isinstance(row, list):
        return [without_nulls(one, keys, inside) for one in row]
    if not isinstance(row, dict):
        return row
    return {
        key: without_nulls(value, keys, inside or key in keys)
        for key, value in row.items()
        if not (inside and value is None)
    }


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


def _object(turn: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowProblem("bad value", f"{key}: found the turn {_show(turn)}, wanted an object")
    return turn


def _role(name: str, roles: Mapping[str, str], at: str) -> str:
    if name not in roles:
        raise RowProblem(
            "bad value", f"{at}found the role {name!r}, wanted one of {', '.join(roles)}"
        )
    return roles[name]


def _tools(row: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]] | None:
    """A list of schemas, which may be stored as JSON text where columns cannot hold one."""
    # An empty list or text is no tools.
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
    return _objects([{"type": "function", "function": call} for call in calls], at.rstrip(": "))


def _objects(calls: Any, at: str) -> list[Mapping[str, Any]]:
    """Calls with their `arguments` as objects. A template that writes `arguments | tojson` would
    quote a text a second time.
    """
    if not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise RowProblem("bad value", f"{at}: found {_show(calls)}, wanted a list of calls")
    made = []
    for call in calls:
        # OpenAI's calls stand within `function`; other data has them bare.
        function = call.get("function", call)
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = _json(function["arguments"], f"{at}, arguments")
            if not isinstance(arguments, dict):
                raise RowProblem(
                    "bad value", f"{at}, arguments: found {_show(arguments)}, wanted an object"
                )
            function = {**function, "arguments": arguments}
            call = {**call, "function": function} if "function" in call else function
        made.append(call)
    return made


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
