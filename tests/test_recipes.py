"""The slot-attention paper's recipes: sizes, losses, and a training that can be interrupted."""

import copy
import errno
import json
import math

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from realtime_mpe.analysis import N_PITCHES
from realtime_mpe.errors import UserError
from realtime_mpe.training import fit_recipe as fitting
from realtime_mpe.training import timbre
from realtime_mpe.training.data.datasets import FAMILIES
from realtime_mpe.training.experiment import ROWS, published
from realtime_mpe.training.fit_recipe import Budget, best_network, fit_recipe, learning_rate
from realtime_mpe.training.recipe import load_recipe, recipe_names, untrained
from realtime_mpe.training.slot_losses import matches, slot_losses, slot_targets
from realtime_mpe.training.slots import WINDOW, SlotNetwork, SlotOutputs, harmonic_input, parameter_count
from realtime_mpe.training.windows import SourceTable, WindowBatch


def test_every_row_has_the_parameters_of_table_1():
    for name, count in published()["parameters"].items():
        assert parameter_count(untrained(load_recipe(name))) == count
    assert {*published()["parameters"]} == {*ROWS, "timbre"} == {*recipe_names()}


def test_info_tells_of_a_recipe(rt_mpe):
    ended = rt_mpe("info", "exp3b", "--json")
    facts = json.loads("\n".join(ended.out))
    assert ended.code == 0 and facts["parameters"] == 1_684_875 and facts["network"]["slots"] == 8
    shipped = json.loads("\n".join(rt_mpe("info", "exp3c", "--json").out))  # the model of that name
    assert shipped["parameters"] == 1_684_875 and shipped["recipe"] == "exp3c" and shipped["voices"] == 8
    assert any("699,584" in line for line in rt_mpe("info", "timbre").out)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[targets]\nlevel='stem'\nmatching='hungarian'\n[networks]\nslots=4", "did you mean 'network'"),
        ("[targets]\nlevl='stem'", "did you mean 'level'"),
        ("[targets]\nlevel='stem'\nmatching='fixed'\n", "level 'family'"),
        ("[targets]\nlevel='stem'\nmatching='hungarian'\n[network]\nslots='many'", "must be int"),
        ("[targets]\nlevel='stem'\nmatching='hungarian'\n[network]\nfilm=true", "timbre"),
        ("[targets]\nlevel='stem'\nmatching='hungarian'\n[network]\n[weights]\nmixture=-1.0", "negative"),
        ("targets = 3", "must be a table"),
        ("[targets", "recipe"),
    ],
)
def test_a_recipe_with_a_mistake_is_told_in_one_line(tmp_path, rt_mpe, text, wanted):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    ended = rt_mpe("train", path, "-o", tmp_path / "run")
    assert ended.code == 2 and len(ended.err) == 1 and wanted in ended.err[0]


def test_an_unknown_recipe_lists_the_known(rt_mpe):
    ended = rt_mpe("train", "exp3d")
    assert ended.code == 2 and "did you mean 'exp3" in ended.err[0] and "timbre" in ended.err[0]


# Networks


@pytest.fixture(scope="module")
def network() -> SlotNetwork:
    torch.manual_seed(0)
    return untrained(load_recipe("exp3c")).eval()


@torch.no_grad()
def test_shapes_and_that_slots_share_the_mixture(network):
    outputs = network(harmonic_input(torch.rand(2, WINDOW, 3 * N_PITCHES)))
    assert outputs.mix.shape == (2, N_PITCHES, WINDOW)
    assert outputs.slots.shape == (2, 8, N_PITCHES, WINDOW)
    assert outputs.activity.shape == (2, 8) and outputs.timbre.shape == (2, 8, 128)
    assert outputs.polyphony.shape == (2, WINDOW, 8)
    mask = outputs.slots / outputs.mix.sigmoid()[:, None] / outputs.activity.sigmoid()[..., None, None]
    torch.testing.assert_close(mask.sum(1), torch.ones(2, N_PITCHES, WINDOW), rtol=1e-4, atol=1e-4)


def test_masks_say_where_harmonics_are_out_of_reach():
    x = harmonic_input(torch.full((1, WINDOW, 216), 0.5))
    assert x.shape == (1, 12, 216, WINDOW)
    levels, validity = x[0, :6, :, 0], x[0, 6:, :, 0]
    assert torch.equal(levels, 0.5 * validity)
    assert [int(v.sum()) for v in validity] == [180, 216, 180, 159, 144, 132]  # octave below, 1, 2, 3, 4, 5


