"""`midi:NAME` plays on a MIDI port that exists, `virtual:NAME` offers one of our own, `split:NAME` one a voice.

All go through RtMidi. A port that vanishes is looked for from then on, and the notes go on when it is back.

RtMidi speaks to one MIDI system a port, and a computer may have several (ALSA and JACK on Linux), of which any may not
be running: all that are compiled in are tried in turn, and the reasons of those that fail are kept for the message.

Under JACK, open no port in a process that has an audio stream with a callback in Python: RtMidi waits for the JACK
cycle to end while it holds Python's lock, and the callback needs that lock for the cycle to end (measured: 11 s, after
which JACK has given up on the process). `capture` keeps the two apart. Known limit: should the JACK server die while
the audio comes from elsewhere, RtMidi shows the ports as they were, takes some 2,300 more messages and then blocks for
ever.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..channels import MpeZone
from ..errors import UserError
from ..events import Bend, Note, Program, Status
from .base import NoteSink

APIS = {"alsa": "API_LINUX_ALSA", "jack": "API_UNIX_JACK", "coremidi": "API_MACOSX_CORE", "winmm": "API_WINDOWS_MM"}
CLIENT = "rt-mpe"  # how we are called in patch bays
LOOK_SECONDS = 1.0  # how often we look whether the port is still there
RETRY_SECONDS = 1.0  # between two tries to open a port that has gone
LEAVE_SECONDS = 0.1  # two long JACK periods: a receiver may read what was sent last only in the next one

_log = logging.getLogger(__name__)

System = tuple[str, object, list[str]]  # of APIS, an RtMidi output without a port yet, the ports it could open

_NOTE_OFF, _NOTE_ON, _CONTROL_CHANGE = 0x80, 0x90, 0xB0  # the low four bits are the channel, from 0
_PROGRAM_CHANGE, _PITCH_WHEEL = 0xC0, 0xE0
_RPN_LOW, _RPN_HIGH, _DATA = 100, 101, 6  # control changes that set a registered parameter
_BEND_RANGE, _MPE_CONFIGURATION, _NO_PARAMETER = 0, 6, 127
BEND_SEMITONES, MPE_BEND_SEMITONES = 2, 48  # how far the wheel goes either way; 48 is what MPE receivers begin with
_RELEASE_VELOCITY = 64  # what MIDI asks of senders that do not measure it
_ALL_SOUND_OFF, _ALL_NOTES_OFF = 120, 123
_RECORD = "record a file instead with record:take.mid"


def list_ports(api: str | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """The ports one can play on as (api, name), and why the MIDI systems that do not answer do not.

    api : one of APIS to ask only that one. UserError if it is unknown or not compiled in.
    """
    systems, reasons = _connect(api)
    for _, out, _ in systems:
        out.delete()
    return [(label, name) for label, _, names in systems for name in names], reasons


Opened = tuple[str, str, object]
"""Name of a port, one of APIS, and the RtMidi output it is open in."""


class _PortSink(NoteSink):
    """An open RtMidi output. A pitch that several voices share on one channel ends with the last of them.

    open : opens the port, now and when it has been lost; UserError while it is not there.
    mpe : whether every note has a channel of its own, in a lower zone.
    """

    def __init__(self, open: Callable[[], Opened], mpe: bool = False) -> None:
        self._open = open
        self._mpe = mpe
        self._bend_range = MPE_BEND_SEMITONES if mpe else BEND_SEMITONES
        self.name, self.api, self._out = open()  # the output is None while it is lost, and once closed
        self._closed = False
        self._programs: dict[int, int] = {}  # of the channels, from 0: sent again to a port that is back
        self._forget()
        self._tried_at = 0.0

    def _forget(self) -> None:
        self._sounding: Counter[tuple[int, int]] = Counter()  # (channel, midi)
        self._used: set[int] = set()  # channels
        self._ranged: set[int] = set()  # channels whose bend range has been set
        self._zoned = False

    def note_on(self, note: Note) -> None:
        key = note.channel, note.midi
        if self._mpe:
            self._prepare(note.channel)
        if self._sounding[key]:  # struck anew: receivers differ in how many note_offs two note_ons need
            self._send(_NOTE_OFF, *key, _RELEASE_VELOCITY)
        self._sounding[key] += 1
        self._used.add(note.channel)
        self._send(_NOTE_ON, *key, note.velocity)

    def note_off(self, note: Note) -> None:
        key = note.channel, note.midi
        if not self._sounding[key]:
            return
        self._sounding[key] -= 1
        if not self._sounding[key]:
            self._send(_NOTE_OFF, *key, _RELEASE_VELOCITY)

    def bend(self, bend: Bend) -> None:
        self._prepare(bend.note.channel)
        turn = round(8192 * bend.cents / (100 * self._bend_range))
        value = 8192 + min(max(turn, -8192), 8191)
        self._send(_PITCH_WHEEL, bend.note.channel, value & 0x7F, value >> 7)

    def program(self, program: Program) -> None:
        self._programs[program.channel] = program.number - 1
        self._send(_PROGRAM_CHANGE, program.channel, program.number - 1)

    def panic(self) -> None:
        for channel in range(1, 17):
            self._quiet(channel)
        self._centre()
        self._forget()

    def interrupted(self, hostapi: str) -> None:
        """A JACK server that has died has taken our port with it, and RtMidi would not tell."""
        if self._out is not None and self.api == "jack" and "jack" in hostapi.casefold():
            self._lost("the JACK server has gone")

    def status(self, status: Status) -> None:
        """Look for a port that was lost."""
        now = time.monotonic()
        if self._out is not None or self._closed or now - self._tried_at < RETRY_SECONDS:
            return
        self._tried_at = now
        try:
            self.name, self.api, self._out = self._open()
        except UserError:
            return
        _log.warning("MIDI port %r (%s) is back", self.name, self.api)
        for channel, number in self._programs.items():
            self._send(_PROGRAM_CHANGE, channel, number)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for channel, midi in sorted(+self._sounding):
            self._send(_NOTE_OFF, channel, midi, _RELEASE_VELOCITY)
        for channel in sorted(self._used):
            self._quiet(channel)
        self._centre()
        if self._out is not None:
            if self.api == "jack":
                time.sleep(LEAVE_SECONDS)
            _discard(self._out)
            self._out = None

    def _quiet(self, channel: int) -> None:
        self._send(_CONTROL_CHANGE, channel, _ALL_NOTES_OFF, 0)
        self._send(_CONTROL_CHANGE, channel, _ALL_SOUND_OFF, 0)

    def _centre(self) -> None:
        """Bring the wheel of every channel that was bent back: whoever plays next there shall be in tune."""
        for channel in sorted(self._ranged):
            self._send(_PITCH_WHEEL, channel, 0, 8192 >> 7)

    def _prepare(self, channel: int) -> None:
        """Tell the receiver, once, how far the wheel goes on this channel, and that there is an MPE zone."""
        if self._out is None:
            return  # who comes back has to be told
        if self._mpe and not self._zoned:
            self._zoned = True
            self._parameter(1, _MPE_CONFIGURATION, len(MpeZone.MEMBERS))
        if channel not in self._ranged:
            self._ranged.add(channel)
            self._parameter(channel, _BEND_RANGE, self._bend_range)

    def _parameter(self, channel: int, number: int, value: int) -> None:
        for control, data in (
            (_RPN_HIGH, 0),
            (_RPN_LOW, number),
            (_DATA, value),
            (_RPN_HIGH, _NO_PARAMETER),
            (_RPN_LOW, _NO_PARAMETER),
        ):
            self._send(_CONTROL_CHANGE, channel, control, data)

    def _send(self, kind: int, channel: int, *data: int) -> None:
        if self._out is None:
            return
        try:
            self._out.send_message([kind | channel - 1, *data])
        except _rtmidi_errors() as e:
            self._lost(e)

    def _lost(self, reason: object) -> None:
        """Say so, once, and be quiet until it is back; what sounded there is over."""
        # At once: libjack keeps one view of the server a process, and an old client would show it to the new ones.
        _discard(self._out)
        self._out = None
        self._tried_at = time.monotonic()
        self._forget()
        _log.warning("MIDI port %r (%s) vanished: %s; waiting for it", self.name, self.api, _short(reason))


def _discard(out: object) -> None:
    try:
        out.close_port()
        out.delete()
    except _rtmidi_errors():
        pass  # it is gone already


class MidiPortSink(_PortSink):
    """Plays on the port called `name`, or else the only one whose name contains it (upper and lower case alike).

    api : one of APIS to search only there.  mpe : see `_PortSink`. UserError: no such port, several, or no MIDI system.
    """

    def __init__(self, name: str, api: str | None = None, mpe: bool = False) -> None:
        super().__init__(lambda: _open_port(name, api), mpe)
        self._looked_at = time.monotonic()

    def status(self, status: Status) -> None:
        """Notice that the port is gone: ALSA and JACK take messages to nowhere without an error."""
        super().status(status)
        if self._out is None or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        if self.api == "winmm":
            return  # it reports lost ports by itself, and the numbers in its names move when others come and go
        try:
            names = self._out.get_ports()
        except _rtmidi_errors() as e:
            self._lost(e)
            return
        if self.api == "alsa":  # there a client may rename itself; its number, as in "synth:in 128:0", stays
            here = self.name.rpartition(" ")[2] in {name.rpartition(" ")[2] for name in names}
        else:
            here = self.name in names
        if not here:
            self._lost("it is not listed any more")


class VirtualPortSink(_PortSink):
    """Offers a port called `name` that other programs can connect to.

    api : one of APIS to offer it only there.  mpe : see `_PortSink`. UserError: no MIDI system, or Windows, which has
    no virtual ports.
    """

    def __init__(self, name: str = CLIENT, api: str | None = None, mpe: bool = False) -> None:
        super().__init__(lambda: _offer_port(name or CLIENT, api), mpe)


class SplitPortsSink(NoteSink):
    """Offers a port a voice, "NAME 1" .. "NAME K", for programs that cannot tell channels apart.

    voices : K.  api, mpe and errors as of `VirtualPortSink`.
    """

    def __init__(self, name: str = CLIENT, voices: int = 8, api: str | None = None, mpe: bool = False) -> None:
        self.name, self._ports = f"{name or CLIENT} 1..{voices}", []
        try:
            for voice in range(voices):
                self._ports.append(VirtualPortSink(f"{name or CLIENT} {voice + 1}", api, mpe))
        except BaseException:
            self.close()
            raise
        self.api = self._ports[0].api

    def note_on(self, note: Note) -> None:
        self._of(note.voice).note_on(note)

    def note_off(self, note: Note) -> None:
        self._of(note.voice).note_off(note)

    def bend(self, bend: Bend) -> None:
        self._of(bend.note.voice).bend(bend)

    def program(self, program: Program) -> None:
        self._of(program.voice).program(program)

    def panic(self) -> None:
        for port in self._ports:
            port.panic()

    def interrupted(self, hostapi: str) -> None:
        for port in self._ports:
            port.interrupted(hostapi)

    def status(self, status: Status) -> None:
        for port in self._ports:
            port.status(status)

    def close(self) -> None:
        for port in self._ports:
            port.close()

    def _of(self, voice: int) -> VirtualPortSink:
        return self._ports[voice % len(self._ports)]


def _open_port(name: str, api: str | None) -> Opened:
    systems, reasons = _connect(api)
    chosen = None
    try:
        label, out, index, full_name = _find(name, systems, reasons)
        out.open_port(index, name="notes")
        chosen = out
    except _rtmidi_errors() as e:
        raise UserError(
            f"cannot open MIDI port {full_name!r}: {_short(e)}; another program may hold it, close that one"
        ) from e
    finally:
        for _, other, _ in systems:
            if other is not chosen:
                other.delete()
    return full_name, label, chosen


def _offer_port(name: str, api: str | None) -> Opened:
    systems, reasons = _connect(api, client=name)
    opened = None
    for label, out, _ in systems:
        if opened is None:
            try:
                if label == "winmm":
                    raise OSError("Windows has no virtual ports")
                out.open_virtual_port(name)
                opened = label, out
                continue
            except _rtmidi_errors() as e:
                reasons.append(f"{label}: {_short(e)}")
        out.delete()
    if opened is None:
        if any(label == "winmm" for label, _, _ in systems):
            way_out = "install loopMIDI, make a port there, and name it: midi:loopMIDI"
        else:
            way_out = _way_out()
        raise UserError(f"cannot offer a MIDI port {name!r}: {'; '.join(reasons)}; {way_out}")
    return name, *opened


def _connect(api: str | None, client: str = CLIENT) -> tuple[list[System], list[str]]:
    """Every MIDI system that answers, and the reasons of the others."""
    if api is not None and api not in APIS:
        raise UserError(f"unknown MIDI system {api!r}: choose one of {', '.join(APIS)}")
    try:
        import rtmidi
    except ImportError as e:
        raise UserError(f"cannot load python-rtmidi ({_short(e)}): pip install python-rtmidi, or {_RECORD}") from e
    compiled = rtmidi.get_compiled_api()
    numbers = {label: getattr(rtmidi, attribute) for label, attribute in APIS.items()}
    numbers = {label: number for label, number in numbers.items() if number in compiled}
    if api is not None and api not in numbers:
        raise UserError(f"no {api!r} in this python-rtmidi: choose one of {', '.join(numbers)}")
    systems, reasons = [], []
    for label, number in numbers.items():
        if api in (None, label):
            try:
                with _libraries_silent():
                    out = rtmidi.MidiOut(number, name=client)
                    systems.append((label, out, out.get_ports()))
            except _rtmidi_errors() as e:
                reasons.append(f"{label}: {_short(e)}")
    return systems, reasons


def _find(name: str, systems: list[System], reasons: list[str]) -> tuple[str, object, int, str]:
    """(api, output, index, full name) of the port meant by `name`; the first system that knows it wins."""
    if not systems:
        raise UserError(f"cannot open MIDI port {name!r}, there is no MIDI system: {'; '.join(reasons)}; {_way_out()}")
    for label, out, names in systems:
        if name in names:
            return label, out, names.index(name), name
    for label, out, names in systems:
        meant = sorted({full for full in names if name and name.casefold() in full.casefold()})
        if len(meant) > 1:
            raise UserError(f"MIDI port {name!r} may be {' or '.join(map(repr, meant))}: write more of the name")
        if meant:
            return label, out, names.index(meant[0]), meant[0]
    there = ", ".join(f"{full!r} ({label})" for label, _, names in systems for full in names)
    silent = f" ({'; '.join(reasons)})" if reasons else ""
    if not there:
        raise UserError(f"no MIDI port {name!r}, nor any other{silent}: start the synthesiser, or use virtual:NAME")
    raise UserError(f"no MIDI port {name!r}{silent}: choose one of {there}, or use virtual:NAME")


def _way_out() -> str:
    if sys.platform.startswith("linux"):
        return f"start JACK, or load the ALSA sequencer (sudo modprobe snd-seq), or {_RECORD}"
    return f"check the MIDI settings of the system, or {_RECORD}"


def _rtmidi_errors() -> tuple[type[Exception], ...]:
    import rtmidi

    return rtmidi.RtMidiError, OSError, RuntimeError  # NotImplementedError is a RuntimeError


def _short(error: object) -> str:
    """An error in one line, without the C++ method that RtMidi puts in front."""
    text = " ".join(str(error).split()).rstrip(".?!")
    return text.split("::", 1)[-1].split(": ", 1)[-1] if text.startswith("Midi") else text


@contextmanager
def _libraries_silent() -> Iterator[None]:
    """The ALSA and JACK libraries write their own lines to standard error when nobody answers; ours says it all."""
    try:
        kept = os.dup(2)
    except OSError:  # a program without a console has no standard error
        yield
        return
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
