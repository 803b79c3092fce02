"""What several test files need: a model that hears without having been trained, and something to hear."""

import os
from typing import NamedTuple

# Before numpy is loaded: its products are small, and threads that wait for each other would take most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from realtime_mpe.cli import main
from realtime_mpe.notes import Thresholds


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a model file whose network is set by hand to find a pitch where its own bin is loud and stands out.

    Everything else of it is as random as it was made: it tells players apart by chance, though always by the same one.
    """
    torch = pytest.importorskip("torch")
    from realtime_mpe.training.company import CompanyNetwork
    from realtime_mpe.training.export import export
    from realtime_mpe.training.grouping import GroupingNetwork
    from realtime_mpe.training.lines import LineNetwork
    from realtime_mpe.training.network import HARMONIC_BINS, LiveNetwork, NetworkConfig
    from realtime_mpe.training.players import Players
    from realtime_mpe.training.pointer import PointerNetwork

    torch.manual_seed(0)
    network = LiveNetwork(NetworkConfig(channels=16, embedding_channels=16)).eval()
    with torch.no_grad():
        fundamental = HARMONIC_BINS.index(0)
        network.stem.weight[0] = 0.0
        network.stem.bias[0] = 0.0
        loud_and_above_its_neighbours = torch.tensor([-0.5, 0.0, 2.0, 0.0, -0.5])
        network.stem.weight[0, fundamental, 0] = loud_and_above_its_neighbours
        for block in network.trunk:
            block.mix.weight[0] = 0.0  # the residual path alone
        network.detect.conv.weight[0] = 0.0
        network.detect.conv.weight[0, 0, -1, 1] = 1.0  # the newest frame, the same pitch
        network.mix.weight.zero_()
        network.mix.weight[:, 0] = 60.0
        network.mix.bias.fill_(-48.0)
        network.onset.weight.zero_()
    path = tmp_path_factory.mktemp("models") / "tiny.onnx"
    dim = network.config.embedding_dim
    players = Players(LineNetwork(), CompanyNetwork(dim), [GroupingNetwork()], [PointerNetwork()])
    export(path, network, players, 1, (Thresholds(),) * 5, {"hours": 0})
    return path


def make_tune(seconds=3.0, samplerate=16_000, seed=0):
    """Two players of plain tones, a note every 0.3 and 0.45 s, as (n,) float32; the same music at every rate."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * samplerate)) / samplerate
    out = np.zeros(len(t))
    for low, length in ((50, 0.45), (67, 0.3)):
        for onset in np.arange(0.1, seconds, length):
            frequency = 440.0 * 2.0 ** ((low + rng.integers(12) - 69) / 12)
            since = np.clip(t - onset, 0.0, length)
            out += 0.2 * np.sin(2 * np.pi * frequency * since) * np.sin(np.pi * since / length) ** 0.5
    return out.astype(np.float32)


@pytest.fixture(scope="session")
def tune():
    """`make_tune`, for test files that cannot import this one."""
    return make_tune


@pytest.fixture(scope="session")
def tune_wav(tmp_path_factory):
    """Path of a WAV of 3 s, 44.1 kHz, mono."""
    import soundfile

    path = tmp_path_factory.mktemp("audio") / "tune.wav"
    soundfile.write(path, make_tune(samplerate=44_100), 44_100)
    return path


class Ended(NamedTuple):
    """What a command left: exit code, and standard output and error as lines."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture
def rt_mpe(capfd):
    """Runs the command line in this process; whatever it printed before is forgotten."""

    def run(*argv):
        capfd.readouterr()
        code = main([str(word) for word in argv])
        out, err = capfd.readouterr()
        return Ended(code, out.splitlines(), err.splitlines())

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Path of a folder with the shards of two little sets, train and validation, by two and more players of synths."""
    pytest.importorskip("torch")
    from realtime_mpe.training.shards import cache_segments, write_shards
    from realtime_mpe.training.stems import StemCache, render
    from realtime_mpe.training.synth import SynthInstrument

    folder = tmp_path_factory.mktemp("shards")
    for seed, name in enumerate(("train", "validation")):
        render(folder / "stems" / name, None, [SynthInstrument(k) for k in range(12)], 4, seconds=6.0, seed=seed)
        write_shards(folder / name, cache_segments(StemCache(folder / "stems" / name)), per_shard=2)
    return folder
