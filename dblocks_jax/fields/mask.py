"""Masked diffusion of text, or of pixels: every field of its own, with its default."""

from ml_collections import ConfigDict

from dblocks_jax.fields import common


def get_config() -> ConfigDict:
    config = common.get_config()

    # What to train on what.
    config.task = "mask"  # symbols that are hidden to symbols, by a bidirectional transformer
    config.dataset = "sotu"  # sotu, text8, text_file; or images as symbols: digits, cifar10, cifar100, folder
    config.data_dir = ""  # folder of text8; file or folder of your text; for images where data sets are kept
    config.val_fraction = 0.0  # above 0 a part of the text is set apart to choose the best checkpoint by; at most 0.5
    config.text_length = 256  # symbols that the model sees at a time
    config.vocabulary = "letters"  # a-z and space; or "characters", those of the text; or "bpe", pieces of words
    config.vocab_size = 4096  # of "bpe"
    config.image_size = 32  # of a side, in pixels, where the data are images

    # The corruption.
    config.gamma = 0.05  # overlap of neighbouring blocks' shares of what is hidden, as a share of each; at most 0.5

    # Sampler and scores.
    config.num_inference_steps = 128  # in which what is hidden is uncovered
    config.temperature = 1.0  # of the logits that symbols are drawn from
    config.bound_draws = 8  # times that each held-out sequence is looked at, with other symbols hidden
    config.score_samples = 100  # texts that are made to be scored when training ends
    return config
