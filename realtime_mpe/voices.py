"""Whose note is it: an online memory of voices with a learned pointer, put in order by learned grouping.

Every note gets a timbre from its first frames. For a new note the pointer scores every voice, and "a player
not heard before", from timbre, pitch, place and time of the voice's last notes; the surest note of a chord is given
out first, and one in doubt waits until more of it has been heard. Nobody says how many players there are. A note stays
on the voice that it was sent on until it ends.

The memory may think better of it: a moment later it knows more of the note and of the others, so every now and then all
remembered notes are grouped anew, and each group becomes the voice on which most of its notes were sent. A mistake
costs a few notes then, and not all that follow it.

This is the associative timbre memory of timbre-adaptive transcription, worked at the level of notes. Training runs
this very class and learns pointer and grouping from what it meets, on its own mistakes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .affinity import (
    CHORD_FRAMES,
    EMBEDDING_FRAMES,
    LEGATO_BEFORE,
    NEAR_PITCHES,
    Notes,
    layers,
    perceptron,
    places,
    stacked,
)
from .analysis import MAX_LOOKAHEAD
from .grouping import Grouping
from .notes import NoteEvent
from .timbre import Timbre, alone, heard, own, unit

MEMORY = 128  # notes
LAST_NOTES = 24  # of a voice, by which the pointer knows it
HISTORY_FRAMES = MAX_LOOKAHEAD + 4  # of embeddings kept for a note that is found a little after it began
ORDER_EVERY = ((24, 12), (64, 24), (MEMORY + 1, 48))  # up to so many notes, frames between two groupings

PATIENCE = 2  # frames that a note may wait for its voice
SURE = 0.8  # probability of a voice that is worth no waiting
SMALLEST_GROUP = 4  # notes; fewer are no player of their own, and stay where they were sent

VOICE_FEATURES = 28  # a voice
BEST, NEAR, BUSY = 1, 2, 15  # the features that the situation is summed up from
NEW_FEATURES = 10  # of the situation, for "a new voice"


class NewNote(NamedTuple):
    """A note that waits for its voice. pitch row; where it begins, in frames; the sum over ``steps`` of what was
    `heard` of it so far, (2 D + 1,), and its timbre by that, (D,); how many notes sound ``above`` and ``below`` it."""

    pitch: int
    start: float
    total: np.ndarray
    steps: int
    unit: np.ndarray
    above: int
    below: int


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(V, VOICE_FEATURES), (NEW_FEATURES,) -> (V + 1,) scores; the last is for a new voice."""


