"""`listen` with a real sound device and a real MIDI port: a private JACK server without hardware, PortAudio, RtMidi.

    server (jackd, dummy driver) -- microphone (plays tones, records MIDI) -- the program under test

Each of the three is a process of its own, this one none of them: libjack may wait for ever for a server that has died,
and what waits can be killed. The microphone is this very file, run as a program (see the end of it).
"""

import ctypes.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mido
import numpy as np
import pytest

SAMPLERATE, PERIOD = 48_000, 1024
MICROPHONE, PORT = "testmic", "testplayers"
CHORDS = ((52, 67), (55, 71, 79), (60, 76), (50, 65, 74))  # MIDI numbers that sound together
CHORD_SECONDS, GAP_SECONDS = 0.6, 0.2
DRUMS = 9  # mido counts channels from 0
CONNECT_SECONDS = 8  # that the server may take to answer
# JACK keeps one of its eight places for every server that was killed until one of the same name is started, so a test
# that kills some must not invent names. Several, for tests of which more run at the same time.
SERVER_NAMES = [f"rt-mpe-test-{number}" for number in range(4)]


def why_not() -> str | None:
    """What is missing on this machine for these tests."""
    if shutil.which("jackd") is None:
        return "jackd is missing"
    if ctypes.util.find_library("portaudio") is None:
        return "PortAudio is missing"
    try:
        import jack  # noqa: F401  its import loads libjack
    except (ImportError, OSError) as e:
        return f"JACK-Client cannot be loaded: {e}"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def wait_until(condition, seconds, what):
    """Return the first true value of `condition()`; fails when there is none in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what()} after {seconds} s"
        time.sleep(0.02)
    return value


class Process:
    """A program that writes into files, so that it never waits for a reader."""

    def __init__(self, folder, name, command, env):
        self.out_path, self.err_path = folder / f"{name}.out", folder / f"{name}.err"
        with open(self.out_path, "wb") as out, open(self.err_path, "wb") as err:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    @property
    def out(self):
        return self.out_path.read_text(errors="replace")

    @property
    def err(self):
        return self.err_path.read_text(errors="replace")

    def wait_for(self, text, seconds):
        def seen():
            assert self.process.poll() is None or text in self.out, f"ended too early: {self.out}{self.err}"
            return text in self.out

        wait_until(seen, seconds, lambda: f"no {text!r} in {self.out!r}, {self.err!r}")

    def ends(self, seconds):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s: {self.out[-2000:]}{self.err[-2000:]}")

    def end(self, *signals):
        """Send the signals one by one, until it ends."""
        for number in (*signals, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(1)
                except subprocess.TimeoutExpired:
                    continue


class Stage:
    """A running server with a microphone, and a program that is started to listen."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []

    def open(self):
        for self.name in SERVER_NAMES:
            self.env = dict(os.environ, JACK_DEFAULT_SERVER=self.name, JACK_NO_START_SERVER="1", PYTHONUNBUFFERED="1",
                            JACK_NO_AUDIO_RESERVATION="1")  # fmt: skip
            if self.open_server():
                break
        else:
            pytest.fail(f"jackd does not start: {self.server.out}{self.server.err}")
        self.open_microphone()

    def open_server(self, samplerate=SAMPLERATE):
        """Whether it has started."""
        # -S: the server waits for slow clients, so that a busy machine loses no sound; -t: and does not give them up
        options = ["--no-realtime", "-S", "-t", 5000, "-d", "dummy", "-r", samplerate, "-p", PERIOD, "-C", 1, "-P", 2]
        self.server = self.start(self.name, ["jackd", "-n", self.name, *options])
        return self._begun()

    def open_microphone(self):
        self.microphone = self.start("microphone", [sys.executable, Path(__file__).resolve()])
        self.microphone.wait_for("ready", CONNECT_SECONDS + 2)

    def _begun(self):
        """Whether the server has started; it ends at once if another of its name runs."""
        ended = self.server.process.poll
        wait_until(
            lambda: ended() is not None or "server starting" in self.server.out + self.server.err,
            CONNECT_SECONDS,
            lambda: f"jackd does not start: {self.server.out}{self.server.err}",
        )
        return ended() is None

    def start(self, name, command):
        process = Process(self.folder, name, command, self.env)
        self.processes.append(process)
        return process

    def listen(self, *more):
        """Start the program and return it once it hears the tones and its MIDI is recorded."""
        words = ["listen", "-d", MICROPHONE, "--virtual", PORT, "--midi-api", "jack", "--record", "take"]
        program = self.start("program", [sys.executable, "-m", "realtime_mpe.cli", *words, "--sensitivity", 0.8, *more])
        wait_until(
            lambda: "playing" in self.microphone.out or program.process.poll() is not None,
            10,
            lambda: f"not connected: {program.out}{program.err}{self.microphone.err}",
        )
        return program

    def recorded(self):
        """MIDI messages that have left the program, in their order, as mido knows them."""
        heard, deadline = None, time.monotonic() + 10
        while heard != (heard := self.microphone.out) and time.monotonic() < deadline:
            time.sleep(1.0)  # what was sent last arrives with the next periods
        whole, _, _ = heard.rpartition("\n")
        return [mido.Message.from_bytes(json.loads(line)) for line in whole.splitlines() if line.startswith("[")]

    def close(self):
        # The server first, and the clients are killed, not asked to close: a server that waits for its clients can hang
        # when one has left.
        self.server.end(signal.SIGTERM)
        for process in self.processes:
            process.end()
        for left in Path("/dev/shm").glob(f"jack*{self.name}*"):  # of a server or client that was killed
            left.unlink(missing_ok=True)


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    try:
        stage.open()
        yield stage
    finally:
        stage.close()


