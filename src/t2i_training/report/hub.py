"""The model card that every run writes, and the upload to the hub."""

import contextlib
import re
import shutil
from pathlib import Path

from .. import sanitize
from ..errors import RunError
from ..files import free_name, write_text
from ..log import logger
from ..sanitize import is_hub_name
from .validation import own_grid

OBJECTIVE = (  # flags that the card lists if they are set
    "prediction_type", "rank", "use_ema", "snr_gamma", "noise_offset", "input_perturbation", "dream_training",
    "caption_dropout", "image_embeds_dropout", "caption_prefix", "caption_suffix", "shuffle_caption", "keep_tokens",
    "caption_tag_dropout_rate", "use_aspect_ratio_buckets", "aspect_ratio_buckets",
)  # fmt: skip
BEYOND = {"num_repeats": 1, "max_token_length": 75, "clip_skip": 1}  # flags that it lists if they are greater
TAGS = ("text-to-image", "diffusers", "diffusers-training")  # in every card


def create_repository(args, accelerator) -> str | None:
    """With --push_to_hub create the repository (or find it) before training, so that a bad token shows at once."""
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    from huggingface_hub import create_repo

    try:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        return create_repo(repo_id=name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # connection, authentication and naming errors
        raise _failure(args, error) from None


def _failure(args, error: Exception, consequence: str = "") -> RunError:
    """The error for a failed call to the hub. Removes the token that its text may hold."""
    reason = sanitize.reason(error, args.hub_token).rstrip(".")
    return RunError(f"--push_to_hub: {type(error).__name__}: {reason}{consequence}")


def publish_card_and_upload(args, accelerator, repo_id: str | None, exported: list[str], progress, card: dict) -> None:
    """After the export: write the card and, if asked for, upload. Main process only.

    `card` goes to `write_card`; its "base_model" and "prior" name the flags that hold them. Call it after
    `Progress.close`: the curves are there to be uploaded, and no process waits in a collective meanwhile.
    """
    if accelerator.is_main_process:
        done = {"steps": progress.step, "seed": progress.seed, "precision": progress.precision}
        card = card | {"base_model": getattr(args, card["base_model"])} | done
        if "prior" in card:  # diffusers looks for a decoder's prior in this list, be it a hub name or a folder
            card["prior"] = [getattr(args, card["prior"])]
        write_card(args, **card)
        grid, has_base = own_grid(args, progress.step)
        where = f"; {'before and after' if has_base else 'validation images'}: {grid}" if grid else ""
        logger.info(
            f"done after {progress.step} updates: the result and how to use it are in "
            f"{args.output_dir}/README.md{where}"
        )
        if repo_id is not None:
            with _public_card(args, card):
                push(args, repo_id, exported)


@contextlib.contextmanager
def _public_card(args, card: dict):
    """Context in which the card names no local folder as the prior. Locally diffusers needs it to find the prior."""
    (prior,) = card.get("prior", [""])
    private = bool(prior) and not is_hub_name(prior)
    if private:
        logger.warning(
            f"the uploaded card names no prior, since {prior} is a local folder: upload the prior and add its name"
        )
        write_card(args, **{name: value for name, value in card.items() if name != "prior"})
    try:
        yield
    finally:
        if private:
            write_card(args, **card)


def push(args, repo_id: str, exported: list[str]) -> None:
    """Upload what the run made: exported files, card, images and curves; not checkpoints, logs or configuration."""
    from huggingface_hub import upload_folder

    patterns = [pattern for name in exported for pattern in (name, f"{name}/*")]
    try:
        upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, commit_message="End of training", token=args.hub_token,
            allow_patterns=[*patterns, "README.md", "training_curves.png", "validation/*.png"],
        )  # fmt: skip
    except Exception as error:
        raise _failure(args, error, f"; the trained model is complete in {args.output_dir}") from None
    logger.info(f"pushed to {repo_id}")


def write_card(
    args,
    *,
    title: str,
    base_model: str,
    tags: list[str],
    usage: str,
    steps: int,
    seed: int,
    precision: str,
    license="creativeml-openrail-m",
    **head,
) -> None:
    """README.md of the output folder: what it is, from what and how it was made, how to use it, before/after images.

    `head` adds entries to the card's YAML head. Local paths of models and data are left out: the hub accepts only
    names there, and a card may be published. In `usage` the name of a flag in angle brackets stands for its value.
    """
    from huggingface_hub import ModelCard, ModelCardData

    head = {
        "license": _license(base_model) or license,
        "library_name": "diffusers",
        "inference": True,
        "tags": [*tags, *TAGS],
    } | head
    for key, value in (("base_model", base_model), ("datasets", vars(args).get("dataset_name"))):
        if value and is_hub_name(value):
            head[key] = [value] if key == "datasets" else value
    settings = _settings(args, base_model, steps, seed, precision)
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in settings)
    body = (
        f"# {title}\n\nFine-tuned from {literal(_public_name(base_model))} with the data and settings named below.\n\n"
        f"{_images_section(args, steps)}## Use\n\n```python\n{_fill_in(args, usage)}\n```\n\n"
        f"{_long_prompts(args)}"
        f"## Training\n\n| | |\n|---|---|\n{table}\n\n"
        "Fine-tuning on few images overfits and makes a model forget what it knew: compare the rows of the grid, "
        "and prefer an earlier checkpoint where the later one only repeats its training images.\n"
    )
    data = ModelCardData(**head)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    file = Path(args.output_dir) / "README.md"
    _keep_the_users(file)
    write_text(file, str(card))


