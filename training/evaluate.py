"""``rt-mpe evaluate``: what a model is worth on recordings whose notes are known, beside the splits that need no model.

`protocol` specifies the paper's figures. A window network reads the whole files as its paper does; a live model, and
with --live a window network too, hears them through the engine as a musician would, and then `metrics` has figures of
what was sent and when.

The report (JSON, flat; None where there is nothing to say)
    model, format, live, dataset, split, lookahead, sensitivity
    files, seconds, rtf (CPU seconds a second of audio), problems (pieces left out, a line each)
    thresholds           "validation", "model file" or "oracle threshold": where they are from
    mix_threshold, LEVEL_threshold
    mix_AP .. note_R     `protocol.mixture_figures`
    LEVEL_AP .. LEVEL_switch
                         `protocol.slot_figures` of the model's slots at the levels "stem" and "family"
    LEVEL_sources        how many there are in a file, on average
    LEVEL_timbre, LEVEL_timbre_pairs
                         mean cosine to the teacher, of so many matched slots
    LEVEL_SPLIT_AP ..    `protocol.slot_figures` of each of `protocol.SPLITS`, and LEVEL_SPLIT_threshold
    LEVEL_beats_rank     whether the slots have a better F1 than pitch rank, matched and strict
    live_*               `metrics.figures`, only of what went through the engine; splits as live_SPLIT_*
    each                 the model's own figures of every file alone, by name
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from realtime_mpe.errors import UserError
from realtime_mpe.model import model_path
from realtime_mpe.settings import Settings
from realtime_mpe.window_model import WindowInfo

from . import metrics, protocol
from .data.datasets import Piece, Stem, open_dataset
from .data.splits import load_split
from .metrics import Counts, FileScore, score_file
from .predict import (
    Prediction,
    TimbreTeacher,
    WindowNetwork,
    check_model,
    frame_thresholds,
    hear,
)
from .protocol import LEVELS, MODEL, RANK, SPLITS, Curve, MixtureScore, SlotScore

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended before its work was done
VALIDATION, MODEL_FILE, ORACLE = "validation", "model file", "oracle threshold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="file, or name of a shipped one")
    add("dataset", metavar="DATASET", type=Path, help="folder: NAME.wav + NAME.mid, or a data set as it was published")
    add("--split", metavar="NAME", help="of the data set: scores its test side, thresholds from its validation side")
    add("--validation", type=Path, metavar="FOLDER", help="data set that the thresholds are chosen on")
    add("--level", choices=LEVELS, help="of the players (default: both)")
    add("--live", action="store_true", help="through the live engine, also what can read whole files")
    add("--timbre", type=Path, metavar="FILE", help="timbre teacher, to compare the slots' timbre with")
    add("--lookahead", type=int, metavar="FRAMES", help="0..4 of 32 ms each, live (default: the model's own)")
    add("--sensitivity", type=float, default=Settings.sensitivity, metavar="0..1", help="live (default: %(default)s)")
    add("--json", metavar="PATH", help="write the figures there as JSON; - is standard output")
    add("--plot", type=Path, metavar="DIR", help="draw every piece as DIR/NAME.png, and DIR/pr.png")
    add("--jobs", type=int, default=1, help="recordings at a time (default: %(default)s)")
    add("--predictions", type=Path, metavar="DIR", help="keep mix, slots and notes as DIR/NAME.npz")


def run(args: argparse.Namespace) -> int:
    try:
        report = evaluate(
            args.model,
            args.dataset,
            split=args.split,
            validation=args.validation,
            levels=(args.level,) if args.level else LEVELS,
            settings=Settings(args.lookahead, args.sensitivity),
            live=args.live,
            timbre=args.timbre,
            jobs=args.jobs,
            predictions=args.predictions,
            plots=args.plot,
            progress=_to_stderr,
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


# The whole evaluation


@dataclass(frozen=True)
class Listening:
    """How files become predictions. timbre : the teacher's file."""

    model: str
    live: bool
    settings: Settings
    timbre: Path | None


@dataclass(frozen=True)
class Heard:
    """One piece after the first pass; its prediction lies in the file `path`. live : what the engine sent, scored."""

    piece: Piece
    path: Path
    cpu_seconds: float
    mixture: MixtureScore
    live: FileScore | None

    @property
    def rtf(self) -> float:
        return self.cpu_seconds / self.piece.seconds

    def __str__(self) -> str:
        return f"{self.piece.name}: mixture AP {100 * self.mixture.curve.average_precision:.1f}, RTF {self.rtf:.3f}"


