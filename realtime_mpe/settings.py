"""What the user turns; what the model fixes is in `model.ModelInfo`."""

from dataclasses import dataclass, replace

from .analysis import MAX_LOOKAHEAD
from .errors import UserError
from .model import ModelInfo
from .notes import Thresholds

LATENCIES = {"low": 0, "balanced": 1, "accurate": 2}  # look-ahead in frames; later ones make little better


@dataclass(frozen=True)
class Settings:
    """lookahead : 0..4 frames, None = the model's own.  sensitivity : 0..1, 0.5 is neutral.

    bend : whether the sinks are told how the pitch of sounding notes moves.  players : how many there are, None = found
    out.
    """

    lookahead: int | None = None
    sensitivity: float = 0.5
    bend: bool = False
    players: int | None = None

    def __post_init__(self) -> None:
        if self.lookahead is not None and not 0 <= self.lookahead <= MAX_LOOKAHEAD:
            raise UserError(f"look-ahead {self.lookahead} is outside 0..{MAX_LOOKAHEAD} frames of 32 ms")
        if self.players is not None and self.players < 1:
            raise UserError(f"{self.players} players play nothing; give 1 or more")
        if not 0.0 <= self.sensitivity <= 1.0:
            raise UserError(f"sensitivity {self.sensitivity} is outside 0..1 (0.5 is neutral)")

    def of(self, info: ModelInfo) -> "Settings":
        """The same with the model's own look-ahead where none was chosen."""
        return replace(self, lookahead=info.lookahead) if self.lookahead is None else self

    def thresholds(self, info: ModelInfo) -> Thresholds:
        """The model's at this look-ahead, which must be chosen, moved by the sensitivity."""
        return info.thresholds[self.lookahead].shifted(self.sensitivity)
