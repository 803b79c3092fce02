"""``rt-mpe experiment``: the slot-attention paper's table with one command, and how fast its networks train.

    data -> timbre teacher -> (shared start ->) eight rows -> evaluation on every test set -> report

What is there already is kept: an interrupted experiment goes on where it stopped.
"""

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from lightning_fabric import Fabric

from realtime_mpe.analysis import FRAME_SECONDS
from realtime_mpe.errors import UserError

from . import rendering, train_recipe
from .evaluate import evaluate
from .fit_recipe import CURVE_FILE, Budget, SlotTask
from .protocol import SPLITS
from .recipe import SlotRecipe, load_recipe
from .slots import WINDOW, SlotNetwork, parameter_count
from .train_recipe import MODEL_FILE, RESULT_FILE, Machines

ROWS = ("exp1a", "exp1b", "exp1c", "exp2a", "exp2b", "exp3a", "exp3b", "exp3c")
TIMBRE, START = "timbre", "start"  # runs beside those of the rows
COLUMNS = {  # of the table, by the keys of `evaluate`'s report
    "mix_AP": "mix AP",
    "mix_F1": "mix F1",
    "note_F1": "note F1",
    "mix_polyphony": "count",
    "family_AP": "family AP",
    "family_F1": "family F1",
    "family_strict_F1": "strict",
    "stem_AP": "stem AP",
    "stem_F1": "stem F1",
    "stem_strict_F1": "strict",
    "stem_timbre": "timbre",
}


