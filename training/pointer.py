"""Training of the voice memory's pointer, on the notes that the engine really detects, in the order it meets them.

The runtime's own `NoteTracker` and `VoiceMemory` are run over re-mixed performances. At every decision the true
player is known, so the right voice is the one that holds most of that player's notes, or a new one. The first round
follows the truth; in later rounds the pointer decides a share itself, so that it learns from memories with its own
mistakes in them (dataset aggregation, Ross et al. 2011). Several networks learn so side by side and vote.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from realtime_mpe.analysis import FIRST_MIDI, N_PITCHES
from realtime_mpe.errors import UserError
from realtime_mpe.grouping import Grouping
from realtime_mpe.notes import NoteEvent, NoteTracker, Thresholds
from realtime_mpe.timbre import Timbre, alone
from realtime_mpe.voices import (
    HISTORY_FRAMES,
    NEW_FEATURES,
    PATIENCE,
    VOICE_FEATURES,
    NewNote,
    Pointer,
    Scorer,
    VoiceMemory,
)

from .calibrate import Heard
from .metrics import note_frames

HIDDEN_VOICE, HIDDEN_NEW = 128, 96
FOLLOW_TRUTH = (1.0, 0.9, 0.7)  # share of right decisions forced in each round: mistakes come in by and by
CAUTION = 1.0  # log odds by which a new voice is less likely than was learnt: what is opened in error splits a player
NEW_BIAS = "new.4.bias"  # of the score of a new voice
EPOCHS = 4  # a round
BATCH = 512
LEARNING_RATE = 1e-3
VOTERS = 5  # networks of different first weights that learn from the same memories, which they make together


class PointerNetwork(nn.Module):
    """The torch twin of a voter of `realtime_mpe.voices.Pointer`, for padded sets of voices. It opens new voices with
    CAUTION, but not while it learns."""

    def __init__(self):
        super().__init__()
        pooled = 2 * VOICE_FEATURES + NEW_FEATURES
        self.voice = perceptron(VOICE_FEATURES + pooled, HIDDEN_VOICE)
        self.new = perceptron(pooled, HIDDEN_NEW)

    def forward(self, features: Tensor, new: Tensor, present: Tensor) -> Tensor:
        """features (N, V, F), new (N, NEW_FEATURES), present (N, V) bool -> scores (N, V + 1), -inf where absent."""
        count = present.sum(1, keepdim=True).clamp(min=1)
        mean = (features * present[..., None]).sum(1) / count
        highest = features.masked_fill(~present[..., None], -torch.inf).amax(1)
        highest = torch.where(present.any(1, keepdim=True), highest, torch.zeros_like(highest))
        pooled = torch.cat([mean, highest, new], 1)
        voice_input = torch.cat([features, pooled[:, None].expand(-1, features.shape[1], -1)], 2)
        scores = self.voice(voice_input)[..., 0].masked_fill(~present, -torch.inf)
        return torch.cat([scores, self.new(pooled) - (0.0 if self.training else CAUTION)], 1)

    def weights(self) -> dict[str, np.ndarray]:
        """What the runtime is given."""
        named = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        return named | {NEW_BIAS: named[NEW_BIAS] - CAUTION}


def as_pointer(networks: Sequence[PointerNetwork]) -> Pointer:
    """What the runtime makes of them: they vote."""
    return Pointer([network.weights() for network in networks])


def perceptron(n_in: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))


@dataclass(frozen=True)
class Performance:
    """One mixture as the engine hears it: note events of every step, the embeddings they need, and the truth.

    events[step] : what the tracker decided.  where (N, 2) int32 = step, pitch and values (N, D) float16 : embeddings.
    players[step][pitch] : the stems that really play the note detected there; an empty set for a ghost.
    steps : a frame.
    """

    n_steps: int
    events: list[list[NoteEvent]]
    where: np.ndarray
    values: np.ndarray
    players: list[dict[int, frozenset[int]]]
    steps: int = 1

    def embeddings(self) -> np.ndarray:
        dense = np.zeros((self.n_steps, N_PITCHES, self.values.shape[1]), np.float32)
        dense[self.where[:, 0], self.where[:, 1]] = self.values
        return dense


def perform(heard: Heard, thresholds: Thresholds, lookahead: int) -> Performance:
    """Run the note tracker over what was heard of one mixture."""
    tracker = NoteTracker(N_PITCHES, thresholds, lookahead, heard.steps)
    events = [tracker.process(mix, onset) for mix, onset in zip(heard.mix, heard.onset, strict=True)]
    needed = np.zeros(heard.embedding.shape[:2], bool)
    detected, open_notes = [], {}
    for step, step_events in enumerate([*events, tracker.flush()]):
        for event in step_events:
            if event.on:
                open_notes[event.pitch] = step, event.step
            else:
                begun, start = open_notes.pop(event.pitch)
                needed[max(0, begun - HISTORY_FRAMES * heard.steps) : step + 1, event.pitch] = True
                detected.append((begun, event.pitch, start / heard.steps, event.step / heard.steps))
    players: list[dict[int, frozenset[int]]] = [{} for _ in events]
    truth: dict[int, list[tuple[int, int, int]]] = {}
    for stem, on, off, midi in heard.mixture.notes:
        truth.setdefault(int(midi) - FIRST_MIDI, []).append((int(stem), *note_frames(on, off)))
    for step, pitch, start, end in detected:
        players[step][pitch] = frozenset(
            stem
            for stem, first, last in truth.get(pitch, ())
            if 2 * (min(end, last) - max(start, first)) >= min(end - start, last - first)
        )
    where = np.argwhere(needed).astype(np.int32)
    values = heard.embedding[where[:, 0], where[:, 1]].astype(np.float16)
    return Performance(len(events), events, where, values, players, heard.steps)


@dataclass
class Decisions:
    """Padded. features (N, V, F), new (N, NEW_FEATURES), present (N, V) bool, target (N, V + 1) bool: right answers."""

    features: Tensor
    new: Tensor
    present: Tensor
    target: Tensor


class WitnessedMemory(VoiceMemory):
    """A voice memory that knows the true players."""

    def reset(self) -> None:
        super().reset()
        self.players: dict[tuple[int, float], frozenset[int]] = {}  # of the notes so far, by pitch row and first frame
        self.given: list[tuple[frozenset[int], int]] = []  # players and voice of every note, by turn

    def _give(self, note: NewNote, choice: int) -> int:
        voice = super()._give(note, choice)
        self.given.append((self.players[note.pitch, note.start], voice))
        return voice

    def owners(self) -> list[frozenset[int]]:
        """The true players of each remembered note."""
        return [self.given[turn - 1][0] for turn in self._turn[: self._n]]

    def right(self, note: NewNote) -> list[int]:
        """Which of `voices` may get a note, or the one beyond them; none if nobody plays it."""
        return sorted({self._home(player) for player in self.players[note.pitch, note.start]})

    def possible(self, choice: int) -> bool:
        """Whether there is room for it."""
        return choice < len(self.voices()) or len(self._sounding_voices()) < self.max_voices

    def _home(self, player: int) -> int:
        """Which of `voices` has most of this player's remembered notes, among those that are mostly this player's; one
        beyond them if none is."""
        present = self.voices()
        played = {voice: Counter() for voice in present}
        for voice, players in zip(self._voice[: self._n].tolist(), self.owners(), strict=True):
            played[voice].update(players)
        homes = [
            (count[player], -choice)
            for choice, count in enumerate(played.values())
            if count[player] and count[player] == max(count.values())
        ]
        return -max(homes)[1] if homes else len(present)


Witnessed = TypeVar("Witnessed", bound=WitnessedMemory)


class TrueMemory(WitnessedMemory):
    """Every note where it belongs, and the first voice for notes of nobody's."""

    def __init__(self, max_voices: int, steps: int, timbre: Timbre = alone):
        super().__init__(lambda features, new: np.zeros(len(features) + 1), max_voices, None, steps, timbre)

    def _probabilities(self, note: NewNote) -> np.ndarray:
        probabilities = np.zeros(len(self.voices()) + 1)
        right = self.right(note)
        probabilities[right[0] if right and self.possible(right[0]) else 0] = 1.0
        return probabilities


