"""Classification of images: every field of its own, with its default: the released program on CIFAR-100."""

from ml_collections import ConfigDict

from dblocks_jax.fields import common


def get_config() -> ConfigDict:
    config = common.get_config()

    # What to train on what.
    config.task = "classify"  # images to labels
    config.model_type = "dblock"  # "dblock": blocks trained one at a time; "vit": the plain model, end to end
    config.dataset = "cifar100"  # digits, cifar10, cifar100, tiny_imagenet, folder
    config.data_dir = "~/tensorflow_datasets"  # where data sets are kept; for "folder" the root of your images
    config.val_fraction = 0.0  # part of the training images set apart to choose the best checkpoint by; at most 0.5

    # Images.
    config.image_size = 32  # of a side, in pixels
    config.patch_size = 4  # of a side, in pixels; must divide image_size
    config.dropout = 0.1  # on hidden states and on attention probabilities
    config.pool = "cls"  # "cls": the first token; "mean": the mean of the patch tokens
    config.open_gates = False  # a block's layers begin as the identity (released code); True: as plain layers do

    # The diffusion.
    config.gamma = 0.05  # overlap of neighbouring blocks' noise ranges, as a share of each, in ln sigma; at most 0.5
    config.sigma_min = 0.002  # least noise
    config.sigma_max = 80.0  # most noise, where the sampler starts
    config.sigma_data = 0.5  # standard deviation of the targets, as preconditioning takes it
    config.p_mean = -1.2  # of ln sigma in training
    config.p_std = 1.2  # of ln sigma in training
    config.weighting = "batch_mean"  # "batch_mean": released code; "per_sample": the paper's Eq. 6; "none"

    # The answer.
    config.answer = "sampler"  # "sampler": the paper's; "joined": each block alone at z = 0, mean of log-probabilities
    config.num_inference_steps = 0  # denoising steps; 0 means num_blocks
    config.sampler_spacing = "cdf"  # "cdf": evenly in probability; "karras": rho = 7
    config.label_table = "raw"  # embeddings that make the estimate: "raw" (released code) or "normalized" (paper)
    config.init_noise_scale = 1.0  # 1: start from noise, as in the paper; 0: start from its mean, deterministic
    config.cfg_scale = 0.0  # classifier-free guidance; 0 is off
    config.class_dropout_prob = 0.1  # in training for guidance: share of images replaced by zeros, if cfg_scale > 0

    # Augmentation, on the device.
    config.crop_padding = 4  # zero padding before the random crop, in pixels
    config.flip = True  # horizontal
    config.resized_crop = False  # random resized crop instead of padding and crop
    config.add_rand_aug = False  # RandAugment: 2 operations of magnitude 9
    return config
