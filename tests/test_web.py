"""Risks: strangers who listen or steer, messages that break the show, a page that does not show what is heard."""

import io
import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from contextlib import contextmanager

import mido
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from realtime_mpe.channels import ChannelMap
from realtime_mpe.desk import Desk, Strip
from realtime_mpe.errors import UserError
from realtime_mpe.events import Note, Status
from realtime_mpe.host import Engine
from realtime_mpe.model import load_model
from realtime_mpe.settings import Settings
from realtime_mpe.source import FileSource
from realtime_mpe.web import QUEUE, WebView


class Stage:
    def __init__(self, port=0):
        self.adjusted = []
        self.desk = Desk([], ChannelMap(), pytest.fail)
        settings = Settings(lookahead=1)
        self.view = WebView(port, self.desk, settings, 8, "mic", lambda **c: self.adjusted.append(c))
        self.port = urllib.parse.urlsplit(self.view.url).port
        self.token = urllib.parse.parse_qs(urllib.parse.urlsplit(self.view.url).query)["token"][0]

    def get(self, path, host=None, **query):
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    @contextmanager
    def page(self, token=None, origin=None):
        origin = f"http://127.0.0.1:{self.port}" if origin is None else origin
        url = f"ws://127.0.0.1:{self.port}/live?token={self.token if token is None else token}"
        with connect(url, origin=origin or None, open_timeout=5) as socket:
            socket.came = deque()
            yield socket


@pytest.fixture
def stage():
    stage = Stage()
    try:
        yield stage
    finally:
        stage.view.close()


def until(socket, kind, seconds=5.0):
    """The first message of a kind that comes, and all before it."""
    came, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        if not socket.came:
            socket.came.extend(json.loads(socket.recv(timeout=seconds)))
        came.append(socket.came.popleft())
        if came[-1]["type"] == kind:
            return came[-1], came
    pytest.fail(f"no {kind} among {came}")


def note(midi=60, voice=0, onset=1.0, offset=None):
    return Note(midi, 70, voice, voice + 1, onset, onset + 0.05, offset)


def status(seconds=1.0):
    return Status(seconds, -20.0, (), 1, 34.0)


def test_the_page_is_shown_to_those_who_have_the_token_and_nobody_else(stage):
    code, page = stage.get("/", token=stage.token)
    assert code == 200 and b"<canvas" in page
    for query in ({}, {"token": "x"}, {"token": stage.token[:-1]}):
        assert stage.get("/", **query)[0] == 403
        assert stage.get("/take.mid", **query)[0] == 403
    assert stage.get("/", host="evil.example", token=stage.token)[0] == 400, "a name that was pointed at this machine"
    assert stage.get("/../model.py", token=stage.token)[0] == 404


def test_strangers_cannot_connect(stage):
    with stage.page():
        pass
    for refused in ({"token": "x"}, {"token": ""}, {"origin": "http://evil.example"}, {"origin": ""}):
        with pytest.raises(InvalidStatus), stage.page(**refused):
            pass


def test_it_listens_on_this_machine_only(stage):
    stage.get("/")  # it is up
    (listening,) = stage.view._server.servers[0].sockets
    assert listening.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_one_line(stage):
    with pytest.raises(UserError, match=f"port {stage.port} is not free"):
        Stage(stage.port)
    with pytest.raises(UserError, match="no port 70000"):
        Stage(70_000)


def test_a_page_hears_what_is_played(stage):
    with stage.page() as page:
        hello, _ = until(page, "hello")
        assert (hello["voices"], hello["source"]) == (8, "mic")
        stage.view.note_on(note(60, 2))
        stage.view.note_off(note(60, 2, offset=1.5))
        stage.view.status(status())
        _, came = until(page, "status")
        played = [m for m in came if m["type"] in ("on", "off")]
        assert played == [
            {"type": "on", "voice": 2, "midi": 60, "velocity": 70, "time": 1.0},
            {"type": "off", "voice": 2, "midi": 60, "time": 1.5},
        ]


def test_a_page_steers_the_desk_and_sees_what_became_of_it(stage):
    with stage.page() as page:
        until(page, "state")
        for voice, field, value in ((1, "mute", True), (1, "transpose", -12), (1, "program", 41), (1, "channel", 9)):
            page.send(json.dumps({"type": "strip", "voice": voice, "field": field, "value": value}))
            state, _ = until(page, "state")
        assert stage.desk.strip(1) == Strip(mute=True, transpose=-12, program=41)
        assert stage.desk.channels.of(1) == 9
        assert state["strips"][1] == {"mute": True, "solo": False, "transpose": -12, "program": 41, "channel": 9}
        page.send(json.dumps({"type": "sensitivity", "value": 0.75}))
        page.send(json.dumps({"type": "lookahead", "value": 2}))
        page.send(json.dumps({"type": "strip", "voice": 1, "field": "program", "value": None}))
        for _ in range(3):
            state, _ = until(page, "state")
        assert stage.adjusted == [{"sensitivity": 0.75}, {"lookahead": 2}]
        assert (state["sensitivity"], state["lookahead"]) == (0.75, 2)
        assert state["strips"][1]["program"] is None


WRONG = [
    "", "nonsense", "[]", "{}", "null", "1", '{"type":"strip"}', '{"type":["strip"]}', '{"type":"unknown"}',
    '{"type":"strip","voice":8,"field":"mute","value":true}', '{"type":"strip","voice":-1,"field":"mute","value":true}',
    '{"type":"strip","voice":true,"field":"mute","value":true}', '{"type":"strip","voice":0,"field":"mute","value":1}',
    '{"type":"strip","voice":0,"field":"__class__","value":1}', '{"type":"strip","voice":0,"field":"transpose"}',
    '{"type":"strip","voice":0,"field":"transpose","value":1e9}',
    '{"type":"strip","voice":0,"field":"channel","value":0}',
    '{"type":"strip","voice":0,"field":"program","value":"41"}', '{"type":"sensitivity","value":NaN}',
    '{"type":"sensitivity","value":2}', '{"type":"lookahead","value":5}', '{"type":"lookahead","value":0.5}', "[" * 500,
]  # fmt: skip


