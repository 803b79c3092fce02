"""Training of the live network: one loop, read from top to bottom. It resumes from its last checkpoint.

What sounds and whose it is are learnt together, for ``hours`` of mixtures, or until validation has not become better
for a while.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from realtime_mpe.analysis import FRAME_SECONDS, HOP
from realtime_mpe.errors import UserError

from .bank import StemBank
from .frontend import FrontEnd
from .losses import embedding_loss, mixture_loss, note_embeddings, onset_loss, polyphony_loss
from .mixing import Batch, collate, remix, shifted
from .network import LiveNetwork, NetworkConfig
from .stems import StemCache

WARMUP_STEPS = 300
AVERAGE_DECAY = 0.998  # of the weights' moving average, which is what is validated and exported
CHECKPOINT_SECONDS = 120.0
CHECKPOINT_FILE, CURVE_FILE = "checkpoint.pt", "curve.jsonl"
VALIDATION_MIXTURES = 24
VALIDATION_FRAMES = 512


@dataclass(frozen=True)
class FitConfig:
    hours: float = 2.0  # of re-mixed audio
    batch_size: int = 2
    n_frames: int = 256  # of one example, 8.2 s
    learning_rate: float = 1.2e-3
    weight_decay: float = 1e-2
    onset_weight: float = 0.5
    polyphony_weight: float = 0.02
    embedding_weight: float = 0.05  # at which players pull at the trunk about as hard as notes do
    validate_every: float = 2.0  # hours heard
    patience: int = 8  # validations without a better score
    seed: int = 0

    def for_device(self, device: torch.device) -> "FitConfig":
        """With batches that keep a GPU busy, and the longer steps that they bear."""
        if device.type == "cpu":
            return self
        return replace(self, batch_size=24, n_frames=384, learning_rate=2.5e-3, validate_every=50.0)


class Scores(NamedTuple):
    """Validation at look-ahead 1. mix_ap, mix_f1 : frame level, best threshold; same_player_auc : of note pairs, None
    for a network without a branch."""

    mix_ap: float
    mix_f1: float
    onset_ap: float
    same_player_auc: float | None


def fit(
    run: Path,
    train: StemCache,
    validation: StemCache,
    config: FitConfig,
    network_config: NetworkConfig,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> LiveNetwork:
    """Train, or go on training, the network of ``run``; returns it with its averaged weights, in evaluation mode.

    Writes its checkpoint, ``curve.jsonl``, ``progress.json`` and ``fit.json`` into ``run``. Ctrl-C saves a checkpoint
    and is passed on.
    """
    torch.manual_seed(config.seed)
    network = LiveNetwork(network_config).to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(network, avg_fn=moving_average, use_buffers=True)
    weights = [p for p in network.parameters() if p.ndim > 1]
    norms = [p for p in network.parameters() if p.ndim <= 1]
    groups = [dict(params=weights, weight_decay=config.weight_decay), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    front_end = FrontEnd().to(device)
    generator = torch.Generator().manual_seed(config.seed)
    checkpoint = run / CHECKPOINT_FILE
    progress = dict(step=0, hours=0.0, best=-1.0, stale=0)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        try:
            network.load_state_dict(saved["network"])
        except RuntimeError as error:
            raise UserError(f"{run} holds a network of another size; give its --size, or another --out") from error
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = saved["progress"]
        say(f"resuming after {progress['hours']:.2f} hours heard")
    rng = np.random.default_rng([config.seed, progress["step"]])
    torch.manual_seed(config.seed + progress["step"])
    (run / "fit.json").write_text(json.dumps(dict(fit=asdict(config), network=network_config.to_dict()), indent=1))
    heard_per_step = config.batch_size * config.n_frames * FRAME_SECONDS / 3600
    held_out = validation_batches(validation, config.seed)
    bank = StemBank(train, device)

    def save() -> None:
        state = dict(
            network=network.state_dict(),
            average=average.state_dict(),
            optimizer=optimizer.state_dict(),
            progress=progress,
        )
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint)
        (run / "progress.json").write_text(json.dumps(progress))

    last_save = last_line = time.monotonic()
    next_validation = progress["hours"] + config.validate_every
    running = {}
    try:
        while progress["hours"] < config.hours and progress["stale"] < config.patience:
            network.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.learning_rate, progress["step"], progress["hours"] / config.hours)
            batch = bank.draw(config.batch_size, config.n_frames, rng)
            with torch.no_grad():
                frames = front_end(batch.audio)
            with torch.autocast(device.type, torch.bfloat16):
                outputs, _ = network(frames)
                losses = {
                    "mix": mixture_loss(outputs, batch),
                    "onset": config.onset_weight * onset_loss(outputs, batch),
                    "polyphony": config.polyphony_weight * polyphony_loss(outputs, batch),
                }
                if network_config.tells_players:
                    network.follow_centre(outputs["branch"].detach(), shifted(batch.mix, 1) > 0)
                    losses["embedding"] = config.embedding_weight * embedding_loss(outputs, batch, generator)
            loss = sum(losses.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(network)
            progress["step"] += 1
            progress["hours"] += heard_per_step
            for name, value in losses.items():
                running[name] = torch.lerp(running.get(name, value.detach()), value.detach(), 0.02)

            now = time.monotonic()
            if now - last_line > 10:
                last_line = now
                parts = "  ".join(f"{name} {float(value):.4f}" for name, value in running.items())
                say(f"{progress['hours']:7.2f} h heard of {config.hours:g}  step {progress['step']}  {parts}")
            if now - last_save > CHECKPOINT_SECONDS:
                last_save = now
                save()
            if progress["hours"] >= min(next_validation, config.hours):
                next_validation = progress["hours"] + config.validate_every
                scores = validate(average.module, front_end, held_out, device)
                score = scores.mix_ap + (scores.same_player_auc or 0.0)
                progress["stale"] = 0 if score > progress["best"] + 1e-4 else progress["stale"] + 1
                progress["best"] = max(progress["best"], score)
                losses_now = {name: float(value) for name, value in running.items()}
                with (run / CURVE_FILE).open("a") as curve:
                    curve.write(json.dumps({**progress, **losses_now, **scores._asdict()}) + "\n")
                say(
                    f"{progress['hours']:7.2f} h heard  validation: mixture AP {100 * scores.mix_ap:.2f} F1 "
                    f"{100 * scores.mix_f1:.2f}  onset AP {100 * scores.onset_ap:.2f}"
                    + (f"  same player AUC {100 * scores.same_player_auc:.2f}" if network_config.tells_players else "")
                )
    finally:
        save()
    return average.module.eval()


def moving_average(average: Tensor, now: Tensor, n: Tensor) -> Tensor:
    """Exponential, but quick at first: the initial weights must not linger in it."""
    if not now.is_floating_point():  # a count of batches
        return now
    return torch.lerp(now, average, torch.clamp((1 + n) / (10 + n), max=AVERAGE_DECAY).to(now.dtype))


def learning_rate(peak: float, step: int, share: float) -> float:
    """Up for WARMUP_STEPS, then down along half a cosine; share : of the hours that have been heard, 0..1."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def validation_batches(cache: StemCache, seed: int) -> list[Batch]:
    """A fixed set of mixtures of unseen pieces played by unseen sources."""
    rng = np.random.default_rng([seed, 1])
    seconds = VALIDATION_FRAMES * FRAME_SECONDS
    mixtures = [remix(cache, k % len(cache), seconds, rng) for k in range(VALIDATION_MIXTURES)]
    mixtures = [m for m in mixtures if len(m.audio) >= VALIDATION_FRAMES * HOP]
    return [collate(mixtures[k : k + 4], VALIDATION_FRAMES) for k in range(0, len(mixtures), 4)]