def is_note_on(message):
    return message.type == "note_on" and message.velocity > 0


def is_note_off(message):
    return message.type == "note_off" or (message.type == "note_on" and message.velocity == 0)


def notes(messages):
    """How often every (channel, note) began. Fails if one ends that does not sound, or sounds on at the end."""
    begun, sounding = Counter(), Counter()
    for message in messages:
        if is_note_on(message):
            begun[message.channel, message.note] += 1
            sounding[message.channel, message.note] += 1
        elif is_note_off(message):
            sounding[message.channel, message.note] -= 1
            assert sounding[message.channel, message.note] >= 0, f"{message} ends what does not sound"
    assert not +sounding, f"still sounding at the end: {dict(+sounding)}"
    return begun


def take(stage):
    """Notes of the saved take, as `notes` counts them."""
    saved = mido.MidiFile(stage.folder / "take.mid")
    assert saved.type == 1
    return sum((notes(track) for track in saved.tracks), Counter())


def told(program, kind):
    """The lines of one kind among what the program has told; the libraries below it write theirs between them."""
    assert "Traceback" not in program.err
    return [line for line in program.err.splitlines() if line.startswith(f"rt-mpe: {kind}: ")]


def test_what_a_microphone_hears_leaves_by_the_midi_port_until_interrupted(stage):
    program = stage.listen()
    program.wait_for("note_off", 8)
    time.sleep(1.0)  # several notes, of which the end shall cut some off
    wait_until(lambda: program.out.count("note_on") > program.out.count("note_off"), 4, lambda: program.out)
    program.process.send_signal(signal.SIGINT)
    assert program.ends(5) == 0
    received = stage.recorded()
    begun = notes(received)
    assert begun.total() >= 2
    assert begun == take(stage)
    used = {message.channel for message in received}
    assert DRUMS not in used
    silenced = [{m.channel for m in received if m.is_cc(control)} for control in (123, 120)]
    assert silenced == [used, used]
    assert told(program, "error") == [] and len(told(program, "saved")) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["crashes", "is ended"])
def test_a_lost_server_is_told_in_one_line_and_the_take_is_kept(stage, how):
    program = stage.listen("--wait", 0)
    program.wait_for("note_on", 8)
    stage.server.process.send_signal(how)
    assert program.ends(12) == 3
    (line,) = told(program, "error")
    assert MICROPHONE in line
    assert take(stage).total() >= 1
    assert len(told(program, "saved")) == 2


