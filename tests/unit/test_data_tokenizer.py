"""The tokenizer and chat templates against transformers: the same ids, the same text, byte for byte."""

from __future__ import annotations

import copy
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import _templates as kinds
import pytest

from tunewright.core.errors import UserError
from tunewright.data.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\tand tabs ",
    "é 你好 😀 👩‍👩‍👧 ñ",
    "a<|im_end|>\nb <|im_start|>c",
    "It is red.\r\n" * 20,
]


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids, offsets = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_special=True)[0] == reference.encode(text)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert offsets == sorted(offsets) and all(0 <= a <= b <= len(text) for a, b in offsets)
    assert not text or (offsets[0][0], offsets[-1][1]) == (0, len(text))


def test_offsets_keep_leading_spaces(tokenizer: Tokenizer) -> None:
    text = "It is red."
    assert "".join(text[a:b] for a, b in tokenizer.encode(text)[1]) == text


def test_special_ids(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.eos_id == reference.eos_token_id and tokenizer.bos_id == reference.bos_token_id
    assert tokenizer.eos_ids == {reference.eos_token_id}
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.special_ids == set(reference.all_special_ids)
    assert tokenizer.template == reference.chat_template


@pytest.mark.parametrize("name", list(kinds.ALL))
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", kinds.CHATS)
def test_text_is_that_of_apply_chat_template(
    tiny_model_dir: Path, reference: Any, name: str, prompt: bool, chat: list[dict[str, Any]]
) -> None:
    template = kinds.ALL[name]
    tokenizer = Tokenizer.load(tiny_model_dir, template=template)
    options = {"chat_template": template, "add_generation_prompt": prompt}
    assert tokenizer.render(chat, add_generation_prompt=prompt) == reference.apply_chat_template(
        chat, tokenize=False, **options
    )
    ids = reference.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_chat(chat, add_generation_prompt=prompt) == list(ids)


def test_tools_and_calls_as_transformers_writes_them(tiny_model_dir: Path, reference: Any) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir, template=kinds.TOOLS)
    objects = copy.deepcopy(kinds.TOOL_CHAT)
    call = objects[1]["tool_calls"][0]["function"]
    call["arguments"] = json.loads(call["arguments"])
    expected = reference.apply_chat_template(objects, tools=[kinds.TOOL], chat_template=kinds.TOOLS, tokenize=False)
    assert tokenizer.render(objects, tools=[kinds.TOOL]) == expected
    # OpenAI's wire has arguments as text; the template wants an object
    assert tokenizer.render(kinds.TOOL_CHAT, tools=[kinds.TOOL]) == expected
    assert '{"city": "Köln"}' in expected and "“city”" in expected


def test_arguments_stay_text_where_the_template_wants_text(tiny_model_dir: Path, reference: Any) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir, template=kinds.TEXT_ARGUMENTS)
    assert tokenizer.abilities.arguments == "text"
    expected = reference.apply_chat_template(kinds.TOOL_CHAT, chat_template=kinds.TEXT_ARGUMENTS, tokenize=False)
    assert tokenizer.render(kinds.TOOL_CHAT) == expected


@pytest.mark.parametrize(
    ("template", "developer", "arguments", "needs_content", "tools"),
    [
        (kinds.CHATML, False, "", True, False),
        (kinds.TOOLS, False, "object", False, True),
        (kinds.TEXT_ARGUMENTS, False, "text", False, False),
        (kinds.OTHER_END, True, "", False, False),
        (kinds.TOOLS.replace("| tojson }}{{- '}", "}}{{- '}"), False, "object", False, True),
    ],
)
def test_abilities(
    tiny_model_dir: Path, template: str, developer: bool, arguments: str, needs_content: bool, tools: bool
) -> None:
    found = Tokenizer.load(tiny_model_dir, template=template).abilities
    assert (found.developer, found.arguments) == (developer, arguments)
    assert (found.needs_content, found.tools) == (needs_content, tools)


def test_developer_becomes_system_only_where_unknown(tiny_model_dir: Path) -> None:
    chat = [{"role": "developer", "content": "Be brief."}, *kinds.CHATS[0]]
    as_system = [{"role": "system", "content": "Be brief."}, *kinds.CHATS[0]]
    plain = Tokenizer.load(tiny_model_dir, template=kinds.CHATML)
    assert plain.render(chat) == plain.render(as_system)
    assert "[dev] <|im_start|>developer" in Tokenizer.load(tiny_model_dir, template=kinds.OTHER_END).render(chat)


def test_the_clock_can_be_held(tiny_model_dir: Path) -> None:
    template = "{{ strftime_now('%d.%m.%Y') }}"
    held = Tokenizer.load(tiny_model_dir, template=template, now=datetime(2001, 2, 3))
    assert held.render([]) == "03.02.2001"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[9].content + 'x' }}", "undefined|no element"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages | tojson | int + 'a' }}", "unsupported operand"),
        ("{{ 'a' * 2000000000 }}", "repetition"),
        ("{{ 2 ** 99999999 }}", "power"),
        (
            "{% for i in range(99999) %}{% for j in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
            "writes more",
        ),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% import 'x' as y %}", "loader"),
    ],
)
def test_a_template_that_misbehaves_is_one_clear_error(tiny_model_dir: Path, template: str, words: str) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir, template=template)
    with pytest.raises(UserError, match=rf"chat template cannot write this conversation: .*({words})") as e:
        tokenizer.render(kinds.CHATS[0])
    assert e.value.code == "chat_template_error"


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'a' ", "{{ x | nofilter }}", "{% generation %}", "x" * 300_000])
def test_a_template_that_does_not_compile(tiny_model_dir: Path, template: str) -> None:
    with pytest.raises(UserError, match="The chat template"):
        Tokenizer.load(tiny_model_dir, template=template).render(kinds.CHATS[0])


def test_a_model_without_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.template == ""
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render(kinds.CHATS[0])


def test_named_templates_and_extra_tokens_of_the_config(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": kinds.CHATML},
        {"name": "tool_use", "template": kinds.TOOLS},
    ]
    config["eos_token"] = {"content": "<|endoftext|>", "__type": "AddedToken"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    tokenizer, reference = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    chat = kinds.CHATS[0]
    for tools in (None, [kinds.TOOL]):
        assert tokenizer.render(chat, tools) == reference.apply_chat_template(chat, tools=tools, tokenize=False)
    assert tokenizer.eos_ids == {1, 2, reference.eos_token_id} and tokenizer.eos_id == reference.eos_token_id


def test_damaged_and_missing_tokenizers(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*' has no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)
    shutil.copy(tiny_model_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json is damaged"):
        Tokenizer.load(tmp_path)


def test_half_a_character_is_one_clear_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")