@dataclass(frozen=True)
class Table3:
    """data : shards.  out : a run a row.  tests : folder of each test set by name.  windows : each row hears.

    start_windows : heard by a mixture-only network that every row then begins with; 0 = from scratch, as in the paper.
    """

    data: Path
    out: Path
    tests: dict[str, Path]
    rows: Sequence[str]
    windows: int | None
    start_windows: int
    timbre_stems: int | None
    per_epoch: int
    seed: int
    jobs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="experiment", metavar="NAME", required=True)
    table = commands.add_parser("table3", help="train and score all rows of the paper's Table III")
    add = table.add_argument
    add("-o", "--out", type=Path, default=Path("runs/table3"), help="a run a row (default: %(default)s)")
    add("--data", type=Path, help="folder of rt-mpe data render or pack (default: rendered in OUT/data)")
    add("--test", action="append", default=[], metavar="NAME=FOLDER", help="data set to score on, may be repeated")
    add("--rows", default=",".join(ROWS), help="with commas between (default: all)")
    add("--windows", type=int, help="each row hears (default: the recipe's 100 epochs)")
    add("--start-windows", type=int, default=0, help="heard first by one mixture network, with which all rows begin")
    add("--timbre-stems", type=int, help="the timbre teacher hears (default: the recipe's 100 epochs)")
    add("--per-epoch", type=int, default=Budget.per_epoch, help="windows between validations (default: %(default)s)")
    add("--report", type=Path, help="where the table is written (default: OUT/experiments.md)")
    add("--jobs", type=int, default=1, help="recordings scored at a time (default: %(default)s)")
    add("--json", action="store_true", help="print the figures as JSON instead")
    rendering.add_arguments(table, segments=60)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for torch (default: %(default)s)")
    train_recipe.add_machine_arguments(table)
    speed = commands.add_parser("speed", help="windows a second, with and without bf16 and channels_last")
    speed.add_argument("--data", type=Path, required=True, help="folder of rt-mpe data render or pack")
    speed.add_argument("--recipe", default="exp3c", help="(default: %(default)s)")
    speed.add_argument("--steps", type=int, default=10, help="of each way (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.experiment == "speed":
        return run_speed(args)
    tests = dict(parse_test(text) for text in args.test)
    rows = args.rows.split(",")
    for row in rows:
        if not isinstance(load_recipe(row), SlotRecipe):
            raise UserError(f"{row} is no row of the table; choose from {', '.join(ROWS)}")
    data = rendering.shards_for(args, args.out / "data")
    table = Table3(
        data,
        args.out,
        tests,
        rows,
        args.windows,
        args.start_windows,
        args.timbre_stems,
        args.per_epoch,
        args.seed,
        args.jobs,
    )
    fabric = train_recipe.machines(args).fabric()
    try:
        train_table(table, fabric)
        if not fabric.is_global_zero:
            return 0
        reports = score_table(table)
    except KeyboardInterrupt:
        if fabric.is_global_zero:
            print(f"\nstopped; the same command goes on from {args.out}", file=sys.stderr)
        return 130
    text = markdown(table, reports)
    path = args.report or args.out / "experiments.md"
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --report") from error
    print(json.dumps(reports, indent=1) if args.json else text)
    return 0


def parse_test(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UserError(f"--test {text!r} must be NAME=FOLDER")
    if not Path(folder).is_dir():
        raise UserError(f"--test {text!r}: there is no folder {folder!r}")
    return name, Path(folder)


def train_table(table: Table3, fabric: Fabric) -> None:
    """Every run that has not been finished."""
    budget = Budget(table.windows, table.per_epoch, seed=table.seed)
    recipes = {row: load_recipe(row) for row in table.rows}
    plan = []
    if any(recipe.needs_teacher for recipe in recipes.values()):
        plan.append((TIMBRE, load_recipe("timbre"), replace(budget, examples=table.timbre_stems), None))
    start = None
    if table.start_windows:
        start = table.out / START
        plan.append((START, load_recipe("exp1a"), replace(budget, examples=table.start_windows), None))
    plan += [(row, recipe, budget, start) for row, recipe in recipes.items()]
    for name, recipe, its_budget, its_start in plan:
        if not (table.out / name / MODEL_FILE).exists():
            train_recipe.train_recipe(
                table.out / name, recipe, table.data, its_budget, fabric, table.out / TIMBRE, its_start
            )
        fabric.barrier()


def score_table(table: Table3) -> dict[str, dict[str, dict]]:
    """Report of `evaluate` by test set and row; kept beside each model, and made anew if the model is newer."""
    reports: dict[str, dict[str, dict]] = {}
    teacher = table.out / TIMBRE / MODEL_FILE
    for test, folder in table.tests.items():
        for row in table.rows:
            model = table.out / row / MODEL_FILE
            kept = table.out / row / f"evaluation-{test}.json"
            if not kept.exists() or kept.stat().st_mtime < model.stat().st_mtime:
                report = evaluate(
                    str(model),
                    folder,
                    timbre=teacher if teacher.exists() else None,
                    jobs=table.jobs,
                    progress=lambda line, row=row: print(f"{row}: {line}", file=sys.stderr, flush=True),
                )
                kept.write_text(json.dumps(report, indent=1))
            reports.setdefault(test, {})[row] = json.loads(kept.read_text())
    return reports


# The report


def published() -> dict:
    return tomllib.loads(resources.files("realtime_mpe.training").joinpath("published.toml").read_text("utf-8"))


def markdown(table: Table3, reports: dict[str, dict[str, dict]]) -> str:
    known = published()
    heard = lambda count: f"{count:,} windows ({count * WINDOW * FRAME_SECONDS / 3600:.1f} h)"  # noqa: E731
    lines = ["## Rows", "", "| row | parameters | published | heard | validation: mix AP | matched slots, a window |"]
    lines.append("|---|---|---|---|---|---|")
    for row in table.rows:
        curve = [json.loads(line) for line in (table.out / row / CURVE_FILE).read_text().splitlines()]
        best = min(curve, key=lambda point: point["validation_loss"])
        count = parameter_count(SlotNetwork(load_recipe(row).network))
        cells = [row, f"{count:,}", f"{known['parameters'][row]:,}", heard(table.start_windows + curve[-1]["examples"])]
        cells += [f"{best[f'validation_{key}']:.1f}" for key in ("mix_AP", "window_slot_AP")]
        lines.append(f"| {' | '.join(cells)} |")
    if table.start_windows:
        lines += ["", f"Each row began with the same mixture network, which had heard {heard(table.start_windows)}."]
    result = table.out / TIMBRE / RESULT_FILE
    if result.exists():
        found, theirs = json.loads(result.read_text())["held_out"], known["timbre"]
        lines += [
            "",
            f"Timbre encoder: of {found['sources']} sources that no training heard, {100 * found['top1']:.1f} % are "
            f"the nearest to a view of theirs and {100 * found['top5']:.1f} % among the nearest five "
            f"(published, on other data: {theirs['top1']} and {theirs['top5']} %). Two different sources have a cosine "
            f"of {found['between']:.2f}: the column timbre below has to be read beside it.",
        ]
    for test, rows in reports.items():
        lines += ["", f"## {test}", ""]
        theirs = known["table3"].get(test, {})
        lines.append(f"| row | {' | '.join(COLUMNS.values())} |")
        lines.append("|---|" + "---|" * len(COLUMNS))
        for row, report in rows.items():
            cells = [cell(report, key, theirs.get(row, {}).get(key)) for key in COLUMNS]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines += ["", "The same mixture maps split without a model (F1 matched / strict):", ""]
        lines.append(f"| row | level | its slots | {' | '.join(SPLITS)} |")
        lines.append("|---|---|---|" + "---|" * len(SPLITS))
        for row, report in rows.items():
            for level in ("family", "stem"):
                lines.append(split_row(row, report, level))
    return "\n".join(lines) + "\n"


def cell(report: dict, key: str, theirs: float | None) -> str:
    value = report.get(key)
    if value is None:
        return "-"
    own = f"{value:.2f}" if key.endswith("timbre") else f"{value:.1f}"
    return own if theirs is None else f"{own} (published {theirs:g})"


def split_row(row: str, report: dict, level: str) -> str:
    pair = lambda name: f"{report[f'{name}_F1']:.1f} / {report[f'{name}_strict_F1']:.1f}"  # noqa: E731
    mark = "" if report[f"{level}_beats_rank"] else " **not above pitch rank**"
    splits = " | ".join(pair(f"{level}_{split}") for split in SPLITS)
    return f"| {row} | {level} | {pair(level)}{mark} | {splits} |"


# Speed


def run_speed(args: argparse.Namespace) -> int:
    """Both sides of every comparison in this one process, in turns, so that a busy machine slows all of them."""
    recipe = load_recipe(args.recipe)
    if not isinstance(recipe, SlotRecipe):
        raise UserError(f"{args.recipe} trains no slot network; choose from {', '.join(ROWS)}")
    recipe = replace(recipe, weights=replace(recipe.weights, timbre=0.0, matching_cosine=0.0))
    ways = {
        "float32": ("32-true", torch.contiguous_format),
        "float32, channels_last": ("32-true", torch.channels_last),
        "bf16": ("bf16-mixed", torch.contiguous_format),
        "bf16, channels_last": ("bf16-mixed", torch.channels_last),
    }
    steps = {}
    for name, (precision, layout) in ways.items():
        steps[name] = training_step(recipe, args.data, Machines(precision=precision).fabric(), layout)
        steps[name]()
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(args.steps):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name] += time.perf_counter() - begun
    base = seconds["float32"]
    print(f"{args.recipe}, batches of {recipe.schedule.batch_size} windows, {torch.get_num_threads()} threads")
    for name, spent in seconds.items():
        rate = args.steps * recipe.schedule.batch_size / spent
        live = rate * WINDOW * FRAME_SECONDS
        print(f"{name:<24}{rate:7.1f} windows/s ({live:.1f} x real time), {base / spent:.2f} x float32")
    return 0


def training_step(recipe: SlotRecipe, data: Path, fabric: Fabric, layout: torch.memory_format):
    """A function that does one whole step, forward and backward, always on the same windows."""
    task = SlotTask(recipe, data, None, 0, fabric.device, held_out=8, layout=layout)
    optimizer = torch.optim.AdamW(task.module.to(memory_format=layout).parameters(), recipe.schedule.learning_rate)
    module, optimizer = fabric.setup(task.module, optimizer)
    batch = task.held_out[0]

    def step() -> None:
        losses = task.losses(module, batch, torch.Generator())
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(sum(task.weights[name] * loss for name, loss in losses.items()))
        optimizer.step()

    return step
