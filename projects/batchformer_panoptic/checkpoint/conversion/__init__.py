"""Conversion of weights from and to other projects."""

from .core import Converted, Request, Source
from .detr import official_to_ours, ours_to_official
from .sources import SOURCES, source_named

__all__ = [
    "SOURCES",
    "Converted",
    "Request",
    "Source",
    "official_to_ours",
    "ours_to_official",
    "source_named",
]