@dataclass(frozen=True)
class LeftOut:
    """A piece that could not be heard."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Judged:
    """One piece after the second pass. notes : of the mixture.  slots : by level and MODEL or the name of a split."""

    notes: Counts
    slots: dict[tuple[str, str], SlotScore]


@dataclass(frozen=True)
class Verdict:
    """All pieces. notes, model : of each piece; model : by level.  pooled : as `Judged.slots`, summed over the pieces,
    for a piece's own scores of every split are megabytes."""

    notes: list[Counts]
    model: list[dict[str, SlotScore]]
    pooled: dict[tuple[str, str], SlotScore]


def evaluate(
    model: str,
    dataset: Path,
    *,
    split: str | None = None,
    validation: Path | None = None,
    levels: Sequence[str] = LEVELS,
    settings: Settings | None = None,
    live: bool = False,
    timbre: Path | None = None,
    jobs: int = 1,
    predictions: Path | None = None,
    plots: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Hear and score every piece of a data set; the report is specified above and ready for JSON.

    model : shipped name, file or plugin.  dataset, validation : folders.  timbre : teacher file.  predictions, plots :
    folders that are made.  progress : called with a line a file.  Raises UserError for whatever is wrong with the
    arguments, before the first file is heard.
    """
    model, settings = str(model), settings or Settings()
    if jobs < 1:
        raise UserError(f"--jobs {jobs} is too few; give 1 or more")
    kind = check_model(model, live)
    live = live or kind != WindowInfo.FORMAT
    if timbre is not None:
        TimbreTeacher(timbre)
    if plots is not None:
        import_module(".plot", __package__)  # it says what is missing before the work, not after
    test, held_out, problems = choose_pieces(dataset, split, validation)
    for line in problems:
        progress(f"left out: {line}")
    for folder, option in ((predictions, "--predictions"), (plots, "--plot")):
        if folder is not None:
            _make_folder(Path(folder), option)
    with tempfile.TemporaryDirectory(prefix="rt-mpe-") as scratch:
        listening = Listening(model, live, settings, timbre)
        tasks = [(p, listening, Path(predictions or scratch) / f"{file_name(p)}.npz") for p in test]
        tasks += [(p, listening, Path(scratch) / f"validation-{file_name(p)}.npz") for p in held_out]
        heard, tuning = [], []
        for k, result in enumerate(_in_order(listen, tasks, jobs)):
            progress(f"[{k + 1}/{len(tasks)}] {result}")
            if isinstance(result, LeftOut):
                problems.append(str(result))
            else:
                (heard if k < len(test) else tuning).append(result)
        if not heard or (held_out and not tuning):
            raise UserError(problems[-1])

        mixture = protocol.pool([h.mixture for h in heard])
        fixed = None if tuning or not kind else frame_thresholds(model)
        if tuning:
            source, mix_threshold = VALIDATION, protocol.pool([h.mixture for h in tuning]).curve.best_threshold()
        elif fixed:
            source, mix_threshold = MODEL_FILE, fixed["mix"]
        else:
            source, mix_threshold = ORACLE, mixture.curve.best_threshold()
        verdict = judge_all(heard, mix_threshold, levels, jobs)
        tuned = judge_all(tuning, mix_threshold, levels, jobs)

        def slot_threshold(level: str, row: str) -> float:
            if fixed:
                return fixed["slots"] if row == MODEL else mix_threshold
            return (tuned if tuning else verdict).pooled[level, row].matched.best_threshold()

        thresholds = {key: slot_threshold(*key) for key in verdict.pooled}
        seconds = sum(h.piece.seconds for h in heard)
        report = {
            "model": model,
            "format": kind or "plugin",
            "live": live,
            "dataset": str(dataset),
            "split": split,
            "lookahead": settings.lookahead if live else None,
            "sensitivity": settings.sensitivity if live else None,
            "files": len(heard),
            "seconds": seconds,
            "rtf": sum(h.cpu_seconds for h in heard) / seconds,
            "problems": problems,
            "thresholds": source,
            "mix_threshold": mix_threshold,
            **protocol.mixture_figures(mixture, mix_threshold, sum(verdict.notes, Counts())),
            **who_plays(verdict, thresholds),
            **(live_figures([h.live for h in heard]) if live else {}),
            "each": {
                h.piece.name: {
                    "seconds": h.piece.seconds,
                    "rtf": h.rtf,
                    **protocol.mixture_figures(h.mixture, mix_threshold, notes),
                    **{
                        name: value
                        for level, score in slots.items()
                        for name, value in protocol.slot_figures(score, thresholds[level, MODEL], level).items()
                    },
                }
                for h, notes, slots in zip(heard, verdict.notes, verdict.model, strict=True)
            },
        }
        if plots is not None:
            of_model = {level: score.matched for (level, row), score in verdict.pooled.items() if row == MODEL}
            threshold = next((thresholds[level, MODEL] for level in of_model), mix_threshold)
            title = f"{Path(model).stem} on {Path(dataset).name}"
            draw(Path(plots), title, heard, {"mixture": mixture.curve, **of_model}, threshold)
    return report


def draw(folder: Path, title: str, heard: Sequence[Heard], curves: dict[str, Curve], threshold: float) -> None:
    """A picture of each piece, with what is on from `threshold`, and the curves of all."""
    from .plot import curves_picture, piece_picture

    for h in heard:
        prediction = Prediction.load(h.path)
        truth = protocol.sources(*truth_of(h.piece), "stem", prediction.mix.shape[1])
        names = [h.piece.stems[k].name for (k,) in truth.members]
        slots = prediction.mix[None] if prediction.slots is None else prediction.slots
        piece_picture(folder / f"{file_name(h.piece)}.png", h.piece.name, names, truth.rolls, slots, threshold)
    curves_picture(folder / "pr.png", curves, title)


def who_plays(verdict: Verdict, thresholds: dict[tuple[str, str], float]) -> dict:
    """All LEVEL_* of the report."""
    found: dict = {}
    for (level, row), score in verdict.pooled.items():
        name = level if row == MODEL else f"{level}_{row}"
        found[f"{name}_threshold"] = thresholds[level, row]
        found |= protocol.slot_figures(score, thresholds[level, row], name)
        if row == MODEL:
            found[f"{level}_timbre"] = score.cosine / score.cosines if score.cosines else None
            found[f"{level}_timbre_pairs"] = score.cosines
        if row == RANK:
            found[f"{level}_sources"] = score.sources / score.files
    for level, row in verdict.pooled:
        if row == MODEL:
            found[f"{level}_beats_rank"] = beats_rank(found, level, level)
    return found


def beats_rank(report: dict, name: str, level: str) -> bool:
    """Whether the row of figures NAME_* is better than pitch rank, matched and strict."""
    return all(report[f"{name}_{f1}"] > report[f"{level}_{RANK}_{f1}"] for f1 in ("F1", "strict_F1"))


def live_figures(scores: Sequence[FileScore]) -> dict:
    """`metrics.figures`, flat: live_NAME, and live_SPLIT_NAME of the splits."""
    found = metrics.figures(scores)
    splits = found.pop("splits")
    return {f"live_{name}": value for name, value in found.items()} | {
        f"live_{split.replace(' ', '_')}_{name}": value for split, row in splits.items() for name, value in row.items()
    }


# The pieces


def choose_pieces(
    dataset: Path, split: str | None, validation: Path | None
) -> tuple[list[Piece], list[Piece], list[str]]:
    """-> pieces to score, pieces to choose thresholds on (perhaps none), and a line on each piece that is left out."""
    data = open_dataset(dataset)
    problems = list(data.problems)
    sides = {"test": data.pieces, "validation": ()} if split is None else load_split(split, data)
    test, held_out = (with_notes(sides[side], problems) for side in ("test", "validation"))
    if validation is not None:
        other = open_dataset(validation)
        problems += other.problems
        held_out = with_notes(other.pieces, problems)
    for pieces, wanted in ((test, True), (held_out, validation is not None)):
        if wanted and not pieces:
            folder = dataset if pieces is test else validation
            reason = f"; {problems[0]}" if problems else ""
            raise UserError(f"no piece of {folder} can be scored{reason}; give recordings whose notes are known")
    return test, held_out, problems


def with_notes(pieces: Sequence[Piece], problems: list[str]) -> list[Piece]:
    """Those that can be scored, their notes read and their names made unique; `problems` gets a line on each other."""
    found, seen = [], Counter()
    for piece in pieces:
        try:
            stems = tuple(Stem(s.name, s.instrument, s.family, s.audio, s.notes) for s in piece.stems)
        except UserError as error:
            problems.append(f"{piece.name}: {error}")
            continue
        if any(len(stem.notes) for stem in stems):
            seen[piece.name] += 1
            name = piece.name if seen[piece.name] == 1 else f"{piece.name} ({seen[piece.name]})"
            found.append(replace(piece, name=name, stems=stems))
        else:
            problems.append(f"{piece.name}: it has no notes")
    return found


def truth_of(piece: Piece) -> tuple[list[np.ndarray], list[str]]:
    """Notes (n, 3) and family of each stem."""
    return [stem.notes[:, :3] for stem in piece.stems], [stem.family for stem in piece.stems]


def file_name(piece: Piece) -> str:
    return piece.name.replace("/", "_").replace("\\", "_")


# The work


def _in_order(function: Callable, tasks: Sequence[tuple], jobs: int) -> Iterator:
    """`function` of every task, in their order."""
    if jobs == 1 or len(tasks) <= 1:
        for task in tasks:
            yield function(*task)
        return
    # Fresh processes, because a copy of one that runs threads may hang; they die of Ctrl-C without a word.
    pool = ProcessPoolExecutor(
        min(jobs, len(tasks)), get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)
    )
    try:
        futures = deque(pool.submit(function, *task) for task in tasks)
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a process that listened has died, perhaps for want of memory; try fewer --jobs") from error
    finally:
        pool.shutdown(cancel_futures=True)


def listen(piece: Piece, listening: Listening, path: Path) -> Heard | LeftOut:
    """First pass: one piece to a prediction, kept in `path`. The clock is CPU time: wall time would measure the other
    jobs too."""
    stems, families = truth_of(piece)
    needs_samples = not listening.live or piece.mixture is None or listening.timbre is not None
    try:
        recording = piece.read() if needs_samples else None
        begun = time.process_time()
        if listening.live:
            prediction = hear(piece.mixture or recording.mixture, listening.model, listening.settings)
        else:
            prediction = WindowNetwork(model_path(listening.model)).predict(recording.mixture)
        cpu_seconds = time.process_time() - begun
    except UserError as error:  # one broken file of a hundred must not cost the others
        return LeftOut(piece.name, str(error))
    n_frames = prediction.mix.shape[1]
    if listening.timbre is not None and prediction.timbre is not None:
        teacher = TimbreTeacher(listening.timbre).embed_all(recording.stems, stems, n_frames)
        prediction = replace(prediction, teacher=teacher)
    prediction.save(path)
    truth = protocol.sources(stems, families, "stem", n_frames).rolls.any(0)
    return Heard(
        piece,
        path,
        cpu_seconds,
        protocol.score_mixture(prediction.mix, truth, prediction.polyphony),
        score_file([s for s in stems if len(s)], prediction.mix, prediction.notes) if listening.live else None,
    )


def judge_all(heard: Sequence[Heard], mix_threshold: float, levels: Sequence[str], jobs: int) -> Verdict:
    verdict = Verdict([], [], {})
    for judged in _in_order(judge, [(h.piece, h.path, mix_threshold, tuple(levels)) for h in heard], jobs):
        verdict.notes.append(judged.notes)
        verdict.model.append({level: score for (level, row), score in judged.slots.items() if row == MODEL})
        for key, score in judged.slots.items():
            verdict.pooled[key] = verdict.pooled[key] + score if key in verdict.pooled else score
    return verdict


def judge(piece: Piece, path: Path, mix_threshold: float, levels: Sequence[str]) -> Judged:
    """Second pass, when the mixture's threshold is known."""
    prediction = Prediction.load(path)
    mix, n_frames = prediction.mix, prediction.mix.shape[1]
    stems, families = truth_of(piece)
    sent = protocol.roll_to_notes(mix >= mix_threshold) if prediction.notes is None else prediction.notes
    true_notes = np.concatenate(protocol.sources(stems, families, "stem", n_frames).notes)
    timbre = None
    if prediction.timbre is not None and prediction.teacher is not None:
        timbre = protocol.Timbre(prediction.timbre, prediction.window, prediction.teacher)
    slots: dict[tuple[str, str], SlotScore] = {}
    for level in levels:
        truth = protocol.sources(stems, families, level, n_frames)
        if prediction.slots is not None:
            slots[level, MODEL] = protocol.score_slots(prediction.slots, truth, timbre)
        for name, split in SPLITS.items():
            slots[level, name] = protocol.score_slots(split(mix, mix_threshold, truth.rolls), truth)
    return Judged(metrics.note_counts(true_notes, sent), slots)


def _make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made ({error.strerror}); choose another {option}") from error


def _write_text(path: Path, text: str) -> None:
    """As a whole or, with UserError, not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --json") from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The table

SPLIT_LABELS = {
    MODEL: "the model's slots",
    RANK: "  pitch rank",
    "bands": "  pitch bands",
    "random": "  random",
    "one": "  one slot",
    "ceiling": "  ceiling",
}
PLAYERS = {"stem": "stems", "family": "families"}


def format_report(report: dict) -> str:
    """The table that people read, of what `evaluate` returns."""
    count = report["files"]
    if report["live"]:
        lookahead = "its own" if report["lookahead"] is None else f"{report['lookahead']} frames"
        how = f"live engine, look-ahead {lookahead}, sensitivity {report['sensitivity']:g}"
    else:
        how = "whole files, window after window"
    thresholds = {
        VALIDATION: "thresholds chosen on validation files",
        MODEL_FILE: "thresholds of the model file",
        ORACLE: "ORACLE THRESHOLD: chosen on these very files",
    }[report["thresholds"]]
    lines = [
        f"{count} file{'s' * (count != 1)}, {report['seconds'] / 60:.1f} minutes; model {report['model']}, {how}",
        f"{thresholds}; mixture {report['mix_threshold']:.3f}"
        + "".join(
            f", {PLAYERS[level]} {report[f'{level}_threshold']:.3f}"
            for level in LEVELS
            if f"{level}_threshold" in report
        ),
        "",
        "what sounds               AP     F1      P      R  polyphony right",
        f"  frames of 32 ms    {_cells(report, 'mix', 'AP F1 P R polyphony')}",
    ]
    if report["head_polyphony"] is not None:
        lines.append(f"  polyphony head     {'':28}{report['head_polyphony']:7.1f}")
    lines.append(f"  notes, 50 ms       {'':7}{_cells(report, 'note', 'F1 P R')}")
    marked = False
    for level in LEVELS:
        if f"{level}_{RANK}_F1" not in report:
            continue
        lines += [
            "",
            "                          matched slots               strict",
            f"who plays: {PLAYERS[level]:<10}     AP     F1      P      R     F1   home switch  polyphony right",
        ]
        for row, label in SPLIT_LABELS.items():
            name = level if row == MODEL else f"{level}_{row}"
            if f"{name}_F1" not in report:
                continue
            behind = row != RANK and not beats_rank(report, name, level)
            marked |= behind
            lines.append(
                f"{label:<19}{'* ' if behind else '  '}{_cells(report, name, 'AP F1 P R strict_F1')}"
                f"{report[f'{name}_home']:7.2f}{report[f'{name}_switch']:7.2f}"
                + (f"{report[f'{name}_polyphony']:7.1f}" if row == MODEL else "")
            )
        lines.append(f"  {PLAYERS[level]} in a file: {report[f'{level}_sources']:.1f}")
        if report.get(f"{level}_timbre") is not None:
            pairs = report[f"{level}_timbre_pairs"]
            lines.append(f"  timbre: cosine to the teacher {report[f'{level}_timbre']:.3f}, {pairs} matched slots")
    if marked:
        lines += ["", "* does not beat pitch rank"]
    if report["live"]:
        lines += ["", *_live_lines(report)]
    return "\n".join([*lines, "", f"RTF {report['rtf']:.3f} (CPU seconds a second of audio)"])


def _live_lines(report: dict) -> list[str]:
    """Of what was sent, at the thresholds of the engine."""
    latency = ", ".join(
        f"{name} {_number(report[f'live_{key}'], '.0f')} ms"
        for name, key in (("median", "lat_med"), ("90 % within", "lat_p90"), ("median below MIDI 48", "lat_bass"))
    )
    lines = [
        "as the engine sent it     AP     F1      P      R",
        f"  frames of 32 ms    {_cells(report, 'live_mix', 'AP F1 P R')}",
        f"  notes, 50 ms       {'':7}{_cells(report, 'live_note', 'F1')}",
        f"  note-ons when sent {'':7}{_cells(report, 'live_event', 'F1')}   (50 ms early to 200 ms late)",
        f"  onset to note-on: {latency}",
        "  whose notes: stem F1, strict   home switch",
    ]
    rows = {"the model's voices": "live", **{f"  {s}": f"live_{s.replace(' ', '_')}" for s in metrics.SPLITS}}
    for label, name in rows.items():
        lines.append(
            f"    {label:<22}{report[f'{name}_stem_F1_strict']:6.1f}"
            f"{report[f'{name}_home']:7.2f}{report[f'{name}_switch']:7.2f}"
        )
    return [
        *lines,
        f"  players counted right in {100 * report['live_count_exact']:.0f} % of the files, within one in "
        f"{100 * report['live_count_near']:.0f} %",
    ]


def _cells(report: dict, name: str, figures: str) -> str:
    return "".join(f"{report[f'{name}_{figure}']:7.1f}" for figure in figures.split())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