class StudiedMemory(WitnessedMemory):
    """Notes every decision, and can be made to follow the truth in a share of them."""

    def __init__(
        self,
        scorer: Scorer,
        max_voices: int,
        grouping: Grouping | None = None,
        follow_truth: float = 0.0,
        steps: int = 1,
        timbre: Timbre = alone,
    ):
        super().__init__(scorer, max_voices, grouping, steps, timbre)
        self.follow_truth = follow_truth  # 0..1
        self._rng = np.random.default_rng(0)
        self.decisions: list[tuple[np.ndarray, np.ndarray, list[int]]] = []

    def _give(self, note: NewNote, choice: int) -> int:
        right = self.right(note)
        if right:
            self.decisions.append((*self.features(note), right))
            if self.possible(right[0]) and self._rng.random() < self.follow_truth:
                choice = right[0]
        return super()._give(note, choice)

    def process(
        self, events: Sequence[NoteEvent], history: Sequence[np.ndarray], now: int
    ) -> list[tuple[NoteEvent, int]]:
        self._decides = self._rng.random() < 0.5
        return super().process(events, history, now)

    def _ready(self, sureness: float, waited: float) -> bool:
        """As long as the truth is followed, notes wait by chance: the pointer is to know them at every age."""
        if not self.follow_truth:
            return super()._ready(sureness, waited)
        return self._decides or waited >= PATIENCE


