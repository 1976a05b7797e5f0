"""GGUF -> safetensors, once. Weights become float32, which is exact: float16 or bfloat16 would round a 4-bit block's
scale * level + minimum. The tokenizer gets the text-splitting rule that the file names.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tunewright.core.errors import UserError
from tunewright.ops.runtime import quiet


def _smollm() -> pre_tokenizers.PreTokenizer:
    """SmolLM's vocabulary was learned with every digit on its own."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# Rules that transformers does not set by itself. `default` and `gpt-2` are what it does without being told.
SPLITTERS = {"smollm": _smollm}
PLAIN = {"", "default", "gpt-2"}


def convert(path: Path, folder: Path) -> dict[str, Any]:
    """Write config, safetensors, tokenizer and generation config of the GGUF file into `folder`.

    Returns {"dtype", "tokenizer_rule", "tensor_types"} for the record. Raises UserError for a file that is not GGUF,
    that transformers cannot map, or whose text-splitting rule is not known (its token ids would be silently wrong).
    """
    header = _header(path)
    rule = header["tokenizer_rule"]
    if header["tokenizer_model"] == "gpt2" and rule not in {*PLAIN, *SPLITTERS, *GGUF_PRE_TOKENIZER_SPLITS}:
        raise UserError(
            f"The tokenizer of {path.name} splits text by the rule '{rule}', which is not known here, so its token ids "
            "would be wrong. Use the model's safetensors folder instead.",
            param="model",
        )
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bare progress bar inside transformers
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as e:
            raise UserError(f"The file {path.name} cannot be converted: {_first_line(e)}", param="model") from e
    if rule in SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = SPLITTERS[rule]()
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)  # the weights are plain now; transformers would refuse to save them
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"dtype": "float32", "tokenizer_rule": rule, "tensor_types": header["tensor_types"]}


def _header(path: Path) -> dict[str, Any]:
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path.name} is not a readable GGUF file: {_first_line(e)}", param="model") from e

    def text(key: str) -> str:
        field = reader.get_field(key)
        return str(field.contents()) if field is not None else ""

    return {
        "tokenizer_model": text("tokenizer.ggml.model"),
        "tokenizer_rule": text("tokenizer.ggml.pre"),
        "tensor_types": sorted({t.tensor_type.name for t in reader.tensors}),
    }


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
