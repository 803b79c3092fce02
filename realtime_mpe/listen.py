"""``rt-mpe listen``: a source through the engine to MIDI, a file, the screen; and an orderly end, however it comes."""

import argparse
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import UserError, tell
from .host import Engine
from .meter import SILENCE_DB
from .source import AudioSource, DeviceLost, list_devices
from .stage import DEFAULT_PORT, FAILED, close_all, discard_takes, open_all
from .transcribe import add_engine_arguments

DEVICE_LOST = 3  # exit code
WEB_PORT = 8765
STATUS_SECONDS = 0.1
SILENCE_SECONDS = 5.0  # of input without a sound before the user is told
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
    add("--web", nargs="?", const=WEB_PORT, type=int, metavar="PORT", help="show and steer it in the browser")
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
            stage = open_all(args, opened)
            stop.source = stage.source
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
            if not begun:
                discard_takes(opened)
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
            came = time.monotonic() if block.came is None else block.came
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
            if seconds >= next_status or not len(block.samples):  # also while the device is away
                next_status = seconds + STATUS_SECONDS
                engine.report(source.overflows, time.monotonic() - came)
            if engine.sinks.abandoned or (duration is not None and seconds >= duration):
                break
    finally:
        engine.finish()


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
        before = {number: signal.signal(number, self) for number in STOPPING if not nohup(number)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def nohup(number: int) -> bool:
    """Whether this signal says that the terminal has gone, and whoever started the program wants it to go on then."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


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
