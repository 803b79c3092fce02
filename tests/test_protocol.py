"""The paper's figures: do they say what their specification says, by the slowest and plainest reading of it?"""

from itertools import permutations

import numpy as np
import pytest

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES
from realtime_mpe.training import protocol
from realtime_mpe.training.metrics import average_precision, notes_to_roll

T = 120
CLOSE = 0.05  # points: half of what a table shows


def random_stems(rng, count, n_frames=T):
    """Lines of notes with rests, in registers that overlap."""
    stems = []
    for k in range(count):
        onset, notes = rng.uniform(0, 0.3), []
        while onset < n_frames * FRAME_SECONDS:
            seconds = rng.uniform(0.05, 0.6)
            notes.append((onset, onset + seconds, int(rng.integers(40 + 8 * k, 60 + 8 * k))))
            onset += seconds + rng.choice([0.0, 0.2])
        stems.append(np.array(notes))
    return stems


def random_maps(rng, rolls, n_slots):
    """A mixture and slots that know some of the truth, and mistake some of it for another player's."""
    slots = rng.beta(0.3, 6, (n_slots, *rolls.shape[1:])).astype(np.float32)
    for k, source in enumerate(rng.permutation(max(n_slots, len(rolls)))[: min(n_slots, len(rolls))]):
        if source < len(rolls):
            heard = rng.beta(2, 1, rolls.shape[1:]).astype(np.float32)
            slots[k] = np.where(rolls[source] & (rng.random(rolls.shape[1:]) < 0.8), heard, slots[k])
    return slots.max(0), slots


@pytest.fixture(params=[(0, 3, 4), (1, 4, 4), (2, 5, 3), (3, 1, 8)], ids=lambda p: f"{p[1]} sources, {p[2]} slots")
def piece(request):
    seed, n_sources, n_slots = request.param
    rng = np.random.default_rng(seed)
    truth = protocol.sources(random_stems(rng, n_sources), ["strings"] * n_sources, "stem", T)
    mix, slots = random_maps(rng, truth.rolls, n_slots)
    return truth, mix, slots


# The plainest reading


def plain_rates(scores, truth, threshold):
    on = scores >= np.float32(threshold)
    right, est, ref = (on & truth).sum(), on.sum(), truth.sum()
    return 200 * right / max(est + ref, 1), 100 * right / max(est, 1), 100 * right / max(ref, 1)


def plain_threshold(scores, truth):
    f1 = [plain_rates(scores, truth, threshold)[0] for threshold in protocol.GRID]
    return protocol.GRID[int(np.argmax(f1))]


def plain_matching(slots, rolls):
    """The best of all ways to pair them."""

    def cost(source, slot):
        p = np.clip(slots[slot].astype(float), 1e-6, 1 - 1e-6)
        return -np.where(rolls[source], np.log(p), np.log(1 - p)).mean()

    costs = np.array([[cost(s, k) for k in range(len(slots))] for s in range(len(rolls))])
    few, many = sorted(costs.shape)
    ways = permutations(range(many), few)
    if len(rolls) <= len(slots):
        return min((dict(enumerate(way)) for way in ways), key=lambda pairs: sum(costs[s, k] for s, k in pairs.items()))
    return min(
        ({s: k for k, s in enumerate(way)} for way in ways), key=lambda m: sum(costs[s, k] for s, k in m.items())
    )


def plain_stability(truth, slots):
    home = notes_heard = switch = pairs = 0
    for notes in truth.notes:
        line = []
        for onset, offset, midi in sorted(map(tuple, notes)):
            first = int(np.ceil(onset / FRAME_SECONDS - 1e-9))
            end = max(int(np.ceil(offset / FRAME_SECONDS)), first + 1)
            energy = [slot[int(midi) - FIRST_MIDI, first:end].sum() for slot in slots]
            if max(energy) > 0:
                line.append(int(np.argmax(energy)))
        if line:
            home += max(line.count(k) for k in line)
            notes_heard += len(line)
            switch += sum(a != b for a, b in zip(line, line[1:], strict=False))
            pairs += len(line) - 1
    return home / notes_heard, switch / pairs


def test_mixture_figures_are_the_plainest_reading(piece):
    truth, mix, _ = piece
    roll = truth.rolls.any(0)
    score = protocol.score_mixture(mix, roll)
    threshold = score.curve.best_threshold()
    assert threshold == pytest.approx(plain_threshold(mix, roll))
    found = protocol.mixture_figures(score, threshold, protocol.Counts(1, 1, 0))
    assert [found[f"mix_{name}"] for name in ("F1", "P", "R")] == pytest.approx(plain_rates(mix, roll, threshold))
    assert found["mix_AP"] == pytest.approx(100 * average_precision(mix, roll), abs=CLOSE)
    right = ((mix >= np.float32(threshold)).sum(0) == roll.sum(0)).mean()
    assert found["mix_polyphony"] == pytest.approx(100 * right)
    assert found["head_polyphony"] is None and found["note_F1"] == pytest.approx(200 / 3)


