"""What every test runs under."""

import torch

from tests import operators  # noqa: F401 - before anything imports timm

# Two cores are what a small CI machine has: more threads than cores are slower, and the same number
# everywhere keeps sums in the same order.
torch.set_num_threads(min(2, torch.get_num_threads()))
