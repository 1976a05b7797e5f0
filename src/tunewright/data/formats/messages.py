"""The rules of OpenAI's chat messages, shared by the formats. Field paths count from 0, words for people from 1."""

from __future__ import annotations

import json
from typing import Any

from tunewright.core.conversation import ROLES, FunctionCall, Message, ToolCall
from tunewright.core.errors import did_you_mean
from tunewright.data.formats.base import BAD_FORMAT, Findings, Row, kind_of

DEPTH = 64
_TEXT_KEYS = frozenset({"role", "content", "name"})
# `refusal`, `annotations` and `audio` come along when an answer of the API is saved as it is; they must be empty.
EMPTY = frozenset({"refusal", "annotations", "audio"})
KEYS: dict[str, frozenset[str]] = {
    "system": _TEXT_KEYS,
    "developer": _TEXT_KEYS,
    "user": _TEXT_KEYS,
    "assistant": _TEXT_KEYS | {"weight", "tool_calls", "function_call"} | EMPTY,
    "tool": _TEXT_KEYS | {"tool_call_id"},
    "function": _TEXT_KEYS,
}


def read_messages(items: list[Any], path: str, found: Findings) -> list[Message]:
    """Messages from plain data; what is wrong goes to `found` and the list is then incomplete."""
    messages: list[Message] = []
    calls: dict[str, str] = {}  # id of every call so far -> name of the function
    for i, item in enumerate(items):
        message = _plain_message(item) or _read_message(item, i, f"{path}[{i}]", calls, found)
        if message is not None:
            messages.append(message)
    return messages


def _plain_message(item: Any) -> Message | None:
    """The short way for most messages: a role and a text, and nothing else."""
    if type(item) is not dict or len(item) != 2:
        return None
    role: Any = item.get("role")
    content = item.get("content")
    plain = type(content) is str and (role in ("user", "system") or (role == "assistant" and content.strip()))
    return Message(role=role, content=content) if plain else None


def _read_message(item: Any, i: int, path: str, calls: dict[str, str], found: Findings) -> Message | None:
    who = f"message {i + 1}"
    if not isinstance(item, dict):
        found.add(f"{who} is of type {kind_of(item)}; it must be an object with role and content.", path, item)
        return None
    role, content = item.get("role"), item.get("content")
    if not _role_is_known(role, who, path, found):
        return None
    item = {k: v for k, v in item.items() if v is not None and not (k in EMPTY and v == [])}
    _check_keys(item, str(role), who, path, found)
    fields: dict[str, Any] = {"role": role, "content": _content(content, who, path, found)}
    if "name" in item:
        fields["name"] = _text(item, "name", who, path, found)
    before = len(found.problems)
    _READ.get(str(role), _read_plain)(item, fields, f"{who} ({role})", path, calls, found)
    return None if len(found.problems) > before else Message(**fields)


def _role_is_known(role: Any, who: str, path: str, found: Findings) -> bool:
    if isinstance(role, str) and role in KEYS:
        return True
    use = f"Use one of: {', '.join(ROLES)}."
    if role is None:
        found.add(f"{who} Discriminator 'role' is missing in value. {use}", f"{path}.role", "", ROLES)
    else:
        near = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        found.add(f"{who} has role {repr(role)[:80]}.{near} {use}", f"{path}.role", role, ROLES)
    return False


def _check_keys(item: Row, role: str, who: str, path: str, found: Findings) -> None:
    if item.keys() <= KEYS[role] - EMPTY:
        return
    known = KEYS[role] - EMPTY
    if "weight" in item and role != "assistant":
        found.add(
            f'{who} contains an extra "weight": only assistant messages may have one.',
            f"{path}.weight",
            item["weight"],
            code=BAD_FORMAT,
        )
    for key in EMPTY & item.keys() & KEYS[role]:
        found.add(f"{who} has {key}, which cannot be trained; put the text into content.", f"{path}.{key}", item[key])
    rest = {k: v for k, v in item.items() if k not in EMPTY and k != "weight"}
    found.unknown_keys(rest, known, f"{who} ", f"{path}.")


