"""The command ``rt-mpe``: what each command does lies in a module of its own, imported when the command is chosen.

Exit codes: 0, also after Ctrl-C in `listen`; 1 a result with defects; 2 an error, told in one line; 3 the sound device
was lost; 70 a fault of the program itself; 130 interrupted; 141 the reader of the output has gone.
"""

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, resources
from typing import NamedTuple

from .errors import UserError, tell

ERROR, FAULT, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141
TRAINING = "realtime_mpe.training."


class Command(NamedTuple):
    """module : offers ``add_arguments(parser)`` and ``run(args) -> int``; empty if the two functions are given here."""

    help: str
    module: str = ""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    run: Callable[[argparse.Namespace], int] | None = None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Exceptions leave it only with --debug."""
    # The products of a hop are too small to share: with more threads OpenBLAS spends fifteen times the CPU on waiting.
    # It looks at these when it is loaded, which no import before this line has done.
    # MKL is left alone, for torch takes the number of its own threads from there.
    for variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(variable, "1")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    with WarningsTold():
        try:
            code = dispatch(argv)
            sys.stdout.flush()
            return code
        except SystemExit as end:  # argparse, after --help and --version
            return end.code if isinstance(end.code, int) else 0
        except UserError as error:
            if debug:
                raise
            tell(error)
            return ERROR
        except KeyboardInterrupt:
            tell("interrupted", "stopped")
            return INTERRUPTED
        except BrokenPipeError:
            forget_output()
            return BROKEN_PIPE
        except Exception as fault:
            if debug:
                raise
            if isinstance(fault, OSError) and fault.errno == errno.ENOSPC:
                forget_output()
                tell(f"the output cannot be written: {fault.strerror}")
                return ERROR
            reason = " ".join(str(fault).split())
            tell(f"{type(fault).__name__}: {reason}; this should not happen: please report it with what --debug shows")
            return FAULT


def dispatch(argv: list[str]) -> int:
    """Parse and run; only the module of the chosen command is imported."""
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = Parser(prog="rt-mpe", description="Live multi-pitch estimation: every player's notes as MIDI.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("-l", "--list-devices", action="store_true", help="the same as rt-mpe devices")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands (COMMAND --help tells more)")
    run = None
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=f"{command.help}.")
        subparser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
        if name == chosen:
            add_arguments, run = load(name, command)
            add_arguments(subparser)
    args = parser.parse_args(argv)
    if args.version:
        print(f"rt-mpe {version()}")
        return 0
    if args.list_devices and args.command is None:
        args.command, run = "devices", _devices
    if args.command is None:
        parser.print_help()
        return ERROR
    try:
        return run(args)
    except ModuleNotFoundError as error:
        raise missing_package(args.command, error) from error


def load(name: str, command: Command) -> tuple[Callable, Callable]:
    """(add_arguments, run) of a command."""
    if not command.module:
        return command.add_arguments, command.run
    try:
        module = import_module(command.module)
    except ModuleNotFoundError as error:
        raise missing_package(name, error) from error
    return module.add_arguments, module.run


def missing_package(command: str, error: ModuleNotFoundError) -> Exception:
    """In words for the user; a module of our own that is missing is no matter of packages to install."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "realtime_mpe"):
        return error
    if COMMANDS[command].module.startswith(TRAINING):
        return UserError(f'rt-mpe {command} needs {package}: pip install "realtime-mpe[train]"')
    return UserError(f"the package {package} is missing: pip install {package}")


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("realtime-mpe")
    except PackageNotFoundError:
        return "(not installed)"


def forget_output() -> None:
    """Python flushes standard output once more at exit, and would complain about the broken pipe there."""
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # it is not a real file


class WarningsTold(logging.Handler):
    """While entered, what the modules log from warnings up is told to the user in the form of everything else."""

    def __enter__(self) -> "WarningsTold":
        self._logger = logging.getLogger("realtime_mpe")
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exc_info) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            tell(record.getMessage(), record.levelname.lower())


# The commands that are only a few lines


def _devices_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--list-devices", action="store_true", help="list them, which it does anyway")


def _devices(args: argparse.Namespace) -> int:
    from .listen import print_devices

    return print_devices()


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="default", help="name or file, or a recipe of training (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _info(args: argparse.Namespace) -> int:
    from .analysis import FRAME_SECONDS
    from .model import load_model, shipped_models

    recipe = resources.files("realtime_mpe.training").joinpath("recipes", f"{args.model}.toml")
    if args.model.endswith(".toml") or (recipe.is_file() and args.model not in shipped_models()):
        return import_module(f"{TRAINING}recipe").print_recipe(args.model, args.json)
    info = load_model(args.model).info
    own = info.facts
    facts = {
        "name": info.name,
        "front_end": info.analysis.to_dict(),
        "lookahead": info.lookahead,
        "voices": info.voices,
        "parameters": info.parameters,
        "thresholds": [vars(row) for row in info.thresholds],
        "training": info.training,
        **own,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"model       {info.name}")
    print(f"front end   {', '.join(f'{name} {value}' for name, value in facts['front_end'].items())}")
    print(f"look-ahead  {info.lookahead} ({1000 * FRAME_SECONDS * info.lookahead:.0f} ms)")
    print(f"voices      {info.voices} at most (K)")
    print(f"parameters  {info.parameters:,}")
    for name, value in own.items():
        print(f"{name:<11} {value}{f' ({1000 * FRAME_SECONDS * value:.0f} ms)' if isinstance(value, int) else ''}")
    for lookahead, row in enumerate(info.thresholds):
        limits = "  ".join(f"{name} {value:.2f}" for name, value in vars(row).items())
        print(f"{'thresholds' if lookahead == 0 else '':<11} look-ahead {lookahead}: {limits}")
    for line, (name, value) in enumerate(info.training.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        print(f"{'training' if line == 0 else '':<11} {name}: {text}")
    return 0


def _plugins(args: argparse.Namespace) -> int:
    from .model import shipped_models
    from .plugins import known

    for kind in ("source", "sink", "model"):
        print(f"{kind}s:")
        for name, origin in sorted(known(kind).items()):
            print(f"  {name:<12} {origin}")
        if kind == "model":
            for name in shipped_models():
                print(f"  {name:<12} shipped (info {name} tells more)")
    return 0


COMMANDS = {
    "devices": Command("show sound inputs and MIDI ports", "", _devices_arguments, _devices),
    "listen": Command("hear a sound device or a file and play its notes live", "realtime_mpe.listen"),
    "transcribe": Command("turn audio files into MIDI files", "realtime_mpe.transcribe"),
    "data": Command("check, render and pack data sets", f"{TRAINING}data.command"),
    "train": Command("train a model of your own, or a recipe of the slot-attention paper", f"{TRAINING}train"),
    "experiment": Command("the slot-attention paper's table, and how fast its networks train", f"{TRAINING}experiment"),
    "evaluate": Command("score a model on recordings whose notes are known", f"{TRAINING}evaluate"),
    "export": Command("make a model file of a training run", f"{TRAINING}export"),
    "info": Command("show what a model is and how it was made", "", _info_arguments, _info),
    "bench": Command("measure what a model costs on this machine", "realtime_mpe.bench"),
    "doctor": Command("check sound, MIDI, model and speed of this machine", "realtime_mpe.doctor"),
    "plugins": Command("list the sources, sinks and models that are there", "", run=_plugins),
}


if __name__ == "__main__":
    sys.exit(main())
