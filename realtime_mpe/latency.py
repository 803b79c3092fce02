"""How long after a note begins it is sent: in the engine, and on its way through a real sound and MIDI system.

A note that was sent belongs to a true one of the same pitch that began at most 50 ms later or 200 ms earlier: later, it
no longer fits the music, and latency bought with missed notes is worth nothing, so the share of matched notes stands
beside it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mido
import numpy as np

from .errors import UserError
from .events import Note
from .host import Engine
from .model import OnnxModel
from .settings import Settings
from .sinks.base import NoteSink
from .source import FileSource

EARLIEST_EVENT, LATEST_EVENT = -0.05, 0.2  # s around the true onset
REGISTERS = {"all": (0, 128), "below C3": (0, 48), "C3 to B4": (48, 72), "from C5": (72, 128)}  # MIDI numbers
RIG_BLOCK = 256  # samples at 48 kHz, of the device in the rig
RIG_TIMEOUT = 60.0  # s beyond the length of the recording


@dataclass(frozen=True)
class Delay:
    """Of the notes of one register. matched of sent and true ones; ms from true onset to note_on, None without any."""

    true: int
    sent: int
    matched: int
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    p90_ms: float | None = None

    @property
    def precision(self) -> float:
        return self.matched / self.sent if self.sent else 0.0

    @property
    def recall(self) -> float:
        return self.matched / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        return 2 * self.matched / (self.true + self.sent) if self.true + self.sent else 0.0


def event_latencies(true: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """Which note_on belongs to which note. true, sent : (N, 2) rows second, MIDI number -> (M, 2) rows MIDI, delay (s).

    Per pitch and in the order of sending, each takes the nearest true onset still free.
    """
    pairs = []
    for midi in np.unique(sent[:, 1]):
        free = sorted(true[true[:, 1] == midi, 0])
        for emitted in sorted(sent[sent[:, 1] == midi, 0]):
            near = [onset for onset in free if EARLIEST_EVENT <= emitted - onset <= LATEST_EVENT]
            if near:
                onset = min(near, key=lambda onset: abs(emitted - onset))
                free.remove(onset)
                pairs.append((midi, emitted - onset))
    return np.array(pairs, float).reshape(-1, 2)


def delays(true: np.ndarray, sent: np.ndarray) -> dict[str, Delay]:
    """By the names of REGISTERS; true, sent as of `event_latencies`."""
    pairs = event_latencies(true, sent)
    found = {}
    for name, (low, high) in REGISTERS.items():
        inside = [int(((midi >= low) & (midi < high)).sum()) for midi in (true[:, 1], sent[:, 1])]
        own = 1000.0 * pairs[(pairs[:, 0] >= low) & (pairs[:, 0] < high), 1]
        if len(own):
            lower, median, upper, late = (float(p) for p in np.percentile(own, (25, 50, 75, 90)))
            found[name] = Delay(*inside, len(own), median, (lower, upper), late)
        else:
            found[name] = Delay(*inside, 0)
    return found


def read_onsets(path: str | Path) -> np.ndarray:
    """(N, 2) rows second, MIDI number of a MIDI file's notes; UserError if it cannot be read or holds none."""
    try:
        now, rows = 0.0, []
        for message in mido.MidiFile(path):
            now += message.time
            if message.type == "note_on" and message.velocity:
                rows.append((now, message.note))
    except (OSError, EOFError, ValueError, KeyError, IndexError) as e:
        raise UserError(f"{str(path)!r} is no MIDI file that can be read ({e or type(e).__name__}); give a .mid") from e
    if not rows:
        raise UserError(f"{str(path)!r} holds no notes; give the MIDI file of what is played in the recording")
    return np.array(rows, float)


class _Sent(NoteSink):
    def __init__(self) -> None:
        self.rows: list[tuple[float, int]] = []

    def note_on(self, note: Note) -> None:
        self.rows.append((note.emitted, note.midi))


def in_engine(model: OnnxModel, recording: str | Path, settings: Settings) -> np.ndarray:
    """(N, 2) rows second of input, MIDI number: when each note_on left the engine, computing not counted."""
    sent = _Sent()
    with FileSource(recording) as source:
        engine = Engine(model, source.samplerate, [sent], settings)
        for block in source.blocks():
            engine.process(block.samples, block.lost)
        engine.finish()
    return np.array(sent.rows, float).reshape(-1, 2)


def through(rig: str | Path, recording: str | Path, options: Sequence[str], block: int = RIG_BLOCK) -> np.ndarray:
    """(N, 2) rows second, MIDI number: when each note_on arrived at the far end of a real sound and MIDI system.

    rig : a Python program that plays ``--wav FILE`` to the program ``--cmd "... {device} ..."`` at ``--period BLOCK``
    and writes ``--out X.json``, in which ``notes`` have ``on`` (seconds since the first sample left) and ``note``.
    UserError if it fails.
    """
    listen = [sys.executable, "-m", "realtime_mpe.cli", "listen", "--device", "{device}", *options]
    with tempfile.TemporaryDirectory(prefix="rt-mpe-") as folder:
        out = Path(folder) / "events.json"
        command = [sys.executable, Path(rig).absolute(), "--wav", Path(recording).absolute()]
        command += ["--period", block, "--out", out]
        command += ["--cmd", " ".join(word if word == "{device}" else shlex.quote(word) for word in listen)]
        limit = RIG_TIMEOUT + FileSource(recording).duration
        try:
            code, said = _run(list(map(str, command)), folder, limit)
            events = json.loads(out.read_text())
            rows = [(note["on"], note["note"]) for note in events["notes"]]
        except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as e:
            raise UserError(
                f"the rig {str(rig)!r} gave no result ({type(e).__name__}); run it by hand to see why"
            ) from e
        if code:
            raise UserError(f"the rig {str(rig)!r} failed: {events.get('why') or said[-200:]}")
    return np.array(rows, float).reshape(-1, 2)


def _run(command: list[str], folder: str, limit: float) -> tuple[int, str]:
    """(exit code, standard error). Should it take too long, it is killed with all that it has started."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, cwd=folder, start_new_session=True
    )
    try:
        _, said = child.communicate(timeout=limit)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
        child.wait()
        raise
    return child.returncode, said


def table(title: str, found: dict[str, Delay]) -> list[str]:
    """Lines for people."""
    lines = [f"{title:<22} median  quartiles     90 %   precision recall     F1   notes"]
    for name, delay in found.items():
        if delay.median_ms is None:
            times = f"{'-':>6} {'-':>10} {'-':>8}"
        else:
            lower, upper = delay.quartiles_ms
            times = f"{delay.median_ms:6.0f} {f'{lower:.0f}..{upper:.0f}':>10} {delay.p90_ms:8.0f}"
        shares = f"{100 * delay.precision:9.1f} {100 * delay.recall:7.1f} {100 * delay.f1:6.1f}"
        lines.append(f"  {name:<20} {times}   {shares} {delay.true:7d}")
    return lines
