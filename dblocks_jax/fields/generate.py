"""Generation of images: every field of its own, with its default."""

from ml_collections import ConfigDict

from dblocks_jax.fields import common


def get_config() -> ConfigDict:
    config = common.get_config()

    # What to train on what.
    config.task = "generate"  # labels to images, by a diffusion transformer (DiT)
    config.dataset = "cifar10"  # digits, cifar10, cifar100, tiny_imagenet, folder, latents
    config.data_dir = "~/tensorflow_datasets"  # where data sets are kept; for "folder" and "latents" the root of yours
    config.val_fraction = 0.0  # part of the training images set apart to choose the best checkpoint by; at most 0.5
    config.latent_scale = 0.18215  # what latents are multiplied by; that of the usual VAE of Stable Diffusion

    # Images.
    config.image_size = 32  # of a side, in pixels or latents
    config.patch_size = 2  # of a side, in pixels or latents; must divide image_size
    config.crop_padding = 0  # zero padding before the random crop, in pixels
    config.flip = True  # horizontal

    # The diffusion.
    config.gamma = 0.05  # overlap of neighbouring blocks' noise ranges, as a share of each, in ln sigma; at most 0.5
    config.partition = "mass"  # of the noise among the blocks: "mass", equal probability; "log", equal in ln sigma
    config.sigma_min = 0.002  # least noise
    config.sigma_max = 80.0  # most noise, where the sampler starts
    config.sigma_data = 0.5  # standard deviation of the images, as preconditioning takes it
    config.p_mean = -1.2  # of ln sigma in training
    config.p_std = 1.2  # of ln sigma in training
    config.class_dropout_prob = 0.1  # in training for guidance: share of images whose class is withheld

    # The sampler.
    config.num_inference_steps = 50  # noise levels that it visits; the last step goes to no noise
    config.sampler_spacing = "cdf"  # of the levels: "cdf": evenly in probability; "karras": rho = 7
    config.solver = "euler"  # or "heun": two network calls a level, of second order
    config.cfg_scale = 2.0  # classifier-free guidance; 1 is none

    # Scores of samples.
    config.score_samples = 1000  # images that are made to be scored
    config.judge = ""  # run of a classifier whose features and answers score them; "" is one of ours for the data set
    return config
