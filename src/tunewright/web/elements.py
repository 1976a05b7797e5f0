"""Two NiceGUI elements of our own: text that is never interpreted, and a drop-down whose entries may be closed."""

from __future__ import annotations

from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement


class Text(TextElement):
    """Text in any HTML element; never interpreted."""

    def __init__(self, text: Any, classes: str = "", kind: str = "span") -> None:
        super().__init__(tag=kind, text=str(text))
        self.classes(classes)


class Choices(ui.select):
    """A drop-down. `unfit` has the values that cannot be taken now, each with the reason, which its entry shows."""

    unfit: dict[Any, str]

    def __init__(self, options: dict[Any, str], value: Any, unfit: dict[Any, str], **more: Any) -> None:
        self.unfit = unfit
        super().__init__(options, value=value, **more)

    def set_unfit(self, unfit: dict[Any, str]) -> None:
        if unfit != self.unfit:
            self.unfit = unfit
            self.update()

    def _update_values_and_labels(self) -> None:
        super()._update_values_and_labels()
        named = zip(self._values, self._labels, strict=True)
        self._labels = [f"{label} – {self.unfit[v]}" if v in self.unfit else label for v, label in named]

    def _update_options(self) -> None:
        super()._update_options()
        for option, value in zip(self._props["options"], self._values, strict=True):
            option["disable"] = value in self.unfit
