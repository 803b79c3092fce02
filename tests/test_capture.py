"""Risks: a note that hangs while the device is away, one that returns unheard, a child that outlives its parent."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from realtime_mpe import capture
from realtime_mpe.capture import Capture, Shortfall
from realtime_mpe.errors import UserError
from realtime_mpe.source import DeviceLost

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture
def devices(tmp_path, monkeypatch):
    """A folder in which a file is a device."""
    folder = tmp_path / "devices"
    folder.mkdir()
    (folder / "Mic One").write_text("48000 1")
    (folder / "Line").write_text("44100 2")
    monkeypatch.setenv("FAKE_DEVICES", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(FAKES), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setattr(capture, "RETRY_SECONDS", 0.1)
    return folder


def test_samples_arrive_whole_and_in_order_from_another_process(devices):
    with Capture("mic") as source:
        assert (source.name, source.samplerate, source.duration, source.latency) == ("Mic One", 48_000, None, 0.01)
        heard = []
        for block in source.blocks():
            assert block.lost == 0 and block.samples.dtype == np.float32
            heard.append(block.samples)
            if sum(map(len, heard)) > 12_000:
                break
    heard = np.concatenate(heard)
    expected = 0.1 * np.sin(2 * np.pi * 440 * np.arange(len(heard)) / 48_000)
    np.testing.assert_allclose(heard, expected, atol=1e-6)


def test_a_block_says_in_any_process_when_it_came(devices):
    with Capture("mic") as source:
        before = time.monotonic()
        blocks = source.blocks()
        first = next(blocks)
        time.sleep(0.5)
        second = next(blocks)  # it has waited meanwhile
    assert before < first.came <= second.came < time.monotonic() - 0.2


def test_what_is_wrong_with_a_choice_is_told_as_in_one_process(devices):
    with pytest.raises(UserError, match="device 'violin' is unknown.*1: Mic One, Fake"):
        Capture("violin")
    with pytest.raises(UserError, match="no channel 2"):
        Capture("mic", channel=2)
    with pytest.raises(UserError, match="-1 s for a lost device"):
        Capture("mic", wait=-1)


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("rate", [48_000, 32_000])
def test_a_lost_device_is_reported_at_once_and_heard_again_when_it_is_back(devices, caplog, rate):
    """It comes back with another number, and in one case at another rate."""
    (devices / "Line").unlink()
    with Capture("0") as source:
        blocks = source.blocks()
        assert len(next(blocks).samples)
        (devices / "Mic One").unlink()
        gone = time.monotonic()
        gap = next(block for block in blocks if block.lost)
        assert not len(gap.samples) and time.monotonic() - gone < 2.0

        def return_later():
            (devices / "Another").write_text("44100 1")
            (devices / "Mic One").write_text(f"{rate} 1")

        timer = threading.Timer(1.0, return_later)
        timer.start()
        back = next(block for block in blocks if block.lost)  # and until then empty ones, that keep the show alive
        away = time.monotonic() - gone
        assert len(back.samples) and back.lost / rate == pytest.approx(away, abs=1.0)
        assert source.samplerate == rate and source.name == "Mic One"
        assert len(next(blocks).samples)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "has gone; waiting for it" in told[0] and "is back after" in told[1]


def test_waiting_ends_when_it_was_told_to(devices):
    for wait in (0.0, 0.5):
        (devices / "Mic One").write_text("48000 1")
        with Capture("mic", wait=wait) as source:
            blocks = source.blocks()
            next(blocks)
            (devices / "Mic One").unlink()
            begun = time.monotonic()
            with pytest.raises(DeviceLost, match="has gone"):
                list(blocks)
            assert wait < time.monotonic() - begun < wait + 3.0


def test_a_sound_system_that_crashes_takes_only_its_own_process(devices):
    with Capture("mic") as source:
        blocks = source.blocks()
        next(blocks)
        source._child._process.kill()
        assert not len(next(block for block in blocks if block.lost).samples)
        assert 0 < next(block for block in blocks if len(block.samples)).lost < 96_000


def test_a_sound_system_that_hangs_is_left_alone(devices, monkeypatch):
    monkeypatch.setattr(capture, "DEAF_SECONDS", 0.6)
    with Capture("mic") as source:
        blocks = source.blocks()
        next(blocks)
        os.kill(source._child._process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        next(block for block in blocks if block.lost)
        assert time.monotonic() - begun < 3.0
        assert len(next(block for block in blocks if len(block.samples)).samples)


def test_an_interrupt_while_a_device_opens_leaves_no_process_behind(devices, monkeypatch):
    monkeypatch.setenv("FAKE_HANG", "60")
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(capture.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pressed = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Capture("mic")
    finally:
        pressed.join()
        signal.signal(signal.SIGINT, before)
    assert started[0].wait(5.0) != 0


def test_the_show_goes_on_while_the_device_is_away(devices):
    with Capture("mic") as source:
        blocks = source.blocks()
        next(blocks)
        (devices / "Mic One").unlink()
        next(block for block in blocks if block.lost)
        begun = time.monotonic()
        for _ in range(5):
            nothing = next(blocks)
            assert not len(nothing.samples) and not nothing.lost
        assert time.monotonic() - begun < 5.0


def test_a_device_that_opens_but_does_not_start_is_an_error_at_once(devices, monkeypatch):
    monkeypatch.setenv("FAKE_START_ERROR", "Device unavailable")
    with (
        Capture("mic") as source,
        pytest.raises(UserError, match="cannot be started.*Device unavailable.*no other program"),
    ):
        next(source.blocks())


def test_the_number_of_a_card_is_not_part_of_its_name(devices, monkeypatch):
    (devices / "Mic One").rename(devices / "USB Audio (hw:1,0)")
    with Capture("usb") as source:
        blocks = source.blocks()
        next(blocks)
        (devices / "USB Audio (hw:1,0)").rename(devices / "USB Audio (hw:3,0)")
        assert len(next(block for block in blocks if len(block.samples)).samples)
        list(itertools.islice((b for b in blocks if len(b.samples)), 60))
        assert source.name == "USB Audio (hw:3,0)"


def test_stop_ends_a_read_and_a_wait_at_once(devices):
    for lose in (False, True):
        (devices / "Mic One").write_text("48000 1")
        with Capture("mic") as source:
            blocks = source.blocks()
            next(blocks)
            if lose:
                (devices / "Mic One").unlink()
            timer = threading.Timer(1.0, source.stop)
            timer.start()
            begun = time.monotonic()
            for _ in blocks:
                pass
            assert 0.5 < time.monotonic() - begun < 2.0


def test_the_child_ends_with_its_parent(devices):
    program = (
        "import os; from realtime_mpe.capture import Capture; s = Capture('mic'); next(s.blocks());"
        "print(s._child._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    child = int(parent.stdout)

    def ended():
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(ended)


def test_a_device_that_sends_less_than_it_promises_is_noticed_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(capture.time, "monotonic", lambda: now[0])
    told = []
    watch = Shortfall(48_000)
    now[0] += 3.0  # the first block of a sound server is late
    for share in (1.0, 0.99, 0.9, 0.9):  # each for 12 s
        for _ in range(120):
            now[0] += 0.1
            told.append((share, watch.missing(round(4800 * share))))
    assert [share for share, missing in told if missing] == [0.9]
