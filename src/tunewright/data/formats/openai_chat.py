"""OpenAI's chat format: {"messages": [...], "tools": [...], "parallel_tool_calls": bool}."""

from __future__ import annotations

from typing import Any

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row, kind_of
from tunewright.data.formats.messages import read_messages, read_tools

KEYS = ("messages", "tools", "parallel_tool_calls", "functions")


def convert(row: Row, line: int) -> Conversation:
    """A chat row. Raises DataError with every problem of the row."""
    found = Findings(line)
    if len(row) > 1:
        found.unknown_keys(row, KEYS)
    messages = read_list(row, "messages", found)
    check_trainable(messages, found)
    tools, parallel = read_options(row, found)
    found.stop_if_any()
    return Conversation(messages=messages, tools=tools, parallel_tool_calls=parallel, source=line)


def read_list(row: Row, key: str, found: Findings, path: str = "") -> list[Message]:
    """The messages under `key`, or problems."""
    items = row.get(key)
    if items is None:
        found.missing(key, 'A row looks like {"messages": [{"role": "user", "content": "…"}, …]}.', path=path)
    elif not isinstance(items, list):
        found.add(f"has {path}{key} of type {kind_of(items)}; it must be an array of messages.", path + key, items)
    elif not items:
        found.add(f"has an empty {path}{key}.", path + key, items)
    else:
        return read_messages(items, path + key, found)
    return []


def read_options(row: Row, found: Findings, path: str = "") -> tuple[list[Row] | None, bool | None]:
    """Tools (also from the older `functions`) and parallel_tool_calls."""
    tools: list[Any] | None = None
    if row.get("tools") is not None:
        tools = read_tools(row["tools"], f"{path}tools", found)
    if row.get("functions") is not None:
        tools = (tools or []) + (read_tools(row["functions"], f"{path}functions", found, flat=True) or [])
    parallel = row.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        field = f"{path}parallel_tool_calls"
        found.add(f"has {field} of type {kind_of(parallel)}; use true or false.", field, parallel, ["true", "false"])
    return tools or None, parallel


def check_trainable(messages: list[Message], found: Findings) -> None:
    """Refuse a row that has nothing to learn from: no assistant turn, or all of them with weight 0."""
    if found.problems:
        return
    turns = [m for m in messages if m.role == "assistant"]
    if not turns:
        found.add("has no assistant message, so there is nothing to learn from.", "messages", allowed=["assistant"])
    elif all(m.weight == 0 for m in turns):
        found.add("has weight 0 on every assistant message, so there is nothing to learn from.", "messages", "0", ["1"])


FORMAT = Format(
    name="openai_chat",
    title="OpenAI chat",
    needs=(("messages",),),
    example='{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    convert=convert,
)
