# SPDX-License-Identifier: Apache-2.0
"""transformers_test.py EXAMPLE_DIR OP_LIBRARY: a pruned cache in generate() computes what a full
one computes whose masks hide, layer by layer, what was dropped."""
import sys

try:
    import torch
    import transformers
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
except ImportError as missing:
    print(f"skipped: no {missing.name} in {sys.executable}; examples/pytorch/setup.sh installs it")
    sys.exit(77)

import contextlib
import unittest

EXAMPLE, LIBRARY = sys.argv[1:3]
if not LIBRARY:
    print(f"skipped: no operator was built for the torch in {sys.executable}; run cmake again")
    sys.exit(77)
sys.path.insert(0, EXAMPLE)
torch.ops.load_library(LIBRARY)
torch.set_num_threads(1)  # the model is too small for more
import refreekv_torch  # noqa: E402
from refreekv_torch import PrunedLayer, pruning  # noqa: E402

SMALL = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=8,
    num_key_value_heads=2,
    initializer_range=0.3,  # logits and attention far from uniform
)
RULE = dict(threshold=0.1, full_layers=1)


def small_model(config_class=LlamaConfig, model_class=LlamaForCausalLM, layers=5, **options):
    torch.manual_seed(3)
    config = config_class(**SMALL, num_hidden_layers=layers, **options)
    return model_class(config).eval().requires_grad_(False)


def tokens(count, seed=1):
    return torch.randint(128, (1, count), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def hiding(model, dropped):
    """Full caches whose layer i does not show its keys dropped[i] = (begin, end, first): to queries
    at positions from `first` on."""

    def hide(attention, args, kwargs):
        hidden, cache = kwargs["hidden_states"], kwargs["past_key_values"]
        past = cache.get_seq_length(attention.layer_idx)
        rows = torch.arange(past, past + hidden.shape[1])[:, None]
        columns = torch.arange(past + hidden.shape[1])[None]
        seen = columns <= rows
        for begin, end, first in dropped[attention.layer_idx]:
            seen &= ~((columns >= begin) & (columns < end) & (rows >= first))
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask[None, None]}

    hooks = [
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
        for layer in model.model.layers
    ]
    yield
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def decisions():
    """{layer: decision} of each layer that is pruned inside."""
    found, decide = {}, refreekv_torch.decide

    def record(attention, *args, **options):
        found[attention.layer_idx] = decide(attention, *args, **options)
        return found[attention.layer_idx]

    refreekv_torch.decide = record
    try:
        yield found
    finally:
        refreekv_torch.decide = decide


@contextlib.contextmanager
def showing(model, visible):
    """Full caches whose layer i shows later queries only the prompt's keys visible[i], [q_head,
    token] of booleans."""

    def show(attention, args, kwargs):
        hidden, cache = kwargs["hidden_states"], kwargs["past_key_values"]
        past = cache.get_seq_length(attention.layer_idx)
        own = visible[attention.layer_idx]
        later = torch.arange(past + hidden.shape[1] - own.shape[1])
        rows = torch.arange(past, past + hidden.shape[1])[:, None] - own.shape[1]
        seen = torch.cat(
            [own[:, None].expand(-1, len(rows), -1), (later <= rows).expand(len(own), -1, -1)], -1
        )
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask[None]}

    hooks = [
        layer.self_attn.register_forward_pre_hook(show, with_kwargs=True)
        for layer in model.model.layers
    ]
    yield
    for hook in hooks:
        hook.remove()


def shown_by(decision, tokens, heads, group):
    """Which of a prompt's keys each query head still sees."""
    visible = torch.zeros(heads, tokens, dtype=torch.bool)
    for h in range(heads):
        if isinstance(decision, torch.Tensor):
            sinks, cut, _ = decision[0, 0].tolist()
            visible[h, :sinks] = visible[h, cut:] = True
        else:
            positions, counts = decision[0][0, h], decision[1][0, h]
            visible[h, positions[:counts].long()] = True
    return visible.repeat_interleave(group, 0)


def dropped_by(kept):
    """What `pruning` reported, as `hiding` takes it."""
    return {layer: [(sinks, cut, end)] for layer, (sinks, cut, end) in kept.items()}


class Conversation:
    """Two prompts with four decoded tokens after each, teacher-forced."""

    def __init__(self, first=150, second=40):
        self.turns = [tokens(first, 1), tokens(4, 2), tokens(second, 3), tokens(4, 4)]

    def run(self, model, after_prompt=lambda: None):
        cache, logits = DynamicCache(config=model.config), []
        for turn, ids in enumerate(self.turns):
            for step in ids.split(ids.shape[1] if turn % 2 == 0 else 1, dim=1):
                logits.append(model(step, past_key_values=cache).logits)
            if turn % 2 == 0:
                after_prompt()
        return torch.cat(logits, dim=1), cache


