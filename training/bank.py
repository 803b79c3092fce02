"""Random re-mixing where training happens: cached stems resident in a device's memory, whole batches made there.

`mixing` makes one mixture at a time on the CPU, which is slower than a GPU learns. Here the choices of a batch (who
plays, when, how loud) are drawn on the CPU, and the sound is made of them by the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realtime_mpe.analysis import HOP, SAMPLERATE
from realtime_mpe.errors import UserError

from .effects import COLOUR_DB, COLOUR_FROM, COLOUR_TAPS, COLOUR_WAVES, NOISE_SHARES, hall
from .mixing import (
    COLOUR_PROBABILITY,
    DISTRACTOR_PROBABILITY,
    GUEST_PROBABILITY,
    HALL_PROBABILITY,
    MAX_STEMS,
    NOISE_PROBABILITY,
    PLAYING_DB,
    RETUNE_CENTS,
    SIGNAL_TO_NOISE_DB,
    STRANGER_PROBABILITY,
    Batch,
    draw_count,
    gains,
    labelled,
)
from .stems import Segment, StemCache

TRANSPOSE_PROBABILITY, TRANSPOSE_SEMITONES = 0.4, 3  # of a whole mixture, by its speed: other bodies, other registers
VIBRATO_PROBABILITY, VIBRATO_CENTS, VIBRATO_HZ = 0.3, (8.0, 45.0), (4.5, 7.0)
EMPTY_PROBABILITY = 0.02  # nobody plays: noise is no music
MIXTURE_COLOUR_PROBABILITY = 0.3  # one microphone for all
HALLS = 300  # are built, and met again


@dataclass
class Plan:
    """What a batch is made of. K stems in all, M notes.

    row, example (K,) int64 : a stem's row in the bank, and whose it is.  start, ratio (K,) : first sample, speed.
    gain (K, G) : as of `mixing.gains`.  coloured (K,) bool, vibrato (K, 3) : deviation in samples, Hz, phase.
    hall (B,) int64 : where each example is played, -1 for no place.
    notes (M, 5) : example, stem within it, onset s, offset s, MIDI, in the time of the mixture.
    """

    batch_size: int
    row: np.ndarray
    example: np.ndarray
    start: np.ndarray
    ratio: np.ndarray
    gain: np.ndarray
    coloured: np.ndarray
    vibrato: np.ndarray
    hall: np.ndarray
    notes: np.ndarray


class StemBank:
    """All stems of a cache, int16 on ``device``: 5 MB a segment of 24 s. Raises UserError if they do not fit."""

    def __init__(self, cache: StemCache, device: torch.device):
        shapes = np.array([cache.load(k).audio.shape for k in range(len(cache))])
        self.length = int(shapes[:, 1].max())
        shape = int(shapes[:, 0].sum()), self.length
        try:
            self.audio = torch.zeros(shape, dtype=torch.int16, device=device)
        except RuntimeError as error:  # out of memory, of whatever kind
            size = 2e-9 * shape[0] * shape[1]
            raise UserError(f"{size:.0f} GB of stems do not fit into {device}; give fewer --segments") from error
        rng = np.random.default_rng(0)
        self.halls = torch.from_numpy(np.stack([hall(rng) for _ in range(HALLS)])).to(device)
        self.notes: list[np.ndarray] = []  # of each row, (M, 3): onset s, offset s, MIDI
        self.players: list[int] = []  # rows that have notes
        self.segments: list[tuple[list[list[int]], list[int]]] = []  # rows of each part, rows of percussion
        for k in range(len(cache)):  # read again: twice in memory would be too much
            self._add(cache.load(k))

    def _add(self, segment: Segment) -> None:
        rows = np.arange(len(self.notes), len(self.notes) + len(segment.part))
        self.audio[rows[0] : rows[-1] + 1, : segment.audio.shape[1]] = torch.from_numpy(segment.audio)
        for stem in range(len(rows)):
            self.notes.append(segment.notes[segment.notes[:, 0] == stem, 1:4].astype(np.float64))
        parts = [rows[segment.part == part].tolist() for part in np.unique(segment.part[segment.part >= 0])]
        self.players += [row for part in parts for row in part]
        self.segments.append((parts, rows[segment.part < 0].tolist()))

    def draw(self, batch_size: int, n_frames: int, rng: np.random.Generator) -> Batch:
        """A random batch. What it is made of comes from ``rng``, how it sounds from torch's default generator."""
        return self.make(self.plan(batch_size, n_frames, rng), n_frames)

    def plan(self, batch_size: int, n_frames: int, rng: np.random.Generator) -> Plan:
        """Who plays in each example, as `mixing.mix` draws it."""
        n = n_frames * HOP
        rows, gain, notes = [], [], []
        columns: list[tuple] = []
        for example in range(batch_size):
            parts, drums = self.segments[int(rng.integers(len(self.segments)))]
            shift = 0
            if rng.random() < TRANSPOSE_PROBABILITY:
                shift = int(rng.integers(-TRANSPOSE_SEMITONES, TRANSPOSE_SEMITONES + 1))
            ratio = 2.0 ** (shift / 12 + rng.uniform(-RETUNE_CENTS, RETUNE_CENTS) / 1200)
            start = int(rng.integers(0, max(1, self.length - int(n * ratio))))
            chosen = [int(part[rng.integers(len(part))]) for part in parts]
            rng.shuffle(chosen)
            chosen = chosen[: draw_count(len(chosen), rng)]
            for k in range(len(chosen)):
                if rng.random() < STRANGER_PROBABILITY:
                    chosen[k] = self._stranger(rng)
            while len(chosen) < MAX_STEMS and rng.random() < GUEST_PROBABILITY:
                chosen.append(self._stranger(rng))
            if rng.random() < EMPTY_PROBABILITY:
                chosen = []
            if drums and rng.random() < DISTRACTOR_PROBABILITY:
                chosen.append(int(drums[rng.integers(len(drums))]))
            for k, row in enumerate(chosen):
                rows.append(row)
                columns.append((example, start, ratio, *self._vibrato(rng)))
                own = self.notes[row]
                on, off = ((own[:, i] - start / SAMPLERATE) / ratio for i in (0, 1))
                gain.append(gains(on, off, n, rng))
                inside = (off > 0) & (on < n / SAMPLERATE)
                head = np.broadcast_to((float(example), float(k)), (int(inside.sum()), 2))
                notes.append(np.column_stack([head, on[inside], off[inside], own[inside, 2] + shift]))
        table = np.array(columns, np.float64).reshape(-1, 6)
        return Plan(
            batch_size,
            np.array(rows, np.int64),
            table[:, 0].astype(np.int64),
            table[:, 1],
            table[:, 2],
            np.array(gain, np.float32),
            rng.random(len(rows)) < COLOUR_PROBABILITY,
            table[:, 3:6],
            np.where(rng.random(batch_size) < HALL_PROBABILITY, rng.integers(HALLS, size=batch_size), -1),
            np.concatenate(notes) if notes else np.zeros((0, 5)),
        )

    def _stranger(self, rng: np.random.Generator) -> int:
        return self.players[int(rng.integers(len(self.players)))]

    @staticmethod
    def _vibrato(rng: np.random.Generator) -> tuple[float, float, float]:
        if rng.random() >= VIBRATO_PROBABILITY:
            return 0.0, 1.0, 0.0
        cents, rate = rng.uniform(*VIBRATO_CENTS), rng.uniform(*VIBRATO_HZ)
        # A delay that swings by d samples at f Hz bends the pitch by 2 pi f d / samplerate.
        return (2 ** (cents / 1200) - 1) * SAMPLERATE / (2 * np.pi * rate), rate, rng.uniform(0, 2 * np.pi)

    @torch.no_grad()
    def make(self, plan: Plan, n_frames: int) -> Batch:
        """The plan's sound and labels, on the bank's device; drawn from the device's default generator."""
        device, n = self.audio.device, n_frames * HOP
        to = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device, non_blocking=True)  # noqa: E731
        audio = torch.zeros(plan.batch_size, n, device=device)
        if len(plan.row):
            stems = self._play(to(plan.row), to(plan.start), to(plan.ratio), to(plan.vibrato), n)
            gain = F.interpolate(to(plan.gain)[:, None], n + 1, mode="linear", align_corners=True)[:, 0, :-1]
            audio.index_add_(0, to(plan.example), coloured(stems * gain, to(plan.coloured)))
        inside = to(np.flatnonzero(plan.hall >= 0))
        if len(inside):
            audio[inside] = convolved(audio[inside], self.halls[to(plan.hall)[inside]])
        audio = coloured(audio, torch.rand(len(audio), device=device) < MIXTURE_COLOUR_PROBABILITY)
        return labelled(set_level(audio), plan.notes, n_frames)

    def _play(self, row: Tensor, start: Tensor, ratio: Tensor, vibrato: Tensor, n: int) -> Tensor:
        """(K,) rows from ``start`` at ``ratio`` times their speed -> (K, n), cubic (Catmull-Rom)."""
        # In double precision: a hundredth of a sample is noise in the treble.
        time = torch.arange(n, dtype=torch.float64, device=row.device)
        swing = vibrato[:, :1] * torch.sin(2 * torch.pi / SAMPLERATE * vibrato[:, 1:2] * time + vibrato[:, 2:])
        position = start[:, None] + ratio[:, None] * time + swing
        index = position.floor()
        x = (position - index).float()
        index = index.long()
        a, b, c, d = (self.audio[row[:, None], (index + k).clamp(0, self.length - 1)].float() for k in (-1, 0, 1, 2))
        wave = b + 0.5 * x * (c - a + x * (2 * a - 5 * b + 4 * c - d + x * (3 * (b - c) + d - a)))
        return wave * (position < self.length - 2) / 32767


