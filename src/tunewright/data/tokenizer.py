"""A model's tokenizer and chat template, from its folder, without transformers: the same ids and the same text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tunewright.core.errors import UserError
from tunewright.data.template import Abilities, compile_template, probe, run_template

# What belongs to a tokenizer in a model folder; generation_config.json holds the end tokens.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, and conversations to text.

    template: the chat template, '' if the model has none.
    special_tokens: named special tokens, e.g. {"eos_token": "<|im_end|>"}.
    eos_ids: every id that ends generation. eos_id: the tokenizer's own end token, bos_id its begin token, or None.
    special_ids: ids of all control tokens.
    decoder_start_id: the token with which an encoder-decoder begins its answer; None for every other model.
    takes_types: whether the model is told which text of a pair a token belongs to (BERT).
    """

    def __init__(
        self,
        data: str,
        *,
        templates: dict[str, str],
        special_tokens: dict[str, str],
        eos_ids: Iterable[int] = (),
        added: Iterable[tokenizers.AddedToken] = (),
        now: datetime | None = None,
        decoder_start_id: int | None = None,
        takes_types: bool = False,
    ) -> None:
        self.decoder_start_id = decoder_start_id
        self.takes_types = takes_types
        self._data = data
        self._added = list(added)
        self._now = now
        self._templates = templates
        self.template = templates.get("default", "")
        self.special_tokens = special_tokens
        self._tokenizer = self._make(data)
        # without it offsets keep leading spaces, and ids are the same where no special tokens are added
        self._tokenizer.post_processor = None
        self.special_ids = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self.eos_id = self._id("eos_token")
        self.bos_id = self._id("bos_token")
        self.eos_ids: set[int] = {*eos_ids, *([] if self.eos_id is None else [self.eos_id])}
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path | str, *, template: str | None = None, now: datetime | None = None) -> Tokenizer:
        """From a model folder (tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json).

        template: use this chat template instead of the model's own.
        now: what the template's clock shows, so that a resumed run renders as the first time; None: the real time.
        Raises UserError if the folder has no usable tokenizer.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"The model folder '{folder.name}' has no tokenizer.json. Save the tokenizer with transformers "
                "(AutoTokenizer.from_pretrained(…).save_pretrained(…)) to get one.",
                param="model",
            )
        config, model = _read_object(folder / "tokenizer_config.json"), _read_object(folder / "config.json")
        try:
            data = path.read_text(encoding="utf-8")
            templates = {"default": template} if template is not None else _templates(folder, config)
            return cls(
                data,
                templates=templates,
                special_tokens=_special_tokens(config, _read_object(folder / "special_tokens_map.json")),
                eos_ids=_eos_ids(folder),
                added=_added_tokens(config),
                now=now,
                decoder_start_id=_decoder_start(model),
                takes_types=(model.get("type_vocab_size") or 0) > 1,
            )
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"The tokenizer of '{folder.name}' cannot be read: {e}.", param="model") from e

    def encode(self, text: str, add_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the (start, end) of its characters in `text`.

        Several tokens of one character share its range. add_special: as the model's post-processor does (e.g. a begin
        token, with the range (0, 0)). Raises UserError for text that is not valid Unicode.
        """
        tokenizer = self._with_special if add_special else self._tokenizer
        try:
            found = tokenizer.encode(text, add_special_tokens=add_special)
        except TypeError as e:
            raise UserError("The text holds half of a surrogate pair, which is no character.") from e
        return found.ids, found.offsets

    def encode_row(self, text: str, pair: str | None = None) -> tuple[list[int], list[int]]:
        """([T] ids, [T] which text each token belongs to) of a whole row, as the model's post-processor frames it.

        pair: a second text; a tokenizer that has no frame for two puts it on a line of its own.
        Raises UserError for text that is not valid Unicode.
        """
        framed = pair is not None and "sep_token" in self.special_tokens
        whole = text if pair is None or framed else f"{text}\n{pair}"
        try:
            found = self._with_special.encode(whole, pair if framed else None)
        except TypeError as e:
            raise UserError("The text holds half of a surrogate pair, which is no character.") from e
        return found.ids, found.type_ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token(self, id_: int) -> str | None:
        """The token's own spelling, e.g. `<|im_end|>`."""
        return self._tokenizer.id_to_token(id_)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as the model's chat template writes it.

        messages: OpenAI's schema as plain data. Three things are adapted to the template (see Abilities): `developer`
        becomes `system` where unknown, tool call arguments become the kind it wants, missing content an empty text.
        Otherwise equal to transformers' apply_chat_template(tokenize=False). Raises UserError.
        """
        return self._run([self._adapt(m) for m in messages], tools, add_generation_prompt)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of render(): what the model is given."""
        return self.encode(self.render(messages, tools, add_generation_prompt))[0]

    @cached_property
    def abilities(self) -> Abilities:
        """What the chat template can write."""
        return probe("".join(self._templates.values()), self._run)

    @cached_property
    def vocabulary(self) -> str:
        """A hash of every token with its id: equal for models whose ids mean the same."""
        items = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda kv: kv[1])
        return hashlib.sha256(json.dumps(items).encode()).hexdigest()

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control tokens in text: the model would read them as such, not as text."""
        words = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        return re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True) if w) or "(?!)")

    def _run(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool = False
    ) -> str:
        if not self.template and "tool_use" not in self._templates:
            raise UserError("This model has no chat template; it can be trained on plain text only.", param="model")
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        variables = {
            **self.special_tokens,
            "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return run_template(self._compiled[name], variables)

    def _adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """One message as the template wants it."""
        if message.get("role") == "developer" and not self.abilities.developer:
            message = {**message, "role": "system"}
        if not message.get("tool_calls"):
            return message
        wanted = self.abilities
        calls = [_adapt_call(call, wanted.arguments) for call in message["tool_calls"]]
        filled = {"content": ""} if wanted.needs_content and message.get("content") is None else {}
        return {**message, **filled, "tool_calls": calls}

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {name: compile_template(source, self._now) for name, source in self._templates.items()}

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return self._make(self._data)

    def _make(self, data: str) -> tokenizers.Tokenizer:
        try:
            made = tokenizers.Tokenizer.from_str(data)
        except Exception as e:
            raise UserError(f"The model's tokenizer.json is damaged: {str(e)[:200]}.", param="model") from e
        made.no_truncation()
        made.no_padding()
        known = {t.content for t in made.get_added_tokens_decoder().values()}
        made.add_tokens([t for t in self._added if t.content not in known])
        return made

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


def _adapt_call(call: dict[str, Any], form: str) -> dict[str, Any]:
    """A tool call with its arguments as an object or as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    value = function["arguments"]
    if form == "object" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return call
    elif form == "text" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": value}}


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"The model's {path.name} is damaged: {str(e)[:200]}.", param="model") from e
    return value if isinstance(value, dict) else {}


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name. A file wins over tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    listed = config.get("chat_template")
    if isinstance(listed, str):
        found["default"] = listed
    elif isinstance(listed, list):
        found |= {t["name"]: t["template"] for t in listed if isinstance(t, dict) and {"name", "template"} <= t.keys()}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _special_tokens(config: dict[str, Any], older: dict[str, Any]) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    merged = {**older, **config, **(extra if isinstance(extra, dict) else {})}
    names = [*NAMED, *(extra if isinstance(extra, dict) else ())]
    texts = {name: _content(merged.get(name)) for name in names}
    return {name: text for name, text in texts.items() if text}


def _content(token: Any) -> str:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def _added_tokens(config: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """Tokens that tokenizer_config.json adds to tokenizer.json, by ascending id."""
    table = config.get("added_tokens_decoder")
    rows = sorted(table.items(), key=lambda kv: int(kv[0])) if isinstance(table, dict) else []
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        tokenizers.AddedToken(row["content"], **{f: bool(row[f]) for f in flags if f in row})
        for _, row in rows
        if isinstance(row, dict) and isinstance(row.get("content"), str)
    ]


def _decoder_start(config: dict[str, Any]) -> int | None:
    if not config.get("is_encoder_decoder"):
        return None
    start = config.get("decoder_start_token_id")
    if not isinstance(start, int):
        raise UserError("The model's config.json names no decoder_start_token_id, with which its answers begin.")
    return start


def _eos_ids(folder: Path) -> set[int]:
    """End ids of generation_config.json, and of config.json if that has none."""
    for name in ("generation_config.json", "config.json"):
        value = _read_object(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = {i for i in ids if isinstance(i, int) and not isinstance(i, bool)}
        if found:
            return found
    return set()
