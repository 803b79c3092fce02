"""Risks: a muted voice that is heard, a note that hangs since the desk was moved under it, bends of the wrong note."""

import numpy as np
import pytest

from realtime_mpe.analysis import FIRST_MIDI, SAMPLERATE, AnalysisConfig
from realtime_mpe.bend import cents
from realtime_mpe.channels import ChannelMap, MpeZone, parse_map
from realtime_mpe.cqt import StreamingCqt
from realtime_mpe.desk import GM_PROGRAMS, Desk, Strip, parse_programs
from realtime_mpe.errors import UserError
from realtime_mpe.events import Bend, Note, Program
from realtime_mpe.sinks.base import NoteSink
from realtime_mpe.sinks.midi_port import MidiPortSink


class Heard(NoteSink):
    def __init__(self):
        self.log = []

    def note_on(self, note):
        self.log.append(("on", note.voice, note.channel, note.midi))

    def note_off(self, note):
        assert note.offset is not None
        self.log.append(("off", note.voice, note.channel, note.midi))

    def bend(self, bend):
        self.log.append(("bend", bend.note.channel, bend.cents))

    def program(self, program):
        self.log.append(("program", program.channel, program.number))

    def panic(self):
        self.log.append("panic")

    def took(self):
        log, self.log = self.log, []
        return log


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def desk(heard):
    return Desk([heard], ChannelMap(), pytest.fail)


def note(midi=60, voice=0, onset=1.0, channel=None):
    return Note(midi, 70, voice, channel or voice + 1, onset, onset)


def off(on):
    return Note(on.midi, on.velocity, on.voice, on.channel, on.onset, on.emitted, on.onset + 1.0)


def test_an_untouched_desk_passes_everything_on(desk, heard):
    desk.note_on(note())
    desk.note_off(off(note()))
    assert heard.took() == [("on", 0, 1, 60), ("off", 0, 1, 60)]


def test_muting_ends_what_sounds_and_keeps_silent_until_the_next_note(desk, heard):
    desk.note_on(note(60, 0))
    desk.note_on(note(64, 1))
    heard.took()
    desk.change(0, mute=True)
    assert heard.took() == [], "only the thread that plays may send"
    desk.apply()
    assert heard.took() == [("off", 0, 1, 60)]
    desk.note_off(off(note(60, 0)))
    desk.note_on(note(62, 0))
    desk.change(0, mute=False)
    desk.apply()
    desk.note_off(off(note(62, 0)))
    assert heard.took() == [], "a note that began unheard stays so"
    desk.note_on(note(65, 0))
    assert heard.took() == [("on", 0, 1, 65)]


def test_solo_silences_the_others_and_wins_over_mute(desk, heard):
    desk.note_on(note(64, 1))
    desk.change(0, solo=True, mute=True)
    desk.apply()
    assert heard.took() == [("on", 1, 2, 64), ("off", 1, 2, 64)]
    assert desk.audible(0) and not desk.audible(1)


def test_a_transposed_note_ends_where_it_began_and_impossible_ones_are_left_out(desk, heard):
    desk.change(0, transpose=12)
    desk.apply()
    desk.note_on(note(60))
    desk.change(0, transpose=0)
    desk.apply()
    desk.note_off(off(note(60)))
    assert heard.took() == [("on", 0, 1, 72), ("off", 0, 1, 72)]
    desk.change(0, transpose=48)
    desk.note_on(note(90))
    desk.note_off(off(note(90)))
    assert heard.took() == []


def test_panic_ends_each_note_once_and_lets_the_next_ones_sound(desk, heard):
    desk.note_on(note(60))
    desk.silence()
    desk.apply()
    desk.note_off(off(note(60)))
    desk.note_on(note(62))
    assert heard.took() == [("on", 0, 1, 60), ("off", 0, 1, 60), "panic", ("on", 0, 1, 62)]


def test_close_leaves_nothing_sounding(desk, heard):
    desk.note_on(note(60))
    desk.close()
    desk.close()
    assert heard.took()[1:] == [("off", 0, 1, 60)]


