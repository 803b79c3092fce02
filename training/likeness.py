"""Players who sound more alike than rendered ones: two violins of one maker in one room, one player heard twice.

The instruments of training are further apart in the embedding than those of real ensembles, of which a memory has to
know that pitch and place in the texture tell more than timbre does. So performances are heard again as if several of
their players had nearly one timbre. Nothing has to be rendered for it: their notes are moved towards each other in
the embedding.
"""

from dataclasses import replace

import numpy as np

from realtime_mpe.affinity import EMBEDDING_FRAMES
from realtime_mpe.voices import HISTORY_FRAMES

from .pointer import Performance

FAMILY_PROBABILITY = 0.65  # of each of the players to be one of those who are brought together
MOST_ALIKE = 1.0  # share of their distance that is taken away, at most
MOST_CROSSED = 0.15  # share of the time in which one of two of them plays on the other's side: else nothing tells them
FEWEST_NOTES = 3  # of a player whose timbre is known


def liken(performance: Performance, rng: np.random.Generator) -> Performance:
    """The performance with some of its players more alike, or itself if there are no two of them. Players whose lines
    cross are left as they are, as are notes of two players and of none."""
    spans, owner = notes_of(performance)
    embeddings = performance.embeddings()
    heard = EMBEDDING_FRAMES * performance.steps
    timbres = np.array([embeddings[begun : min(end, begun + heard), pitch].mean(0) for begun, end, pitch in spans])
    crossed = crossing(spans, owner)
    family: list[int] = []
    for player in range(len(crossed)):
        known = (owner == player).sum() >= FEWEST_NOTES
        if known and rng.random() < FAMILY_PROBABILITY and (crossed[player, family] <= MOST_CROSSED).all():
            family.append(player)
    if len(family) < 2:
        return performance
    mean = {player: timbres[owner == player].mean(0) for player in family}
    centre = np.mean(list(mean.values()), 0)
    share = rng.uniform(0.0, MOST_ALIKE)
    free = np.zeros(embeddings.shape[1], int)  # step from which on a pitch is no earlier note's
    for (begun, end, pitch), player in zip(spans.tolist(), owner.tolist(), strict=True):
        first = max(begun + 1 - HISTORY_FRAMES * performance.steps, free[pitch])
        if player in mean:
            embeddings[first:end, pitch] -= share * (mean[player] - centre)
        free[pitch] = end
    steps, pitches = performance.where.T
    return replace(performance, values=embeddings[steps, pitches].astype(performance.values.dtype))


def notes_of(performance: Performance) -> tuple[np.ndarray, np.ndarray]:
    """Detected notes in the order they begin: (N, 3) int steps from .. to and pitch row; (N,) player, -1 where there
    are none or several."""
    spans: list[list[int]] = []
    owner: list[int] = []
    sounding: dict[int, list[int]] = {}
    for step, events in enumerate(performance.events):
        for event in events:
            if event.on:
                players = performance.players[step].get(event.pitch, frozenset())
                owner.append(next(iter(players)) if len(players) == 1 else -1)
                spans.append([step, performance.n_steps, event.pitch])
                sounding[event.pitch] = spans[-1]
            else:
                sounding.pop(event.pitch)[1] = step
    return np.array(spans, int).reshape(-1, 3), np.array(owner, int)


def crossing(spans: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(K, K) share of the time in which two players sound together that one of them spends on its rarer side of the
    other."""
    begun, end, pitch = spans.T
    together = np.maximum(np.minimum(end[:, None], end) - np.maximum(begun[:, None], begun), 0)
    plays = np.equal.outer(owner, np.arange(owner.max(initial=-1) + 1)).astype(float)
    above = plays.T @ (together * (pitch[:, None] > pitch)) @ plays
    return np.minimum(above, above.T) / np.maximum(above + above.T, 1)
