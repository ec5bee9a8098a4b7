"""The six torch scripts tell one story: what they repeat is equal, and every difference stands here with its reason.

The full Kandinsky runs are compared with Stable Diffusion's, each LoRA run with the full run of its model. A row of
`DIFFERENCES` is (function, text there, text here, reason), over source that `ast.unparse` lays out anew: comments, line
breaks and docstrings do not count. The rows applied to the script that is compared with must give the script itself: a
difference without a row fails, and so does a row without a difference.
"""

import ast
import difflib
import importlib.metadata
import io
import subprocess
import sys
import tokenize

import pytest
from scripts import REPOSITORY, SCRIPTS, TORCH

COMPARED = [name for name, script in SCRIPTS.items() if script.compared_with]
REPEATED = ("imports", "generate_image", "main")  # between models; between a full run and its LoRA all functions are
ORDER = (
    "parse_args", "load_models", "read_image", "read_caption", "make_sample", "freeze", "encode_images",
    "encode_captions", "encode", "embed_nothing", "compute_loss", "make_dataloader", "build_validation_pipeline",
    "generate_image", "export", "main",
)  # fmt: skip

KANDINSKY = [
    ("imports", "import base, ema, losses, networks, optim, single_file, spare_parts",
     "import ema, losses, networks, optim", "one kind of source, and training uses all that it loads"),
    ("imports", "from t2i_training.model", "from t2i_training.library_errors import readable_errors\n"
     "from t2i_training.model", "its models are loaded part by part"),
    ("imports", "from t2i_training.errors import RunError\n", "", "no --dream_training"),
    ("main", "partial(export, pipeline, network, args)", "partial(export, pipeline, network)",
     "it exports what it loads"),
    ("generate_image", "    read = partial(read_caption, tokenizer=pipeline.tokenizer, "
     "chunks=args.max_token_length // 75)\n    input_ids = torch.stack([read(prompt)['input_ids'] "
     "for prompt in (args.validation_prompts[index], '')])\n", "", "no --max_token_length"),
    ("generate_image", "        text_states = networks.encode_text(pipeline.text_encoder, "
     "input_ids.to(pipeline.text_encoder.device))\n        prompted, without = text_states.split(1)\n", "",
     "no --max_token_length"),
    ("generate_image", "prompt_embeds=prompted, negative_prompt_embeds=without", "args.validation_prompts[index]",
     "no --max_token_length"),
    ("generate_image", "num_inference_steps=validation.STEPS,",
     "num_inference_steps=validation.STEPS, prior_num_inference_steps=validation.STEPS,",
     "two networks draw an image"),
    ("main", "ema.make_ema(unet, pipeline.unet, args.offload_ema, args.foreach_ema)", "ema.make_ema(unet)",
     "no --non_ema_revision, so the average starts from what is trained; it is not placed elsewhere"),
    ("main", ", progress.effective_batch if args.scale_lr else 1)", ")", "no --scale_lr"),
]  # fmt: skip
LORA = [
    ("imports", " ema,", " lora,", "the method; no --use_ema"),
    ("parse_args", "add_validation_args(parser)", "add_validation_args(parser, single=True)", "its flags"),
    ("parse_args", "add_reporting_args(parser)", "add_reporting_args(parser, project=False)", "its flags"),
    ("main", "partial(ema.save_networks, 'unet', network, average)", "partial(lora.save_networks, network)",
     "a checkpoint holds the adapters alone"),
    ("main", "partial(ema.load_networks, 'unet', network, average)", "partial(lora.load_networks, network)",
     "a checkpoint holds the adapters alone"),
    ("main", "progress.open(network, objective, rate, average, args.tracker_project_name)",
     "progress.open(network, objective, rate)", "no --use_ema, no --tracker_project_name"),
    ("main", ", ema.averaged(average if progress.step else None, network):", ":", "no --use_ema"),
    ("main", "            if average is not None:\n                ema.update(average, network)\n", "", "no --use_ema"),
    ("main", "        with ema.averaged(average, network):\n    ", "", "no --use_ema"),
]  # fmt: skip
KANDINSKY_LORA = [
    ("parse_args", "flags.add_ema_args(parser, placement=False)", "flags.add_lora_args(parser)", "its flags"),
    ("parse_args", "model-finetuned'", "model-finetuned-lora'", "its default"),
    ("main", "partial(export, pipeline, network)", "partial(lora.save_networks, network)", "exported as it is saved"),
]  # fmt: skip
NOT_EXPORTED = ("networks.prepare_frozen(module, accelerator)",
                "networks.prepare_frozen(module, accelerator, exported=False)",
                "adapters are exported alone")  # fmt: skip
