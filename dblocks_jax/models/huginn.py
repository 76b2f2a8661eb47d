"""Recurrent depth (Huginn, Geiping et al. 2025): a core of layers between a prelude and a coda, run again and again.

    e = prelude(embed(tokens)),  s <- core(adapter([s; e])) over and over,  logits = head(norm(coda(norm(s))))

Two models are made of it. `Huginn` is the original, whose state s begins at random and which learns through the last
steps. Of DiffusionBlocks the state is replaced by a noisy target: one pass is the denoiser, see
`dblocks_jax/tasks/recurrent/denoiser.py`.

What the paper on DiffusionBlocks leaves open, and what was taken: parameters start as everywhere here, normal(0.02).
Core and coda carry adaLN-Zero in the place of the norms before attention and MLP; the norms behind each sum stay.
Prelude and last norm know no noise level. Clean tokens enter by the table of unit norm, which is that of the targets.
Which features of a head make a pair for rotation is Hugging Face's way, not Huginn's: a permutation.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dblocks_jax.models.causal import attend_cached, causal_attend
from dblocks_jax.models.conditioned import ConditionedBlock
from dblocks_jax.models.dblock_vit import normalize_rows
from dblocks_jax.models.dit import DiTModulation, DiTNoiseEmbedding
from dblocks_jax.models.llama import Cache, LlamaArchitecture, LlamaAttention, LlamaMlp, prefill_layers, step_layers
from dblocks_jax.models.primitives import Projection, init_weights, project
from dblocks_jax.models.rms import RMSNorm, normalize_rms_modulated

GRADIENT_STEPS = 8  # through so many of the last steps Huginn learns
MEAN_STEPS = 32.0  # of the rate that the number of steps is drawn with
RATE_SPREAD = 0.5  # standard deviation of the rate's logarithm
MOST_STEPS = 1024  # more have a probability below 1e-10
CUT = 3.0  # standard deviations beyond which no state begins


@dataclass(frozen=True)
class HuginnArchitecture(LlamaArchitecture):
    """Sizes; of the `num_layers` the core has those that prelude and coda leave, at least one."""

    prelude_layers: int = 2
    coda_layers: int = 2
    rope_theta: float = 50_000.0

    @property
    def core_layers(self) -> int:
        return self.num_layers - self.prelude_layers - self.coda_layers


class HuginnAttention(LlamaAttention):
    """Llama's, with biases on queries and keys, before they are turned."""

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        super().__init__(arch, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(2 * arch.hidden_size))

    def queries_keys_values(
        self, x: Float[Array, "b t d"], positions: Int[Array, " t"] | None = None
    ) -> Float[Array, "b t 3 h w"]:
        """Of each token; positions are 0..t-1 where none are given."""
        flat = self.query_key_value(x)
        bias = jnp.pad(self.bias[...], (0, x.shape[-1])).astype(flat.dtype)  # values have none
        return self.turned(flat + bias[None, None], 3, positions)


