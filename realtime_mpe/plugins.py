"""Sources, sinks and models by name: the built-in ones, those of installed packages, and any class by its import path.

``name``, ``name:argument`` or ``package.module:Class[:argument]``; the text after the first colon (or, with an import
path, after the second) is the first positional argument of the class. A package adds names through the entry-point
groups ``realtime_mpe.sources``, ``realtime_mpe.sinks`` and ``realtime_mpe.models``. Only what is chosen is imported.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from operator import attrgetter

from .errors import UserError

BUILT_IN = {
    "source": {
        "device": "realtime_mpe.capture:Capture",
        "file": "realtime_mpe.source:FileSource",
        "demo": "realtime_mpe.source:DemoSource",
    },
    "sink": {
        "midi": "realtime_mpe.sinks.midi_port:MidiPortSink",
        "virtual": "realtime_mpe.sinks.midi_port:VirtualPortSink",
        "split": "realtime_mpe.sinks.midi_port:SplitPortsSink",
        "osc": "realtime_mpe.sinks.osc:OscSink",
        "record": "realtime_mpe.sinks.midi_file:MidiFileSink",
        "audio": "realtime_mpe.sinks.audio_file:AudioFileSink",
        "json": "realtime_mpe.sinks.json_lines:JsonLinesSink",
        "terminal": "realtime_mpe.sinks.terminal:TerminalSink",
    },
    "model": {
        "onnx": "realtime_mpe.model:open_model",
    },
}


def known(kind: str) -> dict[str, str]:
    """The names that `resolve` takes, and where each comes from, as text for people."""
    names = {name: f"{target} (built in)" for name, target in BUILT_IN[kind].items()}
    for name, points in _entry_points(kind).items():
        if name not in names:
            names[name] = " or ".join(f"{point.value} ({_package(point)})" for point in points)
    return names


def factory(kind: str, spec: str) -> tuple[Callable, str | None]:
    """What `spec` names, imported but not called, and its argument.

    kind : "source", "sink" or "model".  Raises UserError if the name is unknown or cannot be imported.
    """
    name, colon, argument = spec.partition(":")
    target = _target(kind, name)
    if target is None and _is_module(name):
        attribute, colon, argument = argument.partition(":")
        if attribute:
            target = f"{name}:{attribute}"
    if target is None:
        raise UserError(
            f"{kind} {spec!r} is unknown; choose one of {', '.join(sorted(known(kind)))}, or package.module:Class"
        )
    return _load(kind, target), argument if colon else None


def resolve(kind: str, spec: str, **options):
    """Make the source, sink or model that `spec` names; `options` are passed on as keyword arguments.

    Raises UserError for an unknown name, a missing or superfluous argument, an option that it does not take, and
    whatever it raises itself.
    """
    make, argument = factory(kind, spec)
    arguments = () if argument is None else (argument,)
    _check_call(kind, spec.partition(":")[0], make, arguments, options)
    return make(*arguments, **options)


def _target(kind: str, name: str) -> str | None:
    """The "module:attribute" a name stands for. A package cannot replace a built-in name."""
    if name in BUILT_IN[kind]:
        return BUILT_IN[kind][name]
    points = _entry_points(kind).get(name, [])
    if len(points) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise UserError(f"{kind} {name!r} is offered by {packages}; uninstall one, or write package.module:Class")
    return f"{points[0].module}:{points[0].attr}" if points else None


def _entry_points(kind: str) -> dict[str, list]:
    """Entry points of other packages by name; more than one if they name different things."""
    found: dict[str, list] = {}
    for point in entry_points(group=f"realtime_mpe.{kind}s"):
        same_name = found.setdefault(point.name, [])
        if point.value not in [other.value for other in same_name]:
            same_name.append(point)
    return found


def _package(point) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"


def _is_module(name: str) -> bool:
    """Whether a name is meant as a module: it is dotted, or can be imported. Nothing is imported to find out."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return "." in name or find_spec(name) is not None
    except ValueError:  # the running program, __main__, is a module but has no specification
        return False


def _load(kind: str, target: str) -> Callable:
    module_name, _, attribute = target.partition(":")
    try:
        module = import_module(module_name)
    except UserError:
        raise
    except Exception as e:  # the module is somebody else's: anything can happen while it is imported
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"{kind} {target!r} cannot be imported ({reason}); install what it needs, or put its folder in PYTHONPATH"
        ) from e
    try:
        made = attrgetter(attribute)(module)
    except AttributeError as e:
        raise UserError(f"{kind} {target!r} does not exist: {module_name} has no {attribute!r}; check the name") from e
    if not callable(made):
        raise UserError(f"{kind} {target!r} is {type(made).__name__}, not a class or function; check the name")
    return made


def _check_call(kind: str, name: str, make: Callable, arguments: tuple, options: dict) -> None:
    """Refuse a call that `make` would refuse, in words for the user, before anything is opened."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # written in C without a signature: the call itself must tell
        return
    parameters = signature.parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    first = next((p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    for option in options:
        if option not in allowed and not takes_any:
            takes = f"it takes {', '.join(o for o in allowed if o != first) or 'none'}"
            raise UserError(f"{kind} {name!r} has no option {option!r}; {takes}")
    try:
        signature.bind(*arguments, **options)
    except TypeError as e:
        if not arguments and first is not None and first not in options:
            raise UserError(f"{kind} {name!r} needs its {first}; write {name}:{first.upper()}") from e
        if arguments and first is None:
            raise UserError(f"{kind} {name!r} takes no argument, but {arguments[0]!r} was given; leave it out") from e
        raise UserError(f"{kind} {name!r} cannot be made like this: {e}") from e
