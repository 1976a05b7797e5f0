"""The teacher of a job: another model whose next-token distributions are learned. Frozen, never merged with ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from tunewright.core.errors import SpecError
from tunewright.core.spec import JobSpec
from tunewright.data.tokenizer import Tokenizer
from tunewright.models import memory
from tunewright.models.loader import load_model
from tunewright.train.finish import Start

Merge = Callable[[nn.Module, Path], nn.Module]


def check_teacher(spec: JobSpec, teacher: Start, tokenizer: Tokenizer) -> None:
    """Raise SpecError unless the teacher's token ids mean the same as the student's (`tokenizer`)."""
    name = spec.objective.options["teacher"]
    other = Tokenizer.load(teacher.weights)
    if other.vocabulary != tokenizer.vocabulary:
        raise SpecError(
            f"The teacher '{name}' and the student '{spec.model}' have different vocabularies ({other.vocab_size:,} "
            f"and {tokenizer.vocab_size:,} tokens): a token id does not mean the same to both, so their distributions "
            "cannot be compared. Use a teacher of the same family, or learn from its answers with objective: answers.",
            param="objective",
            code="different_vocabularies",
        )


def load_teacher(teacher: Start, dtype: torch.dtype, merge: Mapping[str, Merge]) -> nn.Module:
    """The model. merge: how an artefact of a kind is folded into the weights below it."""
    model = load_model(teacher.weights, dtype)
    if teacher.over is not None and teacher.record is not None:
        model = merge[teacher.record.kind](model, teacher.over)
    return model


def teacher_bytes(teacher: Start, student: Start, dtype: torch.dtype) -> int:
    """Bytes of the teacher for each parameter of the student, rounded up."""
    n = memory.stored_parameters(teacher.weights) * dtype.itemsize
    return -(-n // memory.stored_parameters(student.weights))
