"""TTT with rotation prediction, and its joint training."""

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.optimizers import torch_momenta
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter
from testtime.adaptation import views
from testtime.adaptation.adapted import Adapted
from testtime.train.joint import joint_step, rotations


class TTT(Adapter):
    """Outputs: the losses, how upright the image was, and which rotations are told apart after."""

    ignored = {r"in/\d+/image": "the views that were cut from it are recorded"}  # noqa: RUF012

    def method(self, config: Config) -> tt.TTT:
        """Return TTT as the authors' code has it, with the recorded hyper-parameters."""
        if (name := config.get("optimizer")) != "SGD without momentum":
            raise Unreplayable(f"its optimiser {name!r} is not known")
        return tt.TTT.preset(
            "official",
            optimizer=tt.SGD(config.get("lr")),
            steps=config.get("niter"),
            views=config.get("batch_size"),
            threshold=config.get("threshold") + 0.001,
            statistics="source" if config.get("fix_bn") else "batch",
            head=not config.get("fix_ssh"),
        )

    def started(self, adapted: Adapted, recording: Recording, comparison: Comparison) -> None:
        """Give the views of every inner step a name; those of an image that is skipped are void."""
        method = adapted.method
        assert isinstance(method, tt.TTT)
        comparison.require(
            "config.online", recording.config.get("online") == (recording.mode != "episodic")
        )
        for step in recording.steps():
            x = recording[f"in/{step}/x"]
            for name, void in (("views", x[0]), ("labels", torch.tensor(0))):
                path = f"draw/{step}/{name}"
                whole = (
                    recording[path]
                    if path in recording
                    else void.expand(method.steps, method.views, *void.shape)
                )
                for inner, value in enumerate(whole):
                    inner_path = path if method.steps == 1 else f"{path}.{inner}"
                    recording.put(inner_path, value.unsqueeze(1))

    def outputs(self, adapted: Adapted, x: Tensor) -> dict[str, Tensor]:
        """Return the loss of every step, and what the second head says before and after."""
        quarters = torch.arange(4)
        with torch.no_grad():
            every = views.turned(x.expand(4, *x.shape[1:]), quarters)
            after = adapted.learner.live.eval().run(tt.TwoHeads.task, every)
        return {
            "loss": torch.stack(adapted.notes["loss"]),
            "ssh_conf": adapted.notes["upright"][0],
            "rot_correct": after.argmax(1) == quarters,
        }

    def extras(self, adapted: Adapted) -> dict[str, Tensor]:
        """Return whether it adapted."""
        return {"adapted": adapted.learner.state.memory["adapts"]}


def joint_training(recording: Recording) -> Comparison:
    """Replay joint training: cross-entropy of both heads, and a rate that falls with the epochs."""
    config, comparison, model = recording.config, Comparison(recording), build(recording)
    assert isinstance(model, tt.TwoHeads)
    if (order := config.get("parameters")) != "net, then head":
        raise Unreplayable(f"its parameters are in another order: {order}")
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.get("lr"),
        config.get("momentum"),
        weight_decay=config.get("weight_decay"),
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, config.get("milestones"), config.get("gamma")
    )
    epoch, steps = config.get("batches_per_epoch"), recording.steps()
    comparison.require("config.epochs", config.get("epochs") * epoch == len(steps))
    every = config.get("rotation_type") == "expand"
    for step in steps:
        x, y = recording[f"in/{step}/x"], recording[f"in/{step}/y"]
        labels = recording[f"draw/{step}/labels"]
        if every:
            comparison.require(f"draw/{step}/labels", torch.equal(labels, rotations(x, "expand")))
        comparison.check(f"extra/{step}/lr", torch.tensor(optimizer.param_groups[0]["lr"]))
        made = joint_step(model, optimizer, x, y, labels)
        comparison.check(f"out/{step}/logits", made.logits)
        comparison.check(f"out/{step}/rot_logits", made.task_logits)
        comparison.check(f"out/{step}/loss", made.loss)
        for name in recording.under(f"state/{step}"):
            comparison.check(f"state/{step}/{name}", model.state_dict()[name])
        momenta = torch_momenta(optimizer, model)
        for name in recording.under(f"extra/{step}"):
            if name.startswith("opt/"):
                comparison.check(f"extra/{step}/{name}", momenta.get(name))
        if (step + 1) % epoch == 0:
            schedule.step()
    return comparison


KINDS = {"adapt": TTT().replay, "steps": joint_training}
