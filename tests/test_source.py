"""Sources: does every sample arrive once and in time, and does every way in which a device or file fails say so?

The sound devices are played by a stand-in for the sounddevice module, so no sound library and no hardware is needed.
"""

import logging
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import soundfile

from realtime_mpe import source as source_module
from realtime_mpe.errors import UserError
from realtime_mpe.source import Block, DemoSource, DeviceLost, DeviceSource, FileSource, list_devices

RATE = 44_100


def noise(n, channels=1, seed=0):
    return (np.random.default_rng(seed).standard_normal((n, channels)) * 0.1).astype(np.float32)


def write(path, samples, rate=RATE, **format):
    soundfile.write(path, samples, rate, **({"subtype": "FLOAT"} if not format else format))
    return path


def heard(source):
    return np.concatenate([block.samples for block in source.blocks()])


# Files


@pytest.mark.parametrize("blocksize", [1, 511, 512, 4_096, 100_000])
def test_every_sample_of_a_file_arrives_once_in_blocks(tmp_path, blocksize):
    x = noise(5_000)
    with FileSource(write(tmp_path / "a.wav", x), blocksize=blocksize) as source:
        blocks = list(source.blocks())
    assert all(isinstance(b, Block) and b.lost == 0 and b.samples.dtype == np.float32 for b in blocks)
    assert {len(b.samples) for b in blocks[:-1]} <= {blocksize}
    assert np.array_equal(np.concatenate([b.samples for b in blocks]), x[:, 0])


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("rate", [8_000, 48_000, 96_000])
def test_any_rate_and_channel_count_is_mixed_down_by_the_mean(tmp_path, rate, channels):
    x = noise(3_000, channels)
    path = write(tmp_path / "a.wav", x, rate)
    with FileSource(path) as source:
        assert (source.samplerate, source.name) == (rate, "a.wav")
        assert source.duration == pytest.approx(3_000 / rate)
        np.testing.assert_allclose(heard(source), x.mean(axis=1), atol=1e-7)


def test_one_channel_can_be_chosen_counted_from_one(tmp_path):
    x = noise(1_000, 3)
    path = write(tmp_path / "a.wav", x)
    for channel in (1, 2, 3):
        assert np.array_equal(heard(FileSource(path, channel=channel)), x[:, channel - 1])
    for channel in (0, 4, -1):
        with pytest.raises(UserError, match=f"a.wav has no channel {channel}; choose 1 to 3"):
            FileSource(path, channel=channel)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_compressed_files_are_the_same_in_blocks_as_whole(tmp_path, name):
    soundfile.write(tmp_path / name, noise(20_000), RATE)
    whole, _ = soundfile.read(tmp_path / name, dtype="float32")
    np.testing.assert_allclose(heard(FileSource(tmp_path / name)), whole, atol=1e-6)


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "a.wav", noise(10))
    assert len(heard(FileSource("~/a.wav"))) == 10


def test_a_file_is_not_read_whole_when_it_is_opened(tmp_path, monkeypatch):
    counts = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda f, n, **k: counts.append(n) or read(f, n, **k))
    source = FileSource(write(tmp_path / "a.wav", noise(50_000)), blocksize=256)
    blocks = source.blocks()
    for _ in range(3):
        next(blocks)
    assert counts == [256] * len(counts) and len(counts) <= 4


def bad_files(folder):
    soundfile.write(folder / "header.wav", np.zeros(0), RATE)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound\n" * 100)
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1_000))
    (folder / "headerless.raw").write_bytes(bytes(1_000))
    soundfile.write(folder / "whole.flac", noise(20_000), RATE)
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:100])
    return {
        "missing.wav": "does not exist",
        ".": "is a folder",
        "empty.wav": "is empty",
        "header.wav": "holds no sound",
        "text.wav": "cannot be read",
        "image.png": "cannot be read",
        "headerless.raw": "cannot be read",
        "cut.flac": "damaged from its start",
        "nul\0.wav": "does not exist",
        "n" * 5_000: "does not exist",
    }


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        path = f"{tmp_path}/{name}"
        with pytest.raises(UserError) as error:
            FileSource(path)
        assert reason in str(error.value) and repr(path) in str(error.value), name
        assert "\n" not in str(error.value) and ";" in str(error.value), name
    with pytest.raises(UserError, match="0 samples"):
        FileSource(tmp_path / "whole.flac", blocksize=0)


