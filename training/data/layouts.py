"""Every layout by name, in the order in which a folder is held against them: the surest signs come first."""

from collections.abc import Callable
from pathlib import Path

from .classical import bach10, musicnet, urmp
from .datasets import DataSet
from .multitrack import mshoxxdb, slakh
from .own import excerpts, flat, rendered

LAYOUTS: dict[str, Callable[[Path], DataSet | None]] = {
    "URMP": urmp,
    "Bach10": bach10,
    "MusicNet": musicnet,
    "mshoxxDB": mshoxxdb,
    "Slakh": slakh,
    "rendered stems": rendered,
    "excerpts": excerpts,
    "NAME.wav beside NAME.mid": flat,
}
"""Each returns None if the folder does not have its layout."""