@torch.no_grad()
def test_a_note_shifted_by_an_octave_shifts_what_the_trunk_says(network):
    levels = torch.zeros(1, WINDOW, 216)
    levels[..., 91] = 1.0
    low, high = (network.trunk(harmonic_input(x)) for x in (levels, levels.roll(36, -1)))
    # Validity masks differ at the edges, so only the rows around the note are compared.
    torch.testing.assert_close(low[:, :, 28:33], high[:, :, 40:45], atol=0.15, rtol=0.5)


# Losses


def batch_of(maps: torch.Tensor, family=(0, 1)) -> WindowBatch:
    """Maps (B, S, P, T); teacher's embeddings are unit vectors, one a stem."""
    b, s = maps.shape[:2]
    return WindowBatch(
        audio=torch.zeros(b, 1),
        maps=maps,
        present=maps.flatten(2).any(2),
        family=torch.tensor(family).repeat(b, 1),
        timbre=torch.eye(128)[:s].expand(b, s, 128),
        known=torch.ones(b, s, dtype=torch.bool),
    )


def perfect(batch: WindowBatch, slots: int, order: list[int]) -> SlotOutputs:
    """What a network without fault says, stem s in slot order[s]."""
    maps = torch.full((len(batch.maps), slots, *batch.maps.shape[2:]), 1e-5)
    timbre = torch.full((len(batch.maps), slots, 128), 1.0)
    activity = torch.full((len(batch.maps), slots), -20.0)
    for s, k in enumerate(order):
        maps[:, k] = batch.maps[:, s].clamp(1e-5, 1 - 1e-5)
        timbre[:, k] = batch.timbre[:, s]
        activity[:, k] = 20.0
    mixture = batch.maps.amax(1)
    polyphony = torch.nn.functional.one_hot(mixture.sum(1).long(), 8).float() * 40
    return SlotOutputs((mixture - 0.5) * 40, maps, activity, timbre, polyphony)


@pytest.fixture
def duet() -> WindowBatch:
    maps = torch.zeros(2, 2, N_PITCHES, WINDOW)
    maps[:, 0, 20, 3:15] = 1
    maps[:, 1, 40, 8:23] = 1
    return batch_of(maps)


@pytest.mark.parametrize("order", [[0, 1], [5, 2]])
def test_perfect_slots_cost_nothing_in_any_order(duet, order):
    losses = slot_losses(perfect(duet, 8, order), duet, load_recipe("exp3c"))
    assert {*losses} == {"mixture", "slot", "activity", "inactive", "union", "timbre", "polyphony", "slot_polyphony"}
    assert all(float(loss) < 2e-3 for loss in losses.values()), losses


def test_in_a_fixed_order_a_permutation_is_wrong(duet):
    recipe = load_recipe("exp1b")
    right, swapped = (slot_losses(perfect(duet, 4, order), duet, recipe)["slot"] for order in ([0, 1], [1, 0]))
    assert float(right) < 1e-3 < 0.05 < float(swapped)


def test_losses_have_gradients_and_notice_every_fault(duet, network):
    recipe, network = load_recipe("exp3c"), copy.deepcopy(network)
    torch.nn.init.normal_(network.film[-1].weight)  # which begins at zero, and then nothing reaches what is before it
    outputs = network(harmonic_input(torch.rand(2, WINDOW, 216)))
    losses = slot_losses(outputs, duet, recipe)
    sum(losses.values()).backward()
    untouched = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not untouched
    clean = perfect(duet, 8, [0, 1])
    extra = clean.slots.clone()
    extra[:, 6, 50] = 0.9  # a surplus slot plays, and the union with it
    worse = slot_losses(clean._replace(slots=extra), duet, recipe)
    assert worse["inactive"] > 0.005 and worse["union"] > 0.01
    assert slot_losses(clean._replace(timbre=-clean.timbre), duet, recipe)["timbre"] > 1.5
    assert slot_losses(clean._replace(activity=-clean.activity), duet, recipe)["activity"] > 5
    assert slot_losses(clean._replace(polyphony=-clean.polyphony), duet, recipe)["polyphony"] > 5


def test_stems_of_a_family_are_one_target(duet):
    duet.family[:] = FAMILIES.index("brass")
    maps, present, *_ = slot_targets(duet, "family")
    assert present.tolist() == [[False, False, True, False]] * 2
    assert torch.equal(maps[:, FAMILIES.index("brass")], duet.maps.amax(1))


