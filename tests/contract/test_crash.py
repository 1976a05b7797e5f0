"""Every tuner goes on from a crash as if there had been none: the same losses, the same weights, bit for bit.

One job for each tuner crashes once at every place of PLACES, in an order, in steps and at calls drawn from the tuner's
name, and is continued each time from what the run folder holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from job_kit import attempt, weights
from parts import OPTIONS
from test_selected_jobs import base, new_run, story  # noqa: F401 a fixture

from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.train import checkpoint, loop, prepare
from tunewright.tuners import TUNERS

STEPS, SAVED = 8, (3, 4, 6, 8)
METHODS = ("before_step", "on_gradients", "update", "after_step")
# place -> how often a step comes by at least
PLACES = {**dict.fromkeys(METHODS, 1), "between micro-batches": 3, "in a save": 9}
# the others in `make nightly`: one with a state of its own first, one of each kind of artefact with the slow tests
FIRST, ONE_OF_EACH_KIND = "adalora", ("dylora", "fishmask", "half")


class Crash(BaseException):
    """What the end of a process is to the code: nothing handles it."""


class Point:
    """Where and when to crash: in the `call`-th visit of `place` during `step`. step: 0 is before the first."""

    def __init__(self, place: str, step: int, call: int) -> None:
        self.place, self.step, self.call = place, step, call
        self.now = self.visits = 0
        self.saving = False

    def visit(self, place: str) -> None:
        if place == self.place and self.now == self.step:
            self.visits += 1
            if self.visits == self.call:
                raise Crash(f"{place}, step {self.step}, call {self.call}")

    def before(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def visited(*args: Any, **kwargs: Any) -> Any:
            if place != "in a save" or self.saving:
                self.visit(place)
            return function(*args, **kwargs)

        return visited

    def method(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """After it has done its work: what it did is lost, too."""

        def visited(tuner: Any, *args: Any) -> None:
            if name == "before_step":
                self.now = args[0]
            function(tuner, *args)
            self.visit(name)

        return visited

    def saves(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def saving(*args: Any, **kwargs: Any) -> Any:
            self.saving = True
            try:
                return function(*args, **kwargs)
            finally:
                self.saving = False

        return saving

    def rows(self, function: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        def visited(*args: Any) -> Iterator[None]:
            for _ in function(*args):
                self.visit("while choosing")
                yield

        return visited

    def arm(self, patch: pytest.MonkeyPatch, tuner: Any) -> None:
        for name in METHODS:
            patch.setattr(tuner, name, self.method(name, getattr(tuner, name)))
        patch.setattr(loop, "step_loss", self.before("between micro-batches", loop.step_loss))
        patch.setattr(loop, "save_checkpoint", self.saves(loop.save_checkpoint))
        patch.setattr(prepare, "row_gradients", self.rows(prepare.row_gradients))
        patch.setattr(checkpoint, "save_file", self.before("in a save", checkpoint.save_file))
        for name in ("fsync", "rename", "replace"):
            patch.setattr(os, name, self.before("in a save", getattr(os, name)))


def points(name: str) -> list[Point]:
    """One for each place; a later one is never in an earlier step, so it is reached after the resume."""
    draw = Random(name)
    order = draw.sample(sorted(PLACES), len(PLACES))
    found = [Point("while choosing", 0, draw.randint(1, 5))] if TUNERS.load(name).card.needs_data else []
    step = 1
    for place, drawn in zip(order, sorted(draw.choices(range(1, STEPS + 1), k=len(order))), strict=True):
        step = max(step, drawn)
        if place == "in a save":
            step = min(s for s in SAVED if s >= step)
        found.append(Point(place, step, draw.randint(1, PLACES[place])))
    return found


def marked(name: str) -> Any:
    slow = [] if name == FIRST else [pytest.mark.slow]
    return pytest.param(name, marks=slow if name in (FIRST, *ONE_OF_EACH_KIND) else [*slow, pytest.mark.nightly])


def make(home: Home, name: str) -> Run:
    more = {"tuner": {"name": name, **OPTIONS[name]}} if name in OPTIONS else {}
    return new_run(home, name, micro_batch_tokens=64, save_every_steps=3, **more)


@pytest.mark.parametrize("name", [marked(name) for name in TUNERS])
def test_crashed_everywhere_and_continued_is_uninterrupted(
    base: Home,  # noqa: F811
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden, crashed = make(base, name), make(base, name)
    attempt(golden, base)
    number = 0
    for number, point in enumerate(points(name), 1):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            point.arm(patch, TUNERS.load(name))
            attempt(crashed, base, number)
    attempt(crashed, base, number + 1)
    assert len(story(golden)) == STEPS
    assert story(crashed) == story(golden)
    assert weights(crashed) == weights(golden)
