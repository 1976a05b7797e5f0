"""`tunewright merge`: several trained adapters of one base made into one model, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    models: Annotated[list[str], typer.Argument(help="`ft:` models of one base, tuned with lora, rslora or dylora.")],
    how: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare, dare_ties; or first_ranks of one DyLoRA model.")
    ] = "svd",
    weights: Annotated[str | None, typer.Option(help="A factor for each, as 0.7,0.3; else equal ones.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd and first_ranks.")] = None,
    density: Annotated[float, typer.Option(help="Share of the entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="For dare, which drops at random.")] = 0,
    suffix: Annotated[str, typer.Option(help="In the new model's name.")] = "",
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Make one model of several adapters of one base; print its name.

    It is served like any other.
    """
    from tunewright.core.errors import UserError
    from tunewright.core.home import find_home
    from tunewright.jobs.combined import combine_models

    try:
        factors = [float(w) for w in weights.split(",")] if weights else None
    except ValueError as e:
        text = f"--weights is '{weights}'; give one number for each model, separated by commas: 0.7,0.3."
        raise UserError(text, param="weights") from e
    options = {"how": how, "weights": factors, "rank": rank, "density": density, "seed": seed}
    print(combine_models(find_home(home), models, suffix, **options).job().name)
