"""--torch_compile changes speed alone: same losses, same files, and nothing is compiled twice.

Inductor, torch's compiler, takes seconds for each kernel on a CPU, so it makes the network of one run. Elsewhere the
backend "eager" stands in for it: the same graphs, captured and guarded alike, are then run operation by operation.
"""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import load_script
from diffusers import UNet2DConditionModel
from runs import interrupt, outcome, rows
from safetensors.torch import load_file
from scripts import SCRIPTS
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook

from t2i_training.cli import checks
from t2i_training.model import networks

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_kernels(monkeypatch):
    """torch.compile without the step that takes long."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **options, backend="eager"))


@pytest.fixture
def graphs_by_update():
    """How many graphs had been compiled at the end of each update."""
    seen = []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(counters["stats"].get("unique_graphs", 0)))
    yield seen
    hook.remove()


def run(command, script: str, folder, **changes):
    load_script(script).main(command(script, output_dir=folder, **changes))
    return folder


def check_graphs(by_update: list[int], expected: int) -> None:
    """All of them within the first of four updates; older releases of torch make some more."""
    assert by_update[0] >= expected
    assert by_update == [by_update[0]] * 4


def losses(folder) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def test_a_graph_for_each_bucket(command, photographs, tmp_path, graphs_by_update, no_kernels):
    """Once round all buckets, nothing is compiled again, and nothing runs uncompiled."""
    options = {"train_data_dir": photographs, "train_batch_size": 4, "max_train_steps": 8}
    options |= tiny.BUCKETS | {"aspect_ratio_buckets": "32,32;40,24;16,64"}
    compiled = run(command, "sd", tmp_path / "compiled", torch_compile="regional", **options)
    assert len(set(graphs_by_update)) == 3, "each bucket compiles in one update"
    assert graphs_by_update[4:] == [graphs_by_update[-1]] * 4
    assert graphs_by_update[-1] >= 2 * SCRIPTS["sd"].graphs[1]
    plain = run(command, "sd", tmp_path / "plain", **options)
    assert losses(compiled) == losses(plain)


@pytest.mark.slow("50 s: as many blocks as Stable Diffusion has, which the tiny networks above have not")
def test_all_blocks_in_all_buckets(no_kernels):
    """125 graphs: of its ResNets alone there are more than 64, at which earlier versions stopped compiling."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 32, 32), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16
    )
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    networks.prepare_trained(unet.train(), SimpleNamespace(torch_compile="regional"), accelerator)
    by_round = []
    for _ in range(2):
        for shape in ((16, 16), (16, 24), (24, 16), (16, 32), (32, 16), (24, 24), (24, 32)):
            with torch.no_grad():
                unet(torch.ones(1, 4, *shape), torch.tensor([5]), torch.ones(1, 7, 16))
        by_round.append(counters["stats"]["unique_graphs"])
    assert by_round[0] == by_round[1] >= 7 * 17


@pytest.mark.slow("35 s of g++: the tests below run the same graphs, test_networks.py parts the gradients")
def test_kernels_give_the_same_losses(command, tmp_path, graphs_by_update, monkeypatch):
    """The prior takes least long. Of single samples Inductor gives two of its gradients one memory, to be parted."""
    # Kernels without vector instructions compile in half the time; which of them there are need not be tried out.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    options = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    compiled = run(command, "prior", tmp_path / "compiled", torch_compile="whole", **options)
    check_graphs(graphs_by_update, 1)
    plain = run(command, "prior", tmp_path / "plain", **options)
    norms = [[row["grad_norm"] for row in rows(folder)] for folder in (compiled, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert (losses(compiled), norms[0]) != (losses(plain), norms[1]), "other kernels round differently"


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("sd", "regional"), ("sd_lora", "whole"), ("prior", "whole"), ("prior_lora", "regional"),
        ("decoder", "whole"), ("decoder_lora", "regional"),
    ],
)  # fmt: skip
def test_compiled_once_and_in_place(command, finished, no_kernels, graphs_by_update, tmp_path, script, how):
    """All graphs in the first update, though validation follows with other batch sizes; files are as without."""
    drawing = {
        "sd": {"validation_prompts": "a cat", "validation_epochs": 1, "use_ema": True},
        "prior_lora": {"validation_prompt": "a cat", "num_validation_images": 1},
    }.get(script, {})
    folder = run(command, script, tmp_path / "out", torch_compile=how, checkpointing_steps=4, **drawing)
    check_graphs(graphs_by_update, SCRIPTS[script].graphs[how == "regional"])
    assert not counters["graph_break"]
    plain = finished(script, checkpointing_steps=4, **drawing)
    assert losses(folder) == losses(plain)
    for file in (SCRIPTS[script].trained, f"checkpoint-4/{SCRIPTS[script].trained}"):
        weights, expected = load_file(folder / file), load_file(plain / file)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(list(folder.glob("validation/step-*.png"))) == (3 if drawing else 0)