def test_a_file_cut_short_is_read_as_far_as_it_goes_and_says_so(tmp_path, caplog):
    soundfile.write(tmp_path / "whole.flac", noise(100_000), RATE)
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    whole, _ = soundfile.read(tmp_path / "whole.flac", dtype="float32")
    with caplog.at_level(logging.WARNING):
        x = heard(FileSource(tmp_path / "cut.flac"))
        assert "cut.flac is damaged: its last 1." in caplog.text
        caplog.clear()
        heard(FileSource(tmp_path / "whole.flac"))
        assert not caplog.text
    assert 40_000 < len(x) < 55_000
    assert np.array_equal(x, whole[: len(x)])


def test_a_wav_whose_header_promises_more_is_read_as_far_as_it_goes(tmp_path):
    x = noise(10_000)
    data = write(tmp_path / "whole.wav", x).read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) - 20_001])
    y = heard(FileSource(tmp_path / "cut.wav"))
    assert len(y) == 4_999 and np.array_equal(y, x[:4_999, 0])


# Pace


def test_a_paced_block_comes_when_its_last_sample_would_have_been_heard(tmp_path):
    source = FileSource(write(tmp_path / "a.wav", noise(8_000), 16_000), paced=True, blocksize=1_600)
    start = time.monotonic()
    times = [time.monotonic() - start for _ in source.blocks()]
    expected = np.arange(1, 6) * 0.1
    assert len(times) == 5
    late = np.array(times) - expected
    assert late.min() > -1e-3 and np.median(late) < 0.05


def test_a_slow_listener_does_not_shift_the_pace(tmp_path):
    source = FileSource(write(tmp_path / "a.wav", noise(8_000), 16_000), paced=True, blocksize=800)
    start = time.monotonic()
    for i, _ in enumerate(source.blocks()):
        if i == 1:
            time.sleep(0.25)
    assert 0.499 < time.monotonic() - start < 0.68  # a pause that shifts the rest makes it 0.7


def test_without_pace_a_file_is_not_waited_for(tmp_path):
    start = time.monotonic()
    heard(FileSource(write(tmp_path / "a.wav", noise(16_000 * 20), 16_000)))
    assert time.monotonic() - start < 5


def test_stop_ends_a_paced_wait_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "POLL_SECONDS", 30.0)  # the wait must be woken, not run out
    source = FileSource(write(tmp_path / "a.wav", noise(160_000), 16_000), paced=True, blocksize=160_000)
    threading.Timer(0.1, source.stop).start()
    start = time.monotonic()
    assert list(source.blocks()) == []
    assert time.monotonic() - start < 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals on this system")
def test_stop_may_be_called_by_a_signal_handler(tmp_path):
    source = FileSource(write(tmp_path / "a.wav", noise(160_000), 16_000), paced=True, blocksize=320)
    previous = signal.signal(signal.SIGALRM, lambda *_: source.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert 1 <= len(list(source.blocks())) <= 10
    finally:
        signal.signal(signal.SIGALRM, previous)
    source.close()
    source.close()


def test_the_demo_is_paced_and_its_absence_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module.resources, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match="demo recording is missing"):
        DemoSource()
    soundfile.write(tmp_path / "demo.ogg", noise(4_800), 16_000)
    with DemoSource() as source:
        start = time.monotonic()
        assert len(heard(source)) == 4_800 and source.name == "demo"
        assert time.monotonic() - start > 0.29
    with DemoSource(paced=False, blocksize=100) as source:
        assert len(next(source.blocks()).samples) == 100


# Devices


class PortAudioError(Exception):
    pass


class FakeStream:
    """What the test does to the device, and what the program does with the stream."""

    def __init__(self, module, options):
        self.module, self.options = module, options
        self.active = self.closed = False
        self.latency = module.latency
        self.hang = threading.Event()  # cleared only where a test makes close() block
        self.hang.set()

    def start(self):
        if self.module.start_error:
            raise PortAudioError(self.module.start_error)
        self.active = True

    def abort(self, ignore_errors=True):
        self.active = False

    def close(self, ignore_errors=True):
        self.hang.wait(10)
        self.active, self.closed = False, True

    def send(self, samples, overflow=False):
        samples = np.asarray(samples, np.float32)
        buffer = samples.reshape(len(samples), -1).copy()
        self.options["callback"](buffer, len(buffer), None, types.SimpleNamespace(input_overflow=overflow))
        buffer[:] = 99.0  # PortAudio uses its buffer again as soon as the callback is over


