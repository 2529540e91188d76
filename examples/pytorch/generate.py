# SPDX-License-Identifier: Apache-2.0
"""Answers a prompt with a full and with a pruned cache: cuts, bytes, tokens/s and both texts."""
import argparse
import ast
import statistics
import time
from pathlib import Path

import torch
from refreekv_torch import pruning
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def load_gguf(path, attention="sdpa"):
    """(model, tokenizer) of a GGUF file, dequantised to float32."""
    where = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def chat(tokenizer, text):
    """Token ids [1, token] of the prompt, framed by the model's chat template."""
    messages = [{"role": "user", "content": text}]
    framed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(framed, return_tensors="pt", add_special_tokens=False).input_ids


def cache_bytes(cache):
    return sum(rows.nbytes for layer in cache.layers for rows in (layer.keys, layer.values))


class Timer:
    """Passes as a streamer: generate() calls it for the prompt, then for each token."""

    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def tokens_per_second(self):
        """Of the steps on the prompt's cache: the first token is still the prefill's."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


def answer(model, ids, tokens):
    timer = Timer()
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=DynamicCache(config=model.config),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        streamer=timer,
        return_dict_in_generate=True,
    )
    return result, timer.tokens_per_second()


def option(text):
    """(name, value) of NAME=VALUE. A whole number is an int, what is no number a text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True, help="librefreekv_torch.so of this torch")
    parser.add_argument("--model", type=Path, required=True, help="a Llama, say, in GGUF")
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, help="of which the medians are reported")
    parser.add_argument("--policy", default="refreekv", help="any that `pruning` takes")
    parser.add_argument("--option", type=option, action="append", default=[], metavar="NAME=VALUE",
                        help="of the policy: threshold=0.05, window=16; may be repeated")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error("--tokens: the first is the prefill's, speed needs at least 2")
    torch.ops.load_library(options.library)
    model, tokenizer = load_gguf(options.model, options.attention)
    ids = chat(tokenizer, options.prompt_file.read_text())

    speeds = {"full": [], "pruned": []}
    for _ in range(options.runs):
        full, speed = answer(model, ids, options.tokens)
        speeds["full"].append(speed)
        with pruning(model, policy=options.policy, **dict(options.option)) as kept:
            pruned, speed = answer(model, ids, options.tokens)
        speeds["pruned"].append(speed)

    print("layer  kept")
    for layer, (sinks, cut, end) in kept.items():
        print(f"{layer:5}  {sinks + end - cut:5} of {end}")
    stays = sum(sinks + end - cut for sinks, cut, end in kept.values())
    print(f"{stays / sum(end for *_, end in kept.values()):.1%} of the prompt stays")
    for name, result in (("full", full), ("pruned", pruned)):
        mib = cache_bytes(result.past_key_values) / 2**20
        print(f"\n{name}: cache {mib:.1f} MiB, {statistics.median(speeds[name]):.1f} tokens/s")
        print(tokenizer.decode(result.sequences[0, ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
