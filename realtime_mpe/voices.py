"""Whose note it is: an online memory of voices with a learned pointer.

Every note gets the mean embedding of its first frames. A voice keeps its last notes (pitch, embedding, when it
ended). For a new note the pointer scores every voice, and "a player not heard before", from timbre, pitch and time;
the surest note of a chord is given out first. Nobody says how many players there are. A choice stands until
the note ends; meanwhile the note's embedding goes on improving in the memory.

This is the associative timbre memory of timbre-adaptive transcription, worked at the level of notes. Training runs
this very class and learns the pointer from the features that it meets, on its own mistakes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .analysis import MAX_LOOKAHEAD

REMEMBERED_NOTES = 24  # a voice
HISTORY_HOPS = MAX_LOOKAHEAD + 4  # embeddings kept for a note that is found a little after it began
EMBEDDING_FRAMES = 32  # a note's embedding is the mean over at most its first second
NEAR_PITCHES = 3.0  # semitones over which "near in pitch" falls off: timbre changes with register
RECENT_FRAMES = 4  # notes this close together begin as one chord, or follow each other legato

FORGOTTEN = -1  # column of a note that still sounds after newer ones have taken its place
VOICE_FEATURES = 24  # a voice
BEST, NEAR, BUSY = 1, 2, 15  # the features that the situation is summed up from
NEW_FEATURES = 8  # of the situation, for "a new voice"


class NewNote(NamedTuple):
    """A note that waits for its voice. pitch row; first frame; sum of its embeddings so far, (D,), over ``frames``."""

    pitch: int
    start: int
    total: np.ndarray
    frames: int


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(V, VOICE_FEATURES), (NEW_FEATURES,) -> (V + 1,) scores; the last is for a new voice."""


