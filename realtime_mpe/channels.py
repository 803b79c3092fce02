"""Voices to MIDI channels: every player keeps a channel of their own for as long as there are channels.

`MpeZone` is the other way, a channel a note, for synthesisers that want MIDI Polyphonic Expression.
"""

from collections import Counter
from collections.abc import Mapping

from .errors import UserError

DRUMS = 10  # General MIDI plays channel 10 as percussion, whatever note arrives
CHANNELS = tuple(channel for channel in range(1, 17) if channel != DRUMS)


class ChannelMap:
    """Gives each voice a MIDI channel, 1..16 as people count them and never 10, unless ``fixed`` says so.

    fixed : voice -> channel that the user has chosen; UserError if it is none.

    The other voices own the channels that are left, from 1 on. A voice for which none is left has to share: it keeps
    the channel it had last while nobody else sounds there, else it takes the least recently used channel without a
    sounding note, else the one with the fewest. While a voice sounds, its channel does not change.

    MIDI cannot tell two equal pitches on one channel apart, so they are counted, and the pitch ends with the last one.
    """

    def __init__(self, fixed: Mapping[int, int] | None = None) -> None:
        self._own: dict[int, int] = {}
        for voice, channel in (fixed or {}).items():
            self.assign(voice, channel)
        self._left = [channel for channel in CHANNELS if channel not in self._own.values()]
        self._mapped = tuple(self._own)
        self.reset()

    def assign(self, voice: int, channel: int) -> None:
        """From its next note on, when none sounds, a voice has this channel, and may share it."""
        if not 1 <= channel <= 16:
            raise UserError(f"there is no MIDI channel {channel}; choose 1 to 16")
        self._own[voice] = channel

    def of(self, voice: int) -> int | None:
        """The channel that a voice owns; None if it has to share."""
        if voice in self._own:
            return self._own[voice]
        before = sum(mapped < voice for mapped in self._mapped)
        return self._left[voice - before] if voice - before < len(self._left) else None

    def reset(self) -> None:
        """Forget every voice and every sounding note; equals a new object."""
        self._channel: dict[int, int] = {}  # of each voice: where it sounds, or sounded last
        self._sounding: Counter[tuple[int, int]] = Counter()  # (voice, midi) -> note_on without note_off
        self._last_used = dict.fromkeys(CHANNELS, 0)  # channel -> turn of its last message
        self._turn = 0

    def note_on(self, voice: int, midi: int) -> int:
        """Count the note in and return its channel. voice : 0-based; ValueError if negative."""
        if voice < 0:
            raise ValueError(f"voices are numbered from 0, not {voice}")
        if self._load(voice=voice):
            channel = self._channel[voice]
        else:
            channel = self.of(voice) or self._share(voice)
        self._channel[voice] = channel
        self._sounding[voice, midi] += 1
        self._touch(channel)
        return channel

    def note_off(self, voice: int, midi: int) -> int | None:
        """Count the note out; return the channel if the pitch ends there, None if it still sounds in a shared channel.

        ValueError if this voice does not sound this pitch: on and off come in pairs.
        """
        if not self._sounding[voice, midi]:
            raise ValueError(f"voice {voice} has no sounding note {midi} to end")
        channel = self._channel[voice]
        self._sounding[voice, midi] -= 1
        if not self._sounding[voice, midi]:
            del self._sounding[voice, midi]
        self._touch(channel)
        return None if self._load(channel=channel, midi=midi) else channel

    def _share(self, voice: int) -> int:
        last = self._channel.get(voice)
        if last is not None and not self._load(channel=last):
            return last
        return min(CHANNELS, key=lambda channel: (self._load(channel=channel), self._last_used[channel]))

    def _touch(self, channel: int) -> None:
        self._turn += 1
        self._last_used[channel] = self._turn

    def _load(self, voice: int | None = None, channel: int | None = None, midi: int | None = None) -> int:
        """Sounding notes of this voice, on this channel, at this pitch (None: any)."""
        return sum(
            count
            for (v, m), count in self._sounding.items()
            if voice in (None, v) and channel in (None, self._channel[v]) and midi in (None, m)
        )


class MpeZone:
    """A lower zone of MIDI Polyphonic Expression: channel 1 leads, and each note has one of 2..16 to itself.

    The interface is that of `ChannelMap`. The member channel that has rested longest is taken, so that a release is not
    bent by the next note; with more than fifteen notes the newest shares the channel that sounds longest.
    """

    MEMBERS = tuple(range(2, 17))

    def __init__(self) -> None:
        self._rested = list(self.MEMBERS)  # the channel that is next comes first
        self._sounding: list[tuple[int, int, int]] = []  # voice, midi, channel, the oldest first

    def note_on(self, voice: int, midi: int) -> int:
        """The channel of a note that begins."""
        channel = self._rested.pop(0) if self._rested else self._sounding[0][2]
        self._sounding.append((voice, midi, channel))
        return channel

    def note_off(self, voice: int, midi: int) -> int | None:
        """The channel of the oldest such note, which ends; ValueError if there is none."""
        for place, (own, pitch, channel) in enumerate(self._sounding):
            if (own, pitch) == (voice, midi):
                del self._sounding[place]
                if all(channel != other for *_, other in self._sounding):
                    self._rested.append(channel)
                return channel
        raise ValueError(f"voice {voice} has no sounding note {midi} to end")


def parse_map(text: str) -> dict[int, int]:
    """The text "1=3,2=10", as people count, to {0: 3, 1: 10}; UserError if it is not of this form."""
    found: dict[int, int] = {}
    for pair in text.split(","):
        voice, equals, channel = pair.partition("=")
        if not (equals and voice.strip().isdecimal() and channel.strip().isdecimal() and int(voice) >= 1):
            raise UserError(f"{pair!r} maps no voice to a channel; write VOICE=CHANNEL, as in 1=3,2=4")
        found[int(voice) - 1] = int(channel)
    return found
