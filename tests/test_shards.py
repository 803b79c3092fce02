"""Shards: what is packed comes out again, every process gets its own, and windows of it have the right targets."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, PAPER, SAMPLERATE
from realtime_mpe.errors import UserError
from realtime_mpe.training import stems
from realtime_mpe.training.data.datasets import FAMILIES, Piece, Recording, Stem
from realtime_mpe.training.frontend import FrontEnd
from realtime_mpe.training.mixing import Mixture
from realtime_mpe.training.shards import piece_segments, read_segments, shard_paths, write_shards
from realtime_mpe.training.slots import WINDOW
from realtime_mpe.training.stems import Segment, StemCache
from realtime_mpe.training.synth import SynthInstrument
from realtime_mpe.training.windows import Examples, SegmentPool, SourceTable, Windows, collate, cut, family_index


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_packed_segments_come_out_unchanged(shards):
    cache = StemCache(shards / "stems" / "train")
    whole = {cache.load(k).score + str(cache.load(k).audio.sum()): cache.load(k) for k in range(len(cache))}
    for segment in take(read_segments(shard_paths(shards / "train"), 0), len(cache)):
        same = whole.pop(segment.score + str(segment.audio.sum()))
        np.testing.assert_array_equal(segment.notes, same.notes)
        assert segment.instrument == same.instrument
    assert not whole


def test_processes_share_the_shards_out(shards, monkeypatch):
    paths = shard_paths(shards / "train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        heard.append({s.audio.tobytes() for s in take(read_segments(paths, 3), 2)})
        assert len(take(read_segments(paths, 3, shared=True), 4)) == 4
    assert not heard[0] & heard[1]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "7")
    with pytest.raises(UserError, match="too few"):
        next(read_segments(paths, 3))


def test_damage_and_absence_are_told(shards, tmp_path):
    with pytest.raises(UserError, match="data pack"):
        shard_paths(tmp_path)
    with pytest.raises(UserError, match="exists"):
        write_shards(shards / "train", iter(()))
    with pytest.raises(UserError, match="nothing to pack"):
        write_shards(tmp_path / "out", iter(()))
    assert not list(tmp_path.iterdir())
    (tmp_path / "shard-000000.tar").write_bytes(shard_paths(shards / "train")[0].read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        next(read_segments(shard_paths(tmp_path), 0))


def test_the_same_epoch_is_the_same_and_the_next_another(shards):
    windows = Windows(shard_paths(shards / "train"), 6, seed=0)
    first, again = (np.stack([w.audio for w in windows]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    windows.epoch = 1
    assert not np.array_equal(first, np.stack([w.audio for w in windows]))


@pytest.mark.parametrize("isolated", (1, 0))
def test_strangers_come_from_stems_that_can_be_heard_alone(isolated):
    def segment(mixture):
        return Segment(np.zeros((1, 9), np.int16), np.zeros((0, 5)), np.zeros(1, int), ["a:1"], "", mixture=mixture)

    kinds = itertools.cycle([np.zeros(9, np.int16)] * 7 + [None] * isolated)
    pool = SegmentPool(map(segment, kinds), np.random.default_rng(0))
    for _ in range(60):
        drawn = pool.draw()
        stranger, _ = pool.stranger()
        assert stranger.mixture is None if isolated else stranger is drawn


@pytest.mark.parametrize(("count", "batch"), [(20, 4), (22, 4), (3, 4), (7, 1)])
def test_the_workers_of_a_loader_share_out_whole_batches(shards, monkeypatch, count, batch):
    class Numbers(Examples):
        def make(self, pool, rng):
            return 0

    examples = Numbers(shard_paths(shards / "train"), count, seed=0, shared=False)
    examples.batch = batch
    monkeypatch.setattr("realtime_mpe.training.windows.read_segments", lambda *a: iter(()))
    given = []
    for worker in range(3):
        monkeypatch.setattr("realtime_mpe.training.windows.pytorch_worker_info", lambda w=worker: (0, 1, w, 3))
        given.append(len(list(examples)))
    assert sum(given) == count and sum(number % batch > 0 for number in given) == (count % batch > 0)


def test_data_of_which_nothing_can_be_used_end_the_search(shards):
    class Nothing(Examples):
        def make(self, pool, rng):
            return None

    with pytest.raises(UserError, match="no stems that sound"):
        next(iter(Nothing(shard_paths(shards / "train"), 1, seed=0)))


def test_targets_are_where_the_notes_are():
    audio = np.zeros((2, 4 * SAMPLERATE), np.int16)
    notes = np.array([[0, 1.0, 1.5, 60, 80], [1, 1.2, 3.0, 40, 80]], np.float32)
    segment = Segment(audio, notes, np.arange(2), ["philharmonia:violin", "fluidr3_gm:56"], "s")
    context = 27 * HOP
    sound = np.zeros(context * 2 + 22 * HOP, np.float32)
    mixture = Mixture(sound, notes[:, :4].astype(float), ((segment, 0), (segment, 1)))
    window = cut(mixture, context, SourceTable(("fluidr3_gm:56",), np.full((1, 128), 0.5, np.float32)))
    times = context / SAMPLERATE + np.arange(WINDOW) * FRAME_SECONDS
    for stem, (_, onset, offset, midi, _) in enumerate(notes):
        on = window.maps[stem, int(midi) - FIRST_MIDI] > 0
        np.testing.assert_array_equal(on, (times >= onset) & (times < offset))
    assert [FAMILIES[k] for k in window.family] == ["strings", "brass"]
    assert window.known.tolist() == [False, True] and window.timbre[1, 0] == 0.5
    batch = collate([window, window])
    assert batch.maps.shape == (2, 2, 72, WINDOW) and batch.present.all()


def test_windows_have_just_the_context_that_the_front_end_needs(shards):
    window = next(iter(Windows(shard_paths(shards / "train"), 1, seed=0)))
    front_end = FrontEnd(PAPER)
    audio = torch.from_numpy(window.audio)[None]
    levels = front_end(audio, front_end.margin)
    assert levels.shape == (1, WINDOW, 216)
    skip = front_end.margin // HOP
    torch.testing.assert_close(front_end(audio)[:, skip : skip + WINDOW], levels)


class OnePiece(Piece):
    def read(self):
        return self.recording


def piece_of(isolated: bool) -> Piece:
    wave = np.sin(np.arange(30 * SAMPLERATE) * 0.1).astype(np.float32) * 0.3
    notes = np.array([[1.0, 2.0, 60.0], [23.5, 25.0, 62.0], [29.0, 29.5, 20.0]])
    violin = Stem("1_vn", "violin", "strings", None, notes)
    parts = (violin, Stem("2_tpt", "trumpet", "brass", None, notes[:1] + [0, 0, 7]))
    piece = OnePiece("12_Song", "g12", None, parts, (), 30.0)
    object.__setattr__(piece, "recording", Recording(2 * wave, [wave, wave] if isolated else [None, None]))
    return piece


@pytest.mark.parametrize("isolated", [True, False])
def test_recordings_are_cut_into_excerpts_with_their_notes(isolated):
    excerpts = dict(piece_segments([piece_of(isolated)]))
    assert [*excerpts] == ["12_Song-0000", "12_Song-0001"]
    second = excerpts["12_Song-0001"]
    np.testing.assert_allclose(second["notes"], [[0, 0.0, 1.0, 62, 80]])  # cut at the seam; MIDI 20 is out of range
    assert second["audio"].shape == (2, 6 * SAMPLERATE) and list(second["instrument"]) == ["g12:1_vn", "g12:2_tpt"]
    assert ("mixture" in second) != isolated
    assert bool(second["audio"].any()) == isolated
    arrays = (second[key] for key in ("audio", "notes", "part"))
    segment = Segment(*arrays, list(second["instrument"]), "s", list(second["family"]))
    assert [FAMILIES[family_index(segment, row)] for row in (0, 1)] == ["strings", "brass"]


def test_a_cluster_renders_what_this_machine_would(tmp_path):
    distributed = pytest.importorskip("distributed")
    players = [SynthInstrument(k) for k in range(6)]
    options = dict(seconds=5.0, seed=1)
    stems.render(tmp_path / "here", None, players, 3, **options)
    workers = dict(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with distributed.LocalCluster(**workers) as cluster:
        done = []
        stems.render(
            tmp_path / "there", None, players, 3, **options, cluster=cluster.scheduler_address,
            progress=lambda n, total: done.append(n),
        )  # fmt: skip
    assert done == [1, 2, 3]
    for name in ("00000.npz", "00001.npz", "00002.npz"):
        a, b = np.load(tmp_path / "here" / name), np.load(tmp_path / "there" / name)
        np.testing.assert_array_equal(a["audio"], b["audio"])


def test_a_cluster_that_does_not_answer_is_told(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(stems, "CLUSTER_TIMEOUT", "1s")
    with pytest.raises(UserError, match="no Dask scheduler"):
        stems.render(tmp_path, None, [SynthInstrument(0)], 1, cluster="tcp://127.0.0.1:1")


def test_two_processes_train_as_one(shards, tmp_path):
    """The same global batch, half of it in each: the curve is that of one process within the noise of the windows."""
    code = (
        "import sys; from realtime_mpe.training import fit_recipe; fit_recipe.VALIDATION_WINDOWS = 8\n"
        "from realtime_mpe.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    losses = []
    for devices in (1, 2):
        run = tmp_path / f"run{devices}"
        command = ["train", "exp1a", "--data", str(shards), "-o", str(run), "--windows", "64", "--per-epoch", "32"]
        command += ["--devices", str(devices), "--precision", "32-true"]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        ended = subprocess.run(
            [sys.executable, str(program), *command], capture_output=True, text=True, timeout=300, env=environment
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert (run / "model.onnx").exists()
        losses.append([json.loads(line)["validation_loss"] for line in (run / "curve.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.25)


def test_render_and_pack_make_what_recipes_train_on(rt_mpe, tmp_path, monkeypatch, tune_wav):
    import shutil

    import mido

    from realtime_mpe.training import rendering

    monkeypatch.setattr(rendering, "SEGMENT_SECONDS", 5.0)
    monkeypatch.setattr(rendering, "FEWEST_SEGMENTS", 4)
    monkeypatch.setattr(rendering, "SYNTH_INSTRUMENTS", 16)
    command = ["data", "render", "-o", tmp_path / "data", "--segments", 4, "--workers", 1]
    assert rt_mpe(*command).code == 0
    assert len(shard_paths(tmp_path / "data" / "train")) == 4  # four processes can share them
    again = rt_mpe(*command)
    assert again.code == 0 and not any("stems for" in line for line in again.out)

    stems_folder = tmp_path / "data" / "stems" / "train"
    assert rt_mpe("data", "pack", stems_folder, "-o", tmp_path / "packed", "--per-shard", 3).code == 0
    takes = [len(s.part) for s in take(read_segments(shard_paths(tmp_path / "packed"), 0), 4)]
    assert sorted(takes) == sorted(len(StemCache(stems_folder).load(k).part) for k in range(4))

    folder = tmp_path / "songs"
    folder.mkdir()
    shutil.copy(tune_wav, folder / "a.wav")
    (folder / "b.wav").write_bytes(b"no sound")
    for name in "ab":
        midi = mido.MidiFile(tracks=[mido.MidiTrack()])
        midi.tracks[0].append(mido.Message("note_on", note=60, time=480))
        midi.tracks[0].append(mido.Message("note_off", note=60, time=480))
        midi.save(folder / f"{name}.mid")
    packed = rt_mpe("data", "pack", folder, "-o", tmp_path / "songs.shards")
    assert packed.code == 0 and any("b.wav" in line for line in packed.err)
    (segment,) = take(read_segments(shard_paths(tmp_path / "songs.shards"), 0), 1)
    assert segment.mixture is not None and segment.notes[0, 1] == pytest.approx(0.5)
    again = rt_mpe("data", "pack", folder, "-o", tmp_path / "songs.shards")
    assert again.code == 2 and "exists" in again.err[-1]
