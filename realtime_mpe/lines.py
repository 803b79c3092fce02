"""Which notes are one player's by what is played alone: how lines are led, without a sound.

A listener who knows how music is written tells parts apart on paper: a part moves by small steps, carries on where it
ended, keeps its place among the others and its own way of moving. A small transformer has learnt that from scores. It
looks at all notes at once, each by its pitch, time and length, and every two of them by how they lie to each other.
"""

from collections.abc import Callable, Mapping

import numpy as np

from .affinity import CHORD_FRAMES, LEGATO_BEFORE, NEAR_PITCHES, OVERLAP_FRAMES, octaves, pairs_of, portions

HEADS = 4  # of attention, in every layer
KINDS, KIND_DIM = 16, 4  # products of two notes' features, by which they are judged beside how they lie
NOTE_INPUTS = 8
PAIR_INPUTS = 17
MIDDLE = 37  # pitch row, middle C: of what is high and low
JOINT = 6.0  # frames over which two notes' end and beginning stop being one moment
EPSILON = 1e-5  # of a normalisation

LineOdds = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""Pitch rows, starts and ends of N notes, frames, (N,) each; the frame up to which they sound -> (N, N) float32 log
odds that two are one player's, symmetric; the diagonal means nothing."""


def unknown(pitch: np.ndarray, start: np.ndarray, end: np.ndarray, now: float) -> np.ndarray:
    """Nothing is known of lines; see `LineOdds`."""
    return np.zeros((len(pitch), len(pitch)), np.float32)


def line_inputs(pitch: np.ndarray, start: np.ndarray, end: np.ndarray, now: float) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees, (N, NOTE_INPUTS) and (PAIR_INPUTS, N, N) float32: of a row how a column lies to it."""
    pitch, start = pitch.astype(np.float32), start.astype(np.float32)
    sounding = end > now
    end = np.minimum(end, now + 1).astype(np.float32)
    length = np.maximum(end - start, 0.0)  # a note may be found, by its look-ahead, before its first frame has passed
    higher = pitch - pitch[:, None]
    later = start - start[:, None]
    after = start - end[:, None]  # frames from a row's end to a column's beginning
    overlap = np.minimum(end[:, None], end) - np.maximum(start[:, None], start)
    together = overlap > OVERLAP_FRAMES
    side = np.sign(higher)
    distance = np.abs(higher)
    follows = (after >= -CHORD_FRAMES) & (after <= LEGATO_BEFORE) & (later > CHORD_FRAMES / 2)
    joint = np.exp(-np.abs(after) / JOINT)
    pairs = (
        higher / 12,
        distance / 12,
        np.exp(-distance / NEAR_PITCHES),
        distance == 0,
        octaves(pitch),
        _logarithm(after),
        _logarithm(after.T),
        _logarithm(later),
        _logarithm(overlap),
        together,
        side * together,
        np.abs(later) <= CHORD_FRAMES,
        follows,
        follows.T,
        joint,
        joint.T,
        side,
    )
    share = np.maximum(overlap, 0.0) / np.maximum(length, 1.0)[:, None]
    notes = (
        (pitch - MIDDLE) / 12,
        np.log1p(length) / 4,
        np.log1p(np.maximum(now - start, 0.0)) / 6,
        np.log1p(np.maximum(now - end, 0.0)) / 5,
        sounding,
        (share * (higher > 0)).sum(1) / 2,
        (share * (higher < 0)).sum(1) / 2,
        np.full(len(pitch), np.log1p(len(pitch)) / 5),
    )
    return np.stack(notes, 1, dtype=np.float32), np.stack(pairs, dtype=np.float32)


def _logarithm(frames: np.ndarray) -> np.ndarray:
    return np.sign(frames) * np.log1p(np.abs(frames)) / 4


class Lines:
    """The learned `LineOdds`.

    weights : arrays by name, as of `realtime_mpe.training.lines.LineNetwork`; ValueError if one is missing or of
    another shape.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self._weights = {name: np.asarray(weight, np.float32) for name, weight in weights.items()}
        self._layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
        try:
            self._weights["judge.0.weight"] = self._weights["judge.0.weight"] / 2  # it sees the sum of both sides
            self(*np.arange(6.0).reshape(3, 2), 4.0)
        except KeyError as error:
            raise ValueError(f"{error.args[0]} missing") from error

    def __call__(self, pitch: np.ndarray, start: np.ndarray, end: np.ndarray, now: float) -> np.ndarray:
        notes, pairs = line_inputs(pitch, start, end, now)
        n = len(notes)
        pairs = pairs.reshape(PAIR_INPUTS, n * n)
        lie, heed = (np.empty((len(self._weights[name]), n * n), np.float32) for name in ("pairs.2.bias", "heed.bias"))
        for some in portions(n * n):
            lie[:, some] = found = self._apart("pairs.2", self._apart("pairs.0", pairs[:, some]))
            heed[:, some] = self._weights["heed.weight"] @ found + self._weights["heed.bias"][:, None]
        x = self._linear("notes.2", np.maximum(self._linear("notes.0", notes), 0.0))
        for layer, own in enumerate(heed.reshape(self._layers, HEADS, n, n)):
            x = self._layer(f"layers.{layer}.", x, own)
        x = self._normal("after", x)
        one, other = (self._linear(side, x).reshape(n, KINDS, KIND_DIM).swapaxes(0, 1) for side in ("one", "other"))
        kinds = np.concatenate([one, other], 2) @ np.concatenate([other, one], 2).swapaxes(1, 2)  # both sides' sum
        rows, columns = pairs_of(n)
        pair, seen_from_it = rows * n + columns, columns * n + rows
        kinds = kinds.reshape(KINDS, n * n)
        odds = np.zeros((n, n), np.float32)
        for some in portions(len(rows)):
            seen = np.concatenate([lie[:, pair[some]] + lie[:, seen_from_it[some]], kinds[:, pair[some]]])
            judged = self._weights["judge.2.weight"] @ self._apart("judge.0", seen) + self._weights["judge.2.bias"]
            odds[rows[some], columns[some]] = odds[columns[some], rows[some]] = judged[0]
        return odds

    def _layer(self, name: str, x: np.ndarray, heed: np.ndarray) -> np.ndarray:
        attended = self._linear(name + "attend", self._normal(name + "before", x))
        query, key, value = attended.reshape(len(x), 3, HEADS, -1).transpose(1, 2, 0, 3)
        weight = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[2], dtype=np.float32) + heed
        weight = np.exp(weight - weight.max(2, keepdims=True))
        weight /= weight.sum(2, keepdims=True)
        x = x + self._linear(name + "gather", (weight @ value).swapaxes(0, 1).reshape(len(x), -1))
        hidden = np.maximum(self._linear(name + "think.0", self._normal(name + "between", x)), 0.0)
        return x + self._linear(name + "think.2", hidden)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """(N, n_in) -> (N, n_out)."""
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _apart(self, name: str, x: np.ndarray) -> np.ndarray:
        """The same of what lies in memory feature by feature, and a ReLU: (n_in, N) -> (n_out, N)."""
        y = self._weights[f"{name}.weight"] @ x
        y += self._weights[f"{name}.bias"][:, None]
        return np.maximum(y, 0.0, out=y)

    def _normal(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(1, keepdims=True) + EPSILON)
        return x * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
