"""`osc:HOST:PORT`: every note as an Open Sound Control message over UDP, for programs that draw, light or compose.

    /rt-mpe/note_on   voice channel midi velocity onset        /rt-mpe/bend     voice midi cents
    /rt-mpe/note_off  voice channel midi offset                /rt-mpe/program  voice channel number
    /rt-mpe/panic                                              /rt-mpe/status   seconds level_db latency_ms voices

Voices count from 1, as on the screen; onset and offset are seconds of input. Whether anybody listens is not known.
"""

import socket

from ..errors import UserError
from ..events import Bend, Note, Program, Status
from .base import NoteSink

PREFIX = "/rt-mpe/"


class OscSink(NoteSink):
    """address : "HOST:PORT", an IPv6 host in brackets. UserError if it has another form or the host is unknown."""

    def __init__(self, address: str) -> None:
        from pythonosc.udp_client import SimpleUDPClient

        host, colon, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise UserError(f"{address!r} is no address to send OSC to; write HOST:PORT, as in 127.0.0.1:9000")
        try:
            self._client = SimpleUDPClient(host, int(port))
        except (OSError, UnicodeError) as e:  # the latter of a name with an empty part
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"OSC cannot be sent to {address!r}: {reason}; check the host's name") from e
        self.closed = False

    def note_on(self, note: Note) -> None:
        self._send("note_on", note.voice + 1, note.channel, note.midi, note.velocity, float(note.onset))

    def note_off(self, note: Note) -> None:
        self._send("note_off", note.voice + 1, note.channel, note.midi, float(note.offset))

    def bend(self, bend: Bend) -> None:
        self._send("bend", bend.note.voice + 1, bend.note.midi, float(bend.cents))

    def program(self, program: Program) -> None:
        self._send("program", program.voice + 1, program.channel, program.number)

    def panic(self) -> None:
        self._send("panic")

    def status(self, status: Status) -> None:
        self._send("status", float(status.seconds), float(status.level_db), float(status.latency_ms), status.voices)

    def close(self) -> None:
        self.closed = True

    def _send(self, name: str, *values: int | float) -> None:
        if self.closed:
            return
        try:
            self._client.send_message(PREFIX + name, list(values))
        except (OSError, socket.gaierror):
            pass  # UDP: a receiver that is not there now may be there for the next note
