"""Thresholds of the note tracker, chosen on validation mixtures for every look-ahead, then fixed in the model file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, MAX_LOOKAHEAD, N_PITCHES, PHASES
from realtime_mpe.leveller import Leveller
from realtime_mpe.model import agreed, log_odds
from realtime_mpe.notes import NoteTracker, Thresholds

from .frontend import FrontEnd
from .metrics import frame_f1, note_f1, notes_to_roll
from .mixing import Mixture
from .network import LiveNetwork

GRIDS = {
    "on": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "off": (0.15, 0.25, 0.35, 0.45, 0.55),
    "onset": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "repeat": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
SWEEPS = 2  # coordinate descent settles within two


@dataclass(frozen=True)
class Heard:
    """Posteriors of one mixture, (T, L, P), (T, L, P) and (T, P, D), T steps, beside what was played.

    embedding : None of a network that does not tell players apart.  steps : a frame.
    """

    mix: np.ndarray
    onset: np.ndarray
    embedding: np.ndarray | None
    mixture: Mixture
    steps: int = 1


@torch.no_grad()
def hear(network: LiveNetwork, front_end: FrontEnd, mixtures: Iterable[Mixture], device: torch.device) -> list[Heard]:
    """Run the network over whole mixtures, one at a time, in all phases as the engine does."""
    heard = []
    for mixture in mixtures:
        audio = torch.from_numpy(mixture.audio).to(device)
        later = [HOP - (phase + 1) * HOP // PHASES for phase in range(PHASES)]  # by which its frames end early
        steps = interleaved(front_end.levels(torch.stack([F.pad(audio, (n, 0))[: len(audio)] for n in later])))
        leveller = Leveller(FRAME_SECONDS / PHASES)
        levelled = np.stack([leveller.process(frame) for frame in steps])
        outputs, _ = network(torch.from_numpy(levelled).to(device).unflatten(0, (-1, PHASES)).transpose(0, 1))
        heard.append(
            Heard(
                all_agreed(interleaved(outputs["mix"].sigmoid())),
                all_agreed(interleaved(outputs["onset"].sigmoid())),
                interleaved(outputs["embedding"]) if "embedding" in outputs else None,
                mixture,
                PHASES,
            )
        )
    return heard


def interleaved(phases: Tensor) -> np.ndarray:
    """(PHASES, T, ...) -> (PHASES * T, ...), in the order in which the engine hears them."""
    return phases.transpose(0, 1).flatten(0, 1).cpu().numpy()


def all_agreed(steps: np.ndarray) -> np.ndarray:
    """(T, L, P) probabilities of each step by itself -> `agreed` with those of the step before it."""
    odds = log_odds(steps)
    return np.concatenate([steps[:1], agreed(odds[1:], odds[:-1])])


def track(heard: Heard, thresholds: Thresholds, lookahead: int) -> np.ndarray:
    """Notes of the mixture, (N, 3): onset s, offset s, MIDI, as the engine would emit them."""
    tracker = NoteTracker(N_PITCHES, thresholds, lookahead, heard.steps)
    notes, begun = [], {}
    for step in range(len(heard.mix) + 1):
        last = step == len(heard.mix)
        for event in tracker.flush() if last else tracker.process(heard.mix[step], heard.onset[step]):
            if event.on:
                begun[event.pitch] = event.step
            else:
                start = begun.pop(event.pitch)
                onset, offset = ((at / heard.steps - 0.5) * FRAME_SECONDS for at in (start, event.step))
                notes.append((onset, offset, event.pitch + FIRST_MIDI))
    return np.array(notes, float).reshape(-1, 3)


def score(heard: Sequence[Heard], thresholds: Thresholds, lookahead: int) -> float:
    """Mean of frame F1 and note F1 (50 ms), all mixtures pooled, 0..1: what sounds, and when it began, count alike."""
    references, estimates, reference_rolls, estimate_rolls = [], [], [], []
    for item in heard:
        n_frames = len(item.mix) // item.steps
        reference = item.mixture.notes[:, 1:4]
        reference = reference[(reference[:, 0] >= 0) & (reference[:, 0] < n_frames * FRAME_SECONDS)]
        estimate = track(item, thresholds, lookahead)
        reference_rolls.append(notes_to_roll(item.mixture.notes[:, 1:4], n_frames))
        estimate_rolls.append(notes_to_roll(estimate, n_frames))
        references.append(reference)
        estimates.append(estimate)
    return (frame_f1(reference_rolls, estimate_rolls) + note_f1(references, estimates)) / 2


def calibrate(heard: Sequence[Heard], say: Callable[[str], None] = print) -> tuple[Thresholds, ...]:
    """Best thresholds for every look-ahead 0..MAX_LOOKAHEAD, each sought from those of the one before."""
    chosen = [Thresholds()]
    for lookahead in range(MAX_LOOKAHEAD + 1):
        chosen.append(best_thresholds(heard, lookahead, chosen[-1], GRIDS, say))
    return tuple(chosen[1:])


def best_thresholds(
    heard: Sequence[Heard],
    lookahead: int,
    best: Thresholds,
    grids: Mapping[str, Sequence[float]],
    say: Callable[[str], None] = print,
) -> Thresholds:
    """Those with the best `score` at one look-ahead, by coordinate descent over the grids from ``best`` on."""
    best_score = score(heard, best, lookahead)
    for _ in range(SWEEPS):
        before = best
        for name, grid in grids.items():
            for value in grid:
                candidate = replace(best, **{name: value})
                candidate = replace(candidate, off=min(candidate.off, candidate.on))
                if candidate == best:
                    continue
                candidate_score = score(heard, candidate, lookahead)
                if candidate_score > best_score:
                    best, best_score = candidate, candidate_score
        if best == before:
            break
    say(f"look-ahead {lookahead}: {100 * best_score:.2f} at {best}")
    return best
