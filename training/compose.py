"""A procedural composer: scores without end for when no MIDI files are given, and textures that files are short of.

The aim is not beauty but the right statistics: chords that parts share (so harmonics collide), players that cross,
repeat notes, hold, run, rest and double in thirds, in every register and tempo. The same seed gives the same score.
"""

from dataclasses import dataclass

import numpy as np

from realtime_mpe.analysis import FIRST_MIDI, N_PITCHES

from .scores import Part, Score, as_notes, cut_repeats

LOWEST, HIGHEST = FIRST_MIDI + 3, FIRST_MIDI + N_PITCHES - 4
MODES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
# What may follow which scale degree (0 = tonic); a table of common practice, loose enough for pop.
FOLLOWS = {
    0: (3, 4, 5, 1, 3, 4),
    1: (4, 4, 6, 3),
    2: (5, 3, 5),
    3: (4, 0, 1, 4),
    4: (0, 0, 5, 3),
    5: (1, 3, 4, 3),
    6: (0, 2),
}
# Rhythms of one four-beat bar in beats; negative: rest. Drawn by how busy a part is, 0 calm .. 2 busy.
RHYTHMS = {
    0: ((4,), (2, 2), (3, 1), (-2, 2), (-4,)),
    1: ((1, 1, 1, 1), (2, 1, 1), (1.5, 0.5, 2), (-1, 1, 1, 1), (1, 1, 2), (1.5, 0.5, 1.5, 0.5), (2, -1, 1)),
    2: (
        (0.5,) * 8,
        (1, 0.5, 0.5, 1, 0.5, 0.5),
        (0.25,) * 8 + (1, 1),
        (-0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1),
        (0.75, 0.25, 0.5, 0.5, 0.75, 0.25, 1),
        (0.25, 0.25, 0.5) * 4,
        (1 / 3, 1 / 3, 1 / 3) * 4,
    ),
}
# A plausible General MIDI program for each role: only a hint for whoever renders the part.
PROGRAMS = {
    "melody": (40, 73, 71, 68, 56, 65, 53, 80),
    "counter": (41, 71, 60, 66, 42),
    "bass": (32, 33, 42, 43, 58, 70, 38),
    "inner": (41, 60, 69, 71, 48),
    "ostinato": (0, 11, 24, 46, 81, 12),
    "chords": (0, 4, 16, 24, 27, 48, 19, 89),
    "thirds": (40, 73, 61, 66),
}


@dataclass(frozen=True)
class Plan:
    """What all players share. chords : (beat, length in beats, scale degree), back to back to the end."""

    tonic: int
    scale: tuple[int, ...]
    beat_seconds: float
    chords: tuple[tuple[float, float, int], ...]
    sevenths: bool

    def pitch(self, step: int) -> int:
        """MIDI of a scale step, counted from the tonic nearest to middle C."""
        octave, degree = divmod(step, len(self.scale))
        return 60 + self.tonic + 12 * octave + self.scale[degree]

    def chord_at(self, beat: float) -> int:
        return next(degree for start, length, degree in reversed(self.chords) if start <= beat + 1e-6)

    def chord_steps(self, degree: int, low: int, high: int) -> list[int]:
        """Scale steps of the chord on `degree` whose pitch lies in low..high."""
        tones = {(degree + k) % 7 for k in ((0, 2, 4, 6) if self.sevenths else (0, 2, 4))}
        return [s for s in range(-35, 36) if s % 7 in tones and low <= self.pitch(s) <= high]


