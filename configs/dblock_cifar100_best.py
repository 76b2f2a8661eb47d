"""DiffusionBlocks from the start on CIFAR-100, as they classify best in our experiments.

COMMAND: python launch.py --config=configs/dblock_cifar100_best.py
TIME: not measured by us; the paper's 0.0181 s a step on one H100 makes it 2.9 hours.
ACCURACY: not measured by us at this size; docs/results.md has digits and a reduced CIFAR-10.
OTHER ARMS: on a reduced CIFAR-10 these settings have 55.5 %, short-long 62.7 %, and grown blocks 62.1 %
(grow_at=(0.5,), answer="joined").
"""

from configs import dblock_cifar100, dblock_digits


def get_config():
    config = dblock_cifar100.get_config()
    dblock_digits.classify(config)
    config.open_gates = True  # a block has few steps: none are spent on opening its gates
    return config
