"""``rt-mpe evaluate``: what a model is worth on recordings whose notes are known, beside the splits that need no model.

Every recording goes through the live engine, decision by decision as a musician would get it; `metrics` specifies the
figures.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import mido
import numpy as np
import soundfile

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS
from realtime_mpe.errors import UserError
from realtime_mpe.host import Settings
from realtime_mpe.model import DEFAULT_MODEL
from realtime_mpe.transcribe import transcribe_file

from .metrics import FileScore, figures, score_file
from .scores import in_time

AUDIO_SUFFIXES = (".wav", ".flac")
TRUTH_SUFFIXES = (".mid", ".midi")
DRUM_CHANNEL = 9  # 0-based: what people call channel 10
INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended before its work was done


@dataclass(frozen=True)
class Recording:
    """One piece of a test set. seconds : of audio.  stems : (n, 3) each, n > 0: onset s, offset s, MIDI number."""

    name: str
    audio: Path
    seconds: float
    stems: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Result:
    """One recording, transcribed and scored. cpu_seconds : that the transcription took, all threads together."""

    recording: Recording
    score: FileScore
    cpu_seconds: float

    @property
    def rtf(self) -> float:
        return self.cpu_seconds / self.recording.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="holds NAME.wav or NAME.flac beside NAME.mid, a track a player")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="file, or name of a shipped one (default: %(default)s)")
    parser.add_argument("--lookahead", type=int, metavar="FRAMES", help="0..4 of 32 ms each (default: the model's own)")
    parser.add_argument(
        "--sensitivity", type=float, default=Settings.sensitivity, metavar="0..1", help="(default: %(default)s)"
    )
    parser.add_argument("--json", metavar="PATH", help="write the figures there as JSON; - is standard output")
    parser.add_argument("--jobs", type=int, default=1, help="recordings at a time (default: %(default)s)")
    parser.add_argument("--predictions", type=Path, metavar="DIR", help="keep mix, slots and notes as DIR/NAME.npz")


def run(args: argparse.Namespace) -> int:
    settings = Settings(args.lookahead, args.sensitivity)
    try:
        report = evaluate_folder(
            args.folder, args.model, settings, jobs=args.jobs, predictions=args.predictions, progress=_to_stderr
        )
    except KeyboardInterrupt:
        _to_stderr("rt-mpe: interrupted before all files were heard; there are no figures")
        return INTERRUPTED
    table = format_report(report)
    if args.json == "-":
        print(json.dumps(report, indent=1))
        print(table, file=sys.stderr)
        return 0
    print(table)
    if args.json:
        _write_text(Path(args.json), json.dumps(report, indent=1) + "\n")
    return 0


def evaluate_folder(
    folder: Path,
    model: str = DEFAULT_MODEL,
    settings: Settings | None = None,
    *,
    jobs: int = 1,
    predictions: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Transcribe and score every recording of a folder.

    Returns the `figures` of all files pooled, with "rtf" (CPU seconds a second of audio), "files", "seconds" (of
    audio), "model", "lookahead", "sensitivity", and under "each" the figures of every file alone; ready for JSON.
    progress : called with a line a file.  Raises UserError for whatever is wrong with the folder, before the first
    file is transcribed.
    """
    settings = settings or Settings()
    if jobs < 1:
        raise UserError(f"--jobs {jobs} is too few; give 1 or more")
    recordings = find_recordings(Path(folder), progress)
    if predictions is not None:
        _make_folder(Path(predictions))
    tasks = [(recording, model, settings, predictions) for recording in recordings]
    results = {}
    for result in _results(tasks, jobs):
        name = result.recording.name
        results[name] = result
        alone = figures([result.score])
        progress(
            f"[{len(results)}/{len(tasks)}] {name}: notes F1 {alone['note_F1']:.1f}, "
            f"stems F1 {alone['stem_F1_strict']:.1f}, RTF {result.rtf:.3f}"
        )
    return summarise([results[recording.name] for recording in recordings], model, settings)


def summarise(results: Sequence[Result], model: str, settings: Settings) -> dict:
    """See `evaluate_folder`."""
    seconds = sum(r.recording.seconds for r in results)
    return {
        "model": str(model),
        "lookahead": settings.lookahead,
        "sensitivity": settings.sensitivity,
        "files": len(results),
        "seconds": seconds,
        "rtf": sum(r.cpu_seconds for r in results) / seconds,
        **figures([r.score for r in results]),
        "each": {r.recording.name: {"rtf": r.rtf, **figures([r.score])} for r in results},
    }


# The test set


def find_recordings(folder: Path, say: Callable[[str], None] = lambda line: None) -> list[Recording]:
    """NAME.wav or NAME.flac with NAME.mid of a folder, by name; `say` is told of files without a partner."""
    audio, truth = (_files_by_name(folder, suffixes) for suffixes in (AUDIO_SUFFIXES, TRUTH_SUFFIXES))
    names = sorted(audio.keys() & truth.keys())
    alone = sorted(path.name for path in [*audio.values(), *truth.values()] if path.stem not in names)
    if not names:
        found = f"no two files of one name ({', '.join(alone[:3])})" if alone else "no recordings"
        raise UserError(f"there are {found} in {str(folder)!r}; NAME.wav or NAME.flac is needed beside NAME.mid")
    if alone:
        say(f"left out, for want of a partner of the same name: {', '.join(alone)}")
    return [Recording(name, audio[name], audio_seconds(audio[name]), tuple(read_stems(truth[name]))) for name in names]