PREPARED = "    unet = unet.to(accelerator.device)\n    average = ema.make_ema(unet{}) if args.use_ema else None\n"
EXPORT = "def export(pipeline, unet, folder):\n    pipeline.register_modules(unet=unet)\n    pipeline.save_pretrained(folder)"  # fmt: skip  # noqa: E501

DIFFERENCES = {
    "prior": [
        *KANDINSKY,
        ("main", "model_kind.STABLE_DIFFUSION", "model_kind.PRIOR", "what it trains"),
        ("imports", "import buckets, captions", "import captions", "it reads no images at --resolution"),
        ("main", "    shapes, size = buckets.choose(args, image_infos, progress.effective_batch)\n", "",
         "it reads no images at --resolution"),
        ("main", "image_infos, shapes, pipeline", "image_infos, pipeline", "it reads no images at --resolution"),
        ("main", "args=args, size=size", "args=args", "it reads no images at --resolution"),
        ("generate_image", "args, size, seed", "args, seed", "it reads no images at --resolution"),
        ("generate_image", "height=size[0], width=size[1]", "height=args.resolution, width=args.resolution",
         "it reads no images at --resolution"),
    ],
    "decoder": [
        *KANDINSKY,
        ("imports", "import buckets, captions, draws", "import buckets, draws", "it reads no captions"),
        ("main", "model_kind.STABLE_DIFFUSION", "model_kind.DECODER", "what it trains"),
    ],
    "sd_lora": [
        *LORA,
        ("parse_args", "flags.add_ema_args(parser)", "flags.add_lora_args(parser, kohya=True)", "its flags"),
        ("parse_args", "project=False)",
         "project=False)\n    parser.set_defaults(output_dir='sd-model-finetuned-lora')", "its default"),
        ("imports", ", single_file, spare_parts", "", "adapters are exported alone"),
        ("parse_args", "    flags.add_single_file_args(parser)\n", "", "adapters are exported alone"),
        ("load_models", ", exported=True", "", "adapters are exported alone"),
        ("load_models", " if args.non_ema_revision is None else base.load_non_ema_unet(args)", "",
         "no --non_ema_revision"),
        ("freeze", *NOT_EXPORTED),
        ("main", PREPARED.format(", pipeline.unet, args.offload_ema, args.foreach_ema"),
         "    unet = lora.add_adapters(unet, args, seed, accelerator, start=start['unet'])\n",
         "the method"),
        ("main", "load_models(args, accelerator)\n",
         "load_models(args, accelerator)\n    start = lora.load_network_weights(args, pipeline)\n", "the flag"),
        ("main", "    parameters = optim.trainable_parameters(network)\n",
         "    parameters = optim.trainable_parameters(network)\n"
         "    write = partial(export, pipeline, network, start['text_encoder'], args)\n", "it is used twice"),
        ("main", "partial(export, pipeline, network, args)", "write", "the adapters are exported, not the pipeline"),
        ("main", "partial(lora.save_networks, network)", "lambda folder: write(folder, progress.step)",
         "a checkpoint holds what is exported"),
        ("export", "def export(pipeline, unet, args, folder):\n    pipeline.register_modules(unet=unet)\n    "
         "spare_parts.save(pipeline, args, folder)\n    if args.save_single_file:\n        "
         "single_file.write(folder, args)", "def export(pipeline, unet, text_adapters, args, folder, step=None):\n    "
         "lora.save_stable_diffusion(StableDiffusionPipeline, unet, text_adapters, folder)\n"
         "    if args.save_kohya:\n"
         "        lora.save_kohya(pipeline, unet, text_adapters, args, folder, step)",
         "the adapters are exported, not the pipeline"),
    ],
    "prior_lora": [
        *LORA, *KANDINSKY_LORA,
        ("freeze", *NOT_EXPORTED),
        ("load_models",
         "    for statistic in (unet.clip_mean, unet.clip_std):\n        statistic.requires_grad_(False)\n", "",
         "add_adapters freezes all of the base"),
        ("main", PREPARED.format(""), "    unet = lora.add_adapters(unet, args, seed, accelerator)\n", "the method"),
        ("export", EXPORT, "", "exported as it is saved"),
    ],
    "decoder_lora": [
        *LORA, *KANDINSKY_LORA,
        ("parse_args", "add_network_args(parser)", "add_network_args(parser, xformers=False)", "its flags"),
        ("load_models", "    if args.enable_xformers_memory_efficient_attention:\n        "
         "networks.use_xformers(unet)\n", "", "no xFormers: its attention takes keys besides"),
        ("freeze",
         "[networks.prepare_frozen(pipeline.movq, accelerator), "
         "networks.prepare_frozen(image_encoder, accelerator, exported=False)]",
         "[networks.prepare_frozen(module, accelerator, exported=False) for module in (pipeline.movq, image_encoder)]",
         "adapters are exported alone"),
        ("main", PREPARED.format(""),
         "    unet = lora.add_adapters(unet, args, seed, accelerator, lora.ADDED_KV_ATTENTION)\n",
         "the method; its attention reads the embedding through projections of its own"),
        ("export", EXPORT, "", "exported as it is saved"),
    ],
}  # fmt: skip


