"""``rt-mpe listen``: a source through the engine to MIDI, a file, the screen; and an orderly end, however it comes."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from . import plugins
from .channels import ChannelMap, MpeZone, parse_map
from .desk import Desk, parse_programs
from .errors import UserError, tell
from .host import Engine
from .keys import HELP, Keys
from .meter import SILENCE_DB
from .model import load_model
from .sinks.audio_file import AudioFileSink
from .sinks.base import NoteSink
from .sinks.midi_file import MidiFileSink
from .source import AudioSource, DeviceLost, list_devices
from .transcribe import add_engine_arguments, engine_settings

FAILED, DEVICE_LOST = 2, 3  # exit codes
DEFAULT_PORT = "rt-mpe"
WEB_PORT = 8765
STATUS_SECONDS = 0.1
SILENCE_SECONDS = 5.0  # of input without a sound before the user is told
MIDI_PORTS = ("midi", "virtual", "split")
PLAYED_ON = (*MIDI_PORTS, "osc")  # what the desk stands before
# Opened after the source and closed before it: nothing is left behind by a source that cannot be opened.
AFTER_SOURCE = ("record", "audio", "json", "terminal")
TAKES = {".mid": "record", ".midi": "record", ".wav": "audio"}
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--list-devices", action="store_true", help="show the devices and MIDI ports, and exit")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("-d", "--device", metavar="ID|NAME", help="input device (default: the system's)")
    inputs.add_argument("--source", metavar="SPEC", help="demo, file:X, device:N or package.module:Class")
    parser.add_argument("--channel", type=int, help="of the input, counted from 1 (default: the mean of the first two)")
    parser.add_argument("--samplerate", type=int, metavar="HZ", help="of the device (default: its own)")
    parser.add_argument("--blocksize", type=int, metavar="SAMPLES", help="of the source (default: its own choice)")
    parser.add_argument("--wait", type=float, metavar="S", help="for a lost device to return (default: for ever)")
    ports = parser.add_argument_group("where the notes go")
    add = ports.add_argument
    add("--midi-port", metavar="NAME", help="play on this MIDI port")
    add("--virtual", metavar="NAME", help="offer a MIDI port of this name")
    add("--split-ports", nargs="?", const=DEFAULT_PORT, metavar="NAME", help="offer a MIDI port a voice")
    add("--osc", metavar="HOST:PORT", help="send Open Sound Control messages")
    add("--midi-api", metavar="API", help="alsa, jack, coremidi or winmm (default: tried in turn)")
    add("--map", metavar="VOICE=CHANNEL,..", help="channels of some voices (default: 1, 2 .. but not 10)")
    add("--mpe-zone", action="store_true", help="a channel a note instead of a voice, for MPE synthesisers")
    add("--bend", action="store_true", help="follow the pitch of single notes with the pitch wheel")
    add("--gm", nargs="?", const="", metavar="PROGRAM,..", help="send General MIDI programs, a voice each")
    add("--record", metavar="TAKE", help="keep TAKE.mid and TAKE.wav; with .mid or .wav only that")
    add("--record-offset", type=float, default=0.0, metavar="MS", help="move the notes of TAKE.mid by so much")
    add(
        "--web",
        nargs="?",
        const=WEB_PORT,
        type=int,
        metavar="PORT",
        help="show and steer it in the browser (%(const)s)",
    )
    parser.add_argument("--sink", action="append", default=[], metavar="SPEC", help="see rt-mpe plugins; repeatable")
    parser.add_argument("--duration", type=float, metavar="S", help="stop after so many seconds of input")
    parser.add_argument("--quiet", action="store_true", help="show nothing but warnings")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.list_devices:
        return print_devices()
    if args.duration is not None and not args.duration > 0:
        raise UserError(f"a duration of {args.duration:g} s is impossible; give more than 0")
    stop = Stop()
    opened: list = []
    code, begun = 0, False
    with stop.on_signals():
        try:
            stage = open_all(args, stop, opened)
            begun = True
            with stage.keys:
                perform(stage.source, stage.engine, args.duration, stage.desk.apply)
            for fault in stage.engine.meter.faults():
                tell(f"{stage.source.name}: {fault}", "warning")
        except KeyboardInterrupt:
            pass  # only before the first sound: there is nothing to save
        except UserError as error:
            tell(error)
            code = DEVICE_LOST if isinstance(error, DeviceLost) else FAILED
        finally:
            if not begun:  # an empty take would stand in the way of the next try
                for take in (thing for thing in opened if isinstance(thing, MidiFileSink | AudioFileSink)):
                    take.discard()
            code = close_all(opened, args.quiet or not begun) or code
    return code


def perform(
    source: AudioSource,
    engine: Engine,
    duration: float | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Play a source through an engine until it ends, is stopped, or ``duration`` seconds of input have been heard.

    It also ends when nobody reads the sinks any more. ``between`` is called before every block.

    However it ends, every note is ended; the caller closes source and sinks.
    """
    next_status = last_sound = 0.0
    silence_told = False
    seconds = 0.0  # of input
    try:
        for block in source.blocks():
            begun = time.perf_counter()
            between()
            if source.samplerate != engine.samplerate:
                engine.change_rate(source.samplerate)
            engine.process(block.samples, block.lost)
            if block.lost and not len(block.samples):
                engine.sinks.tell("interrupted", getattr(source, "hostapi", ""))
            seconds += (block.lost + len(block.samples)) / source.samplerate
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


class Stage(NamedTuple):
    """Everything that takes part in a performance, opened."""

    source: AudioSource
    engine: Engine
    desk: Desk
    keys: Keys