class VoiceMemory:
    """Voices of one performance. ``max_voices`` bounds how many are told apart.

    The memory is a table: row = voice, column = one of its REMEMBERED_NOTES last notes. A note that sounds has an
    infinite end, so that nothing here can know when it will end.
    """

    latency = 0

    def __init__(self, scorer: Scorer, max_voices: int):
        self.max_voices = max_voices
        self._scorer = scorer
        self.reset()

    def reset(self) -> None:
        shape = self.max_voices, REMEMBERED_NOTES
        self.count = 0  # voices so far
        self.heard = np.zeros(self.max_voices, int)  # notes ever, of each voice
        self._used = np.zeros(shape, bool)
        self._pitch = np.zeros(shape)
        self._start = np.zeros(shape)
        self._end = np.zeros(shape)
        self._turn = np.zeros(shape, int)  # which note of its voice it is, from 1
        self._shared = np.zeros(shape, bool)  # sounded together with another note of its voice
        self._frames = np.zeros(shape, int)
        self._total: np.ndarray | None = None  # (max_voices, REMEMBERED_NOTES, D), known with the first note
        self._unit: np.ndarray | None = None  # the same, each of length 1
        self._sounding: dict[int, tuple[int, int]] = {}  # pitch row -> row and column

    def note_off(self, pitch: int, frame: int) -> int:
        """End the note at this pitch row; returns its voice."""
        voice, column = self._sounding.pop(pitch)
        if column != FORGOTTEN:
            self._end[voice, column] = frame
        return voice

    def note_ons(self, starts: Sequence[tuple[int, int]], history: np.ndarray, frame: int) -> list[tuple[int, int]]:
        """Give the notes that begin in this hop to voices.

        starts : (pitch row, first frame) of each.  history : (H, n_pitches, D) embeddings of the last H hops, newest
        last.  frame : now.  Returns (pitch row, voice), the surest first.
        """
        waiting = []
        for pitch, start in starts:
            frames = min(max(frame - start, 0) + 1, len(history))
            waiting.append(NewNote(pitch, start, history[-frames:, pitch].sum(0), frames))
        given = []
        while waiting:
            probabilities = [self._probabilities(note, frame) for note in waiting]
            surest = int(np.argmax([p.max() for p in probabilities]))
            note = waiting.pop(surest)
            given.append((note.pitch, self._give(note, int(np.argmax(probabilities[surest])), frame)))
        return given

    def hear(self, embedding: np.ndarray) -> None:
        """Let every sounding note learn from this hop's embedding, (n_pitches, D)."""
        for pitch, (voice, column) in self._sounding.items():
            if column != FORGOTTEN and self._frames[voice, column] < EMBEDDING_FRAMES:
                self._learn(voice, column, embedding[pitch], 1)

    def _learn(self, voice: int, column: int, total: np.ndarray, frames: int) -> None:
        self._total[voice, column] += total
        self._frames[voice, column] += frames
        self._unit[voice, column] = unit(self._total[voice, column])

    def _give(self, note: NewNote, voice: int, frame: int) -> int:
        """Remember a note in a voice; ``voice`` == count asks for a new one. Returns where it went."""
        if voice == self.count:
            if self.count < self.max_voices:
                self.count += 1
            else:
                voice = self._longest_idle()
                self._used[voice] = False
                self.heard[voice] = 0
        if self._total is None:
            self._total = np.zeros((*self._used.shape, len(note.total)))
            self._unit = np.zeros_like(self._total)
        busy = self._used[voice] & np.isinf(self._end[voice])
        self._shared[voice, busy] = True
        column = self._column(voice)
        self.heard[voice] += 1
        self._used[voice, column] = True
        self._pitch[voice, column] = note.pitch
        self._start[voice, column] = note.start
        self._end[voice, column] = np.inf
        self._turn[voice, column] = self.heard[voice]
        self._shared[voice, column] = busy.any()
        self._total[voice, column] = 0.0
        self._frames[voice, column] = 0
        self._learn(voice, column, note.total, note.frames)
        self._sounding[note.pitch] = voice, column
        return voice

    def _column(self, voice: int) -> int:
        """Where the next note goes: a free place, or that of the oldest note, one that has ended if there is one."""
        used = self._used[voice]
        if not used.all():
            return int(np.argmin(used))
        ended = np.isfinite(self._end[voice])
        column = int(np.argmin(np.where(ended | ~ended.any(), self._turn[voice], np.iinfo(int).max)))
        for pitch, place in self._sounding.items():
            if place == (voice, column):
                self._sounding[pitch] = voice, FORGOTTEN
        return column

    def _longest_idle(self) -> int:
        """The voice that has rested longest makes room: a memory that never forgets fills up with strangers."""
        return int(np.argmin(np.where(self._used, self._end, -np.inf).max(1)))

    def _probabilities(self, note: NewNote, frame: int) -> np.ndarray:
        """Over the voices and, last, a new voice (0 where no room can be made), (count + 1,)."""
        scores = self._scorer(*self.features(note, frame))
        if self._sounding_voices() == self.max_voices:
            scores[-1] = -np.inf
        probabilities = np.exp(scores - scores.max())
        return probabilities / probabilities.sum()

    def _sounding_voices(self) -> int:
        return len({voice for voice, _ in self._sounding.values()})

    def features(self, note: NewNote, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """What the pointer sees: (count, VOICE_FEATURES) and (NEW_FEATURES,), float32, all of order one."""
        voices = np.zeros((self.count, VOICE_FEATURES), np.float32)
        if self.count:
            voices[:] = self._voice_features(note, frame)
        free = voices[voices[:, BUSY] == 0]
        new = (
            self.count / 8,
            self._sounding_voices() / 8,
            np.log1p(self.heard[: self.count].sum()) / 4,
            voices[:, NEAR].max(initial=-1.0),
            voices[:, BEST].max(initial=-1.0),
            free[:, NEAR].max(initial=-1.0),
            note.pitch / 72,
            min(note.frames, 8) / 8,
        )
        return voices, np.array(new, np.float32)

    def _voice_features(self, note: NewNote, frame: int) -> np.ndarray:
        n = self.count
        rows = np.arange(n)
        used, pitch, start, end = self._used[:n], self._pitch[:n], self._start[:n], self._end[:n]
        held = used.sum(1)
        similarity = self._unit[:n] @ unit(note.total)
        last = np.argmax(np.where(used, self._turn[:n], 0), 1)

        centre = np.where(used[..., None], self._unit[:n], 0.0).sum(1) / held[:, None]
        spread = np.sqrt(np.square(centre).sum(1))
        best = -np.sort(-np.where(used, similarity, -np.inf), 1)[:, :3]
        found = np.isfinite(best)
        distance = note.pitch - pitch
        near = np.where(used, np.exp(-np.abs(distance) / NEAR_PITCHES), 0.0)
        near_similarity = (near * similarity).sum(1) / near.sum(1)

        mean_pitch = np.where(used, pitch, 0.0).sum(1) / held
        pitch_spread = np.sqrt(np.where(used, np.square(pitch - mean_pitch[:, None]), 0.0).sum(1) / held)
        from_last = distance[rows, last]

        sounding = used & np.isinf(end)
        busy = sounding.sum(1)
        rest = np.where(busy > 0, 0.0, frame - np.where(used & ~sounding, end, -np.inf).max(1))
        rest = np.maximum(rest, 0.0)
        closest = np.argmin(np.where(sounding, np.abs(distance), np.inf), 1)
        last_end = end[rows, last]
        # How far this voice's timbre is ahead of the best other.
        ahead = np.zeros(n)
        if n > 1:
            second, first = np.sort(near_similarity)[-2:]
            ahead = near_similarity - np.where(near_similarity == first, second, first)
        return np.stack(
            (
                np.where(used, similarity, 0.0).sum(1) / held / (spread + 1e-9),
                best[:, 0],  # BEST
                near_similarity,  # NEAR
                similarity[rows, last],
                np.where(found, best, 0.0).sum(1) / found.sum(1),
                spread,
                near.sum(1) / held,
                np.abs(from_last) / 12,
                from_last / 12,
                np.abs(note.pitch - mean_pitch) / 12,
                (note.pitch - mean_pitch) / 12,
                pitch_spread / 12,
                np.where(used, np.abs(distance), np.inf).min(1) / 12,
                np.log1p(rest) / 4,
                (busy == 0) & (rest <= RECENT_FRAMES),
                busy > 0,  # BUSY
                np.minimum(busy, 4) / 4,
                (self._shared[:n] & used).sum(1) / held,
                np.where(busy > 0, distance[rows, closest], 0.0) / 12,
                (sounding & (distance % 12 == 0)).any(1),
                (sounding & (np.abs(note.start - start) <= RECENT_FRAMES)).any(1),
                (from_last == 0) & np.isfinite(last_end) & (note.start - last_end <= RECENT_FRAMES),
                np.log1p(self.heard[:n]) / 4,
                ahead,
            ),
            1,
        )


class SlotVoices:
    """Voices of a network whose slots are players: a note belongs to the slot that says most of it. See VoiceMemory."""

    latency = 0

    def __init__(self, slots: int):
        self.max_voices = slots
        self.reset()

    def reset(self) -> None:
        self._heard: set[int] = set()
        self._sounding: dict[int, int] = {}  # pitch row -> voice

    @property
    def count(self) -> int:
        """Voices so far."""
        return len(self._heard)

    def note_ons(self, starts: Sequence[tuple[int, int]], history: np.ndarray, frame: int) -> list[tuple[int, int]]:
        """history : (H, n_pitches, K) what each slot says of every pitch, up to label frame ``frame`` + 1, the newest
        in which a note can begin; the rest as in VoiceMemory."""
        given = []
        for pitch, start in starts:
            frames = min(frame + 2 - start, len(history))
            voice = int(np.argmax(history[-frames:, pitch].sum(0)))
            self._heard.add(voice)
            self._sounding[pitch] = voice
            given.append((pitch, voice))
        return given

    def note_off(self, pitch: int, frame: int) -> int:
        return self._sounding.pop(pitch)

    def hear(self, embedding: np.ndarray) -> None:
        """Nothing to learn: what a slot listens for is fixed."""


def unit(vector: np.ndarray) -> np.ndarray:
    """(D,) -> the same direction with length 1; zeros stay zeros."""
    return vector / (np.sqrt(vector @ vector) + 1e-9)


POINTER_LAYERS = (0, 2, 4)  # where the linear layers stand among the activations, as training names them


class Pointer:
    """The learned scorer: voters, trained alike from different first weights, whose log-probabilities are averaged.

    One alone is a matter of luck: a mistake early in a performance carries through it.
    """

    def __init__(self, voters: Sequence["Voter"]):
        if not voters:
            raise ValueError("a pointer needs at least one voter")
        self.voters = tuple(voters)

    def __call__(self, features: np.ndarray, new: np.ndarray) -> np.ndarray:
        inputs = pointer_inputs(features, new)
        votes = np.stack([voter(*inputs) for voter in self.voters])
        return (votes - np.logaddexp.reduce(votes, 1, keepdims=True)).mean(0)


class Voter:
    """Two small perceptrons that share nothing but the situation they look at.

    weights : arrays by name, as in ``NAMES``; layer widths follow from them. A voice is scored from its own
    features, the situation, and the mean and maximum of all voices' features, so that scores can be comparative.
    """

    NAMES = tuple(
        f"{part}.{layer}.{kind}" for part in ("voice", "new") for layer in POINTER_LAYERS for kind in ("weight", "bias")
    )

    def __init__(self, weights: dict[str, np.ndarray]):
        missing = [name for name in self.NAMES if name not in weights]
        if missing:
            raise ValueError(f"the pointer lacks {', '.join(missing)}")
        self._weights = {name: np.asarray(weights[name], np.float32) for name in self.NAMES}

    def __call__(self, voices: np.ndarray, situation: np.ndarray) -> np.ndarray:
        """Inputs as of `pointer_inputs` -> (V + 1,) scores."""
        return np.concatenate([self._perceptron("voice", voices), self._perceptron("new", situation[None])])

    def _perceptron(self, part: str, x: np.ndarray) -> np.ndarray:
        for layer in POINTER_LAYERS:
            x = x @ self._weights[f"{part}.{layer}.weight"].T + self._weights[f"{part}.{layer}.bias"]
            if layer != POINTER_LAYERS[-1]:
                x = np.maximum(x, 0.0)
        return x[:, 0]


def pointer_inputs(features: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features to the perceptrons' inputs: (V, 3 F + N) for the voices and (2 F + N,) for the new voice."""
    if len(features):
        pooled = np.concatenate([features.mean(0), features.max(0), new])
    else:
        pooled = np.concatenate([np.zeros(2 * VOICE_FEATURES, np.float32), new])
    return np.concatenate([features, np.tile(pooled, (len(features), 1))], 1), pooled
