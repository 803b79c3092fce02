"""Whose note it is: an online memory of voices with a learned pointer.

Every note gets the mean embedding of its first frames. A voice keeps its last notes (pitch, embedding, when it
ended). For a new note the pointer scores every voice, and "a player not heard before", from timbre, pitch and time;
the surest note of a chord is given out first. Nobody says how many players there are. A choice stands until
the note ends; meanwhile the note's embedding goes on improving in the memory.

This is the associative timbre memory of timbre-adaptive transcription, worked at the level of notes. Training runs
this very class and learns the pointer from the features that it meets, on its own mistakes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .analysis import MAX_LOOKAHEAD

REMEMBERED_NOTES = 24  # a voice
HISTORY_HOPS = MAX_LOOKAHEAD + 4  # embeddings kept for a note that is found a little after it began
EMBEDDING_FRAMES = 32  # a note's embedding is the mean over at most its first second
NEAR_PITCHES = 3.0  # semitones over which "near in pitch" falls off: timbre changes with register
RECENT_FRAMES = 4  # notes this close together begin as one chord, or follow each other legato

VOICE_FEATURES = 24  # a voice
NEW_FEATURES = 8  # of the situation, for "a new voice"


@dataclass
class RememberedNote:
    """pitch row; unit-length embedding; first frame; end frame (None while it sounds)."""

    pitch: int
    start: int
    total: np.ndarray
    frames: int = 0
    end: int | None = None
    shared: bool = False  # began or went on while another note of its voice sounded

    @property
    def embedding(self) -> np.ndarray:
        return self.total / (np.linalg.norm(self.total) + 1e-9)


@dataclass
class Voice:
    notes: list[RememberedNote] = field(default_factory=list)
    heard: int = 0  # notes ever

    def add(self, note: RememberedNote) -> None:
        busy = [other for other in self.notes if other.end is None]
        for other in busy:
            other.shared = note.shared = True
        self.notes.append(note)
        self.heard += 1
        if len(self.notes) > REMEMBERED_NOTES:
            oldest = next((k for k, other in enumerate(self.notes) if other.end is not None), 0)
            del self.notes[oldest]


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(V, VOICE_FEATURES), (NEW_FEATURES,) -> (V + 1,) scores; the last is for a new voice."""


