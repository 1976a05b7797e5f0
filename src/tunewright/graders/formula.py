"""calculate_output: arithmetic over the rewards of other graders. It is read as a tree of a few kinds, never run."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunewright.core.errors import did_you_mean

MOST_CHARACTERS = 4096
MOST_DEPTH = 64
BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,  # refuses a root of a negative number, where ** would make a complex one
}
UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# name -> (function, arguments; None: one or more)
FUNCTIONS: dict[str, tuple[Callable[..., Any], int | None]] = {
    "min": (lambda *x: min(x), None),
    "max": (lambda *x: max(x), None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}
ALLOWED = f"numbers, names of graders, + - * / ^, brackets and {', '.join(FUNCTIONS)}"


class NoNumber(Exception):
    """The formula has no finite value for these rewards."""


@dataclass(frozen=True)
class Formula:
    """A checked formula. names: of the graders that it uses."""

    text: str
    tree: ast.expr
    names: frozenset[str]

    def __call__(self, rewards: Mapping[str, float]) -> float:
        """Raises NoNumber, which says why."""
        try:
            value = _value(self.tree, rewards)
        except (ArithmeticError, ValueError) as e:
            raise NoNumber(f"'{self.text}' has no value for {_shown(rewards)}: {e}.") from e
        if not math.isfinite(value):
            raise NoNumber(f"'{self.text}' is no finite number for {_shown(rewards)}.")
        return float(value)


def parse_formula(text: str, graders: Iterable[str]) -> Formula:
    """Raises ValueError with what is wrong and what is allowed."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MOST_CHARACTERS} are allowed")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ValueError(f"'{text[:200]}' is no formula; it may have {ALLOWED}") from e
    names: set[str] = set()
    _check(tree, frozenset(graders), names, 0)
    return Formula(text, tree, frozenset(names))


def _check(node: ast.AST, graders: frozenset[str], names: set[str], depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"its brackets are more than {MOST_DEPTH} deep")
    for inner in _operands(node, graders, names):
        _check(inner, graders, names, depth + 1)


def _operands(node: ast.AST, graders: frozenset[str], names: set[str]) -> list[ast.expr]:
    """What a node is computed from. Raises ValueError for a node that is not allowed."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            _finite(value)
            return []
        case ast.Name(id=name):
            if name not in graders:
                known = sorted(graders)
                raise ValueError(f"there is no grader '{name}'; it has: {', '.join(known)}.{did_you_mean(name, known)}")
            names.add(name)
            return []
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return [operand]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _arguments(name, args)
    raise ValueError(f"'{ast.unparse(node)[:80]}' is not allowed; a formula may have {ALLOWED}")


def _finite(value: int | float) -> None:
    try:
        good = math.isfinite(float(value))
    except OverflowError:
        good = False
    if not good:
        raise ValueError("it has a number that is too large")


def _arguments(name: str, args: list[ast.expr]) -> list[ast.expr]:
    if name not in FUNCTIONS:
        raise ValueError(f"there is no function '{name}'; use {', '.join(FUNCTIONS)}.{did_you_mean(name, FUNCTIONS)}")
    wanted = FUNCTIONS[name][1]
    if not args or (wanted is not None and len(args) != wanted):
        raise ValueError(f"{name} takes {wanted or 'one or more'} numbers, but got {len(args)}")
    return args


def _value(node: ast.expr, rewards: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            return rewards[name]
        case ast.BinOp(left=left, op=op, right=right):
            return BINARY[type(op)](_value(left, rewards), _value(right, rewards))
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](_value(operand, rewards))
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name][0](*(_value(a, rewards) for a in args))
    raise AssertionError(node)  # parse_formula lets nothing else through


def _shown(rewards: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in rewards.items())
