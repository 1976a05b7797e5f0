"""Distillation from the project's parts: a student learns how likely a teacher holds every token, not only which one
stands in the rows.

    python recipes/distill.py smollm2-135m-instruct train.jsonl --teacher smollm2-360m-instruct --out adapter

Read it from top to bottom; the rows and the steps are those of sft.py. Both models have the same tokens, or a
distribution over them would not mean the same. `tunewright train` with `objective: distill` does more (`ft:` models as
teachers, exact resume, validation); with `objective: answers` it asks a server for answers instead.
"""

from __future__ import annotations

from pathlib import Path

from sft import read_rows, train, training_parser

from tunewright.core.home import find_home
from tunewright.data.tokenizer import Tokenizer
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives.distill import Distill
from tunewright.tuners.lora import LoRA


def load_teacher(folder: Path, student: Path) -> Policy:
    """The teacher, frozen."""
    if Tokenizer.load(folder).vocabulary != Tokenizer.load(student).vocabulary:
        raise SystemExit(f"{folder.name} and {student.name} have different tokens; take a teacher of the same family")
    return Policy(load_model(folder).requires_grad_(False))


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--teacher", required=True, help="a catalogue name or a model folder")
    parser.add_argument("--kind", choices=("forward", "reverse", "jsd"), default="forward", help="of the divergence")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 1 its less likely tokens count more")
    args = parser.parse_args()

    home = find_home().ensure()
    folder, teacher = materialise(args.model, home), materialise(args.teacher, home)
    objective = Distill(Distill.Options(kind=args.kind, temperature=args.temperature))
    objective.teacher = load_teacher(teacher, folder)
    tuner = LoRA(LoRA.Options(r=16, alpha=32))
    policy = Policy(tuner.attach(load_model(folder), seed=0))
    train(policy, objective, tuner, read_rows(args.data, folder), args)


if __name__ == "__main__":
    main()
