"""Single keys of the terminal, while a performance runs: q ends it, space silences, a digit mutes a voice.

They are read by a thread that sleeps until one is pressed, and only where somebody can press one: standard input must
be a terminal, and this program in its foreground.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from .desk import Desk
from .source import AudioSource

HELP = "q quit  space silence  1-9 mute"


class Console:
    """What each key does."""

    def __init__(self, source: AudioSource, desk: Desk):
        self._source, self._desk = source, desk

    def press(self, key: str) -> None:
        if key in "qQ":
            self._source.stop()
        elif key == " ":
            self._desk.silence()
        elif key in "123456789":
            voice = int(key) - 1
            self._desk.change(voice, mute=not self._desk.strip(voice).mute)


class Keys:
    """press : called with every character, from another thread. Use as a context; the terminal is as before after it.

    ``working`` : whether there are keys to press.
    """

    def __init__(self, press: Callable[[str], None]):
        self._press = press
        self.working = _somebody_there()

    def __enter__(self) -> "Keys":
        if self.working:
            self._open()
        return self

    def __exit__(self, *exc_info) -> None:
        if self.working:
            self._close()

    if os.name == "nt":

        def _open(self) -> None:
            self._ended = threading.Event()
            threading.Thread(target=self._read, daemon=True).start()

        def _read(self) -> None:
            import msvcrt

            while not self._ended.wait(0.05):  # a Windows console has nothing to sleep on
                while msvcrt.kbhit():
                    self._press(msvcrt.getwch())

        def _close(self) -> None:
            self._ended.set()

    else:

        def _open(self) -> None:
            import termios
            import tty

            self._terminal = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal)  # Ctrl-C stays a signal
            self._wake, self._ended = os.pipe()
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()

        def _read(self) -> None:
            import select

            while True:
                ready, _, _ = select.select([self._terminal, self._wake], [], [])
                if self._wake in ready:
                    return
                if not _somebody_there():  # in the background, where reading would stop the whole program
                    time.sleep(0.2)
                    continue
                pressed = os.read(self._terminal, 64)
                if not pressed:  # the terminal has been closed
                    return
                for key in pressed.decode(errors="ignore"):
                    self._press(key)

        def _close(self) -> None:
            import termios

            os.write(self._ended, b".")
            self._thread.join(1.0)
            for end in (self._wake, self._ended):
                os.close(end)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # which stops who does this in the background
            try:
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)
            except termios.error:
                pass  # it is gone
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTTOU})


def _somebody_there() -> bool:
    try:
        if not sys.stdin.isatty():
            return False
        return os.name == "nt" or os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # no standard input at all
        return False
