"""`rt-mpe listen --web`: one page that shows what is heard, and steers the desk.

    engine -> WebView -> a queue a page -> 30 messages a second over a WebSocket -> the page's piano roll
    the page's controls -> messages -> Desk (and Engine.adjust), between two blocks

Only this machine can connect, and only who has the token that stands in the address; a page of another origin is
refused even if it guesses it. All that comes in is bounded and checked before it is used. The server runs in a thread
of its own; the one that plays appends to a queue, and waits for it only while a recording is handed out.
"""

import asyncio
import contextlib
import json
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources

from .desk import Desk
from .errors import UserError
from .events import Note, Status
from .settings import Settings
from .sinks.base import NoteSink
from .sinks.midi_file import Take

HOST = "127.0.0.1"
FRAMES_A_SECOND = 30
QUEUE = 4096  # messages that a page may be behind; then it misses some, and not the player
LARGEST_MESSAGE = 1024  # bytes, of what a page may send
MOST_PAGES = 8
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class WebView(NoteSink):
    """port : of the server; 0 takes any.  voices : K.  adjust : called with ``lookahead`` or ``sensitivity``.

    ``url`` : what to open, token included.  UserError if the port is taken.
    """

    def __init__(
        self, port: int, desk: Desk, settings: Settings, voices: int, name: str, adjust: Callable[..., None]
    ) -> None:
        if not 0 <= port <= 65535:
            raise UserError(f"there is no port {port}; choose 1 to 65535, or 0 for any")
        self._desk, self._adjust, self._voices, self._name = desk, adjust, voices, name
        self._settings = settings
        self._token = secrets.token_urlsafe(16)
        self._pages: list[deque] = []
        self._take: Take | None = None
        self._recording = self._fetched = False
        self._now = self._settled = 0.0
        self._lock = threading.Lock()  # of the take, which a page may ask for while notes come in
        self._serve(port)

    def _serve(self, port: int) -> None:
        import uvicorn

        application = self._application()
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen()  # who comes before the server is up waits
        except OSError as e:
            listening.close()
            raise UserError(f"port {port} is not free ({e.strerror}); choose another with --web PORT") from e
        self._port = listening.getsockname()[1]
        self.url = f"http://{HOST}:{self._port}/?token={self._token}"
        config = uvicorn.Config(
            application,
            log_config=None,
            access_log=False,
            ws_max_size=LARGEST_MESSAGE,
            lifespan="off",
            ws="auto",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def _application(self):
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route, WebSocketRoute

        routes = [Route("/", self._page), Route("/take.mid", self._download), WebSocketRoute("/live", self._live)]
        # Another host name that leads here would be another site that has been pointed at this machine.
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        return Starlette(routes=routes, middleware=[hosts])

    def _knows_token(self, connection) -> bool:
        return secrets.compare_digest(connection.query_params.get("token", "").encode(), self._token.encode())

    async def _page(self, request):
        from starlette.responses import HTMLResponse, PlainTextResponse

        if not self._knows_token(request):
            return PlainTextResponse("open the whole address that rt-mpe shows, token included", 403)
        page = resources.files(__package__).joinpath("web.html").read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        return HTMLResponse(page, headers=headers)

    async def _download(self, request):
        from starlette.responses import PlainTextResponse, Response

        if not self._knows_token(request):
            return PlainTextResponse("no", 403)
        with self._lock:
            data = self._take.encode() if self._take else None
            self._fetched = data is not None and not self._recording
        if data is None:
            return PlainTextResponse("nothing has been recorded yet", 404)
        headers = {"Content-Disposition": 'attachment; filename="take.mid"'}
        return Response(data, media_type="audio/midi", headers=headers)

    async def _live(self, socket) -> None:
        origins = {f"http://{host}:{self._port}" for host in (HOST, "localhost")}
        allowed = self._knows_token(socket) and socket.headers.get("origin") in origins
        if not allowed or len(self._pages) >= MOST_PAGES:
            await socket.close(1008)
            return
        await socket.accept()
        queue: deque = deque(maxlen=QUEUE)
        self._pages.append(queue)
        sending = asyncio.create_task(self._send(socket, queue))
        try:
            await self._receive(socket)
        finally:
            self._pages.remove(queue)
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await sending

    async def _send(self, socket, queue: deque) -> None:
        await socket.send_text(json.dumps([self._hello(), self._state()]))
        while True:
            await asyncio.sleep(1.0 / FRAMES_A_SECOND)
            messages = []
            while queue and len(messages) < QUEUE:
                messages.append(queue.popleft())
            if messages:
                await socket.send_text(json.dumps(messages))

    async def _receive(self, socket) -> None:
        from starlette.websockets import WebSocketDisconnect

        try:
            while True:
                text = await socket.receive_text()
                try:
                    self._obey(json.loads(text))
                except (UserError, ValueError, TypeError, KeyError, RecursionError) as error:
                    reason = str(error) if isinstance(error, UserError) else "that was no message of this page"
                    self._tell({"type": "refused", "reason": reason})
                self._tell(self._state())
        except (WebSocketDisconnect, KeyError):  # KeyError: bytes instead of text
            pass

    def _obey(self, message: dict) -> None:
        """What a page asks for; UserError, ValueError, TypeError or KeyError if that cannot be."""
        kind = message["type"]
        if kind == "strip":
            self._change(_integer(message["voice"], 0, self._voices - 1), message["field"], message["value"])
        elif kind == "panic":
            self._desk.silence()
        elif kind == "sensitivity":
            self._set(sensitivity=_number(message["value"]))
        elif kind == "lookahead":
            self._set(lookahead=_integer(message["value"], 0, 4))
        elif kind == "record":
            self._record(message["value"] is True)
        else:
            raise ValueError(kind)

    def _change(self, voice: int, field: str, value: object) -> None:
        if field in ("mute", "solo") and isinstance(value, bool):
            self._desk.change(voice, **{field: value})
        elif field == "transpose":
            self._desk.change(voice, transpose=_integer(value, -48, 48))
        elif field == "program":
            self._desk.change(voice, program=None if value is None else _integer(value, 1, 128))
        elif field == "channel":
            self._desk.assign(voice, _integer(value, 1, 16))
        else:
            raise ValueError(field)

    def _set(self, **changes: int | float) -> None:
        self._settings = Settings(**(asdict(self._settings) | changes))
        self._adjust(**changes)

    def _record(self, on: bool) -> None:
        with self._lock:
            if on and not self._recording:
                self._take, self._fetched = Take(-self._now), False
            self._recording = on

    def _hello(self) -> dict:
        return {"type": "hello", "voices": self._voices, "source": self._name}

    def _state(self) -> dict:
        """What the controls show."""
        channels = self._desk.channels
        own = getattr(channels, "of", lambda voice: None)
        strips = [asdict(self._desk.strip(voice)) | {"channel": own(voice)} for voice in range(self._voices)]
        chosen = {"sensitivity": self._settings.sensitivity, "lookahead": self._settings.lookahead}
        take = {"recording": self._recording, "recorded": self._take is not None, "fetched": self._fetched}
        return {"type": "state", "strips": strips} | chosen | take

    # From the thread that plays

    def note_on(self, note: Note) -> None:
        with self._lock:
            if self._recording:
                self._take.note_on(note)
        self._tell({"type": "on", "voice": note.voice, "midi": note.midi, "velocity": note.velocity,
                    "time": round(note.onset, 3)})  # fmt: skip

    def note_off(self, note: Note) -> None:
        with self._lock:
            if self._recording:
                self._take.note_off(note)
        self._tell({"type": "off", "voice": note.voice, "midi": note.midi, "time": round(note.offset, 3)})

    def status(self, status: Status) -> None:
        self._now = status.seconds
        with self._lock:
            if self._recording:
                self._take.passed(status.seconds)
                if status.seconds - self._settled >= 1.0:
                    self._settled = status.seconds
                    self._take.settle()
        self._tell(
            {
                "type": "status",
                "time": round(status.seconds, 3),
                "level": round(max(status.level_db, -120.0), 1),
                "latency": round(status.latency_ms, 1),
                "voices": status.voices,
                "lost": status.lost_samples,
                "overflows": status.overflows,
                "clipped": status.clipped,
            }
        )

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(2.0)

    def _tell(self, message: dict) -> None:
        for queue in list(self._pages):
            queue.append(message)


def _integer(value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{str(value)[:20]!r} is no number from {low} to {high}")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
        raise UserError(f"{str(value)[:20]!r} is no number from 0 to 1")
    return float(value)
