"""Chat templates of the kinds that models have, written for the tests, with messages that go through all of them."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Adds a system turn of its own, like SmolLM2's.
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tools as JSON in the system turn, calls as tags with JSON inside, arguments wanted as an object.
TOOLS = """{%- if tools %}
{{- '<|im_start|>system\\nTools:\\n' }}
{%- for tool in tools %}
{{- tool | tojson }}{{ '\\n' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Glues the arguments as text, so that an object breaks it.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Keeps the thinking of the last answer only, like Qwen3's.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought that past turns do not have.
PROMPT_THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# The same with calls written before the content, like Gemma's.
CALLS_FIRST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# No control tokens at all.
NO_END = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# Ends turns with a token that is not an end token of the model, knows `developer`, strips content.
OTHER_END = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ '[dev] ' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Whitespace control, loop controls, generation marks, a date and default values.
SYNTAX = """{%- set shout = shout | default(false) %}
{% for m in messages %}
    {% if m.role == 'tool' %}
        {% continue %}
    {% endif %}
<|im_start|>{{ m.role }}
{% generation %}{{ m.content | trim }}{% endgeneration %}<|im_end|>
{% endfor %}
{{ eos_token }}{{ strftime_now('%Y') }}{{ {'a': '<é>'} | tojson }}{% if not undefined_thing %}!{% endif %}
"""
ALL = {
    "chatml": CHATML,
    "default_system": DEFAULT_SYSTEM,
    "tools": TOOLS,
    "thinking": THINKING,
    "prompt_thinks": PROMPT_THINKS,
    "no_end": NO_END,
    "other_end": OTHER_END,
    "syntax": SYNTAX,
}
CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief. é 你好 😀"},
        {"role": "user", "content": "  What is 1+1?\n"},
        {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\nTwo"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "\n Yes. 你好 \t"},
    ],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather in a “city”.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 9}'},
    {"role": "assistant", "content": "It has 9 degrees."},
]