def test_more_stems_than_slots_leave_the_dearest_out():
    cost = torch.tensor([[[0.1, 5.0, 0.3], [0.2, 9.0, 0.1]]])
    matched = matches(cost, torch.tensor([[True, True, True]]), "hungarian")
    assert matched[0].nonzero().tolist() == [[0, 0], [1, 2]]


def test_timbre_can_decide_the_match(duet):
    recipe = load_recipe("exp3c")
    outputs = perfect(duet, 8, [0, 1])
    vague = torch.full_like(outputs.slots, 1e-5)
    vague[:, :2] = duet.maps.mean(1, keepdim=True).clamp(1e-5, 1 - 1e-5)  # both slots play the same
    swapped = outputs.timbre.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert float(slot_losses(outputs._replace(slots=vague, timbre=swapped), duet, recipe)["timbre"]) < 1e-3


# The teacher


def test_views_of_a_source_attract():
    weights = load_recipe("timbre").weights
    source = torch.arange(4).repeat_interleave(4)
    together = torch.eye(128)[source] * 12
    apart = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    good, bad = (timbre.timbre_losses(x, x, source, weights) for x in (together, apart))
    assert good["contrast"] < 0.5 * bad["contrast"] and good["consistency"] < 1e-5 < bad["consistency"]
    same = torch.ones(16, 128)
    assert timbre.timbre_losses(same, same, source, weights)["variance"] > 0.9


def test_retrieval_counts_ranks():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 128))
    clear = {f"s{k}": c + 0.01 * rng.normal(size=(4, 128)) for k, c in enumerate(centres)}
    found = timbre.retrieval(clear)
    assert abs(found.pop("between")) < 0.02
    assert found == {"top1": 1.0, "top5": 1.0, "sources": 40, "queries": 160}
    same_direction = {name: rows + 10 for name, rows in clear.items()}
    assert timbre.retrieval(same_direction)["between"] > 0.9
    noise = {f"s{k}": rng.normal(size=(4, 128)) for k in range(40)}
    assert timbre.retrieval(noise)["top1"] < 0.2
    assert timbre.retrieval({"once": np.ones((1, 128))})["queries"] == 0


def test_masks_silence_no_more_than_they_may():
    views = load_recipe("timbre").views
    masked = timbre.mask(torch.ones(64, 46, 216), views, torch.Generator().manual_seed(1))
    rows, columns = (masked == 0).all(2).sum(1), (masked == 0).all(1).sum(1)
    assert 0 < rows.max() <= views.time_mask and 0 < columns.max() <= views.frequency_mask


# Training


@pytest.fixture
def few(monkeypatch):
    """A loop as in earnest over next to nothing."""
    monkeypatch.setattr(fitting, "VALIDATION_WINDOWS", 4)
    monkeypatch.setattr(fitting, "VALIDATION_SEGMENTS", 3)


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


def losses_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("step", (4, 6))  # of six: in the midst of an epoch, and before the last validation
def test_an_interrupted_training_goes_on_to_the_same_curve(step, few, fabric, shards, tmp_path, monkeypatch):
    recipe, budget = load_recipe("exp1c"), Budget(examples=48, per_epoch=24)
    fit_recipe(tmp_path / "whole", recipe, shards, budget, fabric, say=lambda line: None)

    steps = []

    def stop(pressed, fabric):
        steps.append(1)
        return len(steps) == step

    monkeypatch.setattr(fitting, "agreed", stop)
    said = []
    with pytest.raises(KeyboardInterrupt):
        fit_recipe(tmp_path / "parts", recipe, shards, budget, fabric, say=said.append)
    assert len(losses_of(tmp_path / "parts")) == 1  # in the second epoch
    fit_recipe(tmp_path / "parts", recipe, shards, budget, fabric, say=said.append)
    assert any(f"resuming after {8 * step} of 48" in line for line in said)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    networks = [best_network(tmp_path / name, recipe) for name in ("whole", "parts")]
    for a, b in zip(*(n.state_dict().values() for n in networks), strict=True):
        assert torch.equal(a, b)


