"""A model's repeated layers, found by their structure, not by their names."""

from __future__ import annotations

from torch import nn

Block = tuple[str, nn.Module]


def stacks(model: nn.Module) -> list[list[Block]]:
    """Each outermost list of layers as [(full name, layer)], in the model's order: one of a decoder, two of an
    encoder-decoder."""
    found: dict[str, list[Block]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in module.parameters()):
            found[path] = [(f"{path}.{i}", layer) for i, layer in enumerate(module)]
    return list(found.values())


def main_stack(model: nn.Module) -> list[Block]:
    """The list of layers with the most parameters (of an encoder-decoder: its decoder's). [] if there is none."""

    def size(stack: list[Block]) -> int:
        return sum(p.numel() for _, layer in stack for p in layer.parameters())

    return max(stacks(model), key=size, default=[])
