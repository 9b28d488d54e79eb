"""Print versions, devices, threads and determinism, for bug reports."""

import click


@click.command()
def command() -> None:
    """Print versions, devices, threads and determinism, for bug reports."""
    import importlib.metadata
    import os
    import platform
    import sys

    import torch

    import testtime

    lines = {
        "testtime": testtime.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "devices": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        or f"CPU, {os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()} of {torch.get_num_interop_threads()} pools",
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }
    for package in importlib.metadata.requires("testtime") or []:
        name = package.split(";")[0].strip().split("[")[0]
        name = "".join(c for c in name if c.isalnum() or c in "-_.").rstrip("0123456789.")
        if name not in lines and name != "testtime":
            try:
                lines[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                lines[name] = "not installed"
    width = max(map(len, lines))
    for name, value in lines.items():
        click.echo(f"{name:{width}}  {value}")
