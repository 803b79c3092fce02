"""What notes sound like in company: who is heard, and that what one sound does to another is learnt and undone."""

from dataclasses import replace

import numpy as np
import torch
from made_up import TIMBRES, by_timbre, performance, play

from realtime_mpe.affinity import EMBEDDING_FRAMES
from realtime_mpe.analysis import N_PITCHES
from realtime_mpe.timbre import alone, heard
from realtime_mpe.training import company
from realtime_mpe.training.company import as_timbre, fit_company, overhear
from realtime_mpe.voices import VoiceMemory

PLAYERS = 8
COLOUR = 1.5  # what the notes beside it add to a note


def coloured(seed: int):
    """A performance in which every note sounds more like the notes beside it than like itself."""
    clean = performance(seed, PLAYERS)
    embeddings = clean.embeddings()
    mixed, sounding = embeddings.copy(), set()
    for step, events in enumerate(clean.events):
        for event in events:
            (sounding.add if event.on else sounding.discard)(event.pitch)
        pitches = np.array(sorted(sounding), int)
        for back in range(4 if any(event.on for event in events) else 1):  # what is decided on has sounded already
            if len(pitches) > 1 and step >= back:
                own = embeddings[step - back, pitches]
                mixed[step - back, pitches] = own + COLOUR * (own.sum(0) - own) / (len(pitches) - 1)
    steps, pitches = clean.where.T
    return replace(clean, values=mixed[steps, pitches].astype(clean.values.dtype))


def confused(performances, timbre) -> float:
    """How often two notes of two players are more alike, in the end, than two of one player."""
    wrong = []
    for views in map(lambda p: overhear(p, 8), performances):
        unit = timbre(views.inputs[:, -1])
        rows, columns = np.triu_indices(len(unit), 1)
        likeness, same = (unit @ unit.T)[rows, columns], views.player[rows] == views.player[columns]
        wrong.append((likeness[same][:, None] <= likeness[~same]).mean())
    return float(np.mean(wrong))


def test_company_is_the_mean_of_all_others_and_their_number():
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(3, N_PITCHES, 5))
    found = heard(embedding[:, [4, 50, 9]])
    assert found.shape == (3, 3, 11)
    np.testing.assert_allclose(found[..., :5], embedding[:, [4, 50, 9]])
    np.testing.assert_allclose(found[:, 1, 5:10], (embedding[:, 4] + embedding[:, 9]) / 2)
    assert (found[..., 10] == 2).all()
    single = heard(embedding[0, [7]])
    assert (single[0, 5:] == 0).all()
    np.testing.assert_allclose(alone(single, np.ones(1))[0], embedding[0, 7] / np.linalg.norm(embedding[0, 7]))


def test_a_note_is_heard_with_what_sounds_beside_it_for_as_long_as_it_does():
    told = []

    def timbre(mean, frames):
        told.extend(zip(mean, frames, strict=True))
        return alone(mean, frames)

    memory = VoiceMemory(by_timbre, 8, timbre=timbre)
    play([(0, 10, 40, 0), (4, 8, 50, 1)], 7, memory=memory)
    memory.notes()  # which asks for the timbres
    mean, frames = told[-2]  # of the first note, after 7 frames, 3 of them with the second
    assert frames == 8  # in the frame in which it begins it is heard when it is decided on, and learnt from
    np.testing.assert_allclose(mean[:16], TIMBRES[0])
    np.testing.assert_allclose(mean[16:32], TIMBRES[1] * 3 / 8)
    np.testing.assert_allclose(mean[32], 3 / 8)
    memory = VoiceMemory(by_timbre, 8, timbre=timbre)
    play([(0, 60, 40, 0)], EMBEDDING_FRAMES + 5, memory=memory)
    memory.notes()
    assert told[-1][1] == EMBEDDING_FRAMES


def test_what_one_sound_does_to_another_is_learnt_and_undone(monkeypatch):
    monkeypatch.setattr(company, "STEPS", 600)
    train, held_out = [coloured(seed) for seed in range(12)], [coloured(100 + seed) for seed in range(4)]
    said = []
    network = fit_company(train, 8, say=said.append)
    assert len(said) == 4
    before = confused(held_out, lambda inputs: alone(inputs[:, :33], np.ones(len(inputs))))
    with torch.no_grad():
        after = confused(held_out, lambda inputs: network(torch.from_numpy(inputs)).numpy())
    assert after < 0.5 * before
    views = overhear(held_out[0], 8)
    mean, frames = views.inputs[:, -1, :33], np.expm1(4 * views.inputs[:, -1, 34])
    with torch.no_grad():
        wanted = network(torch.from_numpy(views.inputs[:, -1])).numpy()
    np.testing.assert_allclose(as_timbre(network)(mean, frames), wanted, atol=1e-5)


def test_a_single_player_teaches_nothing_and_changes_nothing():
    network = fit_company([performance(0, 1)], 8, say=lambda line: None)
    views = overhear(performance(1, 2), 8)
    with torch.no_grad():
        found = network(torch.from_numpy(views.inputs[:, -1])).numpy()
    np.testing.assert_allclose(found, alone(views.inputs[:, -1, :33], np.ones(len(found))), atol=1e-6)