class Sandwich(nnx.Module):
    """What both kinds of layer do: attention, then an MLP, each added to what it reads, and the sum normalised.

    A kind says what its branches read, and whether they are gated. `cond` is the condition of each sample, if there is
    one.
    """

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        self.attention = HuginnAttention(arch, rngs=rngs)
        self.norm_2 = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtype=arch.dtype)
        self.mlp = LlamaMlp(arch, rngs=rngs)
        self.norm_4 = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtype=arch.dtype)

    def before_attention(self, x: Float[Array, "b t d"], *cond: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        """What queries, keys and values are made of."""
        raise NotImplementedError

    def finish(
        self, x: Float[Array, "b t d"], attended: Float[Array, "b t h w"], *cond: Float[Array, "b d"]
    ) -> Float[Array, "b t d"]:
        """The layer's result, given what was read of other tokens."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "b t d"], *cond: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        return self.prefill(x, *cond)[0]

    def prefill(
        self, x: Float[Array, "b t d"], *cond: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t 2 h w"]]:
        """(the tokens after this layer, their keys and values)."""
        qkv = self.attention.queries_keys_values(self.before_attention(x, *cond))
        return self.finish(x, causal_attend(qkv), *cond), qkv[:, :, 1:]

    def step(
        self,
        x: Float[Array, "b 1 d"],
        *cond: Float[Array, "b d"],
        cache: Float[Array, "b n 2 h w"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b 1 d"], Float[Array, "b n 2 h w"]]:
        """The one token at `position`, and the cache with it."""
        qkv = self.attention.queries_keys_values(self.before_attention(x, *cond), position[None])
        attended, cache = attend_cached(qkv, cache, position)
        return self.finish(x, attended, *cond), cache


class SandwichLayer(Sandwich):
    """Huginn's layer: x = n2(x + attention(n1 x)), x = n4(x + mlp(n3 x))."""

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        super().__init__(arch, rngs=rngs)
        self.norm_1 = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtype=arch.dtype)
        self.norm_3 = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtype=arch.dtype)

    def before_attention(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.norm_1(x)

    def finish(self, x: Float[Array, "b t d"], attended: Float[Array, "b t h w"]) -> Float[Array, "b t d"]:
        x = self.norm_2(x + self.attention.read_out(attended))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


class ConditionedSandwichLayer(Sandwich):
    """The same layer, each branch shifted and scaled after a norm without weights, and gated (adaLN-Zero)."""

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        super().__init__(arch, rngs=rngs)
        self.epsilon = arch.rms_norm_eps
        self.modulation_1 = DiTModulation(arch.hidden_size, 2, rngs=rngs)
        self.modulation_2 = DiTModulation(arch.hidden_size, 4, rngs=rngs)

    def before_attention(self, x: Float[Array, "b t d"], cond: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        return normalize_rms_modulated(x, *self.modulation_1(cond), self.epsilon)

    def finish(
        self, x: Float[Array, "b t d"], attended: Float[Array, "b t h w"], cond: Float[Array, "b d"]
    ) -> Float[Array, "b t d"]:
        gate_a, shift, scale, gate_m = self.modulation_2(cond)
        gate_a, gate_m = gate_a[:, None].astype(x.dtype), gate_m[:, None].astype(x.dtype)
        x = self.norm_2(x + gate_a * self.attention.read_out(attended))
        return self.norm_4(x + gate_m * self.mlp(normalize_rms_modulated(x, shift, scale, self.epsilon)))


class Stack(ConditionedBlock):
    """Consecutive layers, with or without a condition, whose keys and values can be kept."""

    def prefill(
        self, x: Float[Array, "b t d"], *cond: Float[Array, "b d"], length: int
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """(the tokens after all layers, a cache of `length` slots that holds them)."""
        return prefill_layers(self.layers, x, *cond, length=length)

    def step(
        self, x: Float[Array, "b 1 d"], *cond: Float[Array, "b d"], cache: Cache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """The one token at `position` after all layers, and the cache with it."""
        return step_layers(self.layers, x, *cond, cache=cache, position=position)


class RecurrentTrunk(nnx.Module):
    """Prelude, adapter, core and coda. Core and coda are of layers of the kind that is given."""

    def __init__(self, arch: HuginnArchitecture, layer: type[Sandwich], *, rngs: nnx.Rngs):
        def stack(kind: type[Sandwich], count: int) -> Stack:
            return Stack([kind(arch, rngs=rngs) for _ in range(count)], remat=arch.gradient_checkpointing)

        self.prelude = stack(SandwichLayer, arch.prelude_layers)
        self.adapter = Projection(2 * arch.hidden_size, arch.hidden_size, dtype=arch.dtype, rngs=rngs)
        self.core = stack(layer, arch.core_layers)
        self.coda = stack(layer, arch.coda_layers)

    def enter(self, state: Float[Array, "b t d"], e: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the core reads: adapter([state; e])."""
        return self.adapter(jnp.concatenate([state.astype(e.dtype), e], axis=-1))


class Ends(nnx.Module):
    """What is before and behind the trunk: embeddings, which are the head too, and the one norm that is used twice."""

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        self.dtype = arch.dtype
        self.embeddings = nnx.Param(init_weights(rngs.params(), (arch.vocab_size, arch.hidden_size)))
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)

    def table(self) -> Float[Array, "v d"]:
        """What tokens are read as."""
        return self.embeddings[...]

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Rows of the table, times the root of their width."""
        table = self.table()
        return (table[tokens] * math.sqrt(table.shape[1])).astype(self.dtype)

    def head(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits: products with the embeddings."""
        return project(x.astype(jnp.float32), self.embeddings[...].T)


class Huginn(Ends):
    """Tokens and a state -> logits of the next token at each position, after any number of steps."""

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        super().__init__(arch, rngs=rngs)
        self.trunk = RecurrentTrunk(arch, SandwichLayer, rngs=rngs)

    def features(
        self, tokens: Int[Array, "b t"], state: Float[Array, "b t d"], steps: Int[Array, ""]
    ) -> Float[Array, "b t d"]:
        """What the head reads after `steps` >= 1 steps from `state`; a gradient goes through GRADIENT_STEPS of them."""
        e = self.trunk.prelude(self.embed(tokens))
        return self.norm(self.trunk.coda(self.norm(self.iterate(state.astype(e.dtype), e, steps))))

    def iterate(
        self, state: Float[Array, "b t d"], e: Float[Array, "b t d"], steps: Int[Array, ""]
    ) -> Float[Array, "b t d"]:
        """The state after `steps` steps. What is before the last GRADIENT_STEPS is a constant to the gradient.

        How many there are is not known to the compiler: a loop of unknown length, then one of GRADIENT_STEPS, of which
        the first do nothing where there are fewer.
        """

        def once(trunk: RecurrentTrunk, state: Array, e: Array) -> Array:
            return trunk.core(trunk.enter(state, e))

        still, still_e, state = jax.lax.stop_gradient((self.trunk, e, state))
        state = jax.lax.fori_loop(0, steps - GRADIENT_STEPS, lambda _, state: once(still, state, still_e), state)

        def counted(state: Array, i: Array) -> tuple[Array, None]:
            return jnp.where(i < GRADIENT_STEPS - steps, state, once(self.trunk, state, e)), None

        return jax.lax.scan(counted, state, jnp.arange(GRADIENT_STEPS))[0]


class DBlockHuginnShared(Ends):
    """What is around the denoiser's trunk: embeddings of tokens and of the noise level, the norm and the head."""

    def __init__(self, arch: HuginnArchitecture, *, rngs: nnx.Rngs):
        super().__init__(arch, rngs=rngs)
        self.noise = DiTNoiseEmbedding(arch.hidden_size, rngs=rngs)

    def table(self) -> Float[Array, "v d"]:
        """The targets, and what clean tokens are read as: embeddings of unit norm, which so cannot collapse."""
        return normalize_rows(self.embeddings[...])


def make_dblock_huginn(arch: HuginnArchitecture, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """A freshly initialised model by parts: its one block is the whole network."""
    return {
        "shared": DBlockHuginnShared(arch, rngs=rngs),
        "block_0": RecurrentTrunk(arch, ConditionedSandwichLayer, rngs=rngs),
    }


def initial_state(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "b t d"]:
    """Where Huginn begins in training: sqrt(2 / 5) times a normal number, cut at 3 standard deviations."""
    return math.sqrt(2 / 5) * jax.random.truncated_normal(key, -CUT, CUT, shape)


def draw_steps(key: Key[Array, ""]) -> Int[Array, ""]:
    """How many steps Huginn makes in training: 1 + Poisson(rate), ln rate ~ N(ln 32 - 0.125, 0.5^2); mean 33.

    A Poisson number is how many arrivals there are in a time, with independent exponential waits between them: exact
    but for the cut at MOST_STEPS, and possible with every generator of random numbers.
    """
    of_rate, of_waits = jax.random.split(key)
    log_rate = math.log(MEAN_STEPS) - RATE_SPREAD**2 / 2 + RATE_SPREAD * jax.random.normal(of_rate)
    arrivals = jnp.cumsum(jax.random.exponential(of_waits, (MOST_STEPS,)))
    return 1 + jnp.sum(arrivals < jnp.exp(log_rate), dtype=jnp.int32)
