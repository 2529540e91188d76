# SPDX-License-Identifier: Apache-2.0
"""Prunes the cache of a Hugging Face model, each layer right after its prefill.

    torch.ops.load_library("librefreekv_torch.so")
    with pruning(model, threshold=0.01) as kept:
        model.generate(**inputs)
    print(kept)

Any policy of refreekv by its name, with its options: pruning(model, policy="snapkv", budget=0.5).
Not those whose KV heads keep different numbers of tokens (twilight, snapkv with a head_floor): a
layer's cache is one tensor. Not cake, which decides on all layers together.
"""
import contextlib
import sys

import torch
from transformers.cache_utils import DynamicLayer

# Models whose queries `last_queries` rebuilds.
MODELS = {"llama", "mistral", "qwen2", "qwen3"}


class PrunedLayer(DynamicLayer):
    """A layer without its tokens [sinks, sinks + dropped). It answers with the logical length, from
    which transformers makes positions and masks; its tensors have the physical one."""

    is_croppable = False

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.sinks = self.dropped = 0

    def replace(self, keys, values, sinks: int) -> None:
        """Makes these the layer's rows. Requires copies: a view would keep all of the memory."""
        self.sinks = sinks
        self.dropped += self.keys.shape[2] - keys.shape[2]
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def crop(self, *_):
        raise NotImplementedError("refreekv: a pruned cache cannot be cropped")

    def reset(self) -> None:
        super().reset()
        self.sinks = self.dropped = 0


def last_queries(attention, hidden_states, position_embeddings, window: int) -> torch.Tensor:
    """[batch, q_head, window, head_dim] of the last tokens, rotated: what the layer's own forward
    computed and threw away."""
    hidden = hidden_states[:, -window:]
    queries = attention.q_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        queries = attention.q_norm(queries)
    queries = queries.transpose(1, 2)
    cos, sin = (angles[:, -window:] for angles in position_embeddings)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # the model's own
    return rotate(queries, queries[:, :1], cos, sin)[0]


def decide(
    attention, hidden_states, position_embeddings, keys, values, policy="refreekv", **options
):
    """What torch.ops.refreekv.select_<policy> returns for a layer. A policy's scope is the layer
    unless it is given: KV heads then keep equally many tokens."""
    try:
        op = getattr(torch.ops.refreekv, f"select_{policy}").default
    except AttributeError:
        raise ValueError(f"refreekv: no policy is named {policy}") from None
    defaults = {each.name: each.default_value for each in op._schema.arguments}
    if op._schema.is_mutable:
        raise ValueError(f"refreekv: {policy} decides on all layers together, not on each in turn")
    own = {"layers": attention.config.num_hidden_layers, "scope": "layer"}
    options = {name: value for name, value in own.items() if name in defaults} | options
    window = options.get("window", defaults.get("window", 1))
    return op(
        last_queries(attention, hidden_states, position_embeddings, window),
        keys,
        *([values] if "values" in defaults else []),
        layer=attention.layer_idx,
        scale=attention.scaling,
        **options,
    )


def lengths_of(decision, tokens):
    """(sinks, slots that stay) of a decision about a layer of one sequence."""
    if isinstance(decision, torch.Tensor):
        sinks, cut, _ = decision[0, 0].tolist()
        return sinks, sinks + tokens - cut
    _, counts, *stand_ins = decision
    slots = counts + stand_ins[2] if stand_ins else counts
    if (slots != slots[0, 0]).any():
        raise ValueError("refreekv: a layer's cache is one tensor, so its heads keep one number")
    return 0, slots[0, 0].item()


