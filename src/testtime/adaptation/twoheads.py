"""A network with a second head: what test-time training learns by."""

from typing import Any

from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A network, and a second head for a task without labels, trained jointly with it.

    Calling it is calling the network. Both are as given, not copied: train them as one module, save
    and load them as one, and pass it to :func:`adapt`::

        model = tt.TwoHeads(network, head, branch="layer3")

    Args:
        net: answers the task that counts, from an input ``[B, ...]``.
        head: takes what goes into ``branch`` of the network.
        branch: the dotted name of the network's module at which the two part. What was registered
            before it is shared; it and what comes after are the network's own.

    Raises:
        ValueError: the network has no module of that name, or nothing before it.
    """

    def __init__(self, net: nn.Module, head: nn.Module, branch: str) -> None:
        super().__init__()
        names = [name for name, _ in net.named_modules() if name]
        if branch not in names:
            raise ValueError(
                f"TwoHeads(branch={branch!r}): {type(net).__name__} has no such module. It has "
                f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
            )
        self.net, self.head, self.branch = net, head, branch
        if not self.shared():
            raise ValueError(
                f"TwoHeads(branch={branch!r}): no parameter of {type(net).__name__} was registered "
                "before it, so the heads would share nothing. Name a later module."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's answer."""
        return self.net(*args, **kwargs)

    def features(self, x: Tensor) -> Tensor:
        """Return what goes into the branch, for an input; nothing after it runs."""

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        hook = self.net.get_submodule(self.branch).register_forward_pre_hook(stop)
        try:
            self.net(x)
        except _Reached as reached:
            return reached.features
        finally:
            hook.remove()
        raise ValueError(
            f"The network never calls its module '{self.branch}': name another branch."
        )

    def task(self, x: Tensor) -> Tensor:
        """Return the second head's answer for an input."""
        answer: Tensor = self.head(self.features(x))
        return answer

    def shared(self) -> list[str]:
        """Return the names of the parameters before the branch."""
        names = []
        for name, module in self.named_modules():
            if name == f"net.{self.branch}":
                break
            names += [f"{name}.{k}".lstrip(".") for k, _ in module.named_parameters(recurse=False)]
        return names

    def extra_repr(self) -> str:
        """Show where the heads part."""
        return f"branch={self.branch!r}"


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward where the heads part
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
