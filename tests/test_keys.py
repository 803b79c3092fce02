"""Risks: keys that do nothing, a terminal that is left without an echo, a program in the background that is stopped."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
termios = pytest.importorskip("termios")


class Screen:
    """`rt-mpe listen` on a terminal of its own."""

    def __init__(self, *words):
        self.end, terminal = pty.openpty()
        self.before = termios.tcgetattr(terminal)
        # In a session of its own with this terminal in control: else it would not be in the foreground.
        program = (
            "import os, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "from realtime_mpe.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "listen", *map(str, words)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        self.terminal = terminal
        self.shown = ""
        os.set_blocking(self.end, False)

    def read(self):
        try:
            self.shown += os.read(self.end, 65_536).decode(errors="replace")
        except (BlockingIOError, OSError):
            pass
        return self.shown

    def wait_for(self, pattern, seconds=10.0):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.read()):
            assert time.monotonic() < end and self.process.poll() is None, self.shown[-2000:]
            time.sleep(0.02)

    def press(self, keys):
        os.write(self.end, keys.encode())

    def ends(self, seconds=5.0):
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < end, "still running"
            time.sleep(0.02)
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.end)
        os.close(self.terminal)


@pytest.fixture
def screen(tiny_model, tmp_path, tune):
    soundfile.write(tmp_path / "long.wav", np.tile(tune(), 10), 16_000)
    screen = Screen("--source", f"file:{tmp_path / 'long.wav'}", "--model", tiny_model, "--osc", "127.0.0.1:9")
    yield screen
    screen.close()


def test_q_ends_and_gives_the_terminal_back(screen):
    screen.wait_for("q quit")
    assert not termios.tcgetattr(screen.terminal)[3] & termios.ICANON, "keys are not read one by one"
    screen.press("q")
    assert screen.ends() == 0
    assert termios.tcgetattr(screen.terminal) == screen.before


def test_a_digit_mutes_a_voice_and_unmutes_it(screen):
    screen.wait_for(r"\n +1 ")
    screen.press("1")
    screen.wait_for("mute 1")
    screen.shown = ""
    screen.press("1 ")  # and the space, which silences, must not end anything
    screen.wait_for(r"\n +1 ")
    screen.press("q")
    assert screen.ends() == 0


def test_ctrl_c_still_ends_in_order_and_gives_the_terminal_back(screen):
    screen.wait_for("q quit")
    screen.press("\x03")
    assert screen.ends() == 0
    assert termios.tcgetattr(screen.terminal) == screen.before


def test_without_a_terminal_there_are_no_keys(tiny_model, tune_wav):
    command = [sys.executable, "-m", "realtime_mpe.cli", "listen", "--source", f"file:{tune_wav}"]
    ended = subprocess.run(
        [*command, "--model", tiny_model], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 0 and "q quit" not in ended.stdout
