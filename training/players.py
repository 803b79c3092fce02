"""All that tells players apart beside the network, learnt from scores and from performances that it hears.

    lines, what notes sound like in company -> groupings -> voters

Each is learnt in a memory that already has what stands before it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from realtime_mpe.model import GROUPING_PREFIX, LINES_PREFIX, POINTER_PREFIX, TIMBRE_PREFIX

from .company import CompanyNetwork, as_timbre, fit_company
from .grouping import GroupingNetwork, as_grouping, fit_grouping
from .likeness import liken
from .lines import STEPS_A_PERFORMANCE, LineNetwork, as_lines, fit_lines
from .pointer import Performance, PointerNetwork, fit_pointer
from .scores import Score


class Players(NamedTuple):
    """The networks of a model file: one of `Lines`, one of `ClearedTimbre`, those of `Grouping`, those of `Pointer`."""

    lines: LineNetwork
    company: CompanyNetwork
    groupings: list[GroupingNetwork]
    voters: list[PointerNetwork]

    def weights(self) -> dict[str, np.ndarray]:
        """By their names in a model file."""
        parts = [(LINES_PREFIX, self.lines), (TIMBRE_PREFIX, self.company)]
        parts += [(f"{GROUPING_PREFIX}{number}.", one) for number, one in enumerate(self.groupings)]
        parts += [(f"{POINTER_PREFIX}{number}.", one) for number, one in enumerate(self.voters)]
        return {f"{prefix}{name}": weight for prefix, part in parts for name, weight in part.weights().items()}

    def save(self, path: Path) -> None:
        many = ([network.state_dict() for network in networks] for networks in (self.groupings, self.voters))
        torch.save([self.lines.state_dict(), self.company.state_dict(), *many], path)

    @classmethod
    def load(cls, path: Path, embedding_dim: int) -> "Players":
        """TypeError, ValueError or RuntimeError if the file holds other networks."""
        lines, company, groupings, voters = torch.load(path, map_location="cpu", weights_only=True)
        return cls(
            loaded(LineNetwork(), lines),
            loaded(CompanyNetwork(embedding_dim), company),
            [loaded(GroupingNetwork(), state) for state in groupings],
            [loaded(PointerNetwork(), state) for state in voters],
        )


def loaded(network: torch.nn.Module, state: dict) -> torch.nn.Module:
    network.load_state_dict(state)
    return network.eval()


def fit_players(
    train: Sequence[Performance],
    validation: Sequence[Performance],
    scores: Sequence[Score] | None,
    max_voices: int,
    seed: int = 0,
) -> Players:
    """Of the two groupings one knows players as they are and one players more alike.

    scores : that lines are learnt from; None for composed ones.
    """
    line_network = fit_lines(scores, STEPS_A_PERFORMANCE * len(train), seed)
    lines = as_lines(line_network)
    company = fit_company(train, max_voices, seed)
    timbre = as_timbre(company)
    rng = np.random.default_rng(seed + 2)
    alike = [liken(performance, rng) for performance in train]
    groupings = [fit_grouping(learnt_from, max_voices, timbre, lines, seed) for learnt_from in (train, alike)]
    voters = fit_pointer(train, validation, max_voices, as_grouping(groupings, lines), timbre, seed)
    return Players(line_network, company, groupings, voters)
