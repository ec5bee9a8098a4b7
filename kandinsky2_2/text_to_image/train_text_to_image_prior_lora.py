"""Fine-tune low-rank adapters (LoRA) of the prior of Kandinsky 2.2 on captioned images.

The prior predicts an image's CLIP embedding from its caption: it minimises || x_0 - prior(x_t, t, c) ||^2 over
normalised embeddings x_0 noised to step t (unCLIP, arXiv:2204.06125, section 2.2), as the full run does, but trains
only a low-rank addition to the attention matrices (arXiv:2106.09685).

    accelerate launch train_text_to_image_prior_lora.py \\
        --train_data_dir=my_images --mixed_precision=bf16 --train_batch_size=32 --rank=4 \\
        --learning_rate=1e-4 --max_train_steps=15000 --output_dir=my_prior_lora

The same command with --resume_from_checkpoint=latest continues, bit for bit, where the run was interrupted.
"""

from functools import partial

from t2i_training.cli import checks, flags
from t2i_training.cli.parser import make_parser
from t2i_training.sources import model_kind


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flags.add_kandinsky_args(parser)
    flags.add_data_source_args(parser)  # read by open_dataset
    flags.add_data_args(parser)
    flags.add_caption_args(parser)
    flags.add_resolution_arg(parser, "Side of the validation images, in pixels; the prior does not depend on it.")
    flags.add_training_args(parser)
    flags.add_network_args(parser, xformers=False)
    flags.add_optimizer_args(parser)
    flags.add_loss_args(parser)
    flags.add_lora_args(parser)
    flags.add_encoding_args(parser)
    flags.add_checkpoint_args(parser)
    flags.add_validation_args(parser, single=True)
    flags.add_reporting_args(parser, project=False)
    parser.set_defaults(output_dir="kandi_2_2-model-finetuned-lora", train_batch_size=1, adam_weight_decay=0.0)
    return checks.parse(parser, argv, model_kind.PRIOR)


if __name__ == "__main__":
    parse_args()  # report usage errors, and --help, before the slow imports below

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)

from t2i_training import distributed, stopping
from t2i_training.data import captions, draws, images, inspection, loading
from t2i_training.data.dataset import SHAPE, image_source, open_dataset
from t2i_training.encodings import cache
from t2i_training.library_errors import readable_errors
from t2i_training.model import lora, losses, networks, optim
from t2i_training.report import hub, validation
from t2i_training.report.progress import Progress
from t2i_training.run import checkpoint, lifecycle, output_folder
from t2i_training.run.export import export_atomically


def load_models(args, accelerator):
    """Load the base prior's pipeline (fp32, on the CPU), its prior, still without adapters, the training scheduler."""
    with readable_errors("--pretrained_prior_model_name_or_path", args.pretrained_prior_model_name_or_path):
        pipeline = KandinskyV22PriorPipeline.from_pretrained(
            args.pretrained_prior_model_name_or_path, **model_kind.source(args, "pretrained_prior_model_name_or_path")
        )
        networks.standardize(pipeline)
    prior = pipeline.prior
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)  # once, not in every step
    if args.gradient_checkpointing:
        networks.enable_gradient_checkpointing(prior.transformer_blocks)
    return pipeline, networks.prepare_trained(prior.train(), args, accelerator), noise_scheduler


def read_image(source, shape, crop_draw, mirror):
    """Preprocess an image file for the image encoder: its centre square."""
    image = images.decode(source, shape)
    return {"clip_pixels": images.fill(image, shape, "bicubic", crop_draw, mirror)}  # (3, S, S) uint8


def read_caption(caption, tokenizer):
    """Preprocess a caption for the text encoder, with the mask that the prior needs."""
    input_ids = captions.tokenize(tokenizer, caption)  # (tokens,)
    return {"input_ids": input_ids, "text_mask": captions.text_mask(tokenizer, input_ids)}  # (tokens,) bool


def make_sample(row, draw, args, load_image, load_caption, embedding_size, num_timesteps):
    """Make the sample of one visit to a row, in a loader worker. Everything random about it is drawn here."""
    return {
        **load_image(image_source(row, args), row[SHAPE], crop_draw=None, mirror=False),
        **load_caption(captions.pick_caption(row[args.caption_column], draw, args)),
        "noise": draws.normal(draw("noise"), (embedding_size,)),
        "timesteps": torch.tensor(draw("timestep").integers(num_timesteps)),
    }


