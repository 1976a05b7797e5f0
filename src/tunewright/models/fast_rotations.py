"""OFT as the fast path computes it: inputs that are rotated block by block are a weight whose columns are.

peft: y = W (x R), R block-diagonal [k, k] of (I + Q)(I - Q)^-1, Q skew (tuners/oft.py). Here y = (W R^T) x with W R^T
made anew after each update, so that a token costs no more than with full training.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.oft import OFTLayer
from torch import Tensor, nn


class Rotation:
    """The rotation of one layer's inputs: R blocks of b x b."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._module = layer, layer.oft_R[layer.active_adapters[0]]
        self.parameter: nn.Parameter = self._module.weight  # [R, b (b - 1) / 2], Q above its diagonal

    @property
    def on(self) -> bool:
        return not self._layer.disable_adapters

    def turn(self, weight_NK: Tensor) -> Tensor:
        """W R^T in the dtype of W."""
        turned_RNB = self._columns(weight_NK) @ self._blocks(self.parameter.detach()).mT
        return turned_RNB.transpose(0, 1).reshape(weight_NK.shape).to(weight_NK.dtype)

    def gradient(self, weight_NK: Tensor, grad_NK: Tensor) -> Tensor:
        """Of parameter, from the gradient of W R^T."""
        with torch.enable_grad():
            q = self.parameter.detach().requires_grad_()
            blocks_RBB = self._blocks(q)
        d_RBB = self._columns(grad_NK).mT @ self._columns(weight_NK)
        return torch.autograd.grad(blocks_RBB, q, d_RBB)[0]

    def _columns(self, weight_NK: Tensor) -> Tensor:
        """[R, N, b] float32."""
        b = self._module.block_size
        return weight_NK.view(weight_NK.shape[0], -1, b).transpose(0, 1).float()

    def _blocks(self, above: Tensor) -> Tensor:
        """[R, b, b] float32 of Q's numbers above the diagonal. The series: I + 2 Q + ... + 2 Q^(n - 2) + Q^(n - 1)."""
        m, b = self._module, self._module.block_size
        half = torch.zeros(above.shape[0], b, b).index_put(
            (torch.arange(above.shape[0])[:, None], m.rows, m.cols), above
        )
        q, eye = half - half.mT, torch.eye(b)
        if not m.use_cayley_neumann:
            return torch.linalg.solve(eye + q, (eye - q).expand_as(q), left=False)
        total, power = eye + 2 * q, q
        for _ in range(2, m.num_cayley_neumann_terms - 1):
            power = power @ q
            total = total + 2 * power
        return total + power @ q


def rotation_of(layer: nn.Module) -> Rotation | None:
    return Rotation(layer) if isinstance(layer, OFTLayer) else None


def unusual_oft(name: str, layer: Any) -> str | None:
    """Why the fast path does not serve this layer, or None."""
    modules = list(layer.oft_R.values())
    found = {
        "more than one adapter": len(layer.active_adapters) > 1,
        "dropout": any(not isinstance(d, nn.Identity) for d in layer.oft_dropout.values()),
        "blocks that are shared or constrained": any(m.block_share or m.coft for m in modules),
        "a series of fewer than four terms": any(
            m.use_cayley_neumann and m.num_cayley_neumann_terms < 4 for m in modules
        ),
        "merged weights": layer.merged,
        "rotations before weights that are trained, too": any(
            p.requires_grad for p in layer.get_base_layer().parameters()
        ),
    }
    return next((what for what, is_so in found.items() if is_so), None)
