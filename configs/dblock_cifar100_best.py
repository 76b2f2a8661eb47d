"""DiffusionBlocks on CIFAR-100 with the settings that classify best in our experiments.

COMMAND: python launch.py --config=configs/dblock_cifar100_best.py
TIME: not measured by us; the paper's 0.0181 s a step on one H100 makes it 2.9 hours.
ACCURACY: not measured by us at this size; docs/results.md has digits and a reduced CIFAR-10.
"""

from configs import dblock_cifar100


def get_config():
    config = dblock_cifar100.get_config()
    config.pool = "mean"  # the answer is read from the image's tokens, not from the noisy label's
    config.open_gates = True  # a block has few steps: none are spent on opening its gates
    # Noise high enough that no block can read the label off z: each has to look at the image.
    config.p_mean = 1.0
    config.sigma_min = 0.3
    config.weighting = "none"
    # Choose the likeliest label instead of drawing one.
    config.label_table = "normalized"
    config.init_noise_scale = 0.0
    return config