class TrainedNetwork(ast.NodeTransformer):
    """Gives the network that is trained one name in all scripts, and leaves docstrings out."""

    def __init__(self, name: str):
        self.name = name

    def generic_visit(self, node):
        super().generic_visit(node)
        for field in ("id", "arg", "attr", "value"):
            if getattr(node, field, None) == self.name:
                setattr(node, field, "unet")
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node


def story(source: str, trained: str = "unet") -> dict[str, str]:
    """Function by function a script's source laid out anew; "imports" is what else it runs, models' classes apart."""
    tree = TrainedNetwork(trained).visit(ast.parse(source))
    functions = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    shared = [node for node in tree.body[1:] if not isinstance(node, ast.FunctionDef) and not of_the_model(node)]
    return {"imports": "\n".join(map(ast.unparse, shared)), **functions}


def of_the_model(node) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module in ("diffusers", "transformers")
    return isinstance(node, ast.Assign) and node.targets[0].id == "CARD"


def read(script: str) -> dict[str, str]:
    return story(SCRIPTS[script].path.read_text(), "prior" if script.startswith("prior") else "unet")


def compare(script: str, here: dict[str, str], there: dict[str, str], names, rows) -> None:
    """Fails, showing both sides, unless `rows` turn each of the named functions `there` into that `here`."""
    expected = {name: there.get(name, "") for name in names}
    for name, old, new, reason in rows:
        if expected[name].count(old) != 1:
            pytest.fail(f"{script}: {name}: this row ({reason}) fits no longer:\n{old}", pytrace=False)
        expected[name] = expected[name].replace(old, new)
    for name in names:
        sides = [text.splitlines() for text in (expected[name], here.get(name, ""))]
        titles = (f"{SCRIPTS[script].compared_with}, with the allowed differences", script)
        difference = "\n".join(difflib.unified_diff(*sides, *titles, lineterm="", n=2))
        if difference:
            row = "\n".join(rows_to_add(name, expected[name], here.get(name, "")))
            message = (
                f"{name} differs, and no row of DIFFERENCES says why:\n{difference}\n\nIf it is meant, add:\n{row}"
            )
            pytest.fail(message, pytrace=False)


def rows_to_add(name: str, there: str, here: str) -> list[str]:
    """Rows for DIFFERENCES that turn `there` into `here`, of whole lines, and as many as make their text unique."""
    before, after = there.splitlines(keepends=True), here.splitlines(keepends=True)
    rows = []
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, before, after, False).get_opcodes():
        if kind == "equal":
            continue
        first, last = start, end
        while there.count("".join(before[first:last])) != 1 and (first > 0 or last < len(before)):
            first, last = max(first - 1, 0), min(last + (first == 0), len(before))
        kept = "".join(before[first:start]), "".join(before[end:last])
        old, new = "".join(before[first:last]), kept[0] + "".join(after[new_start:new_end]) + kept[1]
        rows.append(f"        ({name!r}, {old!r},\n         {new!r}, 'WHY'),")
    return rows


def names_to_compare(script: str, here: dict, there: dict):
    return sorted(here | there) if SCRIPTS[script].is_lora else REPEATED


@pytest.mark.parametrize("script", COMPARED)
def test_repeated_parts_are_equal(script):
    here, there = read(script), read(SCRIPTS[script].compared_with)
    compare(script, here, there, names_to_compare(script, here, there), DIFFERENCES[script])


def changed(script: str, old: str, new: str) -> dict[str, str]:
    source = SCRIPTS[script].path.read_text()
    assert source.count(old) == 1
    return story(source.replace(old, new), "prior" if script.startswith("prior") else "unet")


