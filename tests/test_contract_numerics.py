"""A loss or a gradient that is no number ends any script's run: step and samples are named, the good checkpoint stays.

That --max_grad_norm acts is in each script's own tests.
"""

import json

import pytest
import torch
from conftest import load_script
from scripts import TORCH
from torch.optim.optimizer import register_optimizer_step_post_hook

from t2i_training.run import checkpoint


def bad_loss(loss, network):
    return loss * float("nan")


def bad_gradient(loss, network):
    """The loss as it is, with a gradient of 0 / 0."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return loss + (trained[0] - trained[0].detach()).pow(2).sum().sqrt()


@pytest.mark.parametrize("spoil", [bad_loss, bad_gradient])
@pytest.mark.parametrize("script", TORCH)
def test_no_number_ends_the_run(script, spoil, command, pictures, tmp_path, monkeypatch):
    """The third update of four; its loss is read at the end of the run's only logging interval, or before a save."""
    module, out, updates, seen = load_script(script), tmp_path / "out", [], []
    compute_loss = module.compute_loss

    def spoilt(network, batch, *args, **options):
        loss = compute_loss(network, batch, *args, **options)
        if len(updates) != 2:
            return loss
        seen.extend(batch["index"].tolist())
        return spoil(loss, network)

    monkeypatch.setattr(module, "compute_loss", spoilt)
    hook = register_optimizer_step_post_hook(lambda *_: updates.append(1))
    try:
        with pytest.raises(SystemExit) as stop:
            module.main(command(script, output_dir=out, checkpointing_steps=2, logging_steps=50))
    finally:
        hook.remove()
    what = "loss nan" if spoil is bad_loss else "gradient norm nan"
    names = "; ".join(f"row {i} ({pictures / f'{i}.png'}, metadata.jsonl line {i + 1})" for i in seen)
    assert str(stop.value).startswith(f"error: {what} at step 3, nothing saved since; the step's samples: {names}. ")
    assert len(seen) == 2
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert checkpoint.verify(out / "checkpoint-2") is None
    assert json.loads((out / "checkpoint-2" / "manifest.json").read_text())["step"] == 2
    assert not (out / "README.md").exists(), "nothing was exported"
    state = torch.load(out / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    assert all(moment.isfinite().all() for entry in state.values() for moment in entry.values())