def _content(content: Any, who: str, path: str, found: Findings) -> str | None:
    """Text, or text parts joined. None stays None: whether that is allowed depends on the role."""
    if content is None or isinstance(content, str):
        return content
    field = f"{path}.content"
    if not isinstance(content, list):
        found.add(f"{who} has content of type {kind_of(content)}; it must be text or text parts.", field, content)
        return None
    texts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "input_image", "input_audio", "file"):
            found.add(
                f"{who} has a content part of type '{kind}'. Only text can be trained; remove the row or the part.",
                f"{field}[{j}]",
                str(kind),
                ["text"],
            )
        else:
            found.add(
                f'{who} has a content part that is not {{"type": "text", "text": "…"}}.',
                f"{field}[{j}]",
                part,
                ["text"],
            )
    return "".join(texts)


def _text(item: Row, key: str, who: str, path: str, found: Findings) -> str:
    value = item.get(key)
    if isinstance(value, str) and value:
        return value
    if value is None:
        found.missing(key, who=f"{who} ", path=f"{path}.")
    else:
        found.add(f"{who} has {key} of type {kind_of(value)}; it must be text.", f"{path}.{key}", value, ["text"])
    return ""


def _read_plain(item: Row, fields: Row, who: str, path: str, calls: dict[str, str], found: Findings) -> None:
    if "content" not in item:
        found.missing("content", who=f"{who} ", path=f"{path}.")


def _read_assistant(item: Row, fields: Row, who: str, path: str, calls: dict[str, str], found: Findings) -> None:
    if "weight" in item:
        fields["weight"] = _weight(item["weight"], who, path, found)
    if "tool_calls" in item:
        fields["tool_calls"] = _tool_calls(item["tool_calls"], who, f"{path}.tool_calls", found)
    elif "function_call" in item:
        call = {"id": f"call_{len(calls) + 1}", "type": "function", "function": item["function_call"]}
        fields["tool_calls"] = _tool_calls([call], who, f"{path}.function_call", found)
    for call in fields.get("tool_calls") or ():
        calls[call.id] = call.function.name
    wrong = fields["content"] is None and "content" in item  # said already
    silent = not wrong and not (fields["content"] or "").strip() and not {"tool_calls", "function_call"} & item.keys()
    if silent and fields.get("weight") != 0:
        found.add(
            f"{who} has neither content nor tool_calls, so there is nothing to learn from; give it text or weight 0.",
            f"{path}.content",
            fields["content"] or "",
            ["text that is not empty"],
        )
    elif silent and fields["content"] is None:
        fields["content"] = ""


def _weight(value: Any, who: str, path: str, found: Findings) -> float | None:
    if not isinstance(value, bool) and isinstance(value, (int, float)) and value in (0, 1):
        return float(value)
    found.add(f"{who} has weight {repr(value)[:80]}. Use 0 or 1.", f"{path}.weight", value, ["0", "1"])
    return None


def _tool_calls(items: Any, who: str, path: str, found: Findings) -> list[ToolCall]:
    if not isinstance(items, list) or not items:
        found.add(f"{who} has tool_calls that are not an array with at least one call.", path, items)
        return []
    calls = [_tool_call(item, who, f"{path}[{j}]", found) for j, item in enumerate(items)]
    return [c for c in calls if c is not None]


def _tool_call(item: Any, who: str, path: str, found: Findings) -> ToolCall | None:
    function = item.get("function") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(function, dict):
        found.add(
            f'{who} has a call that is not {{"id": …, "type": "function", "function": {{"name", "arguments"}}}}.',
            path,
            item,
        )
        return None
    before = len(found.problems)
    found.unknown_keys(item, ("id", "type", "function", "index"), f"{who} call ", f"{path}.")
    found.unknown_keys(function, ("name", "arguments"), f"{who} function ", f"{path}.function.")
    if item.get("type", "function") != "function":
        found.add(f"{who} has a call of type {item['type']!r:.80}.", f"{path}.type", item["type"], ["function"])
    id_ = _text(item, "id", f"{who} call", path, found)
    name = _text(function, "name", f"{who} function", f"{path}.function", found)
    arguments = _arguments(function.get("arguments"), who, f"{path}.function.arguments", found)
    if len(found.problems) > before:
        return None
    return ToolCall(id=id_, function=FunctionCall(name=name, arguments=arguments))


