"""Made-up players for the tests of voices, pointer and grouping: notes with timbres, without a sound or a network."""

import numpy as np

from realtime_mpe.affinity import Notes
from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, MAX_LOOKAHEAD, N_PITCHES
from realtime_mpe.notes import NoteEvent, Thresholds
from realtime_mpe.training.calibrate import Heard
from realtime_mpe.training.company import CompanyNetwork
from realtime_mpe.training.grouping import GroupingNetwork
from realtime_mpe.training.lines import LineNetwork
from realtime_mpe.training.mixing import Mixture
from realtime_mpe.training.players import Players
from realtime_mpe.training.pointer import PointerNetwork, perform
from realtime_mpe.voices import HISTORY_FRAMES, VoiceMemory

TIMBRES = np.eye(6, 16, dtype=np.float32)
HOPS = 200
LIMITS = Thresholds(on=0.5, off=0.4, onset=0.6, repeat=0.6)


def untrained(embedding_dim: int) -> Players:
    """As they are before they have learnt anything."""
    return Players(LineNetwork(), CompanyNetwork(embedding_dim), [GroupingNetwork()], [PointerNetwork()])


def by_timbre(features: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A scorer that trusts timbre alone: joins the most similar voice above a cosine of 0.7."""
    return np.concatenate([10 * features[:, 0], [7.0]])


def embedding(sounds: dict[int, int]) -> np.ndarray:
    """(n_pitches, D) with the timbre of each sounding pitch row."""
    out = np.zeros((N_PITCHES, TIMBRES.shape[1]), np.float32)
    for pitch, timbre in sounds.items():
        out[pitch] = TIMBRES[timbre]
    return out


def play(notes, hops, scorer=by_timbre, max_voices=8, memory=None):
    """notes : (start, end, pitch, timbre). Returns pitch and voice of each note, in the order they are given out."""
    memory, history, voices = memory or VoiceMemory(scorer, max_voices), [], []
    for hop in range(hops):
        sounds = {p: t for start, end, p, t in notes if start <= hop < end}
        history.append(embedding(sounds))
        events = [NoteEvent(False, p, hop) for _, end, p, _ in notes if end == hop]
        events += [NoteEvent(True, p, hop) for start, _, p, _ in notes if start == hop]
        played = memory.process(events, history[-HISTORY_FRAMES:], hop)
        voices += [(event.pitch, voice) for event, voice in played if event.on]
        memory.hear(history[-1])
    return voices, memory


def performance(seed: int, players: int, ghosts: int = 0, unison: bool = False):
    """Players with timbres of their own and noise on every note, playing anywhere: pitch and order tell nothing."""
    rng = np.random.default_rng(seed)
    timbres = rng.normal(size=(players, 16))
    mix = np.zeros((HOPS + 1, N_PITCHES))
    onset = np.zeros((HOPS + 1, N_PITCHES))
    embedding = rng.normal(0, 0.3, (HOPS, N_PITCHES, 16)).astype(np.float32)
    rows, free = [], np.zeros((HOPS + 40, N_PITCHES), bool)
    for k in range(14 * players + ghosts):
        player = k % players if k < 14 * players else -1
        start, length, pitch = int(rng.integers(1, HOPS - 12)), int(rng.integers(4, 10)), int(rng.integers(N_PITCHES))
        if free[max(start - 2, 0) : start + length + 2, pitch].any():
            continue
        free[start : start + length, pitch] = True
        mix[start : start + length, pitch] = onset[start : start + 2, pitch] = 0.9
        if player >= 0:
            embedding[start - 1 : start + length, pitch] += timbres[player] + rng.normal(0, 0.3, 16)
            owners = (player, (player + 1) % players) if unison else (player,)
            for owner in owners:
                seconds = np.array([start - 0.5, start + length - 0.5]) * FRAME_SECONDS
                rows.append((owner, *seconds, pitch + FIRST_MIDI))
    mixture = Mixture(np.zeros(1), np.array(sorted(rows)))
    return perform(Heard(all_lookaheads(mix), all_lookaheads(onset), embedding, mixture), LIMITS, 1)


def all_lookaheads(target):
    """(HOPS + 1, P) by label frame -> (HOPS, L, P) as a model that is always right gives them hop by hop."""
    padded = np.concatenate([np.zeros((MAX_LOOKAHEAD, target.shape[1])), target])
    rows = np.arange(HOPS)[:, None] + 1 - np.arange(MAX_LOOKAHEAD + 1) + MAX_LOOKAHEAD
    return padded[rows]


def first_voice(features, new):
    return np.zeros(len(features) + 1)


def notes(rng: np.random.Generator, n: int = 12) -> Notes:
    unit = rng.normal(size=(n, 8))
    start = np.sort(rng.integers(0, 80, n)).astype(float)
    end = start + rng.integers(3, 20, n)
    end[-2:] = np.inf
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return Notes(unit, unit[:, ::-1], rng.integers(20, 40, n).astype(float), start, end, rng.integers(1, 33, n))
