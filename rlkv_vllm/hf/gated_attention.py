"""Attention with one gate per KV head, in any Hugging Face decoder, without patching its code.

``out = gate * full_attention + (1 - gate) * local_attention`` per KV head (RLKV, arXiv 2510.08525,
eq. 3; the same mix as DuoAttention, arXiv 2410.10819). Transformers lets a model look up its
attention function and its mask function by name; both are registered here, one name per backend.

The backend `sdpa` has a boolean mask of all T x S pairs, `flex` a block mask. With one query per
sequence both use the boolean mask: it is small, and flex would compute a block of 128 queries.

Shape suffixes: B sequences, T query tokens, S key tokens, L layers, H KV heads, Q query heads
(``Q = H * G``), D head_dim.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf import flex, sharding

#: `auto` is flex on CUDA and sdpa elsewhere, wherever the model is when it runs.
Backend = Literal["auto", "sdpa", "flex"]
#: Names of the attention and mask functions in transformers' registries, by backend.
IMPLEMENTATIONS = {name: f"rlkv_gated_{name}" for name in get_args(Backend)}
#: Name of the gate parameter of every attention module.
GATE_NAME = "rlkv_gate"

_HANDLE_NAME = "_rlkv_gated_attention"


def local_mask(allowed_B1TS: torch.Tensor, sink: int, window: int) -> torch.Tensor:
    """The keys that a streaming head sees, of those that a full head sees (boolean).

    Counts allowed keys instead of using positions: right under padding on either side and with
    any cache. The window includes the query's own token. `allowed_B1TS` is the causal mask, with
    padding.
    """
    rank = allowed_B1TS.cumsum(-1, dtype=torch.int32)
    total = rank[..., -1:]
    return allowed_B1TS & ((rank <= sink) | (rank > total - window))


class GatedAttention:
    """The gates of one model while they are attached to it; made by `attach_gates`.

    Starts in soft mode with all gates 1, which equals the ungated model. A context manager:
    leaving it detaches.

    The model may be wrapped in DDP, FSDP2 (`fully_shard`, accelerate's `fsdp_version: 2`) or
    DeepSpeed ZeRO afterwards: gates are parameters of the attention modules, sharded and reduced
    with them, and the only ones that train. All processes must then call `set_soft` with values,
    `values` and `mean` together. `is_hard` tells whether `set_hard` decides instead of the gates.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        sink: int,
        window: int,
        backend: Backend,
    ) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.sink = sink
        self.window = window
        self.num_kv_heads: int = (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self.is_hard = False
        self._layers = list(layers)
        self._full: tuple[tuple[bool, ...], ...] = ()
        self._full_BLH: torch.Tensor | None = None  # after `set_hard_each`
        self._masks: tuple[torch.Tensor, torch.Tensor] | None = None
        self._frozen = [weight for weight in model.parameters() if weight.requires_grad]
        self._implementation = model.config._attn_implementation
        for weight in self._frozen:
            weight.requires_grad_(False)
        for layer in self._layers:
            device = next(layer.parameters()).device
            gate = nn.Parameter(torch.ones(self.num_kv_heads, device=device))
            layer.register_parameter(GATE_NAME, gate)
            setattr(layer, _HANDLE_NAME, self)
        model.set_attn_implementation(IMPLEMENTATIONS[backend])

    @property
    def gates(self) -> list[nn.Parameter]:
        """The parameter of every layer, float32 ``[H]``, lowest layer first.

        Ask again after the model has been wrapped: sharding replaces parameters.
        """
        return [getattr(layer, GATE_NAME) for layer in self._layers]

    def set_soft(self, values_LH: Sequence[Sequence[float]] | None = None) -> None:
        """Mix full and local attention by the gates, set to `values_LH` (``[L][H]``) if given."""
        if values_LH is not None:
            given = [len(row) for row in values_LH]
            if given != [self.num_kv_heads] * len(self._layers):
                raise RlkvError(
                    f"gates have {given} values per layer: the model has {len(self._layers)} "
                    f"layers of {self.num_kv_heads} KV heads"
                )
            sharding.reshard(self.model)
            for gate, row in zip(self.gates, values_LH, strict=True):
                sharding.write(gate, torch.tensor(row))
        self.is_hard = False

    def set_hard(self, full_heads: Sequence[Collection[int]]) -> None:
        """Make `full_heads` (per layer) full heads, all others streaming, whatever the gates.

        An `RlkvError` if the number of layers is wrong or a head does not exist.
        """
        self._full = self._table(full_heads)
        self._full_BLH = None
        self.is_hard = True

    def set_hard_each(self, allocations: Sequence[Sequence[Collection[int]]]) -> None:
        """As `set_hard`, with other full heads for every sequence of the next forward passes.

        Only with a boolean mask: attach with the backend `sdpa`. Errors as `set_hard`.
        """
        self._full_BLH = torch.tensor(
            [self._table(full_heads) for full_heads in allocations], device=self.model.device
        )
        self.is_hard = True

    def select_sequences(self, rows: torch.Tensor) -> None:
        """Keep only `rows` of the batch, as a cache's `batch_select_indices`."""
        if self._full_BLH is not None:
            self._full_BLH = self._full_BLH[rows]

    def _table(self, full_heads: Sequence[Collection[int]]) -> tuple[tuple[bool, ...], ...]:
        """Whether a head is full, ``[L][H]``."""
        given, expected = len(full_heads), len(self._layers)
        if given != expected:
            raise RlkvError(f"full heads are given for {given} layers: the model has {expected}")
        known = range(self.num_kv_heads)
        for layer, heads in enumerate(full_heads):
            if unknown := [head for head in heads if head not in known]:
                raise RlkvError(
                    f"full head {unknown[0]} of layer {layer} does not exist: the model has KV "
                    f"heads 0 to {self.num_kv_heads - 1}"
                )
        return tuple(tuple(head in heads for head in known) for heads in full_heads)

    def values(self) -> list[list[float]]:
        """The present gates, ``[L][H]``."""
        return [sharding.read(gate).tolist() for gate in self.gates]

    def mean(self) -> torch.Tensor:
        """Mean absolute gate over all layers and KV heads, a scalar that gradients flow through."""
        return torch.cat([sharding.gather(gate) for gate in self.gates]).abs().mean()

    def clamp_after(self, optimizer: torch.optim.Optimizer) -> None:
        """Make every step of `optimizer`, which must train gates only, end in [0, 1].

        Done in the optimizer, because a wrapper may have replaced its parameters by shards or by
        float32 copies. Give torch's own optimizer, before accelerate prepares it.
        """

        def clamp(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.clamp_(0.0, 1.0)

        optimizer.register_step_post_hook(clamp)

    def detach(self) -> None:
        """Give the model back as it was: attention, trainable weights, no gates."""
        if self._layers:
            for layer in self._layers:
                delattr(layer, GATE_NAME)
                delattr(layer, _HANDLE_NAME)
            for weight in self._frozen:
                weight.requires_grad_(True)
            self.model.set_attn_implementation(self._implementation)
            self._layers = []
            self._masks = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _attend(
        self,
        module: nn.Module,
        query_BQTD: torch.Tensor,
        key_BHSD: torch.Tensor,
        value_BHSD: torch.Tensor,
        allowed: torch.Tensor | flex.BlockMasks,
        **options: Any,
    ) -> torch.Tensor:
        """One layer; returns ``[B, T, Q, D]``."""
        group = query_BQTD.shape[1] // key_BHSD.shape[1]

        def attend(full_H: tuple[bool, ...] | torch.Tensor) -> torch.Tensor:
            if isinstance(allowed, flex.BlockMasks):
                if isinstance(full_H, torch.Tensor):
                    raise RlkvError("other full heads for every sequence need backend sdpa")
                full_Q = tuple(full for full in full_H for _ in range(group))
                blocks = allowed.get(full_Q, self.sink, self.window, query_BQTD.device)
                return flex.attend(query_BQTD, key_BHSD, value_BHSD, blocks, **options)
            mask_BHTS = self._mask(allowed, full_H)
            if query_BQTD.shape[2] == 1:
                return _attend_one(query_BQTD, key_BHSD, value_BHSD, mask_BHTS, **options)
            mask = mask_BHTS if mask_BHTS.shape[1] == 1 else mask_BHTS.repeat_interleave(group, 1)
            return sdpa_attention_forward(
                module, query_BQTD, key_BHSD, value_BHSD, mask, **options
            )[0]

        if self.is_hard:
            layer = module.layer_idx
            each = self._full_BLH
            return attend(self._full[layer] if each is None else each[:, layer])
        full_BTQD = attend((True,) * self.num_kv_heads)
        local_BTQD = attend((False,) * self.num_kv_heads)
        # In float32 for bfloat16 models: near 1, bfloat16 has steps of 1/256, and the gradient
        # of a gate is a sum over all tokens.
        gate_Q1 = getattr(module, GATE_NAME).repeat_interleave(group)[:, None]
        return (gate_Q1 * full_BTQD + (1 - gate_Q1) * local_BTQD).to(full_BTQD.dtype)

    def _mask(
        self, allowed_B1TS: torch.Tensor, full_H: tuple[bool, ...] | torch.Tensor
    ) -> torch.Tensor:
        """Visible keys: ``[B, 1, T, S]`` where all heads are alike, else ``[B, H, T, S]``.

        A tensor of full heads is ``[B, H]``.
        """
        if isinstance(full_H, tuple) and all(full_H):
            return allowed_B1TS
        # The local mask is made by the first layer of a forward pass and shared by the others.
        # Keeping the causal mask alive is what makes the comparison by identity safe.
        if self._masks is None or self._masks[0] is not allowed_B1TS:
            self._masks = (allowed_B1TS, local_mask(allowed_B1TS, self.sink, self.window))
        local_B1TS = self._masks[1]
        if isinstance(full_H, tuple):
            if not any(full_H):
                return local_B1TS
            full_H = torch.tensor(full_H, device=allowed_B1TS.device)
        return torch.where(full_H[..., None, None], allowed_B1TS, local_B1TS)


def _attend_one(
    query_BQ1D: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    mask_BH1S: torch.Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """A decode step; returns ``[B, 1, Q, D]``.

    The query heads of a KV head become queries of one head, so that no key or value is copied.
    """
    num_sequences, num_heads, one, size = query_BQ1D.shape
    grouped_BHGD = query_BQ1D.reshape(num_sequences, key_BHSD.shape[1], -1, size)
    out_BHGD = nn.functional.scaled_dot_product_attention(
        grouped_BHGD, key_BHSD, value_BHSD, mask_BH1S, dropout_p=dropout, scale=scaling
    )
    return out_BHGD.reshape(num_sequences, one, num_heads, size)


def attach_gates(
    model: PreTrainedModel, sink: int, window: int, backend: Backend = "auto"
) -> GatedAttention:
    """Give every KV head of `model` a gate and freeze all its weights.

    Args:
        model: a Hugging Face decoder whose layers all have causal attention over all tokens.
        sink: first tokens that local attention sees, >= 0.
        window: last tokens that local attention sees, the query's own included, >= 1.
        backend: `sdpa` takes as long for streaming heads as for full heads. `flex` skips what
            they do not see; on CUDA it is compiled, on the CPU it is slow and has no gradients.
            `auto` is flex on CUDA, else sdpa.

    Raises:
        RlkvError: the model has sliding-window layers or gates already, or does not look up its
            attention function by name; sink, window or backend are out of range.
    """
    kind = type(model).__name__
    if backend not in IMPLEMENTATIONS:
        raise RlkvError(f"backend {backend}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if sink < 0 or window < 1:
        raise RlkvError(f"sink {sink}, window {window}: sink must be >= 0 and window >= 1")
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and getattr(config, "sliding_window", None) is not None:
        layer_types = ["sliding_attention"]
    other = sorted(set(layer_types or ()) - {"full_attention"})
    if other:
        raise RlkvError(
            f"model {kind} has layers of type {', '.join(other)}: only models whose layers all "
            "have full attention can be gated; set `sliding_window` to null in config.json if "
            "the model works without"
        )
    if not model._supports_attention_backend:
        raise RlkvError(
            f"model {kind} does not support transformers' AttentionInterface: use an "
            "architecture that does, such as Qwen3, Qwen2, Llama or Mistral"
        )
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
    ]
    layers.sort(key=lambda module: module.layer_idx)
    if [layer.layer_idx for layer in layers] != list(range(config.num_hidden_layers)):
        raise RlkvError(
            f"model {kind} has {len(layers)} attention layers with KV heads, its config says "
            f"{config.num_hidden_layers}: use a decoder with one attention per layer"
        )
    if any(hasattr(layer, GATE_NAME) for layer in layers):
        raise RlkvError(f"model {kind} has gates already: call detach() on them first")
    return GatedAttention(model, layers, sink, window, backend)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | flex.BlockMasks | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    if not isinstance(attention_mask, flex.BlockMasks) and (
        attention_mask is None or attention_mask.dtype != torch.bool
    ):
        given = "none" if attention_mask is None else f"one of {attention_mask.dtype}"
        raise RlkvError(
            f"gated attention needs a boolean attention mask, got {given}: give the model a mask "
            "[sequences, tokens], or none at all"
        )
    handle: GatedAttention = getattr(module, _HANDLE_NAME)
    return handle._attend(module, query, key, value, attention_mask, **options), None


def _boolean_mask(**kwargs: Any) -> torch.Tensor | None:
    # Without a mask there would be nothing to derive the local mask from.
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**(kwargs | skips))


def _block_masks(**kwargs: Any) -> torch.Tensor | flex.BlockMasks | None:
    q_length, kv_length = kwargs["q_length"], kwargs["kv_length"]
    q_offset, attention_mask = kwargs.get("q_offset", 0), kwargs.get("attention_mask")
    # All else takes the boolean mask as well: packed sequences, and static caches, which have
    # room behind the queries and tell the offset on the device only.
    is_plain = (
        kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        and isinstance(q_offset, int)
        and kv_length == q_offset + q_length
        and (attention_mask is None or attention_mask.shape[1] == kv_length)
    )
    if q_length == 1 or not is_plain:
        return _boolean_mask(**kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(
            kwargs["batch_size"], kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu")
        )
    return flex.BlockMasks(attention_mask, q_length)


def _auto_mask(**kwargs: Any) -> torch.Tensor | flex.BlockMasks | None:
    is_cuda = torch.device(kwargs.get("device", "cpu")).type == "cuda"
    return _block_masks(**kwargs) if is_cuda else _boolean_mask(**kwargs)


# Both or neither: a name missing from the mask registry silently means no mask at all.
_MASKS = {"auto": _auto_mask, "sdpa": _boolean_mask, "flex": _block_masks}
for _backend, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _MASKS[_backend])
