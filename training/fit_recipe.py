"""Training of a recipe: one loop, read from top to bottom, on one CPU, several GPUs or several machines.

Lightning Fabric gives devices, precision and gradients' exchange; every process reads shards of its own. The loop
resumes in the middle of an epoch and then meets the same windows with the same weights, so an interruption does not
show in the curve.
"""

import errno
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from realtime_mpe.analysis import PAPER
from realtime_mpe.errors import UserError

from . import timbre
from .fit import average_precision, precision_recall
from .frontend import FrontEnd
from .recipe import Recipe, Schedule, SlotRecipe, TimbreRecipe, untrained
from .shards import shard_paths
from .slot_losses import matches, slot_losses, slot_targets
from .slots import harmonic_input
from .windows import SourceTable, Windows, collate

CHECKPOINT_FILE, CURVE_FILE = "checkpoint.pt", "curve.jsonl"
CHECKPOINT_SECONDS = 120.0
LINE_SECONDS = 10.0
DECAY_SHARE = 0.5  # of all steps at the end, over which the learning rate falls to 0 if the budget is used up
VALIDATION_WINDOWS = 384
VALIDATION_SEGMENTS = 24  # whose stems are asked for in retrieval
LAYOUT = torch.channels_last  # of the networks and their input: half as slow on a CPU
CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class Budget:
    """What a training may cost. examples : windows, or stems for the encoder, in all; None: the recipe's epochs.

    per_epoch : between validations.  workers : processes a rank that prepare examples, 0 = the rank itself.
    """

    examples: int | None = None
    per_epoch: int = 4000
    workers: int = 0
    seed: int = 0


