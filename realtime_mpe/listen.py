"""``rt-mpe listen``: a source through the engine to MIDI, a file, the screen; and an orderly end, however it comes."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import plugins
from .errors import UserError, tell
from .host import Engine, Settings
from .meter import SILENCE_DB
from .model import load_model
from .sinks.base import NoteSink
from .sinks.midi_file import MidiFileSink
from .source import AudioSource, DeviceLost, list_devices
from .transcribe import add_engine_arguments

FAILED, DEVICE_LOST = 2, 3  # exit codes
DEFAULT_PORT = "rt-mpe"
STATUS_SECONDS = 0.1
SILENCE_SECONDS = 5.0  # of input without a sound before the user is told
PORTS = ("midi", "virtual")
# Opened after the source and closed before it: nothing is left behind by a source that cannot be opened. All other
# sinks are opened before it, for under JACK a MIDI port must be there before the audio stream.
AFTER_SOURCE = ("record", "json", "terminal")
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--list-devices", action="store_true", help="show the devices and MIDI ports, and exit")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("-d", "--device", metavar="ID|NAME", help="input device (default: the system's)")
    inputs.add_argument("--source", metavar="SPEC", help="demo, file:X, device:N or package.module:Class")
    parser.add_argument("--channel", type=int, help="of the input, counted from 1 (default: the mean of the first two)")
    parser.add_argument("--samplerate", type=int, metavar="HZ", help="of the device (default: its own)")
    parser.add_argument("--blocksize", type=int, metavar="SAMPLES", help="of the source (default: its own choice)")
    ports = parser.add_mutually_exclusive_group()
    ports.add_argument("--midi-port", metavar="NAME", help="play on this MIDI port")
    ports.add_argument("--virtual", metavar="NAME", help="offer a MIDI port of this name")
    parser.add_argument("--midi-api", metavar="API", help="alsa, jack, coremidi or winmm (default: tried in turn)")
    parser.add_argument("--record", metavar="TAKE.mid", help="keep the notes as a MIDI file, a track a voice")
    parser.add_argument("--sink", action="append", default=[], metavar="SPEC", help="see rt-mpe plugins; repeatable")
    parser.add_argument("--duration", type=float, metavar="S", help="stop after so many seconds of input")
    parser.add_argument("--quiet", action="store_true", help="show nothing but warnings")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.list_devices:
        return print_devices()
    settings = Settings(args.lookahead, args.sensitivity)
    if args.duration is not None and not args.duration > 0:
        raise UserError(f"a duration of {args.duration:g} s is impossible; give more than 0")
    specs = sink_specs(args)
    stop = Stop()
    opened: list = []
    code, begun = 0, False
    with stop.on_signals():
        try:
            engine, source = open_all(args, settings, specs, stop, opened)
            begun = True
            perform(source, engine, args.duration)
            for fault in engine.meter.faults():
                tell(f"{source.name}: {fault}", "warning")
        except KeyboardInterrupt:
            pass  # only before the first sound: there is nothing to save
        except UserError as error:
            tell(error)
            code = DEVICE_LOST if isinstance(error, DeviceLost) else FAILED
        finally:
            if not begun:  # an empty take would stand in the way of the next try
                opened = [thing for thing in opened if not isinstance(thing, MidiFileSink)]
            code = close_all(opened, args.quiet) or code
    return code


def perform(source: AudioSource, engine: Engine, duration: float | None = None) -> None:
    """Play a source through an engine until it ends, is stopped, or ``duration`` seconds of input have been heard.

    It also ends when nobody reads the sinks any more.

    However it ends, every note is ended; the caller closes source and sinks.
    """
    next_status = last_sound = 0.0
    silence_told = False
    heard = 0  # samples at the source's rate
    try:
        for block in source.blocks():
            begun = time.perf_counter()
            engine.process(block.samples, block.lost)
            heard += block.lost + len(block.samples)
            seconds = heard / source.samplerate
            if engine.meter.level_db > SILENCE_DB:
                last_sound, silence_told = seconds, False
            elif seconds - last_sound >= SILENCE_SECONDS and not silence_told:
                silence_told = True
                engine.warn(
                    f"{source.name} has been silent for {SILENCE_SECONDS:.0f} s: "
                    "check the input, its gain, and --channel"
                )
            if seconds >= next_status:
                next_status = seconds + STATUS_SECONDS
                engine.report(source.overflows, time.perf_counter() - begun)
            if engine.sinks.abandoned or (duration is not None and seconds >= duration):
                break
    finally:
        engine.finish()


def sink_specs(args: argparse.Namespace) -> list[str]:
    """Every sink that was asked for, in words for `plugins.resolve`, the terminal included."""
    specs = [] if args.quiet else ["terminal"]
    specs += [f"midi:{args.midi_port}"] if args.midi_port is not None else []
    specs += [f"virtual:{args.virtual}"] if args.virtual is not None else []
    specs += [f"record:{args.record}"] if args.record is not None else []
    return specs + args.sink


def open_all(
    args: argparse.Namespace, settings: Settings, specs: list[str], stop: "Stop", opened: list
) -> tuple[Engine, AudioSource]:
    """Open the model, the sinks and the source; each is put into `opened` at once, so that it can be closed."""
    model = load_model(args.model)
    api = {"api": args.midi_api} if args.midi_api else {}
    to_stdout = any(spec in ("json", "json:", "json:-") for spec in specs)
    sinks: list[NoteSink] = []

    def open_sink(spec: str) -> None:
        name = spec.partition(":")[0]
        options = api if name in PORTS else {}
        if spec == "terminal" and to_stdout:
            options = {"stream": sys.stderr}
        sinks.append(plugins.resolve("sink", spec, **options))
        opened.append(sinks[-1])

    early = [spec for spec in specs if spec.partition(":")[0] not in AFTER_SOURCE]
    source_spec = args.source or ("device" if args.device is None else f"device:{args.device}")
    is_device = source_spec.partition(":")[0] == "device"
    if is_device and not early and args.record is None and not args.sink:
        try:
            open_sink(f"virtual:{DEFAULT_PORT}")
        except UserError as error:
            if args.quiet:
                raise
            tell(f"the notes go to the screen only: {error}", "warning")
    for spec in early:
        open_sink(spec)
    if not sinks and not specs:
        raise UserError("--quiet leaves nothing to play to; add --midi-port, --virtual, --record or --sink")

    source = plugins.resolve("source", source_spec, **source_options(args, source_spec))
    opened.append(source)
    for spec in specs:
        if spec not in early:
            open_sink(spec)
    engine = Engine(model, source.samplerate, sinks, settings, lambda line: tell(line, "warning"))
    stop.source = source
    if not args.quiet:
        ports = [f"MIDI port {sink.name!r} ({sink.api})" for sink in sinks if hasattr(sink, "api")]
        rate = f"{source.samplerate / 1000:g} kHz"
        tell(f"{source.name} at {rate}{' -> ' if ports else ''}{' and '.join(ports)}; Ctrl-C ends", "listening to")
    return engine, source


def source_options(args: argparse.Namespace, spec: str) -> dict:
    options = {"channel": args.channel, "samplerate": args.samplerate, "blocksize": args.blocksize}
    options = {name: value for name, value in options.items() if value is not None}
    if spec.partition(":")[0] == "file":
        options["paced"] = True
    return options


def close_all(opened: list, quiet: bool) -> int:
    """Close in reverse; what cannot be closed well is told and keeps nothing else open. Returns an exit code."""
    code = 0
    for thing in reversed(opened):
        try:
            thing.close()
            if isinstance(thing, MidiFileSink) and not quiet:
                tell(thing.path, "saved")
        except UserError as error:
            tell(error)
            code = FAILED
    return code


class Stop:
    """What signals do: end the source, and with it the performance, in order; KeyboardInterrupt before there is one."""

    def __init__(self) -> None:
        self.source: AudioSource | None = None

    def __call__(self, signum: int, frame: object) -> None:
        if self.source is None:
            raise KeyboardInterrupt
        self.source.stop()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
            yield
            return
        before = {number: signal.signal(number, self) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def print_devices() -> int:
    """Sound inputs and MIDI outputs, with the reasons of what does not answer; FAILED without sound devices."""
    from .sinks.midi_port import list_ports

    code = 0
    try:
        devices = list_devices()
        print(f"Sound inputs (-d ID|NAME):{'' if devices else ' none'}")
        for device in devices:
            mark = ">" if device["default"] else " "
            inputs = f"{device['channels']} in, {device['samplerate']} Hz"
            print(f"{mark}{device['index']:>3} {device['name']}, {device['hostapi']} ({inputs})")
    except UserError as error:
        code = FAILED
        tell(error)
    try:
        ports, reasons = list_ports()
    except UserError as error:
        ports, reasons = [], [str(error)]
    print(f"MIDI ports (--midi-port NAME):{'' if ports else ' none'}")
    for api, name in ports:
        print(f"    {name} ({api})")
    for reason in reasons:
        print(f"    no answer from {reason}")
    return code