def test_slot_figures_are_the_plainest_reading(piece):
    truth, _, slots = piece
    pairs = plain_matching(slots, truth.rolls)
    assert protocol.pair_slots(slots, truth.rolls) == pairs
    chosen = np.zeros(truth.rolls.shape, np.float32)
    for source, slot in pairs.items():
        chosen[source] = slots[slot]
    left = slots[[k for k in range(len(slots)) if k not in pairs.values()]]
    score = protocol.score_slots(slots, truth)
    threshold = score.matched.best_threshold()
    assert threshold == pytest.approx(plain_threshold(chosen, truth.rolls))
    found = protocol.slot_figures(score, threshold, "stem")
    everything = (
        np.concatenate([chosen.ravel(), left.ravel()]),
        np.concatenate([truth.rolls.ravel(), np.zeros(left.size, bool)]),
    )
    for name, pair in {"stem": (chosen, truth.rolls), "stem_strict": everything}.items():
        assert [found[f"{name}_{rate}"] for rate in ("F1", "P", "R")] == pytest.approx(plain_rates(*pair, threshold))
        assert found[f"{name}_AP"] == pytest.approx(100 * average_precision(*pair), abs=CLOSE)
    on = chosen >= np.float32(threshold)
    right = [(on[s].sum(0) == truth.rolls[s].sum(0)).mean() for s in pairs]
    assert found["stem_polyphony"] == pytest.approx(100 * np.mean(right))
    assert (found["stem_home"], found["stem_switch"]) == pytest.approx(plain_stability(truth, slots))


# What it must mean


def test_a_perfect_model_has_full_marks_whatever_the_order_of_its_slots():
    truth = protocol.sources(random_stems(np.random.default_rng(0), 3), "abc", "stem", T)
    slots = np.zeros((5, N_PITCHES, T), np.float32)
    slots[[4, 0, 2]] = truth.rolls
    found = protocol.slot_figures(protocol.score_slots(slots, truth), 0.5, "s")
    assert all(found[f"s_{name}"] == 100 for name in ("AP", "F1", "strict_AP", "strict_F1", "polyphony"))
    assert (found["s_home"], found["s_switch"]) == (1, 0)


def test_only_the_strict_figures_see_what_slots_left_over_play():
    truth = protocol.sources(random_stems(np.random.default_rng(0), 3), "abc", "stem", T)
    slots = np.concatenate([truth.rolls, truth.rolls]).astype(np.float32)
    found = protocol.slot_figures(protocol.score_slots(slots, truth), 0.5, "s")
    assert (found["s_P"], found["s_strict_P"], found["s_strict_R"]) == (100, 50, 100)