def _arguments(value: Any, who: str, path: str, found: Findings) -> str:
    """Arguments as JSON text of an object."""
    allowed = ["JSON text of an object"]
    if not isinstance(value, str):
        hint = " Wrap the object with json.dumps." if isinstance(value, dict) else ""
        found.add(f"{who} has arguments of type {kind_of(value)}; they must be JSON text.{hint}", path, value, allowed)
        return ""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as e:
        found.add(f"{who} has arguments that are not valid JSON: {str(e)[:120]}.", path, value, allowed)
        return ""
    if not isinstance(parsed, dict) or too_deep(parsed):
        what = "nested too deeply" if isinstance(parsed, dict) else f"JSON of type {kind_of(parsed)}"
        found.add(f"{who} has arguments that are {what}; they must be the text of a JSON object.", path, value, allowed)
        return ""
    return value


def _read_tool(item: Row, fields: Row, who: str, path: str, calls: dict[str, str], found: Findings) -> None:
    _read_plain(item, fields, who, path, calls, found)
    id_ = fields["tool_call_id"] = _text(item, "tool_call_id", who, path, found)
    if id_ and id_ not in calls:
        earlier = f"Earlier calls: {', '.join(list(calls)[:10])}." if calls else "There is no earlier call."
        found.add(
            f"{who} answers the call '{id_[:80]}', which no earlier assistant message made."
            f"{did_you_mean(id_, calls)} {earlier}",
            f"{path}.tool_call_id",
            id_,
            list(calls)[:10],
        )


def _read_function(item: Row, fields: Row, who: str, path: str, calls: dict[str, str], found: Findings) -> None:
    """The older role `function` names the function instead of the call."""
    _read_plain(item, fields, who, path, calls, found)
    name = _text(item, "name", who, path, found)
    ids = [id_ for id_, called in calls.items() if called == name]
    if name and not ids:
        found.add(
            f"{who} answers '{name[:80]}', which no earlier message called.", f"{path}.name", name, set(calls.values())
        )
    elif name:
        fields.update(role="tool", tool_call_id=ids[-1])


_READ = {"assistant": _read_assistant, "tool": _read_tool, "function": _read_function}


def read_tools(items: Any, path: str, found: Findings, *, flat: bool = False) -> list[Row] | None:
    """Function definitions in OpenAI's schema. flat: written without {"type": "function", "function": …} around."""
    if not isinstance(items, list):
        found.add(f"has {path} of type {kind_of(items)}; it must be an array of functions.", path, items)
        return None
    tools = []
    for j, item in enumerate(items):
        where = f"{path}[{j}]" if flat else f"{path}[{j}].function"
        function = item if flat or not isinstance(item, dict) else item.get("function")
        if not isinstance(function, dict) or not isinstance(item, dict):
            shape = '{"name": …}' if flat else '{"type": "function", "function": {"name": …, "parameters": …}}'
            found.add(f"has {path}[{j}] that is not {shape}.", where, item)
        elif not flat and item.get("type") != "function":
            found.add(f"has {path}[{j}] of type {item.get('type')!r:.80}.", f"{path}[{j}].type", "", ["function"])
        elif not isinstance(function.get("name"), str) or not function["name"]:
            found.missing("name", path=f"{where}.", who=f"{where} ")
        elif too_deep(function):
            found.add(f"has {where} nested deeper than {DEPTH} levels.", where)
        else:
            tools.append({"type": "function", "function": function})
    return tools


def too_deep(value: Any, depth: int = DEPTH) -> bool:
    """Whether plain data is nested deeper than `depth`, without recursing further than that."""
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(too_deep(v, depth - 1) for v in inner)
