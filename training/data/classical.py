"""URMP, Bach10 and MusicNet from their layouts on disk."""

import csv
import io
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from realtime_mpe.errors import UserError

from .datasets import (
    CODES,
    PROGRAMS,
    Broken,
    DataSet,
    Piece,
    Recording,
    Stem,
    at_samplerate,
    audio_file,
    audio_seconds,
    collect,
    family_of,
)

# URMP: pieces whose stems are partly the same recordings, played together with others
SHARED_RECORDINGS = ((24, 25), (26, 27), (28, 29, 30), (38, 39), (40, 41))
INSTRUMENTS = {
    **{"vn": "violin", "va": "viola", "vc": "cello", "db": "double bass", "fl": "flute", "ob": "oboe"},
    **{"cl": "clarinet", "sax": "saxophone", "bn": "bassoon", "tpt": "trumpet", "hn": "horn", "tbn": "trombone"},
    "tba": "tuba",
}
BACH10_PARTS = (("violin", "violin"), ("clarinet", "clarinet"), ("saxphone", "saxophone"), ("bassoon", "bassoon"))
BACH10_HOP, BACH10_CENTRE = 0.010, 0.013  # s; the 1-based frame k of its annotations is centred on CENTRE + HOP * k
MUSICNET_RATE = 44_100  # its times are sample indices at this rate
MUSICNET_COLUMNS = (("start_time", "end_time", "instrument", "note"),
                    ("start_sample", "end_sample", "instrument_id", "midi_note"))  # fmt: skip
MUSICNET_INSTRUMENTS = {  # General MIDI programs counted from 1
    **{1: "piano", 7: "harpsichord", 41: "violin", 42: "viola", 43: "cello", 44: "contrabass", 61: "horn"},
    **{69: "oboe", 71: "bassoon", 72: "clarinet", 74: "flute"},
}


def urmp(root: Path) -> DataSet | None:
    """``NN_Name_ins1_ins2/{AuMix,AuSep,Notes}_*``; a Notes row is onset s, Hz, duration s."""
    signs = ("Notes_*.txt", "AuSep_*", "AuMix_*")
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and any(any(p.glob(sign)) for sign in signs)]
    return collect("URMP", root, folders, _urmp_piece, []) if folders else None


def _urmp_piece(folder: Path, problems: list[str]) -> Piece:
    number, _, title = folder.name.partition("_")
    if not number.isdigit():
        raise Broken(f"{folder}: the name has no number; URMP's are like 01_Jupiter_vn_vc")
    group = next((g for g in SHARED_RECORDINGS if int(number) in g), (int(number),))
    mixture = next((p for p in sorted(folder.glob("AuMix_*")) if p.suffix in (".wav", ".flac")), None)
    stems = []
    for path in sorted(folder.glob("Notes_*.txt")):
        match = re.match(r"Notes_(\d+)_([a-z]+)_", path.name)
        if match is None or match[2] not in CODES:
            raise Broken(f"{path}: not a name like Notes_1_vn_01_Jupiter.txt with an instrument of URMP")
        index, code = match.groups()
        audio = audio_file(folder / path.stem.replace("Notes_", "AuSep_", 1))
        if audio is None and any(folder.glob("AuSep_*")):
            problems.append(f"{folder}: no recording AuSep_{index}_{code}_*, whose notes are there")
        stems.append(Stem(f"{index}_{code}", INSTRUMENTS[code], CODES[code], audio, read_urmp_notes(path)))
    labelled = {stem.name for stem in stems}
    for path in sorted(folder.glob("AuSep_*")):
        if "_".join(path.name.split("_")[1:3]) not in labelled:
            raise Broken(f"{path}: no Notes file of this player, who is heard in the mixture")
    return _acoustic_piece(folder, f"urmp-{'-'.join(map(str, group))}", mixture, stems)


