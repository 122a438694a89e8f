"""Flax NNX modules of one layer, the stacks that they make, the transformer."""

from ulysses_jax.models.attention import Attention as Attention
from ulysses_jax.models.feed_forward import FeedForward as FeedForward
from ulysses_jax.models.layer import Layer as Layer
from ulysses_jax.models.norm import Norm as Norm
from ulysses_jax.models.stack import make_stack as make_stack
from ulysses_jax.models.transformer import Transformer as Transformer
