"""AdamW for a model that is mostly frozen."""

import torch
from torch.optim.adamw import adamw

from llamapro.model import Llama
from llamapro.ranks import local, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW on fp32 masters of the trainable parameters; nothing exists for frozen ones.

    A parameter that is fp32 is its own master. Others hand each gradient to their master as soon
    as it is complete and drop it, so micro-batches add up in fp32. One that is sharded, see
    `llamapro.train.parallel`, has its master and moments sharded alike, and each rank steps its
    own. The formula is torch.optim's; its class would load the compiler, 75 MB of a process that
    may never compile.
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

    @torch.no_grad()
    def step(self, learning_rate: float, loss: torch.Tensor, number: int) -> float:
        """Take step `number` with the clipped gradient, and return its norm.

        Matrices decay, vectors do not. A norm or a loss that is not finite leaves everything as it
        was, gradients apart: the device looks at them itself, and is waited for only when the whole
        step is queued. Then it is a FloatingPointError.
        """
        held = {n: m for n, (_, m) in self.pairs.items() if m.grad is not None}
        norm = whole(torch.nn.utils.get_total_norm([master.grad for master in held.values()]))
        finite = norm.isfinite() & loss.isfinite()
        for decay, matrices in ((self.weight_decay, True), (0.0, False)):
            names = [name for name, master in held.items() if (master.dim() > 1) == matrices]
            masters = [held[name] for name in names]
            adamw(
                [local(master) for master in masters],
                [local(master.grad) for master in masters],
                *([local(self.moments[name][kind]) for name in names] for kind in MOMENTS),
                [],
                [self.steps[name] for name in names],
                fused=True,
                grad_scale=((norm + 1e-6) / self.max_grad_norm).clamp(min=1),  # as PyTorch clips
                found_inf=(~finite).float(),
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=learning_rate,
                weight_decay=decay,
                eps=1e-8,
                maximize=False,
            )
        for master in held.values():
            master.grad = None
        self.copy_to_model()
        if not finite:  # waits for the device
            raise FloatingPointError(
                f"step {number}: loss {loss.item()} and gradient norm {norm.item()}, finite ones"
                " expected; the step was not taken"
            )
        return norm.item()

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
        finite = torch.stack([local(t).isfinite().all() for t in state.values()]).tolist()
        for name, good in zip(state, finite, strict=True):
            if not good:
                raise FloatingPointError(
                    f"step {step}: {name} has values that are not finite; it was not saved"
                )

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        for count in self.steps.values():
            count.fill_(step)
        self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        pairs = [pair for pair in self.pairs.values() if pair[0] is not pair[1]]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
