"""Self-distillation (DINO): projection heads, the teacher's sharpened and centred targets, and the losses on them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.train.pretrain.recipe import HeadConfig


class DinoHead(nn.Module):
    """An MLP to a short normalised vector, and its cosine to each of `prototypes` directions.

    forward: (N, D) to logits (N, prototypes). The last layer is DINO's weight-normalised one with its length kept at 1.
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        widths = [dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        for c_in, c_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(c_in, c_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.prototypes)

    def forward(self, x: Tensor) -> Tensor:
        # In float32: half precision rounds the cosines, which the temperatures then enlarge 25 times.
        with torch.autocast(x.device.type, enabled=False):
            short = F.normalize(self.mlp(x.float()), dim=-1)
            return F.linear(short, F.normalize(self.prototypes, dim=-1))


class Center(nn.Module):
    """Running mean of the teacher's logits, subtracted before they are sharpened, so that no prototype takes all."""

    value: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))

    def targets(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the teacher's probabilities (N, K) for its logits (N, K)."""
        return ((logits - self.value) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move towards the mean of logits (N, K) over all devices; nothing where no device has any."""
        total = torch.cat([logits.sum(dim=0), logits.new_tensor([len(logits)])])
        total = mean_of_devices(total)
        if total[-1] > 0:
            self.value.lerp_(total[:-1] / total[-1], 1 - self.momentum)


def mean_of_devices(value: Tensor) -> Tensor:
    """Return the mean of `value` over the devices of a run, `value` itself where there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def view_pairs(n_views: int) -> list[tuple[int, int]]:
    """Return which views are compared, (teacher's, student's): the two global ones with every other."""
    return [(t, s) for t in range(2) for s in range(n_views) if s != t]


def image_loss(targets: Tensor, log_probs: Tensor) -> Tensor:
    """Return the mean cross-entropy over pairs of views of the same image (eq. 3).

    targets (B, 2, K) of the teacher's global views, log_probs (B, V, K) of the student's views, global first.
    """
    pairs = view_pairs(log_probs.shape[1])
    return torch.stack([-(targets[:, t] * log_probs[:, s]).sum(-1).mean() for t, s in pairs]).mean()


def nucleus_loss(targets: Tensor, log_probs: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy over nuclei that both views of a pair show (NuLo, eq. 6), and how many were compared.

    targets (n_t, K) and log_probs (n_s, K) in the order of `seen[:, :2]` and `seen`, bool (B, V, M). The sum of eq. 6
    is divided by the mean number of compared nuclei over the devices, so that its weight does not hang on how many
    there are; 0 where there are none.
    """
    rows_t, rows_s = numbered(seen[:, :2]), numbered(seen)
    total = log_probs.sum() * 0.0
    count = 0
    for t, s in view_pairs(seen.shape[1]):
        both = seen[:, t] & seen[:, s]
        total = total - (targets[rows_t[:, t][both]] * log_probs[rows_s[:, s][both]]).sum()
        count += int(both.sum())
    n = torch.tensor(float(count), device=seen.device)
    return total / mean_of_devices(n).clamp(min=1.0), n


def numbered(seen: Tensor) -> Tensor:
    """Return the row that each True of `seen` has among all of them, -1 elsewhere."""
    rows = torch.full(seen.shape, -1, dtype=torch.long, device=seen.device)
    rows[seen] = torch.arange(int(seen.sum()), device=seen.device)
    return rows


def cosine_between(start: float, end: float, progress: float) -> float:
    """Return a value that goes from `start` to `end` by half a cosine as `progress` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's; norm statistics stay its own, as in DINO."""
    mine, theirs = ([p.detach() for p in net.parameters()] for net in (teacher, student))
    torch._foreach_lerp_(mine, theirs, 1 - momentum)
