"""AdamW for a model that is mostly frozen."""

import math

import torch
from torch.optim.adamw import adamw

from llamapro.model import Llama

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW on fp32 masters of the trainable parameters; nothing exists for frozen ones.

    A parameter that is fp32 is its own master. Others hand each gradient to their master as soon
    as it is complete and drop it, so micro-batches add up in fp32. The formula is torch.optim's;
    its class would load the compiler, 75 MB of a process that may never compile.
    """

    def __init__(self, model: Llama, *, max_grad_norm: float, weight_decay: float, betas):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("no trainable parameter: every tensor of the model is frozen")
        if not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
            raise ValueError(
                "betas of 0 to below 1 and a weight decay of at least 0 expected,"
                f" got {betas} and {weight_decay}"
            )
        self.max_grad_norm, self.weight_decay, self.betas = max_grad_norm, weight_decay, betas
        self.pairs = {name: (p, self._master(p)) for name, p in trainable.items()}
        self.moments = {
            name: {kind: torch.zeros_like(master) for kind in MOMENTS}
            for name, (_, master) in self.pairs.items()
        }
        self.steps = {
            name: torch.zeros((), dtype=torch.float32, device=master.device)  # whatever the default
            for name, (_, master) in self.pairs.items()
        }

    @staticmethod
    def _master(parameter):
        if parameter.dtype == torch.float32:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())

        def collect(p):
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def clip_and_check(self, loss: torch.Tensor, step: int) -> float:
        """Clip the gradient and return its norm; raises before anything non-finite is applied."""
        masters = [master for _, master in self.pairs.values()]
        norm = torch.nn.utils.clip_grad_norm_(masters, self.max_grad_norm).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()} and gradient norm {norm}, finite ones expected;"
                " the step was not taken"
            )
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Matrices decay, vectors do not."""
        for decay, matrices in ((self.weight_decay, True), (0.0, False)):
            names = [
                name
                for name, (_, master) in self.pairs.items()
                if master.grad is not None and (master.dim() > 1) == matrices
            ]
            masters = [self.pairs[name][1] for name in names]
            adamw(
                masters,
                [master.grad for master in masters],
                *([self.moments[name][kind] for name in names] for kind in MOMENTS),
                [],
                [self.steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=learning_rate,
                weight_decay=decay,
                eps=1e-8,
                maximize=False,
            )
            for master in masters:
                master.grad = None
        self.copy_to_model()

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments, by parameter name; the step count is the caller's."""
        return {
            f"{kind}.{name}": tensor
            for name, (_, master) in self.pairs.items()
            for kind, tensor in {"master": master.detach(), **self.moments[name]}.items()
        }

    def check_finite(self, step: int) -> None:
        """Raise FloatingPointError, and name it, for a master or moment that is not finite."""
        state = self.state()
        finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
        for name, good in zip(state, finite, strict=True):
            if not good:
                raise FloatingPointError(
                    f"step {step}: {name} has values that are not finite; it was not saved"
                )

    def shapes(self) -> dict[str, tuple]:
        """What `state` will hold."""
        return {name: tensor.shape for name, tensor in self.state().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        for count in self.steps.values():
            count.fill_(step)
        self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for parameter, master in self.pairs.values():
            if parameter is not master:
                parameter.copy_(master)