def test_the_checkpoint_of_another_recipe_is_refused(few, fabric, shards, tmp_path):
    budget = Budget(examples=8, per_epoch=8)
    fit_recipe(tmp_path, load_recipe("exp1a"), shards, budget, fabric, say=lambda line: None)
    with pytest.raises(UserError, match="another recipe"):
        fit_recipe(tmp_path, load_recipe("exp1c"), shards, budget, fabric)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        fit_recipe(tmp_path, load_recipe("exp1a"), shards, budget, fabric)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    fitting.write_checkpoint(tmp_path, {"curve": [], "step": 1})

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        fitting.write_checkpoint(tmp_path, {"curve": [], "step": 2})
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_can_begin_with_another_ones_weights(few, fabric, shards, tmp_path):
    budget = Budget(examples=8, per_epoch=8)
    fit_recipe(tmp_path / "start", load_recipe("exp1a"), shards, budget, fabric, say=lambda line: None)
    theirs = best_network(tmp_path / "start", load_recipe("exp1a"))
    own = untrained(load_recipe("exp3c"))
    fitting.begin_with(own, tmp_path / "start")
    assert torch.equal(own.trunk[1][0].weight, theirs.trunk[1][0].weight)
    assert own.attention.queries.shape == (8, 192)


def test_recipes_with_a_teacher_need_one(fabric, shards, tmp_path, rt_mpe):
    with pytest.raises(UserError, match="rt-mpe train timbre"):
        fit_recipe(tmp_path, load_recipe("exp2a"), shards, Budget(), fabric)
    ended = rt_mpe("train", "exp2a", "--data", shards, "-o", tmp_path / "run", "--windows", 8)
    assert ended.code == 2 and "rt-mpe train timbre" in ended.err[-1]


def test_the_learning_rate_halves_and_ends_at_nothing():
    schedule = load_recipe("exp1c").schedule
    at = [learning_rate(schedule, {"step": step, "halvings": 1}, 100) for step in (0, 50, 100)]
    assert at == [0.5e-3, 0.5e-3, 0.0]
    cosine = load_recipe("timbre").schedule
    assert math.isclose(learning_rate(cosine, {"step": 50}, 100), 2.5e-4)


def test_the_source_table_knows_whom_it_knows():
    table = SourceTable(("a", "b"), np.eye(2, dtype=np.float32))
    assert table.of("b").tolist() == [0, 1] and table.of("c") is None


def test_the_whole_table_from_nothing(few, rt_mpe, shards, tmp_path, tune, monkeypatch):
    """Teacher, shared start, a row without and one with a teacher, scored on a test set; then nothing is done twice."""
    import mido
    import soundfile

    from realtime_mpe.training import train_recipe

    monkeypatch.setattr(train_recipe, "TABLE_SEGMENTS", 3)
    monkeypatch.setattr(train_recipe, "CALIBRATION_MIXTURES", 1)
    monkeypatch.setattr(train_recipe, "CALIBRATION_SECONDS", 3.0)
    monkeypatch.setattr(train_recipe, "NOTE_GRIDS", {"on": (0.3,), "off": (0.1,)})
    folder = tmp_path / "set"
    folder.mkdir()
    soundfile.write(folder / "tune.wav", tune(), 16_000)
    midi = mido.MidiFile()
    for channel, pitch in enumerate((55, 70)):
        track = mido.MidiTrack()
        midi.tracks.append(track)
        track.append(mido.Message("note_on", channel=channel, note=pitch, velocity=80, time=100))
        track.append(mido.Message("note_off", channel=channel, note=pitch, time=900))
    midi.save(folder / "tune.mid")
    command = ["experiment", "table3", "-o", tmp_path / "t", "--data", shards, "--rows", "exp1c,exp2a", "--windows", 8]
    command += ["--start-windows", 8, "--timbre-stems", 32, "--per-epoch", 32, "--precision", "32-true"]
    command += ["--test", f"tune={folder}"]
    first = rt_mpe(*command)
    assert first.code == 0, first.err
    text = (tmp_path / "t" / "experiments.md").read_text()
    for wanted in ("1,266,211", "1,329,123", "## tune", "pitch rank", "Timbre encoder: of"):
        assert wanted in text
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("*.onnx")}
    assert len(files) == 4
    again = rt_mpe(*command)
    assert again.code == 0 and again.out == first.out[-len(again.out) :]
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_experiment_arguments_are_checked(rt_mpe, tmp_path):
    for argv, wanted in (
        (["--test", "x"], "NAME=FOLDER"),
        (["--test", "x=nowhere"], "nowhere"),
        (["--rows", "timbre"], "no row"),
        (["--data", tmp_path / "nowhere"], "nowhere"),
    ):
        ended = rt_mpe("experiment", "table3", "-o", tmp_path / "t", *argv)
        assert ended.code == 2 and wanted in ended.err[-1]
