"""Training data as sharded files: segments of stems (see `training.stems`) in .tar archives that WebDataset reads.

Shards are read in one pass from any disk or network file system, and given out among processes and machines. A folder
of shards holds ``shard-000000.tar`` ...; each archive holds ``NAME.npz`` segments.
"""

import io
import os
import random
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import webdataset

from realtime_mpe.analysis import FIRST_MIDI, N_PITCHES, SAMPLERATE
from realtime_mpe.errors import UserError

from .stems import DAMAGE, Segment, StemCache

SEGMENTS_A_SHARD = 16  # 100 MB: enough files for many processes, large enough to be read in one go
SHUFFLED_SEGMENTS = 32  # held in memory, 180 MB, from which the next is drawn
PATTERN = "shard-*.tar"
SEGMENT_SECONDS = 24.0


def shard_paths(folder: Path) -> list[Path]:
    """UserError if there are none."""
    paths = sorted(folder.glob(PATTERN)) if folder.is_dir() else []
    if not paths:
        raise UserError(f"no shards ({PATTERN}) in {str(folder)!r}; make some with rt-mpe data pack")
    return paths


def read_segments(paths: list[Path], seed: int, shared: bool = False) -> Iterator[Segment]:
    """This process's share of the shards, for ever, in an order that depends on ``seed`` and the paths alone.

    Every rank and every worker of a data loader gets shards of its own, unless they are ``shared``. UserError if there
    are fewer shards than processes, or if one is damaged.
    """
    order = random.Random(seed)
    while True:
        urls = [str(path) for path in paths]
        order.shuffle(urls)
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(urls),
            *(() if shared else (webdataset.split_by_node, webdataset.split_by_worker)),
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(SHUFFLED_SEGMENTS, initial=SHUFFLED_SEGMENTS, rng=random.Random(order.random())),
        )
        count = 0
        try:
            for sample in pipeline:
                count += 1
                yield Segment.decode(io.BytesIO(sample["npz"]))
        except (*DAMAGE, tarfile.TarError) as error:
            raise UserError(f"a shard in {paths[0].parent} is damaged ({error}); make it again") from error
        if not count:
            raise UserError(f"{len(paths)} shards are too few for so many processes; pack smaller ones (--per-shard)")


def write_shards(
    out: Path,
    segments: Iterable[tuple[str, dict[str, np.ndarray]]],
    per_shard: int = SEGMENTS_A_SHARD,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Named arrays of segments into a folder that must not exist yet; a whole folder or none. Returns how many."""
    if out.exists():
        raise UserError(f"{out} exists already; give another folder, or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    count = 0
    try:
        partial.mkdir(parents=True)
        with (
            warnings.catch_warnings(),
            webdataset.ShardWriter(str(partial / "shard-%06d.tar"), maxcount=per_shard, verbose=0) as writer,
        ):
            for name, arrays in segments:
                buffer = io.BytesIO()
                np.savez(buffer, **arrays)
                writer.write({"__key__": name, "npz": buffer.getvalue()})
                count += 1
                progress(count)
        if not count:
            raise UserError("there is nothing to pack: no piece has stems with notes")
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def cache_segments(cache: StemCache) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every segment of a rendered stem cache, unchanged."""
    for path in cache.paths:
        with np.load(path) as data:
            yield path.stem, dict(data)


def piece_segments(
    pieces: Iterable, seconds: float = SEGMENT_SECONDS, say: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """`training.data` pieces in excerpts of ``seconds``; those in which nothing sounds are left out.

    say : told of every piece that cannot be read, which is left out.

    A recorded stem is a source of its own, under the name of its recording group, so that the same recording in two
    pieces is one source.
    """
    for piece in pieces:
        try:
            recording = piece.read()
            notes = [stem.notes for stem in piece.stems]
        except UserError as error:
            say(f"left out: {error}")
            continue
        isolated = all(stem is not None for stem in recording.stems)
        step = int(round(seconds * SAMPLERATE))
        for start in range(0, len(recording.mixture), step):
            begin, end = start / SAMPLERATE, (start + step) / SAMPLERATE
            rows = [_notes_within(own, begin, end) for own in notes]
            if not any(len(r) for r in rows):
                continue
            n = min(step, len(recording.mixture) - start)
            audio = np.zeros((len(rows), n), np.int16)
            if isolated:
                for k, stem in enumerate(recording.stems):
                    audio[k] = _as_int16(stem[start : start + n])
            arrays = {
                "audio": audio,
                "notes": np.concatenate([np.insert(r, 0, k, axis=1) for k, r in enumerate(rows)]).astype(np.float32),
                "part": np.arange(len(rows), dtype=np.int16),
                "instrument": np.array([f"{piece.group}:{stem.name}" for stem in piece.stems]),
                "score": np.array(piece.name),
                "family": np.array([stem.family for stem in piece.stems]),
            }
            if not isolated:
                arrays["mixture"] = _as_int16(recording.mixture[start : start + n])
            yield f"{piece.name.replace('.', '_')}-{start // step:04d}", arrays


def _notes_within(notes: np.ndarray, begin: float, end: float) -> np.ndarray:
    """(N, 3) -> (M, 4): what sounds in begin..end s, cut to it and counted from its beginning, velocity 80."""
    pitch = notes[:, 2] - FIRST_MIDI
    notes = notes[(notes[:, 1] > begin) & (notes[:, 0] < end) & (pitch >= 0) & (pitch < N_PITCHES)]
    times = np.clip(notes[:, :2] - begin, 0.0, end - begin)
    return np.column_stack([times, notes[:, 2], np.full(len(notes), 80.0)])


def _as_int16(audio: np.ndarray) -> np.ndarray:
    return np.round(np.clip(audio, -1.0, 1.0) * 32767).astype(np.int16)
