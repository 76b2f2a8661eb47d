"""What a training step minimises: cross-entropy for the plain model, the denoising loss for one block."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from dblocks_jax.denoiser import Table, denoise, denoise_step
from dblocks_jax.diffusion.loss import Weighting, cross_entropy, weighted_loss
from dblocks_jax.diffusion.noise import Scalar, SigmaRange, sample_sigma
from dblocks_jax.diffusion.precondition import bounded_weight, loss_weight
from dblocks_jax.models.dblock_vit import Block, Image, Shared, hand_on
from dblocks_jax.optimizer import Params

Mixing = Literal["none", "mixup", "cutmix"]
Metrics = dict[str, Float[Array, ""]]
WORST_SIGMA = "worst_sigma"  # metric: the noise level of the sample with the largest cross-entropy, or one not finite


def plain_loss(
    params: tuple[Params],
    images: Array,
    labels: Array,
    key: Key[Array, ""] | None,
    *_,
    graphdef: nnx.GraphDef,
    smoothing: float = 0.0,
    mixing: Mixing = "none",
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of the plain model."""
    assert mixing == "none" or key is not None
    images, share = mix(jax.random.fold_in(key, 2), images, mixing) if mixing != "none" else (images, None)
    logits = nnx.merge(graphdef, params[0])(images, key)
    ce = jnp.mean(cross_entropy(logits, labels))
    loss = jnp.mean(mixed_cross_entropy(logits, labels, smoothing, share))
    return loss, {"ce": ce, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}


def mix(
    key: Key[Array, ""], images: Float[Array, "b h w c"], mixing: Mixing
) -> tuple[Float[Array, "b h w c"], Float[Array, ""]]:
    """(each image mixed with the next of the batch, share of the first in the result).

    "mixup": a weighted mean, with a share from Beta(0.2, 0.2). "cutmix": a box of the other, of uniform area.
    """
    key_share, key_place = jax.random.split(key)
    other = jnp.roll(images, -1, axis=0)
    if mixing == "mixup":
        share = jax.random.beta(key_share, 0.2, 0.2)
        return share * images + (1 - share) * other, share
    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - jax.random.uniform(key_share))
    middle = jax.random.uniform(key_place, (2,))
    rows, columns = jnp.arange(height) + 0.5, jnp.arange(width) + 0.5
    is_row = jnp.abs(rows - middle[0] * height) < side * height / 2
    is_column = jnp.abs(columns - middle[1] * width) < side * width / 2
    in_box = is_row[:, None] & is_column[None]
    return jnp.where(in_box[None, :, :, None], other, images), 1 - jnp.mean(in_box)


def mixed_cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], smoothing: float, share: Float[Array, ""] | None
) -> Float[Array, " b"]:
    """Cross-entropy of each image, or of both it is mixed of."""
    ce = cross_entropy(logits, labels, smoothing)
    if share is None:
        return ce
    return share * ce + (1 - share) * cross_entropy(logits, jnp.roll(labels, -1), smoothing)


