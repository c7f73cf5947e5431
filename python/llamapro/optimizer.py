"""AdamW for a model that is mostly frozen."""

import math

import torch

from llamapro.model import Llama


class Optimizer:
    """AdamW on fp32 masters of the trainable parameters; nothing exists for frozen ones.

    A parameter that is fp32 is its own master. Others hand each gradient to their master as soon
    as it is complete and drop it, so micro-batches add up in fp32.
    """

    def __init__(self, model: Llama, *, clip: float, weight_decay: float, betas):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("no trainable parameter: every tensor of the model is frozen")
        self.clip = clip
        self.pairs = {name: (p, self._master(p)) for name, p in trainable.items()}
        masters = [master for _, master in self.pairs.values()]
        groups = [
            {"params": [m for m in masters if m.dim() > 1], "weight_decay": weight_decay},
            {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=tuple(betas), fused=True
        )

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
        norm = torch.nn.utils.clip_grad_norm_(masters, self.clip).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()} and gradient norm {norm}, finite ones expected;"
                " the step was not taken"
            )
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.copy_to_model()

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments, by parameter name; the step count is the caller's."""
        return {
            f"{kind}.{name}": tensor
            for name, (_, master) in self.pairs.items()
            for kind, tensor in (
                ("master", master.detach()),
                ("exp_avg", self.adamw.state[master]["exp_avg"]),
                ("exp_avg_sq", self.adamw.state[master]["exp_avg_sq"]),
            )
        }

    def shapes(self) -> dict[str, tuple]:
        """What `state` will hold."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return {f"{k}.{name}": m.shape for name, (_, m) in self.pairs.items() for k in kinds}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        for name, (_, master) in self.pairs.items():
            master.copy_(tensors[f"master.{name}"])
            self.adamw.state[master] = {
                "step": torch.tensor(float(step), device=master.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
            }
        self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for parameter, master in self.pairs.values():
            if parameter is not master:
                parameter.copy_(master)
