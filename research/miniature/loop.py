"""A training loop that can be stopped at any step and resumes with the same weights, bit for bit.

Everything random in a step (scenes, noise, dropout) is drawn from the seed and the step's number, so a checkpoint
consists of weights and optimizer moments.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from sdllava.atomic_files import atomic_path
from sdllava.run_records import check_settings
from sdllava.train.machine import computes_in_bfloat16

_STEPS_PER_SEED = 2**32
_LOG_EVERY = 50


@dataclass(frozen=True)
class Budget:
    """How long a part is trained, and how fast it learns.

    Args:
        steps: Optimizer steps.
        batch_size: Scenes per step.
        learning_rate: The rate after warm-up. It falls linearly to zero over the last fifth of the steps.
        ema: The decay of the running mean of the weights. 0 keeps no mean.
        warmup: Steps over which the rate rises linearly.
        weight_decay: AdamW's weight decay.
        save_every: Steps between two checkpoints.
    """

    steps: int
    batch_size: int
    learning_rate: float
    ema: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    save_every: int = 200


class Part(Protocol):
    """What the loop trains: a named model, and its loss on the batch of a step."""

    name: str

    @property
    def model(self) -> nn.Module:
        """The model. Its parameters that require gradients are trained."""
        ...

    def loss(self, step: int, batch_size: int) -> Tensor:
        """The loss of a step, to be differentiated."""
        ...


def learning_rate(budget: Budget, step: int) -> float:
    """The learning rate of a step of a budget."""
    decay_steps = max(1, budget.steps // 5)
    scale = min(1.0, (step + 1) / max(1, budget.warmup), (budget.steps - step) / decay_steps)
    return budget.learning_rate * scale


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on devices that compute in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device.type))


def scene_numbers(seed: int, step: int, batch_size: int) -> range:
    """The seeds of a step's scenes. They differ between steps, and between runs with different seeds."""
    first = (seed * _STEPS_PER_SEED + step) * batch_size
    return range(first, first + batch_size)


class Run:
    """The training of one part: the model, its optimizer and, optionally, a running mean of its weights.

    Args:
        part: What is trained.
        budget: How long and how fast.
        folder: The folder of the checkpoint and of the log. A checkpoint that is there is loaded.
        seed: Selects scenes and noise.
        device: Where the part is trained.

    Raises:
        ValueError: The checkpoint was trained with another seed or batch size.
    """

    def __init__(self, part: Part, budget: Budget, folder: str | os.PathLike, seed: int = 0, device: str = "cpu"):
        part.model.to(device)
        self.part, self.budget, self.folder, self.seed = part, budget, Path(folder), seed
        self.parameters = {name: p for name, p in part.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=budget.weight_decay, fused=True
        )
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()} if budget.ema else {}
        self.step = 0
        if self.state_file.exists():
            self._load()

    @property
    def state_file(self) -> Path:
        """The checkpoint."""
        return self.folder / f"{self.part.name}.safetensors"

    def _load(self) -> None:
        with safe_open(self.state_file, "pt") as file:
            meta, names = file.metadata(), file.keys()
            stored = {name: file.get_tensor(name) for name in names}
        found = {name: int(meta[name]) for name in ("seed", "batch_size")}
        check_settings(found, {"seed": self.seed, "batch_size": self.budget.batch_size}, self.folder)
        self.step = int(meta["step"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(stored[f"weight/{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=parameter.device),
                "exp_avg": stored[f"mean/{name}"].to(parameter.device),
                "exp_avg_sq": stored[f"square/{name}"].to(parameter.device),
            }
        for name, average in self.averages.items():
            average.copy_(stored[f"average/{name}"])

    def save(self) -> None:
        """Write the checkpoint atomically."""
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors[f"weight/{name}"] = parameter.detach().contiguous()
            tensors[f"mean/{name}"], tensors[f"square/{name}"] = state["exp_avg"], state["exp_avg_sq"]
        tensors |= {f"average/{name}": average for name, average in self.averages.items()}
        meta = {"step": str(self.step), "seed": str(self.seed), "batch_size": str(self.budget.batch_size)}
        with atomic_path(self.state_file) as written:
            save_file({key: value.contiguous() for key, value in tensors.items()}, written, metadata=meta)

    def _advance(self) -> float:
        torch.manual_seed(self.seed * _STEPS_PER_SEED + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.budget, self.step)
        loss = self.part.loss(self.step, self.budget.batch_size)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.averages:
            decay = min(self.budget.ema, self.step / (self.step + 10))
            weights = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)
        return loss.item()

    def train(self, until: int | None = None) -> None:
        """Train to step `until`, or to the end of the budget, and save."""
        until = self.budget.steps if until is None else min(until, self.budget.steps)
        self.part.model.train()
        progress = tqdm(range(self.step, until), initial=self.step, total=until, desc=self.part.name, mininterval=1)
        losses: list[float] = []
        for _ in progress:
            losses.append(self._advance())
            if self.step % _LOG_EVERY == 0:
                self._log(sum(losses) / len(losses), progress)
                losses.clear()
            if self.step % self.budget.save_every == 0:
                self.save()
        if len(progress):
            self.save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model while the context is open."""
        weights = {name: self.parameters[name].detach().clone() for name in self.averages}
        self.finish()
        try:
            yield
        finally:
            for name, weight in weights.items():
                self.parameters[name].data.copy_(weight)

    def finish(self) -> None:
        """Load the averaged weights into the model, to check and to write it. Training cannot continue."""
        for name, average in self.averages.items():
            self.parameters[name].data.copy_(average)
        self.part.model.eval()

    def _log(self, loss: float, progress: tqdm) -> None:
        progress.set_postfix(loss=f"{loss:.4f}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.part.name}.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "loss": round(loss, 5)}) + "\n")