@pytest.mark.parametrize("samplerate", [SAMPLERATE, 44_100])
def test_a_server_that_comes_back_is_heard_and_played_on_again(stage, samplerate):
    program = stage.listen()
    program.wait_for("note_on", 8)
    stage.server.process.send_signal(signal.SIGKILL)
    stage.server.process.wait()
    killed = time.monotonic()
    wait_until(lambda: "waiting for it" in program.err, 8, lambda: program.err)
    stage.microphone.end()
    # What the screen shows sounding has been ended without waiting for anything to come back.
    assert program.out.count("note_on") == program.out.count("note_off")
    before = program.out.count("note_on")
    assert stage.open_server(samplerate)
    stage.open_microphone()
    wait_until(lambda: "playing" in stage.microphone.out, 15, lambda: f"not connected: {program.out}{program.err}")
    away = time.monotonic() - killed
    wait_until(lambda: program.out.count("note_on") >= before + 3, 10, lambda: program.out)
    program.process.send_signal(signal.SIGINT)
    assert program.ends(5) == 0
    received = stage.recorded()
    assert notes(received).total() >= 3, "of the notes after the return"
    warnings = told(program, "warning")
    assert any(MICROPHONE in line and "waiting for it" in line for line in warnings)
    assert any(MICROPHONE in line and "is back after" in line for line in warnings)
    assert any("MIDI port" in line and "is back" in line for line in warnings)
    assert told(program, "error") == []
    onsets = sorted(m.time for m in timed(mido.MidiFile(stage.folder / "take.mid")) if is_note_on(m))
    gap = max(b - a for a, b in zip(onsets, onsets[1:], strict=False))
    assert abs(gap - away) < 3.0, "the take keeps time with the clock"


def timed(file):
    """All messages of a MIDI file with their time in seconds from its beginning."""
    now = 0.0
    for message in file:
        now += message.time
        yield message.copy(time=now)


# The microphone


def tones():
    """Loud chords of decaying harmonics with pauses between them, (n,) float32, peak 0.5."""
    t = np.arange(round((CHORD_SECONDS + GAP_SECONDS) * SAMPLERATE)) / SAMPLERATE
    envelope = np.minimum(1.0, t / 0.005) * np.exp(-t) * np.clip((CHORD_SECONDS - t) / 0.02, 0.0, 1.0)
    chords = []
    for chord in CHORDS:
        chords.append(np.zeros(len(t)))
        for midi in chord:
            frequency = 440.0 * 2.0 ** ((midi - 69) / 12)
            for harmonic in range(1, 9):
                chords[-1] += envelope * np.sin(2 * np.pi * harmonic * frequency * t) / harmonic
    samples = np.concatenate(chords)
    return (0.5 * samples / np.abs(samples).max()).astype(np.float32)


def microphone():
    """A JACK client that says "ready", plays the tones over and over from the moment at which a program both listens to
    it and offers the MIDI port ("playing"), and prints every MIDI message that it receives, until it is killed."""
    import jack

    client, tries = None, time.monotonic() + CONNECT_SECONDS
    while client is None:
        try:
            client = jack.Client(MICROPHONE, no_start_server=True)
        except jack.JackOpenError:  # the server is only just starting
            if time.monotonic() > tries:
                raise
            time.sleep(0.1)
    audio = client.outports.register("capture_1")
    midi = client.midi_inports.register("heard")
    samples = tones()
    received: list[list[int]] = []
    position = -1  # in the samples; -1 before they begin

    @client.set_process_callback
    def process(frames):
        nonlocal position
        if position < 0:
            audio.get_array().fill(0.0)
        else:
            audio.get_array()[:] = samples.take(range(position, position + frames), mode="wrap")
            position += frames
        received.extend(list(bytes(data)) for _, data in midi.incoming_midi_events())

    client.activate()
    print("ready", flush=True)
    linked, told = False, 0
    while True:
        if not linked:
            for port in client.get_ports(f"{PORT}:.*", is_midi=True, is_output=True):
                client.connect(port, midi)
                linked = True
        elif position < 0 and client.get_all_connections(audio):
            position = 0
            print("playing", flush=True)
        for data in received[told:]:
            print(json.dumps(data), flush=True)
            told += 1
        time.sleep(0.02)


if __name__ == "__main__":
    microphone()
