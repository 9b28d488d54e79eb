"""RDumb: ETA that goes back to the source after every thousand batches.

Paper: Press, Schneider, Kümmerer, Bethge, NeurIPS 2023, arXiv 2306.05401.
Code that was recorded: oripress/CCC.
"""

from dataclasses import dataclass

from torch import nn

from testtime.adaptation.methods.eata import ETA


@dataclass(frozen=True)
class RDumb(ETA):
    """ETA with a reset of weights, momentum and average before every 1,001st batch.

    All batches count, those that changed nothing too. State: ETA's, and the count.

    Fails where shifts are faster than 1,000 batches, and as ETA does; on a shorter stream it is
    ETA.

    Changed from the official code: as ETA, and a reset clears the counts too. Preset ``official``
    is the code, with its constants for 1,000 classes; ``"official", "sar"`` that for GroupNorm and
    LayerNorm.
    """

    reset_every: int | None = 1000

    presets = {  # noqa: RUF012
        **ETA.presets,
        "official": {
            "layers": (nn.BatchNorm2d,),
            "train": True,
            "survives": ("memory.reliable", "memory.selected"),
            "redundancy": 0.05,
        },
    }
