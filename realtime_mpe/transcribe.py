"""``rt-mpe transcribe``: files through the live engine, as fast as they can be read.

What it writes is what a listener would have got: the same notes with the same channels, and beside them, for those who
measure, the engine's probabilities on the grid of label frames.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .analysis import FIRST_MIDI, FRAME_SECONDS, HOP, N_PITCHES, SAMPLERATE
from .errors import UserError, tell
from .events import Note
from .host import Engine
from .meter import SILENCE_DB
from .model import DEFAULT_MODEL, OnnxModel, load_model
from .settings import LATENCIES, Settings
from .sinks.base import NoteSink
from .sinks.midi_file import MidiFileSink
from .source import FileSource

BLOCKSIZE = 8192  # samples; the engine's answer does not depend on it
MIDI_SUFFIXES = (".mid", ".midi")
PROGRESS_SECONDS = 0.2
BAR_CELLS = 30
DAMAGED, FAILED = 1, 2  # exit codes: a file was read only in part; a file was not transcribed at all

Progress = Callable[[float, float | None], None]
"""Called with seconds of input done and in all; the latter is None if unknown."""


class Posteriorgrams(NoteSink):
    """A sink that keeps what the engine said of one input. Frame i of the grid is centred on second 0.032 i.

    voices : K, of the model.  After `finish`, for T frames and N notes:
    mix : (72, T) float32, probability that a pitch sounds.
    slots : (K, 72, T) float32, `mix` where voice k owns a sounding note and 0 elsewhere.
    notes : (N, 5) float64, by onset and pitch: onset s, offset s, MIDI number, voice, and the second of input
    at which the engine sent the note_on.
    """

    def __init__(self, voices: int):
        self.voices = voices
        self.mix = np.zeros((N_PITCHES, 0), np.float32)
        self.notes = np.zeros((0, 5))
        self.damaged = False  # whether the file ended before its time
        self._frames: list[np.ndarray] = []
        self._notes: list[Note] = []

    def frame(self, mix: np.ndarray) -> None:
        self._frames.append(mix.copy())  # a view would keep the other look-aheads in memory

    def note_off(self, note: Note) -> None:
        self._notes.append(note)

    def finish(self, n_frames: int) -> None:
        """To arrays, with the frames whose centre lies before the end of the input: the first `n_frames`."""
        self.mix = np.ascontiguousarray(np.array(self._frames[:n_frames], np.float32).reshape(-1, N_PITCHES).T)
        self._notes.sort(key=lambda note: (note.onset, note.midi))  # not by what comes later: a cut changes no order
        rows = [(n.onset, n.offset, n.midi, n.voice, n.emitted) for n in self._notes]
        self.notes = np.array(rows, np.float64).reshape(-1, 5)
        self._frames.clear()
        self._notes.clear()

    @property
    def slots(self) -> np.ndarray:
        """Made when asked for: an hour of eight voices is 260 MB."""
        slots = np.zeros((self.voices, *self.mix.shape), np.float32)
        for onset, offset, midi, voice, _ in self.notes:
            frames = slice(*np.ceil(np.array((onset, offset)) / FRAME_SECONDS).astype(int))
            pitch = int(midi) - FIRST_MIDI
            slots[int(voice), pitch, frames] = self.mix[pitch, frames]
        return slots

    def save(self, path: str | os.PathLike) -> None:
        """Write the .npz: mix, slots, notes, first_midi, hop. As a whole or, with UserError, not at all."""
        path = Path(path)
        arrays = {"mix": self.mix, "slots": self.slots, "notes": self.notes}
        partial = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".rt-mpe-", suffix=".npz", delete=False) as file:
                partial = Path(file.name)
                np.savez_compressed(file, **arrays, first_midi=FIRST_MIDI, hop=FRAME_SECONDS)
            partial.chmod(0o644)  # temporary files are private
            partial.replace(path)
        except OSError as e:
            raise UserError(f"{str(path)!r} cannot be written ({e.strerror or e}); choose another place") from e
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)


def transcribe_file(
    path: str | os.PathLike,
    model: OnnxModel | str = DEFAULT_MODEL,
    settings: Settings | None = None,
    progress: Progress | None = None,
    *,
    sinks: Sequence[NoteSink] = (),
    channel: int | None = None,
    warn: Callable[[str], None] = lambda line: tell(line, "warning"),
) -> Posteriorgrams:
    """One file through the engine; whatever goes wrong with the file is a UserError.

    model : loaded, or its name.  sinks : what else listens; the caller closes them.  channel : of the file, counted
    from 1; None is the mean of all.  warn : takes a line about what is wrong with the sound, at the end.
    """
    if isinstance(model, str):
        model = load_model(model)
    heard = Posteriorgrams(model.info.voices)
    loudest = -np.inf
    n_samples = 0
    with FileSource(path, blocksize=BLOCKSIZE, channel=channel) as source:
        engine = Engine(model, source.samplerate, [heard, *sinks], settings, warn)
        for block in source.blocks():
            engine.process(block.samples, block.lost)
            n_samples += len(block.samples)
            loudest = max(loudest, engine.meter.level_db)
            if progress is not None:
                progress(n_samples / source.samplerate, source.duration)
        engine.finish()
        heard.damaged = source.damaged
        for fault in engine.meter.faults():
            warn(f"{source.name}: {fault}")
        if loudest <= SILENCE_DB:
            warn(f"{source.name} is silent from beginning to end: check how it was recorded")
    heard.finish(-(-n_samples * SAMPLERATE // (source.samplerate * HOP)))
    return heard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio of any rate, channel count and common format")
    parser.add_argument("-o", "--out", metavar="OUT", help="a .mid for one file, or a folder that gets NAME.mid each")
    parser.add_argument("--posteriorgrams", metavar="X.npz", help="probabilities too; a folder if there are several")
    parser.add_argument("--channel", type=int, help="of the audio, counted from 1 (default: the mean of all)")
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs the engine lets the user turn."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name of a shipped one, or file (default: %(default)s)")
    delay = parser.add_mutually_exclusive_group()
    delay.add_argument(
        "--latency", choices=LATENCIES, help="look-ahead 0, 1 or 2: later, but surer (default: balanced)"
    )
    delay.add_argument("--lookahead", type=int, metavar="0..4", help="in frames of 32 ms (default: the model's own)")
    parser.add_argument("--players", type=int, metavar="N", help="how many play (default: found out)")
    parser.add_argument(
        "--sensitivity", type=float, default=Settings.sensitivity, metavar="0..1", help="(default: %(default)s)"
    )


def engine_settings(args: argparse.Namespace, bend: bool = False) -> Settings:
    """What `add_engine_arguments` asked for; UserError if it is out of range."""
    lookahead = args.lookahead if args.latency is None else LATENCIES[args.latency]
    return Settings(lookahead, args.sensitivity, bend, args.players)


class Job(NamedTuple):
    file: str
    midi: Path | None
    npz: Path | None


def run(args: argparse.Namespace) -> int:
    settings = engine_settings(args)
    jobs = plan(args.files, args.out, args.posteriorgrams)
    model = load_model(args.model)
    code = 0
    for job in jobs:
        try:
            heard = _transcribe(job, model, settings, args.channel)
        except UserError as error:
            if len(jobs) == 1:
                raise
            tell(error)
            code = FAILED
            continue
        if heard.damaged:
            code = code or DAMAGED
        voices = len(set(heard.notes[:, 3]))
        written = " and ".join(str(path) for path in (job.midi, job.npz) if path is not None)
        print(f"{job.file}: {_count(len(heard.notes), 'note')} of {_count(voices, 'voice')} -> {written}", flush=True)
    return code


def plan(files: Sequence[str], out: str | None, posteriorgrams: str | None) -> list[Job]:
    """What becomes of every file. Folders are made; UserError if two results would have one name."""
    if out is None and posteriorgrams is None:
        raise UserError("nothing would be kept; say where with -o OUT, a .mid or a folder")
    midis = _targets(files, out, MIDI_SUFFIXES)
    npzs = _targets(files, posteriorgrams, (".npz",))
    return [Job(*row) for row in zip(files, midis, npzs, strict=True)]


def _targets(files: Sequence[str], out: str | None, suffixes: Sequence[str]) -> list[Path | None]:
    if out is None:
        return [None] * len(files)
    folder = Path(os.path.expanduser(out))
    if folder.suffix.lower() in suffixes and not os.path.isdir(folder):
        if len(files) > 1:
            raise UserError(f"{out!r} cannot take {len(files)} files; give a folder")
        if not os.path.isdir(folder.parent):
            raise UserError(
                f"there is no folder {str(folder.parent)!r} for {folder.name!r}: make it, or choose another"
            )
        return [folder]
    paths = [folder / f"{Path(file).stem}{suffixes[0]}" for file in files]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"several files would become {str(path)!r}; transcribe them one at a time")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"the folder {out!r} cannot be made ({e.strerror or e}); choose another place") from e
    return paths


def _transcribe(job: Job, model: OnnxModel, settings: Settings, channel: int | None) -> Posteriorgrams:
    # The sink writes only when it is closed, so a file that fails or is interrupted leaves nothing half written.
    sink = None if job.midi is None else MidiFileSink(job.midi, overwrite=True)
    bar = ProgressBar(Path(job.file).name)

    def warn(line: str) -> None:
        bar.clear()
        tell(line, "warning")

    try:
        heard = transcribe_file(
            job.file, model, settings, bar, sinks=[] if sink is None else [sink], channel=channel, warn=warn
        )
    finally:
        bar.clear()
    if sink is not None:
        sink.close()
    if job.npz is not None:
        heard.save(job.npz)
    return heard


class ProgressBar:
    """How far a file is, on one line of standard error that is drawn over itself; nothing where that is no terminal."""

    def __init__(self, name: str):
        self._name = name if len(name) <= 24 else f"{name[:23]}+"
        self._shown = sys.stderr.isatty()
        self._begun = time.monotonic()
        self._next = self._begun + PROGRESS_SECONDS
        self._width = 0

    def __call__(self, done: float, total: float | None) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + PROGRESS_SECONDS
        speed = done / (now - self._begun)
        if total:
            filled = min(round(BAR_CELLS * done / total), BAR_CELLS)
            text = f"{self._name:<24} [{'#' * filled:.<{BAR_CELLS}}] {100 * done / total:3.0f} %  {speed:4.0f} x"
        else:
            text = f"{self._name:<24} {done:8.0f} s  {speed:4.0f} x"
        # The cursor rests at the left, so that whatever else is written does not stand behind the bar.
        print(f"{text:<{self._width}}\r", end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            print(f"{'':{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
