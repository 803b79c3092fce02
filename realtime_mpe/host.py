"""The engine: wires the stages in the order in which the data flows, and lets nothing hang at the end.

    source -> resampler -> CQT -> model -> notes (on/off) -> voices (who) -> channel map -> sinks

The same engine runs a live device and a file; only the source and its pacing differ. Time is a count of samples of
the 16 kHz grid; seconds are derived from it where notes leave.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .analysis import BINS_PER_PITCH, FIRST_MIDI, HOP, MAX_LOOKAHEAD, SAMPLERATE
from .channels import ChannelMap
from .cqt import FLOOR_DB, RANGE_DB, StreamingCqt
from .errors import UserError
from .events import Note, Status
from .model import OnnxModel
from .notes import NoteTracker
from .resample import Resampler
from .sinks.base import NoteSink
from .voices import HISTORY_HOPS

SILENCE_DB = -80.0  # RMS re full scale: below the self-noise of any input that is connected
CLIPPED = 0.999  # of full scale
MANY_CLIPPED = 1e-4  # of all samples; a mastered file touches full scale here and there without harm
VELOCITY_FLOOR_DB, VELOCITY_RANGE_DB = -62.0, 50.0  # level of a pitch's bins that maps to velocity 1, and up to 127


@dataclass(frozen=True)
class Settings:
    """What the user turns. lookahead : 0..4 frames, None = the model's own.  sensitivity : 0..1, 0.5 is neutral."""

    lookahead: int | None = None
    sensitivity: float = 0.5

    def __post_init__(self) -> None:
        if self.lookahead is not None and not 0 <= self.lookahead <= MAX_LOOKAHEAD:
            raise UserError(f"look-ahead {self.lookahead} is outside 0..{MAX_LOOKAHEAD} frames of 32 ms")
        if not 0.0 <= self.sensitivity <= 1.0:
            raise UserError(f"sensitivity {self.sensitivity} is outside 0..1 (0.5 is neutral)")


