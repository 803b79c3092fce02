"""Pictures: what was played above what was heard, a colour a player; precision against recall; a map of sources."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS
from realtime_mpe.errors import UserError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into files, without a display
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
except ModuleNotFoundError as error:
    raise UserError('pictures need matplotlib: pip install "realtime-mpe[train]"') from error

from .protocol import Curve, pair_slots, runs

# Dark and light in turn, so that neighbours differ without hue too; grey is kept for what is nobody's.
COLOURS = ("#0b5cad", "#e8710a", "#1d8a3a", "#d0242f", "#7b3fb5", "#00a6b4", "#8a5a2b", "#e65fb5", "#a8a800", "#222222")
NOBODY = "#9a9a9a"
INCHES_A_SECOND, LEAST_INCHES, MOST_INCHES = 0.35, 10.0, 60.0  # in width; Agg ends at 65,536 pixels
DPI = 100
MARGIN = 2  # semitones around what is played


def piece_picture(
    path: Path, title: str, names: Sequence[str], rolls: np.ndarray, slots: np.ndarray, threshold: float
) -> None:
    """names, rolls (S, N_PITCHES, T) bool of who plays; slots (K, N_PITCHES, T) probabilities, on from `threshold`."""
    slot_of = pair_slots(slots, rolls)
    heard = slots >= threshold
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(rolls))]
    source_of = {slot: source for source, slot in slot_of.items()}
    heard_colours = [colours[source_of[k]] if k in source_of else NOBODY for k in range(len(slots))]

    n_frames = rolls.shape[2]
    width = float(np.clip(INCHES_A_SECOND * n_frames * FRAME_SECONDS, LEAST_INCHES, MOST_INCHES))
    figure = Figure(figsize=(width, 8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    _draw_roll(axes[0], rolls, colours)
    _draw_roll(axes[1], heard, heard_colours)
    used = np.flatnonzero(rolls.any((0, 2)) | heard.any((0, 2)))
    low, high = (used[0], used[-1]) if len(used) else (0, rolls.shape[1] - 1)
    for axis, label in zip(axes, ("played", "heard"), strict=True):
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_ylabel("pitch")
    axes[0].set_ylim(FIRST_MIDI + low - MARGIN, FIRST_MIDI + high + MARGIN)
    axes[0].set_xlim(0, n_frames * FRAME_SECONDS)
    axes[0].set_yticks(*_note_names(FIRST_MIDI + low - MARGIN, FIRST_MIDI + high + MARGIN))
    axes[1].set_xlabel("seconds")
    labels = [f"{name}: slot {slot_of[k]}" if k in slot_of else f"{name}: no slot" for k, name in enumerate(names)]
    patches = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    if any(heard[k].any() for k in range(len(slots)) if k not in source_of):
        patches.append(Patch(color=NOBODY, label="slots of nobody"))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axes[0].legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=min(len(patches), 6), frameon=False)
    _save(figure, path)


def curves_picture(path: Path, curves: Mapping[str, Curve], title: str) -> None:
    """Precision against recall of all files pooled, by the name of each curve."""
    figure = Figure(figsize=(6.5, 6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        recall, precision = curve.points()
        axis.plot(recall, precision, color=colour, label=f"{name}: AP {100 * curve.average_precision:.1f}")
    axis.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="recall", ylabel="precision", aspect="equal")
    axis.set_title(title, fontsize=11)
    axis.grid(color="#dddddd")
    axis.legend(loc="lower left")
    _save(figure, path)


def map_picture(path: Path, embedding: np.ndarray, group: Sequence[str], title: str) -> None:
    """Embeddings (N, E) of sources on their first two principal components, a colour a group."""
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    x, y = (centred @ axes[:2].T).T
    share = spread[:2] ** 2 / (spread**2).sum()
    figure = Figure(figsize=(9.5, 7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, colour in zip(sorted(set(group)), COLOURS, strict=False):
        own = np.array([g == name for g in group])
        axis.scatter(x[own], y[own], color=colour, s=22, alpha=0.8, label=f"{name} ({own.sum()})", edgecolors="none")
    axis.set_xlabel(f"first component, {100 * share[0]:.0f} % of the variance")
    axis.set_ylabel(f"second component, {100 * share[1]:.0f} %")
    axis.set_title(title, fontsize=11)
    axis.grid(color="#dddddd")
    figure.legend(loc="outside right upper", fontsize=9)
    _save(figure, path)


def _draw_roll(axis, rolls: np.ndarray, colours: Sequence[str]) -> None:
    """Each run of cells as a bar on its pitch; bool rolls (N, N_PITCHES, T)."""
    axis.set_axisbelow(True)
    axis.grid(color="#e4e4e4", linewidth=0.6)
    for roll, colour in zip(rolls, colours, strict=True):
        bars = [
            # Frame i is centred on its second.
            Rectangle(((first - 0.5) * FRAME_SECONDS, FIRST_MIDI + p - 0.4), (end - first) * FRAME_SECONDS, 0.8)
            for p, row in enumerate(roll)
            for first, end in runs(row)
        ]
        axis.add_collection(PatchCollection(bars, facecolor=colour, edgecolor="none", alpha=0.9))


def _note_names(lowest: int, highest: int) -> tuple[list[int], list[str]]:
    """Every C and G between, as ticks and labels."""
    ticks = [midi for midi in range(lowest, highest + 1) if midi % 12 in (0, 7)]
    return ticks, [f"{'C' if midi % 12 == 0 else 'G'}{midi // 12 - 1}" for midi in ticks]


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
