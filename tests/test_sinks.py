"""Risks: a hanging note, a lost take, an escape code in a log file, a traceback where MIDI is missing."""

import errno
import importlib.util
import io
import json
import logging
import math
import os
import re
import socket
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile

from realtime_mpe.errors import UserError, drawn_in_place, tell
from realtime_mpe.events import Bend, Note, Program, Status
from realtime_mpe.sinks import audio_file, json_lines, midi_file, midi_port
from realtime_mpe.sinks.audio_file import AudioFileSink
from realtime_mpe.sinks.base import NoteSink
from realtime_mpe.sinks.json_lines import JsonLinesSink
from realtime_mpe.sinks.midi_file import MidiFileSink
from realtime_mpe.sinks.midi_port import MidiPortSink, SplitPortsSink, VirtualPortSink, list_ports
from realtime_mpe.sinks.osc import OscSink
from realtime_mpe.sinks.terminal import TerminalSink, note_name
from realtime_mpe.source import Block


def note(midi=60, onset=1.0, offset=None, voice=0, channel=None, velocity=70):
    channel = voice + 1 if channel is None else channel
    return Note(midi, velocity, voice, channel, onset, emitted=onset + 0.074, offset=offset)


def play(sink, *notes):
    """As the engine does: in order of time, offs before ons."""
    steps = [(n.onset, 1, i) for i, n in enumerate(notes)] + [(n.offset, 0, i) for i, n in enumerate(notes)]
    for _, on, i in sorted(steps):
        if on:
            sink.note_on(replace(notes[i], offset=None))
        else:
            sink.note_off(notes[i])


def status(seconds=1.0, **kwargs):
    return Status(**{"seconds": seconds, "level_db": -23.4, "sounding": (), "voices": 2, "latency_ms": 74.0, **kwargs})


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_base_sink_takes_everything_and_does_nothing():
    sink = NoteSink()
    play(sink, note(offset=2.0))
    sink.status(status())
    sink.close()
    sink.close()


# ---- the MIDI file ----


def read_notes(path):
    """{track name: [(on s, off s, midi, velocity, channel 1..16)]} as mido reads it; every on must have its off."""
    file = mido.MidiFile(path)
    assert (file.type, file.ticks_per_beat) == (1, 960)
    assert [m.tempo for m in file.tracks[0] if m.type == "set_tempo"] == [500_000]
    tracks = {}
    for track in file.tracks[1:]:
        now, sounding, notes = 0, {}, []
        for message in track:
            now += message.time
            if message.type == "note_on":
                assert message.note not in sounding, "struck again before it ended"
                sounding[message.note] = now, message
            elif message.type == "note_off":
                start, on = sounding.pop(message.note)
                assert on.channel == message.channel
                notes.append((start / 1920, now / 1920, on.note, on.velocity, on.channel + 1))
        assert not sounding, "notes hang"
        tracks[track.name] = sorted(notes)
    return tracks


def test_take_read_back_by_mido_equals_what_was_played(tmp_path):
    rng = np.random.default_rng(3)
    played = {"voice 1": [], "voice 2": [], "voice 12": []}
    notes = []
    for voice, channel in ((0, 1), (1, 2), (11, 13)):
        now = 0.0
        for _ in range(60):
            onset = now + rng.uniform(0.0, 0.3)
            now = onset + rng.uniform(0.03, 2.0)
            midi, velocity = int(rng.integers(23, 95)), int(rng.integers(1, 128))
            notes.append(note(midi, onset, now, voice, channel, velocity))
            played[f"voice {voice + 1}"].append((onset, now, midi, velocity, channel))
        now += 3600.0  # an hour of silence must not upset the delta times
        notes.append(note(60, now, now + 1.0, voice, channel))
        played[f"voice {voice + 1}"].append((now, now + 1.0, 60, 70, channel))
    sink = MidiFileSink(tmp_path / "take.mid")
    play(sink, *notes)
    sink.close()
    got = read_notes(tmp_path / "take.mid")
    assert list(got) == ["voice 1", "voice 2", "voice 12"]
    for name, truth in played.items():
        np.testing.assert_allclose(got[name], sorted(truth), atol=0.5 / 1920 + 1e-9)
    assert os.listdir(tmp_path) == ["take.mid"], "a temporary file was left"


def test_note_struck_again_at_once_ends_first_and_no_note_is_empty(tmp_path):
    sink = MidiFileSink(tmp_path / "take.mid")
    play(sink, note(60, 1.0, 2.0), note(60, 2.0, 3.0), note(64, 1.0, 1.0 + 1e-9))
    sink.note_off(note(67, 1.0, 2.6))  # the label ends a little after the next one begins
    sink.note_off(note(67, 2.5, 2.9))
    sink.close()
    got = [(on, off, midi) for on, off, midi, _, _ in read_notes(tmp_path / "take.mid")["voice 1"]]
    assert got == [(1, 1 + 1 / 1920, 64), (1, 2, 60), (1, 2.5, 67), (2, 3, 60), (2.5, pytest.approx(2.9, abs=1e-3), 67)]