def denoising_loss(
    shared: Shared,
    block: Block,
    images: Image,
    labels: Int[Array, " b"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b d"],
    *,
    sigma_data: float,
    weighting: Weighting,
    key: Key[Array, ""] | None = None,
    keep_z: Bool[Array, " b"] | None = None,
    guess: tuple[Bool[Array, " b"], Float[Array, "b d"]] | None = None,
    mean_weight: Scalar | float = 1.0,
    smoothing: float = 0.0,
    share: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """One block's loss on z = y + sigma * eps, given the noise; gradient reaches the label embeddings through z."""
    y = shared.embed_labels(labels)
    if share is not None:
        y = share * y + (1 - share) * jnp.roll(y, -1, axis=0)
    z = y + sigma[:, None] * eps
    if guess is not None:
        z = jnp.where(guess[0][:, None], guess[1], z)
    if keep_z is not None:
        z = jnp.where(keep_z[:, None], z, 0.0)
    logits = denoise(shared, block, images, z, sigma, sigma_data=sigma_data, key=key)
    ce = cross_entropy(logits, labels)
    weight = loss_weight(sigma, sigma_data)
    if weighting == "bounded":
        weight = bounded_weight(sigma, sigma_data) / mean_weight
    loss = weighted_loss(mixed_cross_entropy(logits, labels, smoothing, share), weight, weighting)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return loss, {"ce": jnp.mean(ce), "accuracy": accuracy, WORST_SIGMA: sigma[worst(ce)]}


def worst(losses: Float[Array, " n"]) -> Int[Array, ""]:
    """Index of the first loss that is not finite, else of the largest."""
    return jnp.argmax(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


# The parameters of blocks 0, 1, ... for `hand_on`: (shared, block) of each, or (block,) where shared is common to all.
# Of those that do not come before the block in training only the shapes matter.
Earlier = tuple[tuple[Params, ...], ...]


@dataclass(frozen=True)
class BlockLoss:
    """The loss of one training step of one block: draws the noise, drops images for guidance, and denoises."""

    shared: nnx.GraphDef
    block: nnx.GraphDef
    hidden_size: int
    p_mean: float
    p_std: float
    sigma_data: float
    weighting: Weighting
    z_dropout: float  # probability of an all-zero z
    smoothing: float
    mixing: Mixing
    guess_share: float  # probability that z is what the blocks before made of it in the sampler
    levels: tuple[float, ...]  # noise levels of that sampler, one a block
    table: Table
    image_dropout: float  # probability of an all-zero image (classifier-free guidance)

    def __call__(
        self,
        params: tuple[Params, Params],
        images: Array,
        labels: Array,
        key: Key[Array, ""],
        within: SigmaRange,
        number: Int[Array, ""] | int = 0,
        earlier: Earlier = (),
    ) -> tuple[Float[Array, ""], Metrics]:
        key_sigma, key_eps, key_image, key_dropout = jax.random.split(key, 4)
        count = labels.shape[0]
        sigma = sample_sigma(key_sigma, count, within, p_mean=self.p_mean, p_std=self.p_std)
        eps = jax.random.normal(key_eps, (count, self.hidden_size))
        if self.image_dropout > 0:
            keep = jax.random.bernoulli(key_image, 1 - self.image_dropout, (count, 1, 1, 1))
            images = jnp.where(keep, images, 0.0)
        guess = None
        if self.guess_share > 0:
            is_guess = jax.random.bernoulli(jax.random.fold_in(key, 3), self.guess_share, (count,))
            sigma = jnp.where(is_guess, jnp.array(self.levels)[number], sigma)
            guess = is_guess, jax.lax.stop_gradient(self._guess(params[0], images, number, earlier))
        share = None
        if self.mixing != "none":
            images, share = mix(jax.random.fold_in(key, 2), images, self.mixing)
        keep_z = None
        if self.z_dropout > 0:
            keep_z = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - self.z_dropout, (count,))
        shared, block = nnx.merge(self.shared, params[0]), nnx.merge(self.block, params[1])
        if shared.hand_on_tokens:
            key_dropout, key_patches = jax.random.split(key_dropout)
            before = jax.lax.stop_gradient(self._handed_on(params[0], images, number, earlier))
            images = jnp.where(number == 0, shared.embed_patches(images, key_patches), before)
        return denoising_loss(
            shared, block, images, labels, sigma, eps,
            sigma_data=self.sigma_data, weighting=self.weighting, key=key_dropout, keep_z=keep_z,
            mean_weight=within.mean_weight, smoothing=self.smoothing, share=share, guess=guess,
        )  # fmt: skip

    def _guess(
        self, shared_params: Params, images: Float[Array, "b h w c"], number: Int[Array, ""] | int, earlier: Earlier
    ) -> Float[Array, "b d"]:
        """The z that the sampler, started at z = 0, gives to block `number`."""
        of_shared = [params[0] if len(params) == 2 else shared_params for params in earlier]
        z = jnp.zeros((len(images), self.hidden_size))
        modules = [nnx.merge(self.shared, params) for params in (*of_shared, shared_params)]
        tokens = modules[0].embed_patches(images, None) if modules[0].hand_on_tokens else images
        for i, (shared, params) in enumerate(zip(modules[:-1], earlier, strict=True)):
            block = nnx.merge(self.block, params[-1])

            def advance(state, shared=shared, block=block, i=i):
                z, tokens = state
                following = None
                if len(earlier[0]) == 2:  # the block at work may be the next
                    following = jnp.where(i + 1 == number, shared_params["labels"], modules[i + 1].labels[...])
                z = denoise_step(
                    shared, block, tokens, z, np.float32(self.levels[i]), np.float32(self.levels[i + 1]),
                    sigma_data=self.sigma_data, cfg_scale=0.0, table=self.table, labels_next=following,
                )[1]  # fmt: skip
                return z, hand_on(shared, block, tokens) if shared.hand_on_tokens else tokens

            z, tokens = jax.lax.cond(i < number, advance, lambda state: state, (z, tokens))
        return z

    def _handed_on(
        self, shared_params: Params, images: Float[Array, "b h w c"], number: Int[Array, ""] | int, earlier: Earlier
    ) -> Float[Array, "b t d"]:
        """The tokens that the blocks before block `number` make of the images."""
        of_shared = [params[0] if len(params) == 2 else shared_params for params in earlier]
        tokens = nnx.merge(self.shared, (*of_shared, shared_params)[0]).embed_patches(images, None)
        for i, (shared, params) in enumerate(zip(of_shared, earlier, strict=True)):
            advance = partial(hand_on, nnx.merge(self.shared, shared), nnx.merge(self.block, params[-1]))
            tokens = jax.lax.cond(i < number, advance, lambda tokens: tokens, tokens)
        return tokens
