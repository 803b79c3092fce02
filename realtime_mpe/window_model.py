"""The slot-attention paper's networks live: whole windows of the front end through ONNX Runtime, every few hops.

Its convolutions look both ways in time and its front end looks 864 ms ahead, so this is for comparison rather than for
the stage: the declared latency says so. Each slot is a player: what a slot listens for is learned and fixed.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .analysis import MAX_LOOKAHEAD, N_BINS, N_PITCHES, PAPER, AnalysisConfig
from .cqt import StreamingCqt, audible
from .errors import UserError
from .model import DEFAULT_MODEL, ModelInfo, Posteriors, model_path, open_session
from .voices import SlotVoices

DEFAULT_STRIDE = 4  # hops, 128 ms; a window costs 44 ms of one core: RTF .4 with the front end, and .5 at 3 hops
DEFAULT_LOOKAHEAD = 2  # frames right of the one that is read


@dataclass(frozen=True)
class WindowInfo(ModelInfo):
    """recipe : that trained it.  window : frames.  stride : hops; the network runs once in so many."""

    FORMAT: ClassVar[str] = "rt-mpe window 1"
    ANALYSIS: ClassVar[AnalysisConfig] = PAPER

    recipe: str = ""
    window: int = 23
    stride: int = DEFAULT_STRIDE

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window - MAX_LOOKAHEAD:
            raise ValueError(f"a stride of {self.stride} does not fit windows of {self.window} frames")

    @classmethod
    def own_fields(cls, metadata: dict[str, str]) -> dict:
        return dict(recipe=metadata["recipe"], window=int(metadata["window"]), stride=int(metadata["stride"]))

    @property
    def latency(self) -> int:
        """Frames that the model adds: what it says of a frame must last until it runs again."""
        return self.stride - 1

    @property
    def facts(self) -> dict[str, str | int]:
        front_end = StreamingCqt(self.analysis).latency // self.analysis.hop
        latency = front_end + self.latency + self.lookahead
        return {"recipe": self.recipe, "window": self.window, "stride": self.stride, "latency": latency}

    def to_metadata(self) -> dict[str, str]:
        own = {"recipe": self.recipe, "window": str(self.window), "stride": str(self.stride)}
        return super().to_metadata() | own


class WindowModel:
    """The face of `OnnxModel` for a window network.

    ``steps`` : 1, a frame a hop.  ``latency`` : frames. `process` answers every frame although the network runs only
    with every ``stride``-th, so what it says is always ``stride`` - 1 frames old; within that, and the look-ahead, the
    network has seen what follows.  session : of the file, if it is open already.
    """

    steps = 1

    def __init__(self, name: str = DEFAULT_MODEL, session=None):
        path = model_path(name)
        self._session = session or open_session(path)
        self.info = WindowInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map, str(path))
        self.latency = self.info.latency
        inputs = [given.shape for given in self._session.get_inputs()]
        if inputs != [[1, self.info.window, N_BINS]]:
            raise UserError(f"{path} does not fit its metadata (inputs {inputs}); export the model again")
        self.reset()
        try:
            mix, slots = self._run()
        except Exception as error:  # a graph with other inputs or shapes: as many kinds of error as there are ways
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} does not fit its metadata ({reason}); export the model again") from error
        shape = (N_PITCHES, self.info.window)
        if mix.shape != shape or slots.shape != (self.info.voices, *shape):
            raise UserError(f"{path} does not fit its metadata (outputs {mix.shape}, {slots.shape}); export it again")

    def reset(self) -> None:
        """As if only silence had been heard."""
        silence = np.zeros((self.info.window, N_BINS), np.float32)
        self._frames = deque(silence, maxlen=self.info.window)
        self._age = -1  # frames since the network ran
        self._said: tuple[np.ndarray, np.ndarray] | None = None

    def voices(self, players: int | None = None) -> SlotVoices:
        """Who gives the notes to players. UserError if it is said how many there are: the slots are what they are."""
        if players is not None:
            raise UserError(f"{self.info.name} gives notes to its {self.info.voices} slots; leave --players out")
        return SlotVoices(self.info.voices)

    def process(self, frames: np.ndarray) -> Iterator[Posteriors]:
        """(m, 216) levels of frames -> for each Posteriors of those that lie `latency` and the look-ahead before it.

        The network knows no onsets. The embedding of a pitch is what each slot says of it, (72, K), in the frame of
        look-ahead 0: a note can begin as late as there.
        """
        for frame in frames:
            self._frames.append(audible(frame))
            self._age += 1
            if self._said is None or self._age == self.info.stride:
                self._said, self._age = self._run(), 0
            mix, slots = self._said
            newest = self.info.window - 1 - self.latency + self._age  # column of look-ahead 0
            rows = mix.T[newest - np.arange(MAX_LOOKAHEAD + 1)]
            yield Posteriors(rows, np.zeros_like(rows), slots[:, :, newest].T)

    def _run(self) -> tuple[np.ndarray, np.ndarray]:
        mix, slots = self._session.run(["mix", "slots"], {"window": np.stack(self._frames)[None]})
        return mix, slots