def test_identities_that_change_half_way_are_not_matched_anew():
    truth = protocol.sources(random_stems(np.random.default_rng(0), 2), "ab", "stem", T)
    slots = truth.rolls.astype(np.float32)
    slots[:, :, T // 2 :] = slots[::-1, :, T // 2 :]
    found = protocol.slot_figures(protocol.score_slots(slots, truth), 0.5, "s")
    assert found["s_F1"] < 80 and found["s_home"] < 0.8


def test_files_are_pooled_before_anything_is_divided():
    rng = np.random.default_rng(0)
    stems = [random_stems(rng, 2, n) for n in (40, 200)]
    truths = [protocol.sources(s, "ab", "stem", n) for s, n in zip(stems, (40, 200), strict=True)]
    slots = [random_maps(rng, t.rolls, 2)[1] for t in truths]
    both = protocol.score_slots(slots[0], truths[0]) + protocol.score_slots(slots[1], truths[1])
    chosen = [protocol.match_slots(s, t.rolls)[0] for s, t in zip(slots, truths, strict=True)]
    scores, roll = (np.concatenate([a.ravel() for a in x]) for x in (chosen, [t.rolls for t in truths]))
    assert both.matched.counts(0.3).f1 == pytest.approx(plain_rates(scores, roll, 0.3)[0] / 100)
    assert 100 * both.matched.average_precision == pytest.approx(100 * average_precision(scores, roll), abs=CLOSE)
    assert both.matched.best_threshold() == protocol.best_threshold(chosen, [t.rolls for t in truths])
    assert (both.sources, both.files) == (4, 2)


def test_a_family_is_one_source_and_a_stem_without_notes_is_none():
    notes = [np.array([(0.0, 1.0, 60)]), np.zeros((0, 3)), np.array([(0.5, 2.0, 40)]), np.array([(0.5, 2.0, 64)])]
    families = ["strings", "strings", "brass", "strings"]
    stems, merged = (protocol.sources(notes, families, level, T) for level in protocol.LEVELS)
    assert stems.members == ((0,), (2,), (3,))
    assert merged.members == ((0, 3), (2,))
    assert (merged.rolls[0] == stems.rolls[0] | stems.rolls[2]).all()


def test_a_threshold_of_the_grid_is_met_exactly():
    for value in protocol.GRID:
        near = np.array([np.nextafter(value, np.float32(0)), value, np.nextafter(value, np.float32(1))])
        counts = protocol.Curve.of(near, np.ones(3, bool)).counts(value)
        assert counts.right == 2, value


@pytest.mark.parametrize("sharpness", [1, 4, 12])
def test_the_sums_in_bins_lose_nothing_that_a_table_shows(sharpness):
    """Also where nearly all scores are next to 0 and 1, as those of a network that is sure."""
    rng = np.random.default_rng(0)
    truth = rng.random(200_000) < 0.1
    scores = (1 / (1 + np.exp(-sharpness * (rng.normal(0, 1, truth.size) + 2 * truth - 1)))).astype(np.float32)
    found = protocol.Curve.of(scores, truth)
    assert 100 * found.average_precision == pytest.approx(100 * average_precision(scores, truth), abs=CLOSE)


def test_scores_at_the_ends_and_nothing_at_all():
    curve = protocol.Curve.of(np.array([0.0, 1.0, 1e-30, 1 - 6e-8], np.float32), np.array([True, True, False, True]))
    assert curve.average_precision == pytest.approx(2 / 3)
    nothing = protocol.Curve.of(np.zeros(0, np.float32), np.zeros(0, bool))
    assert nothing.average_precision == 0 and nothing.counts(0.5).f1 == 0 and nothing.best_threshold() == 0.005


def test_the_polyphony_head_counts_to_its_last_class_and_no_further():
    truth = np.zeros((N_PITCHES, 3), bool)
    truth[:9, 0] = truth[:7, 1] = truth[:2, 2] = True
    head = np.eye(8)[[7, 7, 3]]
    score = protocol.score_mixture(truth.astype(np.float32), truth, head)
    assert (score.head_right, score.head_frames) == (2, 3)
    assert (score.right == 3).all()


def test_notes_of_a_roll_are_runs_of_two_frames():
    roll = np.zeros((N_PITCHES, 9), bool)
    roll[60 - FIRST_MIDI, [0, 1, 3, 6, 7, 8]] = True
    assert protocol.roll_to_notes(roll) == pytest.approx(np.array([(0, 0.064, 60), (0.192, 0.288, 60)]))
    assert (notes_to_roll(protocol.roll_to_notes(roll), 9) == roll).sum() == roll.size - 1


def test_timbre_is_compared_where_the_source_sounds_and_with_its_own_slot():
    notes = [np.array([(0.0, 4 * FRAME_SECONDS, 60)]), np.array([(4 * FRAME_SECONDS, 10 * FRAME_SECONDS, 40)])]
    truth = protocol.sources(notes, "ab", "stem", 10)
    slots = truth.rolls[::-1].astype(np.float32)
    east, north = np.eye(2)
    said = np.array([[north, 3 * east], [east, -east], [east, north]])  # windows of 4, 4 and 2 frames; slots
    timbre = protocol.Timbre(said, 4, np.array([east, east]))
    score = protocol.score_slots(slots, truth, timbre)
    assert (score.cosine, score.cosines) == (pytest.approx(2), 2)
    unknown = protocol.Timbre(said, 4, np.array([east, [np.nan, np.nan]]))
    assert protocol.score_slots(slots, truth, unknown).cosines == 1


# The splits


def test_splits_give_out_what_is_on_and_nothing_twice(piece):
    truth, mix, _ = piece
    for name, split in protocol.SPLITS.items():
        slots = split(mix, 0.4, truth.rolls)
        assert slots.shape == truth.rolls.shape and slots.dtype == np.float32, name
        unison = truth.rolls.sum(0) > 1
        wanted = mix if name in ("one", "ceiling") else np.where(mix >= 0.4, mix, 0)
        assert slots.max(0) == pytest.approx(wanted), name
        assert ((slots > 0).sum(0) <= 1)[~unison | (name != "ceiling")].all(), name


def test_rank_counts_from_the_top_and_bands_keep_to_their_pitches():
    mix = np.zeros((N_PITCHES, 2), np.float32)
    mix[[50, 30, 10], 0] = mix[[30, 10], 1] = 1
    rolls = np.zeros((2, N_PITCHES, 2), bool)
    rank, bands = (protocol.SPLITS[name](mix, 0.5, rolls) for name in ("rank", "bands"))
    assert np.argwhere(rank[0]).tolist() == [[30, 1], [50, 0]]
    assert np.argwhere(rank[1]).tolist() == [[10, 0], [10, 1], [30, 0]]
    assert set(np.argwhere(bands)[:, 1]) == {10, 30, 50} and not (bands[0].any(1) & bands[1].any(1)).any()


def test_no_split_beats_the_ceiling(piece):
    truth, mix, _ = piece
    f1 = {
        name: protocol.score_slots(split(mix, 0.4, truth.rolls), truth).matched.counts(0.4).f1
        for name, split in protocol.SPLITS.items()
    }
    assert max(f1, key=f1.get) == "ceiling" or len(truth.rolls) == 1


@pytest.mark.parametrize("split", protocol.SPLITS.values(), ids=protocol.SPLITS)
def test_splits_of_silence(split):
    assert not split(np.zeros((N_PITCHES, 9), np.float32), 0.5, np.zeros((3, N_PITCHES, 9), bool)).any()
