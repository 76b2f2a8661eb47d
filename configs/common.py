"""Every field of every config, with its default: the released program on CIFAR-100. Other configs state differences."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # What to train on what.
    config.model_type = "dblock"  # "dblock": blocks trained one at a time; "vit": the plain model, end to end
    config.dataset = "cifar100"  # digits, cifar10, cifar100, tiny_imagenet, folder
    config.data_dir = "~/tensorflow_datasets"  # where data sets are kept; for "folder" the root of your images
    config.val_fraction = 0.0  # part of the training images set apart to choose the best checkpoint by; at most 0.5

    # The transformer.
    config.image_size = 32  # of a side, in pixels
    config.patch_size = 4  # of a side, in pixels; must divide image_size
    config.num_layers = 12  # of all blocks together
    config.hidden_size = 128  # width of a token
    config.num_heads = 4  # of attention; must divide hidden_size
    config.intermediate_size = 3072  # width of the MLP (the released program has 24 * hidden_size)
    config.dropout = 0.1  # on hidden states and on attention probabilities
    config.pool = "cls"  # "cls": the first token; "mean": the mean of the patch tokens

    config.open_gates = False  # a block's layers begin as the identity (released code); True: as plain layers do

    # The diffusion.
    config.num_blocks = 3  # must divide num_layers; training takes this many times num_epochs
    config.gamma = 0.05  # overlap of neighbouring blocks' noise ranges, as a share of each, in ln sigma; at most 0.5
    config.sigma_min = 0.002  # least noise
    config.sigma_max = 80.0  # most noise, where the sampler starts
    config.sigma_data = 0.5  # standard deviation of the targets, as preconditioning takes it
    config.p_mean = -1.2  # of ln sigma in training
    config.p_std = 1.2  # of ln sigma in training
    config.weighting = "batch_mean"  # "batch_mean": released code; "per_sample": the paper's Eq. 6; "none"

    # The sampler.
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

    # Optimisation.
    config.num_epochs = 500  # passes over the data; for DiffusionBlocks as many for each block
    config.max_steps = 0  # stop after so many updates, if num_epochs does not before; 0 is no limit
    config.batch_size = 128  # images a step, over all devices
    config.accumulate_grad_batches = 1  # batches for each update
    config.gradient_checkpointing = False  # keep only each layer's input for the backward pass
    config.lr = 1e-3  # of AdamW, at its highest
    config.weight_decay = 0.01  # of AdamW, on every parameter
    config.clip_norm = 1.0  # global norm of the gradients of what a step trains
    config.scheduler_type = "constant_with_warmup"  # or linear, cosine, cosine_with_min_lr
    config.scheduler_specific_kwargs = "{}"  # JSON, such as {"min_lr": 5e-5}
    config.num_warmup_steps = 0  # in which the learning rate rises from 0

    # Which block when, and where the others wait.
    config.block_schedule = "random"  # "random": drawn for each step (paper); "chunked": in turns; "sequential"
    config.chunk_steps = 100  # steps of a turn, if "chunked"
    config.idle_blocks = "device"  # where blocks not being trained wait: "device", or "host"; side by side none waits
    config.sharing = "shared"  # embeddings and head: "shared" by all blocks (released code), or "isolated": one a block
    config.train_blocks = ()  # if "isolated": train these blocks here, the others elsewhere; () is all of them
    config.block_parallel = False  # train all blocks at once, each on its own share of the devices

    # Arithmetic and speed.
    config.dtype = "float32"  # of the transformer's arithmetic: or "bfloat16"; parameters and loss stay float32
    config.matmul_precision = "default"  # of float32 products: "default" (TF32 on GPUs), "high" or "highest"
    config.prng_impl = "threefry2x32"  # or "rbg": faster on some devices, other random numbers
    config.steps_per_call = 50  # at most so many steps in one call of the device, where the data live on it

    # The run.
    config.seed = 42  # of parameters, batches, noise, dropout and the validation split
    config.eval_batch_size = 500  # images at a time when scoring
    config.save_every_n_epochs = 10  # evaluate and save a checkpoint
    config.max_bad_steps = 20  # stop after so many steps of a block in a row whose loss or gradient is not finite
    config.save_top_k = 1  # best checkpoints kept besides the latest (needs a validation split); 0: the last is scored
    config.log_every_n_steps = 50  # steps that a line of the log is a mean of
    config.wandb = False  # log to Weights & Biases too; WANDB_MODE=offline keeps it here
    config.postfix = ""  # appended to the name of the run's folder
    return config
