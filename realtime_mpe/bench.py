"""``rt-mpe bench``: what a second of sound costs on this machine, stage by stage, on one thread.

The engine hears a made-up ensemble in blocks of one hop. A stage's time is what the engine spent in it, so that the
parts add up to the whole; start-up time and memory are those of a fresh process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from . import latency, soak
from .analysis import FRAME_SECONDS
from .analysis import SAMPLERATE as GRID
from .errors import UserError
from .host import Engine
from .model import DEFAULT_MODEL, OnnxModel, load_model
from .settings import LATENCIES, Settings
from .sinks.base import NoteSink

SAMPLERATE = 48_000  # Hz, of most sound devices
BLOCK = round(SAMPLERATE * FRAME_SECONDS)  # samples: exactly one hop
WARM_UP = 16  # hops that are not counted
CHILD_TIMEOUT = 120.0  # s
CHILD_SECONDS = 10.0  # of sound that the fresh process hears before its memory is read
STAGES = ("resampler", "CQT", "model", "notes and voices", "whole")


@dataclass(frozen=True)
class Stage:
    """Wall time a hop of 32 ms, in milliseconds."""

    mean_ms: float
    median_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Report:
    """stages : by the names of STAGES.  rtf : CPU seconds a second of sound, whole process.  notes : that were found.

    latency_ms : of every stage between a sound and its note, if that does not wait for its voice.
    facts : what the model is besides, see `ModelInfo`.
    start_seconds : from a fresh process to the first hop heard.  peak_mb : its largest memory, None where unknown.
    """

    model: str
    seconds: float
    stages: dict[str, Stage]
    rtf: float
    notes: int
    latency_ms: dict[str, float]
    facts: dict[str, str | int]
    start_seconds: float | None = None
    peak_mb: float | None = None


class _Counter(NoteSink):
    notes = 0

    def note_on(self, note: object) -> None:
        self.notes += 1


class _Timed:
    """A stage with a clock at its `process`; `times` has one entry, in seconds, for every call."""

    def __init__(self, stage: object):
        self._stage = stage
        self.times: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._stage, name)

    def process(self, *args: object) -> object:
        begun = time.perf_counter()
        out = self._stage.process(*args)
        if isinstance(out, Iterator):  # nothing has happened yet
            out = list(out)
        self.times.append(time.perf_counter() - begun)
        return out


def ensemble(seconds: float, samplerate: int = SAMPLERATE) -> np.ndarray:
    """Four players of eight partials each, a new chord every half second: (n,) float32, seeded."""
    rng = np.random.default_rng(4)
    out = np.zeros(round(seconds * samplerate), np.float32)
    length = samplerate // 2
    t = np.arange(length) / samplerate
    envelope = np.minimum(t / 0.02, 1.0) * np.exp(-2.0 * t)
    for start in range(0, len(out), length):
        for low in (36, 48, 60, 72):
            frequency = 440.0 * 2.0 ** ((low + rng.integers(12) - 69) / 12)
            partials = np.arange(1, 9)[:, None]
            tone = (np.sin(2 * np.pi * frequency * partials * t) / partials).sum(0) * envelope * 0.08
            out[start : start + length] += tone[: len(out) - start].astype(np.float32)
    return out


def measure(model: OnnxModel, seconds: float) -> Report:
    """Run `seconds` of `ensemble` through an engine in this process."""
    if not 1.0 <= seconds < np.inf:
        raise UserError(f"{seconds:g} s cannot be measured; give at least 1, and an end")
    sound = ensemble(seconds)
    counter = _Counter()
    engine = Engine(model, SAMPLERATE, [counter])
    resampler = engine._resampler = _Timed(engine._resampler)
    cqt = engine._cqt = _Timed(engine._cqt)
    heard = engine._model = _Timed(model)
    whole = _Timed(engine)
    cpu = 0.0
    starts = range(0, len(sound) - BLOCK + 1, BLOCK)
    for k, start in enumerate(starts):
        if k == WARM_UP:
            cpu = time.process_time()
        whole.process(sound[start : start + BLOCK])
    cpu = time.process_time() - cpu
    times = [np.array(stage.times) for stage in (resampler, cqt, heard)]
    times += [np.array(whole.times) - sum(times), np.array(whole.times)]
    stages = {name: _stage(values[WARM_UP:]) for name, values in zip(STAGES, times, strict=True)}
    rtf = cpu / ((len(starts) - WARM_UP) * FRAME_SECONDS)
    latency_ms = {name: 1000.0 * samples / GRID for name, samples in engine.latencies.items()}
    return Report(model.info.name, seconds, stages, rtf, counter.notes, latency_ms, model.info.facts)


def _stage(seconds: np.ndarray) -> Stage:
    return Stage(*(1000.0 * float(value) for value in (seconds.mean(), np.median(seconds), np.percentile(seconds, 99))))


def measure_fresh_process(model: str) -> tuple[float, float | None]:
    """(s from nothing to the first hop, peak MB) of a new Python that imports what a live performance needs."""
    code = f"from realtime_mpe.bench import _child; _child({model!r})"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    begun = time.perf_counter()
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
            ready = child.stdout.readline()
            start_seconds = time.perf_counter() - begun
            rest, _ = child.communicate(timeout=CHILD_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"a fresh process cannot be measured ({error}); try again on an idle machine") from error
    if ready.strip() != "ready" or child.returncode:
        raise UserError(f"a fresh process ended with code {child.returncode}; rt-mpe doctor may tell why")
    return start_seconds, json.loads(rest)


def _child(model: str) -> None:
    """What the fresh process does: prints "ready", then its peak memory."""
    for module in ("sounddevice", "rtmidi"):
        try:
            __import__(module)
        except (ImportError, OSError):
            pass  # a machine without sound or MIDI costs a little less
    engine = Engine(load_model(model), SAMPLERATE, [NoteSink()])
    sound = ensemble(CHILD_SECONDS)
    engine.process(sound[: 2 * BLOCK])
    print("ready", flush=True)
    for start in range(2 * BLOCK, len(sound), BLOCK):
        engine.process(sound[start : start + BLOCK])
    engine.finish()
    print(json.dumps(_peak_mb()), flush=True)


def _peak_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)  # bytes there, KiB elsewhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or file (default: %(default)s)")
    parser.add_argument("--latency", metavar="FILE", help="instead: how late the notes of a recording are sent")
    parser.add_argument("--truth", metavar="MIDI", help="what is played in it")
    parser.add_argument("--lookahead", type=int, metavar="0..4", help="with --latency (default: 0, 1 and 2)")
    parser.add_argument("--rig", metavar="PY", help="with --latency: a program that plays it to a real sound system")
    parser.add_argument("--soak", type=float, metavar="HOURS", help="instead: so much sound without a pause")
    parser.add_argument("--seconds", type=float, default=20.0, help="of sound to hear (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    if args.latency is not None:
        return run_latency(args)
    for option in ("truth", "lookahead", "rig"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} says something about a recording only; add --latency FILE")
    if args.soak is not None:
        return run_soak(args)
    report = measure(load_model(args.model), args.seconds)
    start_seconds, peak_mb = measure_fresh_process(args.model)
    facts = asdict(report) | {"start_seconds": start_seconds, "peak_mb": peak_mb, "machine": machine()}
    print(json.dumps(facts, indent=1) if args.json else "\n".join(table(facts)))
    return 0


def run_latency(args: argparse.Namespace) -> int:
    """`rt-mpe bench --latency`: see `latency`."""
    if args.truth is None:
        raise UserError("--latency needs to know what is played: add --truth MIDI")
    true = latency.read_onsets(args.truth)
    model = load_model(args.model)
    report = {}
    for lookahead in LATENCIES.values() if args.lookahead is None else (args.lookahead,):
        sent = latency.in_engine(model, args.latency, Settings(lookahead))
        report[f"look-ahead {lookahead}, engine"] = latency.delays(true, sent)
        if args.rig is not None:
            options = ["--lookahead", str(lookahead), "--model", args.model, "--quiet", "--virtual", "rt-mpe"]
            sent = latency.through(args.rig, args.latency, options)
            report[f"look-ahead {lookahead}, rig"] = latency.delays(true, sent)
    if args.json:
        print(
            json.dumps({title: {n: asdict(d) for n, d in found.items()} for title, found in report.items()}, indent=1)
        )
    else:
        print("\n".join(line for title, found in report.items() for line in latency.table(title, found)))
    return 0


def run_soak(args: argparse.Namespace) -> int:
    """`rt-mpe bench --soak`: see `soak`. 1 if a note hangs or is missing in the take."""
    if not 0 < args.soak < np.inf:
        raise UserError(f"--soak {args.soak:g} h is impossible; give more than 0, and an end")
    found = soak.soak(load_model(args.model), args.soak)
    print(json.dumps(asdict(found), indent=1) if args.json else "\n".join(soak.table(found)))
    return int(found.unended > 0 or found.taken != found.notes)


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def table(facts: dict) -> Sequence[str]:
    hop_ms = 1000.0 * FRAME_SECONDS
    lines = [f"model {facts['model']}; {facts['machine']}"]
    own = (f"{name} {value}{' frames' * isinstance(value, int)}" for name, value in facts["facts"].items())
    lines += filter(None, [", ".join(own)])
    lines.append(f"{'ms a hop of ' + f'{hop_ms:.0f} ms':<20}   mean  median     p99")
    lines += [
        f"  {name:<18}{row['mean_ms']:7.2f} {row['median_ms']:7.2f} {row['p99_ms']:7.2f}"
        for name, row in facts["stages"].items()
    ]
    lines.append(f"RTF                 {facts['rtf']:7.3f}   CPU seconds a second of sound")
    latency = facts["latency_ms"]
    parts = " + ".join(f"{name} {value:.0f}" for name, value in latency.items() if value)
    lines.append(f"latency             {sum(latency.values()):7.0f} ms  {parts}")
    lines.append(f"start to ready      {facts['start_seconds']:7.2f} s")
    peak = "unknown" if facts["peak_mb"] is None else f"{facts['peak_mb']:7.0f} MB"
    lines.append(f"peak memory         {peak}")
    return lines
