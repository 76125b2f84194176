"""Models written with torch alone: torch's own transformer and recurrent layers, nets of pictures, tables, graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import BATCH, DTYPE, HEADS, INNER, LENGTH, WIDTH, WORDS, Built, Entry, real, weighed, words


class Run(nn.Module):
    """The weighed output of `function` applied to `model` and the inputs."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, **inputs: Tensor) -> Tensor:
        if self.function is None:
            return weighed(self.model(*inputs.values()))
        return weighed(self.function(self.model, **inputs))


def on(make: Callable[[], nn.Module], *shape: int, function: Callable[..., Tensor] | None = None) -> Entry:
    """A model of one real input."""
    return Entry(lambda: (Run(make(), function).to(DTYPE), {"x": real(*shape)}))


def transformer() -> Built:
    layers = nn.Transformer(WIDTH, HEADS, 1, 1, INNER, dropout=0.1, batch_first=True)

    def run(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=DTYPE)
        return model(source, target, tgt_mask=mask)

    return Run(layers, run).to(DTYPE), {"source": real(BATCH, LENGTH, WIDTH), "target": real(BATCH, 6, WIDTH)}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class UNet(nn.Module):
    """Two scales down and up again, with skips, group norms and a transposed convolution."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.SiLU())
        self.down = nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels))
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, 2)
        self.last = nn.Conv2d(2 * channels, 3, 3, padding=1)
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(x)
        low = self.drop(F.relu(self.middle(F.max_pool2d(self.down(high), 1))))
        return self.last(torch.cat([high, self.up(low)], 1))


class Clicks(nn.Module):
    """DLRM (Naumov et al. 2019): bags of categories and dense features meet in pairwise products."""

    def __init__(self, tables: int = 3, width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(WORDS, width, mode=mode) for mode in ("sum", "mean", "sum")[:tables])
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, width))
        self.top = nn.Sequential(nn.Linear(width + (tables + 1) * tables // 2, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        own = self.bottom(dense)
        vectors = torch.stack([own, *(bag(categories[:, i]) for i, bag in enumerate(self.bags))], 1)
        products = vectors @ vectors.mT
        rows, columns = torch.tril_indices(vectors.shape[1], vectors.shape[1], -1)
        logits = self.top(torch.cat([own, products[:, rows, columns]], 1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicked)


def dlrm() -> Built:
    clicked = torch.randint(0, 2, (8,)).to(DTYPE)
    return Clicks().to(DTYPE), {"dense": real(8, 13), "categories": words(8, 3, 4), "clicked": clicked}


class Graph(nn.Module):
    """A graph convolution (Kipf and Welling 2017), then attention over edges (Velickovic et al. 2018)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, width)
        self.attend = nn.Linear(2 * width, 1)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        ones = torch.ones(source.shape[0], dtype=nodes.dtype)
        degree = torch.zeros(nodes.shape[0], dtype=nodes.dtype).scatter_add(0, target, ones).clamp_min(1)
        x = self.first(nodes)
        scale = (degree[source] * degree[target]).rsqrt()
        x = F.relu(torch.zeros_like(x).index_add(0, target, x[source] * scale[:, None]))
        x = self.second(x)
        score = F.leaky_relu(self.attend(torch.cat([x[source], x[target]], 1)).squeeze(1))
        most = torch.full_like(degree, -1e9).scatter_reduce(0, target, score.detach(), "amax")
        weight = torch.exp(score - most[target])
        total = torch.zeros_like(degree).index_add(0, target, weight)
        return weighed(torch.zeros_like(x).index_add(0, target, x[source] * (weight / total[target])[:, None]))


def graph() -> Built:
    return Graph().to(DTYPE), {"nodes": real(12, 8), "edges": words(2, 24, high=12)}


class Variational(nn.Module):
    """An autoencoder with sampled latents: convolutions down, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.Flatten())
        self.moments = nn.Linear(64, 32)
        self.up = nn.Sequential(
            nn.Linear(16, 64), nn.Unflatten(1, (16, 2, 2)), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ELU(),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        mean, logvar = self.moments(self.down(x)).chunk(2, 1)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return F.mse_loss(self.up(latent), x) - 0.05 * (1 + logvar - mean.square() - logvar.exp()).mean()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): whole samples of a residual branch are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            keep = torch.floor(0.7 + torch.rand(x.shape[0], 1, 1, dtype=x.dtype))
            x = x + F.alpha_dropout(layer(x), 0.1, True) / 0.7 * keep
        return x


class Diffusion(nn.Module):
    """A denoising step: random times and noise, a block modulated by the time's embedding (Peebles and Xie 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        step = torch.randint(0, 100, (x.shape[0],))
        noise = torch.randn_like(x)
        level = torch.cos(step.to(x.dtype) / 100)[:, None, None]
        noisy = level * x + (1 - level * level).sqrt() * noise
        wave = step[:, None].to(x.dtype) * torch.exp(-torch.arange(8, dtype=x.dtype))
        shift, scale, gate = self.time(torch.cat([wave.sin(), wave.cos()], 1))[:, None].chunk(3, 2)
        inner = self.norm(noisy) * (1 + scale) + shift
        return F.mse_loss(self.out(noisy + gate * self.attention(inner, inner, inner, need_weights=False)[0]), noise)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], **settings: object) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.cell = cell(16, WIDTH, batch_first=True, **settings)
        self.head = nn.LazyLinear(WORDS)
        self(words())

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.cell(self.words(ids))[0])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def recurrent(cell: type[nn.RNNBase], **settings: object) -> Entry:
    return Entry(lambda: (Recurrent(cell, **settings).to(DTYPE), {"ids": words()}))


def attention() -> Built:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        made, weights = model(x, x, x)
        return made + weights.mean(2, keepdim=True)

    return Run(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), run).to(DTYPE), {"x": real(BATCH, LENGTH, WIDTH)}


def separable() -> nn.Module:
    """Grouped and depthwise convolutions, average and adaptive pools, a padded border, a pixel shuffle."""
    return nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(4, 16, 3, groups=2), nn.Hardswish(), nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.AvgPool2d(2), nn.InstanceNorm2d(16, affine=True), nn.PReLU(16), nn.PixelShuffle(2), nn.AdaptiveMaxPool2d(4),
        nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip


PLAIN: dict[str, Entry] = {
    "transformer": Entry(transformer),
    "transformer_encoder": on(encoder, BATCH, LENGTH, WIDTH),
    "multihead_attention": Entry(attention),
    "lstm": recurrent(nn.LSTM, num_layers=2, dropout=0.2),
    "gru": recurrent(nn.GRU, bidirectional=True),
    "u_net": on(UNet, BATCH, 3, 8, 8),
    "dlrm": Entry(dlrm),
    "graph": Entry(graph),
    "variational": Entry(lambda: (Variational().to(DTYPE), {"x": real(BATCH, 3, 8, 8)})),
    "drop_path": on(DropPath, BATCH, LENGTH, WIDTH),
    "diffusion": Entry(lambda: (Diffusion().to(DTYPE), {"x": real(BATCH, LENGTH, WIDTH)})),
    "separable": on(separable, BATCH, 4, 8, 8),
}
