"""Plain texts -> blocks of at most n tokens, the groups of continued pretraining.

`separate`: a block holds whole texts side by side, each a segment of its own that sees nothing of the others; only a
text longer than a block is cut. Best fit over some open blocks (Ding et al. 2024, arXiv 2404.10830, section 3).
`joined`: one stream of all texts, cut every n tokens; a text sees the ones before it (Brown et al. 2020, appendix B).
A piece begins with the last token of the one before it, so each token but the very first is predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from tunewright.core.example import Example, Group

Documents = Literal["separate", "joined"]
OPEN = 64  # blocks that are filled at the same time: what is held in memory


def in_blocks(texts: Iterable[Example], n: int, documents: Documents) -> Iterator[Group]:
    """Groups of at most n >= 2 tokens, of the texts in their order; one token alone teaches nothing and is left out.

    The last group holds a piece of the last text.
    """
    return HOW[documents](texts, n)


def pieces(text: Example, n: int) -> Iterator[Example]:
    """The text in pieces of at most n tokens, each from the last token of the piece before."""
    for at in range(0, len(text.ids) - 1, n - 1):
        weights = (0.0, *text.weights[at + 1 : at + n])
        yield replace(text, ids=text.ids[at : at + n], weights=weights)


def _separate(texts: Iterable[Example], n: int) -> Iterator[Group]:
    open_blocks: list[list[Example]] = []
    room: list[int] = []
    for piece in (p for text in texts for p in pieces(text, n)):
        size = len(piece.ids)
        fits = min((i for i, free in enumerate(room) if size <= free), key=room.__getitem__, default=None)
        if fits is None:
            if len(open_blocks) == OPEN:
                fullest = min(range(OPEN), key=room.__getitem__)
                room.pop(fullest)
                yield Group(tuple(open_blocks.pop(fullest)))
            open_blocks.append([])
            room.append(n)
            fits = len(open_blocks) - 1
        open_blocks[fits].append(piece)
        room[fits] -= size
    for block in sorted(open_blocks, key=lambda b: b[-1].source):
        yield Group(tuple(block))


def _joined(texts: Iterable[Example], n: int) -> Iterator[Group]:
    ids: list[int] = []
    source = 0
    for text in texts:
        ids += text.ids
        source = text.source
        while len(ids) >= n:
            yield _block(ids[:n], source)
            ids = ids[n - 1 :]
    if len(ids) > 1:
        yield _block(ids, source)


def _block(ids: list[int], source: int) -> Group:
    return Group((Example(tuple(ids), (0.0, *[1.0] * (len(ids) - 1)), source),))


HOW: dict[str, Callable[[Iterable[Example], int], Iterator[Group]]] = {"separate": _separate, "joined": _joined}