def compose(seed: int) -> Score:
    """A score of 2..6 parts and 24..40 s, pitches 26..91; named "composed-<seed>"."""
    rng = np.random.default_rng([seed, 0xC0])
    plan = _plan(rng)
    count = int(rng.choice([2, 3, 4, 5, 6], p=[0.15, 0.25, 0.3, 0.2, 0.1]))
    roles = ["melody"] + [str(r) for r in rng.choice(list(PROGRAMS)[1:], count - 1)]
    if count > 2 and "bass" not in roles and rng.random() < 0.7:
        roles[-1] = "bass"
    parts: list[Part] = []
    melody = np.zeros((0, 4))
    for role in roles:
        centre = int(rng.integers(33, 50)) if role == "bass" else int(rng.integers(45, 80))
        if role == "thirds":
            rows = _thirds(plan, melody, rng)
        elif role == "chords":
            rows = _chords(plan, centre, rng)
        elif role == "ostinato":
            rows = _ostinato(plan, centre, rng)
        else:
            busy = {"bass": rng.integers(0, 2), "inner": 0}.get(role, rng.integers(0, 3))
            rows = _line(plan, centre, int(busy), role, rng)
        notes = as_notes(rows)
        notes = cut_repeats(notes[(notes[:, 2] >= LOWEST) & (notes[:, 2] <= HIGHEST)])
        notes[:, 3] = np.clip(np.round(notes[:, 3] + rng.uniform(-12, 12)), 30, 120)
        if len(notes) < 3:  # a line of nothing but rests still is a player: let it hold the chords
            notes = cut_repeats(as_notes(_hold(plan, centre)))
        if role == "melody":
            melody = notes
        parts.append(Part(f"{role} {len(parts) + 1}", int(rng.choice(PROGRAMS[role])), notes))
    return Score(f"composed-{seed}", parts)


def _plan(rng: np.random.Generator) -> Plan:
    beat = 60.0 / float(np.exp(rng.uniform(np.log(56), np.log(168))))
    bars = int(np.ceil(rng.uniform(24.5, 37.0) / (4 * beat)))
    phrase_bars = int(rng.choice([2, 4, 8]))
    per_bar = float(rng.choice([4, 4, 2]))
    chords: list[tuple[float, float, int]] = []
    phrase: list[int] = []
    for index in range(int(bars * 4 / per_bar)):
        place = index % int(phrase_bars * 4 / per_bar)
        if place == 0 and (not phrase or rng.random() < 0.4):
            phrase = [0]
            while len(phrase) < phrase_bars * 4 / per_bar:
                phrase.append(int(rng.choice(FOLLOWS[phrase[-1]])))
        chords.append((index * per_bar, per_bar, phrase[place]))
    mode = str(rng.choice(list(MODES), p=[0.4, 0.3, 0.15, 0.15]))
    return Plan(int(rng.integers(-6, 6)), MODES[mode], beat, tuple(chords), bool(rng.random() < 0.3))


Rows = list[tuple[float, float, float, float]]


def _rhythm(plan: Plan, busy: int, rng: np.random.Generator):
    """(beat, length in beats) of each note: a few bars drawn once and repeated with changes, with bars of rest."""
    stock = [RHYTHMS[busy][int(rng.integers(len(RHYTHMS[busy])))] for _ in range(3)]
    end = plan.chords[-1][0] + plan.chords[-1][1]
    rest_share = rng.uniform(0.0, 0.2)
    for bar in np.arange(0.0, end - 1e-6, 4.0):
        if bar > 0 and rng.random() < rest_share:
            continue
        level = busy if rng.random() < 0.85 else int(rng.integers(0, 3))
        fresh = RHYTHMS[level][int(rng.integers(len(RHYTHMS[level])))]
        cell = stock[int(rng.integers(3))] if level == busy and rng.random() < 0.8 else fresh
        beat = float(bar)
        for length in cell:
            if length > 0 and beat + length <= end + 1e-6:
                yield beat, float(length)
            beat += abs(length)


