"""The plain vision transformer and the noise-conditioned one with their training steps, in plain PyTorch.

Written for comparison, as a good user of PyTorch would write it. It knows nothing of JAX. The work is that of the
released program at its settings: same shapes, same random draws, same optimizer; training data are on the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_FEATURES = 256
MAX_PERIOD = 10_000
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@dataclass(frozen=True)
class Settings:
    """What a step depends on; the fields are named as in dblocks_jax/fields/common.py."""

    model_type: str
    image_size: int
    patch_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    dropout: float
    num_blocks: int
    gamma: float
    sigma_min: float
    sigma_max: float
    sigma_data: float
    p_mean: float
    p_std: float
    crop_padding: int
    batch_size: int
    lr: float
    weight_decay: float
    clip_norm: float
    dtype: str
    num_labels: int = 100
    # With the first token pooled, the last layer need not compute the others. The result is the same.
    read_first_only: bool = False

    @classmethod
    def of(cls, config: Any, **more: Any) -> "Settings":
        """The fields that `config` has, and `more`."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config}, **more)


class Attention(nn.Module):
    """Multi-head self-attention with dropout on its probabilities."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.num_heads = settings.num_heads
        self.dropout = settings.dropout
        self.query_key_value = nn.Linear(settings.hidden_size, 3 * settings.hidden_size)
        self.output = nn.Linear(settings.hidden_size, settings.hidden_size)

    def forward(self, x: Tensor, first_only: bool) -> Tensor:
        """[b t d] -> [b t d], or with `first_only` what the first token reads, [b 1 d]."""
        b, _, d = x.shape
        if first_only:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            q = F.linear(x[:, :1], weight[:d], bias[:d])
            k, v = F.linear(x, weight[d:], bias[d:]).chunk(2, dim=-1)
        else:
            q, k, v = self.query_key_value(x).chunk(3, dim=-1)
        q, k, v = (array.view(b, -1, self.num_heads, d // self.num_heads).transpose(1, 2) for array in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.output(attended.transpose(1, 2).reshape(b, -1, d))


class Modulation(nn.Module):
    """Conditioning vector [b k] -> `chunks` vectors [b d]: SiLU after a linear layer that starts at zero."""

    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden_size // 6, chunks * hidden_size)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        return F.silu(self.linear(cond)).chunk(self.chunks, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, shapes as they broadcast."""
    return x * (1 + scale) + shift


class Layer(nn.Module):
    """One pre-norm layer; a conditioned one shifts, scales and gates both branches by the noise level."""

    def __init__(self, settings: Settings, *, conditioned: bool):
        super().__init__()
        self.norm_attention = nn.LayerNorm(settings.hidden_size, eps=1e-12)
        self.attention = Attention(settings)
        self.norm_mlp = nn.LayerNorm(settings.hidden_size, eps=1e-12)
        self.mlp = nn.Sequential(
            nn.Linear(settings.hidden_size, settings.intermediate_size),
            nn.GELU(),
            nn.Linear(settings.intermediate_size, settings.hidden_size),
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.modulation = Modulation(settings.hidden_size, 6) if conditioned else None

    def forward(self, x: Tensor, cond: Tensor | None, first_only: bool) -> Tensor:
        """[b t d] -> [b t d], or with `first_only` the first token alone, [b 1 d]."""
        kept = x[:, :1] if first_only else x
        if self.modulation is None:
            x = kept + self.dropout(self.attention(self.norm_attention(x), first_only))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part[:, None] for part in self.modulation(cond))
        attended = self.attention(modulate(self.norm_attention(x), shift_a, scale_a), first_only)
        x = kept + gate_a * self.dropout(attended)
        return x + gate_m * self.dropout(self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m)))


class Block(nn.Module):
    """Consecutive layers."""

    def __init__(self, settings: Settings, num_layers: int, *, conditioned: bool):
        super().__init__()
        self.read_first_only = settings.read_first_only
        self.layers = nn.ModuleList(Layer(settings, conditioned=conditioned) for _ in range(num_layers))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """[b t d] -> [b t d], or the first token alone, [b 1 d], if that is all that is read."""
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, cond, self.read_first_only and i == last)
        return x


