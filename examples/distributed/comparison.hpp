// SPDX-License-Identifier: Apache-2.0
// What the programs do: the same layers on 1, 2, 3 ... ranks and in every layout, each cut beside a
// single rank's.
#pragma once

#include <chrono>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>

#include "links.hpp"
#include "options.hpp"
#include "rank_layer.hpp"

namespace distributed {

// A rank's.
struct outcome {
  refreekv::kept_range all;    // what was decided about the whole sequence
  bool holds = true;           // whether the right rows are left here
  double mb = 0, mb_kept = 0;  // of keys and values here
  double exchanged_kb = 0;
  double select_ms = 0, exchange_us = 0;
};

// World: all ranks, on each of which `compare` runs.
// - `rank()`, `size()`, `gather(x)`: everybody's x, by rank.
// - `split(n)`: a group of the ranks that say the same n, see links.hpp.
template <class Device, class World>
class comparison {
 public:
  using group = decltype(std::declval<const World&>().split(0));

  comparison(const Device& device, const World& world, const options& opts)
      : device_(device), world_(world), options_(opts) {
    policy_.window = static_cast<refreekv::count_t>(opts.window);
    policy_.average = opts.average;
    for (index_t l = 0; l < opts.layers; ++l) {
      layers_.emplace_back(opts.shape, index_t{policy_.full_layers} + l, opts.tokens);
    }
  }

  // Whether something was compared, and all is equal.
  bool run() {
    decide_alone();
    int compared = 0;
    for (index_t ranks = options_.fewest > 0 ? options_.fewest : world_.size();
         ranks <= world_.size(); ++ranks) {
      for (const layout kind : options_.layouts) {
        const deployment grid = deployment::of(kind, ranks);
        if (grid.head_parts > options_.shape.q_heads) {
          say("%5td  %-7s no: every rank needs a query head\n", ranks, name_of(kind));
        } else {
          compare(grid);
          ++compared;
        }
      }
    }
    if (compared == 0) {
      say("Nothing was compared.\n");
      return false;
    }
    say(all_equal_ ? "All cuts are a single rank's.\n" : "CUTS DIFFER.\n");
    return all_equal_;
  }

 private:
  using milliseconds = std::chrono::duration<double, std::milli>;

  // Rank 0 says it.
  template <class... Values>
  void say(const char* format, Values... values) const {
    if (world_.rank() != 0) return;
    if constexpr (sizeof...(values) == 0) {
      std::fputs(format, stdout);
    } else {
      std::printf(format, values...);
    }
    std::fflush(stdout);
  }

  // Rank 0 does it, with all heads and tokens.
  void decide_alone() {
    const auto& s = options_.shape;
    say("%s: %td query heads, %td KV heads, head_dim %td; %td tokens, %td of them ask\n",
        std::string(s.name).c_str(), s.q_heads, s.kv_heads, s.head_dim, options_.tokens,
        options_.window);
    for (const synthetic_layer& layer : layers_) {
      refreekv::kept_range kept;
      if (world_.rank() == 0) {
        const deployment alone = deployment::of(layout::heads, 1);
        rank_layer<Device> whole(
            device_, layer, part_of(alone, 0, s, options_.tokens, policy_.sinks), options_.window);
        kept = whole.select_heads(policy_, refreekv::single_rank{});
      }
      expected_.push_back(world_.gather(kept)[0]);
    }
    say("A single rank cuts layers %td to %td at%s.\n\n", layers_.front().number(),
        layers_.back().number(), cuts(expected_).c_str());
    say("                        MB of a rank's keys and values  KB exchanged\n"
        "ranks  layout    equal    before  after: least    most       a layer%s  cuts\n",
        options_.timed ? "  select ms  exchange us" : "");
  }

  static std::string cuts(const std::vector<refreekv::kept_range>& layers) {
    std::string list;
    for (const refreekv::kept_range& kept : layers)
      list.append(" ").append(std::to_string(kept.cut));
    return list;
  }

