"""Augmented views of images, on their device: what is drawn, apart from what is done with it."""

from testtime.adaptation.views.augmix import Mixtures, draw_mixtures, mixed
from testtime.adaptation.views.augmix import chains as mixture_chains
from testtime.adaptation.views.jitter import (
    Draws,
    at_once,
    draw_orders,
    draws,
    many,
    require_images,
    require_rows,
    views,
)

__all__ = [
    "Draws",
    "Mixtures",
    "at_once",
    "draw_mixtures",
    "draw_orders",
    "draws",
    "many",
    "mixed",
    "mixture_chains",
    "require_images",
    "require_rows",
    "views",
]