def _keep_the_users(file: Path) -> None:
    """Rename a README.md that no run has written."""
    if file.exists() and TAGS[-1] not in file.read_text(encoding="utf-8", errors="replace"):
        shutil.copy2(file, free_name(file))


def _license(base_model: str) -> str | None:
    """The license in the model card of a local base model, if it has one."""
    from huggingface_hub import ModelCard

    with contextlib.suppress(Exception):  # it has no card, or one that cannot be read
        found = ModelCard.load(Path(base_model) / "README.md").data.license
        return found if re.fullmatch(r"[\w.+-]+", found) else None


def _settings(args, base_model: str, steps: int, seed: int, precision: str) -> list[tuple]:
    """The rows of the card's table."""
    rows = [
        ("base model", _public_name(base_model)),
        ("data", _data_name(args)),
        ("weight updates", steps),
        ("learning rate", f"{args.learning_rate} ({args.lr_scheduler})"),
        ("batch size x accumulation", f"{args.train_batch_size} x {args.gradient_accumulation_steps}"),
        ("resolution", args.resolution),
        ("mixed precision", precision),
        ("seed", seed),
    ]
    sources = {"VAE": "pretrained_vae_model_name_or_path", "started from": "network_weights"}
    rows += [(name, _public_name(value)) for name, flag in sources.items() if (value := vars(args).get(flag))]
    rows += [(flag.replace("_", " "), value) for flag in OBJECTIVE if (value := vars(args).get(flag))]
    rows += [(flag.replace("_", " "), getattr(args, flag)) for flag in BEYOND if _is_beyond(args, flag)]
    return rows


def _is_beyond(args, flag: str) -> bool:
    return vars(args).get(flag, BEYOND[flag]) > BEYOND[flag]


def _long_prompts(args) -> str:
    if not _is_beyond(args, "max_token_length"):
        return ""
    return (
        f"It was trained on captions of up to {args.max_token_length} tokens. "
        "diffusers' pipelines read 75 of a prompt; AUTOMATIC1111 and ComfyUI read all.\n\n"
    )


def _data_name(args) -> str | None:
    given = vars(args)  # a script that opens a data set of its own has neither flag
    source = given.get("dataset_name") or given.get("train_data_dir")
    return _public_name(source) if source else None


def _fill_in(args, usage: str) -> str:
    """Code with flags' values in place of <flag>; a line whose flag is not set is left out."""
    lines = usage.strip().splitlines()
    if vars(args).get("pretrained_vae_model_name_or_path"):  # a full run's export has it in it
        base = 'from_pretrained("<pretrained_model_name_or_path>")'
        vae = 'pipe.vae = pipe.vae.from_pretrained("<pretrained_vae_model_name_or_path>")'
        lines = [each for line in lines for each in ([line, vae] if base in line else [line])]
    flags = [re.findall(r"<(\w+)>", line) for line in lines]
    lines = [line for line, names in zip(lines, flags) if all(getattr(args, name) is not None for name in names)]
    lines = [_from_single_file(args, line) for line in lines]
    if _is_beyond(args, "clip_skip"):
        # diffusers' own clip_skip fails with transformers from 5.6 on, which has no text_model any more.
        layers = 'getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder.layers'
        skip = f"del {layers}[{1 - args.clip_skip}:]  # --clip_skip={args.clip_skip}"
        lines = [each for line in lines for each in ([skip, line] if line.startswith("pipe(") else [line])]
    return re.sub(r"<(\w+)>", lambda flag: _loadable_name(args, flag[1]), "\n".join(lines))


def _from_single_file(args, line: str) -> str:
    """A line that loads a model, of one in a single file with the method for it."""
    flag = re.search(r"from_pretrained\(\"<(\w+)>", line)
    is_file = flag and Path(getattr(args, flag[1])).is_file()
    return line.replace("from_pretrained", "from_single_file") if is_file else line


def _loadable_name(args, flag: str) -> str:
    value = getattr(args, flag)
    if not flag.startswith("pretrained_") or is_hub_name(value):
        return str(value)
    kind = flag.split("_")[1]  # model, vae, prior or decoder
    return f"path/to/the/{kind}{Path(value).suffix if Path(value).is_file() else ''}"


def _public_name(name: str) -> str:
    return name if is_hub_name(name) else Path(name).name


def literal(value) -> str:
    """Any text as inline Markdown code, so that nothing in it is read as Markdown, HTML or a link."""
    text = sanitize.printable(" ".join(str(value).split()))
    if not text:
        return "(empty)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _cell(value) -> str:
    """A setting as a cell of a Markdown table: bars are escaped, since they end a cell even within code."""
    return "opened by the script itself" if value is None else literal(value).replace("|", r"\|")


def _images_section(args, steps: int) -> str:
    grid, has_base = own_grid(args, steps)
    if grid is None:
        return ""
    listed = "\n".join(f"- {literal(prompt)}" for prompt in dict.fromkeys(args.validation_prompts))
    shown = "base model and fine-tuned model" if has_base else "fine-tuned model"
    return f"![{shown}](validation/{grid.name})\n\n{listed}\n\n"