class VoiceMemory:
    """Voices of one performance. ``process`` is called once a hop, ``max_voices`` bounds how many are told apart."""

    latency = 0

    def __init__(self, scorer: Scorer, max_voices: int):
        self.max_voices = max_voices
        self._scorer = scorer
        self.reset()

    def reset(self) -> None:
        self.voices: list[Voice] = []
        self._sounding: dict[int, tuple[int, RememberedNote]] = {}

    def voice_of(self, pitch: int) -> int:
        """Voice of the note that sounds at this pitch row; KeyError if none does."""
        return self._sounding[pitch][0]

    def note_off(self, pitch: int, frame: int) -> int:
        """End the note at this pitch row; returns its voice."""
        voice, note = self._sounding.pop(pitch)
        note.end = frame
        return voice

    def note_ons(self, starts: Sequence[tuple[int, int]], history: np.ndarray, frame: int) -> list[tuple[int, int]]:
        """Give the notes that begin in this hop to voices.

        starts : (pitch row, first frame) of each.  history : (H, n_pitches, D) embeddings of the last H hops, newest
        last.  frame : now.  Returns (pitch row, voice), the surest first.
        """
        waiting = []
        for pitch, start in starts:
            frames = min(max(frame - start, 0) + 1, len(history))
            waiting.append(RememberedNote(pitch, start, history[-frames:, pitch].sum(0), frames))
        given = []
        while waiting:
            scored = [self._scores(note, frame) for note in waiting]
            sure = [float(p.max()) for p in scored]
            k = int(np.argmax(sure))
            voice = int(np.argmax(scored[k]))
            given.append((waiting[k].pitch, self._give(waiting.pop(k), voice, frame)))
        return given

    def hear(self, embedding: np.ndarray) -> None:
        """Let every sounding note learn from this hop's embedding, (n_pitches, D)."""
        for pitch, (_, note) in self._sounding.items():
            if note.frames < EMBEDDING_FRAMES:
                note.total = note.total + embedding[pitch]
                note.frames += 1

    def _give(self, note: RememberedNote, voice: int, frame: int) -> int:
        if voice == len(self.voices):
            if len(self.voices) < self.max_voices:
                self.voices.append(Voice())
            else:
                voice = self._longest_idle()
                self.voices[voice] = Voice()
        self.voices[voice].add(note)
        self._sounding[note.pitch] = voice, note
        return voice

    def _longest_idle(self) -> int:
        """The voice that has rested longest makes room: a memory that never forgets fills up with strangers."""
        rests = [max((np.inf if n.end is None else n.end) for n in v.notes) for v in self.voices]
        return int(np.argmin(rests))

    def _scores(self, note: RememberedNote, frame: int) -> np.ndarray:
        """Probabilities over the voices and, last, a new voice (0 where no room can be made)."""
        features, new = self.features(note, frame)
        scores = self._scorer(features, new)
        if len(self.voices) == self.max_voices and self._sounding_voices() == self.max_voices:
            scores[-1] = -np.inf
        probabilities = np.exp(scores - scores.max())
        return probabilities / probabilities.sum()

    def _sounding_voices(self) -> int:
        return len({voice for voice, _ in self._sounding.values()})

    def features(self, note: RememberedNote, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """What the pointer sees: (V, VOICE_FEATURES) and (NEW_FEATURES,), float32, all of order one."""
        out = np.zeros((len(self.voices), VOICE_FEATURES), np.float32)
        query = note.embedding
        for row, voice in zip(out, self.voices, strict=True):
            memory = voice.notes
            embeddings = np.stack([n.embedding for n in memory])
            pitches = np.array([n.pitch for n in memory], float)
            similarity = embeddings @ query
            near = np.exp(-np.abs(pitches - note.pitch) / NEAR_PITCHES)
            centre = embeddings.mean(0)
            spread = np.linalg.norm(centre)
            busy = [n for n in memory if n.end is None]
            ended = [n for n in memory if n.end is not None]
            last = memory[-1]
            rest = 0 if busy else frame - max(n.end for n in ended)
            intervals = np.array([note.pitch - n.pitch for n in busy])
            closest = intervals[np.argmin(np.abs(intervals))] if busy else 0
            row[:] = (
                centre @ query / (spread + 1e-9),
                similarity.max(),
                near @ similarity / near.sum(),
                similarity[-1],
                np.sort(similarity)[-3:].mean(),
                spread,
                near.sum() / len(memory),
                abs(note.pitch - last.pitch) / 12,
                (note.pitch - last.pitch) / 12,
                abs(note.pitch - pitches.mean()) / 12,
                (note.pitch - pitches.mean()) / 12,
                pitches.std() / 12,
                np.abs(pitches - note.pitch).min() / 12,
                np.log1p(max(rest, 0)) / 4,
                float(not busy and rest <= RECENT_FRAMES),
                float(len(busy) > 0),
                min(len(busy), 4) / 4,
                np.mean([n.shared for n in memory]),
                closest / 12,
                float(bool(busy) and np.any(intervals % 12 == 0)),
                float(bool(busy) and np.any(np.abs(note.start - np.array([n.start for n in busy])) <= RECENT_FRAMES)),
                float(note.pitch == last.pitch and last.end is not None and note.start - last.end <= RECENT_FRAMES),
                np.log1p(voice.heard) / 4,
                0.0,
            )
        if len(out) > 1:  # how far this voice's timbre is ahead of the best other
            best = np.sort(out[:, 2])[-2:]
            out[:, -1] = out[:, 2] - np.where(out[:, 2] == best[1], best[0], best[1])
        free = out[out[:, 15] == 0]
        new = np.array(
            (
                len(self.voices) / 8,
                self._sounding_voices() / 8,
                np.log1p(sum(v.heard for v in self.voices)) / 4,
                out[:, 2].max(initial=-1.0),
                out[:, 1].max(initial=-1.0),
                free[:, 2].max(initial=-1.0),
                note.pitch / 72,
                min(note.frames, 8) / 8,
            ),
            np.float32,
        )
        return out, new


POINTER_LAYERS = (0, 2, 4)  # where the linear layers stand among the activations, as training names them


class Pointer:
    """The learned scorer: two small perceptrons that share nothing but the situation they look at.

    weights : arrays by name, as in ``NAMES``; layer widths follow from them. A voice is scored from its own
    features, the situation, and the mean and maximum of all voices' features, so that scores can be comparative.
    """

    NAMES = tuple(
        f"{part}.{layer}.{kind}"
        for part in ("voice", "new")
        for layer in POINTER_LAYERS
        for kind in ("weight", "bias")
    )

    def __init__(self, weights: dict[str, np.ndarray]):
        missing = [name for name in self.NAMES if name not in weights]
        if missing:
            raise ValueError(f"the pointer lacks {', '.join(missing)}")
        self._weights = {name: np.asarray(weights[name], np.float32) for name in self.NAMES}

    def __call__(self, features: np.ndarray, new: np.ndarray) -> np.ndarray:
        voice_input, new_input = pointer_inputs(features, new)
        return np.concatenate([self._perceptron("voice", voice_input), self._perceptron("new", new_input[None])])

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
