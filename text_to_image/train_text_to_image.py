"""Fine-tune the whole UNet of Stable Diffusion 1.x or 2.x on captioned images.

Minimises || target - unet(z_t, t, c) ||^2 over latents z_t noised to step t and text states c; the target is the noise
or the velocity, as the model was trained (arXiv:2112.10752, arXiv:2202.00512). VAE and text encoder stay frozen.

    accelerate launch train_text_to_image.py \\
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir=my_images --resolution=512 --random_flip --mixed_precision=bf16 \\
        --train_batch_size=4 --gradient_checkpointing --use_ema \\
        --learning_rate=1e-5 --max_train_steps=15000 --output_dir=my_model

The same command with --resume_from_checkpoint=latest continues, bit for bit, where the run was interrupted.
"""

from functools import partial

from t2i_training.cli import checks, flags
from t2i_training.cli.parser import make_parser
from t2i_training.sources import model_kind


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flags.add_stable_diffusion_args(parser)
    flags.add_data_source_args(parser)  # read by open_dataset
    flags.add_data_args(parser)
    flags.add_caption_args(parser)
    flags.add_text_encoder_args(parser)
    flags.add_image_args(parser)
    flags.add_bucket_args(parser)
    flags.add_training_args(parser)
    flags.add_network_args(parser)
    flags.add_optimizer_args(parser, scale_lr=True)
    flags.add_loss_args(parser, noise=True)
    flags.add_ema_args(parser)
    flags.add_encoding_args(parser, crops=True)
    flags.add_checkpoint_args(parser)
    flags.add_single_file_args(parser)
    flags.add_validation_args(parser)
    flags.add_reporting_args(parser)
    return checks.parse(parser, argv, model_kind.STABLE_DIFFUSION)


if __name__ == "__main__":
    parse_args()  # report usage errors, and --help, before the slow imports below

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from t2i_training import distributed, stopping
from t2i_training.data import buckets, captions, draws, images, inspection, loading
from t2i_training.data.dataset import SHAPE, image_source, open_dataset
from t2i_training.encodings import cache
from t2i_training.errors import RunError
from t2i_training.model import base, ema, losses, networks, optim, single_file, spare_parts
from t2i_training.report import hub, validation
from t2i_training.report.progress import Progress
from t2i_training.run import checkpoint, lifecycle, output_folder
from t2i_training.run.export import export_atomically