def test_programs_are_sent_before_a_voices_first_note_and_after_changes_and_panic(heard):
    desk = Desk([heard], ChannelMap(), pytest.fail, programs=(41, 72))
    for voice in (0, 0, 1, 2):
        desk.note_on(note(60 + voice, voice))
        desk.note_off(off(note(60 + voice, voice)))
    assert [e for e in heard.took() if e[0] == "program"] == [("program", 1, 41), ("program", 2, 72)]
    desk.change(0, program=5)
    desk.silence()
    desk.apply()
    desk.note_on(note(60, 0))
    desk.note_on(note(61, 1))
    assert [e for e in heard.took() if e[0] == "program"] == [("program", 1, 5), ("program", 2, 72)]
    assert parse_programs("") == GM_PROGRAMS and parse_programs("1, 128") == (1, 128)
    for wrong in ("0", "129", "piano", "1,,2"):
        with pytest.raises(UserError, match="choose numbers from 1 to 128"):
            parse_programs(wrong)


@pytest.mark.parametrize("change", [{"transpose": 49}, {"program": 0}, {"program": 129}])
def test_impossible_settings_are_refused_where_they_are_made(desk, change):
    with pytest.raises(UserError):
        desk.change(0, **change)
    assert desk.strip(0) == Strip()


def test_only_a_note_alone_on_its_channel_is_bent_and_the_next_begins_unbent(desk, heard):
    first, second = note(60), note(64)
    desk.note_on(first)
    desk.bend(Bend(first, 20.0))
    desk.note_on(second)
    assert heard.took() == [("on", 0, 1, 60), ("bend", 1, 20.0), ("bend", 1, 0.0), ("on", 0, 1, 64)]
    desk.bend(Bend(first, 30.0))
    assert heard.took() == []
    desk.note_off(off(second))
    desk.bend(Bend(first, 30.0))
    desk.note_off(off(first))
    desk.note_on(second)
    assert heard.took() == [("off", 0, 1, 64), ("bend", 1, 30.0), ("off", 0, 1, 60), ("bend", 1, 0.0), ("on", 0, 1, 64)]
    desk.bend(Bend(note(99), 10.0))  # of a note that is not sent
    assert heard.took() == []


def test_a_voice_that_has_bent_a_channel_is_brought_back_wherever_it_plays(heard):
    """With a port a voice, channel 2 of one port is not that of another."""
    voices = []
    heard.bend = lambda bend: voices.append((bend.note.voice, bend.cents))
    desk = Desk([heard], MpeZone(), pytest.fail)
    first, second = note(60, 0, channel=2), note(60, 1, channel=2)
    desk.note_on(first)
    desk.bend(Bend(first, 20.0))
    desk.note_off(off(first))
    desk.note_on(second)
    assert voices == [(0, 20.0), (0, 0.0)]


def test_a_note_that_begins_at_the_new_pitch_before_the_change_is_carried_out_goes_on(desk, heard):
    desk.note_on(note(60))
    desk.change(0, transpose=12)
    desk.note_on(note(64))
    desk.apply()
    assert heard.took() == [("on", 0, 1, 60), ("on", 0, 1, 76), ("off", 0, 1, 60)]


# Channels


def test_mapped_voices_have_their_channels_and_the_others_what_is_left():
    channels = ChannelMap(parse_map("1=3, 2=10"))
    assert [channels.note_on(voice, 60) for voice in range(5)] == [3, 10, 1, 2, 4]
    for wrong in ("1", "1=", "a=1", "0=1", "1=17", "1=0", ""):
        with pytest.raises(UserError, match="VOICE=CHANNEL|choose 1 to 16"):
            ChannelMap(parse_map(wrong))


def test_a_channel_assigned_while_the_voice_sounds_waits_for_its_next_note():
    channels = ChannelMap()
    assert channels.note_on(0, 60) == 1
    channels.assign(0, 9)
    assert channels.note_on(0, 62) == 1
    assert channels.note_off(0, 60) == 1 and channels.note_off(0, 62) == 1
    assert channels.note_on(0, 60) == 9
    assert channels.note_on(1, 60) == 2, "nobody else moves"


def test_an_mpe_zone_gives_every_note_a_channel_and_reuses_the_longest_rested():
    zone = MpeZone()
    assert [zone.note_on(0, 40 + k) for k in range(15)] == list(range(2, 17))
    assert zone.note_on(1, 70) == 2, "all are taken: the oldest shares"
    assert zone.note_off(0, 41) == 3
    assert zone.note_off(0, 40) == 2  # still sounds another
    assert zone.note_on(0, 80) == 3
    assert zone.note_off(1, 70) == 2
    assert zone.note_on(0, 81) == 2
    with pytest.raises(ValueError):
        zone.note_off(5, 5)


# What leaves by a MIDI port