@pytest.mark.parametrize(("script", "how"), [("sd", "whole"), ("decoder_lora", "whole"), ("decoder", "regional")])
def test_with_checkpointing_average_and_validation_of_another_shape(
    command, no_kernels, graphs_by_update, tmp_path, script, how
):
    """Images are drawn two at a time, by guidance, before the first step and within training."""
    drawing = SCRIPTS[script].validates | ({} if SCRIPTS[script].is_lora else {"use_ema": True})
    options = {"gradient_checkpointing": True, "validation_epochs": 1, "train_batch_size": 3, **drawing}
    compiled = run(command, script, tmp_path / "compiled", torch_compile=how, **options)
    check_graphs(graphs_by_update, 1)
    plain = run(command, script, tmp_path / "plain", **options)
    assert losses(compiled) == losses(plain)
    names = [sorted(path.name for path in folder.glob("validation/step-*.png")) for folder in (compiled, plain)]
    assert names[0] == names[1] == [f"step-00000{step}.png" for step in (0, 2, 4)]
    weights, expected = (load_file(folder / SCRIPTS[script].trained) for folder in (compiled, plain))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("script", ["sd", "prior_lora"])
def test_with_checkpointing_half_precision_and_accumulation(command, no_kernels, graphs_by_update, tmp_path, script):
    options = {"gradient_checkpointing": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    compiled = run(command, script, tmp_path / "compiled", torch_compile=True, **options)
    check_graphs(graphs_by_update, SCRIPTS[script].graphs[1])
    plain = run(command, script, tmp_path / "plain", **options)
    assert losses(compiled) == losses(plain)


def test_resume(command, no_kernels, tmp_path):
    """Bit for bit among compiled runs; between compiled and not, the files are the same and so is the way on."""
    options = {"checkpointing_steps": 4, "resume_from_checkpoint": "latest", "use_ema": True}
    whole = run(command, "prior", tmp_path / "whole", torch_compile=True, **options)
    for name, then in (("compiled", True), ("not", None)):
        with interrupt(2):
            run(command, "prior", tmp_path / name, torch_compile=True, **options)
        torch._dynamo.reset()
        run(command, "prior", tmp_path / name, torch_compile=then, **options)
    assert outcome(tmp_path / "compiled", 4, SCRIPTS["prior"].trained, 20) == outcome(
        whole, 4, SCRIPTS["prior"].trained, 20
    )
    assert losses(tmp_path / "not") == losses(whole)
    with interrupt(2):
        run(command, "prior", tmp_path / "later", **options)
    run(command, "prior", tmp_path / "later", torch_compile="whole", **options)
    assert losses(tmp_path / "later") == losses(whole)


def refused(sd_flags, capsys, **changes) -> str:
    with pytest.raises(SystemExit) as stop:
        load_script("sd").parse_args(sd_flags(**changes))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_values(sd_flags, capsys):
    parse = load_script("sd").parse_args
    assert parse(sd_flags()).torch_compile is None
    assert parse(sd_flags(torch_compile=True)).torch_compile == "regional"
    assert parse(sd_flags(torch_compile="whole")).torch_compile == "whole"
    assert "choose from" in refused(sd_flags, capsys, torch_compile="half")


def test_without_a_compiler_it_is_refused(sd_flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    error = refused(sd_flags, capsys, torch_compile=True)
    assert "error: --torch_compile needs a C++ compiler, and there is no g++: install it, name another in CXX" in error
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "there is no no-such-compiler:" in refused(sd_flags, capsys, torch_compile=True)
    load_script("sd").parse_args(sd_flags())


def test_without_headers_it_is_refused(sd_flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(checks.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "--torch_compile needs Python.h, " in refused(sd_flags, capsys, torch_compile=True)


def test_without_triton_it_is_refused(sd_flags, capsys, monkeypatch, tmp_path):
    """Where torch is built for CUDA; elsewhere it is not needed."""
    find_spec = importlib.util.find_spec
    library = tmp_path / "torch" / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    torch_here = type("Spec", (), {"origin": str(tmp_path / "torch" / "__init__.py")})
    found = {"triton": None, "torch": torch_here}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found.get(name, ...) if name in found else find_spec(name)
    )
    load_script("sd").parse_args(sd_flags(torch_compile=True))
    library.touch()
    assert "--torch_compile needs the package triton: pip install triton" in refused(
        sd_flags, capsys, torch_compile=True
    )