@torch.no_grad()
def validate(network: LiveNetwork, front_end: FrontEnd, held_out: list[Batch], device: torch.device) -> Scores:
    network.eval()
    mix, onset, pairs = [], [], []
    for batch in held_out:
        batch = batch.to(device)
        outputs, _ = network(front_end(batch.audio))
        mix.append((outputs["mix"][:, :, 1].sigmoid().flatten(), shifted(batch.mix, 1).flatten()))
        onset.append((outputs["onset"][:, :, 1].sigmoid().flatten(), shifted(batch.onset, 1).flatten()))
        if "embedding" in outputs:
            pairs.append(pair_similarities(outputs["embedding"], batch.notes))
    curves = [precision_recall(*(torch.cat(side) for side in zip(*rows, strict=True))) for rows in (mix, onset)]
    f1 = (2 * curves[0][0] * curves[0][1] / (curves[0][0] + curves[0][1] + 1e-9)).max()
    same_player_auc = auc(*(torch.cat(side) for side in zip(*pairs, strict=True))) if pairs else None
    return Scores(
        float(average_precision(*curves[0])), float(f1), float(average_precision(*curves[1])), same_player_auc
    )


def pair_similarities(embedding: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each pair of notes of a mixture, one after 3 frames, one whole, and whether one player plays both."""
    early = note_embeddings(embedding, notes, torch.full((len(notes),), 3, device=notes.device))
    whole = note_embeddings(embedding, notes, torch.full((len(notes),), 32, device=notes.device))
    same_mixture = notes[:, None, 0] == notes[None, :, 0]
    same_mixture &= ~torch.eye(len(notes), dtype=torch.bool, device=notes.device)
    same = notes[:, None, 1] == notes[None, :, 1]
    return (early @ whole.T)[same_mixture], same[same_mixture]


def precision_recall(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    order = score.argsort(descending=True)
    hits = target[order].cumsum(0)
    return hits / torch.arange(1, len(hits) + 1, device=hits.device), hits / hits[-1].clamp(min=1)


def average_precision(precision: Tensor, recall: Tensor) -> Tensor:
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative."""
    ranks = score.argsort().argsort().double() + 1
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
