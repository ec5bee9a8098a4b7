"""Fine-tune the whole UNet of Stable Diffusion 1.x or 2.x on captioned images, in JAX: on GPUs, TPUs or a CPU.

Minimises || target - unet(z_t, t, c) ||^2 over latents z_t noised to step t and text states c; the target is the noise
or the velocity, as the model was trained (arXiv:2112.10752, arXiv:2202.00512). VAE and text encoder stay frozen.

    python train_text_to_image_flax.py \\
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir=my_images --output_dir=my_model --resolution=512 --random_flip --train_batch_size=4 \\
        --use_ema --gradient_checkpointing --mixed_precision=bf16 --learning_rate=1e-5 --max_train_steps=15000

Each device of the machine takes --train_batch_size samples at a time. --resume_from_checkpoint=latest continues.
"""

from functools import partial

from t2i_training.cli import checks, flags
from t2i_training.cli.parser import make_parser
from t2i_training.sd_flax import flags as flax_flags
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
    flags.add_optimizer_args(parser, eight_bit=False, scale_lr=True)
    flags.add_loss_args(parser, noise=True)
    flags.add_ema_args(parser, placement=False)
    flags.add_encoding_args(parser, crops=True)
    flags.add_checkpoint_args(parser)
    flags.add_single_file_args(parser)
    flags.add_validation_args(parser)
    flags.add_reporting_args(parser)
    flax_flags.add_flax_args(parser)
    args = checks.parse(parser, argv, model_kind.STABLE_DIFFUSION_IN_JAX)
    flax_flags.need_packages(parser)
    return args


if __name__ == "__main__":
    parse_args()  # report usage errors, and --help, before the slow imports below

import copy
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import torch  # for loader, tokenizer and sampler
from diffusers import DDPMScheduler
from PIL import Image

from t2i_training import distributed, stopping
from t2i_training.data import buckets, captions, draws, images, inspection, loading
from t2i_training.data.dataset import SHAPE, image_source, open_dataset
from t2i_training.encodings import cache
from t2i_training.errors import RunError
from t2i_training.library_errors import readable_errors
from t2i_training.model import losses, optim, single_file
from t2i_training.report import hub, validation
from t2i_training.report.progress import Progress
from t2i_training.run import checkpoint, lifecycle, output_folder
from t2i_training.run.export import export_atomically
from t2i_training.sd_flax import devices as flax_devices
from t2i_training.sd_flax import networks as flax_networks
from t2i_training.sd_flax import pipeline as flax_pipeline
from t2i_training.sd_flax import train_state


def load_models(args, precision):
    """Load the base pipeline (fp32, in host memory), with the UNet to train in it, and the training scheduler."""
    with readable_errors("--pretrained_model_name_or_path", args.pretrained_model_name_or_path):
        pipeline = flax_pipeline.load(args, flax_devices.compute_dtype(precision))
    if args.prediction_type is not None:
        # Also for sampling: a network sampled with another prediction type than it was trained on gives noise.
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    noise_scheduler = train_state.NoiseScheduler(DDPMScheduler.from_config(pipeline.scheduler.config))
    if args.dream_training and noise_scheduler.config.prediction_type != "epsilon":
        raise RunError(
            "--dream_training needs a model that predicts epsilon, and this one does not: leave the flag out"
        )
    return pipeline, noise_scheduler


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


def encode_images(batch, vae):
    """Mean and standard deviation of the latents' posteriors."""
    pixels = jnp.moveaxis(batch["pixels"], 1, -1) / 127.5 - 1  # the networks are channels-last, all else channels-first
    mean, std = (jnp.moveaxis(moment * vae.config["scaling_factor"], -1, 1) for moment in vae.encode(pixels))
    return {"latents_mean": mean, "latents_std": std}  # (B, C, H/f, W/f)


def encode_captions(batch, text_encoder):
    """The text encoder's states, one per token."""
    return {"text_states": flax_pipeline.encode_text(text_encoder, batch["input_ids"])}  # (B, tokens, D)


def encode(batch, vae=None, text_encoder=None):
    """Run the frozen networks on what of a batch the cache has not encoded."""
    of_images = encode_images(batch, vae) if "pixels" in batch else {}
    return of_images | (encode_captions(batch, text_encoder) if "input_ids" in batch else {})