def _line(plan: Plan, centre: int, busy: int, role: str, rng: np.random.Generator) -> Rows:
    """One voice: chord notes on the beat, steps between, now and then a leap, a repeated note or a held one."""
    reach = int(rng.integers(7, 15))
    low, high = max(centre - reach, LOWEST), min(centre + reach, HIGHEST)
    rows: Rows = []
    stubborn = rng.uniform(0.05, 0.4)  # how gladly it repeats a note
    direction = 1
    step = min(range(-35, 36), key=lambda s: abs(plan.pitch(s) - centre))
    for beat, length in _rhythm(plan, busy, rng):
        tones = plan.chord_steps(plan.chord_at(beat), low, high)
        if rng.random() < 0.15:
            direction = -direction
        if role == "bass" and tones and (beat % 2 == 0 or rng.random() < 0.5):
            roots = [s for s in tones if s % 7 == plan.chord_at(beat)] or tones
            step = min(roots, key=lambda s: abs(s - step)) if rng.random() < 0.8 else int(rng.choice(tones))
        elif rng.random() < stubborn:
            pass
        elif tones and (beat % 1 == 0 and rng.random() < 0.75 or role == "inner"):
            near = [s for s in tones if abs(s - step) <= 4] or tones
            step = int(rng.choice(near))
        else:
            step += direction * int(rng.choice([1, 1, 1, 2, 3]))
        if plan.pitch(step) > high:
            step, direction = step - 7, -1
        elif plan.pitch(step) < low:
            step, direction = step + 7, 1
        accent = 8.0 if beat % 4 == 0 else 3.0 if beat % 1 == 0 else 0.0
        rows.append(_row(plan, beat, length, plan.pitch(step), 76 + accent))
    return rows


def _chords(plan: Plan, centre: int, rng: np.random.Generator) -> Rows:
    """Block, broken or repeated chords of three to five notes near `centre`."""
    style = str(rng.choice(["block", "repeated", "broken", "offbeat"]))
    size = int(rng.integers(3, 6))
    rows: Rows = []
    for start, length, degree in plan.chords:
        steps = plan.chord_steps(degree, max(centre - 12, LOWEST), min(centre + 14, HIGHEST))
        steps = sorted(steps, key=lambda s: abs(plan.pitch(s) - centre))[:size]
        if style == "block":
            rows += [_row(plan, start, length, plan.pitch(s), 72) for s in steps]
        elif style == "broken":
            for k, s in enumerate(sorted(steps)):
                rows.append(_row(plan, start + 0.5 * k, max(length - 0.5 * k, 0.5), plan.pitch(s), 72))
        else:
            shift = 0.5 if style == "offbeat" else 0.0
            for beat in np.arange(start, start + length - 1e-6, 1.0):
                rows += [_row(plan, beat + shift, 0.5 if shift else 0.9, plan.pitch(s), 70) for s in steps]
    return rows


def _ostinato(plan: Plan, centre: int, rng: np.random.Generator) -> Rows:
    """A figure of four to eight places in the chord, repeated through it: arpeggios, and drones when all are equal."""
    value = float(rng.choice([0.25, 0.5, 0.5, 1 / 3]))
    if plan.beat_seconds * value < 0.09:
        value *= 2
    figure = [int(k) for k in rng.integers(0, int(rng.choice([1, 3, 4, 5])), int(rng.integers(3, 9)))]
    rows: Rows = []
    for start, length, degree in plan.chords:
        steps = plan.chord_steps(degree, max(centre - 5, LOWEST), min(centre + 16, HIGHEST))
        for k in range(int(round(length / value))):
            if steps:
                pitch = plan.pitch(steps[figure[k % len(figure)] % len(steps)])
                rows.append(_row(plan, start + k * value, value, pitch, 74 + 6 * (k % len(figure) == 0)))
    return rows


def _thirds(plan: Plan, melody: np.ndarray, rng: np.random.Generator) -> Rows:
    """The melody again, a third or sixth away: same rhythm, other notes, which only timbre and pitch can tell apart."""
    steps = {plan.pitch(s): s for s in range(-35, 36)}
    away = int(rng.choice([-2, 2, -5, 5]))
    return [(on, off, plan.pitch(steps[int(midi)] + away), vel) for on, off, midi, vel in melody if int(midi) in steps]


def _hold(plan: Plan, centre: int) -> Rows:
    rows: Rows = []
    for start, length, degree in plan.chords:
        steps = plan.chord_steps(degree, max(centre - 12, LOWEST), min(centre + 12, HIGHEST))
        pitches = sorted((plan.pitch(s) for s in steps), key=lambda p: abs(p - centre))
        rows += [_row(plan, start, length, pitches[0], 70)]
    return rows


def _row(plan: Plan, beat: float, length: float, pitch: int, velocity: float) -> tuple[float, float, float, float]:
    return (beat * plan.beat_seconds, (beat + length) * plan.beat_seconds, float(pitch), float(velocity))
