"""Numbers for the charts: picking series out of metric points, thinning them, formatting times and counts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

Point = tuple[float, float]
MAX_POINTS = 2000


def series(points: Iterable[dict[str, Any]], field: str) -> list[Point]:
    """(step, value) of the points that have `field`."""
    return [(p["step"], p[field]) for p in points if p.get(field) is not None]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: first, last, and each bucket's lowest and highest, so that no spike disappears."""
    if len(points) <= limit:
        return list(points)
    buckets = max(1, (limit - 2) // 2)
    inner = points[1:-1]
    found = [points[0]]
    for i in range(buckets):
        bucket = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        if bucket:
            extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
            found.extend(sorted(extremes))
    return [*found, points[-1]]


def delta(old: Sequence[Point], new: Sequence[Point]) -> Sequence[Point] | None:
    """What to append to a drawing of `old` to get `new`; None if it has to be drawn anew."""
    grown = len(new) >= len(old) and (not old or (new[len(old) - 1] == old[-1] and new[0] == old[0]))
    return new[len(old) :] if grown else None


def last(points: Sequence[Point]) -> float | None:
    return points[-1][1] if points else None


def number(value: float | None, digits: int = 3) -> str:
    """`0.412`, or a dash for nothing."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"


def count(value: float | None) -> str:
    """`145,302`, or a dash for nothing."""
    return "–" if value is None else f"{value:,.0f}"


def size(n_bytes: int) -> str:
    """`1.4 MB`."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`, or a dash for nothing."""
    if seconds is None:
        return "–"
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def ago(when: float, now: float | None = None) -> str:
    """`just now`, `5 min ago`, `3 h ago`, `2 days ago`; after a month the date."""
    s = (now if now is not None else time.time()) - when
    if s < 60:
        return "just now"
    if s < 3600:
        return f"{s // 60:.0f} min ago"
    if s < 86400:
        return f"{s // 3600:.0f} h ago"
    if s < 30 * 86400:
        days = int(s // 86400)
        return f"{days} day{'s' if days > 1 else ''} ago"
    return time.strftime("%Y-%m-%d", time.localtime(when))


def clock(when: float) -> str:
    """Local `14:03:22`, with the date in front if it is not today's."""
    moment = time.localtime(when)
    today = time.strftime("%Y-%m-%d", moment) == time.strftime("%Y-%m-%d")
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", moment)
