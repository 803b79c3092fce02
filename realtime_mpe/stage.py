"""What takes part in a performance, opened as the user asked for it, and closed again whatever happens.

source -> engine -> desk -> what is played on
                 -> takes, web view, screen
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

from . import plugins
from .channels import ChannelMap, MpeZone, parse_map
from .desk import Desk, parse_programs
from .errors import UserError, tell
from .host import Engine
from .keys import HELP, Console, Keys
from .model import load_model
from .sinks.audio_file import AudioFileSink
from .sinks.base import NoteSink
from .sinks.midi_file import MidiFileSink
from .source import AudioSource
from .transcribe import engine_settings

FAILED = 2  # exit code
DEFAULT_PORT = "rt-mpe"
MIDI_PORTS = ("midi", "virtual", "split")
PLAYED_ON = (*MIDI_PORTS, "osc")  # what the desk stands before
# Opened after the source and closed before it: nothing is left behind by a source that cannot be opened.
AFTER_SOURCE = ("record", "audio", "json", "terminal")
TAKES = {".mid": "record", ".midi": "record", ".wav": "audio"}


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
        if not args.record or args.record.endswith(("/", os.sep)) or os.path.isdir(args.record):
            raise UserError(f"--record needs a file name, not {args.record!r}: write --record take")
        kind = TAKES.get(Path(args.record).suffix.lower())
        whole = [f"record:{args.record}.mid", f"audio:{args.record}.wav"]
        specs += [f"{kind}:{args.record}"] if kind else whole
    return specs + [spec for spec in args.sink if _kind(spec) not in PLAYED_ON]


def _kind(spec: str) -> str:
    return spec.partition(":")[0]


def open_all(args: argparse.Namespace, opened: list) -> Stage:
    """Open the model, the sinks and the source; each is put into `opened` at once, so that it can be closed."""
    settings = engine_settings(args, bend=args.bend)
    channels = mapping(args)
    programs = () if args.gm is None else parse_programs(args.gm)
    model = load_model(args.model)
    settings = settings.of(model.info)
    voices = min(settings.players or model.info.voices, model.info.voices)
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
            options["voices"] = voices
        return open_sink(spec, **options)

    playing = [open_port(spec) for spec in ports]
    if _kind(source_spec) == "device" and not ports and args.record is None and not args.sink:
        try:
            playing.append(open_port(f"virtual:{DEFAULT_PORT}"))
        except UserError as error:
            if args.quiet and args.web is None:
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
    screen = {"desk": desk, "hint": HELP if keys.working else "", "stream": sys.stderr if to_stdout else None}
    late = {
        "terminal": screen,
        "record": {"offset": args.record_offset},
        "audio": {"samplerate": source.samplerate},
    }
    if args.web is not None:
        from .web import WebView  # asyncio alone takes as long to import as all the rest

        def adjust(**changes: int | float) -> None:
            desk.later(lambda: engine.adjust(**changes))

        sinks.append(WebView(args.web, desk, settings, voices, source.name, adjust))
        opened.append(sinks[-1])
        tell(f"open {sinks[-1].url}", "web")
    sinks += [open_sink(spec, **late.get(_kind(spec), {})) for spec in rest if _kind(spec) in AFTER_SOURCE]
    engine = Engine(model, source.samplerate, [desk, *sinks] if playing else sinks, settings, warn, channels)
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


def source_options(args: argparse.Namespace, spec: str) -> dict:
    names = ("channel", "samplerate", "blocksize", "wait")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if _kind(spec) == "file":
        options["paced"] = True
    return options


def close_all(opened: list, quiet: bool) -> int:
    """Close in reverse; what cannot be closed well is told and keeps nothing else open. Returns an exit code."""
    code = 0
    for thing in reversed(opened):
        try:
            thing.close()
            if isinstance(thing, MidiFileSink | AudioFileSink) and thing.saved and not quiet:
                tell(thing.path, "saved")
        except Exception as error:  # it may be anybody's code
            tell(error if isinstance(error, UserError) else f"{type(thing).__name__} failed to close ({error!r})")
            code = FAILED
    return code


def discard_takes(opened: list) -> None:
    """There was no performance: an empty take would stand in the way of the next try."""
    for thing in opened:
        if isinstance(thing, MidiFileSink | AudioFileSink):
            thing.discard()
