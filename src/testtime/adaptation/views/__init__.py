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
from testtime.adaptation.views.shapes import (
    crop_draws,
    crops,
    occluded,
    shuffled_patches,
    shuffled_pixels,
    turned,
)
from testtime.adaptation.views.simclr import contrastive

__all__ = [
    "Draws",
    "Mixtures",
    "at_once",
    "contrastive",
    "crop_draws",
    "crops",
    "draw_mixtures",
    "draw_orders",
    "draws",
    "many",
    "mixed",
    "mixture_chains",
    "occluded",
    "require_images",
    "require_rows",
    "shuffled_patches",
    "shuffled_pixels",
    "turned",
    "views",
]
