"""Risks: sound that nobody makes on purpose, settings that change under it, and model files from strangers."""

import subprocess
import sys

import numpy as np
import pytest

from realtime_mpe.channels import ChannelMap
from realtime_mpe.desk import Desk
from realtime_mpe.host import Engine
from realtime_mpe.model import OnnxModel
from realtime_mpe.settings import Settings
from realtime_mpe.sinks.base import NoteSink

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000)


class Balance(NoteSink):
    """Fails if a note ends that does not sound, or begins twice; `sounding` must be empty at the end."""

    def __init__(self):
        self.sounding, self.begun, self.last = set(), 0, -np.inf

    def note_on(self, note):
        key = note.voice, note.midi
        assert key not in self.sounding and 1 <= note.velocity <= 127 and 1 <= note.channel <= 16
        assert np.isfinite(note.onset) and 0 <= note.onset <= note.emitted + 1e-6 and note.emitted >= self.last - 1e-6
        self.last = note.emitted
        self.sounding.add(key)
        self.begun += 1

    def note_off(self, note):
        assert note.offset >= note.onset
        self.sounding.remove((note.voice, note.midi))

    def bend(self, bend):
        assert -50 <= bend.cents <= 50


def sounds(rng, n, rate):
    """One of many kinds of sound, (n,) float32."""
    t = np.arange(n) / rate
    tone = np.sin(2 * np.pi * rng.uniform(30, 2000) * t)
    kinds = {
        "tone": 0.3 * tone,
        "square at full scale": np.sign(tone),
        "far too loud": 1e4 * tone,
        "noise": rng.normal(0, 0.3, n),
        "silence": np.zeros(n),
        "offset": np.full(n, rng.uniform(-1, 1)),
        "denormal": np.full(n, 1e-40),
        "tiny": 1e-30 * tone,
        "not numbers": np.where(rng.random(n) < 0.1, np.nan, tone),
        "infinities": np.where(rng.random(n) < 0.1, rng.choice([np.inf, -np.inf], n), tone),
        "all that": rng.choice([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, 1e-45], n),
        "clicks": (rng.random(n) < 0.001).astype(float),
    }
    name = str(rng.choice(list(kinds)))
    return kinds[name].astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_no_sound_no_gap_and_no_change_of_settings_leaves_a_note_behind(tiny_model, seed):
    rng = np.random.default_rng(seed)
    model = OnnxModel(str(tiny_model))
    rate = RATES[seed % len(RATES)]
    heard, played = Balance(), Balance()
    channels = ChannelMap()
    desk = Desk([played], channels, pytest.fail)
    settings = Settings(int(rng.integers(5)), float(rng.random()), bend=True)
    engine = Engine(model, rate, [desk, heard], settings, pytest.fail, channels)
    with np.errstate(all="raise", under="ignore"):
        for _ in range(60):
            lost = int(rng.integers(1, rate)) if rng.random() < 0.1 else 0
            engine.process(sounds(rng, int(rng.choice([0, 1, 7, 480, 512, 4096, rate // 3])), rate), lost)
            if rng.random() < 0.1:
                engine.adjust(lookahead=int(rng.integers(5)), sensitivity=float(rng.random()))
            if rng.random() < 0.1:
                desk.change(int(rng.integers(8)), mute=bool(rng.random() < 0.5), transpose=int(rng.integers(-48, 49)))
            if rng.random() < 0.05:
                desk.silence()
            if rng.random() < 0.05:
                channels.assign(int(rng.integers(8)), int(rng.integers(1, 17)))
            if rng.random() < 0.05:
                engine.change_rate(int(rng.choice(RATES)))
            desk.apply()
            engine.report(0, 0.0)
    engine.finish()
    assert not heard.sounding and not played.sounding
    assert heard.begun > 0


MUTATE = """
import sys
import numpy as np
from realtime_mpe.errors import UserError
from realtime_mpe.host import Engine
from realtime_mpe.model import load_model
from realtime_mpe.sinks.base import NoteSink

whole, seed, path = bytearray(open(sys.argv[1], "rb").read()), int(sys.argv[2]), sys.argv[3]
rng = np.random.default_rng(seed)
refused = played = 0
for _ in range(40):
    data = bytearray(whole)
    kind = rng.integers(4)
    if kind == 0:
        data = data[: int(rng.integers(len(data)))]
    elif kind == 1:
        for place in rng.integers(len(data), size=int(rng.integers(1, 20))):
            data[place] = int(rng.integers(256))
    elif kind == 2:  # where the names and shapes are
        place = int(rng.integers(max(1, len(data) - 4000), len(data)))
        data[place : place + 8] = rng.bytes(8)
    else:
        place = int(rng.integers(len(data)))
        data[place:place] = rng.bytes(int(rng.integers(1, 50)))
    with open(path, "wb") as file:
        file.write(data)
    try:
        engine = Engine(load_model(path), 16000, [NoteSink()], warn=lambda line: None)
        for _ in range(4):
            engine.process(rng.normal(0, 0.1, 4000).astype(np.float32))
        engine.finish()
        played += 1
    except UserError as error:
        assert "\\n" not in str(error)
        refused += 1
print(refused, played)
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_model_file_is_refused_in_one_line_or_plays(tiny_model, tmp_path, seed):
    """In a process of its own: what crashes there must not take the tests along."""
    command = [sys.executable, "-c", MUTATE, str(tiny_model), str(seed), str(tmp_path / "damaged.onnx")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    refused, played = map(int, ended.stdout.splitlines()[-1].split())
    assert refused > 10 and refused + played == 40
