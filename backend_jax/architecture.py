"""What a decoder is made of: the parts that differ between model families, as plain data.

It knows no config key, no tensor name and no array. A family's file fills an `Architecture` in; `model` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from backend_jax.rope import Rotary


class Norm(StrEnum):
    RMS = "rms"  # x / rms(x) * w
    RMS_PLUS_ONE = "rms_plus_one"  # x / rms(x) * (1 + w)
    LAYER = "layer"  # (x - mean) / deviation * w + b


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Joint(StrEnum):
    """How the rows of one projection for q, k and v are laid out."""

    THIRDS = "thirds"  # all of q, all of k, all of v
    PER_HEAD = "per_head"  # q, k and v of head 0, then of head 1, ...


@dataclass(frozen=True)
class Architecture:
    family: str
    vocab_size: int
    max_positions: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    norm: Norm
    epsilon: float
    activation: Activation
    tied: bool  # the head is the embedding
    gated: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    joint: Joint | None = None  # one projection for q, k and v
    joint_gate: bool = False  # one projection for gate and up, gate first
    parallel: bool = False  # attention and feed-forward both read the layer's input
    post_norms: bool = False  # what attention and feed-forward write is normed once more
    head_norm: bool = False  # queries and keys are normed per head
    score_scale: float = 1.0
    score_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    embedding_size: int = 0  # columns of embedding and head where they are not the hidden ones; 0 = they are
    position_rows: int = 0  # rows of the table of learned positions; 0 = none
    position_offset: int = 0  # row of position 0 in that table
    rotary: tuple[Rotary, ...] = ()  # the distinct ones; () = none
    rotary_of: tuple[int, ...] = ()  # [L] which of them each layer uses
    windows: tuple[int | None, ...] = field(default=())  # [L] native window in positions; () = all full
    biased: frozenset[str] = frozenset()  # roles of linear layers that have a bias

    @property
    def share(self) -> int:
        """Query heads per key-value head."""
        return self.query_heads // self.kv_heads

    @property
    def outer_size(self) -> int:
        """Columns of the embedding, and of what the head reads."""
        return self.embedding_size or self.hidden_size

    @property
    def has_windows(self) -> bool:
        return any(window is not None for window in self.windows)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def linear_shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a linear layer by its role."""
        queries, keys = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.inner_size
        return {
            "joint": (queries + 2 * keys, hidden),
            "query": (queries, hidden),
            "key": (keys, hidden),
            "value": (keys, hidden),
            "output": (hidden, queries),
            "gate_up": (2 * inner, hidden),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
            "project_in": (hidden, self.outer_size),
            "project_out": (self.outer_size, hidden),
        }[role]

    @property
    def linear_roles(self) -> tuple[str, ...]:
        """The linear layers of one layer, in the order they run."""
        projections = ("joint",) if self.joint else ("query", "key", "value")
        inner = ("gate_up",) if self.joint_gate else ("gate", "up") if self.gated else ("up",)
        return (*projections, "output", *inner, "down")

    @property
    def outer_roles(self) -> tuple[str, ...]:
        """The linear layers before the first and after the last layer."""
        return ("project_in", "project_out") if self.embedding_size else ()

    @property
    def norm_roles(self) -> tuple[str, ...]:
        """The norms of one layer."""
        posts = ("attention_post_norm", "feed_post_norm") if self.post_norms else ()
        heads = ("query_norm", "key_norm") if self.head_norm else ()
        return ("attention_norm", "feed_norm", *posts, *heads)

    def norm_width(self, role: str) -> int:
        return self.head_dim if role in {"query_norm", "key_norm"} else self.hidden_size
