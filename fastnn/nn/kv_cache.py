"""A preallocated key-value cache of one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn import functional


class KVCache:
    r"""The keys and values of the positions that an attention layer has seen, appended in place.

    .. math:: K_{t+n} = [K_t; k], \quad V_{t+n} = [V_t; v]

    The buffers are allocated once, for ``max_length`` positions; what is there is never copied again, and
    :func:`fastnn.functional.scaled_dot_product_attention` reads it where it lies. For inference: no gradient reaches the
    cache. One layer and one batch of sequences of the same length each; prompts padded to one length bring an
    ``attn_mask``.

    Not a module: a cache belongs to a generation and not to the model, which would move, copy, save and cast it along.
    Give it to a compiled function as an argument: of one that is a global or hangs on a module, ``torch.compile`` takes the
    length for a constant, and compiles anew at each step.

    Args:
        batch: sequences, or sequences times beams.
        kv_heads: heads of key and value; those of query are a multiple of them.
        max_length: positions that there is room for.
        head_dim: features of a key, E.
        value_dim: features of a value, Ev; default ``head_dim``.
        device, dtype: of both buffers, and of all that is appended; defaults as torch's.

    Attributes:
        length: positions that are there.
        max_length: positions that there is room for.

    Raises:
        ValueError: a negative size.

    Example::

        cache = fastnn.nn.KVCache(1, 8, 4096, 128)
        with torch.inference_mode():
            output = cache.attend(*prompt)  # query [1, 32, 500, 128], key and value [1, 8, 500, 128]
            output = cache.attend(*token)  # [1, 32, 1, 128], [1, 8, 1, 128]

    Source: Shazeer, Fast Transformer Decoding, https://arxiv.org/abs/1911.02150
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "max_length": max_length}
        for name, size in (sizes | {"head_dim": head_dim, "value_dim": value_dim}).items():
            if size < 0:
                raise ValueError(f"fastnn.KVCache: {name} must be 0 or more; got {size}.")
        self.length = 0
        self.max_length = max_length
        with torch.inference_mode(False):  # else no append outside of inference mode could write to them
            self._key = torch.empty(batch, kv_heads, max_length, head_dim, device=device, dtype=dtype)
            self._value = torch.empty(batch, kv_heads, max_length, value_dim, device=device, dtype=dtype)

    @property
    def keys(self) -> Tensor:
        """The keys that are there, ``[batch, kv_heads, length, head_dim]``: a view, which the next change writes to."""
        return self._key.narrow(2, 0, self.length)

    @property
    def values(self) -> Tensor:
        """The values that are there, ``[batch, kv_heads, length, value_dim]``: a view, as :attr:`keys`."""
        return self._value.narrow(2, 0, self.length)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Copy new positions behind those that are there.

        Args:
            key: ``[batch, kv_heads, new, head_dim]``, of the cache's dtype and device, any strides.
            value: ``[batch, kv_heads, new, value_dim]``, as key.

        Returns:
            :attr:`keys` and :attr:`values`: all that is there now.

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit the cache; more positions than there is room for; a key
                or value that wants a gradient. The cache is then as it was.
        """
        self._check("key", key, self._key)
        self._check("value", value, self._value)
        start, new = self.length, key.shape[2]
        if value.shape[2] != new:
            raise RuntimeError(f"fastnn.KVCache: value must have key's {new} positions; got {list(value.shape)}.")
        if start + new > self.max_length:
            raise RuntimeError(
                f"fastnn.KVCache: key must have no more than the {self.max_length - start} positions that are left of "
                f"max_length={self.max_length}; got {new}. Make the cache with a larger max_length, or make room with "
                "truncate() or reset()."
            )
        self._key.narrow(2, start, new).copy_(key)
        self._value.narrow(2, start, new).copy_(value)
        self.length = start + new
        return self.keys, self.values

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = True,
        **options,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append key and value, then attend to all that is there: a prompt, a part of one, or one step of decoding.

        Args:
            query: ``[batch, H, L, head_dim]``, the queries of the last L positions.
            key, value: as in :meth:`append`.
            attn_mask, options: as in :func:`fastnn.functional.scaled_dot_product_attention`; a mask broadcasts to
                ``[batch, H, L, length]`` of the length after the append.
            is_causal: True, unlike there: each query sees the keys up to its own position.

        Returns:
            ``[batch, H, L, value_dim]``, and with ``return_lse`` also the log-sum-exp ``[batch, H, L]``.

        Raises:
            RuntimeError, ValueError: as ``append``; as ``scaled_dot_product_attention``, and then the positions are there.
        """
        self.append(key, value)
        return functional.scaled_dot_product_attention(query, self, None, attn_mask, is_causal=is_causal, **options)

    def reset(self) -> None:
        """Forget all positions; the buffers stay."""
        self.length = 0

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions: speculative decoding drops the tokens that were rejected.

        Raises:
            ValueError: a length below 0 or above the cache's.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"fastnn.KVCache: length must be between 0 and {self.length}, what is there; got {length}."
            )
        self.length = length

    def reorder(self, indices: Tensor) -> None:
        """Let sequence i go on from what was sequence ``indices[i]``: the beams that a step of beam search kept.

        Args:
            indices: ``[batch]``, int64 or int32.

        Raises:
            RuntimeError: indices of another shape or dtype.
            IndexError: an index outside the batch.
        """
        batch = self._key.shape[0]
        if indices.shape != (batch,):
            raise RuntimeError(
                f"fastnn.KVCache: indices must be [{batch}], one for each sequence; got {list(indices.shape)}."
            )
        for kept in (self.keys, self.values):
            kept.copy_(kept.index_select(0, indices))

    def _check(self, name: str, new: Tensor, buffer: Tensor) -> None:
        batch, heads, _, features = buffer.shape
        if new.dim() != 4 or new.shape[:2] != (batch, heads) or new.shape[3] != features:
            raise RuntimeError(
                f"fastnn.KVCache: {name} must be [{batch}, {heads}, new, {features}]; got {list(new.shape)}."
            )
        if new.dtype != buffer.dtype:
            raise RuntimeError(f"fastnn.KVCache: {name} must have the cache's dtype, {buffer.dtype}; got {new.dtype}.")
        if new.device != buffer.device:
            raise RuntimeError(
                f"fastnn.KVCache: {name} must be on the cache's device, {buffer.device}; got {new.device}."
            )
        if new.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"fastnn.KVCache: {name} must not require a gradient, which a cache written in place cannot give; got "
                "requires_grad=True. Run under torch.no_grad() or torch.inference_mode()."
            )
