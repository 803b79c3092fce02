"""What a SlotNetwork is trained on: the losses of section III-D of the slot-attention paper (arXiv 2606.01460).

Shapes as in `slots`: B windows, K slots, S targets (stems or families, padded), P pitches, T frames, E of an embedding.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .data.datasets import FAMILIES
from .recipe import SlotRecipe
from .slots import SlotOutputs
from .windows import WindowBatch

EPSILON = 1e-5  # keeps the logarithm of a slot's probability finite; far below any threshold


def slot_losses(outputs: SlotOutputs, batch: WindowBatch, recipe: SlotRecipe) -> dict[str, Tensor]:
    """Each loss that the recipe weighs, by its name in `SlotWeights` and not yet weighted."""
    mixture = batch.maps.amax(1)  # (B, P, T)
    losses = {"mixture": F.binary_cross_entropy_with_logits(outputs.mix.float(), mixture)}
    weights = recipe.weights
    if weights.polyphony:
        top = outputs.polyphony.shape[-1] - 1
        count = mixture.sum(1).long().clamp(max=top)  # (B, T)
        losses["polyphony"] = F.cross_entropy(outputs.polyphony.float().flatten(0, 1), count.flatten())
    if recipe.targets.matching == "none":
        return losses

    targets, present, timbre, known = slot_targets(batch, recipe.targets.level)
    slots = outputs.slots.float().clamp(EPSILON, 1 - EPSILON)
    log_on, log_off = slots.log(), (1 - slots).log()  # (B, K, P, T)
    cells = slots[0, 0].numel()
    silence = -log_off.sum((2, 3)) / cells  # (B, K): the cross-entropy against an empty target
    gain = torch.einsum("bkpt,bspt->bks", log_on - log_off, targets) / cells
    cost = silence[:, :, None] - gain  # (B, K, S) mean binary cross-entropy of every pair
    distance = None
    if recipe.needs_teacher:
        cosine = F.normalize(outputs.timbre.float(), dim=-1) @ F.normalize(timbre, dim=-1).mT  # (B, K, S)
        distance = (1 - cosine) * known[:, None]
    charged = cost if not weights.matching_cosine else cost + weights.matching_cosine * distance
    matched = matches(charged.detach(), present, recipe.targets.matching)  # (B, K, S) bool
    taken = matched.any(2)  # (B, K)
    pairs = matched.sum().clamp(min=1)

    losses["slot"] = cost[matched].sum() / pairs
    losses["activity"] = F.binary_cross_entropy_with_logits(outputs.activity.float(), taken.float())
    losses["inactive"] = silence[~taken].sum() / (~taken).sum().clamp(min=1)
    all_off = log_off.sum(1)  # (B, P, T): the noisy-OR of the slots is 1 - exp(all_off)
    union = -(mixture * torch.log((-torch.expm1(all_off)).clamp(min=EPSILON)) + (1 - mixture) * all_off)
    losses["union"] = union.mean()
    if weights.timbre:
        usable = matched & known[:, None]
        losses["timbre"] = distance[usable].sum() / usable.sum().clamp(min=1)
    if weights.slot_polyphony:
        playing, wanted = slots.sum(2), targets.sum(2)  # (B, K, T), (B, S, T)
        b, k, s = matched.nonzero(as_tuple=True)
        difference = F.smooth_l1_loss(playing[b, k], wanted[b, s], reduction="sum")
        losses["slot_polyphony"] = difference / (pairs * playing.shape[-1])
    return {name: loss for name, loss in losses.items() if getattr(weights, name)}


def slot_targets(batch: WindowBatch, level: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> maps (B, S, P, T), present (B, S), timbre (B, S, E), known (B, S). At family level S = len(FAMILIES)."""
    if level == "stem":
        return batch.maps, batch.present, batch.timbre, batch.known
    member = F.one_hot(batch.family.clamp(min=0), len(FAMILIES)).float() * batch.present[..., None]  # (B, S, 4)
    maps = torch.einsum("bspt,bsf->bfpt", batch.maps, member).clamp(max=1)
    present = member.sum(1) > 0
    timbre = batch.timbre.new_zeros(len(maps), len(FAMILIES), batch.timbre.shape[-1])
    return maps, present, timbre, torch.zeros_like(present)


def matches(cost: Tensor, present: Tensor, matching: str) -> Tensor:
    """Which slot is held against which target: (B, K, S) costs and (B, S) bool -> (B, K, S) bool, one to one.

    "fixed" : slot k and target k.  "hungarian" : the cheapest assignment of the targets that are present; if they are
    more than the slots, the dearest are left out.
    """
    n_slots, n_targets = cost.shape[1:]
    matched = torch.zeros_like(cost, dtype=torch.bool)
    if matching == "fixed":
        both = min(n_slots, n_targets)
        index = torch.arange(both, device=cost.device)
        matched[:, index, index] = present[:, :both]
        return matched
    costs, here = cost.cpu().numpy(), present.cpu().numpy()
    for b in range(len(costs)):
        columns = np.flatnonzero(here[b])
        rows, chosen = linear_sum_assignment(costs[b][:, columns])
        matched[b, rows, columns[chosen]] = True
    return matched