def freeze(args, pipeline, accelerator):
    """The frozen parts for `encode`: both CLIP encoders, and mean and std of the embeddings."""
    modules = (pipeline.image_encoder, pipeline.text_encoder)
    encoders = [networks.prepare_frozen(module, accelerator, exported=False) for module in modules]
    statistics = [
        s.detach().float().to(accelerator.device) for s in (pipeline.prior.clip_mean, pipeline.prior.clip_std)
    ]
    return [*encoders, *statistics]


def encode_images(batch, image_encoder, clip_mean, clip_std):
    """The images' embeddings, normalised."""
    pixels = images.normalize_for_clip(batch["clip_pixels"], image_encoder.dtype)  # (B, 3, S, S)
    image_embeds = image_encoder(pixels).image_embeds.float()
    return {"image_embeds": (image_embeds - clip_mean) / clip_std}  # (B, D)


def encode_captions(batch, text_encoder):
    """Embeddings (B, D) and states (B, tokens, D) of the captions, with the mask of valid states."""
    text = text_encoder(batch["input_ids"])
    return {"text_embeds": text.text_embeds, "text_states": text.last_hidden_state, "text_mask": batch["text_mask"]}


@torch.no_grad()
def encode(batch, image_encoder, text_encoder, clip_mean, clip_std):
    """Run the frozen networks on what of a batch the cache has not encoded."""
    of_images = encode_images(batch, image_encoder, clip_mean, clip_std) if "clip_pixels" in batch else {}
    return of_images | (encode_captions(batch, text_encoder) if "input_ids" in batch else {})


def compute_loss(prior, batch, noise_scheduler, args):
    """The training loss, a scalar in fp32. A pure function of weights and batch."""
    image_embeds, timesteps = batch["image_embeds"], batch["timesteps"]
    noisy_embeds = noise_scheduler.add_noise(image_embeds, batch["noise"], timesteps)
    prediction = prior(
        noisy_embeds, timestep=timesteps, proj_embedding=batch["text_embeds"],
        encoder_hidden_states=batch["text_states"], attention_mask=batch["text_mask"], return_dict=False,
    )[0]  # fmt: skip
    return losses.denoising_loss(prediction, image_embeds, timesteps, noise_scheduler, args.snr_gamma)


def make_dataloader(args, dataset, image_infos, pipeline, frozen, noise_scheduler, progress):
    """The loader of the run's remaining batches. With --cache_encodings it encodes the data set first."""
    image_encoder, text_encoder, clip_mean, clip_std = frozen
    shapes = [(image_encoder.config.image_size,) * 2] * len(dataset)
    readers = [
        read_image,
        partial(read_caption, tokenizer=captions.report_cuts(pipeline.tokenizer, dataset, args, progress.accelerator)),
    ]
    if args.cache_encodings:
        encoders = [
            partial(encode_images, image_encoder=image_encoder, clip_mean=clip_mean, clip_std=clip_std),
            partial(encode_captions, text_encoder=text_encoder),
        ]
        readers = cache.precompute(args, progress.accelerator, dataset, image_infos, shapes, readers, encoders)
    sample = partial(
        make_sample, args=args, load_image=readers[0], load_caption=readers[1],
        embedding_size=pipeline.prior.config.embedding_dim, num_timesteps=noise_scheduler.config.num_train_timesteps,
    )  # fmt: skip
    return loading.make_loader(
        dataset, shapes, sample, args, progress.accelerator, progress.seed, start=progress.samples_seen,
        updates=progress.total - progress.step,
    )  # fmt: skip


def build_validation_pipeline(args, pipeline, prior, image_encoder, text_encoder, *_):
    """The pipeline for validation: the modules in memory, and the base decoder, which is loaded only for this."""
    with readable_errors("--pretrained_decoder_model_name_or_path", args.pretrained_decoder_model_name_or_path):
        decoder = KandinskyV22Pipeline.from_pretrained(
            args.pretrained_decoder_model_name_or_path,
            **model_kind.source(args, "pretrained_decoder_model_name_or_path"),
        )
        networks.standardize(decoder, image_encoder.dtype)
    val_pipeline = KandinskyV22CombinedPipeline(
        **decoder.components, prior_prior=prior, prior_image_encoder=image_encoder, prior_text_encoder=text_encoder,
        prior_tokenizer=pipeline.tokenizer, prior_scheduler=pipeline.scheduler,
        prior_image_processor=pipeline.image_processor,
    )  # fmt: skip
    val_pipeline.set_progress_bar_config(disable=True)
    return val_pipeline


def generate_image(index, pipeline, args, seed, accelerator):
    """Generate the validation image of prompt `index`, with the same noise at every validation."""
    generator = torch.Generator().manual_seed(seed + index)
    with torch.no_grad(), accelerator.autocast():
        return pipeline(
            args.validation_prompts[index], height=args.resolution, width=args.resolution,
            num_inference_steps=validation.STEPS, prior_num_inference_steps=validation.STEPS, generator=generator,
        ).images[0]  # fmt: skip