def test_notes_nobody_ended_end_at_the_last_known_time(tmp_path):
    sink = MidiFileSink(tmp_path / "take.mid")
    sink.note_on(note(60, 1.0))
    sink.note_on(note(60, 2.0))  # struck anew without a note_off
    sink.status(status(5.5))
    sink.close()
    assert [n[:3] for n in read_notes(tmp_path / "take.mid")["voice 1"]] == [(1, 2, 60), (2, 5.5, 60)]


def test_silence_is_a_readable_file(tmp_path):
    MidiFileSink(tmp_path / "take.mid").close()
    assert read_notes(tmp_path / "take.mid") == {}


def test_an_earlier_take_is_never_recorded_over_unasked(tmp_path):
    path = tmp_path / "take.mid"
    path.write_bytes(b"the earlier take")
    with pytest.raises(UserError) as error:
        MidiFileSink(path)
    assert "take.mid" in one_line(error)
    sink = MidiFileSink(path, overwrite=True)
    assert path.read_bytes() == b"the earlier take", "touched before there was anything to save"
    play(sink, note(offset=2.0))
    sink.close()
    assert read_notes(path)["voice 1"]


@pytest.mark.parametrize("name", ["", "no-such-folder/take.mid", "."])
def test_unwritable_place_is_refused_before_the_music(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        MidiFileSink(name)
    assert name in one_line(error)
    assert os.listdir(tmp_path) == []


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def only_in(folder, real):
    """A disk that is full in `folder` and not elsewhere."""

    def replace_file(source, target):
        if str(target).startswith(str(folder)):
            disk_full()
        real(source, target)

    return replace_file


@pytest.fixture
def checkpoint_always(monkeypatch):
    monkeypatch.setattr(midi_file, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(midi_file, "SAVING_SHARE", float("inf"))


def test_what_was_played_is_on_disk_before_the_end(tmp_path, checkpoint_always):
    sink = MidiFileSink(tmp_path / "take.mid")
    play(sink, note(60, 1.0, 2.0))
    sink.note_on(note(64, 2.0))
    sink.status(status(3.0))
    # no close: the program was killed
    assert [n[:3] for n in read_notes(tmp_path / "take.mid")["voice 1"]] == [(1, 2, 60), (2, 3, 64)]


def test_checkpoints_keep_their_distance(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(midi_file.time, "monotonic", lambda: now[0])
    sink = MidiFileSink(tmp_path / "take.mid")
    play(sink, note(60, 1.0, 2.0))
    now[0] = 0.9
    sink.status(status(0.9))
    assert not (tmp_path / "take.mid").exists()
    now[0] = 1.1
    sink.status(status(1.1))
    assert (tmp_path / "take.mid").exists()


def test_what_is_settled_once_equals_what_is_encoded_at_the_end(tmp_path, monkeypatch):
    """Live: notes begin and end up to a second after the fact, and the take is saved every few of them."""
    rng = np.random.default_rng(7)
    often, once = MidiFileSink(tmp_path / "often.mid"), MidiFileSink(tmp_path / "once.mid")
    monkeypatch.setattr(midi_file, "SAVING_SHARE", float("inf"))
    now, sounding = 0.0, {}
    for _ in range(600):
        now += rng.exponential(0.1)
        key = int(rng.integers(2)), int(rng.integers(60, 66))
        late = now - rng.uniform(0.0, 0.4)
        if key in sounding:
            begun = sounding.pop(key)
            message = "note_off", note(key[1], begun, max(late, begun + 0.02), voice=key[0])
        else:
            sounding[key] = max(late, 0.0)
            message = "note_on", note(key[1], sounding[key], voice=key[0])
        for sink in (often, once):
            getattr(sink, message[0])(message[1])
        monkeypatch.setattr(often, "_next_save", 0.0)
        often.status(status(now))
    once.status(status(now))
    often.close()
    once.close()
    assert (tmp_path / "often.mid").read_bytes() == (tmp_path / "once.mid").read_bytes()
    assert sum(map(len, read_notes(tmp_path / "once.mid").values())) > 250


def test_a_note_that_began_before_the_take_begins_with_what_is_not_settled_yet():
    """Else its distance to what is settled would be negative, and encoding it would never end."""
    take = midi_file.Take(-100.0)
    for second in range(100, 110):
        take.note_on(note(60, float(second)))
        take.note_off(note(60, float(second), second + 0.5))
    take.encode()
    take.note_off(note(72, 95.0, 111.0))
    take.note_off(note(74, 95.0, 96.0))
    file = mido.MidiFile(file=io.BytesIO(take.encode()))
    assert sum(m.type == "note_on" for m in file) == sum(m.type == "note_off" for m in file) == 12


def test_an_offset_moves_all_notes(tmp_path):
    sink = MidiFileSink(tmp_path / "take.mid", offset=-500.0)
    play(sink, note(60, 1.0, 2.0), note(62, 0.2, 1.2))
    sink.close()
    assert [n[:3] for n in read_notes(tmp_path / "take.mid")["voice 1"]] == [
        (0, pytest.approx(0.7, abs=1e-3), 62), (0.5, 1.5, 60)
    ]  # fmt: skip


def test_a_take_that_takes_long_to_save_is_saved_less_often(tmp_path, monkeypatch):
    now, saves = [20.0], []

    def slow_save(*_):
        saves.append(now[0])
        now[0] += 0.5

    sink = MidiFileSink(tmp_path / "take.mid")
    monkeypatch.setattr(midi_file.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sink, "_next_save", 20.0)
    monkeypatch.setattr(sink, "_save", slow_save)
    for _ in range(1200):
        play(sink, note(60, now[0], now[0] + 0.05))
        sink.status(status(now[0]))
        now[0] += 0.1
    assert len(saves) == 3 and min(b - a for a, b in zip(saves, saves[1:], strict=False)) >= 50


def test_an_interrupt_while_saving_leaves_no_part_of_it(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    sink = MidiFileSink(tmp_path / "take.mid")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(midi_file.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sink.close()
    assert not any(tmp_path.iterdir())


def test_full_disk_keeps_the_last_good_save_warns_once_and_recovers(tmp_path, monkeypatch, caplog, checkpoint_always):
    path = tmp_path / "take.mid"
    sink = MidiFileSink(path)
    play(sink, note(60, 1.0, 2.0))
    sink.status(status(2.0))
    good = path.read_bytes()
    play(sink, note(64, 3.0, 4.0))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(midi_file, "open", disk_full, raising=False)
        for seconds in (4.0, 5.0, 6.0):
            sink.status(status(seconds))
        assert [r.levelname for r in caplog.records] == ["WARNING"] and str(path) in caplog.text
        assert path.read_bytes() == good
    sink.close()
    assert [n[2] for n in read_notes(path)["voice 1"]] == [60, 64]


def test_disk_still_full_at_the_end_saves_the_take_elsewhere_and_says_where(tmp_path, monkeypatch):
    show, refuge = tmp_path / "show", tmp_path / "tmp"
    show.mkdir()
    refuge.mkdir()
    monkeypatch.setattr(midi_file.tempfile, "tempdir", str(refuge))
    monkeypatch.setattr(midi_file.os, "replace", only_in(show, os.replace))
    sink = MidiFileSink(show / "take.mid")
    play(sink, note(60, 1.0, 2.0))
    with pytest.raises(UserError) as error:
        sink.close()
    message = one_line(error)
    assert str(show / "take.mid") in message and "No space left" in message
    assert read_notes(re.search(r"the take is in '(.*)'", message)[1]) == {"voice 1": [(1, 2, 60, 70, 1)]}
    assert os.listdir(show) == [], "a temporary file was left on the full disk"
    sink.close()


def test_every_disk_full_is_one_error_not_two(tmp_path, monkeypatch):
    sink = MidiFileSink(tmp_path / "take.mid")
    play(sink, note(60, 1.0, 2.0))
    monkeypatch.setattr(midi_file.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(midi_file.os, "replace", disk_full)
    with pytest.raises(UserError) as error:
        sink.close()
    assert "the take is lost" in one_line(error)
    sink.close()


# ---- MIDI ports, on an RtMidi without hardware ----


class FakeRtMidi(types.ModuleType):
    """As much of python-rtmidi as we use. `systems`: {api number: port names, or the error of a system that is off}."""

    API_UNSPECIFIED, API_MACOSX_CORE, API_LINUX_ALSA, API_UNIX_JACK, API_WINDOWS_MM = range(5)

    class RtMidiError(OSError):
        pass

    def __init__(self, systems):
        super().__init__("rtmidi")
        self.systems, self.outs = systems, []

    def get_compiled_api(self):
        return list(self.systems)

    def MidiIn(self, api, name):  # noqa: N802
        return self.MidiOut(api, name)

    def MidiOut(self, api, name):  # noqa: N802
        if isinstance(self.systems[api], str):
            raise self.RtMidiError(self.systems[api])
        self.outs.append(FakeOut(self, api, name))
        return self.outs[-1]


class FakeOut:
    def __init__(self, rtmidi, api, client):
        self.rtmidi, self.api, self.client = rtmidi, api, client
        self.port, self.sent, self.deleted, self.broken = None, [], False, False

    def get_ports(self):
        return list(self.rtmidi.systems[self.api])

    def open_port(self, index, name):
        self.port = self.get_ports()[index]

    def open_virtual_port(self, name):
        if self.api == self.rtmidi.API_WINDOWS_MM:
            raise NotImplementedError("Virtual ports are not supported")
        self.port = f"virtual {name}"

    def send_message(self, message):
        assert self.port is not None and not self.deleted, "sent to a port that is not open"
        if self.broken:
            raise self.rtmidi.RtMidiError("MidiOutAlsa::sendMessage: error sending MIDI message to port.")
        self.sent.append(tuple(message))

    def close_port(self):
        self.port = None

    def delete(self):
        self.deleted = True


@pytest.fixture
def fake(monkeypatch):
    def install(**systems):
        numbers = {getattr(FakeRtMidi, midi_port.APIS[api]): ports for api, ports in systems.items()}
        rtmidi = FakeRtMidi(numbers)
        monkeypatch.setitem(sys.modules, "rtmidi", rtmidi)
        return rtmidi

    return install


NO_ALSA = "MidiOutAlsa::initialize: error creating ALSA sequencer client object."
NO_JACK = "MidiOutJack::initialize: JACK server not running?"


@pytest.mark.parametrize("sink", [MidiPortSink, VirtualPortSink])
def test_no_midi_system_is_one_line_with_all_reasons_and_a_way_out(fake, sink):
    fake(alsa=NO_ALSA, jack=NO_JACK)
    with pytest.raises(UserError) as error:
        sink("strings")
    message = one_line(error)
    for part in ("strings", "alsa: error creating ALSA sequencer client object", "JACK server not running", "record:"):
        assert part in message
    assert list_ports() == (
        [],
        ["alsa: error creating ALSA sequencer client object", "jack: JACK server not running"],
    )


def test_system_that_is_off_does_not_hide_the_one_that_is_on(fake):
    rtmidi = fake(alsa=NO_ALSA, jack=["synth:in"])
    assert list_ports() == ([("jack", "synth:in")], ["alsa: error creating ALSA sequencer client object"])
    assert MidiPortSink("synth").name == "synth:in"
    assert VirtualPortSink("strings").api == "jack"
    assert [out.port for out in rtmidi.outs if not out.deleted] == ["synth:in", "virtual strings"], "outputs leak"


def test_missing_rtmidi_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "rtmidi", None)
    with pytest.raises(UserError, match="pip install python-rtmidi"):
        MidiPortSink("synth")


def test_port_is_found_by_exact_name_then_by_part_and_never_guessed(fake):
    rtmidi = fake(alsa=["Piano 128:0", "Piano Two 129:0"], jack=["Piano", "organ:in"])
    assert (MidiPortSink("Piano").api, rtmidi.outs[-1].port) == ("jack", "Piano"), "an exact name wins"
    assert [out.deleted for out in rtmidi.outs] == [True, False], "the output that was not chosen leaks"
    assert MidiPortSink("TWO").name == "Piano Two 129:0"
    assert MidiPortSink("ORGAN").name == "organ:in"
    with pytest.raises(UserError) as error:
        MidiPortSink("piano")
    assert "'Piano 128:0' or 'Piano Two 129:0'" in one_line(error)
    for name in ("flute", ""):
        with pytest.raises(UserError) as error:
            MidiPortSink(name)
        assert "'Piano Two 129:0' (alsa), 'Piano' (jack), 'organ:in' (jack)" in one_line(error)
    with pytest.raises(UserError, match="nor any other"):
        fake(alsa=[])
        MidiPortSink("flute")


def test_api_restricts_and_unknown_ones_are_refused(fake):
    fake(alsa=["synth 128:0"], jack=["synth:in"])
    assert MidiPortSink("synth", api="jack").name == "synth:in"
    assert list_ports("alsa")[0] == [("alsa", "synth 128:0")]
    with pytest.raises(UserError, match="'oss'.*alsa, jack, coremidi, winmm"):
        list_ports("oss")
    with pytest.raises(UserError, match="'winmm'.*alsa, jack"):
        VirtualPortSink(api="winmm")


def test_windows_has_no_virtual_ports_and_hears_of_loopmidi(fake):
    fake(winmm=["Microsoft GS Wavetable Synth 0"])
    with pytest.raises(UserError, match="loopMIDI"):
        VirtualPortSink("strings")


@pytest.fixture
def port(fake):
    rtmidi = fake(jack=["synth:in"])
    sink = MidiPortSink("synth")
    return sink, rtmidi.outs[-1]


def test_notes_leave_as_midi_on_their_channel(port):
    sink, out = port
    play(sink, note(60, 1.0, 2.0, voice=0, velocity=71), note(64, 1.5, 1.8, voice=9, channel=11, velocity=127))
    assert out.sent == [(0x90, 60, 71), (0x9A, 64, 127), (0x8A, 64, 64), (0x80, 60, 64)]


def test_nothing_sounds_after_close(port):
    sink, out = port
    sink.note_on(note(60, voice=0))
    sink.note_on(note(64, voice=1))
    sink.note_on(note(67, voice=1))
    sink.note_off(note(67, voice=1, offset=2.0))
    out.sent.clear()
    sink.close()
    offs, rest = out.sent[:2], out.sent[2:]
    assert offs == [(0x80, 60, 64), (0x81, 64, 64)], "each sounding note by its own note_off, and first"
    assert rest == [(0xB0, 123, 0), (0xB0, 120, 0), (0xB1, 123, 0), (0xB1, 120, 0)]
    assert out.deleted and out.port is None
    sink.close()
    sink.note_on(note(60))
    sink.status(status())
    assert len(out.sent) == 6, "sent after close"


def test_unison_of_two_voices_on_one_channel_sounds_until_both_have_ended(port):
    sink, out = port
    sink.note_on(note(60, 1.0, voice=0, channel=1))
    sink.note_on(note(60, 1.5, voice=15, channel=1))
    assert out.sent == [(0x90, 60, 70), (0x80, 60, 64), (0x90, 60, 70)], "one open note_on at the receiver"
    out.sent.clear()
    sink.note_off(note(60, 1.0, 2.0, voice=0, channel=1))
    assert out.sent == []
    sink.note_off(note(60, 1.5, 2.5, voice=15, channel=1))
    assert out.sent == [(0x80, 60, 64)]


def test_port_that_fails_says_so_once_and_plays_on_when_it_is_back(fake, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(midi_port.time, "monotonic", lambda: now[0])
    rtmidi = fake(jack=["synth:in"])
    sink = MidiPortSink("synth")
    out = rtmidi.outs[-1]
    sink.note_on(note(60))
    out.broken = True
    with caplog.at_level(logging.WARNING):
        sink.note_on(note(64))
        sink.note_off(note(64, offset=2.0))
        assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["MIDI port 'synth"]
        assert "vanished: error sending" in caplog.text
        numbers = list(rtmidi.systems)
        rtmidi.systems[numbers[0]] = []
        now[0] = 2.5
        sink.status(status())  # not there yet
        assert len(caplog.records) == 1
        rtmidi.systems[numbers[0]] = ["synth:in"]
        sink.status(status())  # looked for just now
        assert len(caplog.records) == 1
        now[0] = 5.0
        sink.status(status())
        assert caplog.records[-1].getMessage() == "MIDI port 'synth:in' (jack) is back"
    assert out.deleted
    sink.note_off(note(60, offset=3.0))  # of before: not sounding there any more
    sink.note_on(note(67))
    assert rtmidi.outs[-1].sent == [(0x90, 67, 70)]


def test_a_port_that_is_back_is_told_of_the_mpe_zone_whatever_was_played_meanwhile(fake, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(midi_port.time, "monotonic", lambda: now[0])
    rtmidi = fake(jack=["synth:in"])
    sink = MidiPortSink("synth", mpe=True)
    sink.note_on(note(60, channel=2))
    told = rtmidi.outs[-1].sent[:-1]  # before the note
    assert len(told) == 10
    rtmidi.outs[-1].broken = True
    sink.note_on(note(62, channel=2))
    sink.note_on(note(64, channel=2))
    now[0] = 2.5
    sink.status(status())
    sink.note_on(note(65, channel=2))
    assert rtmidi.outs[-1].sent == [*told, (0x91, 65, 70)]
    sink.close()


def test_close_survives_a_port_that_fails_only_then(port):
    sink, out = port
    sink.note_on(note(60))
    out.broken = True
    sink.close()
    assert out.deleted


@pytest.mark.parametrize("api", ["jack", "alsa"])
def test_port_that_is_unplugged_without_an_error_is_noticed(fake, monkeypatch, caplog, api):
    now = [0.0]
    monkeypatch.setattr(midi_port.time, "monotonic", lambda: now[0])
    rtmidi = fake(**{api: ["through 14:0", "synth:in 128:0"]})
    sink = MidiPortSink("synth")

    def listed(*names):
        rtmidi.systems[rtmidi.outs[-1].api] = list(names)
        now[0] += 1.5
        sink.status(status())

    listed("synth:in 128:0", "another 130:0")
    if api == "alsa":
        listed("synth renamed:in 128:0")
    with caplog.at_level(logging.WARNING):
        listed("through 14:0", "another two:in 129:0")
        listed("through 14:0")  # said once
    assert [r.getMessage().endswith("it is not listed any more; waiting for it") for r in caplog.records] == [True]
    sink.note_on(note(60))
    sink.close()
    assert rtmidi.outs[-1].sent == [] and rtmidi.outs[-1].deleted


# ---- JSON lines ----


def test_json_lines_are_valid_and_complete_and_status_comes_once_a_second(tmp_path):
    path = tmp_path / "notes.jsonl"
    sink = JsonLinesSink(path)
    sink.note_on(note(60, 1.0 / 3, voice=1))
    assert json.loads(path.read_text()), "a line is not held back"
    sink.note_off(note(60, 1.0 / 3, 2.0, voice=1))
    for tenth in range(35):
        sink.status(status(tenth / 10, level_db=-math.inf))
    sink.close()
    sink.close()
    on, off, *rest = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert on == {
        "type": "note_on", "voice": 1, "channel": 2, "midi": 60, "velocity": 70, "onset": 0.3333, "emitted": 0.4073
    }  # fmt: skip
    assert off == on | {"type": "note_off", "offset": 2.0}
    assert [r["seconds"] for r in rest] == [0, 1, 2, 3]
    assert rest[0] == {
        "type": "status", "seconds": 0, "level_db": None, "sounding": 0, "voices": 2, "latency_ms": 74.0,
        "lost_samples": 0, "overflows": 0, "clipped": 0, "invalid": 0,
    }  # fmt: skip


def test_json_reader_that_goes_away_ends_the_sink_quietly(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as broken:
        monkeypatch.setattr(json_lines.sys, "stdout", broken)
        sink = JsonLinesSink("-")
        sink.note_on(note())
        assert sink.closed
        sink.note_off(note(offset=2.0))
        sink.close()
        broken.flush()  # as Python does at exit: must not complain


def test_json_on_a_full_disk_is_one_error(tmp_path):
    class Full(io.StringIO):
        write = disk_full

    sink = JsonLinesSink(tmp_path / "notes.jsonl")
    sink._file.close()
    sink._file = Full()
    with pytest.raises(UserError, match="notes.jsonl.*No space left"):
        sink.note_on(note())
    sink.note_off(note(offset=2.0))
    sink.close()


def test_json_refuses_bad_places_and_files_that_exist(tmp_path):
    with pytest.raises(UserError, match="no-such-folder"):
        JsonLinesSink(tmp_path / "no-such-folder" / "notes.jsonl")
    path = tmp_path / "notes.jsonl"
    path.write_text("earlier\n")
    with pytest.raises(UserError, match="there already"):
        JsonLinesSink(path)
    assert path.read_text() == "earlier\n"
    JsonLinesSink(path, overwrite=True).close()
    assert path.read_text() == ""


# ---- the terminal ----


def test_note_names():
    names = {0: "C-1", 23: "B0", 54: "F#3", 60: "C4", 69: "A4", 94: "A#6", 127: "G9"}
    assert {midi: note_name(midi) for midi in names} == names


class Screen(io.StringIO):
    """A terminal of 80 x 24 that fails on any code it does not know and on anything that does not fit."""

    def __init__(self, columns=80, rows=24):
        super().__init__()
        self.columns, self.rows = columns, rows
        self.lines, self.row, self.column, self.cursor = [""], 0, 0, True

    def isatty(self):
        return True

    def fileno(self):
        return self

    def write(self, text):
        for code, up, char in re.findall(r"(\x1b\[(?:(\d+)F|\?25[lh]|K|J))|(.|\n)", text):
            if up:
                self.row, self.column = self.row - int(up), 0
                assert self.row >= 0
            elif code == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif code == "\x1b[J":
                self.lines[self.row :] = [self.lines[self.row][: self.column]]
            elif code:
                self.cursor = code.endswith("h")
            elif char == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
                assert len(self.lines) <= self.rows, "the block scrolls"
            else:
                assert char.isprintable()
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
                self.column += 1
                assert self.column < self.columns, "the line wraps"
        return len(text)


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    clock = iter(range(10_000))
    monkeypatch.setattr("realtime_mpe.sinks.terminal.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("realtime_mpe.sinks.terminal.os.get_terminal_size", lambda s: (s.columns, s.rows))
    yield Screen()
    drawn_in_place.clear()  # of sinks that were not closed


def test_terminal_block_is_redrawn_in_place_and_the_cursor_comes_back(screen):
    sink = TerminalSink(screen)
    sink.status(status(0.1, level_db=-math.inf, voices=0))
    assert not screen.cursor and len(screen.lines) == 4
    sink.note_on(note(60, 1.0))
    sink.note_on(note(54, 1.1, voice=10, channel=12))
    sink.status(status(65.0, level_db=-30.0, lost_samples=512, overflows=3))
    header, trouble, _, first, second, below = screen.lines
    assert "1:05" in header and "[##########..........]  -30 dB" in header and "74 ms" in header and below == ""
    assert "lost 512" in trouble and "overflows 3" in trouble
    assert first.split() == ["1", "1", "1", "C4", "C4"] and second.split() == ["11", "12", "1", "F#3", "F#3"]
    sink.note_off(note(60, 1.0, 2.0))
    sink.status(status(66.0))
    assert screen.lines[3].split() == ["1", "1", "1", "C4"], "still in the trail, no longer sounding"
    sink.close()
    sink.close()
    assert screen.cursor and len(screen.lines) == 6


def test_what_is_told_meanwhile_stays_on_the_screen(monkeypatch, screen):
    monkeypatch.setattr("sys.stderr", screen)
    sink = TerminalSink(screen)
    tell("before the first block", "warning")
    sink.status(status(0.1, voices=0))
    tell("the device has gone", "warning")
    sink.note_on(note(60, 1.0))
    sink.status(status(1.0))
    sink.status(status(2.0))
    tell("take.wav", "saved")
    sink.close()
    tell("and after it", "error")
    told = ["warning: before the first block", "warning: the device has gone", "saved: take.wav"]
    assert screen.lines[:3] == [f"rt-mpe: {line}" for line in told]
    assert screen.lines[3].startswith("rt-mpe   0:02") and screen.lines[6].split() == ["1", "1", "1", "C4", "C4"]
    assert screen.lines[7:] == ["rt-mpe: error: and after it", ""] and screen.cursor


def test_terminal_fits_a_small_screen_whatever_is_played(screen):
    rng = np.random.default_rng(0)
    sink = TerminalSink(screen)
    for step in range(300):
        voice = int(rng.integers(0, 1 + step // 6))  # in the end far more voices than rows
        sink.note_on(note(int(rng.choice([61, 63, 66, 68, 70])), float(step), voice=voice, channel=1 + voice % 9))
        sink.status(status(step * 1e4, level_db=float(rng.uniform(-200, 20)), lost_samples=10**12, latency_ms=1e6))
    assert len(screen.lines) == 24
    assert any("voices heard longer ago" in line for line in screen.lines)
    screen.columns, screen.rows = 40, 10  # the window is made smaller; a terminal keeps the lines next to the cursor
    del screen.lines[:14]
    screen.row = 9
    sink.status(status(4e6))
    assert len(screen.lines) == 10 and screen.lines[0].startswith("rt-mpe")
    sink.close()


def test_terminal_is_not_redrawn_more_than_ten_times_a_second(monkeypatch, screen):
    now = [100.0]
    monkeypatch.setattr("realtime_mpe.sinks.terminal.time.monotonic", lambda: now[0])
    sink = TerminalSink(screen)
    draws = []
    sink._draw = lambda draw=sink._draw: (draws.append(now[0]), draw())
    for step in range(2000):  # a file read at full speed: two seconds, 1000 statuses each
        now[0] += 0.001
        sink.status(status(step * 0.1))
    assert 18 <= len(draws) <= 23


@pytest.mark.parametrize("tty", [False, True])
def test_log_lines_have_no_escape_codes(monkeypatch, tty):
    stream = io.StringIO()
    if tty:
        monkeypatch.setenv("TERM", "dumb")
        stream.isatty = lambda: True
    sink = TerminalSink(stream)
    sink.note_on(note(69, 3.4211, voice=1, velocity=71))
    for tenth in range(35, 56):
        sink.status(status(tenth / 10, lost_samples=7))
    sink.note_off(note(69, 3.4211, 5.6, voice=1, velocity=71))
    sink.close()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert stream.getvalue().splitlines() == [
        "    3.42 s  voice 2  ch 2  note_on   A4   vel 71",
        "    4.00 s  level  -23 dB  lost 7 samples  overflows 0  clipped 0  invalid 0",
        "    5.00 s  level  -23 dB  lost 7 samples  overflows 0  clipped 0  invalid 0",
        "    5.60 s  voice 2  ch 2  note_off  A4   after 2.18 s",
    ]


def test_terminal_nobody_looks_at_does_not_stop_the_music():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    sink = TerminalSink(Gone())
    play(sink, note(offset=2.0))
    sink.status(status(9.0))
    sink.close()


def test_terminal_takes_no_argument():
    with pytest.raises(UserError, match="'loud'"):
        TerminalSink("loud")


# ---- the example is the manual, so it must work ----


def test_example_sink_writes_what_its_docstring_says(tmp_path):
    path = Path(__file__).parents[1] / "examples" / "custom_sink.py"
    assert len(path.read_text().splitlines()) <= 30
    spec = importlib.util.spec_from_file_location("custom_sink", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sink = module.CsvSink(str(tmp_path / "notes.csv"))
    play(sink, note(69, 1.0, 2.5, voice=2))
    sink.close()
    sink.close()
    assert (tmp_path / "notes.csv").read_text().split() == ["1.000,2.500,voice", "3,440.0"]
    with pytest.raises(UserError, match="no-such-folder"):
        module.CsvSink(str(tmp_path / "no-such-folder" / "notes.csv"))


# ---- the sound ----


def read_wav(path):
    samples, rate = soundfile.read(path, dtype="float32")
    return samples, rate


def test_the_recorded_sound_is_what_was_heard_to_the_sample_with_silence_for_what_was_lost(tmp_path):
    rng = np.random.default_rng(0)
    heard = [rng.normal(size=n).astype(np.float32) for n in (480, 1, 700)]
    sink = AudioFileSink(tmp_path / "take.wav", 48_000)
    for block, lost in zip(heard, (0, 100, 0), strict=True):
        sink.sound(Block(block, lost), 48_000)
    sink.close()
    sink.close()
    samples, rate = read_wav(tmp_path / "take.wav")
    assert rate == 48_000 and sink.saved
    np.testing.assert_array_equal(samples, np.concatenate([heard[0], np.zeros(100, np.float32), heard[1], heard[2]]))


def test_hours_of_silence_cost_nothing_and_are_there(tmp_path):
    sink = AudioFileSink(tmp_path / "take.wav", 48_000)
    sink.sound(Block(np.ones(10, np.float32)), 48_000)
    begun = time.monotonic()
    sink.sound(Block(np.zeros(0, np.float32), 48_000 * 3600), 48_000)
    sink.close()
    assert time.monotonic() - begun < 1.0
    info = soundfile.info(tmp_path / "take.wav")
    assert info.frames == 10 + 48_000 * 3600
    assert not soundfile.read(tmp_path / "take.wav", start=info.frames - 100)[0].any()


def test_a_killed_program_leaves_a_file_that_lacks_a_second_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(audio_file.time, "monotonic", lambda: now[0])
    sink = AudioFileSink(tmp_path / "take.wav", 1000)
    for _ in range(55):
        sink.sound(Block(np.ones(100, np.float32)), 1000)
        now[0] += 0.1
    samples, _ = read_wav(tmp_path / "take.wav")  # no close
    assert 4500 <= len(samples) <= 5500 and (samples == 1.0).all()


def test_a_device_that_comes_back_at_another_rate_keeps_its_pitch_and_its_time(tmp_path):
    def tone(samplerate, seconds, since):
        time = since + np.arange(round(seconds * samplerate)) / samplerate
        return np.sin(2 * np.pi * 441 * time).astype(np.float32)

    sink = AudioFileSink(tmp_path / "rate.wav", 48_000)
    sink.sound(Block(tone(48_000, 1.0, 0.0)), 48_000)
    sink.sound(Block(np.zeros(0, np.float32), lost=44_100), 44_100)  # a second without it
    for block in np.split(tone(44_100, 1.0, 2.0), 10):
        sink.sound(Block(block), 44_100)
    sink.sound(Block(tone(48_000, 0.5, 3.0)), 48_000)
    sink.sound(Block(tone(16_000, 0.5, 3.5)), 16_000)
    sink.close()
    samples, rate = read_wav(tmp_path / "rate.wav")
    assert (rate, len(samples)) == (48_000, 4 * 48_000)
    expected = tone(48_000, 4.0, 0.0)
    expected[48_000:96_000] = 0.0
    same = np.abs(samples - expected) < 2e-3
    for edge in (1, 2, 3, 3.5, 4):  # where a filter sees silence beyond the end
        same[round(48_000 * edge) - 100 : round(48_000 * edge) + 100] = True
    assert same.all()


def test_a_full_disk_ends_the_recording_and_keeps_what_is_there(tmp_path, monkeypatch, caplog):
    full = AudioFileSink(tmp_path / "full.wav", 48_000)
    full.sound(Block(np.ones(480, np.float32)), 48_000)
    monkeypatch.setattr(full, "_write", disk_full)
    full.sound(Block(np.ones(480, np.float32)), 48_000)
    full.close()
    assert len(read_wav(tmp_path / "full.wav")[0]) == 480
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "No space left" in told[0]


def test_an_earlier_sound_is_kept_and_an_unused_one_leaves_no_file(tmp_path):
    (tmp_path / "take.wav").write_bytes(b"precious")
    for name in ("take.wav", "", "nowhere/take.wav"):
        with pytest.raises(UserError):
            AudioFileSink(tmp_path / name if name else name, 48_000)
    assert (tmp_path / "take.wav").read_bytes() == b"precious"
    AudioFileSink(tmp_path / "other.wav", 48_000).discard()
    assert not (tmp_path / "other.wav").exists()


# ---- OSC ----


def test_notes_leave_as_osc_messages():
    from pythonosc.osc_message import OscMessage

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        sink = OscSink(f"127.0.0.1:{receiver.getsockname()[1]}")
        sink.note_on(note(60, 1.5, voice=2))
        sink.note_off(note(60, 1.5, 2.5, voice=2))
        sink.bend(Bend(note(60, voice=2), -12.5))
        sink.program(Program(2, 3, 41))
        sink.panic()
        sink.close()
        sink.note_on(note(61))
        got = [OscMessage(receiver.recv(1024)) for _ in range(5)]
        receiver.settimeout(0.1)
        with pytest.raises(TimeoutError):
            receiver.recv(1024)
    assert [(m.address, list(m.params)) for m in got] == [
        ("/rt-mpe/note_on", [3, 3, 60, 70, 1.5]),
        ("/rt-mpe/note_off", [3, 3, 60, 2.5]),
        ("/rt-mpe/bend", [3, 60, -12.5]),
        ("/rt-mpe/program", [3, 3, 41]),
        ("/rt-mpe/panic", []),
    ]


@pytest.mark.parametrize("address", ["", "9000", "host", "host:", "host:0", "host:70000", ":9000", "host:nine"])
def test_an_address_that_is_none_is_one_line(address):
    with pytest.raises(UserError) as error:
        OscSink(address)
    assert "HOST:PORT" in one_line(error)


# ---- a port a voice ----


def test_every_voice_plays_on_a_port_of_its_own(fake):
    rtmidi = fake(jack=[])
    sink = SplitPortsSink("band", voices=3)
    assert [out.port for out in rtmidi.outs] == ["virtual band 1", "virtual band 2", "virtual band 3"]
    play(sink, note(60, voice=0, offset=2.0), note(64, voice=2, offset=2.0))
    sink.program(Program(1, 2, 10))
    assert [bool(out.sent) for out in rtmidi.outs] == [True, True, True]
    assert rtmidi.outs[0].sent[0] == (0x90, 60, 70) and rtmidi.outs[2].sent[0] == (0x92, 64, 70)
    sink.panic()
    sink.close()
    assert all(out.deleted for out in rtmidi.outs)


def test_ports_are_left_when_the_jack_server_dies_and_offered_again(fake, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(midi_port.time, "monotonic", lambda: now[0])
    rtmidi = fake(jack=[])
    sink = SplitPortsSink("band", voices=2)
    sink.note_on(note(60))
    sink.interrupted("ALSA")
    assert not any(out.deleted for out in rtmidi.outs), "the device was not JACK's"
    sink.interrupted("JACK Audio Connection Kit")
    assert all(out.deleted for out in rtmidi.outs)
    sink.note_on(note(62))
    now[0] = 5.0
    sink.status(status())
    assert [out.port for out in rtmidi.outs[2:]] == ["virtual band 1", "virtual band 2"]
    sink.note_on(note(64))
    assert rtmidi.outs[2].sent == [(0x90, 64, 70)]
