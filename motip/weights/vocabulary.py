"""Growth of the ID vocabulary and of the relative positions of a trained ID decoder.

ID labels are assigned at random in training and are interchangeable. The embedding of a new label must pass through the
attention (``word_to_embed``) and be classified again (``embed_to_word``), which a trained decoder does only in the
subspace spanned by its old embeddings.

A new embedding is therefore a random mixture of the old ones: mean + sum of c_k (word_k - mean), with coefficients that
sum to zero and have norm one, and the *same* mixture of the old rows of the head. Everything linear between embedding
and head then applies to it as to the old ones, its norm is that of an old embedding on average, and the cosine of two
embeddings is about 1/sqrt(V-1).

Accuracy of ID labels before further training, on decoders trained for 1500 steps on synthetic objects (12 objects, new
labels only; old labels: 0.99 and 1.00):

=====================================  =========  ==========
new embeddings                         16 -> 64   50 -> 300
=====================================  =========  ==========
random directions, random head rows    0.00       0.00
random directions, least-squares head  0.00       0.00
mixtures of the old embeddings         0.55       0.86
=====================================  =========  ==========
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motip.errors import MotipError


def resize_words(words: Tensor, heads: Sequence[Tensor], vocabulary: int) -> tuple[Tensor, list[Tensor]]:
    """Label embedding and label heads for `vocabulary` labels.

    Args:
        words: (I, V+1) ``word_to_embed.weight``; column V is newborn.
        heads: (V+1, I) each, ``embed_to_word_layers.l.weight``, row V is newborn.
        vocabulary: new number of labels; if smaller than V, the last labels are dropped.

    Returns:
        (I, vocabulary+1) and as many (vocabulary+1, I) as `heads`: kept labels bit-exact, newborn last.
        Deterministic, independent of the global random generators.

    Raises:
        MotipError: growth from fewer than 3 labels.
    """
    old = words.shape[1] - 1
    kept, added = min(old, vocabulary), max(vocabulary - old, 0)
    if added and old < 3:
        raise MotipError(
            "an ID vocabulary of this size cannot grow",
            where="NUM_ID_VOCABULARY",
            found=f"{old} labels in the file",
            expected="at least 3",
            fix=f"set NUM_ID_VOCABULARY: {old}",
        )
    mixture = _mixture(old, added).to(words) if added else words.new_zeros(old, 0)
    resized = torch.cat([words[:, :kept], words[:, :old] @ mixture, words[:, old:]], 1)
    resized_heads = [torch.cat([head[:kept], mixture.T @ head[:old], head[old:]]) for head in heads]
    return resized, resized_heads


def _mixture(old: int, added: int) -> Tensor:
    """(old, added) weights of the old embeddings in each new one: 1/old plus a unit vector that sums to 0."""
    generator = torch.Generator().manual_seed(old * 100_003 + added)
    deviation = torch.randn(old, added, generator=generator)
    deviation -= deviation.mean(0, keepdim=True)
    return deviation / deviation.norm(dim=0) + 1.0 / old


def resize_positions(rel_pos_embeds: Tensor, length: int) -> Tensor:
    """(L, R, heads) -> (L, length, heads): longer distances get the bias of the longest known one."""
    known = rel_pos_embeds.shape[1]
    if length <= known:
        return rel_pos_embeds[:, :length].clone()
    return torch.cat([rel_pos_embeds, rel_pos_embeds[:, -1:].expand(-1, length - known, -1)], 1)
