"""Recipes: models without trained weights of their own. One file and one line each; torch-free."""

from __future__ import annotations

from tunewright.core.registry import Table

RECIPES = Table(
    "recipe",
    {
        "few_shot": "tunewright.engine.recipes.few_shot:FewShot",
        "mixture": "tunewright.engine.recipes.mixture:Mixture",
        "prompt": "tunewright.engine.recipes.prompt:Prompt",
        "proxy": "tunewright.engine.recipes.proxy:Proxy",
        "retrieval": "tunewright.engine.recipes.retrieval:Retrieval",
    },
)
