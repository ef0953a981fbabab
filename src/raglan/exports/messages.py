"""The rules of one conversation: roles, contents, weights, calls of tools and their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from raglan.text import shortened

__all__ = ["Found", "conversation", "line_keys", "message", "tool_lists"]

Found = tuple[Literal["error", "warning"], str]
ROLES = ("system", "user", "assistant", "tool", "function")
KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal"}
MOST_FUNCTIONS = 128


def line_keys(row: Mapping[str, Any], allowed: set[str], *, where: str = "") -> Iterator[Found]:
    """A fault for each key that the form has no place for."""
    for key in row:
        if key not in allowed:
            yield "error", f"{where}unknown key {shortened(key)!r}; allowed are {', '.join(sorted(allowed))}"


def tool_lists(row: Mapping[str, Any]) -> Iterator[Found]:
    """`tools`, one or more; `functions`, 1 to 128, deprecated and not beside tools (ours); `parallel_tool_calls`, a truth."""
    tools, functions = row.get("tools"), row.get("functions")
    if "tools" in row and (not isinstance(tools, list) or not tools):
        yield "error", "`tools` must be a list that is not empty"
    for number, tool in enumerate(tools if isinstance(tools, list) else (), 1):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not _named(tool.get("function")):
            yield "error", f"tool {number} must be {{type: function, function: {{name, …}}}}"
    if "functions" in row:
        count = len(functions) if isinstance(functions, list) else 0
        if not 1 <= count <= MOST_FUNCTIONS:
            yield "error", f"`functions` holds {count}; it must be a list of 1 to {MOST_FUNCTIONS}"
        elif not all(map(_named, functions or ())):
            yield "error", "`functions`: each must be an object with a name"
        if "tools" in row:
            yield "error", "`functions` beside `tools`"
        else:
            yield "warning", "`functions` is deprecated: use `tools`"
    if "parallel_tool_calls" in row and not isinstance(row["parallel_tool_calls"], bool):
        yield "error", "`parallel_tool_calls` must be true or false"


def conversation(messages: Any, *, name: str = "messages") -> Iterator[Found]:
    """The messages one by one, and that every tool's words answer a call made before them."""
    if not isinstance(messages, list) or not messages:
        yield "error", f"`{name}` must be a list of messages that is not empty"
        return
    called: set[str] = set()
    for number, turn in enumerate(messages, 1):
        where = f"{name[:-1] if name == 'messages' else name} {number}"
        if not isinstance(turn, dict):
            yield "error", f"{where} is {type(turn).__name__}, not an object"
            continue
        yield from message(turn, where)
        yield from _answers(turn, called, where)
        called |= _calls(turn)


def message(turn: Mapping[str, Any], where: str) -> Iterator[Found]:
    """One message: a known role, content or a call in its place, a weight only where something is learned."""
    role = turn.get("role")
    if role == "developer":
        yield "warning", f"{where}: role developer is not taken by all readers; write system"
    elif role not in ROLES:
        yield "error", f"{where}: role is {role!r}; it must be one of {', '.join(ROLES)}"
    for key in turn:
        if key not in KEYS:
            yield "warning", f"{where}: unknown key {shortened(key)!r}"
    if "weight" in turn:
        weight = turn["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
            yield "error", f"{where}: weight is {weight!r}; it must be the number 0 or 1"
        if role != "assistant":
            yield "error", f"{where}: weight belongs to assistant messages, not to {role!r}"
    yield from _tool_calls(turn, where)
    if not _holds_something(turn.get("content")) and not _calls_instead(turn):
        yield "error", f"{where}: content is empty"


def _holds_something(content: Any) -> bool:
    if isinstance(content, list):
        return bool(content) and all(isinstance(part, dict) and _holds_part(part) for part in content)
    return isinstance(content, str) and bool(content.strip())


def _holds_part(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and bool(part.get(kind)) and (kind != "text" or bool(str(part[kind]).strip()))


def _calls_instead(turn: Mapping[str, Any]) -> bool:
    """An assistant that calls needs no words, but what stands in their place may be nothing else."""
    calls = bool(turn.get("tool_calls")) or bool(turn.get("function_call"))
    return turn.get("role") == "assistant" and calls and turn.get("content") in (None, "")


def _tool_calls(turn: Mapping[str, Any], where: str) -> Iterator[Found]:
    for key in ("tool_calls", "function_call"):
        if key in turn and turn.get("role") != "assistant":
            yield "error", f"{where}: `{key}` belongs to assistant messages"
    if "tool_calls" in turn:
        calls = turn["tool_calls"]
        if not isinstance(calls, list) or not calls or not all(map(_is_call, calls)):
            yield "error", f"{where}: `tool_calls` must be a list of {{id, type: function, function: {{name, arguments}}}}"
    if turn.get("function_call") is not None and not _named(turn["function_call"]):
        yield "error", f"{where}: `function_call` must be {{name, arguments}}"


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, dict) and isinstance(call.get("id"), str) and call.get("type") == "function"
        and _named(call.get("function")) and isinstance(call["function"].get("arguments"), str)
    )  # fmt: skip


def _named(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and bool(value["name"])


def _calls(turn: Mapping[str, Any]) -> set[str]:
    """What a later message may answer: ids of tool calls, names of functions."""
    calls = turn.get("tool_calls")
    ids = {str(call.get("id")) for call in calls if isinstance(call, dict)} if isinstance(calls, list) else set()
    one = turn.get("function_call")
    return ids | ({f"function {one.get('name')}"} if isinstance(one, dict) else set())


def _answers(turn: Mapping[str, Any], called: set[str], where: str) -> Iterator[Found]:
    if turn.get("role") == "tool" and str(turn.get("tool_call_id")) not in called:
        yield "error", f"{where}: tool_call_id {turn.get('tool_call_id')!r} answers no call before it"
    if turn.get("role") == "function" and f"function {turn.get('name')}" not in called:
        yield "error", f"{where}: function {turn.get('name')!r} was not called before it"