class Embedding(nn.Module):
    """[a first token; patches] + positions, then dropout."""

    def __init__(self, settings: Settings):
        super().__init__()
        size, width = settings.patch_size, settings.hidden_size
        self.patches = nn.Conv2d(3, width, kernel_size=size, stride=size)
        self.positions = nn.Parameter(torch.empty(1, (settings.image_size // size) ** 2 + 1, width))
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, images: Tensor, first: Tensor) -> Tensor:
        """Images [b c h w] and first tokens [b 1 d] -> tokens [b t d]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.dropout(torch.cat([first, patches], dim=1) + self.positions)


def initialize(model: nn.Module) -> None:
    """Normal(0.02) weights, zero biases; the modulations and a conditioned model's head start at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "modulation" in name or name == "shared.head.weight":
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.02)


class ViT(nn.Module):
    """The plain vision transformer: images [b c h w] -> logits [b classes]."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.embedding = Embedding(settings)
        self.cls_token = nn.Parameter(torch.empty(1, 1, settings.hidden_size))
        self.trunk = Block(settings, settings.num_layers, conditioned=False)
        self.norm = nn.LayerNorm(settings.hidden_size, eps=1e-12)
        self.head = nn.Linear(settings.hidden_size, settings.num_labels)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images, self.cls_token.expand(len(images), -1, -1))
        return self.head(self.norm(self.trunk(tokens, None)[:, 0]))


class NoiseEmbedding(nn.Module):
    """c_noise [b] -> conditioning vector [b hidden_size // 6]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(NOISE_FEATURES, hidden_size // 6)
        self.linear_2 = nn.Linear(hidden_size // 6, hidden_size // 6)
        half = NOISE_FEATURES // 2
        self.register_buffer("frequencies", torch.exp(-math.log(MAX_PERIOD) * torch.arange(half) / half))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.silu(self.linear_2(F.silu(self.linear_1(features))))


class Shared(nn.Module):
    """What every block uses: embeddings of patches, positions, labels and noise level, and the readout."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.embedding = Embedding(settings)
        self.labels = nn.Embedding(settings.num_labels, settings.hidden_size)
        self.noise = NoiseEmbedding(settings.hidden_size)
        self.norm = nn.LayerNorm(settings.hidden_size, eps=1e-12)
        self.modulation = Modulation(settings.hidden_size, 2)
        self.head = nn.Linear(settings.hidden_size, settings.num_labels)


class DBlockViT(nn.Module):
    """The shared parts and the blocks, block 0 (the noisiest) first."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.shared = Shared(settings)
        each = settings.num_layers // settings.num_blocks
        self.blocks = nn.ModuleList(Block(settings, each, conditioned=True) for _ in range(settings.num_blocks))
        initialize(self)


def denoise(shared: Shared, block: Block, images: Tensor, z: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Logits [b classes] of the label behind z = y + sigma * eps [b d], for images [b c h w] and sigma [b]."""
    sigma = sigma[:, None]
    total = sigma**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data * total.rsqrt(), total.rsqrt()
    cond = shared.noise(sigma[:, 0].log() / 4)
    tokens = block(shared.embedding(images, (c_in * z)[:, None]), cond)
    denoised = c_skip * z + c_out * shared.norm(tokens[:, 0])
    return shared.head(modulate(denoised, *shared.modulation(cond)))


def plain_loss(model: ViT, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the plain model."""
    return F.cross_entropy(model(images), labels)


def denoising_loss(
    shared: Shared, block: Block, images: Tensor, labels: Tensor, sigma: Tensor, eps: Tensor, sigma_data: float
) -> Tensor:
    """One block's loss, mean(w) * mean(cross-entropy), as the released program has it."""
    z = F.normalize(shared.labels(labels), dim=-1) + sigma[:, None] * eps
    ce = F.cross_entropy(denoise(shared, block, images, z, sigma, sigma_data), labels)
    return ((sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2).mean() * ce


def training_quantiles(settings: Settings) -> list[tuple[float, float]]:
    """Each block's noise levels as an interval of probability: equal shares, widened by gamma in ln sigma, clamped."""
    log_normal, count = NormalDist(settings.p_mean, settings.p_std), settings.num_blocks
    least, most = math.log(settings.sigma_min), math.log(settings.sigma_max)
    low, high = log_normal.cdf(least), log_normal.cdf(most)
    edges = [most, *(log_normal.inv_cdf(high + (low - high) * b / count) for b in range(1, count)), least]
    intervals = []
    for b in range(count):
        margin = settings.gamma * (edges[b] - edges[b + 1])
        ends = (max(edges[b + 1] - margin, least), min(edges[b] + margin, most))
        intervals.append((log_normal.cdf(ends[0]), log_normal.cdf(ends[1])))
    return intervals


def draw_sigma(settings: Settings, count: int, quantiles: tuple[float, float], device: torch.device) -> Tensor:
    """Noise levels [count] of one block by inverse CDF, float32."""
    low, high = quantiles
    # Float64, since the noisiest block's probabilities lie near 1.
    probability = low + (high - low) * torch.rand(count, dtype=torch.float64, device=device)
    return (settings.p_mean + settings.p_std * torch.special.ndtri(probability)).exp().float()


def augment(images: Tensor, padding: int) -> Tensor:
    """Random crop of the zero-padded image and random flip: uint8 [b h w c] -> uint8 [b h w c], all in one gather."""
    b, h, w, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, b, 1), device=device)
    columns = torch.arange(w, device=device).expand(b, w)
    columns = torch.where(torch.rand(b, 1, device=device) < 0.5, columns.flip(1), columns) + left
    rows = torch.arange(h, device=device) + top
    return padded[torch.arange(b, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


class Normalize(nn.Module):
    """uint8 [b h w c] -> float32 [b c h w]: (image / 255 - mean) / std by channel."""

    def __init__(self):
        super().__init__()
        mean, std = torch.tensor(CIFAR100_MEAN), torch.tensor(CIFAR100_STD)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", mean / std)

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.scale - self.offset).permute(0, 3, 1, 2)


class Steps:
    """Training steps of one model on random images. With `compile_mode` the loss goes through `torch.compile`."""

    def __init__(self, settings: Settings, *, device: torch.device, compile_mode: str | None = None):
        torch.manual_seed(0)
        self.settings = settings
        self.device = device
        self.model = (ViT if settings.model_type == "vit" else DBlockViT)(settings).to(device)
        self.normalize = Normalize().to(device)
        self.quantiles = training_quantiles(settings)
        loss: Callable[..., Tensor] = plain_loss if settings.model_type == "vit" else denoising_loss
        self.loss = loss if compile_mode is None else torch.compile(loss, mode=compile_mode, dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        shape = (16 * settings.batch_size, settings.image_size, settings.image_size, 3)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.labels = torch.randint(settings.num_labels, shape[:1], device=device)

    def enqueue(self, block: int = 0, count: int = 1) -> None:
        """Start `count` steps of a block, or of the plain model. On a GPU this does not wait for them."""
        for _ in range(count):
            self.step(block)

    def wait(self) -> None:
        """Wait for all steps to be done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self, block: int) -> Tensor:
        """One training step: its loss. Parameters of the other blocks have no gradient, so AdamW passes them over."""
        chosen = torch.randint(len(self.images), (self.settings.batch_size,), device=self.device)
        images, labels = augment(self.images[chosen], self.settings.crop_padding), self.labels[chosen]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            loss = self.loss_of(block, self.normalize(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def loss_of(self, block: int, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, images [b c h w], with fresh noise."""
        if isinstance(self.model, ViT):
            return self.loss(self.model, images, labels)
        sigma = draw_sigma(self.settings, len(labels), self.quantiles[block], self.device)
        eps = torch.randn(len(labels), self.settings.hidden_size, device=self.device)
        active = self.model.blocks[block]
        return self.loss(self.model.shared, active, images, labels, sigma, eps, self.settings.sigma_data)
