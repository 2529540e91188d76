// SPDX-License-Identifier: Apache-2.0
// The two calls that join a rank to the others, whatever carries them: MPI or NCCL.
#pragma once

#include <cstdint>
#include <refreekv/core/config.hpp>
#include <refreekv/core/status.hpp>
#include <vector>

namespace distributed {

using refreekv::index_t;

// What a rank puts into an all-reduce of a group. A group has sum(T*, count), in place, for double
// and std::uint32_t.
template <class Group>
struct message {
  const Group* group;
  index_t count;
  index_t element_bytes;
};
template <class Group>
using traffic = std::vector<message<Group>>;

template <class Group>
index_t bytes_of(const traffic<Group>& log) {
  index_t bytes = 0;
  for (const auto& m : log) bytes += m.count * m.element_bytes;
  return bytes;
}

// To ranks with other heads: refreekv::head_reduction.
template <class Group>
struct head_link {
  const Group* group;
  traffic<Group>* log;

  refreekv::status operator()(double* sums, index_t count) const {
    log->push_back({group, count, sizeof *sums});
    return group->sum(sums, count);
  }
};

// To ranks with other tokens: refreekv::token_exchange.
template <class Group>
struct token_link {
  const Group* group;
  traffic<Group>* log;

  refreekv::status operator()(std::uint32_t* words, index_t count) const {
    log->push_back({group, count, sizeof *words});
    return group->sum(words, count);
  }
};

// To either.
template <class Group>
struct grid_link : head_link<Group>, token_link<Group> {
  using head_link<Group>::operator();
  using token_link<Group>::operator();
};

}  // namespace distributed