  // The layers, one after the other, on ranks [0, grid.ranks()) of the world.
  void compare(const deployment& grid) {
    const index_t rank = world_.rank();
    const bool takes_part = rank < grid.ranks();
    // Same heads, and same tokens; whoever has no part joins others that have none.
    const index_t row = takes_part ? rank / grid.token_parts : grid.ranks();
    const index_t column = takes_part ? rank % grid.token_parts : grid.ranks();
    const group same_heads = world_.split(row), same_tokens = world_.split(column);

    std::vector<outcome> sums(static_cast<std::size_t>(grid.ranks()));  // over layers
    std::vector<refreekv::kept_range> decisions;
    bool equal = true, to_the_bit = true;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const outcome local = takes_part ? decide(grid, same_heads, same_tokens, l) : outcome{};
      const std::vector<outcome> outcomes = world_.gather(local);
      const refreekv::kept_range& alone = expected_[l];
      float mass = 0;
      for (std::size_t r = 0; r < sums.size(); ++r) {
        const outcome& o = outcomes[r];
        equal = equal && o.holds && o.all.cut == outcomes[0].all.cut &&
                o.all.sinks == alone.sinks && o.all.cut == alone.cut &&
                o.all.tokens == alone.tokens && near(o.all.loss, alone.loss);
        to_the_bit = to_the_bit && o.all == alone;
        mass = std::max(mass, o.all.dropped_mass);
        sums[r].mb += o.mb;
        sums[r].mb_kept += o.mb_kept;
        sums[r].exchanged_kb += o.exchanged_kb;
        sums[r].select_ms += o.select_ms;
        sums[r].exchange_us += o.exchange_us;
      }
      equal = equal && near(mass, alone.dropped_mass);
      decisions.push_back(outcomes[0].all);
    }
    // Of the same heads every number is the same; all heads' sums are added up in another order.
    equal = equal && (to_the_bit || grid.head_parts > 1);
    all_equal_ = all_equal_ && equal;
    const auto extremes = [&](double outcome::*of) {
      const auto [smallest, largest] =
          std::minmax_element(sums.begin(), sums.end(),
                              [&](const outcome& a, const outcome& b) { return a.*of < b.*of; });
      return std::pair((*smallest).*of, (*largest).*of);
    };
    const auto mean = [&](double outcome::*of) {  // of the layers, on the slowest or fullest rank
      return extremes(of).second / static_cast<double>(layers_.size());
    };
    const auto [smallest, largest] = extremes(&outcome::mb_kept);
    say("%5td  %-7s  %-10s %7.2f        %7.2f %7.2f  %12.1f", grid.ranks(), name_of(grid.kind),
        !equal       ? "NO"
        : to_the_bit ? "to the bit"
                     : "cuts",
        extremes(&outcome::mb).second, smallest, largest, mean(&outcome::exchanged_kb));
    if (options_.timed) {
      say("  %9.3f  %11.1f", mean(&outcome::select_ms), mean(&outcome::exchange_us));
    }
    say(" %s\n", cuts(decisions).c_str());
  }

  outcome decide(const deployment& grid, const group& same_heads, const group& same_tokens,
                 std::size_t l) {
    const rank_part part =
        part_of(grid, world_.rank(), options_.shape, options_.tokens, policy_.sinks);
    rank_layer<Device> local(device_, layers_[l], part, options_.window);
    traffic<group> log;
    const head_link<group> to_heads{&same_tokens, &log};
    const token_link<group> to_tokens{&same_heads, &log};
    const auto select = [&] {
      log.clear();
      if (grid.kind == layout::heads) return local.select_heads(policy_, to_heads);
      if (grid.kind == layout::grid) {
        return local.select_tokens(policy_, grid_link<group>{to_heads, to_tokens});
      }
      return local.select_tokens(policy_, to_tokens);
    };
    outcome out{.all = select()};
    out.exchanged_kb = static_cast<double>(bytes_of(log)) / 1e3;
    if (options_.timed) {
      out.select_ms = shortest_ms([&] { (void)select(); });
      out.exchange_us = 1e3 * exchange_ms(log);
    }
    out.mb = static_cast<double>(local.bytes_of(part.token_count())) / 1e6;
    out.mb_kept = static_cast<double>(local.bytes_of(local.compact())) / 1e6;
    out.holds = local.holds(expected_[l]);
    return out;
  }

  // The all-reduces of a layer, alone.
  double exchange_ms(const traffic<group>& log) const {
    index_t largest = 0;
    for (const message<group>& m : log) largest = std::max(largest, m.count);
    const auto zeros = [&]<class T>(T zero) {
      return
          typename Device::template array<T>(std::vector(static_cast<std::size_t>(largest), zero));
    };
    auto sums = zeros(0.0);
    auto words = zeros(std::uint32_t{0});
    return shortest_ms([&] {
      for (const auto& [to, count, bytes] : log) {
        (void)(bytes == sizeof(double) ? to->sum(sums.data(), count)
                                       : to->sum(words.data(), count));
      }
      device_.wait();
    });
  }

  // Of 50 times: whoever shares cores waits for others most of the time.
  template <class F>
  static double shortest_ms(const F& f) {
    double shortest = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 50; ++i) {
      const auto start = std::chrono::steady_clock::now();
      f();
      shortest = std::min(shortest, milliseconds(std::chrono::steady_clock::now() - start).count());
    }
    return shortest;
  }

  static bool near(float a, float b) { return std::abs(a - b) <= 1e-6f; }

  const Device& device_;
  const World& world_;
  options options_;
  refreekv::policy::refreekv policy_;
  std::vector<synthetic_layer> layers_;
  std::vector<refreekv::kept_range> expected_;
  bool all_equal_ = true;
};

}  // namespace distributed
