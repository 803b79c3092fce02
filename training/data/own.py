"""The project's own sets: rendered stem caches, folders of excerpts, and recordings beside their MIDI files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realtime_mpe.analysis import SAMPLERATE
from realtime_mpe.errors import UserError

from ..stems import DAMAGE, Segment
from .datasets import (
    AUDIO_SUFFIXES,
    Broken,
    DataSet,
    Piece,
    Recording,
    Stem,
    audio_file,
    audio_seconds,
    collect,
    family_of,
)
from .midi import read_players, read_stems

TRUTH_SUFFIXES = (".mid", ".midi")
SECTIONS = (  # of General MIDI by their end, without what has a family
    *((24, "keyboards and mallets"), (40, "guitars and basses"), (80, "choirs")),
    *((88, "leads"), (104, "pads"), (128, "of the world")),
)


@dataclass(frozen=True)
class RenderedPiece(Piece):
    """A segment of a stem cache: the first take of every pitched part, summed."""

    segment: Path

    def read(self) -> Recording:
        try:
            segment = Segment.decode(self.segment)
        except DAMAGE as error:
            raise UserError(f"{self.segment} is damaged ({error}); delete it and render again") from error
        stems = [segment.stem(row) for row in first_takes(segment.part)]
        return Recording(np.sum(stems, axis=0), stems)


def first_takes(part: np.ndarray) -> list[int]:
    """(S,) -> the first row of every part that has notes."""
    parts, rows = np.unique(part, return_index=True)
    return [int(row) for row in rows[parts >= 0]]


def family_of_source(name: str) -> str:
    """Of a rendered stem's instrument: "philharmonia:violin", "font:40" with a General MIDI program, "synth:..."."""
    kind, _, own = name.partition(":")
    if own.isdigit():
        return family_of(own, int(own))
    return "other" if kind == "synth" else family_of(own)


def kind_of_source(name: str) -> str:
    """Finer than its family, for pictures: what "other" is by the sections of General MIDI."""
    family = family_of_source(name)
    own = name.partition(":")[2]
    if family != "other" or not own.isdigit():
        return family if family != "other" else "synthesizer"
    return next(kind for end, kind in SECTIONS if int(own) < end)


def rendered(root: Path) -> DataSet | None:
    """A stem cache, see `training.stems`."""
    paths = sorted(p for p in root.glob("*.npz") if p.stem.isdigit())
    return collect("rendered stems", root, paths, _rendered_piece, []) if paths else None


def _rendered_piece(path: Path, problems: list[str]) -> Piece:
    try:
        with np.load(path) as data:
            part, notes, names = data["part"], data["notes"].astype(float), data["instrument"]
            with data.zip.open("audio.npy") as file:  # its header alone: the audio of a cache is gigabytes
                np.lib.format.read_magic(file)
                (_, n_samples), _, _ = np.lib.format.read_array_header_1_0(file)
    except DAMAGE as error:
        raise Broken(f"{path}: damaged ({error}); delete it and render again") from error
    stems = []
    for row in first_takes(part):
        name = str(names[row])
        stems.append(Stem(str(part[row]), name, family_of_source(name), None, notes[notes[:, 0] == row, 1:4]))
    if not stems:
        raise Broken(f"{path}: no stem with notes")
    return RenderedPiece(path.stem, path.stem, None, tuple(stems), (), n_samples / SAMPLERATE, path)


def excerpts(root: Path) -> DataSet | None:
    """``X/{mix.flac,stems/NN_name.flac,notes.mid,meta.json}``: a track a stem, of its name; drums have no notes."""
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and (p / "notes.mid").is_file()]
    return collect("excerpts", root, folders, _excerpt, []) if folders else None


def _excerpt(folder: Path, problems: list[str]) -> Piece:
    mixture = audio_file(folder / "mix")
    if mixture is None:
        raise Broken(f"{folder}: no mixture mix.flac or mix.wav")
    tracks = dict(read_players(folder / "notes.mid"))
    try:
        described = {stem["name"]: stem for stem in json.loads((folder / "meta.json").read_text())["stems"]}
    except (OSError, ValueError, KeyError, TypeError):
        described = {}
    stems, distractors = [], []
    for path in sorted(p for p in (folder / "stems").glob("*") if p.suffix in AUDIO_SUFFIXES):
        if path.stem in tracks:
            name = path.stem.partition("_")[2] or path.stem
            family = _excerpt_family(name, described.get(path.stem, {}))
            stems.append(Stem(path.stem, name, family, path, tracks.pop(path.stem)))
        elif "drum" in path.stem or described.get(path.stem, {}).get("drum"):
            distractors.append(path)
        else:
            raise Broken(f"{path}: no track of that name in notes.mid")
    for name, notes in tracks.items():
        problems.append(f"{folder}: no recording of the track {name!r}")
        own = name.partition("_")[2] or name
        stems.append(Stem(name, own, _excerpt_family(own, described.get(name, {})), None, notes))
    if not stems:
        raise Broken(f"{folder}: no stem with notes")
    return Piece(folder.name, folder.name, mixture, tuple(stems), tuple(distractors), audio_seconds(mixture))


def _excerpt_family(name: str, described: dict) -> str:
    """By the General MIDI program of a sound font's stem, else by its name; synthesizers are "other"."""
    program = str(described.get("program", ""))
    if described.get("source") == "am":
        return "other"
    return family_of(name, int(program)) if program.isdigit() else family_of(name)


def flat(root: Path) -> DataSet | None:
    """NAME.wav or NAME.flac beside NAME.mid, a track a player."""
    audio, truth = (_files_by_name(root, suffixes) for suffixes in (AUDIO_SUFFIXES, TRUTH_SUFFIXES))
    if not audio.keys() & truth.keys():
        return None
    alone = [path for path in [*audio.values(), *truth.values()] if not (path.stem in audio and path.stem in truth)]
    problems = [f"{path}: no partner of the same name" for path in alone]

    def piece(name: str, problems: list[str]) -> Piece:
        players = read_players(truth[name])
        if not players:
            read_stems(truth[name])  # it says what is wrong
        stems = [Stem(f"{k}", track, family_of(track), None, notes) for k, (track, notes) in enumerate(players, 1)]
        return Piece(name, name, audio[name], tuple(stems), (), audio_seconds(audio[name]))

    return collect("NAME.wav beside NAME.mid", root, sorted(audio.keys() & truth.keys()), piece, problems)


def _files_by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by their bare name; of two that differ in nothing but the suffix, the one whose suffix stands first."""
    try:
        paths = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be listed ({error.strerror}); give another folder") from error
    return {p.stem: p for p in sorted(paths, key=lambda p: suffixes.index(p.suffix.lower()), reverse=True)}
