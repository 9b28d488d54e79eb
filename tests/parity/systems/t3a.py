"""T3A."""

from torch import Tensor
from torch.nn.functional import one_hot

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.recording import Recording, Unreplayable
from testtime.adaptation.learner import Learner


def replay(recording: Recording) -> Comparison:
    """Replay a script of batches to adapt to, batches to answer alone, and resets.

    That code filters its memory when it only answers, too, which shows with ``filter_K = -1``:
    every class then loses its last row. The library's ``predict`` changes nothing, so the memory
    is filtered here.
    """
    if recording.preset != "official":
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    config, comparison = recording.config, Comparison(recording)
    k, classes = config.get("filter_K"), config.get("num_classes")
    rows = sum(len(recording[f"in/{step}/x"]) for step in recording.steps())
    method = tt.T3A(filter_k=classes + rows, loses_last=True) if k == -1 else tt.T3A(filter_k=k)
    config.get("adapt", True)  # the script says it for each step
    adapted = tt.adapt(build(recording), method)
    learner = adapted.learner

    def compare(step: str) -> None:
        memory = learner.state.memory
        count = int((memory["labels"] < classes).sum())
        comparison.check(f"extra/{step}/supports", memory["features"][:count])
        comparison.check(f"extra/{step}/ent", memory["entropies"][:count])
        labels = one_hot(memory["labels"][:count], classes)
        comparison.check(f"extra/{step}/labels", labels.to(recording.dtype))

    for step, words in enumerate(config.get("script")):
        x = recording[f"in/{step}/x"]
        if "reset" in words:
            adapted.reset()
        if step == 0:
            adapted.fit([x]).reset()  # the memory begins with the first batch
            compare("init")
        if "noadapt" in words:
            _filter(learner, method, classes)
            logits = adapted.predict(x)
        else:
            logits = adapted(x)
        comparison.check(f"out/{step}/logits", logits)
        comparison.check(f"extra/{step}/source_logits", adapted.source(x))
        compare(str(step))
    return comparison


def _filter(learner: Learner, method: tt.T3A, classes: int) -> None:
    state = learner.state
    state.memory.update(method.filtered(state.memory, classes))
    written: dict[str, Tensor] = method.settle(learner.live, state.memory, learner.draw).values
    state.weights.update(written)


KINDS = {"adapt": replay}