def _acoustic_piece(folder: Path, group: str, mixture: Path | None, stems: list[Stem]) -> Piece:
    if not stems:
        raise Broken(f"{folder}: no notes of any player")
    if mixture is None and any(stem.audio is None for stem in stems):
        raise Broken(f"{folder}: neither a mixture nor all of its stems")
    lasting = [audio_seconds(stem.audio) for stem in stems if stem.audio is not None]
    seconds = max(lasting) if mixture is None else audio_seconds(mixture)
    return Piece(folder.name, group, mixture, tuple(stems), (), seconds)


def read_urmp_notes(path: Path) -> np.ndarray:
    """-> (N, 3) onset s, offset s, MIDI number."""
    try:
        rows = np.array([line.split()[:3] for line in path.read_text().splitlines() if line.strip()], float)
    except (OSError, ValueError) as error:
        raise Broken(f"{path}: not rows of onset, frequency and duration") from error
    rows = rows.reshape(-1, 3)
    if (rows[:, 1] <= 0).any():
        raise Broken(f"{path}: a frequency that is not above 0 Hz")
    midi = np.round(69 + 12 * np.log2(rows[:, 1] / 440.0))
    return by_onset(np.column_stack([rows[:, 0], rows[:, 0] + rows[:, 2], midi]))


def by_onset(notes: np.ndarray) -> np.ndarray:
    return notes[np.lexsort((notes[:, 2], notes[:, 0]))]


def bach10(root: Path) -> DataSet | None:
    """``NN-Name/{NN-Name-<instrument>.wav, NN-Name-GTNotes.mat}``; the mixture is the exact sum of the stems."""
    signs = ("*-GTNotes.mat", "*-bassoon.*")
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and any(any(p.glob(sign)) for sign in signs)]
    return collect("Bach10", root, folders, _bach10_piece, []) if folders else None


def _bach10_piece(folder: Path, problems: list[str]) -> Piece:
    path = folder / f"{folder.name}-GTNotes.mat"
    try:
        parts = [[bach10_note(note) for note in part.ravel()] for part in loadmat(path)["GTNotes"].ravel()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, zlib.error,
            MatReadError) as error:  # fmt: skip
        raise Broken(f"{path}: no GTNotes can be read from it") from error
    if len(parts) != len(BACH10_PARTS):
        raise Broken(f"{path}: GTNotes of {len(parts)} parts instead of {len(BACH10_PARTS)}")
    stems = []
    for (file_name, instrument), part in zip(BACH10_PARTS, parts, strict=True):
        audio = audio_file(folder / f"{folder.name}-{file_name}")
        if audio is None:
            raise Broken(f"{folder}: no recording of the {instrument}")
        notes = by_onset(np.array(part, float).reshape(-1, 3))
        stems.append(Stem(instrument, instrument, family_of(instrument), audio, notes))
    return _acoustic_piece(folder, f"bach10-{folder.name}", None, stems)


def bach10_note(note: np.ndarray) -> tuple[float, float, float]:
    """(2, n) frames counted from 1 and MIDI pitches -> onset s, offset s, MIDI number: from edge to edge of its frames.

    ValueError if it has another shape.
    """
    frames, pitches = np.asarray(note, float)
    if not len(frames):
        raise ValueError("a note without frames")
    onset, offset = (BACH10_CENTRE + BACH10_HOP * edge for edge in (frames.min() - 0.5, frames.max() + 0.5))
    return onset, offset, np.round(np.median(pitches))


def musicnet(root: Path) -> DataSet | None:
    """``{train,test}_{data,labels}/<id>.{wav,csv}``, or ``musicnet.npz``; a stem an instrument, without its sound."""
    if (root / "musicnet.npz").is_file():
        return _musicnet_npz(root)
    labels = [p for side in ("train", "test") for p in sorted((root / f"{side}_labels").glob("*.csv"))]
    data = [p for side in ("train", "test") for p in sorted((root / f"{side}_data").glob("*.wav"))]
    if not labels and not data:
        return None
    labelled = {p.stem for p in labels}
    problems = [f"{path}: no labels {path.stem}.csv" for path in data if path.stem not in labelled]
    return collect("MusicNet", root, labels, _musicnet_piece, problems)


