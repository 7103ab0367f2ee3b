"""Lists of messages as data sets write them: roles, texts, typed parts, reasoning, function calls, loss weights.

OpenAI's older names for calls are read as the newer ones: `function_call` of a message as its only tool call,
`functions` of a record as its `tools`. What holds both is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sft_dist.data.strict_json import kind_of, loads
from sft_dist.errors import BadRecord
from sft_dist.types import Message

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_PLAIN_ROLES = {said: role for said, role in _ROLES.items() if said != "function_call"}
MAX_WEIGHT = 1_000_000  # sums of larger ones lose the smaller in float32
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_WEIGHT_KEYS = ("weight", "loss_weight", "train")
_CALL_KEYS = ("tool_calls", "function_call")
_TOOL_KEYS = ("tools", "functions")
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")


def read_messages(turns: Iterable[Any], role_key: str, content_key: str) -> list[Message]:
    """Messages from objects with `role_key` and `content_key` (role/content or from/value); raises BadRecord."""
    return [_message(turn, number, role_key, content_key) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, number: int, role_key: str, content_key: str) -> Message:
    if type(turn) is dict and len(turn) == 2:  # nothing but a role and a text: most messages
        said, text = turn.get(role_key), turn.get(content_key)
        if type(said) is str and type(text) is str and said in _PLAIN_ROLES:
            return Message(_PLAIN_ROLES[said], text)
    if not isinstance(turn, Mapping) or role_key not in turn:
        raise BadRecord(f"message {number} must be an object with {role_key!r} and {content_key!r}")
    said = turn[role_key]
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRecord(f"message {number} has the unknown role {said!r}: known are {', '.join(_ROLES)}")
    if held := [key for key in MEDIA_KEYS if turn.get(key)]:
        raise BadRecord(f"message {number} is multimodal (field {held[0]!r}): only text is trained on")
    calling = _only_one(turn, _CALL_KEYS, f"message {number}: ")
    if turn.get(content_key) is None and not calling:
        raise BadRecord(f"message {number} ({role}) has no {content_key!r}")
    text, extra = _content(turn.get(content_key), number)
    if said == "function_call":
        text, extra = "", {"tool_calls": _calls(loads, text, number)}
    if calling and (role != "assistant" or "tool_calls" in extra):
        why = "holds another one" if role == "assistant" else f"is of the role {role!r}"
        raise BadRecord(f"message {number} has a call under {calling!r}, but {why}")
    if calling:
        extra["tool_calls"] = _calls(list if calling == "tool_calls" else lambda call: call, turn[calling], number)
    extra |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return Message(role, text, _weight(turn, number), extra | reasoning_of(turn))


def _only_one(value: Mapping[str, Any], keys: Iterable[str], where: str = "") -> str | None:
    """Which of `keys`, names of the same thing, holds something."""
    held = [key for key in keys if value.get(key)]
    if len(held) > 1:
        raise BadRecord(f"{where}both {held[0]!r} and {held[1]!r} are given: keep one")
    return held[0] if held else None


def reasoning_of(turn: Mapping[str, Any]) -> dict[str, str]:
    """The thoughts that stand beside an answer, as extra of its message."""
    return _reasoning(next((turn[key] for key in _REASONING_KEYS if isinstance(turn.get(key), str)), None))


def _reasoning(text: str | None) -> dict[str, str]:
    """Under the two names that templates read."""
    return {"reasoning_content": text, "thinking": text} if text else {}


def _content(content: Any, number: int) -> tuple[str, dict[str, Any]]:
    """Text of a message given as a string, null, or typed parts; reasoning and calls among the parts go to extra."""
    if content is None or isinstance(content, str):
        return content or "", {}
    if not isinstance(content, list):
        raise BadRecord(f"message {number}: content must be text, it is {kind_of(content)}")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        said = part.get("text", part.get("value", part.get("content"))) if isinstance(part, Mapping) else None
        if kind in ("text", "tool_result") and isinstance(said, str):
            texts.append(said)
        elif kind in ("reasoning", "thinking") and isinstance(said, str):
            reasoning.append(said)
        elif kind == "tool_call":
            calls += _calls(loads if isinstance(said, str) else lambda call: call, said, number)
        else:
            raise BadRecord(f"message {number} has a content part of type {kind!r}: only text is trained on")
    extra: dict[str, Any] = _reasoning("".join(reasoning) or None)
    return "".join(texts), extra | ({"tool_calls": calls} if calls else {})


def _calls(parse: Callable[[Any], Any], given: Any, number: int) -> list[dict[str, Any]]:
    """Function calls as templates expect them: type, function name, arguments as a mapping."""
    try:
        parsed = parse(given)
    except (ValueError, TypeError) as error:
        raise BadRecord(f"message {number}: the function call is not JSON: {error}") from None
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _arguments(arguments)
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise BadRecord(f"message {number}: a function call needs 'name' (text) and 'arguments' (object)")
        _check_json(arguments, f"message {number}: the arguments of {name!r}")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}})
    return calls


def _arguments(text: str) -> Any:
    try:
        return loads(text) if text.strip() else {}
    except ValueError:
        return None


def _weight(turn: Mapping[str, Any], number: int) -> float | None:
    """The message's own loss weight, under the names in use; where it has several they say the same."""
    given = {key: turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None}
    for key, weight in given.items():
        if not isinstance(weight, (bool, int, float)) or not 0 <= weight <= MAX_WEIGHT:
            raise BadRecord(f"message {number}: {key} must be a number from 0 to {MAX_WEIGHT:,}, it is {weight!r}")
    weights = {float(weight) for weight in given.values()}
    if len(weights) > 1:
        said = " and ".join(f"{key}={weight!r}" for key, weight in given.items())
        raise BadRecord(f"message {number} says {said}, which disagree on what is learned: keep one")
    return next(iter(weights), None)


def tools_of(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The function definitions of a record in OpenAI's shape: from a list (wrapped or bare), or that as JSON text."""
    key = _only_one(value, _TOOL_KEYS)
    if key is None:
        return []
    tools = value[key]
    if isinstance(tools, str):
        try:
            tools = loads(tools) if tools.strip() else []
        except ValueError as error:
            raise BadRecord(f"field {key!r} is not JSON: {error}") from None
    if not isinstance(tools, list):
        raise BadRecord(f"field {key!r} must be a list, it is {kind_of(tools)}")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise BadRecord(f"a tool must be an object with name and parameters, it is {kind_of(tool)}")
    _check_json(tools, f"field {key!r}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON cannot hold, such as the dates of typed tables: each template would write it in its own way."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise BadRecord(f"{where}: {error}; write it as text") from None