class PrunedCache(unittest.TestCase):
    def test_equals_a_masked_full_cache_over_two_turns(self):
        for attention in ("sdpa", "eager"):
            for window in (1, 8):
                with self.subTest(attention=attention, window=window):
                    model = small_model(attn_implementation=attention)
                    reports = []
                    with pruning(model, window=window, **RULE) as kept:
                        pruned, cache = Conversation().run(
                            model, lambda: reports.append(dict(kept))
                        )
                    dropped = {layer: [] for layer in range(5)}
                    for report in reports:
                        for layer, ranges in dropped_by(report).items():
                            dropped[layer] += ranges
                    with hiding(model, dropped):
                        masked, full_cache = Conversation().run(model)
                    torch.testing.assert_close(pruned, masked, atol=1e-4, rtol=0)

                    first, second = ([cut for _, cut, _ in r.values()] for r in reports)
                    self.assertEqual(first[0], 4)  # a full layer
                    self.assertEqual(len(set(first)), 5, "every layer is to be cut differently")
                    self.assertTrue(all(b >= a for a, b in zip(first, second)))
                    self.assertTrue(any(b > a > 4 for a, b in zip(first, second)))
                    full, _ = Conversation().run(model)
                    self.assertGreater((full - masked).abs().max(), 0.1)  # what went mattered

                    for layer, whole in zip(cache.layers, full_cache.layers):
                        sinks, cut, _ = kept[cache.layers.index(layer)]
                        self.assertEqual(layer.get_seq_length(), whole.get_seq_length())
                        length = whole.get_seq_length() - (cut - sinks)
                        self.assertEqual(layer.keys.shape[2], length)
                        for rows in (layer.keys, layer.values):  # the memory is gone
                            self.assertEqual(rows.untyped_storage().nbytes(), length * 2 * 8 * 4)

    def test_any_policy_by_name(self):
        ids, more, model = tokens(150), tokens(6, 2), small_model()

        def follow(cache):
            steps = [*more[:, :3].split(1, dim=1), more[:, 3:]]  # decoded tokens, then a prompt
            return torch.cat([model(s, past_key_values=cache).logits for s in steps], dim=1)

        budget = dict(budget=0.3, window=4)
        for policy, options in {
            "streaming_llm": dict(budget=40),
            "h2o": dict(budget=40),
            "snapkv": budget,
            "pyramidkv": budget,
            "tova": dict(budget=40),
            "attention_ranked": dict(threshold=0.2, full_layers=1),
            "faithful": dict(tolerance=0.4, stand_ins=False),
        }.items():
            with self.subTest(policy=policy):
                cache, full = DynamicCache(), DynamicCache()
                with decisions() as found, pruning(model, policy=policy, **options) as kept:
                    model(ids, past_key_values=cache)
                    visible = [shown_by(found[layer], 150, 2, 4) for layer in range(5)]
                    numbers = dict(kept)
                    lengths = [layer.keys.shape[2] for layer in cache.layers]
                    pruned = follow(cache)
                model(ids, past_key_values=full)
                with showing(model, visible):
                    masked = follow(full)
                torch.testing.assert_close(pruned, masked, atol=1e-4, rtol=0)
                for layer, (sinks, cut, end) in numbers.items():
                    self.assertEqual(end, 150)
                    self.assertEqual(sinks + end - cut, visible[layer][0].sum())
                    self.assertEqual(sinks + end - cut, lengths[layer])
                self.assertTrue(any(cut > sinks for sinks, cut, _ in numbers.values()))

    def test_stand_ins(self):
        model, cache = small_model(), DynamicCache()
        with decisions() as found, pruning(model, policy="faithful", tolerance=0.4) as kept:
            model(tokens(150), past_key_values=cache)
        for layer, (_, counts, keys, values, rows) in found.items():
            count, extra = counts[0, 0], rows[0, 0]
            self.assertEqual(150 - kept[layer][1], count + extra)
            if extra > 0:
                own = cache.layers[layer]
                self.assertTrue(torch.equal(own.keys[:, :, count:], keys[:, :, :extra]))
                self.assertTrue(torch.equal(own.values[:, :, count:], values[:, :, :extra]))
        self.assertTrue(any(found[layer][4][0, 0] > 0 for layer in range(5)))

    def test_generate(self):
        model = small_model()
        options = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
        with pruning(model, **RULE) as kept:
            first = model.generate(tokens(150), max_new_tokens=12, **options)
            dropped = dropped_by(kept)
            more = torch.cat([first.sequences, tokens(30, 5)], dim=1)
            second = model.generate(
                more, past_key_values=first.past_key_values, max_new_tokens=12, **options
            )
            for layer, ranges in dropped_by(kept).items():
                dropped[layer] += ranges
        with hiding(model, dropped):
            masked = model.generate(tokens(150), max_new_tokens=12, **options)
            masked_second = model.generate(
                more, past_key_values=masked.past_key_values, max_new_tokens=12, **options
            )
        for ours, reference in ((first, masked), (second, masked_second)):
            self.assertTrue(torch.equal(ours.sequences, reference.sequences))
            torch.testing.assert_close(
                torch.stack(ours.logits), torch.stack(reference.logits), atol=1e-4, rtol=0
            )

    def test_models_whose_queries_it_rebuilds(self):
        for name, options in {
            "Llama": {"attention_bias": True},
            "Mistral": {"sliding_window": None},
            "Qwen2": {},
            "Qwen3": {"head_dim": 16},
        }.items():
            with self.subTest(model=name):
                model = small_model(
                    getattr(transformers, f"{name}Config"),
                    getattr(transformers, f"{name}ForCausalLM"),
                    **options,
                )
                attentions = [layer.self_attn for layer in model.model.layers]
                for attention in attentions:
                    for parameter in attention.parameters():  # biases and norms start trivial
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
                self.check_cuts(model, window=5)

    def check_cuts(self, model, window):
        captured = {}

        def capture(attention, query, key, *args, **options):
            captured[attention.layer_idx] = (query[:, :, -window:], key, attention.scaling)
            return sdpa(attention, query, key, *args, **options)

        functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        sdpa = functions["sdpa"]
        functions["sdpa"] = capture
        try:
            with pruning(model, window=window, **RULE) as kept:
                model(tokens(150))
        finally:
            functions["sdpa"] = sdpa
        for layer, (query, key, scale) in captured.items():
            expected = torch.ops.refreekv.select(query, key, layer=layer, scale=scale, **RULE)
            self.assertEqual(list(kept[layer]), expected[0, 0].tolist())
        self.assertTrue(any(cut > sinks for sinks, cut, _ in kept.values()))

    def test_what_a_rectangular_cache_cannot_hold_is_refused(self):
        model = small_model()
        with pruning(model, **RULE):
            with self.assertRaisesRegex(ValueError, "one sequence at a time, not 2"):
                model.generate(tokens(20).expand(2, -1), max_new_tokens=2)
            with self.assertRaisesRegex(ValueError, "one sequence at a time, not 3"):
                model.generate(tokens(20), num_beams=3, max_new_tokens=2)
            padded = torch.ones(1, 20, dtype=torch.long)
            padded[0, :3] = 0
            with self.assertRaisesRegex(ValueError, "padded"):
                model(tokens(20), attention_mask=padded)
            with self.assertRaisesRegex(ValueError, "StaticLayer"):
                model.generate(tokens(20), max_new_tokens=2, cache_implementation="static",
                               disable_compile=True)
        self.refuses("share one cut", model, scope="kv_head")
        self.refuses("threshold must be in", model, threshold=2.0)
        self.refuses("no policy is named snap", model, policy="snap")
        self.refuses("cake decides on all layers", model, policy="cake")
        self.refuses("heads keep one number", model, policy="snapkv", budget=10, window=4,
                     head_floor=0.1)
        windowed = small_model(transformers.MistralConfig, transformers.MistralForCausalLM,
                               sliding_window=32)
        self.refuses("sliding window", windowed)
        self.refuses("flex_attention", small_model(attn_implementation="flex_attention"))
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2))
        self.refuses("gpt2 is not one of", gpt2)

    def refuses(self, why, model, **rule):
        with self.assertRaisesRegex((ValueError, RuntimeError), why):
            with pruning(model, **rule):
                model(tokens(20))

    def test_a_pruned_cache_takes_no_other_sinks_and_no_cropping(self):
        model, cache = small_model(), DynamicCache()
        with pruning(model, **RULE):
            model(tokens(150), past_key_values=cache)
        with pruning(model, sinks=8, **RULE), self.assertRaisesRegex(ValueError, "with 4 sinks"):
            model(tokens(20), past_key_values=cache)
        layer = next(layer for layer in cache.layers if isinstance(layer, PrunedLayer))
        with self.assertRaisesRegex(NotImplementedError, "cropped"):
            layer.crop(-1)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