def rows_that_stay(decision, keys, values):
    """Copies of the rows of keys and values that a decision keeps, and its stand-ins."""
    sinks, slots = lengths_of(decision, keys.shape[2])
    if isinstance(decision, torch.Tensor):
        recent = keys.shape[2] - (slots - sinks)
        return tuple(
            torch.cat([rows[:, :, :sinks], rows[:, :, recent:]], dim=2) for rows in (keys, values)
        )
    keys, values = keys.clone(), values.clone()
    caches = (keys, values) if len(decision) > 2 else ([keys, values],)
    torch.ops.refreekv.compact_(*caches, *decision)
    return tuple(rows[:, :, :slots].clone() for rows in (keys, values))


def visible_columns(attention, args, kwargs):
    """Before a layer's attention: masks have a column for each logical position, keys do not."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if cache is None or mask is None or attention.layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[attention.layer_idx]
    if isinstance(layer, PrunedLayer):
        end = layer.sinks + layer.dropped
        mask = torch.cat([mask[..., : layer.sinks], mask[..., end:]], dim=-1)
    return args, kwargs | {"attention_mask": mask}


def check_model(model, scope="layer", **_):
    config = model.config
    attention = config._attn_implementation
    if config.model_type not in MODELS:
        raise ValueError(f"refreekv: {config.model_type} is not one of {', '.join(sorted(MODELS))}")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError("refreekv: layers with a sliding window are not supported")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"refreekv: attention must be sdpa or eager, not {attention}")
    if scope != "layer":
        raise ValueError("refreekv: a layer's cache is one tensor, so its heads share one cut")


def check_prompt(hidden_states, mask, layer):
    batch = hidden_states.shape[0]
    if batch != 1:
        raise ValueError(f"refreekv: one sequence at a time, not {batch}: lengths would differ")
    if type(layer) not in (DynamicLayer, PrunedLayer):
        raise ValueError(f"refreekv: the cache must be a DynamicCache, not {type(layer).__name__}")
    if mask is not None:
        last = mask[0, 0, -1]
        if not (last if last.dtype == torch.bool else last == 0).all():
            raise ValueError("refreekv: a prompt must not be padded")


@contextlib.contextmanager
def pruning(model, *, policy="refreekv", **options):
    """Inside, a layer is pruned right after each prompt's prefill, also the second one's, which
    goes over what the first one left; steps of one token prune nothing. A prompt is one forward
    call. options: those of torch.ops.refreekv.select_<policy>.
    Yields {layer: (sinks, cut, tokens)} of the last prompt, in logical positions: [0, sinks) and
    [cut, tokens) stayed. For a policy that keeps positions sinks is 0 and cut the number of tokens
    that are gone."""
    check_model(model, **options)
    kept = {}

    def prune(attention, _, kwargs, __):
        hidden, cache = kwargs["hidden_states"], kwargs.get("past_key_values")
        if cache is None or hidden.shape[1] == 1:
            return
        layer = cache.layers[attention.layer_idx]
        check_prompt(hidden, kwargs.get("attention_mask"), layer)
        angles = kwargs["position_embeddings"]
        decision = decide(attention, hidden, angles, layer.keys, layer.values, policy, **options)
        tokens, before = layer.keys.shape[2], getattr(layer, "dropped", 0)
        sinks, slots = lengths_of(decision, tokens)
        if isinstance(layer, PrunedLayer) and layer.sinks != sinks:
            raise ValueError(
                f"refreekv: this cache was pruned with {layer.sinks} sinks, not {sinks}"
            )
        kept[attention.layer_idx] = (sinks, before + tokens - slots + sinks, before + tokens)
        if slots < tokens:
            if not isinstance(layer, PrunedLayer):
                layer = cache.layers[attention.layer_idx] = PrunedLayer(layer)
            layer.replace(*rows_that_stay(decision, layer.keys, layer.values), sinks)

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if hasattr(module, "q_proj") and hasattr(module, "layer_idx"):
                for handle in (
                    module.register_forward_pre_hook(visible_columns, with_kwargs=True),
                    module.register_forward_hook(prune, with_kwargs=True),
                ):
                    hooks.callback(handle.remove)
        yield kept
