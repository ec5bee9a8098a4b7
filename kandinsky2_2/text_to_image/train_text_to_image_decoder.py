"""Fine-tune the decoder of Kandinsky 2.2 on images; captions are not needed.

The decoder generates an image from its CLIP embedding: it minimises || noise - unet(z_t, t, embedding) ||^2 over MoVQ
latents z_t noised to step t (unCLIP, arXiv:2204.06125, section 2.1). MoVQ and the CLIP image encoder stay frozen.

    accelerate launch train_text_to_image_decoder.py \\
        --train_data_dir=my_images --resolution=768 --mixed_precision=bf16 --train_batch_size=1 \\
        --gradient_accumulation_steps=4 --gradient_checkpointing --image_embeds_dropout=0.1 \\
        --learning_rate=1e-5 --max_train_steps=15000 --output_dir=my_decoder

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
    flags.add_decoder_condition_args(parser)
    flags.add_resolution_arg(parser, "Side of the square training images, in pixels.")
    flags.add_bucket_args(parser)
    flags.add_training_args(parser)
    flags.add_network_args(parser)
    flags.add_optimizer_args(parser)
    flags.add_loss_args(parser)
    flags.add_ema_args(parser, placement=False)
    flags.add_encoding_args(parser)
    flags.add_checkpoint_args(parser)
    flags.add_validation_args(parser)
    flags.add_reporting_args(parser)
    parser.set_defaults(output_dir="kandi_2_2-model-finetuned", train_batch_size=1, adam_weight_decay=0.0)
    return checks.parse(parser, argv, model_kind.DECODER)


if __name__ == "__main__":
    parse_args()  # report usage errors, and --help, before the slow imports below

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from transformers import CLIPVisionModelWithProjection

from t2i_training import distributed, stopping
from t2i_training.data import buckets, draws, images, inspection, loading
from t2i_training.data.dataset import SHAPE, image_source, open_dataset
from t2i_training.encodings import cache
from t2i_training.library_errors import readable_errors
from t2i_training.model import ema, losses, networks, optim
from t2i_training.report import hub, validation
from t2i_training.report.progress import Progress
from t2i_training.run import checkpoint, lifecycle, output_folder
from t2i_training.run.export import export_atomically


def load_models(args, accelerator):
    """Load the base decoder's pipeline (fp32, on the CPU), the UNet to train (fp32) and the training scheduler."""
    with readable_errors("--pretrained_decoder_model_name_or_path", args.pretrained_decoder_model_name_or_path):
        pipeline = KandinskyV22Pipeline.from_pretrained(
            args.pretrained_decoder_model_name_or_path,
            **model_kind.source(args, "pretrained_decoder_model_name_or_path"),
        )
        networks.standardize(pipeline)
    unet = pipeline.unet
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)  # once, not in every step
    if args.enable_xformers_memory_efficient_attention:
        networks.use_xformers(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return pipeline, networks.prepare_trained(unet.train(), args, accelerator), noise_scheduler


def read_image(source, shape, crop_draw, mirror, clip_size):
    """Preprocess an image file: its centre in the `shape` (H, W) of its bucket, and a square for the image encoder."""
    square = (clip_size, clip_size)
    image = images.decode(source, [max(sides) for sides in zip(shape, square)])
    return {
        "pixels": images.fill(image, shape, "bicubic", crop_draw, mirror),  # (3, H, W) uint8
        "clip_pixels": images.fill(image, square, "bicubic", crop_draw, mirror),  # (3, S, S) uint8
    }


def make_sample(row, draw, args, load_image, empty_embeds, latent_channels, scale_factor, num_timesteps):
    """Make the sample of one visit to a row, in a loader worker. Everything random about it is drawn here."""
    height, width = row[SHAPE]
    latent_shape = (latent_channels, height // scale_factor, width // scale_factor)
    sample = {
        **load_image(image_source(row, args), row[SHAPE], crop_draw=None, mirror=False),
        "noise": draws.normal(draw("noise"), latent_shape),  # (C, H/f, W/f)
        "timesteps": torch.tensor(draw("timestep").integers(num_timesteps)),
    }
    if args.image_embeds_dropout:  # arXiv:2207.12598: without such samples fine-tuning erodes guidance
        sample["dropped"] = torch.tensor(draw("image_embeds_dropout").random() < args.image_embeds_dropout)  # ()
        sample["empty_embeds"] = empty_embeds  # (D,)
    return sample


def freeze(args, pipeline, accelerator):
    """The frozen networks for `encode`: MoVQ, and the prior's CLIP image encoder."""
    with readable_errors("--pretrained_prior_model_name_or_path", args.pretrained_prior_model_name_or_path):
        image_encoder = CLIPVisionModelWithProjection.from_pretrained(
            args.pretrained_prior_model_name_or_path, subfolder="image_encoder",
            **model_kind.source(args, "pretrained_prior_model_name_or_path", "image_encoder"),
        )  # fmt: skip
        networks.to_whole(image_encoder, "image_encoder", image_encoder.dtype)
    return [
        networks.prepare_frozen(pipeline.movq, accelerator),
        networks.prepare_frozen(image_encoder, accelerator, exported=False),
    ]


def encode_images(batch, movq, image_encoder):
    """MoVQ's latents, neither sampled nor scaled, and the CLIP embeddings of the images."""
    clip_pixels = images.normalize_for_clip(batch["clip_pixels"], image_encoder.dtype)  # (B, 3, S, S)
    return {
        "latents": movq.encode(images.normalize(batch["pixels"], movq.dtype)).latents,  # (B, C, H/f, W/f)
        "image_embeds": image_encoder(clip_pixels).image_embeds,  # (B, D)
    }


@torch.no_grad()
def encode(batch, movq, image_encoder):
    """Run the frozen networks on what of a batch the cache has not encoded."""
    return encode_images(batch, movq, image_encoder) if "pixels" in batch else {}


@torch.no_grad()
def embed_nothing(image_encoder):
    """The prior's unconditional image embedding (D,), for guidance: that of all-zero input."""
    side = image_encoder.config.image_size
    pixels = torch.zeros(1, 3, side, side, device=image_encoder.device, dtype=image_encoder.dtype)
    return image_encoder(pixels).image_embeds[0].cpu()


def compute_loss(unet, batch, noise_scheduler, args):
    """The training loss, a scalar in fp32. A pure function of weights and batch."""
    latents, noise, timesteps = batch["latents"].float(), batch["noise"], batch["timesteps"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    image_embeds = batch["image_embeds"]
    if args.image_embeds_dropout:
        image_embeds = torch.where(batch["dropped"][:, None], batch["empty_embeds"], image_embeds)
    condition = {"image_embeds": image_embeds}
    prediction = unet(noisy_latents, timesteps, None, added_cond_kwargs=condition, return_dict=False)[0]
    prediction = prediction[:, : latents.shape[1]]  # the other half of the channels is the learned variance
    return losses.denoising_loss(prediction, noise, timesteps, noise_scheduler, args.snr_gamma)


def make_dataloader(args, dataset, image_infos, shapes, pipeline, frozen, noise_scheduler, progress):
    """The loader of the run's remaining batches. With --cache_encodings it encodes the data set first."""
    movq, image_encoder = frozen
    empty_embeds = embed_nothing(image_encoder) if args.image_embeds_dropout else None
    readers = [partial(read_image, clip_size=image_encoder.config.image_size)]
    if args.cache_encodings:
        encoders = [partial(encode_images, movq=movq, image_encoder=image_encoder)]
        readers = cache.precompute(args, progress.accelerator, dataset, image_infos, shapes, readers, encoders)
    sample = partial(
        make_sample, args=args, load_image=readers[0], empty_embeds=empty_embeds,
        latent_channels=pipeline.movq.config.latent_channels, scale_factor=pipeline.movq_scale_factor,
        num_timesteps=noise_scheduler.config.num_train_timesteps,
    )  # fmt: skip
    return loading.make_loader(
        dataset, shapes, sample, args, progress.accelerator, progress.seed, start=progress.samples_seen,
        updates=progress.total - progress.step,
    )  # fmt: skip


def build_validation_pipeline(args, pipeline, unet, movq, image_encoder):
    """The pipeline for validation: the modules in memory, and the rest of the prior, loaded only for this."""
    with readable_errors("--pretrained_prior_model_name_or_path", args.pretrained_prior_model_name_or_path):
        prior = KandinskyV22PriorPipeline.from_pretrained(
            args.pretrained_prior_model_name_or_path, image_encoder=image_encoder,
            **model_kind.source(args, "pretrained_prior_model_name_or_path"),
        )  # fmt: skip
        networks.standardize(prior, image_encoder.dtype)
    val_pipeline = KandinskyV22CombinedPipeline(
        unet=unet, movq=movq, scheduler=pipeline.scheduler,
        **{f"prior_{name}": component for name, component in prior.components.items()},
    )  # fmt: skip
    val_pipeline.set_progress_bar_config(disable=True)
    return val_pipeline


def generate_image(index, pipeline, args, size, seed, accelerator):
    """Generate the validation image of prompt `index`, with the same noise at every validation."""
    generator = torch.Generator().manual_seed(seed + index)
    with torch.no_grad(), accelerator.autocast():
        return pipeline(
            args.validation_prompts[index], height=size[0], width=size[1],
            num_inference_steps=validation.STEPS, prior_num_inference_steps=validation.STEPS, generator=generator,
        ).images[0]  # fmt: skip


def export(pipeline, unet, folder):
    """Write the decoder's pipeline into `folder`, with its frozen parts as they were loaded."""
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(folder)


CARD = {
    "title": "Kandinsky 2.2 decoder",
    "base_model": "pretrained_decoder_model_name_or_path",  # name of the flag
    "prior": "pretrained_prior_model_name_or_path",
    "tags": ["kandinsky"],
    "license": "apache-2.0",
    "usage": """
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("path/to/this/folder")
pipe("a caption").images[0].save("image.png")
""",
}


def main(argv=None):
    args = parse_args(argv)
    accelerator = lifecycle.start(args)
    stop = stopping.StopRequest()
    folder, position = checkpoint.find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)
    seed = lifecycle.resolve_seed(args, position)

    with distributed.main_first(accelerator):
        model_kind.check_hub(args, model_kind.DECODER)
        dataset = open_dataset(args, seed)
    dataset, image_infos = inspection.inspect(args, accelerator, dataset, args.caption_column)
    repo_id = hub.create_repository(args, accelerator)
    pipeline, unet, noise_scheduler = load_models(args, accelerator)
    frozen = freeze(args, pipeline, accelerator)
    progress = Progress(args, accelerator, dataset, image_infos, position, seed)
    shapes, size = buckets.choose(args, image_infos, progress.effective_batch)
    loader = make_dataloader(args, dataset, image_infos, shapes, pipeline, frozen, noise_scheduler, progress)
    unet = unet.to(accelerator.device)
    average = ema.make_ema(unet) if args.use_ema else None

    optimizer = optim.make_optimizer(args, optim.trainable_parameters(unet))
    rate = optim.make_rate(args, progress.total)
    unet, optimizer = distributed.prepare(accelerator, unet, optimizer)
    network = networks.unwrap(unet, accelerator)
    parameters = optim.trainable_parameters(network)

    checkpoints = checkpoint.CheckpointManager(
        accelerator, stop, optimizer, args.output_dir, args.checkpoints_total_limit,
        partial(ema.save_networks, "unet", network, average), partial(ema.load_networks, "unet", network, average),
    )  # fmt: skip
    checkpoints.restore(folder)
    output_folder.take_over(progress.config, accelerator, progress.step)
    objective = partial(compute_loss, noise_scheduler=noise_scheduler, args=args)
    progress.open(network, objective, rate, average, args.tracker_project_name)
    stream = progress.timed(loading.batches(loader, accelerator, stop))
    val_pipeline = build_validation_pipeline(args, pipeline, network, *frozen) if args.validation_prompts else None
    generate = partial(generate_image, pipeline=val_pipeline, args=args, size=size, seed=seed, accelerator=accelerator)

    def validate():
        with networks.on_device(val_pipeline, accelerator), ema.averaged(average if progress.step else None, network):
            validation.validate(generate, args.validation_prompts, progress.step, args.output_dir, accelerator, stop)
        progress.restart_clock()

    if validation.pending(args, progress):  # before the first update: the untouched model, first row of every grid
        validate()
    with stop.after_step(), checkpoints, progress.loop(checkpoints):
        while progress.step < progress.total and not stop.agreed:
            for group in optimizer.param_groups:
                group["lr"] = rate(progress.step)
            for _ in range(args.gradient_accumulation_steps):
                with accelerator.accumulate(unet):
                    batch = next(stream)
                    batch |= encode(batch, *frozen)
                    loss = compute_loss(unet, batch, noise_scheduler, args)
                    accelerator.backward(loss)
                    progress.add_micro_batch(loss, batch)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            if average is not None:
                ema.update(average, network)
            progress.count_update(grad_norm, rate(progress.step))
            stop.agree(accelerator)
            if progress.step % args.checkpointing_steps == 0 or stop.agreed:
                progress.save(checkpoints)
            if progress.validation_due() and not stop.agreed:
                validate()
                if stop.agree(accelerator):  # a signal may have come during the validation
                    progress.save(checkpoints)

    if progress.step >= progress.total:
        with ema.averaged(average, network):
            exported = export_atomically(args.output_dir, partial(export, pipeline, network), accelerator)
        if args.validation_prompts:
            validate()  # after the export, so that the weights are safe if it fails
    progress.close()
    if progress.step >= progress.total:
        hub.publish_card_and_upload(args, accelerator, repo_id, exported, progress, CARD)
    lifecycle.release_and_exit(stop, complete=progress.step >= progress.total)


if __name__ == "__main__":
    lifecycle.run(main)