def study(performance: Performance, memory: Witnessed) -> Witnessed:
    """Run a voice memory over one performance; returns it."""
    embeddings, steps = performance.embeddings(), performance.steps
    for step, events in enumerate(performance.events):
        for event in events:
            if event.on:
                players = performance.players[step].get(event.pitch, frozenset())
                memory.players[event.pitch, event.step / steps] = players
        memory.process(events, embeddings[max(0, step + 1 - HISTORY_FRAMES * steps) : step + 1], step + 1 - steps)
        memory.hear(embeddings[step])
    return memory


def padded(decisions: Sequence[tuple[np.ndarray, np.ndarray, list[int]]], max_voices: int) -> Decisions:
    features = np.zeros((len(decisions), max_voices, VOICE_FEATURES), np.float32)
    present = np.zeros((len(decisions), max_voices), bool)
    target = np.zeros((len(decisions), max_voices + 1), bool)
    new = np.stack([d[1] for d in decisions])
    for k, (voices, _, right) in enumerate(decisions):
        features[k, : len(voices)] = voices
        present[k, : len(voices)] = True
        for voice in right:
            target[k, max_voices if voice == len(voices) else voice] = True
    return Decisions(*(torch.from_numpy(a) for a in (features, new, present, target)))


def home_share(memories: Sequence[WitnessedMemory]) -> float:
    """Share of the truly played notes that lie in their player's own voice, players and voices matched one to one."""
    at_home = total = 0
    for memory in memories:
        players = sorted({p for players, _ in memory.given for p in players})
        table = np.zeros((len(players), memory.max_voices))
        for owners, voice in memory.given:
            for player in owners:
                table[players.index(player), voice] += 1 / len(owners)
        rows, columns = linear_sum_assignment(-table)
        at_home += table[rows, columns].sum()
        total += table.sum()
    return at_home / max(total, 1)


def count_error(memories: Sequence[WitnessedMemory]) -> float:
    """Mean of voices with at least 5 % of the notes, less the players heard."""
    errors = []
    for memory in memories:
        held = Counter(voice for _, voice in memory.given)
        voices = sum(n >= 0.05 * len(memory.given) for n in held.values())
        errors.append(voices - len({p for players, _ in memory.given for p in players}))
    return float(np.mean(errors))


def fit_pointer(
    train: Sequence[Performance],
    validation: Sequence[Performance],
    max_voices: int,
    grouping: Grouping | None = None,
    timbre: Timbre = alone,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[PointerNetwork]:
    """Train VOTERS on `train`; those of the round that is best on `validation` are returned."""
    torch.manual_seed(seed)
    networks = [PointerNetwork() for _ in range(VOTERS)]
    best, best_networks = -1.0, networks
    gathered = []
    for round_number in range(len(FOLLOW_TRUTH)):
        pointer = as_pointer(networks)
        for performance in train:
            follow = FOLLOW_TRUTH[round_number]
            memory = StudiedMemory(pointer, max_voices, grouping, follow, performance.steps, timbre)
            gathered += study(performance, memory).decisions
        if not gathered:
            raise UserError("the network detects no notes yet, so no voices can be learnt; train it for more --hours")
        data = padded(gathered, max_voices)
        for network in networks:
            learn(network, data)
        pointer = as_pointer(networks)
        memories = [
            study(performance, StudiedMemory(pointer, max_voices, grouping, 0.0, performance.steps, timbre))
            for performance in validation
        ]
        share = home_share(memories)
        say(
            f"pointer round {round_number + 1} of {len(FOLLOW_TRUTH)}: {len(gathered)} decisions, "
            f"{100 * share:.1f} % of the validation notes at home, voices less players {count_error(memories):+.2f}"
        )
        if share > best:
            best, best_networks = share, copy.deepcopy(networks)
    return [network.eval() for network in best_networks]


def learn(network: PointerNetwork, data: Decisions) -> None:
    """EPOCHS over the decisions so far; the probability of any right answer is maximised."""
    steps = EPOCHS * (len(data.new) // BATCH + 1)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(data.new)).split(BATCH):
            log_p = network(data.features[index], data.new[index], data.present[index]).log_softmax(1)
            loss = -log_p.masked_fill(~data.target[index], -torch.inf).logsumexp(1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
