"""What the soft prompts share: peft's encoder beside a frozen model, peft's files, which models they are for.

The encoder is peft's and so are its files; putting what it says in front of each packed segment is ours
(ops/virtual.py, models/layouts.py), because peft pads. peft's file holds what the encoder says, not the encoder; where
the two differ, ours holds the encoder beside it (`encoder.*`, which peft skips), so that training can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from peft.utils import ModulesToSaveWrapper
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn

from tunewright.core.errors import SpecError
from tunewright.tuners.adapter_files import WEIGHTS, check_same_shape
from tunewright.tuners.files import copy_into, read_tensors
from tunewright.tuners.peft_adapter import PeftTuner, file_name
from tunewright.tuners.targets import task_type, whole_modules

PACKED = "tunewright"  # the attention of a model that runs packed
IN_FILE = "prompt_embeddings"  # peft's only tensor
COMMON = 5000  # the first tokens of a vocabulary are its most frequent ones; Lester et al. draw from as many

VirtualTokens = Annotated[
    int, Field(ge=1, le=1000, description="how many virtual tokens; they take room in the context and in each batch")
]
InitText = Annotated[
    str | None,
    Field(min_length=1, max_length=10_000, description="text to start from, repeated or cut; empty: drawn tokens"),
]


class SoftPrompt(PeftTuner):
    """A method names its card, its options (with `virtual_tokens`), its config, and keeps_encoder: whether the encoder
    is more than what the file says of it."""

    keeps_encoder: bool = False

    @property
    def n_virtual(self) -> int:
        return self.options.virtual_tokens

    @property
    def encoder(self) -> Any:
        return self.model.prompt_encoder["default"]

    @contextmanager
    def off(self) -> Iterator[None]:
        """What peft's disable_adapter() does, which fails on models that do not generate and leaves heads on."""
        model: Any = self.model
        heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        try:
            model.forward, model._adapters_disabled = model.base_model.forward, True
            for head in heads:
                head.enable_adapters(False)
            yield
        finally:
            del model.forward
            model._adapters_disabled = False
            for head in heads:
                head.enable_adapters(True)

    def in_file(self) -> dict[str, Tensor]:
        """peft's tensor, the encoder where it is more, and a head for rows."""
        whole = {n: p for n, p in self.trainable().items() if not n.startswith("prompt_encoder.")}
        own = dict(self.encoder.named_parameters())
        saved = {f"encoder.{n}": p for n, p in own.items()} if self.keeps_encoder else {}
        said = self.model.get_prompt_embedding_to_save("default") if self.keeps_encoder else own["embedding.weight"]
        return {IN_FILE: said, **saved, **{file_name(n): p for n, p in whole.items()}}

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the files are unreadable, SpecError if they are of another method or shape, or hold
        no encoder to go on with."""
        check_same_shape(self.model.peft_config["default"].to_dict(), folder)
        tensors = read_tensors(folder / WEIGHTS)
        if self.keeps_encoder and not any(name.startswith("encoder.") for name in tensors):
            raise SpecError(
                f"'{folder.name}' holds what its encoder said and not the encoder, so training cannot go on from it "
                "(peft does not save it). It can be served; continue from a model that was tuned here.",
                param="tuner",
            )
        copy_into(self.in_file(), tensors, "the adapter")

    def merge(self) -> nn.Module:
        """Raises SpecError: what stands in front of a text has no place in the weights."""
        raise SpecError("A soft prompt cannot be folded into the base's weights: it stands in front of the text.")


def fields(model: Any, options: Any, tuner: str) -> dict[str, Any]:
    """The fields of peft's configs that all have. Raises SpecError for a model that soft prompts are not for."""
    causal = all(getattr(m, "is_causal", True) is not False for m in model.modules())
    problems = {
        "is an encoder-decoder": model.config.is_encoder_decoder,
        "is an encoder": not causal,
        "can only be run padded": model.config._attn_implementation != PACKED,
    }
    wrong = next((text for text, is_so in problems.items() if is_so), None)
    if wrong is not None:
        raise SpecError(
            f"tuner '{tuner}' is for decoders that run packed; a {type(model).__name__} {wrong}. Use a tuner that "
            "works on any linear layer: lora, dora or rslora.",
            param="tuner",
        )
    return {
        "num_virtual_tokens": options.virtual_tokens,
        "task_type": task_type(model),
        "modules_to_save": whole_modules(model) or None,
    }


def first_tokens(model: Any, options: Any, seed: int) -> Tensor:
    """[N] int64: the tokens that the virtual ones start as: those of init_text, or N of the most frequent ones.

    Raises SpecError if the text has no tokens, or if the model's tokenizer cannot be read.
    """
    n = options.virtual_tokens
    if options.init_text is None:
        vocab = model.get_input_embeddings().weight.shape[0]
        drawn = torch.Generator().manual_seed(seed)
        return torch.randint(0, min(COMMON, vocab), (n,), generator=drawn)
    path = Path(model.name_or_path) / "tokenizer.json"
    if not path.is_file():
        raise SpecError(f"init_text needs the model's tokenizer, and there is no {path.name} beside it.", param="tuner")
    ids = Tokenizer.from_file(str(path)).encode(options.init_text, add_special_tokens=False).ids
    if not ids:
        raise SpecError(f"init_text is {options.init_text!r}, which has no tokens; give a word or more.", param="tuner")
    return torch.tensor((ids * (n // len(ids) + 1))[:n])