class FakeSounddevice(types.ModuleType):
    """Four devices: two microphones, a line input of three channels, and loudspeakers."""

    PortAudioError = PortAudioError

    def __init__(self):
        super().__init__("sounddevice")
        self.default_input, self.open_error, self.start_error, self.latency = 1, None, None, 0.01
        self.streams, self.exit_handlers = [], []
        self.devices = [
            self.device(0, "Speakers", 0, 0, 48_000.0),
            self.device(1, "USB Mic", 0, 1, 44_100.0),
            self.device(2, "Studio mic", 1, 2, 96_000.0),
            self.device(3, "Line", 0, 3, 47_999.9999),
        ]

    def device(self, index, name, hostapi, channels, rate):
        return {
            "index": index,
            "name": name,
            "hostapi": hostapi,
            "max_input_channels": channels,
            "default_samplerate": rate,
        }

    def query_devices(self, device=None, kind=None):
        if kind is None:
            return self.devices
        if self.default_input is None:
            raise PortAudioError("Error querying device -1")
        return self.devices[self.default_input]

    def query_hostapis(self):
        return [{"name": "ALSA"}, {"name": "JACK"}]

    def InputStream(self, **options):  # noqa: N802
        if self.open_error:
            raise PortAudioError(self.open_error)
        self.streams.append(FakeStream(self, options))
        return self.streams[-1]

    def _exit_handler(self):
        pass


@pytest.fixture
def sounddevice(monkeypatch):
    module = FakeSounddevice()
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    monkeypatch.setattr(source_module, "POLL_SECONDS", 0.01)
    return module


def opened(sounddevice, *args, **options):
    source = DeviceSource(*args, **options)
    return source, source.blocks(), sounddevice.streams[-1]


def test_devices_are_listed_with_what_a_choice_needs(sounddevice):
    assert list_devices()[0] == {
        "index": 1,
        "name": "USB Mic",
        "hostapi": "ALSA",
        "channels": 1,
        "samplerate": 44_100,
        "default": True,
    }
    assert [d["index"] for d in list_devices()] == [1, 2, 3], "loudspeakers are no input"
    assert [d["default"] for d in list_devices()] == [True, False, False]
    assert list_devices()[2]["samplerate"] == 48_000
    sounddevice.default_input = None
    assert not any(d["default"] for d in list_devices())


@pytest.mark.parametrize(
    ("choice", "index"),
    [(None, 1), ("", 1), (2, 2), ("2", 2), ("usb", 1), ("STUDIO", 2), ("line", 3), ("mic, jack", 2), ("jack", 2)],
)
def test_a_device_is_chosen_by_number_or_part_of_its_name(sounddevice, choice, index):
    source, _, stream = opened(sounddevice, choice)
    assert stream.options["device"] == index
    assert source.name == sounddevice.devices[index]["name"]
    assert source.samplerate == stream.options["samplerate"] == round(sounddevice.devices[index]["default_samplerate"])
    assert isinstance(source.samplerate, int) and source.duration is None


def test_a_device_called_exactly_so_hides_those_that_only_hold_the_text(sounddevice):
    sounddevice.devices.append(sounddevice.device(4, "Line 2", 0, 1, 48_000.0))
    assert opened(sounddevice, "line")[2].options["device"] == 3


def test_an_ambiguous_name_lists_its_candidates_only(sounddevice):
    with pytest.raises(UserError) as error:
        DeviceSource("mic")
    assert "'mic' can be any of 1: USB Mic, ALSA; 2: Studio mic, JACK; give its number" in str(error.value)


@pytest.mark.parametrize("choice", ["nix", 17, -1, "17", "-1"])
def test_an_unknown_device_lists_all_inputs(sounddevice, choice):
    with pytest.raises(UserError) as error:
        DeviceSource(choice)
    assert f"device {choice!r} is unknown" in str(error.value)
    assert "1: USB Mic, ALSA; 2: Studio mic, JACK; 3: Line, ALSA" in str(error.value)
    assert "Speakers" not in str(error.value)


@pytest.mark.parametrize("choice", [0, "0", "speak"])
def test_a_device_without_inputs_says_so(sounddevice, choice):
    with pytest.raises(UserError, match="has outputs only; devices with inputs are 1: USB Mic"):
        DeviceSource(choice)


