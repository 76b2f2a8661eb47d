"""DiffusionBlocks from the start on CIFAR-10, as they classify best in our experiments.

COMMAND: python launch.py --config=configs/dblock_cifar10_best.py
TIME: not measured by us; the paper's 0.0181 s a step on one H100 makes it 2.9 hours.
ACCURACY: not measured by us at this size; docs/results.md has a reduced model.
OTHER ARMS: on a reduced CIFAR-10 these settings have 55.5 %, short-long 62.7 %, and grown blocks 62.1 %
(grow_at=(0.5,), answer="joined").
"""

from configs import dblock_cifar100_best


def get_config():
    config = dblock_cifar100_best.get_config()
    config.dataset = "cifar10"
    return config
