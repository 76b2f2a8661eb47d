"""Every field that all tasks have, with its default. Those of a task stand beside it."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # The transformer.
    config.num_layers = 12  # of all blocks together
    config.hidden_size = 128  # width of a token
    config.num_heads = 4  # of attention; must divide hidden_size
    config.intermediate_size = 3072  # width of the MLP (the released program has 24 * hidden_size)
    config.num_blocks = 3  # must divide num_layers; training takes this many times num_epochs

    # Optimisation.
    config.num_epochs = 500  # passes over the data; for DiffusionBlocks as many for each block
    config.max_steps = 0  # stop after so many updates, if num_epochs does not before; 0 is no limit
    config.batch_size = 128  # examples a step, over all devices
    config.accumulate_grad_batches = 1  # batches for each update
    config.gradient_checkpointing = False  # keep only each layer's input for the backward pass
    config.lr = 1e-3  # of AdamW, at its highest
    config.weight_decay = 0.01  # of AdamW, on every parameter
    config.clip_norm = 1.0  # global norm of the gradients of what a step trains
    config.ema_decay = 0.0  # above 0 averages of the parameters are kept, and answer; an idle block's rest too
    config.scheduler_type = "constant_with_warmup"  # or linear, cosine, cosine_with_min_lr
    config.scheduler_specific_kwargs = "{}"  # JSON, such as {"min_lr": 5e-5}
    config.num_warmup_steps = 0  # in which the learning rate rises from 0

    # Which block when, and where the others wait.
    config.block_schedule = "random"  # "random": drawn for each step (paper); "chunked": in turns; "sequential"
    config.chunk_steps = 100  # steps of a turn, if "chunked"
    config.idle_blocks = "device"  # where blocks not being trained wait: "device", "host" or "disk"; side by side none
    config.sharing = "shared"  # embeddings and head: "shared" by all blocks (released code), or "isolated": one a block
    config.train_blocks = ()  # if "isolated": train these blocks here, the others elsewhere; () is all of them
    config.block_parallel = False  # train all blocks at once, each on its own share of the devices
    config.shard_parameters = False  # parameters and moments: a part on each device, instead of all on every one

    # Growing.
    config.grow_at = ()  # shares of the steps at which blocks are divided, such as (0.5,): one block first, then all
    config.begin_from = ""  # folder of a run with one block's depth: all blocks begin as copies of it

    # Arithmetic and speed.
    config.dtype = "float32"  # of the transformer's arithmetic: or "bfloat16"; parameters and loss stay float32
    config.matmul_precision = "default"  # of float32 products: "default" (TF32 on GPUs), "high" or "highest"
    config.prng_impl = "threefry2x32"  # or "rbg": faster on some devices, other random numbers
    config.steps_per_call = 50  # at most so many steps in one call of the device, where the data live on it

    # The run.
    config.seed = 42  # of parameters, batches, noise, dropout and the validation split
    config.eval_batch_size = 500  # examples at a time when scoring
    config.save_every_n_epochs = 10  # evaluate and save a checkpoint
    config.max_bad_steps = 20  # stop after so many steps of a block in a row whose loss or gradient is not finite
    config.save_top_k = 1  # best checkpoints kept besides the latest (needs a validation split); 0: the last is scored
    config.log_every_n_steps = 50  # steps that a line of the log is a mean of
    config.wandb = False  # log to Weights & Biases too; WANDB_MODE=offline keeps it here
    config.postfix = ""  # appended to the name of the run's folder
    return config
