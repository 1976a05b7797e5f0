"""A tiny random Llama with a real byte-level BPE tokenizer and ChatML template, and rows to train it on.

Imports torch only inside build_tiny_model. Scripts that are started by tests use it with PYTHONPATH=tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SMOLLM2 = "smollm2-135m-instruct"
# where the C++ kernels of this machine lie between the runs of the tests
KERNELS = Path(__file__).parents[1] / ".pytest_cache" / "kernels"
THINGS = ("the sky", "a leaf", "an apple", "the night", "a lemon", "fresh snow", "the sea", "a raven")


def sft_rows(n: int) -> list[dict[str, Any]]:
    """n different chat rows in OpenAI's format, of varied length, some with two turns."""
    rows = []
    for i in range(n):
        thing, colour = THINGS[i % len(THINGS)], COLOURS[(i * 5) % len(COLOURS)]
        messages = [
            {"role": "system", "content": "You answer with one colour."},
            {"role": "user", "content": f"Question {i}: what colour is {thing}?" + " Think well." * (i % 4)},
            {"role": "assistant", "content": f"It is {colour}."},
        ]
        if i % 3 == 2:
            messages += [
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": f"Yes, {thing} is {colour}, as I said before."},
            ]
        rows.append({"messages": messages})
    return rows


def pair_rows(n: int) -> list[dict[str, Any]]:
    """n different preference pairs in OpenAI's format: the preferred answer names a colour, the other one does not."""
    rows = []
    for i in range(n):
        thing, colour = THINGS[i % len(THINGS)], COLOURS[(i * 5) % len(COLOURS)]
        prompt = [{"role": "user", "content": f"Question {i}: what colour is {thing}?" + " Think well." * (i % 4)}]
        answers = f"It is {colour}.", "I do not know." + " Ask another." * (i % 3)
        preferred, rejected = ([{"role": "assistant", "content": text}] for text in answers)
        rows.append({"input": {"messages": prompt}, "preferred_output": preferred, "non_preferred_output": rejected})
    return rows


def marked_rows(n: int) -> list[dict[str, Any]]:
    """n different answers of such pairs, every second one marked as bad."""
    rows = []
    for i, row in enumerate(pair_rows(n)):
        answer = row["non_preferred_output" if i % 2 else "preferred_output"]
        prompt = row["input"]["messages"][0]["content"]
        rows.append({"prompt": prompt, "completion": answer[0]["content"], "label": i % 2 == 0})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [m["content"] for row in sft_rows(64) for m in row["messages"]]
    texts += ["The quick brown fox jumps over the lazy dog.", "system user assistant tool", '{"name": "value", "n": 1}']
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# widths that are multiples of a tile; 3 query heads to a key/value head, as SmolLM2
TILED: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}


def build_tiny_model(folder: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Write config, safetensors, tokenizer and generation_config of a 2-layer Llama; returns the folder.

    changes: fields of LlamaConfig that differ from the standard ones.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "dtype": "float32",
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BERT = {"num_labels": 3, "hidden_dropout_prob": 0.1}
# name -> (model type of transformers, fields of its config that differ from SMALL, head)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "lm"),
    "qwen2": ("qwen2", {}, "lm"),
    "qwen3": ("qwen3", {"head_dim": 8}, "lm"),
    "mistral": ("mistral", {"sliding_window": 3}, "lm"),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "lm"),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 40}, "lm"),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 8}, "lm"),
    "gemma3": ("gemma3_text", {"sliding_window": 3, "head_dim": 8, "query_pre_attn_scalar": 8}, "lm"),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, "lm"),
    "gpt2": ("gpt2", {"attn_pdrop": 0.1}, "lm"),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}, "lm"),
    "t5": ("t5", {**_T5, "relative_attention_num_buckets": 8}, "lm"),
    "mt5": ("mt5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "lm"),
    "bert": ("bert", _BERT, "classify"),
    "roberta": ("roberta", {**_BERT, "pad_token_id": 1}, "classify"),
    "llama, head": ("llama", {"num_labels": 3}, "classify"),
}


def auto_class(family: str) -> Any:
    """transformers' class that opens a model of the family."""
    import transformers

    kind, _, head = FAMILIES[family]
    if head == "classify":
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForSeq2SeqLM if kind.endswith("t5") else transformers.AutoModelForCausalLM


def build_family(folder: Path, family: str, tokenizer: Path, **more: Any) -> Path:
    """Write a tiny random model of a family of FAMILIES; returns the folder. tokenizer: a folder that has one.

    more: fields of the config that differ from the family's tiny ones.
    """
    import torch
    from transformers import AutoConfig

    kind, changes, _ = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SMALL, **changes, **more})
        auto_class(family).from_config(config).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


def build_reader(folder: Path, family: str) -> Path:
    """A tiny `bert` or `t5` with a tokenizer that frames texts as theirs do, and no chat template."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

    kind, changes, _ = FAMILIES[family]
    tokenizer = _tokenizer()
    tokenizer.chat_template = None
    begin, end = ((t, tokenizer.convert_tokens_to_ids(t)) for t in SPECIALS[1:])
    pair = {"pair": f"{begin[0]} $A {end[0]} $B:1 {end[0]}:1"} if family == "bert" else {}
    single = f"{begin[0]} $A {end[0]}" if family == "bert" else f"$A {end[0]}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[begin, end], **pair)
    tokenizer.sep_token = end[0] if family == "bert" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SMALL, **changes, "vocab_size": len(tokenizer)})
        opener = AutoModel if family == "bert" else AutoModelForSeq2SeqLM
        opener.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def label_rows(n: int) -> list[dict[str, Any]]:
    """n texts, each labelled with the first colour that it names; some have a second text."""
    rows = []
    for i in range(n):
        colour = COLOURS[i % 3]
        text = f"Number {i}: {THINGS[i % len(THINGS)]} is {colour}" + ", they say" * (i % 4)
        rows.append({"text": text, "label": colour} | ({"text_pair": "Is it so?"} if i % 5 == 4 else {}))
    return rows


def install_tiny_model(home_root: Path | str, name: str = "tiny", built: Path | None = None) -> Path:
    """Make the tiny model a catalogue model called `name` of the data folder. built: a ready folder to copy."""
    folder = Path(home_root) / "models" / name
    if built is None:
        build_tiny_model(folder)
    else:
        shutil.copytree(built, folder)
    (folder / "source.json").write_text(json.dumps({"name": name, "source": "a random model made by the tests"}))
    share_kernels(home_root)
    return folder


def share_kernels(home_root: Path | str) -> None:
    """The jobs of this data folder find the kernels that those of another one compiled, which takes seconds."""
    place = Path(home_root) / "cache" / "kernels"
    if not place.exists():
        for folder in (KERNELS, place.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.symlink_to(KERNELS, target_is_directory=True)