def test_messages_that_make_no_sense_are_refused_and_change_nothing(stage):
    with stage.page() as page:
        until(page, "state")
        for text in WRONG:
            page.send(text)
            until(page, "refused")
        assert stage.desk.strips == {} and stage.adjusted == []
        page.send(json.dumps({"type": "panic"}))
        until(page, "state")


def test_large_and_binary_messages_end_the_page_and_not_the_server(stage):
    for message in ("x" * 5000, b"\x00" * 10):
        with stage.page() as page:
            until(page, "state")
            page.send(message)
            with pytest.raises(ConnectionClosed):
                while True:
                    page.recv(timeout=5)
    with stage.page() as page:
        until(page, "hello")


def test_a_page_that_does_not_read_costs_a_bounded_queue(stage):
    with stage.page():
        end = time.monotonic() + 5
        while not stage.view._pages and time.monotonic() < end:
            time.sleep(0.01)
        begun = time.monotonic()
        for k in range(20_000):
            stage.view.note_on(note(onset=k / 100))
        assert time.monotonic() - begun < 5.0
        assert all(len(queue) <= QUEUE for queue in stage.view._pages)


def test_a_recording_begins_when_it_is_asked_for_and_can_be_fetched(stage):
    assert stage.get("/take.mid", token=stage.token)[0] == 404
    with stage.page() as page:
        until(page, "state")
        stage.view.status(status(10.0))
        stage.view.note_on(note(50, onset=9.9))
        page.send(json.dumps({"type": "record", "value": True}))
        assert until(page, "state")[0]["recording"]
        stage.view.note_on(note(60, onset=11.0))
        stage.view.note_off(note(60, onset=11.0, offset=12.0))
        page.send(json.dumps({"type": "record", "value": False}))
        state, _ = until(page, "state")
        assert not state["recording"] and state["recorded"]
        stage.view.note_on(note(70, onset=13.0))
    code, data = stage.get("/take.mid", token=stage.token)
    assert code == 200
    now, times = 0.0, {}
    for message in mido.MidiFile(file=io.BytesIO(data)):
        now += message.time
        if not message.is_meta:
            times[message.type, message.note] = now
    assert times == {("note_on", 60): pytest.approx(1.0, abs=1e-3), ("note_off", 60): pytest.approx(2.0, abs=1e-3)}


# The page in a browser, with an engine behind it


def why_not():
    if shutil.which("chromium") is None:
        return "chromium is missing"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is missing"
    return None


def becomes(page, condition, seconds=10):
    """Wait until it is true in the page, whose policy forbids to have it evaluated there over and over."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_page_draws_what_the_engine_hears_and_steers_it(tune_wav, tiny_model, tmp_path):
    from playwright.sync_api import sync_playwright

    class Port:
        def __init__(self):
            self.on = []

        def __getattr__(self, name):
            return lambda *_: None

        def note_on(self, note):
            self.on.append(note)

    port = Port()
    desk = Desk([port], ChannelMap(), pytest.fail)
    engine, model = None, load_model(str(tiny_model))
    voices = model.info.voices
    view = WebView(0, desk, Settings(lookahead=1), voices, "tune", lambda **c: desk.later(lambda: engine.adjust(**c)))
    troubles = []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        page.goto(view.url)
        page.wait_for_selector(f'[aria-label="mute voice {voices}"]')

        def play():
            """The tune at its own pace, with the page alive in between."""
            nonlocal engine
            with FileSource(tune_wav, paced=True, blocksize=2048) as source:
                engine = Engine(model, source.samplerate, [desk, view])
                for block in source.blocks():
                    desk.apply()
                    engine.process(block.samples)
                    engine.report(0, 0.0)
                    page.wait_for_timeout(1)
                engine.finish()

        play()
        page.wait_for_timeout(200)
        played = len(port.on)
        shown = page.eval_on_selector_all(".count", "cells => cells.map(cell => Number(cell.textContent))")
        assert played > 0 and sum(shown) == played
        coloured = page.evaluate(
            """() => { const c = document.getElementById("roll");
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            let n = 0; for (let k = 0; k < d.length; k += 4) if (d[k + 2] > 120 && d[k + 3] > 100) n += 1;
            return n; }"""
        )
        assert coloured > 200, "no note is drawn"
        page.screenshot(path=str(tmp_path / "page.png"))

        for voice in range(1, voices + 1):
            page.click(f'[aria-label="mute voice {voice}"]')
        page.fill('[aria-label="transposition of voice 1"]', "12")
        page.press('[aria-label="transposition of voice 1"]', "Enter")
        becomes(page, f"document.querySelectorAll('tr.silent').length === {voices}")
        assert all(desk.strip(voice).mute for voice in range(voices)) and desk.strip(0).transpose == 12
        port.on.clear()
        play()
        assert port.on == [], "muted voices were played"
        before = page.evaluate("frames")
        page.wait_for_timeout(1000)
        assert page.evaluate("frames") - before > 10, "the roll does not move"
        view.close()
        becomes(page, "document.getElementById('notice').textContent.includes('not connected')")
        browser.close()
    assert [t for t in troubles if "WebSocket" not in t and "ERR_" not in t] == []
