"""Muon: linear maps move by the orthogonal factor of their gradients' running mean, everything else by AdamW.

Legend: A rows (outputs) and B columns (inputs) of a matrix, C the smaller of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

#: of the polynomial a x + b x^3 + c x^5 that drives singular values towards 1 (about .7 to 1.2 after five turns), and its turns
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 5
#: weight of earlier gradients in their running mean
MOMENTUM = 0.95
#: root mean square of an AdamW step in units of its rate, which steps are scaled to, so that both take the same rates
ADAMW_SIZE = 0.2


def orthogonal(matrix_AB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T, by five turns of a polynomial in products of `dtype`.

    X <- a X + (b X X^T + c (X X^T)^2) X, from X = M / ||M||. Source: Jordan et al., "Muon: an optimizer for hidden layers
    in neural networks" (2024), whose coefficients these are.
    """
    a, b, c = COEFFICIENTS
    tall = matrix_AB.shape[0] > matrix_AB.shape[1]
    wide = (matrix_AB.T if tall else matrix_AB).to(dtype)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(TURNS):
        gram_CC = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram_CC, gram_CC, gram_CC, beta=b, alpha=c), wide, beta=a)
    return (wide.T if tall else wide).to(matrix_AB.dtype)


class Muon(Optimizer):
    """Moves the matrices of `matrices` by Muon, the parameters of `others` by AdamW; both are lists of parameter groups.

    M <- mu M + (1 - mu) G;  W <- W - rate (.2 sqrt(max(A, B)) orthogonal(mu M + (1 - mu) G) + decay W), which gives a
    step the root mean square of AdamW's. `torch.optim.Muon` computes the same, always in bfloat16; that takes 14 to 32
    times as long on CPUs without units for it, hence `dtype`. Sources: Jordan et al. (2024); arXiv 2502.16982, section 2.2.

    Raises:
        ValueError: a parameter of `matrices` is no matrix.
    """

    def __init__(
        self, matrices: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], dtype: torch.dtype, **adamw: Any
    ) -> None:
        if wrong := [tuple(p.shape) for group in matrices for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon moves matrices, not parameters of shape {wrong[0]}")
        self.dtype = dtype
        # AdamW never sees an empty list: a model whose every trained parameter is a matrix has no others
        self._adamw = AdamW(list(others), **adamw) if others else None
        rest = self._adamw.param_groups if self._adamw else []
        groups = [*({**group, "matrices": True} for group in matrices), *rest]
        # schedules that end at a rate of their own ask for the optimizer's
        super().__init__(groups, {"matrices": False, "lr": max(group["lr"] for group in groups)})
        self._share()

    def _share(self) -> None:
        """Let AdamW work on the same groups and states, so that rates and what is taken up reach it."""
        if self._adamw:
            self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
            self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state up, as `load_state_dict` does."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._adamw:
            self._adamw.step()
        for group in self.param_groups:
            if group["matrices"]:
                for weight_AB in group["params"]:
                    if weight_AB.grad is not None:
                        self._move(weight_AB, weight_AB.grad, group["lr"], group["weight_decay"])
        return loss

    def _move(self, weight_AB: Tensor, gradient_AB: Tensor, rate: float, decay: float) -> None:
        state = self.state[weight_AB]
        if not state:
            state["mean"] = torch.zeros_like(weight_AB)
        mean_AB = state["mean"].lerp_(gradient_AB, 1 - MOMENTUM)
        way_AB = orthogonal(gradient_AB.lerp(mean_AB, MOMENTUM), self.dtype)
        weight_AB.mul_(1 - rate * decay)
        weight_AB.add_(way_AB, alpha=-rate * ADAMW_SIZE * math.sqrt(max(weight_AB.shape)))