class VoiceMemory:
    """Voices of one performance, at most ``max_voices``. Without ``grouping`` the memory never thinks better of a
    choice; without ``timbre`` notes sound as the network's embeddings say. What happens is told by the step, ``steps``
    of them a frame; all that is remembered, and all that pointer and grouping see of it, is in frames.

    The memory is a list of at most MEMORY notes in the order they were given out. A note that sounds has an infinite
    end, so that nothing here can know when it will end.
    """

    def __init__(
        self,
        scorer: Scorer,
        max_voices: int,
        grouping: Grouping | None = None,
        steps: int = 1,
        timbre: Timbre = alone,
    ):
        self.max_voices = max_voices
        self._scorer = scorer
        self._grouping = grouping
        self._steps = steps
        self._timbre = timbre
        self._enough = EMBEDDING_FRAMES * steps  # steps by which a note's timbre is known
        self.reset()

    def reset(self) -> None:
        self._n = 0  # notes remembered
        self._turn = np.zeros(MEMORY, int)  # which note of the performance it is, from 1
        self._voice = np.zeros(MEMORY, int)  # whose it is, as far as is known now
        self._sent = np.zeros(MEMORY, int)  # the voice it was sent on
        self._pitch = np.zeros(MEMORY)
        self._start = np.zeros(MEMORY)
        self._end = np.zeros(MEMORY)
        self._heard = np.zeros(MEMORY, int)  # steps
        self._total: np.ndarray | None = None  # (MEMORY, 2 D + 1) over them, known with the first note
        self._known = np.zeros(MEMORY, int)  # steps that the next two rest on
        self._unit: np.ndarray | None = None  # (MEMORY, D) timbres
        self._plain: np.ndarray | None = None  # (MEMORY, D) embeddings
        self._waiting: dict[int, tuple[NoteEvent, int]] = {}  # pitch row -> its beginning, the step that told it
        self._sounding: dict[int, tuple[int, int]] = {}  # pitch row -> turn, voice it was sent on
        self._turns = 0
        self._ever: set[int] = set()  # voices on which something was sent
        self._now = 0.0  # frame
        self._ordered = 0.0, 0  # frame and turn of the last grouping

    @property
    def count(self) -> int:
        """Voices so far."""
        return len(self._ever)

    def process(
        self, events: Sequence[NoteEvent], history: Sequence[np.ndarray], now: int
    ) -> list[tuple[NoteEvent, int]]:
        """What begins and ends in one step -> what is to be played now, in this order, with its voice.

        A note of whose voice the pointer is in doubt comes later, by PATIENCE at most, and always before its end.
        history : embeddings, (n_pitches, D) each, of the last steps, newest last, which is ``now``.
        """
        self._now = now / self._steps
        ends = [event for event in events if not event.on]
        ending = {event.pitch for event in ends} & self._waiting.keys()
        played = self._decide(history, now, ending) if ending else []
        played += [(event, self._end_note(event)) for event in ends]
        self._waiting |= {event.pitch: (event, now) for event in events if event.on}
        return played + (self._decide(history, now) if self._waiting else [])

    def _end_note(self, event: NoteEvent) -> int:
        """Returns its voice."""
        turn, voice = self._sounding.pop(event.pitch)
        rows, remembered = self._rows([turn])
        self._end[rows[remembered]] = event.step / self._steps
        return voice

    def _decide(
        self, history: Sequence[np.ndarray], now: int, ending: Collection[int] = ()
    ) -> list[tuple[NoteEvent, int]]:
        """Give to voices what has waited long enough, the surest first; ``ending`` : pitch rows that cannot wait."""
        notes = self._new_notes(history, now)
        given = []
        while True:
            opinions = {pitch: self._probabilities(note) for pitch, note in notes.items()}
            ready = [
                pitch
                for pitch, opinion in opinions.items()
                if pitch in ending or self._ready(opinion.max(), (now - self._waiting[pitch][1]) / self._steps)
            ]
            if not ready:
                return given
            surest = max(ready, key=lambda pitch: opinions[pitch].max())
            event, _ = self._waiting.pop(surest)
            given.append((event, self._give(notes.pop(surest), int(np.argmax(opinions[surest])))))

    def _ready(self, sureness: float, waited: float) -> bool:
        """Whether a note's voice is decided at this probability, after so many frames."""
        return sureness >= SURE or waited >= PATIENCE or self.max_voices == 1

    def _new_notes(self, history: Sequence[np.ndarray], now: int) -> dict[int, NewNote]:
        """What is known by now of the notes that wait, by pitch row."""
        pitches = np.array([*self._sounding, *self._waiting])
        sounds = heard(np.stack([embedding[pitches] for embedding in history]))[:, len(self._sounding) :]
        notes = {}
        for number, (pitch, (event, _)) in enumerate(self._waiting.items()):
            steps = min(max(now - event.step, 0) + 1, len(history))
            total = sounds[-steps:, number].sum(0)
            timbre = self._timbre(total[None] / steps, np.array([steps / self._steps]))[0]
            above, below = int((pitches > pitch).sum()), int((pitches < pitch).sum())
            notes[pitch] = NewNote(pitch, event.step / self._steps, total, steps, timbre, above, below)
        return notes

    def hear(self, embedding: np.ndarray) -> None:
        """Let every sounding note learn from this step's embedding, (n_pitches, D), and see whether order is due; after
        `process`, in every step."""
        if self._sounding:
            rows, learning = self._rows([turn for turn, _ in self._sounding.values()])
            learning[learning] = self._heard[rows[learning]] < self._enough
            if learning.any():
                self._learn(rows[learning], heard(embedding[[*self._sounding]])[learning])
        ordered, turn = self._ordered
        every = next(frames for notes, frames in ORDER_EVERY if self._n < notes)
        if self._grouping is not None and self._n >= 2 and self._turns > turn and self._now - ordered >= every:
            self._order()
            self._ordered = self._now, self._turns

    def voices(self) -> list[int]:
        """Those with remembered notes, in ascending order; what `features` has rows for."""
        return np.unique(self._voice[: self._n]).tolist()

    def notes(self) -> Notes:
        """All that is remembered. What has been heard more of since the last look gets its timbre now."""
        n = self._n
        steps = self._heard[:n]
        rows = np.flatnonzero(self._known[:n] != steps)
        if len(rows):
            total, frames = self._total[rows], steps[rows] / self._steps
            self._unit[rows] = self._timbre(total / steps[rows, None], frames)
            self._plain[rows] = unit(own(total))
            self._known[rows] = steps[rows]
        columns = (self._unit, self._plain, self._pitch, self._start, self._end)
        return Notes(*(column[:n] for column in columns), steps / self._steps)

    def _order(self) -> None:
        """Group the remembered notes anew and give each group the voice on which most of it was sent."""
        n = self._n
        group = self._grouping(self.notes(), self._voice[:n], self._now, self.max_voices)
        small = np.bincount(group) < SMALLEST_GROUP
        claims = np.zeros((len(small), self.max_voices))
        np.add.at(claims, (group, self._sent[:n]), 1.0)
        claims[small] = 0.0
        voice = np.full(len(small), -1)
        while claims.max() > 0:
            best, its = np.unravel_index(np.argmax(claims), claims.shape)
            voice[best] = its
            claims[best] = claims[:, its] = 0.0
        nameless = (voice < 0) & ~small
        free = [v for v in self._unused_first() if v not in voice]
        voice[nameless] = free[: nameless.sum()]
        self._voice[:n] = np.where(small[group], self._sent[:n], voice[group])

    def _unused_first(self) -> list[int]:
        """All voices, those on which nothing was sent yet first."""
        return sorted(range(self.max_voices), key=lambda v: (v in self._ever, v))

    def _rows(self, turns: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where notes are remembered, (N,), and whether they still are, (N,) bool."""
        rows = np.searchsorted(self._turn[: self._n], turns)
        return rows, np.append(self._turn[: self._n], 0)[rows] == turns

    def _learn(self, rows: np.ndarray, sound: np.ndarray) -> None:
        """What was `heard` of some notes in one more step, (N, 2 D + 1)."""
        self._total[rows] += sound
        self._heard[rows] += 1

    def _give(self, note: NewNote, choice: int) -> int:
        """Remember a note in the ``choice``-th of `voices`, or else in a new one. Returns where it went."""
        present = self.voices()
        voice = present[choice] if choice < len(present) else self._make_room(present)
        if self._total is None:
            self._total = np.zeros((MEMORY, len(note.total)))
            self._unit, self._plain = np.zeros((2, MEMORY, len(note.unit)), np.float32)
        if self._n == MEMORY:
            self._forget(self._dispensable())
        row = self._n
        self._n += 1
        self._turns += 1
        self._ever.add(voice)
        self._turn[row] = self._turns
        self._voice[row] = self._sent[row] = voice
        self._pitch[row], self._start[row], self._end[row] = note.pitch, note.start, np.inf
        self._total[row], self._heard[row], self._known[row] = note.total, note.steps, 0
        self._sounding[note.pitch] = self._turns, voice
        return voice

    def _make_room(self, present: list[int]) -> int:
        """A voice for a new player. If all are taken, the one that has rested longest is forgotten: a memory that never
        forgets fills up with strangers."""
        free = [v for v in self._unused_first() if v not in present and v not in self._sounding_voices()]
        if free:
            return free[0]
        rested = [v for v in present if v not in self._sounding_voices()]
        voice = min(rested, key=lambda v: self._end[: self._n][self._voice[: self._n] == v].max())
        self._forget(self._voice[: self._n] == voice)
        return voice

    def _dispensable(self) -> np.ndarray:
        """(n,) bool, one note: the first that has ended of the fullest voice, so that who rests is remembered."""
        n = self._n
        most = self._voice[:n] == np.bincount(self._voice[:n]).argmax()
        ended = np.isfinite(self._end[:n])
        candidates = next(c for c in (most & ended, ended, np.ones(n, bool)) if c.any())
        return np.arange(n) == np.argmax(candidates)

    def _forget(self, which: np.ndarray) -> None:
        """which : (n,) bool."""
        kept = np.flatnonzero(~which)
        notes = self._turn, self._voice, self._sent, self._pitch, self._start, self._end, self._heard, self._total
        for column in (*notes, self._known, self._unit, self._plain):
            column[: len(kept)] = column[kept]
        self._n = len(kept)

    def _probabilities(self, note: NewNote) -> np.ndarray:
        """Over `voices` and, last, a new voice (0 where no room can be made)."""
        scores = self._scorer(*self.features(note))
        if len(self._sounding_voices()) == self.max_voices:
            scores[-1] = -np.inf
        probabilities = np.exp(scores - scores.max())
        return probabilities / probabilities.sum()

    def _sounding_voices(self) -> set[int]:
        """Those that a sounding note was sent on, or belongs to."""
        now = self._voice[: self._n][np.isinf(self._end[: self._n])]
        return {voice for _, voice in self._sounding.values()} | set(now.tolist())

    def features(self, note: NewNote) -> tuple[np.ndarray, np.ndarray]:
        """What the pointer sees: a row for each of `voices`, (V, VOICE_FEATURES), and (NEW_FEATURES,), float32, all of
        order one."""
        present = self.voices()
        voices = np.zeros((len(present), VOICE_FEATURES), np.float32)
        if present:
            voices[:] = self._voice_features(present, note)
        free = voices[voices[:, BUSY] == 0]
        new = (
            len(present) / 8,
            len(self._sounding_voices()) / 8,
            np.log1p(self._n) / 4,
            voices[:, NEAR].max(initial=-1.0),
            voices[:, BEST].max(initial=-1.0),
            free[:, NEAR].max(initial=-1.0),
            note.pitch / 72,
            min(note.steps / self._steps, 8) / 8,
            note.above / 4,
            note.below / 4,
        )
        return voices, np.array(new, np.float32)

    def _voice_features(self, present: list[int], note: NewNote) -> np.ndarray:
        rows = np.arange(len(present))
        at = np.zeros((len(present), LAST_NOTES), int)  # a row a voice, its last notes from the left, oldest first
        held, counts = np.zeros(len(present), int), np.zeros(len(present))
        for row, voice in enumerate(present):
            its = np.flatnonzero(self._voice[: self._n] == voice)
            counts[row] = len(its)
            held[row] = min(len(its), LAST_NOTES)
            at[row, : held[row]] = its[-LAST_NOTES:]
        used = np.arange(LAST_NOTES) < held[:, None]
        notes = self.notes()
        pitch, start, end, units = (column[at] for column in (notes.pitch, notes.start, notes.end, notes.unit))
        end = np.where(used, end, -np.inf)
        similarity = units @ note.unit
        last = held - 1
        above, below = (np.where(used, column[at], 0.0).sum(1) / held for column in places(notes, self._now))
        higher, lower = np.abs(above - note.above), np.abs(below - note.below)

        centre = np.where(used[..., None], units, 0.0).sum(1) / held[:, None]
        spread = np.sqrt(np.square(centre).sum(1))
        best = -np.sort(-np.where(used, similarity, -np.inf), 1)[:, :3]
        found = np.isfinite(best)
        distance = note.pitch - pitch
        near = np.where(used, np.exp(-np.abs(distance) / NEAR_PITCHES), 0.0)
        near_similarity = (near * similarity).sum(1) / near.sum(1)

        mean_pitch = np.where(used, pitch, 0.0).sum(1) / held
        pitch_spread = np.sqrt(np.where(used, np.square(pitch - mean_pitch[:, None]), 0.0).sum(1) / held)
        from_last = distance[rows, last]

        sounding = used & np.isinf(end) & (end > 0)
        busy = sounding.sum(1)
        rest = np.where(busy > 0, 0.0, self._now - np.where(sounding, -np.inf, end).max(1))
        rest = np.maximum(rest, 0.0)
        closest = np.argmin(np.where(sounding, np.abs(distance), np.inf), 1)
        last_end = end[rows, last]
        until = np.minimum(end, self._now)
        overlap = np.minimum(until[:, :, None], until[:, None]) - np.maximum(start[:, :, None], start[:, None])
        overlap[:, np.arange(LAST_NOTES), np.arange(LAST_NOTES)] = -np.inf
        shared = (overlap > 2).any(2)  # sounded together with another note of its voice, longer than legato does
        # With how many others, that sound or just did, the note would change the order that the voices have by pitch.
        order = np.sign(mean_pitch[:, None] - mean_pitch) * np.sign(note.pitch - pitch[rows, last])
        crossed = ((order < 0) & (rest <= LEGATO_BEFORE)).sum(1)
        # How far this voice's timbre is ahead of the best other.
        ahead = np.zeros(len(present))
        if len(present) > 1:
            second, first = np.sort(near_similarity)[-2:]
            ahead = near_similarity - np.where(near_similarity == first, second, first)
        features = (
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
            (busy == 0) & (rest <= CHORD_FRAMES),
            busy > 0,  # BUSY
            np.minimum(busy, 4) / 4,
            (shared & used).sum(1) / held,
            np.where(busy > 0, distance[rows, closest], 0.0) / 12,
            (sounding & (distance % 12 == 0)).any(1),
            (sounding & (np.abs(note.start - start) <= CHORD_FRAMES)).any(1),
            (from_last == 0) & np.isfinite(last_end) & (note.start - last_end <= CHORD_FRAMES),
            np.log1p(counts) / 4,
            ahead,
            higher / 2,
            lower / 2,
            np.minimum(higher, lower) / 2,
            crossed / 4,
        )
        return np.array(features, np.float32).T


class SlotVoices:
    """Voices of a network whose slots are players: a note belongs to the slot that says most of it. See VoiceMemory."""

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

    def process(
        self, events: Sequence[NoteEvent], history: Sequence[np.ndarray], now: int
    ) -> list[tuple[NoteEvent, int]]:
        """history : what each slot says of every pitch, (n_pitches, K) each, up to label frame ``now`` + 1, the newest
        in which a note can begin; the rest as in VoiceMemory, but that no note waits."""
        played = []
        for event in events:
            if event.on:
                frames = min(now + 2 - event.step, len(history))
                voice = int(np.argmax(np.sum([said[event.pitch] for said in history[-frames:]], 0)))
                self._heard.add(voice)
                self._sounding[event.pitch] = voice
                played.append((event, voice))
            else:
                played.append((event, self._sounding.pop(event.pitch)))
        return played

    def hear(self, embedding: np.ndarray) -> None:
        """Nothing to learn: what a slot listens for is fixed."""


class Pointer:
    """The learned scorer: networks that were trained alike from different first weights vote, and the mean of their
    log-probabilities counts. One alone is a matter of luck: a mistake early in a performance carries through it.

    Each is two small perceptrons that share nothing but the situation they look at. A voice is scored from its own
    features, the situation, and the mean and maximum of all voices' features, so that scores can be comparative.

    voters : weights of each, arrays by name, "voice.0.weight" .. "new.4.bias"; ValueError if one is missing or of
    another shape than the others'.
    """

    def __init__(self, voters: Sequence[Mapping[str, np.ndarray]]):
        if not voters:
            raise ValueError("a pointer needs at least one voter")
        self._voice, self._new = (stacked([layers(voter, prefix) for voter in voters]) for prefix in ("voice.", "new."))

    def __call__(self, features: np.ndarray, new: np.ndarray) -> np.ndarray:
        voices, situation = pointer_inputs(features, new)
        votes = np.concatenate([perceptron(self._voice, voices), perceptron(self._new, situation[None])], 1)
        return (votes - np.logaddexp.reduce(votes, 1, keepdims=True)).mean(0)


def pointer_inputs(features: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features to the perceptrons' inputs: (V, 3 F + N) for the voices and (2 F + N,) for the new voice."""
    if len(features):
        pooled = np.concatenate([features.mean(0), features.max(0), new])
    else:
        pooled = np.concatenate([np.zeros(2 * VOICE_FEATURES, np.float32), new])
    return np.concatenate([features, np.tile(pooled, (len(features), 1))], 1), pooled