def _musicnet_piece(path: Path, problems: list[str]) -> Piece:
    audio = audio_file(path.parents[1] / path.parent.name.replace("_labels", "_data") / path.stem)
    if audio is None:
        raise Broken(f"{path}: no recording {path.stem}.wav")
    stems = players(read_musicnet_csv(path), path)
    return Piece(path.stem, f"musicnet-{path.stem}", audio, stems, (), audio_seconds(audio))


def read_musicnet_csv(path: Path) -> np.ndarray:
    """-> (N, 4) onset s, offset s, MIDI number, instrument (General MIDI from 1)."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = next((c for c in MUSICNET_COLUMNS if set(c) <= set(reader.fieldnames or [])), None)
            if header is None:
                raise Broken(f"{path}: no columns {', '.join(MUSICNET_COLUMNS[0])} or {', '.join(MUSICNET_COLUMNS[1])}")
            rows = np.array([[float(row[c]) for c in header] for row in reader], float).reshape(-1, 4)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise Broken(f"{path}: not a table of labels ({error})") from error
    return np.column_stack([rows[:, :2] / MUSICNET_RATE, rows[:, 3], rows[:, 2]])


def players(labels: np.ndarray, source: object) -> tuple[Stem, ...]:
    """(N, 4) as above -> a stem an instrument. Broken, which names the source, if there are none."""
    stems = []
    for program in np.unique(labels[:, 3]).astype(int):
        name = MUSICNET_INSTRUMENTS.get(int(program), f"program {program}")
        notes = by_onset(labels[labels[:, 3] == program, :3])
        stems.append(Stem(str(program), name, PROGRAMS.get(int(program) - 1, "other"), None, notes))
    if not stems:
        raise Broken(f"{source}: labels without a note")
    return tuple(stems)


@dataclass(frozen=True)
class ArchivedPiece(Piece):
    """A recording inside musicnet.npz."""

    archive: Path

    def read(self) -> Recording:
        audio, _ = read_npz_member(self.archive, self.name)
        return Recording(at_samplerate(audio, MUSICNET_RATE), [None] * len(self.stems))


def _musicnet_npz(root: Path) -> DataSet:
    path = root / "musicnet.npz"
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(Path(name).stem for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error

    def piece(name: str, problems: list[str]) -> Piece:
        audio, labels = read_npz_member(path, name)
        stems, seconds = players(labels, f"{path}: {name}"), len(audio) / MUSICNET_RATE
        return ArchivedPiece(name, f"musicnet-{name}", None, stems, (), seconds, path)

    return collect("MusicNet", root, names, piece, [])


class _Unpickler(pickle.Unpickler):
    """Of the arrays and interval trees of MusicNet's archive and of nothing else, for pickles can run code."""

    def find_class(self, module: str, name: str):
        if module.startswith("intervaltree"):
            return {"IntervalTree": list, "Interval": lambda *fields: fields}[name]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return super().find_class("numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_npz_member(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) samples at MUSICNET_RATE and (N, 4) labels as of a table: they are in one pickle, hence read together."""
    try:
        with zipfile.ZipFile(path) as archive:
            file = io.BytesIO(archive.read(f"{name}.npy"))
        version = np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file) if version == (1, 0) else np.lib.format.read_array_header_2_0(file)
        audio, intervals = _Unpickler(file, encoding="latin1").load()
        rows = [(begin, end, facts[1], facts[0]) for begin, end, facts in intervals]  # facts: instrument, note, ...
        labels = np.array(rows, float).reshape(-1, 4) / [MUSICNET_RATE, MUSICNET_RATE, 1, 1]
        return np.asarray(audio, np.float32), labels
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, EOFError, zlib.error,
            zipfile.BadZipFile, pickle.PickleError) as error:  # fmt: skip
        raise Broken(f"{path}: the recording {name} cannot be read ({error})") from error
