"""Risks: a player's notes on the drum channel, a channel that changes under a sounding note, notes that never end."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_mpe.channels import CHANNELS, ChannelMap


def test_first_fifteen_voices_own_a_channel_each_and_never_the_drums():
    channels = ChannelMap()
    assert [channels.note_on(voice, 60) for voice in range(15)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16]


def test_late_voice_takes_the_least_recently_used_free_channel():
    channels = ChannelMap()
    for voice in range(15):
        channels.note_on(voice, 60)
    for voice in (4, 2, 7):  # channels 5, 3, 8, in this order
        channels.note_off(voice, 60)
    assert channels.note_on(15, 50) == 5
    assert channels.note_on(16, 50) == 3
    assert channels.note_on(17, 50) == 8


def test_late_voice_takes_the_least_loaded_channel_when_none_is_free():
    channels = ChannelMap()
    for voice in range(15):
        for midi in (60, 64, 67):
            channels.note_on(voice, midi)
    channels.note_off(6, 64)
    assert channels.note_on(15, 50) == 7


def test_late_voice_comes_back_to_its_channel_while_nobody_sounds_there():
    channels = ChannelMap()
    for voice in range(15):
        channels.note_on(voice, 60)
    channels.note_off(3, 60)
    assert channels.note_on(15, 50) == 4
    channels.note_off(15, 50)
    channels.note_off(8, 60)
    assert channels.note_on(15, 52) == 4, "a free channel is no reason to move"
    channels.note_off(15, 52)
    channels.note_on(3, 60)  # the owner is back
    assert channels.note_on(15, 53) == 9


def test_unison_on_a_shared_channel_ends_with_the_last_voice():
    channels = ChannelMap()
    for voice in range(15):
        channels.note_on(voice, 60)
    shared = channels.note_on(15, 60)
    assert shared == 1
    assert channels.note_off(15, 60) is None
    assert channels.note_off(0, 60) == 1


def test_the_same_pitch_on_two_channels_ends_on_both():
    channels = ChannelMap()
    channels.note_on(0, 60)
    channels.note_on(1, 60)
    assert (channels.note_off(0, 60), channels.note_off(1, 60)) == (1, 2)


def test_note_off_without_note_on_is_refused():
    channels = ChannelMap()
    channels.note_on(0, 60)
    for voice, midi in ((0, 61), (1, 60)):
        with pytest.raises(ValueError, match=f"voice {voice} has no sounding note {midi}"):
            channels.note_off(voice, midi)
    with pytest.raises(ValueError, match="-1"):
        channels.note_on(-1, 60)


events = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(60, 62)), max_size=300)


@given(events)
def test_any_order_of_notes_keeps_the_promises(steps):
    channels = ChannelMap()
    sounding: list[tuple[int, int, int]] = []  # the model: (voice, midi, channel), as a receiver would have to know
    for start, pick, midi in steps:
        if start or not sounding:
            voice = pick
            channel = channels.note_on(voice, midi)
            load = Counter(c for _, _, c in sounding)
            assert channel in CHANNELS and channel != 10
            assert all(c == channel for v, _, c in sounding if v == voice), "moved while sounding"
            if voice < 15:
                assert channel == CHANNELS[voice]
            elif not any(v == voice for v, _, _ in sounding):
                assert load[channel] == min(load[c] for c in CHANNELS)
            sounding.append((voice, midi, channel))
        else:
            voice, midi, channel = sounding.pop(pick % len(sounding))
            still = any((m, c) == (midi, channel) for _, m, c in sounding)
            assert channels.note_off(voice, midi) == (None if still else channel)
    channels.reset()
    fresh = ChannelMap()
    assert [channels.note_on(v, 60) for v in range(40)] == [fresh.note_on(v, 60) for v in range(40)]
