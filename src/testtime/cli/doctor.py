"""Tell which methods fit a model, what each would change, and why the others don't."""

import click


@click.command()
@click.option("--model", required=True, help="NETWORK:FILE.safetensors or package.module:factory.")
@click.option("--data", help="Inputs to try on: digits, or cifar10:FILE.parquet.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
def command(model: str, data: str | None, batch_size: int) -> None:
    """Tell which methods fit a model, what each would change, and why the others don't.

    With inputs each method is tried on a copy for one step. A factory may return the model and a
    batch of inputs.
    """
    from testtime.adaptation.doctor import doctor
    from testtime.bench.run import read_source
    from testtime.models.load import load_with_inputs

    network, x = load_with_inputs(model)
    if data:
        x = read_source(data).samples[list(range(batch_size))]
    click.echo(str(doctor(network, x)))