def test_no_default_and_no_device_at_all_are_explained(sounddevice):
    sounddevice.default_input = None
    with pytest.raises(UserError, match="no default input; choose one of 1: USB Mic"):
        DeviceSource()
    sounddevice.devices = sounddevice.devices[:1]
    with pytest.raises(UserError, match="no sound device with inputs"):
        DeviceSource("mic")


def test_the_chosen_channel_is_heard_and_a_missing_one_refused(sounddevice):
    x = noise(64, 3)
    for channel in (1, 2, 3):
        source, blocks, stream = opened(sounddevice, 3, channel=channel)
        assert stream.options["channels"] == channel
        stream.active = True
        stream.send(x[:, :channel])
        assert np.array_equal(next(blocks).samples, x[:, channel - 1])
    for channel in (0, 4):
        with pytest.raises(UserError, match=f"'Line' has no channel {channel}; choose 1 to 3"):
            DeviceSource(3, channel=channel)
    with pytest.raises(UserError, match="choose 1$"):
        DeviceSource(1, channel=2)


def test_without_a_choice_the_mean_of_the_first_two_channels_is_heard(sounddevice):
    x = noise(64, 2)
    _, blocks, stream = opened(sounddevice, 3)
    assert stream.options["channels"] == 2
    stream.send(x)
    np.testing.assert_allclose(next(blocks).samples, x.mean(axis=1), atol=1e-7)
    assert opened(sounddevice, 1)[2].options["channels"] == 1


def test_blocks_are_copies_in_order(sounddevice):
    _, blocks, stream = opened(sounddevice)
    x = noise(1_000)[:, 0]
    for i in range(0, 1_000, 100):
        stream.send(x[i : i + 100])
    received = [next(blocks) for _ in range(10)]
    assert np.array_equal(np.concatenate([b.samples for b in received]), x)
    assert not any(b.lost for b in received)


def test_a_full_queue_drops_the_oldest_and_the_next_block_says_how_much(sounddevice):
    source, blocks, stream = opened(sounddevice)
    block = 4_410
    for i in range(25):  # 2.5 s; 2 s may wait
        stream.send(np.full(block, i))
    first = next(blocks)
    assert (first.samples[0], first.lost) == (5, 5 * block)
    stream.send(np.full(block, 25))
    stream.send(np.full(block, 26))  # drops number 6, right before number 7
    received = [next(blocks) for _ in range(20)]
    assert [b.samples[0] for b in received] == list(range(7, 27))
    assert [b.lost for b in received] == [block] + [0] * 19
    assert source.overflows == 0


def test_random_pushes_and_pops_keep_every_sample_in_its_place(sounddevice):
    rng = np.random.default_rng(1)
    source, blocks, stream = opened(sounddevice, samplerate=100)
    sent = heard_until = waiting = 0
    for _ in range(2_000):
        if rng.random() < 0.6:
            size = int(rng.integers(1, 90))
            stream.send(sent + np.arange(size))
            sent, waiting = sent + size, waiting + 1
        elif source._queue:
            block = next(blocks)
            assert block.samples[0] == heard_until + block.lost, "a lost sample was not counted where it was lost"
            heard_until = int(block.samples[-1]) + 1
    assert heard_until > 10_000


def test_one_block_longer_than_the_queue_is_still_heard(sounddevice):
    _, blocks, stream = opened(sounddevice)
    stream.send(np.ones(5 * RATE))
    assert len(next(blocks).samples) == 5 * RATE


def test_overflows_of_the_device_are_counted(sounddevice):
    source, blocks, stream = opened(sounddevice)
    for overflow in (False, True, True):
        stream.send(np.zeros(10), overflow)
    assert source.overflows == 2
    assert [next(blocks).lost for _ in range(3)] == [0, 0, 0]


def test_a_dying_stream_is_noticed_after_what_it_had_sent_is_heard(sounddevice):
    source, blocks, stream = opened(sounddevice)
    stream.send(np.zeros(10))
    next(blocks)
    stream.send(np.zeros(20))
    stream.active = False
    assert len(next(blocks).samples) == 20
    with pytest.raises(DeviceLost, match="'USB Mic' has gone"):
        next(blocks)
    source.close()
    assert stream.closed


def test_a_device_that_sends_nothing_is_given_up(sounddevice, monkeypatch):
    monkeypatch.setattr(source_module, "STALL_SECONDS", 0.1)
    source, blocks, stream = opened(sounddevice)
    with pytest.raises(DeviceLost, match="'USB Mic' has sent nothing"):
        next(blocks)
    assert stream.active