def compute_loss(unet, batch, noise_scheduler, args):
    """The training loss, a scalar in fp32. A pure function of weights and batch."""

    def predict(noisy_latents):
        return jnp.moveaxis(unet(jnp.moveaxis(noisy_latents, 1, -1), timesteps, text_states), -1, 1)

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
        prediction = jax.lax.stop_gradient(predict(noisy_latents))
        noisy_latents, target = losses.dream(
            noise_scheduler, noisy_latents, target, noise, prediction, timesteps, args.dream_detail_preservation
        )
    return losses.denoising_loss(predict(noisy_latents), target, timesteps, noise_scheduler, args.snr_gamma)


def make_dataloader(args, dataset, image_infos, shapes, pipeline, noise_scheduler, progress, mesh):
    """The loader of the run's remaining batches. With --cache_encodings it encodes the data set first."""
    chunks = args.max_token_length // 75
    tokenizer = captions.report_cuts(pipeline.tokenizer, dataset, args, progress.accelerator, chunks)
    readers = [
        partial(read_image, interpolation=args.image_interpolation_mode),
        partial(read_caption, tokenizer=tokenizer, chunks=chunks),
    ]
    if args.cache_encodings:
        vae, text_encoder = flax_devices.on_host(flax_pipeline.frozen(pipeline, args.clip_skip))
        encoders = [partial(encode_images, vae=vae), partial(encode_captions, text_encoder=text_encoder)]
        encoders = [partial(flax_devices.encode_on_host, encode=each) for each in encoders]
        readers = cache.precompute(
            args, progress.accelerator, dataset, image_infos, shapes, readers, encoders,
            devices=mesh.shape["devices"], precision=progress.precision,
            crops=0 if args.center_crop else args.cache_crops, flips=args.random_flip,
        )  # fmt: skip
    sample = partial(
        make_sample, args=args, load_image=readers[0], load_caption=readers[1],
        latent_channels=pipeline.vae.config["latent_channels"], scale_factor=pipeline.vae_scale_factor,
        num_timesteps=noise_scheduler.config.num_train_timesteps,
    )  # fmt: skip
    return loading.make_loader(
        dataset, shapes, sample, args, progress.accelerator, progress.seed, start=progress.samples_seen,
        updates=progress.total - progress.step, devices=mesh.shape["devices"],
    )  # fmt: skip


def make_train_step(args, pipeline, trained, noise_scheduler, mesh):
    """(train_step, frozen): the update as a pure function, and the frozen weights that it reads."""
    optimizer, frozen, merge = train_state.make_optimizer(args), {}, {}
    needed = {"vae": not args.cache_encodings, "text_encoder": not args.cache_encodings or captions.vary(args)}
    for name, network in zip(needed, flax_pipeline.frozen(pipeline, args.clip_skip), strict=True):
        if needed[name]:
            weights, merge[name] = flax_networks.split(network)
            frozen[name] = flax_devices.place(weights, mesh)

    def train_step(state, batch, frozen, rate, ema_share):
        def loss_of(parameters, batch):
            batch = batch | encode(batch, **{name: merge[name](weights) for name, weights in frozen.items()})
            return compute_loss(trained.merge(parameters), batch, noise_scheduler, args)

        loss, gradient, grad_norm = train_state.gradient_of(loss_of, state, batch, args.max_grad_norm)
        return train_state.update(state, gradient, grad_norm, optimizer, rate, ema_share), loss, grad_norm

    return train_step, frozen


