"""Where processes meet. NCCL gives up after a while; gloo's `distributed.barrier`, before what takes long, does not.

Each collective on the device is named here, with what bounds the time that the others may come earlier.
"""

import ast

from scripts import REPOSITORY, TORCH

ON_DEVICE = {"gather_object", "broadcast_object_list", "gather", "gather_for_metrics", "reduce", "broadcast", "prepare"}
WAITS = {"barrier", "all_reduce_max", "main_first"}
SHORT = {  # function -> why no process comes there much later than another, although it does not wait for all before
    "resolve_seed": "find_checkpoint, just before, has waited",
    "fetch_losses": "StopRequest.agree, at the end of the update before, has met all, and DDP's gradients in this one",
    "_end": "read, which calls it, has just reduced the losses",
}  # fmt: skip


def called(node) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_processes_wait_without_a_limit_before_they_meet_on_the_device():
    seen, unguarded = set(), []
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        if path.parent.name == "sd_flax":
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = sorted((n for n in ast.walk(function) if isinstance(n, ast.Call)), key=lambda n: n.lineno)
            waited = False
            for call in calls:
                waited = waited or called(call) in WAITS
                if called(call) in ON_DEVICE:
                    seen.add(function.name)
                    if not waited and function.name not in SHORT:
                        unguarded.append(f"{path.name}:{call.lineno}: {called(call)}")
    assert unguarded == []
    assert seen >= {"find_checkpoint", "inspect", "_fill", "validate", "prepare", *SHORT}


def test_scripts_meet_on_the_device_through_these_alone():
    for path in (script.path for script in TORCH.values()):
        text = path.read_text(encoding="utf-8")
        assert "accelerator.prepare" not in text
        assert not any(f"{name}(" in text for name in ON_DEVICE - {"prepare"})
