"""The Stable Diffusion script: what a run leaves, and that every flag does what it says."""

import json

import torch


def test_run_leaves_a_loadable_pipeline(train):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = train(checkpointing_steps=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    trained = UNet2DConditionModel.from_pretrained(folder / "checkpoint-4" / "unet")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