def convolved(audio: Tensor, response: Tensor) -> Tensor:
    """Rows (B, n) with rows (B, m), cut to n."""
    n = audio.shape[1] + response.shape[1]
    return torch.fft.irfft(torch.fft.rfft(audio, n) * torch.fft.rfft(response, n), n)[:, : audio.shape[1]]


def uniform(low: float, high: float, n: int, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(n, device=device)


def coloured(audio: Tensor, which: Tensor) -> Tensor:
    """`effects.colour` on the rows (B, n) where ``which`` (B,) is true, circular; level kept."""
    n_rows, n = audio.shape
    device = audio.device
    grid = torch.linspace(0.0, 1.0, 65, device=device)
    waves = torch.arange(1, COLOUR_WAVES + 1, device=device, dtype=torch.float32)
    height = torch.randn(n_rows, COLOUR_WAVES, device=device) * COLOUR_DB * waves**-0.5
    height = height / torch.sqrt(0.5 * (1 / waves).sum()) * which[:, None]
    phase = uniform(0, 2 * torch.pi, n_rows * COLOUR_WAVES, device).view(n_rows, COLOUR_WAVES, 1)
    gain_db = (height[..., None] * torch.cos(torch.pi * waves[:, None] * grid + phase)).sum(1)  # (B, 65)
    frequency = torch.fft.rfftfreq(COLOUR_TAPS, 1 / SAMPLERATE, device=device).clamp(min=COLOUR_FROM)
    place = torch.log2(frequency / COLOUR_FROM) / np.log2(SAMPLERATE / 2 / COLOUR_FROM) * 64
    left = place.floor().clamp(max=63).long()
    gain_db = torch.lerp(gain_db[:, left], gain_db[:, left + 1], (place - left).expand(n_rows, -1))
    cepstrum = torch.fft.irfft(gain_db * (np.log(10) / 20))
    half = COLOUR_TAPS // 2
    folded = torch.cat([cepstrum[:, :1], 2 * cepstrum[:, 1:half], cepstrum[:, half : half + 1]], 1)
    taps = torch.fft.irfft(torch.exp(torch.fft.rfft(folded, COLOUR_TAPS)))
    wet = torch.fft.irfft(torch.fft.rfft(audio) * torch.fft.rfft(taps, n), n)
    return wet * ((audio.square().mean(1) + 1e-12) / (wet.square().mean(1) + 1e-12)).sqrt()[:, None]


def set_level(audio: Tensor) -> Tensor:
    """`mixing.set_level` for rows (B, n)."""
    n_rows, n = audio.shape
    device = audio.device
    level = 10 ** (uniform(*PLAYING_DB, n_rows, device) / 20)
    audio = audio * (level / (audio.square().mean(1).sqrt() + 1e-6))[:, None]
    noisy = torch.rand(n_rows, device=device) < NOISE_PROBABILITY
    noise = level * noisy * 10 ** (-uniform(*SIGNAL_TO_NOISE_DB, n_rows, device) / 20)
    return (audio + background(n_rows, n, device) * noise[:, None]).clamp(-1.0, 1.0)


def background(n_rows: int, n: int, device: torch.device) -> Tensor:
    """`effects.background` for rows: (B, n) of RMS 1, hiss, pink noise, rumble and mains hum in random shares."""
    shares = torch.distributions.Dirichlet(torch.tensor(NOISE_SHARES, device=device)).sample((n_rows,))
    frequency = torch.fft.rfftfreq(n, 1 / SAMPLERATE, device=device).clamp(min=20.0)
    power = torch.stack([frequency**-exponent for exponent in (0.0, 1.0, 2.0)])
    power = shares[:, :3] @ (power / power.mean(1, keepdim=True))
    spectrum = torch.randn(n_rows, len(frequency), 2, device=device) * power.sqrt()[..., None]
    noise = torch.fft.irfft(torch.view_as_complex(spectrum), n)
    noise = noise / (noise.square().mean(1, keepdim=True).sqrt() + 1e-9) * (1 - shares[:, 3:]).sqrt()
    mains = torch.where(torch.rand(n_rows, 1, device=device) < 0.5, 50.0, 60.0)
    cycles = mains * torch.arange(n, device=device, dtype=torch.float32) / SAMPLERATE
    hum = torch.zeros_like(noise)
    count = torch.randint(1, 8, (n_rows, 1), device=device)
    for harmonic in range(1, 8):
        height = torch.rand(n_rows, 1, device=device) / harmonic * (harmonic <= count)
        hum += height * torch.sin(2 * torch.pi * (harmonic * cycles % 1 + torch.rand(n_rows, 1, device=device)))
    return noise + hum / (hum.square().mean(1, keepdim=True).sqrt() + 1e-9) * shares[:, 3:].sqrt()
