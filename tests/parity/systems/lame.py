"""LAME."""

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.recording import Recording, Unreplayable

_FIXED = {"bound_lambda": 1, "tol": 1e-8}


def replay(recording: Recording) -> Comparison:
    """Replay batches without a state; the answer is the logarithm of what is recorded."""
    config, comparison = recording.config, Comparison(recording)
    if recording.preset != "official":
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    for name, value in _FIXED.items():
        if (found := config.get(name, value)) != value:
            raise Unreplayable(f"its {name} is {found}, and the library's {value}")
    config.get("sigma", None)  # an option that nothing reads
    method = tt.LAME(
        config.get("affinity").lower(),
        k=config.get("knn"),
        symmetric=config.get("force_symmetry"),
        max_steps=config.get("max_steps"),
    )
    adapted = tt.adapt(build(recording), method)
    for step in recording.steps():
        x = recording[f"in/{step}/x"]
        comparison.check(f"out/{step}/probs", adapted(x).exp())
        energies = adapted.notes["energies"][0]
        comparison.check(f"extra/{step}/energies", energies[~energies.isnan()])
        comparison.check(f"extra/{step}/kernel", adapted.notes["kernel"][0])
        comparison.check(f"extra/{step}/source_logits", adapted.source(x))
    return comparison


KINDS = {"adapt": replay}