def _files_by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by their bare name; of two that differ in nothing but the suffix, the one whose suffix stands first."""
    try:
        paths = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be listed ({error.strerror}); give a folder that holds NAME.wav beside NAME.mid"
        ) from error
    return {p.stem: p for p in sorted(paths, key=lambda p: suffixes.index(p.suffix.lower()), reverse=True)}


def audio_seconds(path: Path) -> float:
    try:
        seconds = soundfile.info(str(path)).duration
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio ({error}); convert it to WAV or FLAC") from error
    if not seconds > 0:
        raise UserError(f"{path} holds no sound; take it out of the folder")
    return seconds


def read_stems(path: Path) -> list[np.ndarray]:
    """Notes of every player of a MIDI file: (n, 3) arrays of onset s, offset s and MIDI number, by onset.

    A player is what one track plays on one channel; the drum channel is left out. Notes are taken as they stand, for
    they are the measure: nothing is dropped, cut or joined. A note-off ends every note of its key that began at an
    earlier tick; a note without one lasts to the end of the file.
    """
    try:
        midi = mido.MidiFile(path, clip=True)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            mido.KeySignatureError) as error:  # fmt: skip  # mido lets the bare errors of its parser through
        raise UserError(f"{path} cannot be read as MIDI ({error or type(error).__name__}); export it again") from error
    if midi.type == 2 or midi.ticks_per_beat <= 0:
        raise UserError(f"{path} is a type 2 file or counts in SMPTE frames; export it as type 1 with ticks per beat")
    players: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    sounding: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    seconds = 0.0
    for tick, seconds, track, message in in_time(midi):
        if message.type not in ("note_on", "note_off") or message.channel == DRUM_CHANNEL:
            continue
        begun = sounding.setdefault((track, message.channel, message.note), [])
        if message.type == "note_on" and message.velocity > 0:
            begun.append((tick, seconds))
            continue
        ended = [onset for since, onset in begun if since < tick]
        begun[:] = [(since, onset) for since, onset in begun if since == tick]
        players.setdefault((track, message.channel), []).extend((onset, seconds, message.note) for onset in ended)
    for (track, channel, note), begun in sounding.items():
        players.setdefault((track, channel), []).extend((onset, seconds, note) for _, onset in begun)
    stems = [np.array(sorted(notes), float) for _, notes in sorted(players.items()) if notes]
    if not stems:
        raise UserError(f"{path} has no notes outside the drum channel; give a MIDI file of what is played")
    return stems


# The work


def _results(tasks: Sequence[tuple], jobs: int) -> Iterator[Result]:
    """`transcribe_and_score` of every task, as they are done."""
    if jobs == 1 or len(tasks) == 1:
        for task in tasks:
            yield transcribe_and_score(*task)
        return
    # Fresh processes, because a copy of one that runs threads may hang; they die of Ctrl-C without a word.
    pool = ProcessPoolExecutor(
        min(jobs, len(tasks)), get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)
    )
    try:
        for future in as_completed([pool.submit(transcribe_and_score, *task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a process that transcribed has died, perhaps for want of memory; try fewer --jobs") from error
    finally:
        pool.shutdown(cancel_futures=True)


def transcribe_and_score(recording: Recording, model: str, settings: Settings, predictions: Path | None) -> Result:
    """One recording through the live engine. The clock is CPU time: wall time would measure the other jobs too."""
    begun = time.process_time()
    heard = transcribe_file(recording.audio, model, settings)
    cpu_seconds = time.process_time() - begun
    if predictions is not None:
        _save_prediction(Path(predictions) / f"{recording.name}.npz", heard)
    return Result(recording, score_file(recording.stems, heard.mix, heard.notes), cpu_seconds)


def _save_prediction(path: Path, heard) -> None:
    try:
        np.savez_compressed(
            path, mix=heard.mix, slots=heard.slots, notes=heard.notes, first_midi=FIRST_MIDI, hop=FRAME_SECONDS
        )
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --predictions") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made ({error.strerror}); choose another --predictions") from error


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --json") from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The table


def format_report(report: dict) -> str:
    """The table that people read, of what `evaluate_folder` returns."""
    lookahead = "the model's own" if report["lookahead"] is None else f"{report['lookahead']} frames"
    latency = ", ".join(
        f"{name} {_number(report[key], '.0f')} ms"
        for name, key in (("median", "lat_med"), ("90 % within", "lat_p90"), ("median below MIDI 48", "lat_bass"))
    )
    lines = [
        f"{report['files']} files, {report['seconds'] / 60:.1f} minutes; model {report['model']}, "
        f"look-ahead {lookahead}, sensitivity {report['sensitivity']:g}",
        "",
        "what sounds                  F1       P       R      AP",
        "  frames of 32 ms       " + " ".join(f"{report[key]:7.1f}" for key in ("mix_F1", "mix_P", "mix_R", "mix_AP")),
        f"  notes, onset in 50 ms {report['note_F1']:7.1f}",
        f"  note-ons when sent    {report['event_F1']:7.1f}   (50 ms early to 200 ms late)",
        f"  onset to note-on: {latency}",
        "",
        "who plays      stem F1, strict    home  switch",
    ]
    rows = {"the model's voices": report, **{f"  {name}": row for name, row in report["splits"].items()}}
    lines += [f"  {n:<19}{r['stem_F1_strict']:9.1f} {r['home']:7.2f} {r['switch']:7.2f}" for n, r in rows.items()]
    lines += [
        f"  players counted right in {100 * report['count_exact']:.0f} % of the files, within one in "
        f"{100 * report['count_near']:.0f} %",
        "",
        f"RTF {report['rtf']:.3f} (CPU seconds a second of audio)",
    ]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
