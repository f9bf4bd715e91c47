"""ESM-2 (Lin et al., Science 2023) without padding.

Sequences lie end to end in one flat vector of tokens, from the embedding to the logits. Letters in shapes:
T tokens of all sequences, B sequences, D hidden size, H heads, K head size, L layers, V = 33 tokens.

Rotary frequencies are kept, and their tables handed to the layers, as the bits of fp32 numbers: `.to(bfloat16)`
rounds every floating-point buffer, and FSDP every such argument of a layer, but no integer. The frequencies are
weights of a kind: some published checkpoints were trained with ones that fp16 had rounded, and keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from esm2_composer.alphabet import MASK, PAD, VOCAB_SIZE
from esm2_composer.attention import compute_dtype, rotate, select_attention
from esm2_composer.product import PLAIN

INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5
ROTARY_BASE = 10000.0
# Token dropout assumes that training hides this share of all tokens, whatever share a run really hides.
EXPECTED_MASK_RATIO = 0.15 * 0.8
# Divides the layers of every published size. Parameters' names, so checkpoints, depend on it.
LAYERS_OF_A_GROUP = 3
# Parameters. Layers of larger groups are sharded one by one: 15B's are 3 x 315 M; 3B's, 3 x 79 M.
LARGEST_GROUP = 2**28


@dataclass(frozen=True)
class ESM2Config:
    """The dimensions of a model, and the attention backend it runs on (see `attention`)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, most in (("num_layers", 1000), ("hidden_size", 2**16), ("ffn_hidden_size", 2**20)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, not {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        if self.head_size % 8:
            raise ValueError(
                f"hidden_size / num_heads is {self.head_size}; attention kernels need a multiple of 8"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


SIZES = {
    "8m": ESM2Config(6, 320, 20, 1280),
    "35m": ESM2Config(12, 480, 20, 1920),
    "150m": ESM2Config(30, 640, 20, 2560),
    "650m": ESM2Config(33, 1280, 20, 5120),
    "3b": ESM2Config(36, 2560, 40, 10240),
    "15b": ESM2Config(48, 5120, 40, 20480),
}


def rotary_frequencies(head_size: int) -> torch.Tensor:
    """base^(-2i/K), fp32 (K/2,) (Su et al., RoFormer, 2021)."""
    return 1.0 / ROTARY_BASE ** (torch.arange(0, head_size, 2).float() / head_size)


def rotary_tables(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """cos and sin of position * frequency, fp32 (2, T, 1, K/2), from (T,) and fp32 (K/2,)."""
    angles = positions.float()[:, None, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def add(x: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
    """The sum (T, D); x if there is no update, as before the first layer."""
    return x if update is None else x + update


class Linear(nn.Linear):
    """`fp8` puts another product in the place of this one."""

    product = PLAIN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.linear(x, self.weight, self.bias)


class Layer(nn.Module):
    """One pre-norm transformer block: attention, then a GELU feed-forward."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads, self.head_size = config.num_heads, config.head_size
        self.recomputes: bool | Literal["selective"] = False  # see `ESM2.recompute`
        self.attention_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.qkv = Linear(d, 3 * d)
        self.out = Linear(d, d)
        self.ffn_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.fc1 = Linear(d, config.ffn_hidden_size)
        self.fc2 = Linear(config.ffn_hidden_size, d)

    def forward(
        self, x, update, tables, attention, cu_seqlens, max_seqlen, positions=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x (T, D) and what is to be added to it, update (T, D) or None, the bits of
        `rotary_tables` int32 (2, T, 1, K/2), an `Attention`, and those tokens whose results are wanted, positions
        int64 (M,) or None for all -> x and update for the next layer, (T, D) or (M, D).

        The next layer adds them up, since it norms the sum: that takes one pass over memory, where a sum here and
        a norm there would take two, and their gradients three.
        """
        if attention.layer is not None:
            return attention.layer(self, x, update, tables, cu_seqlens, max_seqlen, positions)
        inputs = x, update, tables, attention.kernel, cu_seqlens, max_seqlen, positions
        if self.recomputes is True:
            # Else what compiled code has recomputed stays in memory until Python collects garbage. The price:
            # code that is not compiled repeats its last product, too.
            with set_checkpoint_early_stop(False):
                return _checkpointed(self._compute, *inputs)
        return self._compute(*inputs)

    def _compute(self, x, update, tables, attend, cu_seqlens, max_seqlen, positions):
        x, qkv = self.project(x, update)
        mixed = attend(*self.rotate_qkv(qkv, tables), cu_seqlens, max_seqlen)
        if positions is not None:  # what follows computes each token by itself
            x, mixed = x.index_select(0, positions), mixed.index_select(0, positions)
        return self.after_attention(x, mixed)

    def project(self, x: torch.Tensor, update: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x and update (T, D) -> their sum (T, D), and its q, k and v, (T, 3, H, K)."""
        x = add(x, update)
        return x, self._product_of(self.attention_norm, self.qkv, x).view(-1, 3, self.num_heads, self.head_size)

    def rotate_qkv(self, qkv: torch.Tensor, tables: torch.Tensor) -> tuple:
        """qkv (T, 3, H, K) -> q, k, v (T, H, K), q and k rotated."""
        cos, sin = tables.view(torch.float32)
        q, k, v = qkv.unbind(1)
        # ESM-2 scales q by K^-0.5 before the rotation; rotation is linear, so the kernel may scale instead.
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, D) and the attention's output (T, H, K) -> x (T, D), and what is to be added to it (T, D)."""
        x = x + self.out(mixed.flatten(1))
        return x, self._product_of(F.gelu, self.fc2, self._product_of(self.ffn_norm, self.fc1, x))

    def _product_of(self, function: Callable, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        def compute(x: torch.Tensor) -> torch.Tensor:
            return linear(function(x))

        # In the backward pass torch computes `function` again, and not the product, which nothing there needs;
        # but that of fp8 it would repeat, for the rounded copies of x that are kept of it.
        recomputes = self.recomputes == "selective" and linear.product is PLAIN
        return _checkpointed(compute, x) if recomputes else compute(x)


def _checkpointed(function: Callable, *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class LayerGroup(nn.Sequential):
    """Consecutive layers, which FSDP gathers together.

    What FSDP does for each module that it shards takes a host as long as launching a layer's own kernels, and
    longer than a GPU computes where it has few tokens. For a few layers at once it does so less often.
    """

    def forward(
        self, x, update, tables, attention, cu_seqlens, max_seqlen, positions=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Layer`; the positions are the last layer's."""
        *others, last = self
        for layer in others:
            x, update = layer(x, update, tables, attention, cu_seqlens, max_seqlen)
        return last(x, update, tables, attention, cu_seqlens, max_seqlen, positions)


class Head(nn.Module):
    """The masked-language-model head; its last product shares the embedding's weight."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x (N, D), embedding (V, D) -> logits (N, V)."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class ESM2(nn.Module):
    """The ESM-2 masked language model on flat batches."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(VOCAB_SIZE, config.hidden_size, padding_idx=PAD)
        layers = range(config.num_layers)
        self.groups = nn.ModuleList(
            LayerGroup(*(Layer(config) for _ in layers[first : first + LAYERS_OF_A_GROUP]))
            for first in layers[::LAYERS_OF_A_GROUP]
        )
        small = count_parameters(self.groups[0]) <= LARGEST_GROUP
        self._sharded_together = LayerGroup if small else Layer
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.head = Head(config.hidden_size)
        # ESM-2's contact predictor. Masked-language-model training never touches it; it is here so that
        # weights pass through unchanged.
        self.contact_head = nn.Linear(config.num_layers * config.num_heads, 1).requires_grad_(False)
        self.register_buffer("rotary_bits", torch.empty(config.head_size // 2, dtype=torch.int32))
        self.apply(self.param_init_fn)

    @property
    def layers(self) -> list[Layer]:
        return [layer for group in self.groups for layer in group]

    def forward(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of every token, or of those at `positions` only.

        Args:
            tokens: ids, any integer dtype, (T,).
            cu_seqlens: int32 (B+1,), where each sequence starts, and T at the end.
            max_seqlen: the longest sequence; read from `cu_seqlens` if not given, which makes a GPU wait.
            positions: int64 (M,), indices into the T tokens, each at most once.

        Returns:
            Logits (T, 33) or (M, 33).

        Raises:
            ValueError: tokens and cu_seqlens do not make a flat batch. Values are checked on a CPU only.
        """
        x, update = self._hidden(tokens, cu_seqlens, max_seqlen, self.config.num_layers, positions)
        return self.head(self.norm(add(x, update)), self.embed.weight)

    def represent(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int | None = None,
        layer: int | None = None,
    ) -> torch.Tensor:
        """What the tokens are to the model after `layer` layers (all of them, if None), (T, D).

        As transformers' `hidden_states` and fair-esm's `representations`: 0 is the embedding, and the last is
        taken after the final layer norm. Arguments and errors are those of `forward`.
        """
        layers = self.config.num_layers
        layer = layers if layer is None else layer
        if not 0 <= layer <= layers:
            raise ValueError(f"layer {layer} is not one of 0 to {layers}")
        x = add(*self._hidden(tokens, cu_seqlens, max_seqlen, layer))
        return self.norm(x) if layer == layers else x

    def _hidden(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int | None,
        layer: int,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream after `layer` layers, and what is to be added to it (see `Layer`): (T, D), or of
        the tokens at `positions` (M, D), for which alone the last of these layers is computed after attention."""
        _check_batch(tokens, cu_seqlens)
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        tokens = tokens.int()
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=tokens.device), lengths, output_size=len(tokens)
        )
        place = torch.arange(len(tokens), device=tokens.device) - cu_seqlens[sequence]
        tables = rotary_tables(place, self.rotary_bits.view(torch.float32)).view(torch.int32)

        x = self._embed(tokens, sequence, lengths)
        c = self.config
        attention = select_attention(c.attention, x.device.type, compute_dtype(x), c.num_heads, c.head_size)
        update = None
        wanted = positions if positions is not None and len(positions) else None  # kernels take no empty batch
        blocks = self.groups if layer == c.num_layers else self.layers[:layer]
        for i, block in enumerate(blocks, start=1):
            of_block = wanted if i == len(blocks) else None
            x, update = block(x, update, tables, attention, cu_seqlens, max_seqlen, of_block)
        return (x, update) if wanted is positions else (x[positions], update[positions])

    def _embed(self, tokens: torch.Tensor, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings (T, D) with token dropout: `<mask>` embeds to zero, and the rest of its sequence is
        scaled up by the share hidden there, relative to the share expected in training."""
        masked = tokens == MASK
        hidden = torch.zeros_like(lengths, dtype=torch.float32).index_add(0, sequence, masked.float())
        scale = (1 - EXPECTED_MASK_RATIO) / (1 - hidden / lengths).clamp(min=1e-4)  # if all is hidden, any will do
        x = self.embed(tokens)
        return x * (scale[sequence] * ~masked)[:, None].to(x.dtype)

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers for any number of tokens; `options` go to `torch.compile`.

        The parts around attention are compiled, the same code for all layers. Attention's kernels are no matter
        for a compiler, and some cannot be traced. Where Triton computes whole layers, nothing is left to compile.
        """
        # Each is compiled anew for training, evaluation, inference mode and other dtypes, `project` for the first
        # layer too, which has no update yet.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for layer in self.layers:
            for part in ("project", "rotate_qkv", "after_attention"):
                compiled = torch.compile(getattr(layer, part), dynamic=True, fullgraph=True, **options)
                setattr(layer, part, compiled)

    def recompute(self, what: Literal[True, "selective"]) -> None:
        """Keep less of the layers for the backward pass, and compute it anew there.

        Args:
            what: "selective", what takes memory but little time, norms and GELU (cf. Korthikanti et al., Reducing
                Activation Recomputation in Large Transformer Models, 2022); or True, whole layers, of which only
                the inputs are kept (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016).
        """
        for layer in self.layers:
            layer.recomputes = what

    # Composer looks these two up when it shards a model.

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Whether the module's parameters are sharded together: a group of layers', or where those are too many
        to gather at once, a layer's."""
        return isinstance(module, self._sharded_together)

    def param_init_fn(self, module: nn.Module) -> None:
        """Initialise what `module` itself holds: weights N(0, 0.02), biases zero, norms one."""
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Embedding):
                with torch.no_grad():
                    module.weight[PAD].zero_()
            else:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Head):
            nn.init.zeros_(module.bias)
        elif isinstance(module, ESM2):
            module.rotary_bits.copy_(rotary_frequencies(module.config.head_size).view(torch.int32))

    def flops(self, lengths: Sequence[int], predicted: int) -> int:
        """Floating-point operations of one training step (forward and backward, no recomputation).

        Args:
            lengths: tokens of each sequence.
            predicted: tokens to predict, for which alone the head is computed, and the last layer after attention.
        """
        c = self.config
        d, tokens = c.hidden_size, sum(lengths)
        before, after = 3 * d * d, d * d + 2 * d * c.ffn_hidden_size  # attention, a layer's products
        products = c.num_layers * before * tokens + after * ((c.num_layers - 1) * tokens + predicted)
        attention = c.num_layers * 2 * d * sum(n * n for n in lengths)
        head = (d * d + d * VOCAB_SIZE) * predicted
        return 6 * (products + attention + head)  # 2 a multiply-add, once forward and twice backward

    @classmethod
    def from_pretrained(cls, path: str | Path, attention: str = "auto") -> ESM2:
        """Load a Hugging Face folder, a fair-esm `.pt` file or a Composer checkpoint (see `weights`)."""
        from esm2_composer.weights.pretrained import load_pretrained

        return load_pretrained(path, attention)

    def save_hf(self, path: str | Path) -> None:
        """Write a folder that transformers' `AutoModelForMaskedLM` and `AutoTokenizer` load."""
        from esm2_composer.weights.hugging_face import save_hugging_face

        save_hugging_face(self, path)


def _check_batch(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if tokens.ndim != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"tokens must be (T,) and cu_seqlens (B+1,), not {tuple(tokens.shape)} and {tuple(cu_seqlens.shape)}"
        )
    if tokens.is_floating_point() or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"tokens must be integers and cu_seqlens int32, not {tokens.dtype}, {cu_seqlens.dtype}")
    if tokens.device.type != "cpu":
        return  # to read values there, this thread would have to wait for the GPU
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(tokens) or (cu_seqlens.diff() < 1).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the {len(tokens)} tokens")
    if tokens.min() < 0 or tokens.max() >= VOCAB_SIZE:
        raise ValueError(f"tokens must lie in 0..{VOCAB_SIZE - 1}, not {tokens.min()}..{tokens.max()}")


def layer_name(index: int) -> str:
    """Of a layer among an ESM2's modules, such as "groups.1.0" of the fourth."""
    return f"groups.{index // LAYERS_OF_A_GROUP}.{index % LAYERS_OF_A_GROUP}"


def count_parameters(model: nn.Module) -> int:
    """All parameters, the tied decoder once and the contact head included."""
    return sum(p.numel() for p in model.parameters())