def generate_image(index, pipeline, unet, vae, text_encoder, args, size, seed):
    """Generate the validation image of prompt `index` as StableDiffusionPipeline does, always from the same noise."""
    generator = torch.Generator().manual_seed(seed + index)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(validation.STEPS)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    prompts = ("", args.validation_prompts[index])
    read = partial(read_caption, tokenizer=pipeline.tokenizer, chunks=args.max_token_length // 75)
    input_ids = torch.stack([read(prompt)["input_ids"] for prompt in prompts])
    text_states = flax_pipeline.encode_text(text_encoder, input_ids.numpy())
    latent_shape = (pipeline.vae.config["latent_channels"], *(side // pipeline.vae_scale_factor for side in size))
    latents = torch.randn((1, *latent_shape), generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy_latents = scheduler.scale_model_input(latents, timestep).numpy()
        prediction = flax_pipeline.predict_guided(unet, noisy_latents, timestep.numpy(), text_states, 7.5)
        latents = scheduler.step(flax_devices.to_torch(prediction), timestep, latents, **options).prev_sample
    pixels = np.asarray(flax_pipeline.decode_latents(vae, latents.numpy()))
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def export(pipeline, trained, args, folder):
    """Write the pipeline into `folder`, with its frozen parts as loaded, and with --save_single_file one file of it."""
    flax_pipeline.save(pipeline, trained.export(), folder, args.variant)
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
    accelerator, mesh, precision = flax_devices.start(args)
    stop = stopping.StopRequest()
    folder, position = checkpoint.find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)
    seed = lifecycle.resolve_seed(args, position)

    with distributed.main_first(accelerator):
        model_kind.check_hub(args, model_kind.STABLE_DIFFUSION_IN_JAX)
        dataset = open_dataset(args, seed)
    dataset, image_infos = inspection.inspect(args, accelerator, dataset, args.caption_column)
    repo_id = hub.create_repository(args, accelerator)
    pipeline, noise_scheduler = load_models(args, precision)
    progress = Progress(
        args, accelerator, dataset, image_infos, position, seed, *flax_devices.describe(mesh), precision
    )
    shapes, size = buckets.choose(args, image_infos, progress.effective_batch)
    loader = make_dataloader(args, dataset, image_infos, shapes, pipeline, noise_scheduler, progress, mesh)

    rate = optim.make_rate(args, progress.total, progress.effective_batch if args.scale_lr else 1)
    trained = train_state.TrainState(args, precision, pipeline.unet, mesh)
    pipeline.unet = None  # `trained` has it now
    checkpoints = checkpoint.CheckpointManager(
        accelerator, stop, None, args.output_dir, args.checkpoints_total_limit, trained.save, trained.load
    )
    checkpoints.restore(folder)
    train_step, frozen = make_train_step(args, pipeline, trained, noise_scheduler, mesh)
    trained.begin(train_step)
    output_folder.take_over(progress.config, accelerator, progress.step)
    stats = flax_devices.DeviceStats(args, precision, mesh, trained.sample_flops)
    progress.open(None, None, rate, project=args.tracker_project_name, stats=stats, size=trained.nbytes())
    stream = progress.timed(loading.batches(loader, accelerator, stop))

    def validate():
        vae, text_encoder = jax.device_put(flax_pipeline.frozen(pipeline, args.clip_skip), jax.local_devices()[0])
        parts = {"unet": trained.export(flax_devices.local), "vae": vae, "text_encoder": text_encoder}
        generate = partial(generate_image, pipeline=pipeline, **parts, args=args, size=size, seed=seed)
        validation.validate(generate, args.validation_prompts, progress.step, args.output_dir, accelerator, stop)
        progress.restart_clock()

    if validation.pending(args, progress):  # before the first update: the untouched model, first row of every grid
        validate()
    with stop.after_step(), checkpoints, progress.loop():
        while progress.step < progress.total and not stop.agreed:
            micro_batches = [next(stream) for _ in range(args.gradient_accumulation_steps)]
            loss, grad_norm = trained.step(flax_devices.place_batch(micro_batches, mesh), frozen, rate(progress.step))
            progress.add_micro_batch(loss, {"index": torch.cat([batch["index"] for batch in micro_batches])})
            progress.count_update(grad_norm, rate(progress.step))
            stop.agree(accelerator)
            if progress.step % args.checkpointing_steps == 0 or stop.agreed:
                progress.save(checkpoints, versions=train_state.VERSIONS)
            if progress.validation_due() and not stop.agreed:
                validate()
                if stop.agree(accelerator):  # a signal may have come during the validation
                    progress.save(checkpoints, versions=train_state.VERSIONS)

    if progress.step >= progress.total:
        exported = export_atomically(args.output_dir, partial(export, pipeline, trained, args), accelerator)
        if args.validation_prompts:
            validate()  # after the export, so that the weights are safe if it fails
    progress.close()
    flax_devices.leave_hosts()
    if progress.step >= progress.total:
        hub.publish_card_and_upload(args, accelerator, repo_id, exported, progress, CARD)
    lifecycle.release_and_exit(stop, complete=progress.step >= progress.total)


if __name__ == "__main__":
    lifecycle.run(main)