class Engine:
    """One performance. Feed it blocks with `process`, end it with `finish`; notes go to the sinks once decided."""

    def __init__(
        self,
        model: OnnxModel,
        samplerate: int,
        sinks: Sequence[NoteSink],
        settings: Settings | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        settings = settings or Settings()
        info = model.info
        lookahead = info.lookahead if settings.lookahead is None else settings.lookahead
        self._model = model
        self._model.reset()
        self._resampler = Resampler(samplerate)
        self._cqt = StreamingCqt(info.analysis)
        thresholds = info.thresholds[lookahead].shifted(settings.sensitivity)
        self._tracker = NoteTracker(info.analysis.n_pitches, thresholds, lookahead)
        self._voices = model.voices()
        self._channels = ChannelMap()
        self._sinks = list(sinks)
        self.warn = warn
        self._embeddings = deque(maxlen=HISTORY_HOPS)
        self._levels = deque(maxlen=model.latency + 1)  # frames; the oldest is the one the model speaks of
        self._sounding: dict[int, Note] = {}
        self.latencies = {  # samples at 16 kHz, of every stage
            "resampler": self._resampler.latency,
            "front end": self._cqt.latency,
            "model": model.latency * HOP,
            "look-ahead": lookahead * HOP,
        }
        self._delay = self._cqt.latency // HOP + model.latency  # frames that come out before label frame 0
        self._hop = -self._delay  # of the label clock, since the start or the last gap
        self._received = 0  # samples at the source's rate, with those that were lost
        self._origin = 0  # 16 kHz sample at which hop 0 began
        self._hops_before = 0  # the voices' clock never starts again: whole hops before hop 0
        self._level = FLOOR_DB
        self.lookahead = lookahead
        self.clipped = self.invalid = self.lost = 0

    @property
    def latency(self) -> int:
        """Samples at 16 kHz between a label frame's centre and its decision."""
        return sum(self.latencies.values())

    @property
    def seconds(self) -> float:
        """Seconds of input that the newest decisions rest on."""
        return (self._origin + (self._hop + self._delay) * HOP + self._resampler.latency) / SAMPLERATE

    @property
    def sounding(self) -> tuple[Note, ...]:
        return tuple(self._sounding.values())

    @property
    def level_db(self) -> float:
        return self._level

    @property
    def voices(self) -> int:
        return self._voices.count

    @property
    def abandoned(self) -> bool:
        """Whether nobody reads any of the sinks any more: closed pipes, and nothing else."""
        return bool(self._sinks) and all(getattr(sink, "closed", False) for sink in self._sinks)

    def process(self, samples: np.ndarray, lost: int = 0) -> None:
        """A block of mono float32 samples at the source's rate; ``lost`` samples are missing right before it."""
        if lost:
            self._skip(lost)
        finite = np.isfinite(samples)
        if not finite.all():
            self.invalid += int((~finite).sum())
            samples = np.where(finite, samples, 0.0)
        self.clipped += int((np.abs(samples) >= CLIPPED).sum())
        samples = np.clip(samples, -1e3, 1e3)
        self._received += len(samples)
        if len(samples):
            self._level = 10.0 * math.log10(float(np.mean(np.square(samples, dtype=float))) + 1e-12)
        self._frames(self._cqt.process(self._resampler.process(samples)))

    def finish(self) -> None:
        """End of input: decide what the look-ahead still holds, and end every note."""
        self._frames(self._cqt.process(self._resampler.flush()))
        self._drain()

    def _drain(self) -> None:
        """Decide what the stages still hold, and end every note."""
        self._frames(self._cqt.flush())
        # Frames of silence, not samples: in the kernels the cut would sound like a click.
        self._frames(np.zeros((self._model.latency + self.lookahead, self._model.info.analysis.n_bins), np.float32))
        self._end_all()

    def report(self, overflows: int, seconds_busy: float) -> None:
        """Tell the sinks how the engine is; ``seconds_busy`` is what the last block took to process."""
        self._tell(
            "status",
            Status(
                seconds=self.seconds,
                level_db=self._level,
                sounding=self.sounding,
                voices=self.voices,
                latency_ms=1000.0 * (self.latency / SAMPLERATE + seconds_busy),
                lost_samples=self.lost,
                overflows=overflows,
                clipped=self.clipped,
                invalid=self.invalid,
            ),
        )

    def faults(self) -> list[str]:
        """What was wrong with the samples so far, a line each with the remedy; for the end of a performance."""
        found = []
        if self.invalid:
            found.append(f"{self.invalid} samples were no numbers and taken as silence: check what made them")
        if self.clipped > MANY_CLIPPED * self._received:
            found.append(f"{self.clipped} samples were clipped: turn the input gain down")
        return found

    def _skip(self, lost: int) -> None:
        """A gap in the input: nothing hangs over it, and time goes on as on the clock."""
        self.lost += lost
        self._received += lost
        self._frames(self._cqt.process(self._resampler.flush()))
        self._drain() if self._delay else self._end_all()
        self._origin = round(self._received * SAMPLERATE / self._resampler.samplerate)
        self._hops_before = self._origin // HOP
        self._hop = -self._delay
        for stage in (self._resampler, self._cqt, self._model, self._tracker):
            stage.reset()
        self._embeddings.clear()
        self._levels.clear()

    def _frames(self, frames: np.ndarray) -> None:
        for frame in frames:
            self._levels.append(frame)
            posteriors = self._model.process(frame)
            if self._hop < 0:
                self._hop += 1
                continue
            self._embeddings.append(posteriors.embedding)
            events = self._tracker.process(posteriors.mix, posteriors.onset)
            self._hop += 1
            label = self._hop - self.lookahead
            if label == 1 and self.lookahead == 0:  # no hop is new enough for label frame 0: one frame late, for once
                self._tell("frame", posteriors.mix[1])
            if label >= 0:
                self._tell("frame", posteriors.mix[self.lookahead])
            for event in events:
                if not event.on:
                    self._note_off(event.pitch, event.frame)
            begun = {event.pitch: event for event in events if event.on}
            if begun:
                starts = [(event.pitch, self._hops_before + event.frame) for event in begun.values()]
                now = self._hops_before + self._hop - 1
                for pitch, voice in self._voices.note_ons(starts, np.stack(self._embeddings), now):
                    self._note_on(voice, pitch, begun[pitch].frame, self._levels[0])
            self._voices.hear(posteriors.embedding)

    def _second(self, label_frame: int) -> float:
        """An event is first seen in the frame after it, so half a hop earlier is the best guess."""
        return max(0.0, (self._origin + (label_frame - 0.5) * HOP) / SAMPLERATE)

    def _note_on(self, voice: int, pitch: int, label_frame: int, frame: np.ndarray) -> None:
        midi = pitch + FIRST_MIDI
        note = Note(
            midi=midi,
            velocity=velocity(frame, pitch),
            voice=voice,
            channel=self._channels.note_on(voice, midi),
            onset=self._second(label_frame),
            emitted=self.seconds,
        )
        self._sounding[pitch] = note
        self._tell("note_on", note)

    def _note_off(self, pitch: int, label_frame: int) -> None:
        note = self._sounding.pop(pitch)
        self._voices.note_off(pitch, self._hops_before + label_frame)
        self._channels.note_off(note.voice, note.midi)
        offset = max(self._second(label_frame), note.onset + HOP / SAMPLERATE / 2)
        self._tell("note_off", replace(note, offset=offset))

    def _end_all(self) -> None:
        for event in self._tracker.flush():
            self._note_off(event.pitch, event.frame)

    def _tell(self, method: str, value: object) -> None:
        """Pass a note, frame or status on. A sink that fails is dropped with one line; the others play on."""
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(value)
            except Exception as error:  # a sink may be anybody's code, and must not silence the others
                self._drop(sink, error)

    def _drop(self, sink: NoteSink, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else f"{type(sink).__name__} failed ({error!r})"
        self._sinks.remove(sink)
        try:
            sink.close()
        except Exception as late:  # it may hold what was played so far: say where that is, or that it is lost
            reason = f"{reason}; {late}"
        if not self._sinks:
            raise UserError(f"{reason}; nothing is left to play to") from error
        self.warn(reason)


def velocity(frame: np.ndarray, pitch: int) -> int:
    """MIDI velocity 1..127 from the level of a pitch's own bins, (n_bins,) levels."""
    decibels = float(frame[BINS_PER_PITCH * pitch : BINS_PER_PITCH * (pitch + 1)].max()) * RANGE_DB + FLOOR_DB
    share = (decibels - VELOCITY_FLOOR_DB) / VELOCITY_RANGE_DB
    return int(np.clip(round(1 + 126 * share), 1, 127))
