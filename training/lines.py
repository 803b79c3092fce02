"""Training of lines, see `realtime_mpe.lines`: on scores alone, as a tracker would have heard them.

Nothing is rendered, so there is no end of ensembles to learn from, and no sound to learn by heart. Half of them are
chamber music, every part one line; in the others parts play chords, are moved by octaves, or come from other pieces.
Notes are missed, found twice, too short or nobody's, as detected ones are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES
from realtime_mpe.lines import HEADS, KIND_DIM, KINDS, NOTE_INPUTS, PAIR_INPUTS, Lines, line_inputs

from .losses import IMPOSSIBLE
from .mixing import FEW, GUEST_PROBABILITY, MAX_STEMS, STRANGER_PROBABILITY, draw_count
from .scores import Score, cut_repeats, humanise, is_polyphonic, split_voices
from .stems import LINE_PROBABILITY, LINES, SHIFT_PROBABILITY, choose_excerpt, ensembles

DIM, PAIR_DIM, JUDGE_DIM, LAYERS = 64, 32, 48, 3
STEPS_A_PERFORMANCE = 15  # of those that the rest of the memory learns from
BATCH = 8  # ensembles
NOTES = 96  # of an ensemble at one moment, the latest
LEARNING_RATE, WARMUP_STEPS = 2e-3, 200
EXCERPTS_A_STEP = 2  # each is met several times, in other ensembles
SECONDS = 24.0  # of an excerpt
EDGE = 7  # rows from the lowest and highest pitch, within which the middle of a part lies
CHAMBER_PROBABILITY = 0.5
FEW_PROBABILITY = 0.33  # of a solo, duo or trio
STRETCH = 0.75, 1.33  # of time
TRANSPOSED = 6  # semitones, at most
FRESH_FRAMES, FRESH_WEIGHT = 6.0, 4.0  # a note that has just begun waits for its voice: its pairs matter most
AS_DECIDED = 0.8  # of the moments are such
MISSED, FOUND_TWICE, CUT_SHORT, NOBODYS = 0.15, 0.08, 0.25, 0.1  # of the notes of an ensemble, at most
GHOSTS = 12, 19, -12, 24, 1, -1, 7, 16  # semitones off a note that is there
ONE_ATTACK = 3.0  # frames: a pitch begins again no sooner


class LineNetwork(nn.Module):
    """The torch twin of `realtime_mpe.lines.Lines`, for padded ensembles."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.Sequential(nn.Linear(PAIR_INPUTS, PAIR_DIM), nn.ReLU(), nn.Linear(PAIR_DIM, PAIR_DIM))
        self.heed = nn.Linear(PAIR_DIM, HEADS * LAYERS)
        self.notes = nn.Sequential(nn.Linear(NOTE_INPUTS, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
        self.layers = nn.ModuleList(LineLayer() for _ in range(LAYERS))
        self.after = nn.LayerNorm(DIM)
        self.one, self.other = (nn.Linear(DIM, KINDS * KIND_DIM) for _ in range(2))
        self.judge = nn.Sequential(nn.Linear(PAIR_DIM + KINDS, JUDGE_DIM), nn.ReLU(), nn.Linear(JUDGE_DIM, 1))

    def forward(self, notes: Tensor, pairs: Tensor, present: Tensor) -> Tensor:
        """notes (B, N, NOTE_INPUTS), pairs (B, N, N, PAIR_INPUTS), present (B, N) bool -> (B, N, N) log odds."""
        lie = self.pairs(pairs).relu()
        heed = self.heed(lie).unflatten(3, (LAYERS, HEADS)).permute(3, 0, 4, 1, 2)
        heed = heed.masked_fill(~present[:, None, None], IMPOSSIBLE)
        x = self.notes(notes)
        for layer, own in zip(self.layers, heed, strict=True):
            x = layer(x, own)
        x = self.after(x)
        one, other = (side(x).unflatten(2, (KINDS, KIND_DIM)) for side in (self.one, self.other))
        seen = torch.cat([lie, torch.einsum("bikd,bjkd->bijk", one, other)], 3)
        return self.judge((seen + seen.transpose(1, 2)) / 2)[..., 0]

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}


class LineLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attend, self.gather = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.think = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, heed: Tensor) -> Tensor:
        """(B, N, DIM), (B, HEADS, N, N) what is added to the logits of attention -> (B, N, DIM)."""
        query, key, value = self.attend(self.before(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=heed)
        x = x + self.gather(found.transpose(1, 2).flatten(2))
        return x + self.think(self.between(x))


class Excerpt(NamedTuple):
    """An excerpt's parts as they are played, one at least, each (N, 3): start and end in frames, pitch row."""

    chamber: bool
    parts: list[np.ndarray]


def fit_lines(
    scores: Sequence[Score] | None, steps: int, seed: int = 0, say: Callable[[str], None] = print
) -> LineNetwork:
    """scores : None for composed ones."""
    rng = np.random.default_rng(seed)
    usable = ensembles(scores)
    excerpts = [draw_excerpt(usable, rng) for _ in range(EXCERPTS_A_STEP * steps)]
    torch.manual_seed(seed)
    network = LineNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.3, WARMUP_STEPS / steps)
    )
    total, said = 0.0, max(1, steps // 8)
    for step in range(1, steps + 1):
        loss = pair_loss(network, [draw_moment(excerpts, rng) for _ in range(BATCH)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % said == 0:
            say(f"lines: step {step} of {steps}, loss {total / said:.3f}")
            total = 0.0
    return network.eval()


def as_lines(network: LineNetwork) -> Lines:
    """What the runtime makes of it."""
    return Lines(network.weights())


def pair_loss(network: LineNetwork, moments: Sequence[tuple[np.ndarray, float]]) -> Tensor:
    """Cross entropy of whether two notes are one player's, over the pairs whose players are known."""
    longest = max(len(notes) for notes, _ in moments)
    notes = torch.zeros(len(moments), longest, NOTE_INPUTS)
    pairs = torch.zeros(len(moments), longest, longest, PAIR_INPUTS)
    player = torch.full((len(moments), longest), -1)
    fresh = torch.zeros(len(moments), longest, dtype=torch.bool)
    for k, (own, now) in enumerate(moments):
        n = len(own)
        each, every_two = line_inputs(own[:, 3], own[:, 1], own[:, 2], now)
        notes[k, :n], pairs[k, :n, :n] = torch.from_numpy(each), torch.from_numpy(every_two).permute(1, 2, 0)
        player[k, :n] = torch.from_numpy(own[:, 0])
        fresh[k, :n] = torch.from_numpy(now - own[:, 1] < FRESH_FRAMES)
    known = (player[:, :, None] >= 0) & (player[:, None] >= 0)
    weight = torch.where(fresh[:, :, None] | fresh[:, None], FRESH_WEIGHT, 1.0) * known.triu(1)
    weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1)
    present = torch.arange(longest) < torch.tensor([len(own) for own, _ in moments])[:, None]
    same = (player[:, :, None] == player[:, None]).float()
    odds = network(notes, pairs, present)
    return (F.binary_cross_entropy_with_logits(odds, same, reduction="none") * weight).sum() / len(moments)


def draw_moment(excerpts: Sequence[Excerpt], rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """What a memory holds at some moment of some ensemble: detected notes (N, 4), N of at least 3, rows player or -1,
    start, end (infinite while a note sounds), pitch row; and the frame up to which they sound."""
    while True:
        notes = detected(draw_ensemble(excerpts, rng), rng)
        if len(notes) < 3:
            continue
        decided = notes[rng.integers(1, len(notes)), 1] + rng.uniform(1.5, 4.0)
        now = float(decided if rng.random() < AS_DECIDED else rng.uniform(notes[2, 1], notes[-1, 2]))
        notes = notes[notes[:, 1] <= now][-NOTES:]
        if len(notes) >= 3:
            notes[notes[:, 2] > now, 2] = np.inf
            return notes, now


def draw_ensemble(excerpts: Sequence[Excerpt], rng: np.random.Generator) -> np.ndarray:
    """What some players play, (N, 4): player, start and end in frames, pitch row."""

    def stranger() -> np.ndarray:
        parts = excerpts[rng.integers(len(excerpts))].parts
        return parts[rng.integers(len(parts))]

    chamber, parts = excerpts[rng.integers(len(excerpts))]
    few = rng.random() < FEW_PROBABILITY
    count = int(rng.integers(1, FEW + 1)) if few else draw_count(len(parts), rng)
    parts = [parts[k] for k in rng.permutation(len(parts))[:count]]
    if not chamber:
        parts = [stranger() if rng.random() < STRANGER_PROBABILITY else part for part in parts]
        while not few and len(parts) < MAX_STEMS and rng.random() < GUEST_PROBABILITY:
            parts.append(stranger())
    notes = np.concatenate([np.insert(part, 0, player, 1) for player, part in enumerate(parts)])
    notes[:, 1:3] *= rng.uniform(*STRETCH)
    notes[:, 3] += rng.integers(-TRANSPOSED, TRANSPOSED + 1)
    return notes[(notes[:, 3] >= 0) & (notes[:, 3] < N_PITCHES)]


def draw_excerpt(scores: Sequence[Score], rng: np.random.Generator) -> Excerpt:
    """scores : as of `choose_excerpt`."""
    chamber = bool(rng.random() < CHAMBER_PROBABILITY)
    while True:
        parts = []
        for part in choose_excerpt(scores, SECONDS, rng).parts:
            notes = part.notes
            if is_polyphonic(notes) and (chamber or rng.random() < LINE_PROBABILITY):
                notes = split_voices(notes, str(rng.choice(LINES)))
            if not len(notes):
                continue
            notes = cut_repeats(humanise(notes, rng))
            row = notes[:, 2] - FIRST_MIDI
            if not chamber and rng.random() < SHIFT_PROBABILITY:
                row += rng.choice([-12, 12])
            middle = float(np.median(row))
            row += 12 * round((min(max(middle, EDGE), N_PITCHES - EDGE) - middle) / 12)
            parts.append(np.column_stack([notes[:, :2] / FRAME_SECONDS, row]))
        if parts:
            return Excerpt(chamber, parts)


def detected(notes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, 4) of `draw_ensemble` as a tracker may hear them, in the order they begin; player -1 : nobody's."""
    notes = notes[rng.random(len(notes)) >= rng.uniform(0.0, MISSED)]
    n = len(notes)

    def some(most: float) -> np.ndarray:
        return rng.random(n) < rng.uniform(0.0, most)

    player, start, end, pitch = notes.T.copy()
    start += rng.normal(0.0, 0.6, n)
    end += rng.normal(0.0, 1.5, n) + 4.0 * (rng.random(n) < 0.3)  # a room rings on
    end = np.where(some(CUT_SHORT), start + (end - start) * rng.uniform(0.4, 0.9, n), end)
    end = np.maximum(end, start + 2.0)
    broken = some(FOUND_TWICE) & (end - start > 12.0)
    middle = start + (end - start) * rng.uniform(0.3, 0.7, n)
    ghost = some(NOBODYS)
    found = (
        (player, start, np.where(broken, middle, end), pitch),
        tuple(column[broken] for column in (player, middle + rng.uniform(0.0, 4.0, n), end, pitch)),
        tuple(
            column[ghost]
            for column in (
                np.full(n, -1.0),
                start + rng.integers(0, 4, n),
                start + 4.0 + (end - start) * rng.uniform(0.1, 0.8, n),
                pitch + rng.choice(GHOSTS, n),
            )
        ),
    )
    rows = np.concatenate([np.column_stack(columns) for columns in found])
    return one_at_a_time(rows[np.lexsort((rows[:, 3], rows[:, 1]))])


def one_at_a_time(notes: np.ndarray) -> np.ndarray:
    """As a pitch can sound only once: a note ends where its pitch begins again, and is one with what begins at once."""
    kept = np.ones(len(notes), bool)
    latest: dict[float, int] = {}
    for k, (_, start, end, pitch) in enumerate(notes.tolist()):
        before = latest.get(pitch)
        if before is not None and notes[before, 2] > start:
            if start - notes[before, 1] < ONE_ATTACK:
                notes[before, 2] = max(notes[before, 2], end)
                kept[k] = False
                continue
            notes[before, 2] = start
        latest[pitch] = k
    return notes[kept]