class Task(Protocol):
    """What differs between the slot networks and the timbre encoder."""

    module: nn.Module
    weights: dict[str, float]

    def examples(self, count: int) -> timbre.Examples: ...

    def collate(self, examples: list) -> object: ...

    def losses(self, module: nn.Module, batch: object, generator: torch.Generator) -> dict[str, Tensor]: ...

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Figures; "loss" is what the schedule follows, lower is better."""
        ...


class SlotTask:
    """held_out : windows of the fixed validation set."""

    def __init__(
        self,
        recipe: SlotRecipe,
        data: Path,
        sources: SourceTable | None,
        seed: int,
        device: torch.device,
        held_out: int = VALIDATION_WINDOWS,
        layout: torch.memory_format = LAYOUT,
    ):
        self.recipe, self.sources, self.seed, self.device, self.layout = recipe, sources, seed, device, layout
        self.train, validation = shard_paths(data / "train"), shard_paths(data / "validation")
        torch.manual_seed(seed)
        self.module = untrained(recipe)
        self.front_end = FrontEnd(PAPER).to(device)
        self.weights = {k: v for k, v in asdict(recipe.weights).items() if v and k != "matching_cosine"}
        self.collate = collate
        windows = Windows(validation, held_out, seed=1, sources=sources, shared=True)
        self.held_out = [batch.to(device) for batch in DataLoader(windows, 16, collate_fn=collate)]

    def examples(self, count: int) -> Windows:
        return Windows(self.train, count, self.seed, self.sources)

    def input(self, audio: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            levels = self.front_end(audio, self.front_end.margin)
            return harmonic_input(levels).contiguous(memory_format=self.layout)

    def losses(self, module, batch, generator):
        batch = batch.to(self.device)
        return slot_losses(module(self.input(batch.audio)), batch, self.recipe)

    @torch.no_grad()
    def validate(self, module):
        total, mixture, slots = [], [], []
        for batch in self.held_out:
            outputs = module(self.input(batch.audio))
            losses = slot_losses(outputs, batch, self.recipe)
            total.append(float(sum(self.weights[name] * loss for name, loss in losses.items())))
            mixture.append((outputs.mix.float().sigmoid().flatten(), batch.maps.amax(1).flatten()))
            maps, present, *_ = slot_targets(batch, self.recipe.targets.level)
            probability = outputs.slots.float().clamp(1e-5, 1 - 1e-5)
            cost = -torch.einsum("bkpt,bspt->bks", torch.logit(probability), maps)
            cost = cost - (1 - probability).log().sum((2, 3))[:, :, None]
            b, k, s = matches(cost, present, "hungarian").nonzero(as_tuple=True)
            slots.append((outputs.slots.float()[b, k].flatten(), maps[b, s].flatten()))
        figures = {"loss": float(np.mean(total))}
        for name, pairs in (("mix_AP", mixture), ("window_slot_AP", slots)):
            score, truth = (torch.cat(side) for side in zip(*pairs, strict=True))
            figures[name] = 100 * float(average_precision(*precision_recall(score, truth)))
        return figures


class TimbreTask:
    def __init__(self, recipe: TimbreRecipe, data: Path, seed: int, device: torch.device):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.train, self.held_out = shard_paths(data / "train"), shard_paths(data / "validation")
        torch.manual_seed(seed)
        self.module = untrained(recipe)
        self.front_end = FrontEnd(PAPER).to(device)
        self.weights = {k: v for k, v in asdict(recipe.weights).items() if v and k != "temperature"}
        self.collate = timbre.collate

    def examples(self, count: int) -> timbre.TimbreExamples:
        return timbre.TimbreExamples(self.train, count, self.seed, self.recipe.views)

    def losses(self, module, batch, generator):
        audio, source = (part.to(self.device) for part in batch)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            levels = self.front_end(audio, self.front_end.margin)
            levels = timbre.mask(levels, self.recipe.views, generator)
        embedding, projection = module(levels)
        return timbre.timbre_losses(embedding, projection, source, self.recipe.weights)

    def validate(self, module):
        found = timbre.retrieval(timbre.embed_sources(module, self.held_out, VALIDATION_SEGMENTS, self.device))
        return {"loss": 1.0 - found["top1"], **found}


def fit_recipe(
    run: Path,
    recipe: Recipe,
    data: Path,
    budget: Budget,
    fabric: Fabric,
    sources: SourceTable | None = None,
    start: Path | None = None,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Train, or go on training, ``recipe`` in the folder ``run``; returns the best network by validation loss.

    data : folder with the shards ``train`` and ``validation``.  sources : the teacher's table, which recipes with a
    timbre loss need.  start : a run whose best weights a new training begins with, where the shapes agree. Writes
    ``checkpoint.pt`` and ``curve.jsonl``. Ctrl-C ends the step, saves and is passed on. UserError if the run holds
    another recipe, and if the disk is full (the checkpoint before it stays).
    """
    if isinstance(recipe, SlotRecipe) and recipe.needs_teacher and sources is None:
        raise UserError(f"{recipe.name} learns from the timbre teacher: train it first (rt-mpe train timbre)")
    schedule, world = recipe.schedule, fabric.world_size
    if schedule.batch_size % world:
        raise UserError(f"a batch of {schedule.batch_size} cannot be shared evenly by {world} processes")
    if isinstance(recipe, TimbreRecipe):
        task: Task = TimbreTask(recipe, data, budget.seed, fabric.device)
    else:
        task = SlotTask(recipe, data, sources, budget.seed, fabric.device)
    per_epoch = max(1, budget.per_epoch // schedule.batch_size)
    steps = schedule.epochs * per_epoch if budget.examples is None else max(1, budget.examples // schedule.batch_size)
    total = steps * schedule.batch_size  # examples
    progress = {"step": 0, "epoch": 0, "batch": 0, "halvings": 0, "stale": 0, "best": math.inf, "seconds": 0.0}
    running: dict[str, float] = {}
    curve: list[dict] = []
    best: dict[str, Tensor] = {}

    network = task.module.to(memory_format=LAYOUT)
    saved = load_checkpoint(run, recipe)
    if saved:
        network.load_state_dict(saved["module"])
        progress, running, curve, best = (saved[key] for key in ("progress", "running", "curve", "best"))
    elif start is not None:
        begin_with(network, start)
    optimizer = torch.optim.AdamW(network.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)
    module, optimizer = fabric.setup(network, optimizer)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])

    def tell(line: str) -> None:
        if fabric.is_global_zero:
            say(f"{recipe.name}: {line}")

    def save() -> None:
        if fabric.is_global_zero:
            parts = dict(progress=progress, running=running, curve=curve, best=best, recipe=asdict(recipe))
            write_checkpoint(run, dict(module=network.state_dict(), optimizer=optimizer.state_dict(), **parts))

    if saved:
        tell(f"resuming after {progress['step'] * schedule.batch_size} of {total} examples")
    clock = Clock(progress)
    with interrupt_between_steps() as interrupted:
        # Until the last step has been validated too, which an interruption may have come between.
        while (progress["step"] < steps or progress["batch"]) and progress["stale"] < schedule.patience:
            examples = task.examples(per_epoch * schedule.batch_size // world)
            examples.epoch, examples.batch = progress["epoch"], schedule.batch_size // world
            loader = DataLoader(
                examples, schedule.batch_size // world, collate_fn=task.collate, num_workers=budget.workers
            )
            module.train()
            for number, batch in enumerate(loader):
                if progress["step"] >= steps:
                    break
                if number < progress["batch"]:  # heard before the interruption
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(schedule, progress, steps)
                generator = torch.Generator().manual_seed(progress["step"] * world + fabric.global_rank)
                losses = task.losses(module, batch, generator)
                loss = sum(task.weights[name] * value for name, value in losses.items())
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(loss)
                fabric.clip_gradients(module, optimizer, max_norm=CLIP)
                optimizer.step()
                progress["step"] += 1
                progress["batch"] += 1
                for name, value in losses.items():
                    running[name] = 0.98 * running.get(name, float(value.detach())) + 0.02 * float(value.detach())

                if clock.due("line", LINE_SECONDS):
                    rate = progress["step"] * schedule.batch_size / clock.tick()
                    parts = "  ".join(f"{name} {value:.4f}" for name, value in running.items())
                    tell(f"{progress['step'] * schedule.batch_size} of {total} examples, {rate:.1f}/s  {parts}")
                if clock.due("save", CHECKPOINT_SECONDS):
                    save()
                if agreed(interrupted, fabric):
                    save()
                    raise KeyboardInterrupt

            module.eval()
            figures = fabric.broadcast(task.validate(network))  # what is decided by them has to be the same everywhere
            if figures["loss"] < progress["best"]:
                progress.update(best=figures["loss"], stale=0)
                best = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
            else:
                progress["stale"] += 1
                if schedule.halve_after and progress["stale"] % schedule.halve_after == 0:
                    progress["halvings"] += 1
            progress.update(epoch=progress["epoch"] + 1, batch=0)
            figures = {f"validation_{name}": value for name, value in figures.items()}
            curve.append({"examples": progress["step"] * schedule.batch_size, **running, **figures})
            tell("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            clock.tick()
            save()
            fabric.barrier()
    network.load_state_dict(best)
    return network.eval()


def learning_rate(schedule: Schedule, progress: dict, steps: int) -> float:
    """Halved on plateaus, or a cosine; over the last DECAY_SHARE of the budget the former falls to 0."""
    done = progress["step"] / steps
    if not schedule.halve_after:
        return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return schedule.learning_rate * 0.5 ** progress["halvings"] * min(1.0, (1 - done) / DECAY_SHARE)


class Clock:
    """Seconds of training, kept in ``progress`` over interruptions, and when something is due again."""

    def __init__(self, progress: dict):
        self._progress = progress
        self._last = time.monotonic()
        self._next: dict[str, float] = {}

    def tick(self) -> float:
        """Count until now; returns the seconds in all."""
        now = time.monotonic()
        self._progress["seconds"] += now - self._last
        self._last = now
        return self._progress["seconds"]

    def due(self, what: str, every: float) -> bool:
        seconds = self.tick()
        if seconds < self._next.setdefault(what, seconds + every):
            return False
        self._next[what] = seconds + every
        return True


@contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """While entered, Ctrl-C only sets the event: half a step can be neither saved nor gone on from."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def agreed(pressed: threading.Event, fabric: Fabric) -> bool:
    """Whether to stop: if any process was told to, all do, or the others would wait for it for ever."""
    if fabric.world_size == 1:
        return pressed.is_set()
    return bool(fabric.all_reduce(torch.tensor(float(pressed.is_set())), reduce_op="sum") > 0)


def load_checkpoint(run: Path, recipe: Recipe) -> dict | None:
    """What `write_checkpoint` wrote, None if there is nothing yet. UserError if it is of another recipe or damaged."""
    path = run / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = saved["recipe"], asdict(recipe)
    except Exception as error:  # pickle, zip and torch each have errors of their own
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove it, or choose another --out") from error
    differences = [f"{k} {theirs.get(k)!r} != {v!r}" for k, v in ours.items() if theirs.get(k) != v]
    if differences:
        raise UserError(f"{run} holds a training of another recipe ({differences[0]}); choose another --out")
    return saved


def write_checkpoint(run: Path, state: dict) -> None:
    """As a whole or, with UserError, not at all: the one before it stays until the new one is complete."""
    partial = run / f"{CHECKPOINT_FILE}.partial"
    try:
        run.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        partial.replace(run / CHECKPOINT_FILE)
        (run / CURVE_FILE).write_text("".join(json.dumps(row) + "\n" for row in state["curve"]))
    except (OSError, RuntimeError) as error:  # torch tells of a full disk in a RuntimeError of its own
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            reason = error.strerror or error
        else:
            reason = "the disk is full"
        raise UserError(
            f"no checkpoint can be written in {run} ({reason}); make room, and the same command goes on from the last"
        ) from error


def begin_with(network: nn.Module, start: Path) -> None:
    """Take the best weights of another run wherever name and shape agree."""
    try:
        theirs = torch.load(start / CHECKPOINT_FILE, map_location="cpu", weights_only=True)["best"]
    except FileNotFoundError as error:
        raise UserError(f"there is no training in {start} to begin with") from error
    own = network.state_dict()
    own.update({name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape})
    network.load_state_dict(own)


def best_network(run: Path, recipe: Recipe) -> nn.Module:
    """Of a run, in evaluation mode; UserError if it has not got as far as its first validation."""
    saved = load_checkpoint(run, recipe)
    if saved is None or not saved["best"]:
        raise UserError(f"{run} holds no finished training; run rt-mpe train {recipe.name} -o {run}")
    network = untrained(recipe)
    network.load_state_dict(saved["best"])
    return network.eval()