CARD = {
    "title": "Kandinsky 2.2 prior LoRA",
    "base_model": "pretrained_prior_model_name_or_path",  # name of the flag
    "tags": ["kandinsky", "lora"],
    "license": "apache-2.0",
    "usage": """
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

prior = DiffusionPipeline.from_pretrained("<pretrained_prior_model_name_or_path>")
prior.prior.load_lora_adapter("path/to/this/folder", prefix=None, weight_name="pytorch_lora_weights.safetensors")
components = {f"prior_{name}": component for name, component in prior.components.items()}
pipe = AutoPipelineForText2Image.from_pretrained("<pretrained_decoder_model_name_or_path>", **components)
pipe("a caption like those it was trained on").images[0].save("image.png")
""",
}


def main(argv=None):
    args = parse_args(argv)
    accelerator = lifecycle.start(args)
    stop = stopping.StopRequest()
    folder, position = checkpoint.find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)
    seed = lifecycle.resolve_seed(args, position)

    with distributed.main_first(accelerator):
        model_kind.check_hub(args, model_kind.PRIOR)
        dataset = open_dataset(args, seed)
    dataset, image_infos = inspection.inspect(args, accelerator, dataset, args.caption_column)
    repo_id = hub.create_repository(args, accelerator)
    pipeline, prior, noise_scheduler = load_models(args, accelerator)
    frozen = freeze(args, pipeline, accelerator)
    progress = Progress(args, accelerator, dataset, image_infos, position, seed)
    loader = make_dataloader(args, dataset, image_infos, pipeline, frozen, noise_scheduler, progress)
    prior = lora.add_adapters(prior, args, seed, accelerator)

    optimizer = optim.make_optimizer(args, optim.trainable_parameters(prior))
    rate = optim.make_rate(args, progress.total)
    prior, optimizer = distributed.prepare(accelerator, prior, optimizer)
    network = networks.unwrap(prior, accelerator)
    parameters = optim.trainable_parameters(network)

    checkpoints = checkpoint.CheckpointManager(
        accelerator, stop, optimizer, args.output_dir, args.checkpoints_total_limit,
        partial(lora.save_networks, network), partial(lora.load_networks, network),
    )  # fmt: skip
    checkpoints.restore(folder)
    output_folder.take_over(progress.config, accelerator, progress.step)
    objective = partial(compute_loss, noise_scheduler=noise_scheduler, args=args)
    progress.open(network, objective, rate)
    stream = progress.timed(loading.batches(loader, accelerator, stop))
    val_pipeline = build_validation_pipeline(args, pipeline, network, *frozen) if args.validation_prompts else None
    generate = partial(generate_image, pipeline=val_pipeline, args=args, seed=seed, accelerator=accelerator)

    def validate():
        with networks.on_device(val_pipeline, accelerator):
            validation.validate(generate, args.validation_prompts, progress.step, args.output_dir, accelerator, stop)
        progress.restart_clock()

    if validation.pending(args, progress):  # before the first update: the untouched model, first row of every grid
        validate()
    with stop.after_step(), checkpoints, progress.loop(checkpoints):
        while progress.step < progress.total and not stop.agreed:
            for group in optimizer.param_groups:
                group["lr"] = rate(progress.step)
            for _ in range(args.gradient_accumulation_steps):
                with accelerator.accumulate(prior):
                    batch = next(stream)
                    batch |= encode(batch, *frozen)
                    loss = compute_loss(prior, batch, noise_scheduler, args)
                    accelerator.backward(loss)
                    progress.add_micro_batch(loss, batch)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            progress.count_update(grad_norm, rate(progress.step))
            stop.agree(accelerator)
            if progress.step % args.checkpointing_steps == 0 or stop.agreed:
                progress.save(checkpoints)
            if progress.validation_due() and not stop.agreed:
                validate()
                if stop.agree(accelerator):  # a signal may have come during the validation
                    progress.save(checkpoints)

    if progress.step >= progress.total:
        exported = export_atomically(args.output_dir, partial(lora.save_networks, network), accelerator)
        if args.validation_prompts:
            validate()  # after the export, so that the weights are safe if it fails
    progress.close()
    if progress.step >= progress.total:
        hub.publish_card_and_upload(args, accelerator, repo_id, exported, progress, CARD)
    lifecycle.release_and_exit(stop, complete=progress.step >= progress.total)


if __name__ == "__main__":
    lifecycle.run(main)
