"""ShareGPT: {"conversations": [{"from": "human", "value": "…"}, …], "system"?, "tools"?, "chosen"?, "rejected"?}.

`function_call` turns become tool calls, `observation` turns their answers; with `chosen` and `rejected` it is a
preference row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tunewright.core.conversation import Conversation, FunctionCall, Message, ToolCall
from tunewright.core.errors import did_you_mean
from tunewright.data.formats.base import Findings, Format, Row, kind_of
from tunewright.data.formats.messages import read_tools, too_deep
from tunewright.data.formats.openai_chat import check_trainable

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


@dataclass
class _Calls:
    """The calls of a row so far. waiting: ids of the newest ones."""

    made: int = 0
    waiting: list[str] = field(default_factory=list)


def convert(row: Row, line: int) -> Conversation:
    """A ShareGPT row as a conversation. Raises DataError with every problem of the row."""
    found = Findings(line)
    system = found.text(row, "system", needed=False)
    tools = _tools(row.get("tools"), found)
    messages = [Message(role="system", content=system)] if system else []
    calls = _Calls()
    turns = row.get("conversations")
    if isinstance(turns, list) and turns:
        for i, turn in enumerate(turns):
            messages += _turn(turn, f"message {i + 1}", f"conversations[{i}]", calls, found)
    else:
        found.add("has conversations that are not an array with at least one turn.", "conversations", turns)
    pair = None
    if "chosen" in row or "rejected" in row:
        pair = [_answer(row.get(name), name, calls, found) for name in ("chosen", "rejected")]
    else:
        check_trainable(messages, found)
    found.stop_if_any()
    preferred, rejected = pair or (None, None)
    return Conversation(messages=messages, tools=tools, preferred=preferred, rejected=rejected, source=line)


def _turn(turn: Any, who: str, path: str, calls: _Calls, found: Findings) -> list[Message]:
    """One turn as a list of no or one message."""
    if not isinstance(turn, dict):
        found.add(f"{who} is of type {kind_of(turn)}; it must be an object with from and value.", path, turn)
        return []
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        near = did_you_mean(speaker, ROLES) if isinstance(speaker, str) else ""
        text = f"{who} is from {repr(speaker)[:80]}.{near} Use one of: {', '.join(ROLES)}."
        found.add(text, f"{path}.from", speaker, ROLES)
    elif not isinstance(value, str) or (role == "assistant" and not value.strip()):
        found.add(f"{who} ({speaker}) has no text in value.", f"{path}.value", value, ["text"])
    elif role == "function_call":
        return _call(value, who, path, calls, found)
    elif role == "tool":
        return _observation(value, who, path, calls, found)
    else:
        return [Message.model_validate({"role": role, "content": value})]
    return []


def _call(value: str, who: str, path: str, calls: _Calls, found: Findings) -> list[Message]:
    """A `function_call` turn: JSON text {"name", "arguments"}, or an array of them for parallel calls."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as e:
        found.add(f"{who} (function_call) is not valid JSON: {str(e)[:120]}.", f"{path}.value", value)
        return []
    made = []
    for item in parsed if isinstance(parsed, list) else [parsed]:
        name = item.get("name") if isinstance(item, dict) else None
        arguments = item.get("arguments", {}) if isinstance(item, dict) else None
        arguments = _as_object(arguments)
        if not isinstance(name, str) or not name or arguments is None:
            found.add(f'{who} (function_call) is not {{"name": …, "arguments": {{…}}}}.', f"{path}.value", value)
            return []
        calls.made += 1
        text = json.dumps(arguments, ensure_ascii=False)
        made.append(ToolCall(id=f"call_{calls.made}", function=FunctionCall(name=name, arguments=text)))
    calls.waiting = [c.id for c in made]
    if not made:
        found.add(f"{who} (function_call) is an empty array; it must hold a call.", f"{path}.value", value)
        return []
    return [Message(role="assistant", tool_calls=made)]


def _as_object(arguments: Any) -> Row | None:
    """Arguments as an object, also if they were written as JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, dict) and not too_deep(arguments) else None


def _observation(value: str, who: str, path: str, calls: _Calls, found: Findings) -> list[Message]:
    if not calls.waiting:
        found.add(f"{who} (observation) comes before any function_call.", f"{path}.from")
        return []
    # answers of parallel calls come in the order of the calls
    id_ = calls.waiting.pop(0) if len(calls.waiting) > 1 else calls.waiting[0]
    return [Message(role="tool", content=value, tool_call_id=id_)]


def _answer(value: Any, name: str, calls: _Calls, found: Findings) -> list[Message]:
    turn = {"from": "gpt", "value": value} if isinstance(value, str) else value
    answer = _turn(turn, name, name, calls, found)
    if answer and answer[0].role != "assistant":
        found.add(f"has {name} from {answer[0].role}; it must be from gpt.", name, answer[0].role, ["gpt"])
    return answer


def _tools(value: Any, found: Findings) -> list[Row] | None:
    """Definitions as JSON text or an array, with or without OpenAI's wrapping."""
    if value in (None, "", []):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            found.add(f"has tools that are not valid JSON: {str(e)[:120]}.", "tools", value)
            return None
    flat = isinstance(value, list) and any(isinstance(v, dict) and "function" not in v for v in value)
    return read_tools(value, "tools", found, flat=flat) or None


FORMAT = Format(
    name="sharegpt",
    title="ShareGPT",
    needs=(("conversations",),),
    example='{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
    convert=convert,
    knows=frozenset({"conversations", "system", "tools", "chosen", "rejected"}),
)
