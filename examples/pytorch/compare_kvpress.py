# SPDX-License-Identifier: Apache-2.0
"""ReFreeKV beside kvpress's presses: what a layer costs, and what the pruned cache does to the next
tokens. All see the same prefill: a press changes a layer's cache after the layer has used it."""
import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from generate import chat, load_gguf
from kvpress import ExpectedAttentionPress, SnapKVPress, StreamingLLMPress, TOVAPress
from refreekv_press import PolicyPress, ReFreeKVPress
from transformers import DynamicCache

OURS = {
    "ReFreeKV: last row, 1 %": ReFreeKVPress(),
    "ReFreeKV: 16 rows, frobenius": ReFreeKVPress(window=16, average="frobenius"),
}
THEIRS = (SnapKVPress, StreamingLLMPress, TOVAPress, ExpectedAttentionPress)


class Prefill:
    """One prompt's full cache, and what each layer's hooks are called with."""

    def __init__(self, model, ids):
        self.ids, self.calls = ids, []
        hooks = [
            layer.self_attn.register_forward_hook(self.record, with_kwargs=True)
            for layer in model.model.layers
        ]
        cache = DynamicCache(config=model.config)
        self.logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        self.rows = [(layer.keys, layer.values) for layer in cache.layers]
        for hook in hooks:
            hook.remove()

    def record(self, attention, args, kwargs, output):
        self.calls.append((attention, kwargs, output))

    def cache(self, model):
        """A full cache of its own; the rows are nobody's to write to."""
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in zip(cache.layers, self.rows):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    def compress(self, press, cache, layer):
        attention, kwargs, output = self.calls[layer]
        press.forward_hook(attention, (), kwargs | {"past_key_values": cache}, output)

    def decide(self, press, layer):
        """The part of `compress` before anything is moved."""
        attention, kwargs, _ = self.calls[layer]
        hidden, (keys, values) = kwargs["hidden_states"], self.rows[layer]
        if isinstance(press, PolicyPress):
            return press.decide(attention, hidden, keys, values, kwargs)
        scores = press.score(attention, hidden, keys, values, None, kwargs)
        return scores.topk(int(keys.shape[2] * (1 - press.compression_ratio)), dim=-1).indices


def kept_share(prefill, cache):
    kept = sum(layer.keys.shape[2] for layer in cache.layers)
    return kept / (len(cache.layers) * prefill.ids.shape[1])


def pruned_cache(model, prefill, press):
    cache = prefill.cache(model)
    for layer in range(len(cache.layers)):
        prefill.compress(press, cache, layer)
    return cache


def decode(model, prefill, cache, steps, forced=None):
    """(token ids, logits [step, token]): `forced`, or else the likeliest ones."""
    token, tokens, logits = prefill.logits.argmax(-1), [], []
    for step in range(steps):
        token = token if forced is None else forced[step]
        position = torch.tensor([prefill.ids.shape[1] + step])
        logits.append(
            model(
                token[None],
                past_key_values=cache,
                position_ids=position[None],
                cache_position=position,
            ).logits[0, -1]
        )
        tokens.append(token)
        token = logits[-1].argmax(-1, keepdim=True)
    return tokens, torch.stack(logits)


def divergences(model, prefill, steps):
    """{setting of ours: {method: (kept, KL)}}, all at the share that the setting keeps."""
    tokens, full = decode(model, prefill, prefill.cache(model), steps)
    result = {}
    for setting, press in OURS.items():
        share = kept_share(prefill, pruned_cache(model, prefill, press))
        rivals = {kind.__name__: kind(compression_ratio=1 - share) for kind in THEIRS}
        result[setting] = {}
        for name, each in {setting: press, **rivals}.items():
            cache = pruned_cache(model, prefill, each)
            kept = kept_share(prefill, cache)
            _, pruned = decode(model, prefill, cache, steps, tokens)
            kl = F.kl_div(
                pruned.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            result[setting][name] = (kept, kl.item())
    return result


def cpu_milliseconds(work, *arguments):
    begin = time.thread_time_ns()
    work(*arguments)
    return (time.thread_time_ns() - begin) / 1e6


def costs(model, prefill, runs):
    """{method: (median of the decision, of all), in ms}, over layers that ReFreeKV decides on."""
    methods = OURS | {kind.__name__: kind(compression_ratio=0.5) for kind in THEIRS}
    times = {name: ([], []) for name in methods}
    for _ in range(runs):
        for layer in range(2, len(prefill.calls)):
            for name, press in methods.items():
                cache = prefill.cache(model)
                times[name][0].append(cpu_milliseconds(prefill.decide, press, layer))
                times[name][1].append(cpu_milliseconds(prefill.compress, press, cache, layer))
    return {name: [statistics.median(each) for each in both] for name, both in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32, help="over which the KL is taken")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("prompts", type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.ops.load_library(options.library)
    model, tokenizer = load_gguf(options.model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # ExpectedAttention looks there
    prompts = [chat(tokenizer, prompt.read_text()) for prompt in options.prompts]

    longest = max(prompts, key=lambda ids: ids.shape[1])[:, :2000]
    prefill = Prefill(model, longest)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"One layer, {longest.shape[1]} tokens, one thread, CPU ms (median of {options.runs} "
          "alternating runs over all layers but the first 2):\n")
    print("| method | decide | decide and move |\n|---|---|---|")
    for name, (decision, total) in costs(model, prefill, options.runs).items():
        print(f"| {name} | {decision:.2f} | {total:.2f} |")

    torch.set_num_threads(threads)
    lengths = ", ".join(str(ids.shape[1]) for ids in prompts)
    results = [divergences(model, Prefill(model, ids), options.tokens) for ids in prompts]
    print(f"\nPrompts of {lengths} tokens, KL in nats over the next {options.tokens}, mean:\n")
    print("| method | kept | KL | of each prompt |\n|---|---|---|---|")
    for setting in OURS:
        for name in results[0][setting]:
            kept, kl = zip(*(result[setting][name] for result in results))
            each = ", ".join(f"{k:.3f}" for k in kl)
            print(f"| {name} | {statistics.mean(kept):.1%} | {statistics.mean(kl):.3f} | {each} |")


if __name__ == "__main__":
    main()
