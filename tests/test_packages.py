"""Optional packages that were built for another torch: seen by nobody, unless a flag asks for them; then one line."""

import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, load_script
from runs import interrupt, outcome
from scripts import ADAPTERS

from t2i_training.cli import packages

BROKEN = "import sys\nprint('IMPORTED', __name__, file=sys.stderr)\nraise ImportError('undefined symbol: _ZN3c10')\n"
CPU = torch.device("cpu")


@pytest.fixture
def broken(tmp_path):
    """A folder, for PYTHONPATH, of packages that are installed and fail when they are imported."""
    folder = tmp_path / "broken"
    for name in (*packages.UNUSED, *packages.FLAGS, "deepspeed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(BROKEN)
        described = folder / f"{name}-99.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    return folder


@pytest.fixture
def modules(monkeypatch):
    """sys.modules, put back afterwards."""
    for name in (*packages.UNUSED, *packages.FLAGS, "deepspeed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in list(sys.modules):
        if name.partition(".")[0] in packages.FLAGS:
            del sys.modules[name]


def test_a_run_does_not_see_broken_packages(command, broken, tmp_path):
    """Adapters of Stable Diffusion, so that diffusers, transformers, peft and accelerate are all there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])}
    tokens = command("sd_lora", max_train_steps=1, output_dir=tmp_path / "out")
    done = launch("sd_lora", tokens, env=environment)
    assert done.returncode == 0, done.stderr
    assert "IMPORTED" not in done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(("name", "flag"), packages.FLAGS.items())
def test_a_broken_package_that_is_asked_for_is_one_line(name, flag, broken, modules, command, monkeypatch):
    monkeypatch.syspath_prepend(broken)
    with pytest.raises(SystemExit) as stop:
        load_script("sd").main(command("sd", **{flag: True}))
    assert stop.value.code == (
        f"error: --{flag}: {name} 99.0 does not work here: leave the flag out, or install a release for this torch "
        "(ImportError: undefined symbol: _ZN3c10)"
    )


def test_kernels_for_another_torch_are_one_line(modules, tmp_path, monkeypatch):
    """xFormers is imported all the same, and warns; what it could not load it keeps."""
    folder = tmp_path / "xformers"
    (folder / "ops").mkdir(parents=True)
    (folder / "__init__.py").write_text("from . import _cpp_lib\n")
    (folder / "ops" / "__init__.py").write_text("")
    (folder / "_cpp_lib.py").write_text(
        "import logging\nlogging.getLogger('xformers').warning('six lines')\n"
        "_cpp_library_load_exception = OSError('built for:\\n    PyTorch 2.10 (you have 2.14)')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = SimpleNamespace(enable_xformers_memory_efficient_attention=True)
    packages.hide_unused(args)
    with pytest.raises(SystemExit, match=r"xformers does not work here: .* built for: PyTorch 2.10 \(you have 2.14\)"):
        packages.try_out(args, CPU)


def test_compiler_for_another_torch_is_one_line(monkeypatch):
    """On a GPU, whose kernels Triton makes; on the CPU it is not asked."""

    def compile_(_function):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(torch, "compile", compile_)
    args = SimpleNamespace(torch_compile="regional")
    packages.try_out(args, CPU)
    with pytest.raises(SystemExit) as stop:
        packages.try_out(args, torch.device("cuda"))
    assert re.fullmatch(
        r"error: --torch_compile: triton \S+ does not work here: leave the flag out, or install a release for this "
        r"torch \(RuntimeError: 0 active drivers \(\[\]\). There should only be one.\)",
        stop.value.code,
    )


def test_what_a_run_hides_a_later_one_may_use(modules, broken, monkeypatch):
    from importlib.util import find_spec

    monkeypatch.syspath_prepend(broken)
    for library in packages.LOOKING:
        monkeypatch.delitem(sys.modules, library, raising=False)  # as before a run
    assert find_spec("bitsandbytes")
    packages.hide_unused(SimpleNamespace())
    assert find_spec("bitsandbytes") is find_spec("deepspeed") is find_spec("flash_attn") is None
    with pytest.raises(ImportError):
        import xformers  # noqa: F401
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delitem(sys.modules, "deepspeed")
    packages.hide_unused(SimpleNamespace(use_8bit_adam=True))
    assert find_spec("bitsandbytes")
    assert find_spec("deepspeed")
    assert find_spec("xformers") is None


@pytest.mark.parametrize("library", packages.LOOKING)
def test_what_a_library_has_seen_already_stays(library, modules, broken, tmp_path, monkeypatch):
    """A notebook imports diffusers, which finds bitsandbytes, and then calls main()."""
    from importlib.util import find_spec

    monkeypatch.syspath_prepend(broken)
    for other in packages.LOOKING:
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.setitem(sys.modules, library, SimpleNamespace())
    packages.hide_unused(SimpleNamespace())
    assert find_spec("bitsandbytes")
    assert find_spec("xformers")


def test_eight_bit_adam_resumes_bit_for_bit(command, tmp_path):
    """Tensors of 4096 numbers or more have moments in 8 bits; their blocks and scales are restored as they were."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    options = {"use_8bit_adam": True, "rank": 300, "max_train_steps": 4, "checkpointing_steps": 2}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    load_script("sd_lora").main(command("sd_lora", output_dir=whole, **options))
    with interrupt(3):  # the first is made at the start, to see whether the package works
        load_script("sd_lora").main(command("sd_lora", output_dir=pieces, **options))
    load_script("sd_lora").main(command("sd_lora", output_dir=pieces, resume_from_checkpoint="latest", **options))
    assert outcome(pieces, 4, ADAPTERS) == outcome(whole, 4, ADAPTERS)
    saved = torch.load(whole / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"].values()
    quantised = [moment for entry in saved for moment in _tensors(entry) if moment.dtype == torch.uint8]
    assert len(quantised) >= 2, "both moments of a tensor"
    assert all(moment.any() for moment in quantised)
    line = "error: the checkpoint was made with AdamW8bit, and this run's optimizer is AdamW: "
    line += "add or remove --use_8bit_adam, as when the run began"
    options |= {"use_8bit_adam": None, "max_train_steps": 5, "resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit) as stop:
        load_script("sd_lora").main(command("sd_lora", output_dir=whole, **options))
    assert stop.value.code == line


def _tensors(entry) -> list[torch.Tensor]:
    """Those in a state, which bitsandbytes nests."""
    if isinstance(entry, dict):
        return [tensor for value in entry.values() for tensor in _tensors(value)]
    return [entry] if isinstance(entry, torch.Tensor) else []
