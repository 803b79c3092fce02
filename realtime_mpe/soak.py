"""``rt-mpe bench --soak``: hours of the built-in recording through the whole engine, as fast as it can.

The recording is repeated without a pause, so what is found in the last repetitions must be what was found in the first
ones, at the same place: that shows any drift between sound and notes. Memory is read along the way, and the take that
is recorded meanwhile must hold every note that was sent.
"""

import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import mido
import numpy as np
import soundfile

from .events import Note
from .host import Engine
from .model import OnnxModel
from .sinks.base import NoteSink
from .sinks.midi_file import MidiFileSink

BLOCK = 512  # samples
STATUS_SECONDS = 0.1
WARM_SECONDS = 120.0  # of sound, after which memory may not grow any more


@dataclass(frozen=True)
class Soak:
    """seconds : of sound.  rtf : processor time a second of sound.  grown_mb : between WARM_SECONDS and the end, None
    where unknown.  drift_ms : how far the notes of the last tenth of the repetitions lie from those of the first.
    """

    seconds: float
    rtf: float
    notes: int
    unended: int
    longest_seconds: float
    taken: int
    grown_mb: float | None
    drift_ms: float


class _Heard(NoteSink):
    def __init__(self) -> None:
        self.sounding: Counter[tuple[int, int]] = Counter()
        self.onsets = array("d")  # second, MIDI number, and so on: a list would be what grows
        self.longest = 0.0

    def note_on(self, note: Note) -> None:
        self.sounding[note.voice, note.midi] += 1
        self.onsets.extend((note.onset, note.midi))

    def note_off(self, note: Note) -> None:
        self.sounding[note.voice, note.midi] -= 1
        self.longest = max(self.longest, note.offset - note.onset)


def soak(model: OnnxModel, hours: float) -> Soak:
    """Takes as long as the machine needs, and shows on standard error how far it is."""
    with resources.as_file(resources.files(__package__).joinpath("demo.ogg")) as path:
        recording, samplerate = soundfile.read(path, dtype="float32")
    length = len(recording) / samplerate
    heard, warm = _Heard(), None
    with tempfile.TemporaryDirectory(prefix="rt-mpe-") as folder:
        take = MidiFileSink(Path(folder) / "take.mid")
        engine = Engine(model, samplerate, [heard, take], warn=lambda line: print(line, file=sys.stderr))
        cpu, next_status, told = time.process_time(), 0.0, -1
        for _ in range(max(2, round(3600.0 * hours / length))):
            for start in range(0, len(recording), BLOCK):
                engine.process(recording[start : start + BLOCK])
                if engine.seconds >= next_status:
                    next_status = engine.seconds + STATUS_SECONDS
                    engine.report(0, 0.0)
            if warm is None and engine.seconds >= WARM_SECONDS:
                warm = memory_mb()
            if int(engine.seconds / 600) > told:
                told = int(engine.seconds / 600)
                print(f"{engine.seconds / 60:6.0f} min  {memory_mb() or 0:6.1f} MB", file=sys.stderr, flush=True)
        seconds = engine.seconds
        engine.finish()
        cpu = time.process_time() - cpu
        now = memory_mb()
        take.close()
        messages = (m for track in mido.MidiFile(take.path).tracks for m in track)
        taken = sum(m.type == "note_on" and m.velocity > 0 for m in messages)
    grown = None if now is None or warm is None else now - warm
    unended, drift = sum((+heard.sounding).values()), drift_ms(heard.onsets, length)
    return Soak(seconds, cpu / seconds, len(heard.onsets) // 2, unended, heard.longest, taken, grown, drift)


def drift_ms(onsets: Sequence[float], length: float) -> float:
    """Of the notes in the last tenth of the repetitions, by their place in the recording, from the nearest of the same
    pitch in the first tenth: median, ms."""
    table = np.array(onsets, float).reshape(-1, 2)
    if not len(table):
        return 0.0
    repetitions = int(np.ceil((table[:, 0].max() + 1e-9) / length))
    some = max(1, repetitions // 10)
    place = table[:, 0] % length
    number = table[:, 0] // length
    first, last = number < some, number >= repetitions - some
    distances = []
    for midi in np.unique(table[last, 1]):
        early = place[first & (table[:, 1] == midi)]
        for late in place[last & (table[:, 1] == midi)]:
            if len(early):
                around = (late - early + length / 2) % length - length / 2
                distances.append(around[np.argmin(np.abs(around))])
    return 1000.0 * float(np.median(distances)) if distances else 0.0


def memory_mb() -> float | None:
    """Resident memory of this process now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import resource

    return pages * resource.getpagesize() / 1e6


def table(found: Soak) -> list[str]:
    grown = "unknown" if found.grown_mb is None else f"{found.grown_mb:+.1f} MB"
    return [
        f"heard               {found.seconds / 3600:.2f} h at {found.rtf:.3f} processor seconds a second",
        f"notes               {found.notes}, never ended {found.unended}, longest {found.longest_seconds:.1f} s",
        f"in the take         {found.taken}",
        f"memory              {grown} after the first {WARM_SECONDS:.0f} s",
        f"drift               {found.drift_ms:+.1f} ms from the first tenth to the last",
    ]