def test_a_listener_that_pauses_does_not_take_the_device_for_dead(sounddevice, monkeypatch):
    monkeypatch.setattr(source_module, "STALL_SECONDS", 0.1)
    _, blocks, stream = opened(sounddevice)
    stream.send(np.zeros(10))
    next(blocks)
    time.sleep(0.2)
    for _ in range(4):  # waits of about 0.05 s, each of which begins anew
        threading.Timer(0.05, stream.send, [np.zeros(30)]).start()
        assert len(next(blocks).samples) == 30


def test_the_callback_never_raises_and_its_failure_reaches_the_listener(sounddevice):
    _, blocks, stream = opened(sounddevice)
    stream.options["callback"]("no array", 3, None, None)
    with pytest.raises(DeviceLost, match="cannot be used"):
        next(blocks)


def test_infinite_samples_pass_without_a_warning(sounddevice, recwarn):
    _, blocks, stream = opened(sounddevice, 2)
    stream.send([[np.inf, -np.inf], [np.nan, 0], [1, 0]])
    samples = next(blocks).samples
    assert np.isnan(samples[:2]).all() and samples[2] == 0.5
    assert not recwarn.list


def test_stop_from_another_thread_wakes_the_listener(sounddevice, monkeypatch):
    monkeypatch.setattr(source_module, "POLL_SECONDS", 30.0)
    source, blocks, _ = opened(sounddevice)
    threading.Timer(0.1, source.stop).start()
    start = time.monotonic()
    assert list(blocks) == []
    assert time.monotonic() - start < 2


def test_stopping_while_the_stream_ends_is_no_loss(sounddevice, monkeypatch):
    monkeypatch.setattr(source_module, "POLL_SECONDS", 30.0)
    source, blocks, stream = opened(sounddevice)
    stream.send(np.zeros(10))
    next(blocks)

    def end():
        stream.active = False
        source.stop()

    threading.Timer(0.1, end).start()
    assert list(blocks) == []


def test_recording_begins_with_the_first_block_and_ends_with_close(sounddevice):
    with DeviceSource() as source:
        stream = sounddevice.streams[-1]
        assert not stream.active, "sound from before the model is ready would only be late"
        stream.send(np.zeros(10))
        next(source.blocks())
        assert stream.active
    assert stream.closed and not stream.active
    source.close()


def test_a_lost_device_whose_closing_hangs_does_not_hold_the_program(sounddevice, monkeypatch):
    unregistered = []
    monkeypatch.setattr(source_module.atexit, "unregister", unregistered.append)
    monkeypatch.setattr(source_module, "CLOSE_SECONDS", 0.05)
    source, blocks, stream = opened(sounddevice)
    stream.send(np.zeros(10))
    next(blocks)
    stream.active = False
    stream.hang.clear()
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 2
    stream.hang.set()
    assert unregistered == [sounddevice._exit_handler], "PortAudio would wait again when the program exits"


def test_what_portaudio_refuses_is_translated_with_the_way_out(sounddevice):
    sounddevice.open_error = "Error opening InputStream: Invalid sample rate [PaErrorCode -9997]"
    with pytest.raises(UserError) as error:
        DeviceSource(1, samplerate=16_000)
    assert "16000 Hz" in str(error.value) and "Invalid sample rate" in str(error.value)
    assert "its own rate of 44100 Hz" in str(error.value)
    sounddevice.open_error, sounddevice.start_error = None, "Device unavailable"
    with pytest.raises(UserError, match="'USB Mic' cannot be started .Device unavailable"):
        next(DeviceSource(1).blocks())
    with pytest.raises(UserError, match="-5 samples"):
        DeviceSource(1, blocksize=-5)


@pytest.mark.parametrize("reported", [89_478.0, -1.0, float("nan"), float("inf")])
def test_a_latency_that_cannot_be_is_taken_as_none(sounddevice, reported):
    assert DeviceSource().latency == 0.01
    sounddevice.latency = reported
    assert DeviceSource().latency == 0.0


def test_a_missing_sound_library_is_explained(monkeypatch):
    class NoPortAudio:
        def find_spec(self, name, path=None, target=None):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoPortAudio(), *sys.meta_path])
    for call in (DeviceSource, list_devices):
        with pytest.raises(UserError, match="PortAudio is missing: apt install libportaudio2 / brew install portaudio"):
            call()
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match="pip install sounddevice"):
        DeviceSource()
