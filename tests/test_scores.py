import logging

import mido
import numpy as np
import pytest

from realtime_mpe.errors import UserError
from realtime_mpe.training import compose, scores
from realtime_mpe.training.scores import Part, Score

TICKS = 480


def notes_of(*rows):
    return scores.as_notes([tuple(map(float, r)) for r in rows])


def write_midi(path, *tracks):
    """tracks: lists of (tick, message) in any order."""
    midi = mido.MidiFile(type=1, ticks_per_beat=TICKS)
    for track in tracks:
        out, last = mido.MidiTrack(), 0
        for tick, message in sorted(track, key=lambda e: e[0]):
            out.append(message.copy(time=tick - last))
            last = tick
        midi.tracks.append(out)
    midi.save(path)
    return path


def played(pitches, channel=0, step=TICKS, velocity=80):
    events = []
    for k, pitch in enumerate(pitches):
        events.append((k * step, mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)))
        events.append(((k + 1) * step, mido.Message("note_off", note=pitch, channel=channel)))
    return events


def test_tempo_changes_in_another_track_move_the_notes(tmp_path):
    tempo = [
        (0, mido.MetaMessage("set_tempo", tempo=500_000)),
        (2 * TICKS, mido.MetaMessage("set_tempo", tempo=1_000_000)),
    ]
    score = scores.read_score(write_midi(tmp_path / "a.mid", tempo, played([60, 61, 62, 63])))
    np.testing.assert_allclose(score.parts[0].notes[:, 0], [0.0, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(score.parts[0].notes[:, 1], [0.5, 1.0, 2.0, 3.0])
    assert score.name == "a"


def test_a_program_change_starts_another_part_even_from_another_track(tmp_path):
    programs = [
        (0, mido.Message("program_change", program=40)),
        (2 * TICKS, mido.Message("program_change", program=71)),
    ]
    score = scores.read_score(write_midi(tmp_path / "a.mid", programs, played([60, 62, 64, 65])))
    assert [(p.program, p.notes[:, 2].tolist()) for p in score.parts] == [(40, [60, 62]), (71, [64, 65])]


def test_drums_are_no_pitched_part(tmp_path):
    score = scores.read_score(write_midi(tmp_path / "a.mid", played([60, 62]), played([36, 38], channel=9)))
    assert [p.notes[0, 2] for p in score.parts] == [60]
    assert [p.notes[0, 2] for p in score.drums] == [36]


def test_untidy_note_offs(tmp_path):
    events = [
        (0, mido.Message("note_on", note=60, velocity=80)),
        (TICKS, mido.Message("note_on", note=60, velocity=0)),  # an off in disguise
        (TICKS, mido.Message("note_on", note=60, velocity=90)),  # struck again at the same tick
        (2 * TICKS, mido.Message("note_off", note=60)),
        (2 * TICKS, mido.Message("note_off", note=77)),  # off without on
        (2 * TICKS, mido.Message("note_on", note=64, velocity=70)),  # never switched off
        (4 * TICKS, mido.MetaMessage("text", text="end")),
    ]
    notes = scores.read_score(write_midi(tmp_path / "a.mid", events)).parts[0].notes
    np.testing.assert_allclose(notes, [[0, 0.5, 60, 80], [0.5, 1, 60, 90], [1, 2, 64, 70]])


def test_damaged_files_are_skipped_and_counted(tmp_path, caplog):
    good = write_midi(tmp_path / "good.mid", played([60, 62, 64] * 10))
    data = good.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(60):
        damaged = bytearray(data)
        for place in rng.integers(4, len(data), 6):
            damaged[place] = int(rng.integers(256))
        (tmp_path / f"broken-{k}.mid").write_bytes(bytes(damaged)[: int(rng.integers(len(data) // 2, len(data)))])
    (tmp_path / "empty.mid").write_bytes(b"")
    (tmp_path / "text.MIDI").write_text("not MIDI at all")
    with caplog.at_level(logging.WARNING):
        names = [s.name for s in scores.load_scores(tmp_path)]
    assert "good" in names
    skipped = 63 - len(names)
    assert skipped >= 2
    assert [r.getMessage().split(" ")[:3] for r in caplog.records] == [[str(skipped), "of", "63"]]


def test_a_folder_without_scores_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        list(scores.load_scores(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no .mid file"):
        list(scores.load_scores(tmp_path))


def test_scores_are_found_in_sub_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    write_midi(tmp_path / "deep" / "b.midi", played([60, 62]))
    write_midi(tmp_path / "a.MID", played([60, 62]))
    assert [s.name for s in scores.load_scores(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("interval, late, kept", [(0, 0.0, 1), (12, 0.02, 1), (-24, 0.0, 1), (7, 0.0, 2), (0, 0.25, 2)])
def test_a_part_in_unison_or_octaves_with_another_is_dropped(interval, late, kept):
    rng = np.random.default_rng(1)
    line = notes_of(*((0.5 * k, 0.5 * k + 0.4, m, 80) for k, m in enumerate(rng.integers(55, 67, 40))))
    other = line + [late, late, interval, 0]
    parts = scores.drop_doubled([Part("short", 0, other[:30]), Part("long", 0, line)])
    assert len(parts) == kept
    assert parts[-1].name == "long"  # the one with more notes survives, and the order stays


def test_a_melody_over_chords_of_its_harmony_is_kept():
    rng = np.random.default_rng(2)
    harmony = rng.integers(0, 7, 40)
    chords = notes_of(*((t, t + 0.9, 40 + h + k, 80) for t, h in enumerate(harmony) for k in (0, 4, 7, 12, 16)))
    melody = notes_of(*((t, t + 0.9, 64 + h + rng.choice([0, 4, 7]), 80) for t, h in enumerate(harmony)))
    assert len(scores.drop_doubled([Part("voice", 0, melody), Part("piano", 0, chords)])) == 2
    sung_along = notes_of(*((t, t + 0.9, 40 + h + 16, 80) for t, h in enumerate(harmony)))
    assert len(scores.drop_doubled([Part("voice", 0, sung_along), Part("piano", 0, chords)])) == 1


def test_an_excerpt_is_clipped_and_has_two_players():
    def line(pitch, start, stop):
        return notes_of(*((t, t + 0.5, pitch + k % 5, 80) for k, t in enumerate(np.arange(start, stop, 0.5))))

    score = Score("s", [Part("a", 0, line(60, 0, 60)), Part("b", 0, line(70, 30, 60)), Part("c", 0, line(50, 0, 1))])
    rng = np.random.default_rng(0)
    for _ in range(20):
        excerpt = scores.segment(score, 10.0, rng, tries=60)
        assert {p.name for p in excerpt.parts} == {"a", "b"}
        for part in excerpt.parts:
            assert len(part.notes) >= 3
            assert part.notes[:, 0].min() >= 0 and part.notes[:, 1].max() <= 10.0
            assert (part.notes[:, 1] > part.notes[:, 0]).all()
    assert scores.segment(Score("solo", [Part("a", 0, line(60, 0, 60))]), 10.0, rng) is None


def test_excerpt_times_count_from_its_start():
    score = Score("s", [Part("a", 0, notes_of((9, 11, 60, 80), (12, 13, 61, 80), (14, 16, 62, 80)))])
    notes = scores.cut(score, 10.0, 5.0).parts[0].notes
    np.testing.assert_allclose(notes[:, :2], [[0, 1], [2, 3], [4, 5]])


def test_one_line_of_chords_never_sounds_twice_at_once():
    rng = np.random.default_rng(3)
    rows = [(t, t + rng.uniform(0.1, 2.0), m, 80) for t in np.arange(0, 20, 0.5) for m in rng.choice(30, 3) + 50]
    chords = notes_of(*rows)
    assert scores.is_polyphonic(chords)
    for line, extreme in (("top", np.max), ("bottom", np.min)):
        voice = scores.split_voices(chords, line)
        assert len(voice) >= 10
        assert (voice[1:, 0] >= voice[:-1, 1] - 1e-9).all()
        assert not scores.is_polyphonic(voice)
        for onset, _, midi, _ in voice:
            assert midi == extreme(chords[np.abs(chords[:, 0] - onset) < 1e-6, 2])


def test_one_line_keeps_a_melody_that_has_no_chords():
    melody = notes_of(*((0.5 * k, 0.5 * k + 0.5, 60 + k % 7, 80) for k in range(20)))
    np.testing.assert_array_equal(scores.split_voices(melody, "top"), melody)
    with pytest.raises(ValueError, match="middle"):
        scores.split_voices(melody, "middle")


def test_humanising_moves_notes_like_people_and_not_more():
    rng = np.random.default_rng(0)
    written = notes_of(*((0.5 * k, 0.5 * k + 0.5, 60 + k % 2, 80) for k in range(200)))
    spread = []
    for _ in range(30):
        played_notes = scores.humanise(written, rng)
        assert len(played_notes) == len(written)
        np.testing.assert_array_equal(played_notes[:, 2], written[:, 2])
        assert (played_notes[:, 0] >= 0).all() and (played_notes[:, 1] - played_notes[:, 0] >= 0.015).all()
        assert ((played_notes[:, 3] >= 1) & (played_notes[:, 3] <= 127)).all()
        moved = played_notes[1:, 0] - written[1:, 0]
        assert np.abs(moved).max() < 0.09
        spread.append(moved.std())
    assert 0.009 < np.median(spread) < 0.03


def test_humanised_repeats_and_runs_stay_in_order():
    rng = np.random.default_rng(0)
    repeated = notes_of(*((0.06 * k, 0.06 * k + 0.06, 60, 80) for k in range(100)))
    run = notes_of(*((0.05 * k, 0.05 * k + 0.05, 40 + k, 80) for k in range(40)))
    for _ in range(20):
        again = scores.humanise(repeated, rng)
        assert (again[1:, 0] >= again[:-1, 1]).all()
        assert (np.diff(scores.humanise(run, rng)[:, 2]) > 0).all()


def test_humanised_chords_are_struck_together():
    rng = np.random.default_rng(0)
    chords = notes_of(*((float(t), t + 0.9, m, 80) for t in range(20) for m in (48, 55, 64)))
    for _ in range(10):
        onsets = scores.humanise(chords, rng)[:, 0].reshape(-1, 3)
        assert np.ptp(onsets, axis=1).max() < 0.03


@pytest.mark.parametrize("seed", range(60))
def test_composed_scores_can_always_be_used(seed):
    score = compose.compose(seed)
    assert 2 <= len(score.parts) <= 6
    assert 24.0 <= score.duration <= 41.0
    for part in score.parts:
        assert len(part.notes) >= 3
        assert (part.notes[:, 1] - part.notes[:, 0] > 0.02).all()
        assert (part.notes[:, 2] >= 23).all() and (part.notes[:, 2] <= 94).all()
        assert (np.diff(part.notes[:, 0]) >= 0).all()
        for pitch in np.unique(part.notes[:, 2]):
            own = part.notes[part.notes[:, 2] == pitch]
            assert (own[1:, 0] >= own[:-1, 1] - 1e-9).all()


def test_composing_is_repeatable_and_varied():
    first, again = compose.compose(7), compose.compose(7)
    assert [p.program for p in first.parts] == [p.program for p in again.parts]
    for a, b in zip(first.parts, again.parts, strict=True):
        np.testing.assert_array_equal(a.notes, b.notes)
    pieces = [compose.compose(k) for k in range(40)]
    lengths = np.concatenate([np.diff(p.notes[:, :2], axis=1)[:, 0] for s in pieces for p in s.parts])
    assert np.percentile(lengths, 5) < 0.2 and np.percentile(lengths, 98) > 1.5
    pitches = np.concatenate([p.notes[:, 2] for s in pieces for p in s.parts])
    assert np.percentile(pitches, 2) < 40 and np.percentile(pitches, 98) > 78
    spans = [np.ptp([np.median(p.notes[:, 2]) for p in s.parts]) for s in pieces]
    assert min(spans) < 8 and max(spans) > 24  # some ensembles share one register, others are spread
