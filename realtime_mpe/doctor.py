"""``rt-mpe doctor``: a line for everything a performance needs, with the remedy where something is missing.

Exit code 1 if what every use needs fails: the packages, the model, the speed. No sound device, no MIDI system or a
full disk is a warning, for files can be transcribed without the first two and heard without the last.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from .errors import UserError

OK, WARNING, FAILURE = "ok", "warn", "FAIL"
ESSENTIAL = ("numpy", "onnxruntime", "soundfile")
LIVE = ("sounddevice", "mido", "python-rtmidi")
OLDEST_PYTHON = (3, 11)
COMFORTABLE_RTF, HIGHEST_RTF = 0.5, 0.9  # CPU seconds a second: above the first a busy machine will drop sound
SPEED_SECONDS = 3.0  # of sound
LEAST_DISK_MB = 100.0  # an hour of notes is one megabyte; less than this and other programs fail first


class Finding(NamedTuple):
    state: str
    what: str
    detail: str


def python() -> Iterator[Finding]:
    here = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Finding(FAILURE, "python", f"{here} is too old: install Python {oldest} or newer")
    else:
        yield Finding(OK, "python", here)
    found, missing = [], []
    for package in ("realtime-mpe", *ESSENTIAL, *LIVE):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    yield Finding(OK, "packages", ", ".join(found))
    for package in missing:
        state = FAILURE if package in ESSENTIAL else WARNING
        yield Finding(state, "packages", f"{package} is not installed: pip install {package}")


def model_and_speed(name: str) -> Iterator[Finding]:
    from .bench import measure
    from .model import load_model

    try:
        model = load_model(name)
    except UserError as error:
        yield Finding(FAILURE, "model", str(error))
        yield Finding(FAILURE, "speed", "cannot be measured without a model")
        return
    info = model.info
    facts = f"{info.parameters:,} parameters, look-ahead {info.lookahead}, up to {info.voices} voices"
    yield Finding(OK, "model", f"{info.name}: {facts}, its front end is this program's")
    rtf = measure(model, SPEED_SECONDS).rtf
    cost = f"{rtf:.2f} CPU seconds a second of sound"
    if rtf > HIGHEST_RTF:
        yield Finding(FAILURE, "speed", f"{cost} is too slow to listen live: close other programs, or transcribe files")
    elif rtf > COMFORTABLE_RTF:
        yield Finding(WARNING, "speed", f"{cost} leaves little room: close other programs while you listen")
    else:
        yield Finding(OK, "speed", f"{cost}, {1 / rtf:.0f} times as fast as needed")


def audio() -> Iterator[Finding]:
    from .source import list_devices

    try:
        devices = list_devices()
    except UserError as error:
        yield Finding(WARNING, "audio", str(error))
        return
    if not devices:
        yield Finding(WARNING, "audio", "no sound device with inputs: connect one, or listen to --source file:X")
        return
    default = next((device for device in devices if device["default"]), None)
    if default is None:
        yield Finding(WARNING, "audio", f"{len(devices)} inputs but no default: choose with -d, see rt-mpe devices")
        return
    facts = f"{default['name']}, {default['hostapi']}, {default['samplerate']} Hz"
    yield Finding(OK, "audio", f"{len(devices)} inputs, default {facts}")


def midi() -> Iterator[Finding]:
    from .sinks.midi_port import list_ports

    try:
        ports, reasons = list_ports()
    except UserError as error:
        yield Finding(WARNING, "MIDI", str(error))
        return
    for api in sorted({api for api, _ in ports}):
        yield Finding(OK, "MIDI", f"{api}: {', '.join(repr(name) for a, name in ports if a == api)}")
    for reason in reasons:
        yield Finding(WARNING, "MIDI", f"{reason}: start that system, or record a file: --record take.mid")
    if not ports and not reasons:
        yield Finding(WARNING, "MIDI", "no port to play on: start a synthesiser, or offer one: --virtual NAME")


def disk() -> Iterator[Finding]:
    folder = os.getcwd()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"take")
        free_mb = shutil.disk_usage(folder).free / 1e6
    except OSError as error:
        reason = error.strerror or error
        yield Finding(WARNING, "disk", f"no take can be recorded in {folder} ({reason}): go to another folder")
        return
    if free_mb < LEAST_DISK_MB:
        yield Finding(WARNING, "disk", f"{free_mb:.0f} MB free in {folder}: make room before you record")
    else:
        yield Finding(OK, "disk", f"{free_mb / 1000:,.1f} GB free in {folder} for takes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default", help="name or file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", python),
        ("audio", audio),
        ("MIDI", midi),
        ("model", lambda: model_and_speed(args.model)),
        ("disk", disk),
    ]
    failed = False
    for what, check in checks:
        try:
            for finding in check():
                failed |= finding.state == FAILURE
                print(f"{finding.state:<5}{finding.what:<10}{' '.join(finding.detail.split())}", flush=True)
        except ImportError as error:  # told by the check of the packages; the other checks go on
            state = FAILURE if what == "model" else WARNING
            failed |= state == FAILURE
            print(f"{state:<5}{what:<10}cannot be checked ({error}): pip install --force-reinstall realtime-mpe")
    return int(failed)