class Wire:
    def __init__(self, monkeypatch, mpe):
        self.sent = []
        monkeypatch.setattr("realtime_mpe.sinks.midi_port._open_port", lambda name, api: ("synth", "alsa", self))
        self.sink = MidiPortSink("synth", mpe=mpe)

    def send_message(self, message):
        self.sent.append(tuple(message))


def parameters(sent):
    """(channel, parameter, value) of registered parameters, in order, by the rules of the MIDI specification."""
    chosen, found = {}, []
    for status, *data in sent:
        if status & 0xF0 == 0xB0:
            channel, (control, value) = (status & 0x0F) + 1, data
            if control in (100, 101):
                chosen[channel, control] = value
            elif control == 6 and chosen.get((channel, 101)) == 0:
                found.append((channel, chosen[channel, 100], value))
    return found


def test_the_wheel_turns_as_far_as_the_range_that_was_set(monkeypatch):
    wire = Wire(monkeypatch, mpe=False)
    wire.sink.note_on(note(60, 2))
    for value in (0.0, 50.0, -200.0, 300.0):
        wire.sink.bend(Bend(note(60, 2), value))
    assert parameters(wire.sent) == [(3, 0, 2)], "two semitones, once"
    wheel = [low | high << 7 for status, low, high in (m for m in wire.sent if m[0] & 0xF0 == 0xE0)]
    assert wheel == [8192, 8192 + 2048, 0, 16383]


def test_an_mpe_zone_is_announced_before_its_first_note(monkeypatch):
    wire = Wire(monkeypatch, mpe=True)
    wire.sink.note_on(note(60, channel=2))
    wire.sink.note_on(note(64, channel=3))
    assert parameters(wire.sent) == [(1, 6, 15), (2, 0, 48), (3, 0, 48)]
    first = next(k for k, m in enumerate(wire.sent) if m[0] & 0xF0 == 0x90)
    assert len(parameters(wire.sent[:first])) == 2
    wire.sink.bend(Bend(note(60, channel=2), 50.0))
    assert wire.sent[-1] == (0xE1, (8192 + 85) & 0x7F, (8192 + 85) >> 7)


def test_a_program_is_counted_from_one_by_people_and_from_zero_by_midi(monkeypatch):
    wire = Wire(monkeypatch, mpe=False)
    wire.sink.program(Program(0, 5, 41))
    assert wire.sent == [(0xC4, 40)]


def test_panic_silences_all_sixteen_channels(monkeypatch):
    wire = Wire(monkeypatch, mpe=False)
    wire.sink.panic()
    assert {(m[0], m[1]) for m in wire.sent} == {(0xB0 | c, control) for c in range(16) for control in (120, 123)}


# How far off pitch


def tone(midi, deviation, seconds=1.6):
    """Ten harmonics; deviation in cents over time (n,) s."""
    t = np.arange(round(seconds * SAMPLERATE)) / SAMPLERATE
    frequency = 440.0 * 2.0 ** ((midi + deviation(t) / 100 - 69) / 12)
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLERATE
    partials = [np.sin(k * phase) / k for k in range(1, 11) if k * frequency.max() < 7_500]
    return (0.1 * np.sum(partials, 0)).astype(np.float32)


@pytest.mark.parametrize("midi", [36, 43, 50, 57, 64, 71, 78, 84])
def test_detuning_is_measured_over_the_pitch_range(midi):
    for deviation in (-35, -15, 0, 15, 35):
        frames = StreamingCqt(AnalysisConfig()).process(tone(midi, lambda t, d=deviation: d + 0 * t))
        found = [cents(frame, midi - FIRST_MIDI) for frame in frames[15:45]]
        assert np.mean(found) == pytest.approx(deviation, abs=10)


@pytest.mark.parametrize("midi", [48, 62, 76])
def test_vibrato_is_followed(midi):
    frames = StreamingCqt(AnalysisConfig()).process(tone(midi, lambda t: 30 * np.sin(2 * np.pi * 5.5 * t), 3.0))
    found = np.array([cents(frame, midi - FIRST_MIDI) for frame in frames])[15:]
    time = (np.arange(len(found)) + 16) * 0.032
    likeness = max(np.corrcoef(found, np.sin(2 * np.pi * 5.5 * (time - lag)))[0, 1] for lag in np.arange(0, 0.1, 0.005))
    assert likeness > 0.95 and 20 < np.std(found) * np.sqrt(2) < 40


def test_silence_has_no_pitch():
    assert cents(np.zeros(AnalysisConfig().n_bins, np.float32), 30) is None
