"""Chat templates: Jinja in a sandbox, with the settings that model authors expect, and a probe of what one can write.

A template comes with a model from somebody else, so it is untrusted: no attribute tricks (immutable sandbox), at most
TEMPLATE_LIMIT characters, at most OUTPUT_LIMIT characters of output, no huge repetitions. CPU time is not bounded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunewright.core.errors import UserError

TEMPLATE_LIMIT = 1 << 18
OUTPUT_LIMIT = 64 << 20
REPEAT_LIMIT = 1 << 20
# Filters and functions whose size argument could fill the memory; no chat template needs them.
UNUSED_FILTERS = ("center", "wordwrap", "xmlattr", "urlize")
# What a template that is wrong, or does not like its messages, may raise while it runs.
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses to repeat a text or list millions of times."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > REPEAT_LIMIT or abs(right) > 64):
            raise SecurityError("a power in the template is too large")
        sized = next((x for x in (left, right) if isinstance(x, (str, list, tuple))), None)
        times = right if sized is left else left
        if sized is not None and isinstance(times, int) and len(sized) * times > REPEAT_LIMIT:
            raise SecurityError("a repetition in the template is too long")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model writes; here it is only passed through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        scope = nodes.Scope(lineno=line)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return scope


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source: str, now: datetime | None = None) -> jinja2.Template:
    """A template ready to run. now: what its clock shows (None: the real time). Raises UserError if it is not valid."""
    if len(source) > TEMPLATE_LIMIT:
        raise UserError(f"The chat template has {len(source)} characters; the limit is {TEMPLATE_LIMIT}.")
    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for name in UNUSED_FILTERS:
        del env.filters[name]
    del env.globals["lipsum"]
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
    try:
        return env.from_string(source)
    except (jinja2.TemplateError, RecursionError, ValueError) as e:
        line = getattr(e, "lineno", None)
        raise UserError(f"The chat template is not valid{f' (line {line})' if line else ''}: {_say(e)}.") from e


def run_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The rendered text. Raises UserError if the template refuses, breaks or writes too much."""
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(**variables):
            size += len(part)
            if size > OUTPUT_LIMIT:
                raise SecurityError(f"it writes more than {OUTPUT_LIMIT >> 20} million characters")
            parts.append(part)
    except TEMPLATE_FAILURES as e:
        raise UserError(
            f"The model's chat template cannot write this conversation: {_say(e)}.",
            code="chat_template_error",
            param="messages",
        ) from e
    return "".join(parts)


def _say(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300].rstrip(".")


@dataclass(frozen=True)
class Abilities:
    """What a template can write, found out by rendering a probe.

    developer: it knows the role `developer` (otherwise such a message is written as `system`).
    arguments: how it wants tool call arguments: `object`, `text` (JSON), or '' if it leaves tool calls out.
    needs_content: it breaks on an assistant message without content (then an empty text is put there).
    tools: it writes the functions that are offered.
    """

    developer: bool
    arguments: str
    needs_content: bool
    tools: bool


_PROBE_ARGUMENTS = {"probe_key": "probe_value"}
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A probe."}}},
    },
}


def probe(source: str, render: Any) -> Abilities:
    """Find out what a template can write. render: (messages, tools) -> text, raises UserError."""
    forms = {"object": _PROBE_ARGUMENTS, "text": json.dumps(_PROBE_ARGUMENTS)}
    needs_content = all(_attempt(render, _probe_messages(value, None), None) is None for value in forms.values())
    content = "" if needs_content else None
    written = {form: _attempt(render, _probe_messages(value, content), None) or "" for form, value in forms.items()}
    with_tools = _attempt(render, [{"role": "user", "content": "probe"}], [_PROBE_TOOL]) or ""
    return Abilities(
        developer="developer" in source,
        arguments=next((form for form, text in written.items() if _is_json_or_tags(text)), ""),
        needs_content=needs_content,
        tools="probe_tool" in with_tools,
    )


def _probe_messages(arguments: Any, content: str | None) -> list[dict[str, Any]]:
    # nine characters: some templates insist on that length of an id
    call = {"id": "call00001", "type": "function", "function": {"name": "probe_call", "arguments": arguments}}
    answer: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
    if content is not None:
        answer["content"] = content
    return [{"role": "user", "content": "probe"}, answer]


def _is_json_or_tags(text: str) -> bool:
    """Whether the arguments came out readable: not left out, not escaped twice, not as a Python dictionary."""
    whole = "probe_call" in text and "probe_key" in text and "probe_value" in text
    return whole and '\\"probe_key' not in text and "'probe_key'" not in text


def _attempt(render: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
    try:
        return render(messages, tools)
    except UserError:
        return None
