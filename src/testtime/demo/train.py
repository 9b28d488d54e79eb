"""Train the networks of the digits demo: ``python -m testtime.demo.train``."""

from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from testtime.demo import MODELS, digits

EPOCHS = 20
BATCH = 25
LEARNING_RATE = 0.01
SHIFT = 2  # pixels that a batch may move each way


def train(model: str, seed: int = 0) -> nn.Module:
    """Train a network of ``MODELS`` on the 1,000 training digits; a quarter minute on one core.

    AdamW under a one-cycle schedule. The only augmentation is a small shift: anything like a
    corruption would take away the shift that adaptation is to be shown on.

    Args:
        model: "resnet_bn" or "resnet_gn".
        seed: of initial weights, order and shifts. The global generator is left as it was.

    Returns:
        The network in eval mode.
    """
    images, labels = digits("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MODELS[model]().train()
        optimizer = torch.optim.AdamW(network.parameters())
        steps = EPOCHS * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
        for _ in range(EPOCHS):
            order = torch.randperm(len(images))
            for start in range(0, len(images), BATCH):
                rows = order[start : start + BATCH]
                top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
                shifted = F.pad(images[rows], [SHIFT] * 4)[..., top : top + 32, left : left + 32]
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(network(shifted), labels[rows]))
                optimizer.step()
                schedule.step()
    return network.eval()


def accuracy(network: nn.Module) -> float:
    """Measure the share of the 797 test digits that a network names rightly, in eval mode."""
    images, labels = digits("test")
    with torch.no_grad():
        return float((network.eval()(images).argmax(1) == labels).double().mean())


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), help="Train this one only.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Folder for NAME.safetensors; the present one if not given.",
)
def main(model: str | None, out: Path) -> None:
    """Train the demo's networks, print their test accuracy and save their weights."""
    out.mkdir(parents=True, exist_ok=True)
    for name in [model] if model else MODELS:
        network = train(name)
        save_file(network.state_dict(), out / f"{name}.safetensors")
        click.echo(f"{name}: {100 * accuracy(network):.2f} % of 797 test digits")


if __name__ == "__main__":
    main()
