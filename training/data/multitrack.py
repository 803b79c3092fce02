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
    audio_file,
    audio_seconds,
    collect,
    family_of,
)
from .midi import read_players

DRUMS = re.compile(r"drum|perc", re.IGNORECASE)


def mshoxxdb(root: Path) -> DataSet | None:
    """``<Title>_v1/<Title>_v1.flac`` and ``<Title>_v1_<stem>.flac``; MIDI files by stem somewhere below the piece."""
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and re.search(r"_v\d+$", p.name)]
    return collect("mshoxxDB", root, folders, _mshoxx_piece, []) if folders else None


def _mshoxx_piece(folder: Path, problems: list[str]) -> Piece:
    mixture = audio_file(folder / folder.name)
    if mixture is None:
        raise Broken(f"{folder}: no mixture {folder.name}.flac")
    midis = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".mid", ".midi")]
    stems, distractors = [], []
    for path in sorted(p for p in folder.glob(f"{folder.name}_*") if p.suffix in AUDIO_SUFFIXES):
        name = path.stem[len(folder.name) + 1 :]
        if DRUMS.match(name):
            distractors.append(path)
            continue
        notes = _mshoxx_notes(name, midis)
        if notes is None:
            problems.append(f"{path}: no MIDI file or track named {name!r}")
            continue
        stems.append(LazyStem(name, re.sub(r"\d+$", "", name), family_of(name), path, lambda notes=notes: notes))
    if not stems:
        raise Broken(f"{folder}: no stem with notes")
    group = f"mshoxxdb-{folder.name}"
    return Piece(folder.name, group, mixture, tuple(stems), tuple(distractors), audio_seconds(mixture))


def _mshoxx_notes(stem: str, midis: list[Path]) -> np.ndarray | None:
    """By the file's name, which ends in the stem's, else by the name of a track; the names are not documented."""
    for path in midis:
        if plain(path.stem).endswith(plain(stem)):
            found = [notes for _, notes in read_players(path)]
            return np.concatenate(found) if found else np.zeros((0, 3))
    for path in midis:
        for track, notes in read_players(path):
            if plain(track) == plain(stem):
                return notes
    return None


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def slakh(root: Path) -> DataSet | None:
    """``{train,validation,test}/TrackNNNNN/{mix.flac,stems/Sxx.flac,MIDI/Sxx.mid,metadata.yaml}``, or tracks alone."""
    depths = ("Track*", "*/Track*", "*/*/Track*")
    folders = [p for depth in depths for p in sorted(root.glob(depth)) if re.fullmatch(r"Track\d+", p.name)]
    return collect("Slakh", root, folders, _slakh_piece, []) if folders else None


def _slakh_piece(folder: Path, problems: list[str]) -> Piece:
    try:
        stems = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))["stems"]
        described = sorted((name, dict(facts)) for name, facts in stems.items())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise Broken(f"{folder / 'metadata.yaml'}: no stems can be read from it") from error
    mixture = audio_file(folder / "mix")
    if mixture is None:
        raise Broken(f"{folder}: no mixture mix.flac or mix.wav")
    found, distractors = [], []
    for name, facts in described:
        audio, notes = audio_file(folder / "stems" / name), folder / "MIDI" / f"{name}.mid"
        if audio is None:  # the flag alone says nothing: all of BabySlakh's are false
            if facts.get("audio_rendered", True):
                problems.append(f"{folder}: no recording of {name}, which the metadata say was rendered")
        elif facts.get("is_drum"):
            distractors.append(audio)
        elif not notes.is_file():
            problems.append(f"{folder}: no notes MIDI/{name}.mid of a rendered stem")
        else:
            instrument, program = str(facts.get("midi_program_name", "")), facts.get("program_num")
            family = family_of(instrument, program if isinstance(program, int) else None)
            found.append(LazyStem(name, instrument, family, audio, partial(_one_player, notes)))
    if not found:
        raise Broken(f"{folder}: no stem with notes")
    return Piece(folder.name, f"slakh-{folder.name}", mixture, tuple(found), tuple(distractors), audio_seconds(mixture))


def _one_player(path: Path) -> np.ndarray:
    found = [notes for _, notes in read_players(path)]
    return np.concatenate(found) if found else np.zeros((0, 3))
