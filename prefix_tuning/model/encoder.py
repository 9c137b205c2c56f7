"""The mechanism: what a prefix is, and the network that learns it.

Legend: L layers, H heads of keys and values, D head_dim, E = H * D (token_dim; the hidden size of Bloom), P prefix tokens
(num_virtual_tokens), W width of the encoder's hidden layer (encoder_hidden_size).

Attention in layer l of a decoder mixes values v_j by how well the query q_i matches the keys k_j of the tokens up to i.
A *prefix* is a handful of extra (key, value) pairs per layer and head. They belong to no token, and every token may attend
to them, as if `num_virtual_tokens` further tokens stood in front of the text:

    softmax(q_i . [k_prefix ; k_1 .. k_i]) @ [v_prefix ; v_1 .. v_i]

The language model stays frozen. Only these pairs are learned, so a prefix is a tensor

    (L, 2, H, P, D)        2 = key, value

H is the number of heads that have keys and values of their own. In Bloom each head of queries has one. In Llama 3 and its
relatives several heads of queries share one (grouped heads), and a prefix is smaller by that factor.

For bloom-1b4-zh (24 layers, hidden size 2048 = 16 heads x 128) and 10 virtual tokens that is 983,040 numbers, 3.9 MB.
They are no embeddings of words: each layer has its own pairs, which in general no input text produces. That is why a prefix
steers a model further than a prompt of the same length.

Why is there an MLP? The pairs could be parameters by themselves (`prefix_projection=False`), but Li & Liang found that
training them directly is unstable and sensitive to the learning rate (section 4.3 of the paper). So they *reparametrise*
them: one small embedding per virtual token goes through Linear -> Tanh -> Linear, whose last layer is wide enough to emit
the keys and values of all layers at once:

    (P, E) --Linear--> (P, W) --Tanh, Linear--> (P, L * 2 * E) = (L, 2, H, P, D)

All pairs then share weights and change together. Key and value of a virtual token come from one hidden vector. With that
structure, fewer examples are enough to estimate the pairs than if they were independent parameters (Le et al. 2025, who also
get the gain from much simpler shared maps). Much of the difference is the size of a step, though: Adam moves each weight by
about the learning rate. A direct number of the prefix moves by as much, but a number that the MLP emits is a sum over W
weights and moves much further. So direct pairs want a rate 20 to 100 times as large. At one common rate they hardly move;
each at its own best rate, they end close to the MLP's on the bundled demo and below them on real rows
(tests/benchmarks/README.md). The price of the MLP is size: the last Linear alone has W x (L * 2 * E) weights, 201 M of the
205.6 M trainable parameters at bloom-1b4-zh's shape.

Why can the MLP be thrown away? Its input is no data, only the fixed virtual tokens 0, 1, 2, .... After training its
output is therefore one constant tensor. `bake` computes it once; inference, and the file that PEFT reads, need nothing
else. For the same reason it runs once per optimizer step and not once per row (training/loop.py).

Why is it never run under autocast? Its parameters and the prefix are float32, whatever the dtype of the base: the prefix is
cast where attention reads it (attention.py). Under autocast to bf16, the Linear layers of `encoder()` would compute in bf16,
and so return a bf16 prefix. Then

- a step would hardly show in the prefix: the Linear layers round each weight to bf16, whose numbers are 1.2e-4 apart around
  0.02, but Adam moves a weight by about the learning rate, for example 5e-5;
- the gradients of all rows of a step would be summed in bf16 too, because they have the dtype of the prefix
  (training/loop.py). The 257th of equal summands no longer changes such a sum;
- `bake`, outside of autocast, would save another prefix than the one that was trained.

Sources: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190;
Liu et al. 2022, "P-Tuning v2", https://arxiv.org/abs/2110.07602; Le et al. 2025, "Revisiting Prefix-tuning: Statistical
Benefits of Reparameterization among Prompts", ICLR, https://arxiv.org/abs/2410.02200. Parameter names and the order of the
flat axis are those of the PEFT library's PrefixEncoder, so that weights can be exchanged both ways.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from prefix_tuning.errors import UserError


@dataclass(frozen=True)
class PrefixConfig:
    """The shape of a prefix and of the encoder that learns it. The names are PEFT's.

    Raises UserError if a number is not positive or if the heads do not divide token_dim.
    """

    num_virtual_tokens: int
    num_layers: int
    num_attention_heads: int  # heads of keys and values, as PEFT counts them
    token_dim: int  # num_attention_heads * head_dim
    encoder_hidden_size: int  # width of the projection's hidden layer
    prefix_projection: bool

    @classmethod
    def of(
        cls,
        base: PreTrainedConfig,
        num_virtual_tokens: int,
        encoder_hidden_size: int | None = None,
        prefix_projection: bool = True,
    ) -> "PrefixConfig":
        """The shape of a prefix for a base of this configuration. encoder_hidden_size: by default token_dim, as in PEFT."""
        layers, heads, head_dim = key_value_shape(base)
        token_dim = heads * head_dim
        return cls(num_virtual_tokens, layers, heads, token_dim, encoder_hidden_size or token_dim, prefix_projection)

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name == "prefix_projection":
                if not isinstance(value, bool):
                    raise UserError(f"{name} must be true or false, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.token_dim % self.num_attention_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} does not divide token_dim {self.token_dim}")


def key_value_shape(base: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and head_dim of a base with this configuration: (L, H, D).

    For example (28, 8, 128) for Qwen3-0.6B: its 16 heads of queries share 8 of keys and values, and 16 * 128 is not its
    hidden size, 1024.
    """
    heads = base.num_attention_heads
    grouped = getattr(base, "num_key_value_heads", None)
    head_dim = getattr(base, "head_dim", None)
    return base.num_hidden_layers, grouped or heads, head_dim or base.hidden_size // heads


