"""`midi:NAME` plays on a MIDI port that exists, `virtual:NAME` offers one of our own, both through RtMidi.

RtMidi speaks to one MIDI system a port, and a computer may have several (ALSA and JACK on Linux), of which any may not
be running: all that are compiled in are tried in turn, and the reasons of those that fail are kept for the message.

Under JACK, open these sinks before an audio stream of the same process and close them after it: RtMidi waits for the
JACK cycle to end while it holds Python's lock, and an audio callback in Python needs that lock for the cycle to end
(measured: 11 s, after which JACK has given up on the process). Known limit: should the JACK server die while the audio
comes from elsewhere, RtMidi takes some 2,300 more messages and then blocks for ever.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError
from ..events import Note, Status
from .base import NoteSink

APIS = {"alsa": "API_LINUX_ALSA", "jack": "API_UNIX_JACK", "coremidi": "API_MACOSX_CORE", "winmm": "API_WINDOWS_MM"}
CLIENT = "rt-mpe"  # how we are called in patch bays
LOOK_SECONDS = 1.0  # how often we look whether the port is still there
LEAVE_SECONDS = 0.1  # two long JACK periods: a receiver may read what was sent last only in the next one

System = tuple[str, object, list[str]]  # of APIS, an RtMidi output without a port yet, the ports it could open

_NOTE_OFF, _NOTE_ON, _CONTROL_CHANGE = 0x80, 0x90, 0xB0  # the low four bits are the channel, from 0
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


class _PortSink(NoteSink):
    """An open RtMidi output. A pitch that several voices share on one channel ends with the last of them."""

    def __init__(self, name: str, api: str, out) -> None:
        self.name, self.api = name, api
        self._out = out  # None once closed
        self._working = True  # False once closed or lost
        self._sounding: Counter[tuple[int, int]] = Counter()  # (channel, midi)
        self._used: set[int] = set()  # channels

    def note_on(self, note: Note) -> None:
        key = note.channel, note.midi
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

    def close(self) -> None:
        if self._out is None:
            return
        try:
            for channel, midi in sorted(+self._sounding):
                self._send(_NOTE_OFF, channel, midi, _RELEASE_VELOCITY)
            for channel in sorted(self._used):
                self._send(_CONTROL_CHANGE, channel, _ALL_NOTES_OFF, 0)
                self._send(_CONTROL_CHANGE, channel, _ALL_SOUND_OFF, 0)
            if self._working and self.api == "jack":
                time.sleep(LEAVE_SECONDS)
        except UserError:
            pass  # the port is gone, and with it what sounded
        self._working = False
        out, self._out = self._out, None
        try:
            out.close_port()
            out.delete()
        except _rtmidi_errors():
            pass  # it is gone already

    def _send(self, kind: int, channel: int, *data: int) -> None:
        if not self._working:
            return
        try:
            self._out.send_message([kind | channel - 1, *data])
        except _rtmidi_errors() as e:
            self._lost(e)

    def _lost(self, reason: object) -> None:
        self._working = False
        raise UserError(
            f"MIDI port {self.name!r} ({self.api}) vanished: {_short(reason)}; connect it again and restart"
        )


class MidiPortSink(_PortSink):
    """Plays on the port called `name`, or else the only one whose name contains it (upper and lower case alike).

    api : one of APIS to search only there. UserError: no such port, several, or no MIDI system.
    """

    def __init__(self, name: str, api: str | None = None) -> None:
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
        super().__init__(full_name, label, chosen)
        self._looked_at = time.monotonic()

    def status(self, status: Status) -> None:
        """Notice that the port is gone: ALSA and JACK take messages to nowhere without an error."""
        if not self._working or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        if self.api == "winmm":
            return  # it reports lost ports by itself, and the numbers in its names move when others come and go
        try:
            names = self._out.get_ports()
        except _rtmidi_errors() as e:
            self._lost(e)
        if self.api == "alsa":  # there a client may rename itself; its number, as in "synth:in 128:0", stays
            here = self.name.rpartition(" ")[2] in {name.rpartition(" ")[2] for name in names}
        else:
            here = self.name in names
        if not here:
            self._lost("it is not listed any more")


class VirtualPortSink(_PortSink):
    """Offers a port called `name` that other programs can connect to.

    api : one of APIS to offer it only there. UserError: no MIDI system, or Windows, which has no virtual ports.
    """

    def __init__(self, name: str = CLIENT, api: str | None = None) -> None:
        name = name or CLIENT
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
        super().__init__(name, *opened)


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
