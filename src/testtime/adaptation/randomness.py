"""What a model draws by itself (dropout, noise), kept out of the global generator."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from testtime.adaptation import select

_GLOBAL_GENERATOR = threading.RLock()  # one for all threads of the process


class Randomness:
    """The seeds of a network's own draws.

    ``draws`` says whether it draws in eval mode too; that is measured at its first forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.draws: bool | None = None
        self._quiet: dict[tuple[str, ...], bool] = {}

    @contextlib.contextmanager
    def own(
        self, mode: tuple[str, ...], place: tuple[int, ...], device: torch.device
    ) -> Iterator[None]:
        """Run a forward on numbers of its own.

        Args:
            mode: the modules in train mode.
            place: the seed follows from it: that of the learner, and which forward it is.
            device: where the network is.
        """
        quiet = self._norms_alone(mode)
        if quiet and self.draws is False:
            yield
            return
        gpus = [device] if device.type == "cuda" else []
        with _GLOBAL_GENERATOR, torch.random.fork_rng(gpus):
            _seed(device, hash(place) % 2**63)
            start = _state(device)
            yield
            if quiet and self.draws is None:
                self.draws = not torch.equal(start, _state(device))

    def _norms_alone(self, mode: tuple[str, ...]) -> bool:
        if mode not in self._quiet:
            norms = set(select.layers(self._module))
            self._quiet[mode] = all(name in norms for name in mode)
        return self._quiet[mode]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator for a while, as for a head that a method makes."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield


def _seed(device: torch.device, seed: int) -> None:
    # torch.manual_seed() would seed the generators of all devices, which nobody would put back.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _state(device: torch.device) -> Tensor:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