def played_on(args: argparse.Namespace) -> list[str]:
    """The ports that were asked for, in words for `plugins.resolve`."""
    asked = {"midi": args.midi_port, "virtual": args.virtual, "split": args.split_ports, "osc": args.osc}
    specs = [f"{name}:{argument}" for name, argument in asked.items() if argument is not None]
    return specs + [spec for spec in args.sink if _kind(spec) in PLAYED_ON]


def others(args: argparse.Namespace) -> list[str]:
    """The other sinks, the terminal included."""
    specs = [] if args.quiet else ["terminal"]
    if args.record is not None:
        if not args.record:
            raise UserError("--record needs a file name, as in --record take")
        suffix = Path(args.record).suffix.lower()
        base = args.record if suffix in TAKES else f"{args.record}{{}}"
        specs += [f"{kind}:{base.format(end)}" for end, kind in _takes(suffix)]
    return specs + [spec for spec in args.sink if _kind(spec) not in PLAYED_ON]


def _takes(suffix: str) -> list[tuple[str, str]]:
    if suffix in TAKES:
        return [(suffix, TAKES[suffix])]
    return [(".mid", TAKES[".mid"]), (".wav", TAKES[".wav"])]


def _kind(spec: str) -> str:
    return spec.partition(":")[0]


def open_all(args: argparse.Namespace, stop: "Stop", opened: list) -> Stage:
    """Open the model, the sinks and the source; each is put into `opened` at once, so that it can be closed."""
    settings = engine_settings(args, bend=args.bend)
    channels = mapping(args)
    programs = () if args.gm is None else parse_programs(args.gm)
    model = load_model(args.model)
    ports, rest = played_on(args), others(args)
    source_spec = args.source or ("device" if args.device is None else f"device:{args.device}")

    def warn(line: str) -> None:
        tell(line, "warning")

    def open_sink(spec: str, **options: object) -> NoteSink:
        opened.append(plugins.resolve("sink", spec, **options))
        return opened[-1]

    def open_port(spec: str) -> NoteSink:
        kind, options = _kind(spec), {}
        if kind in MIDI_PORTS:
            options = {"mpe": True} if args.mpe_zone else {}
            options |= {"api": args.midi_api} if args.midi_api else {}
        if kind == "split":
            options["voices"] = model.info.voices
        return open_sink(spec, **options)

    playing = [open_port(spec) for spec in ports]
    if _kind(source_spec) == "device" and not ports and args.record is None and not args.sink:
        try:
            playing.append(open_port(f"virtual:{DEFAULT_PORT}"))
        except UserError as error:
            if args.quiet:
                raise
            warn(f"the notes go to the screen only: {error}")
    if not playing and not rest and args.web is None:
        raise UserError("--quiet leaves nothing to play to; add --midi-port, --virtual, --record, --web or --sink")
    sinks = [open_sink(spec) for spec in rest if _kind(spec) not in AFTER_SOURCE]

    source = plugins.resolve("source", source_spec, **source_options(args, source_spec))
    opened.append(source)
    desk = Desk(playing, channels, warn, programs)
    opened.append(desk)
    keys = Keys(Console(source, desk).press)
    to_stdout = any(spec in ("json", "json:", "json:-") for spec in rest)
    late = {
        "terminal": {"desk": desk, "hint": HELP if keys.working else ""}
        | ({"stream": sys.stderr} if to_stdout else {}),
        "record": {"offset": args.record_offset},
        "audio": {"samplerate": source.samplerate},
    }
    if args.web is not None:
        from .web import WebView  # asyncio alone takes as long to import as all the rest

        lookahead = model.info.lookahead if settings.lookahead is None else settings.lookahead
        chosen = replace(settings, lookahead=lookahead)

        def adjust(**changes: int | float) -> None:
            desk.later(lambda: engine.adjust(**changes))

        sinks.append(WebView(args.web, desk, chosen, model.info.voices, source.name, adjust))
        opened.append(sinks[-1])
        tell(f"open {sinks[-1].url}", "web")
    sinks += [open_sink(spec, **late.get(_kind(spec), {})) for spec in rest if _kind(spec) in AFTER_SOURCE]
    engine = Engine(model, source.samplerate, [desk, *sinks] if playing else sinks, settings, warn, channels)
    stop.source = source
    if not args.quiet:
        names = [f"MIDI port {port.name!r} ({port.api})" for port in playing if hasattr(port, "api")]
        rate = f"{source.samplerate / 1000:g} kHz"
        tell(f"{source.name} at {rate}{' -> ' if names else ''}{' and '.join(names)}; Ctrl-C ends", "listening to")
    return Stage(source, engine, desk, keys)


def mapping(args: argparse.Namespace) -> ChannelMap | MpeZone:
    if args.mpe_zone:
        if args.map is not None:
            raise UserError("--mpe-zone gives every note a channel of its own, and --map every voice; choose one")
        return MpeZone()
    return ChannelMap(parse_map(args.map) if args.map is not None else None)


class Console:
    """What the keys do."""

    def __init__(self, source: AudioSource, desk: Desk):
        self._source, self._desk = source, desk

    def press(self, key: str) -> None:
        if key in "qQ":
            self._source.stop()
        elif key == " ":
            self._desk.silence()
        elif key in "123456789":
            voice = int(key) - 1
            self._desk.change(voice, mute=not self._desk.strip(voice).mute)


def source_options(args: argparse.Namespace, spec: str) -> dict:
    options = {"channel": args.channel, "samplerate": args.samplerate, "blocksize": args.blocksize}
    options["wait"] = args.wait
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
            if isinstance(thing, MidiFileSink | AudioFileSink) and not quiet:
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
