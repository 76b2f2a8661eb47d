"""Text by recurrent depth: every field of its own, with its default."""

from ml_collections import ConfigDict

from dblocks_jax.fields import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.update(num_layers=8, num_blocks=1, hidden_size=512, num_heads=8, intermediate_size=2048)

    # What to train on what.
    config.task = "recurrent"  # the tokens before to the next one, by a core of layers that is run again and again
    config.model_type = "dblock"  # "dblock": trained as a denoiser, in one pass; "huginn": through its last steps
    config.dataset = "sotu"  # sotu, text8, text_file
    config.data_dir = ""  # folder of text8; file or folder of your text
    config.val_fraction = 0.0  # of text_file: part set apart to choose the best checkpoint by; at most 0.5
    config.text_length = 256  # tokens that the model sees at a time
    config.vocabulary = "letters"  # a-z and space; or "characters", those of the text; or "bpe", pieces of words
    config.vocab_size = 4096  # of "bpe"

    # The network.
    config.prelude_layers = 2  # of num_layers, those that read the tokens, once
    config.coda_layers = 2  # of num_layers, those before the logits; the core has what is left

    # The diffusion.
    config.gamma = 0.0  # overlap with the noise ranges of neighbouring blocks, of which there are none
    config.sigma_min = 0.002  # least noise
    config.sigma_max = 5.0  # most noise, where the answer begins: tokens of unit norm are lost in it (paper: 80)
    config.sigma_data = 0.5  # standard deviation of the targets, as preconditioning takes it
    config.p_mean = -1.2  # of ln sigma in training
    config.p_std = 1.2  # of ln sigma in training
    config.weighting = "none"  # of the losses by w(sigma), which spans 1 : 45,000: or "per_sample" (Eq. 6)

    # The answer, and the writer.
    config.num_inference_steps = 32  # noise levels of a token, or steps of huginn's core
    config.sampler_spacing = "cdf"  # of the levels: "cdf": evenly in probability; "karras": rho = 7
    config.temperature = 1.0  # of the logits that tokens are drawn from; 0 takes the likeliest
    config.top_p = 1.0  # tokens are drawn from the likeliest, which are so probable together

    # Scores.
    config.score_samples = 100  # texts that are made to be scored when training ends
    return config