def test_an_unexplained_difference_is_shown():
    here, there = changed("prior", "optimizer.zero_grad()", "pass"), read("sd")
    with pytest.raises(pytest.fail.Exception) as failure:
        compare("prior", here, there, REPEATED, DIFFERENCES["prior"])
    message = str(failure.value)
    assert "main differs" in message
    assert "\n-                    optimizer.zero_grad()\n+                    pass\n" in message
    assert "--- sd, with the allowed differences" in message
    assert "+++ prior" in message
    row = message.partition("If it is meant, add:\n")[2]
    compare("prior", here, there, REPEATED, [*DIFFERENCES["prior"], *ast.literal_eval(f"[{row}]")])


def test_a_row_that_fits_no_longer_is_shown():
    here, there = read("prior_lora"), changed("prior", "statistic.requires_grad_(False)", "pass")
    with pytest.raises(pytest.fail.Exception, match="add_adapters freezes all of the base"):
        compare("prior_lora", here, there, sorted(here | there), DIFFERENCES["prior_lora"])


def test_only_the_trained_network_is_renamed():
    """A prior trained and a prior that only validates are not the same: the decoder's keep their names."""
    assert "prior = KandinskyV22PriorPipeline" in read("decoder")["build_validation_pipeline"]
    assert "prior" not in read("prior")["compute_loss"]
    assert "compute_loss(unet, batch, noise_scheduler, args)" in read("prior")["main"]


def comments(script: str) -> list[str]:
    """The comments in a script's main, in order."""
    source = SCRIPTS[script].path.read_text().split("\ndef main(")[1]
    tokens = tokenize.generate_tokens(io.StringIO("def main(" + source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@pytest.mark.parametrize("script", COMPARED)
def test_comments_in_main_are_equal(script):
    assert comments(script) == comments("sd")
    assert len(comments(script)) >= 3


@pytest.mark.parametrize("script", TORCH)
def test_the_story_is_told_in_one_order(script):
    names = [name for name in read(script) if name != "imports"]
    assert names == [name for name in ORDER if name not in SCRIPTS[script].without]


def test_the_flax_script_tells_the_same_story():
    """The functions are named and ordered alike; those of the data are equal."""
    here, there = read("sd_flax"), read("sd")
    assert [name for name in here if name in there] == [name for name in there if name in here]
    assert set(there) - set(here) == {"freeze", "build_validation_pipeline"}
    assert set(here) - set(there) == {"make_train_step"}
    for name in ("read_image", "read_caption", "make_sample"):
        assert here[name] == there[name]
    # Inside the compiled step only what is used is passed to it.
    of_all = here["encode"].replace("vae=None, text_encoder=None", "vae, text_encoder")
    assert f"@torch.no_grad()\n{of_all}" == there["encode"]


# Sizes


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short(script):
    path = SCRIPTS[script].path
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(path)}
    assert len(path.read_text().splitlines()) <= 340
    assert lengths.pop("main") <= 80
    assert {name: length for name, length in lengths.items() if length > 45} == {}


def test_shared_files_and_their_functions_are_short():
    paths = list((REPOSITORY / "src").rglob("*.py"))
    assert len(paths) >= 15
    assert {path.name: n for path in paths if (n := len(path.read_text().splitlines())) > 350} == {}
    lengths = {f"{path.name}: {f.name}": f.end_lineno - f.lineno + 1 for path in paths for f in functions(path)}
    assert {name: length for name, length in lengths.items() if length > 45} == {}


@pytest.mark.parametrize("script", [name for name, script in TORCH.items() if script.is_lora])
def test_lora_differs_from_the_full_run_in_few_lines(script):
    command = ["diff", SCRIPTS[SCRIPTS[script].compared_with].path, SCRIPTS[script].path]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    assert 30 <= sum(line[0] in "<>" for line in lines) <= 60


# What stands beside the scripts

FOLDERS = sorted({script.path.parent for script in SCRIPTS.values()})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_nothing_beside_a_script_shadows_a_library(folder):
    """The script's folder comes first on the import path: a datasets.py in it would be imported as datasets."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "t2i_training"}
    assert {"datasets", "torch", "json"} <= libraries
    beside = [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"]
    assert {path.name for path in beside if path.stem in libraries} == set()
    assert not (folder / "__init__.py").exists()


def test_every_script_is_known_here():
    assert {path for folder in FOLDERS for path in folder.glob("*.py")} == {script.path for script in SCRIPTS.values()}
    assert len(FOLDERS) == 2
