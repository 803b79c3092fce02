"""The fixed grid of the analysis: sample rate, hop, bins and pitches. Every other module takes its numbers from here.

A *frame* is one column of the front end, one hop of 512 samples at 16 kHz = 32 ms (31.25 frames a second, a
fraction that is never rounded). Label frame i is centred on second ``i * HOP / SAMPLERATE`` of the input.

The engine decides more often than that. A live model hears the sound in PHASES interleaved series of frames, each
with states of its own, and speaks at every *step*, one PHASES-th of a hop.
"""

from dataclasses import asdict, dataclass, fields

SAMPLERATE = 16_000  # Hz; 8 kHz of band holds four harmonics of the highest pitch
HOP = 512  # samples a frame
FRAME_SECONDS = HOP / SAMPLERATE
FIRST_MIDI = 23  # B0, the lowest of the paper's 72 pitches; the highest is MIDI 94
N_PITCHES = 72
BINS_PER_PITCH = 3
N_BINS = N_PITCHES * BINS_PER_PITCH
PHASES = 2  # 16 ms a step; each phase costs a whole run of the network a hop
MAX_LOOKAHEAD = 4  # frames; the model answers for every look-ahead from 0 to this


@dataclass(frozen=True)
class AnalysisConfig:
    """The front end a model was trained on; it travels in the model file and must equal the runtime's in all fields."""

    samplerate: int = SAMPLERATE
    hop: int = HOP
    first_midi: int = FIRST_MIDI
    n_pitches: int = N_PITCHES
    bins_per_pitch: int = BINS_PER_PITCH
    overtone_bins: int = 72  # above those of the highest pitch: the band up to 7.9 kHz, where timbre is
    gamma: float = 6.0  # Hz added to each bandwidth: kernels of 152 ms at MIDI 23 and 24 ms at MIDI 94
    alignment: str = "right"  # kernels end at the newest sample, so the front end adds no look-ahead; or "centre"

    @property
    def n_bins(self) -> int:
        return self.n_pitches * self.bins_per_pitch + self.overtone_bins

    def differences(self, other: "AnalysisConfig") -> list[str]:
        """Names and values of the fields in which two configurations differ, as text for an error message."""
        return [
            f"{f.name} {getattr(self, f.name)!r} != {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    def to_dict(self) -> dict:
        return asdict(self)


PAPER = AnalysisConfig(overtone_bins=0, gamma=0.0, alignment="centre")
"""The slot-attention paper's constant-Q transform: kernels of 1666 ms at MIDI 23, half of which is look-ahead."""