def load_models(args, accelerator):
    """Load the base pipeline (fp32, on the CPU), the UNet to train (fp32) and the training scheduler."""
    pipeline = base.load_pipeline(args, exported=True)
    unet = pipeline.unet if args.non_ema_revision is None else base.load_non_ema_unet(args)
    if args.prediction_type is not None:
        # Also for sampling: a network sampled with another prediction type than it was trained on gives noise.
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)  # once, not in every step
    if args.dream_training and noise_scheduler.config.prediction_type != "epsilon":
        raise RunError(
            "--dream_training needs a model that predicts epsilon, and this one does not: leave the flag out"
        )
    if args.enable_xformers_memory_efficient_attention:
        networks.use_xformers(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return pipeline, networks.prepare_trained(unet.train(), args, accelerator), noise_scheduler


def read_image(source, shape, crop_draw, mirror, interpolation):
    """Preprocess an image file for the VAE: the part to train on, in the `shape` (H, W) of its bucket."""
    image = images.decode(source, shape)
    return {"pixels": images.fill(image, shape, interpolation, crop_draw, mirror)}  # (3, H, W) uint8


def read_caption(caption, tokenizer, chunks):
    """Preprocess a caption for the text encoder."""
    return {"input_ids": captions.tokenize_in_chunks(tokenizer, caption, chunks)}  # (chunks, tokens)


def make_sample(row, draw, args, load_image, load_caption, latent_channels, scale_factor, num_timesteps):
    """Make the sample of one visit to a row, in a loader worker. Everything random about it is drawn here."""
    crop_draw = None if args.center_crop else draw("crop")
    mirror = args.random_flip and draw("flip").random() < 0.5
    height, width = row[SHAPE]
    latent_shape = (latent_channels, height // scale_factor, width // scale_factor)
    sample = {
        **load_image(image_source(row, args), row[SHAPE], crop_draw, mirror),
        **load_caption(captions.pick_caption(row[args.caption_column], draw, args)),
        "posterior_noise": draws.normal(draw("posterior"), latent_shape),  # (C, H/f, W/f)
        "noise": draws.normal(draw("noise"), latent_shape),
        "timesteps": torch.tensor(draw("timestep").integers(num_timesteps)),
    }
    if args.noise_offset:
        sample["noise_offset"] = draws.normal(draw("noise_offset"), (latent_channels, 1, 1))
    if args.input_perturbation:
        sample["input_perturbation"] = draws.normal(draw("input_perturbation"), latent_shape)
    return sample


def freeze(args, pipeline, accelerator):
    """The frozen networks for `encode`: VAE and text encoder."""
    modules = (pipeline.vae, networks.skip_layers(pipeline.text_encoder, args.clip_skip))
    return [networks.prepare_frozen(module, accelerator) for module in modules]


def encode_images(batch, vae):
    """Mean and standard deviation of the latents' posteriors, in the dtype of the VAE."""
    posterior = vae.encode(images.normalize(batch["pixels"], vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return {"latents_mean": posterior.mean * scale, "latents_std": posterior.std * scale}  # (B, C, H/f, W/f)


def encode_captions(batch, text_encoder):
    """The text encoder's states, one per token."""
    return {"text_states": networks.encode_text(text_encoder, batch["input_ids"])}  # (B, tokens, D)


@torch.no_grad()
def encode(batch, vae, text_encoder):
    """Run the frozen networks on what of a batch the cache has not encoded."""
    of_images = encode_images(batch, vae) if "pixels" in batch else {}
    return of_images | (encode_captions(batch, text_encoder) if "input_ids" in batch else {})


def compute_loss(unet, batch, noise_scheduler, args):
    """The training loss, a scalar in fp32. A pure function of weights and batch."""
    latents = batch["latents_mean"] + batch["latents_std"] * batch["posterior_noise"]
    noise, timesteps, text_states = batch["noise"], batch["timesteps"], batch["text_states"]
    if args.noise_offset:  # "Diffusion with Offset Noise", N. Guttenberg 2023: very dark and very bright images
        noise = noise + args.noise_offset * batch["noise_offset"]
    input_noise = noise
    if args.input_perturbation:  # arXiv:2301.11706: more noise on the input than in the target
        input_noise = noise + args.input_perturbation * batch["input_perturbation"]
    noisy_latents = noise_scheduler.add_noise(latents, input_noise, timesteps)
    target = losses.prediction_target(noise_scheduler, latents, noise, timesteps)
    if args.dream_training:
        with torch.no_grad():
            prediction = unet(noisy_latents, timesteps, text_states, return_dict=False)[0]
        noisy_latents, target = losses.dream(
            noise_scheduler, noisy_latents, target, noise, prediction, timesteps, args.dream_detail_preservation
        )
    prediction = unet(noisy_latents, timesteps, text_states, return_dict=False)[0]
    return losses.denoising_loss(prediction, target, timesteps, noise_scheduler, args.snr_gamma)


def make_dataloader(args, dataset, image_infos, shapes, pipeline, frozen, noise_scheduler, progress):
    """The loader of the run's remaining batches. With --cache_encodings it encodes the data set first."""
    chunks = args.max_token_length // 75
    tokenizer = captions.report_cuts(pipeline.tokenizer, dataset, args, progress.accelerator, chunks)
    readers = [
        partial(read_image, interpolation=args.image_interpolation_mode),
        partial(read_caption, tokenizer=tokenizer, chunks=chunks),
    ]
    if args.cache_encodings:
        vae, text_encoder = frozen
        encoders = [partial(encode_images, vae=vae), partial(encode_captions, text_encoder=text_encoder)]
        readers = cache.precompute(
            args, progress.accelerator, dataset, image_infos, shapes, readers, encoders,
            crops=0 if args.center_crop else args.cache_crops, flips=args.random_flip,
        )  # fmt: skip
    sample = partial(
        make_sample, args=args, load_image=readers[0], load_caption=readers[1],
        latent_channels=pipeline.vae.config.latent_channels, scale_factor=pipeline.vae_scale_factor,
        num_timesteps=noise_scheduler.config.num_train_timesteps,
    )  # fmt: skip
    return loading.make_loader(
        dataset, shapes, sample, args, progress.accelerator, progress.seed, start=progress.samples_seen,
        updates=progress.total - progress.step,
    )  # fmt: skip


def build_validation_pipeline(args, pipeline, unet, vae, text_encoder):
    """The pipeline for validation, made of the modules in memory. Loads and copies nothing."""
    modules = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    val_pipeline = StableDiffusionPipeline(**pipeline.components | modules, requires_safety_checker=False)
    val_pipeline.set_progress_bar_config(disable=True)
    return val_pipeline


def generate_image(index, pipeline, args, size, seed, accelerator):
    """Generate the validation image of prompt `index`, with the same noise at every validation."""
    generator = torch.Generator().manual_seed(seed + index)
    read = partial(read_caption, tokenizer=pipeline.tokenizer, chunks=args.max_token_length // 75)
    input_ids = torch.stack([read(prompt)["input_ids"] for prompt in (args.validation_prompts[index], "")])
    with torch.no_grad(), accelerator.autocast():
        text_states = networks.encode_text(pipeline.text_encoder, input_ids.to(pipeline.text_encoder.device))
        prompted, without = text_states.split(1)
        return pipeline(
            prompt_embeds=prompted, negative_prompt_embeds=without, height=size[0], width=size[1],
            num_inference_steps=validation.STEPS, generator=generator,
        ).images[0]  # fmt: skip


def export(pipeline, unet, args, folder):
    """Write the pipeline into `folder`, with its frozen parts as loaded, and with --save_single_file one file of it."""
    pipeline.register_modules(unet=unet)
    spare_parts.save(pipeline, args, folder)
    if args.save_single_file:
        single_file.write(folder, args)


CARD = {
    "title": "Stable Diffusion fine-tuning",
    "base_model": "pretrained_model_name_or_path",  # name of the flag
    "tags": ["stable-diffusion", "stable-diffusion-diffusers"],
    "usage": """
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
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
        model_kind.check_hub(args, model_kind.STABLE_DIFFUSION)
        dataset = open_dataset(args, seed)
    dataset, image_infos = inspection.inspect(args, accelerator, dataset, args.caption_column)
    repo_id = hub.create_repository(args, accelerator)
    pipeline, unet, noise_scheduler = load_models(args, accelerator)
    frozen = freeze(args, pipeline, accelerator)
    progress = Progress(args, accelerator, dataset, image_infos, position, seed)
    shapes, size = buckets.choose(args, image_infos, progress.effective_batch)
    loader = make_dataloader(args, dataset, image_infos, shapes, pipeline, frozen, noise_scheduler, progress)
    unet = unet.to(accelerator.device)
    average = ema.make_ema(unet, pipeline.unet, args.offload_ema, args.foreach_ema) if args.use_ema else None

    optimizer = optim.make_optimizer(args, optim.trainable_parameters(unet))
    rate = optim.make_rate(args, progress.total, progress.effective_batch if args.scale_lr else 1)
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
            exported = export_atomically(args.output_dir, partial(export, pipeline, network, args), accelerator)
        if args.validation_prompts:
            validate()  # after the export, so that the weights are safe if it fails
    progress.close()
    if progress.step >= progress.total:
        hub.publish_card_and_upload(args, accelerator, repo_id, exported, progress, CARD)
    lifecycle.release_and_exit(stop, complete=progress.step >= progress.total)


if __name__ == "__main__":
    lifecycle.run(main)
