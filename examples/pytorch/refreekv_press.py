# SPDX-License-Identifier: Apache-2.0
"""Policies of refreekv as kvpress presses. Layers may keep different numbers of tokens. While
decoding with such a press a step is one token, with its position given, as for other presses that
cut each layer by itself."""
from dataclasses import dataclass, field

from kvpress import BasePress
from refreekv_torch import decide, rows_that_stay


@dataclass
class PolicyPress(BasePress):
    policy: str
    options: dict = field(default_factory=dict)  # of torch.ops.refreekv.select_<policy>

    def decide(self, module, hidden_states, keys, values, kwargs):
        angles = kwargs["position_embeddings"]
        return decide(module, hidden_states, angles, keys, values, self.policy, **self.options)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        decision = self.decide(module, hidden_states, keys, values, kwargs)
        return rows_that_stay(decision, keys, values)


def ReFreeKVPress(**options):
    return PolicyPress("refreekv", options)
