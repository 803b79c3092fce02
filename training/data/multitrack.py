"""mshoxxDB and Slakh (also BabySlakh) from their layouts on disk."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from .datasets import (
    AUDIO_SUFFIXES,
    Broken,
    DataSet,
    LazyStem,
    Piece,
    Stem,
    audio_file,
    audio_seconds,
    collect,
    family_of,
)
from .midi import read_players

DRUMS = re.compile(r"drum|perc|cymbal", re.IGNORECASE)
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is ten times as fast, and not always there


def mshoxxdb(root: Path) -> DataSet | None:
    """``<Title>_v1/<Title>_v1.flac`` and ``<Title>_v1_<stem>.flac``; MIDI files by stem somewhere below the piece."""
    titled = [p for p in sorted(root.iterdir()) if p.is_dir() and re.search(r"_v\d+$", p.name)]
    folders = [p for p in titled if any(path.suffix in AUDIO_SUFFIXES for path in p.glob(f"{p.name}*"))]
    return collect("mshoxxDB", root, folders, _mshoxx_piece, []) if folders else None


def _mshoxx_piece(folder: Path, problems: list[str]) -> Piece:
    mixture = audio_file(folder / folder.name)
    if mixture is None:
        raise Broken(f"{folder}: no mixture {folder.name}.flac")
    midis = [
        (plain(path.stem.replace(folder.name, "")), read_players(path))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".mid", ".midi")
    ]
    stems, distractors = [], []
    for path in sorted(p for p in folder.glob(f"{folder.name}_*") if p.suffix in AUDIO_SUFFIXES):
        name = path.stem[len(folder.name) + 1 :]
        if DRUMS.search(name):
            distractors.append(path)
            continue
        notes = _mshoxx_notes(name, midis)
        if notes is None:
            raise Broken(f"{path}: no MIDI file or track named {name!r}, and it is heard in the mixture")
        audio_seconds(path)  # it is Broken if it cannot be read
        stems.append(Stem(name, re.sub(r"[\s_-]*\d+$", "", name), family_of(name), path, notes))
    if not stems:
        raise Broken(f"{folder}: no stem with notes")
    group = f"mshoxxdb-{folder.name}"
    return Piece(folder.name, group, mixture, tuple(stems), tuple(distractors), audio_seconds(mixture))


def _mshoxx_notes(stem: str, midis: list[tuple[str, list]]) -> np.ndarray | None:
    """The file that has the stem's name, else the track, else the file whose name ends in it.

    midis : what is left of each file's name without the piece's, and its players. How they are named is not documented.
    """
    wanted = plain(stem)
    by_file = [players for name, players in midis if name == wanted]
    by_track = [[player] for _, players in midis for player in players if plain(player[0]) == wanted]
    by_ending = [players for name, players in midis if name.endswith(wanted)]
    for found in (by_file, by_track, by_ending):
        if found:
            return together(found[0])
    return None


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def slakh(root: Path) -> DataSet | None:
    """``{train,validation,test}/TrackNNNNN/{mix.flac,stems/Sxx.flac,MIDI/Sxx.mid,metadata.yaml}``, or tracks alone."""
    depths = ("Track*", "*/Track*", "*/*/Track*")
    tracks = [p for depth in depths for p in sorted(root.glob(depth)) if re.fullmatch(r"Track\d+", p.name)]
    folders = [p for p in tracks if p.parent.name != "omitted"]  # where the redux keeps its duplicates
    return collect("Slakh", root, folders, _slakh_piece, []) if folders else None


def _slakh_piece(folder: Path, problems: list[str]) -> Piece:
    try:
        stems = yaml.load((folder / "metadata.yaml").read_text(encoding="utf-8"), YAML)["stems"]
        described = sorted((name, dict(facts)) for name, facts in stems.items())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise Broken(f"{folder / 'metadata.yaml'}: no stems can be read from it") from error
    mixture = audio_file(folder / "mix")
    if mixture is None:
        raise Broken(f"{folder}: no mixture mix.flac or mix.wav")
    found, distractors = [], []
    for name, facts in described:
        audio, notes = audio_file(folder / "stems" / name), folder / "MIDI" / f"{name}.mid"
        if audio is None:
            if not facts.get("audio_rendered", True):
                continue  # the flag alone says nothing: all of BabySlakh's are false
            problems.append(f"{folder}: no recording of {name}, which the metadata say was rendered")
        if facts.get("is_drum"):
            distractors += [] if audio is None else [audio]
        elif not notes.is_file():
            raise Broken(f"{folder}: no notes MIDI/{name}.mid of a stem that is heard in the mixture")
        else:
            instrument, program = str(facts.get("midi_program_name", "")), facts.get("program_num")
            family = family_of(instrument, program if isinstance(program, int) else None)
            found.append(LazyStem(name, instrument, family, audio, partial(read_together, notes)))
    if not found:
        raise Broken(f"{folder}: no stem with notes")
    return Piece(folder.name, f"slakh-{folder.name}", mixture, tuple(found), tuple(distractors), audio_seconds(mixture))


def read_together(path: Path) -> np.ndarray:
    return together(read_players(path))


def together(players: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """The notes of several as those of one, (n, 3) by onset."""
    notes = np.concatenate([np.zeros((0, 3)), *(notes for _, notes in players)])
    return notes[np.lexsort((notes[:, 2], notes[:, 0]))]