class PrefixEncoder(nn.Module):
    """Emits the prefix: keys and values for every layer of the frozen model.

    Parameters, all float32:

        with prefix_projection            without
        embedding.weight    (P, E)        embedding.weight    (P, L * 2 * E)
        transform.0.weight  (W, E)
        transform.0.bias    (W,)
        transform.2.weight  (L * 2 * E, W)
        transform.2.bias    (L * 2 * E,)

    The flat axis L * 2 * E runs: layer 0 key, layer 0 value, layer 1 key, ...; each E is split into H heads of D numbers.

    Two constants may be set by `initialize`. They are saved with the weights but never trained:

        text_prefix  (P, L * 2 * E)   is added to the output of the projection
        first_token  (1, L * 2 * E)   stands in place of the first virtual token's pairs
    """

    text_prefix: torch.Tensor | None
    first_token: torch.Tensor | None

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        flat = config.num_layers * 2 * config.token_dim
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, flat),
            )
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, flat)
        # A buffer that is None does not appear in the state_dict, so the keys equal PEFT's.
        self.register_buffer("text_prefix", None)
        self.register_buffer("first_token", None)

    @classmethod
    def from_weights(cls, config: PrefixConfig, weights: dict[str, torch.Tensor]) -> "PrefixEncoder":
        """The encoder with these weights, a `state_dict`, which it does not copy. Raises RuntimeError if they do not fit."""
        with torch.device("meta"):  # nothing is allocated there
            encoder = cls(config)
        encoder.text_prefix, encoder.first_token = weights.get("text_prefix"), weights.get("first_token")
        encoder.load_state_dict(weights, assign=True)
        return encoder.requires_grad_()

    def forward(self) -> torch.Tensor:
        """Returns the prefix (L, 2, H, P, D), float32, differentiable in the parameters."""
        flat = self.embedding.weight  # all virtual tokens in order, so no index is needed
        if self.config.prefix_projection:
            flat = self.transform(flat)
        if self.text_prefix is not None:
            flat = flat + self.text_prefix
        if self.first_token is not None:
            flat = torch.cat((self.first_token, flat[1:]))
        return unflatten(flat, self.config.num_layers, self.config.num_attention_heads)

    @torch.no_grad()
    def bake(self) -> torch.Tensor:
        """Returns the prefix as one constant tensor (L, 2, H, P, D), float32: all that inference needs."""
        return self()

    @torch.no_grad()
    def initialize(
        self, prefix_init: str, text_prefix: torch.Tensor | None = None, freeze_first_token: bool = False
    ) -> None:
        """Sets the starting point.

        random: torch's own initialisation of the layers above, as in PEFT.
        zero:   all keys and values are 0. A zero key scores 0 before the bias, so it still takes a share of the softmax;
                a zero value adds nothing.
        text:   `text_prefix` (L, 2, H, P, D), the keys and values that the frozen model computes for a text. The model
                starts as if it had read that text.

        With the projection, zero and text start its last layer at zero, and `text_prefix` is added to its output.
        freeze_first_token: the first virtual token keeps the pairs that it starts with. Many models send the attention that
        no token needs to the first one (Xiao et al. 2024, "attention sinks", arXiv 2309.17453).

        Raises ValueError for any other name, for a `text_prefix` without `text`, and for `text` without a `text_prefix`.
        """
        if prefix_init not in ("random", "zero", "text") or (text_prefix is not None) != (prefix_init == "text"):
            given = "no text_prefix" if text_prefix is None else "a text_prefix"
            raise ValueError(f"prefix_init is random, zero, or text with a text_prefix; not {prefix_init!r} with {given}")
        if prefix_init != "random":
            self._set_to(text_prefix)
        if freeze_first_token:
            self.first_token = flatten(self())[:1].clone()

    def _set_to(self, text_prefix: torch.Tensor | None) -> None:
        """Makes the encoder emit `text_prefix`, or zeros."""
        if self.config.prefix_projection:
            for parameter in self.transform[2].parameters():
                nn.init.zeros_(parameter)
            if text_prefix is not None:
                self.text_prefix = flatten(text_prefix).clone()
        elif text_prefix is not None:
            self.embedding.weight.copy_(flatten(text_prefix))
        else:
            nn.init.zeros_(self.embedding.weight)


def unflatten(flat: torch.Tensor, num_layers: int, num_heads: int) -> torch.Tensor:
    """(P, L * 2 * E) -> (L, 2, H, P, D), a view."""
    return flat.view(flat.shape[0], num_layers, 2, num_heads, -1).permute(1, 2, 3, 0, 4)


def flatten(prefix: torch.Tensor) -> torch.Tensor:
    """(L, 2, H, P, D) -> (P, L * 2 * E), the layout of PEFT's `prompt_embeddings`."""
    return prefix.permute(3, 0, 1, 2, 4).flatten(1)
