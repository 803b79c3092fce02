"""Voices to MIDI channels: every player keeps a channel of their own for as long as there are channels."""

from collections import Counter

DRUMS = 10  # General MIDI plays channel 10 as percussion, whatever note arrives
CHANNELS = tuple(channel for channel in range(1, 17) if channel != DRUMS)


class ChannelMap:
    """Gives each voice a MIDI channel, 1..16 as people count them and never 10.

    Voices 0..14 own channels 1..9 and 11..16. A 16th voice and later have to share: such a voice keeps the channel it
    had last while nobody else sounds there, else it takes the least recently used channel without a sounding note, else
    the one with the fewest. While a voice sounds, its channel does not change.

    MIDI cannot tell two equal pitches on one channel apart, so they are counted, and the pitch ends with the last one.
    """

    def __init__(self) -> None:
        self.reset()

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
        if voice < len(CHANNELS):
            channel = CHANNELS[voice]
        elif self._load(voice=voice):
            channel = self._channel[voice]
        else:
            channel = self._share(voice)
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
