"""DiffusionBlocks on CIFAR-100, the released program's recipe with heavy augmentation.

COMMAND: python launch.py --config=configs/dblock_cifar100_randaug.py
TIME: not measured by us; the paper's 0.0181 s a step on one H100 makes it 5.9 hours.
ACCURACY: none is published for exactly this recipe; the paper's Table 1 has 59.30 % after 500 epochs.
"""

from configs import vit_cifar100_randaug


def get_config():
    config = vit_cifar100_randaug.get_config()
    config.model_type = "dblock"
    config.num_warmup_steps = 3900 * 3  # times num_blocks, as num_epochs is
    return config
