"""The optimizer: Muon for matrices, AdamW for embeddings, routers and vectors.

Muon steps along the nearest orthogonal matrix of the momentum (K. Jordan et al., "Muon", 2024), found by the quintic
Newton-Schulz iteration. Matrices that are stacked, as experts are, are made orthogonal each for itself, all at once.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Of `[..., rows, cols]`, each matrix's singular values brought near 1."""
    a, b, c = COEFFICIENTS
    wide = x.transpose(-1, -2) if x.shape[-2] > x.shape[-1] else x
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = wide.to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(steps):
        square = wide @ wide.transpose(-1, -2)
        wide = a * wide + (b * square + c * square @ square) @ wide
    return (wide.transpose(-1, -2) if x.shape[-2] > x.shape[-1] else wide).to(x.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                step = orthogonal(weight.grad.lerp(momentum, group["momentum"]))
                # By outputs over inputs, which stacked matrices have the other way round.
                outputs, inputs = weight.shape if weight.ndim == 2 else weight.shape[:0:-1]
                scale = max(1.0, outputs / inputs) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(step, alpha=-group["lr"] * scale)


def optimizers(model: torch.nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", ".gate."))
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return [Muon(matrices, lr=muon_lr), adam]
