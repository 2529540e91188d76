// SPDX-License-Identifier: Apache-2.0
// Merges over a linked list of tokens, with a heap of the pairs that may apply next.
#include "byte_pairs.hpp"

#include <queue>
#include <tuple>

namespace smollm2 {
namespace {

constexpr std::size_t none = static_cast<std::size_t>(-1);
constexpr int absorbed = -1;  // the token of a node that its left neighbour has taken in

struct node {
  int token;
  std::size_t previous;
  std::size_t next;
};

struct candidate {
  std::size_t rank;
  std::size_t left;  // node
  int left_token;    // both tokens as they were when the candidate was found:
  int right_token;   // it is stale once either node holds another one
  int merged;

  // std::priority_queue puts the largest first.
  bool operator<(const candidate& other) const {
    return std::tie(rank, left) > std::tie(other.rank, other.left);
  }
};

std::uint64_t key_of(int left, int right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
         static_cast<std::uint32_t>(right);
}

}  // namespace

void byte_pairs::add(int left, int right, int merged) {
  rules_.try_emplace(key_of(left, right), merge_rule{rules_.size(), merged});
}

const byte_pairs::merge_rule* byte_pairs::find(int left, int right) const {
  const auto entry = rules_.find(key_of(left, right));
  return entry == rules_.end() ? nullptr : &entry->second;
}

std::vector<int> byte_pairs::merge(const std::vector<int>& tokens) const {
  std::vector<node> nodes;
  nodes.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    nodes.push_back({tokens[i], i == 0 ? none : i - 1, i + 1 == tokens.size() ? none : i + 1});
  }

  std::priority_queue<candidate> candidates;
  const auto consider = [&](std::size_t left) {
    if (left == none || nodes[left].next == none) return;
    const int left_token = nodes[left].token;
    const int right_token = nodes[nodes[left].next].token;
    if (const merge_rule* rule = find(left_token, right_token)) {
      candidates.push({rule->rank, left, left_token, right_token, rule->merged});
    }
  };
  for (std::size_t i = 0; i < nodes.size(); ++i) consider(i);

  while (!candidates.empty()) {
    const candidate best = candidates.top();
    candidates.pop();
    node& left = nodes[best.left];
    if (left.token != best.left_token || left.next == none) continue;
    node& right = nodes[left.next];
    if (right.token != best.right_token) continue;
    left.token = best.merged;
    left.next = right.next;
    right.token = absorbed;
    if (left.next != none) nodes[left.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }

  std::vector<int> merged;
  for (const node& each : nodes) {
    if (each.token != absorbed) merged.push_back(each.token);
  }
  return merged;
}

}  // namespace smollm2
