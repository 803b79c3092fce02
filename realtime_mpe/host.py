"""The engine: wires the stages in the order in which the data flows, and lets nothing hang at the end.

    source -> resampler -> CQT -> model -> notes (on/off) -> voices (who) -> channel map -> sinks

The same engine runs a live device and a file; only the source and its pacing differ. Time is a count of samples of
the 16 kHz grid; seconds are derived from it where notes leave.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .analysis import FIRST_MIDI, HOP, SAMPLERATE
from .bend import PitchFollower
from .channels import ChannelMap, MpeZone
from .cqt import SILENCE, StreamingCqt
from .events import Note, Status
from .meter import InputMeter
from .model import OnnxModel
from .notes import NoteEvent, NoteTracker, velocity
from .resample import Resampler
from .settings import Settings
from .sinks.base import NoteSink
from .sinks.group import SinkGroup
from .source import Block
from .voices import HISTORY_FRAMES


class Engine:
    """One performance. Feed it blocks with `process`, end it with `finish`; notes go to the sinks once decided."""

    def __init__(
        self,
        model: OnnxModel,
        samplerate: int,
        sinks: Sequence[NoteSink],
        settings: Settings | None = None,
        warn: Callable[[str], None] = warnings.warn,
        channels: ChannelMap | MpeZone | None = None,
    ):
        self._settings = settings = (settings or Settings()).of(model.info)
        info = model.info
        self._model = model
        self._model.reset()
        self._resampler = Resampler(samplerate)
        self._steps = model.steps  # a hop
        self._cqt = StreamingCqt(info.analysis, self._steps)
        self._tracker = NoteTracker(info.analysis.n_pitches, settings.thresholds(info), settings.lookahead, self._steps)
        self._voices = model.voices(settings.players)
        self._channels = channels or ChannelMap()
        self.sinks = SinkGroup(sinks, warn)
        self.meter = InputMeter()
        self.warn = warn
        self._embeddings = deque(maxlen=HISTORY_FRAMES * self._steps)
        self._levels = deque(maxlen=model.latency * self._steps + 1)  # the oldest is the frame that the model speaks of
        self._begun: dict[NoteEvent, int] = {}  # beginnings that have not been played yet, and how loud they were
        self._sounding: dict[int, Note] = {}
        self._follower = PitchFollower() if settings.bend else None
        self.latencies = {  # samples at 16 kHz, of every stage
            "resampler": self._resampler.latency,
            "front end": self._cqt.latency,
            "model": model.latency * HOP,
            "look-ahead": settings.lookahead * HOP,
        }
        self._delay = self._cqt.latency // self._cqt.step + model.latency * self._steps  # frames before the first label
        self._step = -self._delay  # of the label clock, since the start or the last gap
        self._origin = 0  # 16 kHz sample at which step 0 began
        self._counted = 0, 0  # 16 kHz sample at which the source got its present rate, and samples until then
        self._steps_before = 0  # the voices' clock never starts again: whole steps before step 0
        self.lost = 0  # samples at the source's rate

    @property
    def latency(self) -> int:
        """Samples at 16 kHz between a label frame's centre and its decision."""
        return sum(self.latencies.values())

    @property
    def seconds(self) -> float:
        """Seconds of input that the newest decisions rest on."""
        return (self._origin + (self._step + self._delay) * self._cqt.step + self._resampler.latency) / SAMPLERATE

    @property
    def sounding(self) -> tuple[Note, ...]:
        return tuple(self._sounding.values())

    @property
    def lookahead(self) -> int:
        return self._settings.lookahead

    @property
    def voices(self) -> int:
        return self._voices.count

    @property
    def samplerate(self) -> int:
        """Of the source, Hz."""
        return self._resampler.samplerate

    def adjust(self, **changes: int | float) -> None:
        """Set ``lookahead`` or ``sensitivity`` from the next step on; what sounds goes on. UserError as of Settings."""
        self._settings = replace(self._settings, **changes)
        self._tracker.latency = self.lookahead
        self._tracker.thresholds = self._settings.thresholds(self._model.info)
        self.latencies["look-ahead"] = self.lookahead * HOP

    def change_rate(self, samplerate: int) -> None:
        """The source goes on at another rate: what sounds is ended, and time goes on."""
        self._skip(0)
        self._counted = self._origin, self.meter.received + self.lost
        self._resampler = Resampler(samplerate)
        self.latencies["resampler"] = self._resampler.latency

    def process(self, samples: np.ndarray, lost: int = 0) -> None:
        """A block of mono float32 samples at the source's rate; ``lost`` samples are missing right before it."""
        if lost:
            self._skip(lost)
        samples = self.meter.process(samples)
        self.sinks.tell("sound", Block(samples, lost), self.samplerate)
        self._frames(self._cqt.process(self._resampler.process(samples)))

    def finish(self) -> None:
        """End of input: decide what the look-ahead still holds, and end every note."""
        self._frames(self._cqt.process(self._resampler.flush()))
        self._drain()

    def _drain(self) -> None:
        """Decide what the stages still hold, and end every note."""
        self._frames(self._cqt.flush())
        # Frames of silence, not samples: in the kernels the cut would sound like a click.
        missing = self._steps * (self._model.latency + self.lookahead)
        self._frames(np.full((missing, self._model.info.analysis.n_bins), SILENCE, np.float32))
        self._end_all()

    def report(self, overflows: int, seconds_late: float) -> None:
        """Tell the sinks how the engine is; ``seconds_late`` have passed since the last block came."""
        self.sinks.tell(
            "status",
            Status(
                seconds=self.seconds,
                level_db=self.meter.level_db,
                sounding=self.sounding,
                voices=self.voices,
                latency_ms=1000.0 * (self.latency / SAMPLERATE + seconds_late),
                lost_samples=self.lost,
                overflows=overflows,
                clipped=self.meter.clipped,
                invalid=self.meter.invalid,
            ),
        )

    def _skip(self, lost: int) -> None:
        """A gap in the input: nothing hangs over it, and time goes on as on the clock."""
        self.lost += lost
        self._frames(self._cqt.process(self._resampler.flush()))
        self._drain() if self._delay else self._end_all()
        origin, counted = self._counted
        self._origin = origin + round((self.meter.received + self.lost - counted) * SAMPLERATE / self.samplerate)
        self._steps_before = self._origin // self._cqt.step
        self._step = -self._delay
        for stage in (self._resampler, self._cqt, self._model, self._tracker):
            stage.reset()
        self._embeddings.clear()
        self._levels.clear()

    def _frames(self, frames: np.ndarray) -> None:
        for frame, posteriors in zip(frames, self._model.process(frames), strict=True):
            self._levels.append(frame)
            if self._step < 0:
                self._step += 1
                continue
            self._embeddings.append(posteriors.embedding)
            events = self._tracker.process(posteriors.mix, posteriors.onset)
            self._step += 1
            whole = self._step % self._steps == 0  # a whole frame
            label = self._step // self._steps - self.lookahead
            if whole and label == 1 and self.lookahead == 0:  # nothing is new enough for label frame 0: late, for once
                self.sinks.tell("frame", posteriors.mix[1])
            if whole and label >= 0:
                self.sinks.tell("frame", posteriors.mix[self.lookahead])
            self._give(events)
            if whole and self._follower is not None:
                for bend in self._follower.process(self._levels[0], self._sounding):
                    self.sinks.tell("bend", bend)
            self._voices.hear(posteriors.embedding)

    def _give(self, events: Sequence[NoteEvent]) -> None:
        """What begins and ends in a step to those who play it."""
        before = self._steps_before
        now = before + self._step - self._steps  # a note is first heard after its label
        events = [event._replace(step=before + event.step) for event in events]
        self._begun |= {event: velocity(self._levels[0], event.pitch) for event in events if event.on}
        for event, voice in self._voices.process(events, list(self._embeddings), now):
            if event.on:
                self._note_on(voice, event.pitch, event.step - before, self._begun.pop(event))
            else:
                self._note_off(event.pitch, event.step - before)

    def _second(self, step: int) -> float:
        """Of a label. An event is first seen after it, so half a hop earlier is the best guess."""
        return max(0.0, (self._origin + step * self._cqt.step - 0.5 * HOP) / SAMPLERATE)

    def _note_on(self, voice: int, pitch: int, step: int, velocity: int) -> None:
        midi = pitch + FIRST_MIDI
        note = Note(
            midi=midi,
            velocity=velocity,
            voice=voice,
            channel=self._channels.note_on(voice, midi),
            onset=self._second(step),
            emitted=self.seconds,
        )
        self._sounding[pitch] = note
        self.sinks.tell("note_on", note)

    def _note_off(self, pitch: int, step: int) -> None:
        note = self._sounding.pop(pitch)
        self._channels.note_off(note.voice, note.midi)
        offset = max(self._second(step), note.onset + HOP / SAMPLERATE / 2)
        self.sinks.tell("note_off", replace(note, offset=offset))

    def _end_all(self) -> None:
        self._give(self._tracker.flush())
