"""``rt-mpe train``: from scores and sounds to a model file.

    stems -> network -> thresholds -> players -> ONNX file

Stems and network resume where they stopped; what follows takes minutes and is done anew.

Without arguments nothing but this package is needed: a procedural composer writes the scores and the numpy
synthesizer plays them. With ``--scores``, ``--soundfont`` and ``--samples`` it is the recipe of the shipped model.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from realtime_mpe.analysis import HOP
from realtime_mpe.errors import UserError
from realtime_mpe.notes import Thresholds

from . import rendering, train_recipe
from .calibrate import calibrate, hear
from .export import export
from .fit import CHECKPOINT_FILE, FitConfig, fit
from .frontend import FrontEnd
from .mixing import Mixture, remix
from .network import LiveNetwork, NetworkConfig
from .players import Players, fit_players
from .pointer import Performance, perform
from .recipe import load_recipe
from .stems import StemCache

SIZES = {
    "small": NetworkConfig(channels=32, embedding_channels=32),
    "live": NetworkConfig(channels=96, embedding_channels=96, embedding_dim=48),
    "tiny": NetworkConfig(channels=16, embedding_channels=0),  # for weak machines: what sounds, and not who plays
}
LEARNING_RATES = {"tiny": 2.4e-3}  # where it is not FitConfig's own: few weights bear longer steps
LIVE = "live"  # what is trained unless a recipe is named
DEFAULT_LOOKAHEAD = 1  # frames; at 2 a note's player is told no better on validation data
FEW_EVERY = 3  # performances for the voice memory, one is by a few players: who is alone must be heard too
CALIBRATION_MIXTURES = 24
FEWEST_PERFORMANCES = 10  # of a validation set that still says something
QUANTISED_FROM = 48  # channels; narrower networks are no faster for it
LEVELS_MIXTURES, LEVELS_FRAMES = 8, 128  # of music, each, that show what range every activation has
RUN_FILE, PLAYERS_FILE, LEVELS_FILE = "run.json", "players.pt", "levels.npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", default=LIVE, help=f"of the paper: exp1a .. exp3c, timbre, X.toml (default: {LIVE})")
    add("-o", "--out", type=Path, help="folder of the run (default: runs/small, or runs/RECIPE)")
    rendering.add_arguments(parser, segments=60)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for torch (default: %(default)s)")
    add = parser.add_argument_group("for the live model").add_argument
    add("--size", choices=SIZES, default="small", help="of the network (default: %(default)s)")
    add("--hours", type=float, default=2.0, help="of mixtures to learn from (default: %(default)s)")
    add(
        "--performances",
        type=int,
        default=100,
        help="mixtures for the voice memory, beside half as many of chamber music (default: %(default)s)",
    )
    train_recipe.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.recipe != LIVE:
        return train_recipe.run(args, load_recipe(args.recipe))
    for option in ("hours", "segments", "performances", "workers"):
        if not getattr(args, option) > 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} is impossible; give more than 0")
    out, started = args.out or Path("runs/small"), time.monotonic()
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UserError(f"there is no device {args.device!r}; use cpu, cuda or cuda:N") from error
    out.mkdir(parents=True, exist_ok=True)
    sounds = rendering.Sounds.of(args)
    try:
        caches = rendering.render_sets(
            out / "stems",
            sounds,
            args.segments,
            seed=args.seed,
            workers=args.workers,
            cluster=args.cluster,
            say=lambda line: print(line, flush=True),
        )
        rate = LEARNING_RATES.get(args.size, FitConfig.learning_rate)
        config = FitConfig(args.hours, learning_rate=rate, seed=args.seed).for_device(device)
        network = fit(out, caches["train"], caches["validation"], config, SIZES[args.size], device)
        players, thresholds = fit_voices(network, caches, sounds, args.performances, args.seed, device)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {out}", file=sys.stderr)
        return 130
    if players:
        players.save(out / PLAYERS_FILE)
    np.save(out / LEVELS_FILE, music(caches["validation"], args.seed).astype(np.float16))
    record = {
        "command": command(args),
        **sounds.record(),
        "segments": len(caches["train"]),
        "hours_heard": round(json.loads((out / "progress.json").read_text())["hours"], 4),
        "torch": torch.__version__,
        "seed": args.seed,
    }
    (out / RUN_FILE).write_text(
        json.dumps({"size": args.size, "thresholds": [vars(t) for t in thresholds], "record": record}, indent=1)
    )
    path = out / "model.onnx"
    export_run(out, path)
    minutes = (time.monotonic() - started) / 60
    print(f"wrote {path} after {minutes:.0f} minutes; try: rt-mpe listen --source demo --model {path}")
    return 0


def command(args: argparse.Namespace) -> str:
    """What to type to make this model again, with folders by their names alone."""
    words = ["rt-mpe train"]
    for option in ("scores", "soundfont", "samples"):
        words += [f"--{option} {path.name}" for path in getattr(args, option)]
    for option in ("size", "hours", "segments", "performances", "seed"):
        words.append(f"--{option.replace('_', '-')} {getattr(args, option)}")
    return " ".join(words)


def fit_voices(
    network: LiveNetwork,
    caches: dict[str, StemCache],
    sounds: rendering.Sounds,
    performances: int,
    seed: int,
    device: torch.device,
) -> tuple[Players | None, tuple[Thresholds, ...]]:
    """What follows the network and depends on it: thresholds on held-out mixtures; and what tells players apart, if it
    does."""
    network.to(device)
    front_end = FrontEnd().to(device)
    held_out = mixtures(caches["validation"], CALIBRATION_MIXTURES, seed + 2)
    thresholds = calibrate(hear(network, front_end, held_out, device))
    if not network.config.tells_players:
        return None, thresholds
    counts = {
        "memory": performances,
        "chamber": performances // 2,
        "validation": max(performances // 8, FEWEST_PERFORMANCES),
    }
    heard = {
        name: hear_performances(
            network, front_end, caches[name], name == "chamber", thresholds, count, seed + 3, device
        )
        for name, count in counts.items()
        if name in caches
    }
    train = heard["memory"] + heard.get("chamber", [])
    scores, _ = rendering.scores(sounds)
    return fit_players(train, heard["validation"], scores, network.config.max_voices, seed), thresholds


def music(cache: StemCache, seed: int) -> np.ndarray:
    """Frames of a few mixtures, (LEVELS_MIXTURES * LEVELS_FRAMES, n_bins) float32."""
    front_end, n = FrontEnd(), LEVELS_FRAMES * HOP
    heard = [front_end(torch.from_numpy(m.audio[None, :n]))[0] for m in mixtures(cache, LEVELS_MIXTURES, seed + 4)]
    return torch.cat(heard).numpy()


def export_run(run: Path, path: Path) -> None:
    """The trained parts in a run's folder as one model file; UserError if a part is missing."""
    try:
        settings = json.loads((run / RUN_FILE).read_text())
        network = LiveNetwork(SIZES[settings["size"]])
        weights = torch.load(run / CHECKPOINT_FILE, map_location="cpu", weights_only=True)["average"]
        players = levels = None
        if network.config.tells_players:
            players = Players.load(run / PLAYERS_FILE, network.config.embedding_dim)
        if network.config.channels >= QUANTISED_FROM:
            levels = np.load(run / LEVELS_FILE).astype(np.float32)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name
        raise UserError(f"{run} holds no finished training (no {missing}); run rt-mpe train -o {run}") from error
    except (TypeError, ValueError, RuntimeError) as error:  # other networks, or of other shapes
        raise UserError(f"{run} is of an earlier version; rt-mpe train -o {run} makes it anew") from error
    network.load_state_dict({k.removeprefix("module."): v for k, v in weights.items() if k.startswith("module.")})
    thresholds = tuple(Thresholds(**row) for row in settings["thresholds"])
    export(path, network, players, DEFAULT_LOOKAHEAD, thresholds, settings["record"], levels)


def mixtures(
    cache: StemCache, count: int, seed: int, few_every: int | None = None, chamber: bool = False
) -> Iterator[Mixture]:
    """Whole-segment re-mixes, the same for the same seed; every ``few_every``-th is of a few players."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        few = few_every is not None and k % few_every == few_every - 1
        yield remix(cache, k % len(cache), rendering.SEGMENT_SECONDS, rng, few=few, chamber=chamber)


def hear_performances(
    network: LiveNetwork,
    front_end: FrontEnd,
    cache: StemCache,
    chamber: bool,
    thresholds: tuple[Thresholds, ...],
    count: int,
    seed: int,
    device: torch.device,
) -> list[Performance]:
    """What the engine would detect in ``count`` mixtures; one at a time, for the posteriors are large."""
    performances = []
    for number, mixture in enumerate(mixtures(cache, count, seed, FEW_EVERY, chamber), 1):
        heard = hear(network, front_end, [mixture], device)[0]
        performances.append(perform(heard, thresholds[DEFAULT_LOOKAHEAD], DEFAULT_LOOKAHEAD))
        if number % 50 == 0 or number == count:
            print(f"performances heard: {number} of {count}", flush=True)
    return performances
