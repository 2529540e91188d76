// SPDX-License-Identifier: Apache-2.0
// The oracle of the methods that rank tokens: double precision, written as they are stated, without
// regard to speed.
#pragma once

#include <numeric>
#include <optional>
#include <string>

#include "reference.hpp"

namespace reference {

using std::size_t;
using scores = std::vector<double>;  // [token]

/// Float arithmetic cannot distinguish scores that differ by less than near_tie times the largest
/// score plus `smallest`. `smallest` is what a float exponential function may round to.
constexpr double near_tie = 1e-6, smallest = 1e-16;

/// The tokens that a policy keeps in one KV head, and those that it must or may keep under
/// rounding.
struct choice {
  std::vector<bool> kept, must, may;  // [token]
  index_t fewest = 0, most = 0;       // number of kept tokens

  index_t tokens() const { return static_cast<index_t>(kept.size()); }
  std::vector<position_t> positions() const {
    std::vector<position_t> out;
    for (size_t t = 0; t < kept.size(); ++t) {
      if (kept[t]) out.push_back(static_cast<position_t>(t));
    }
    return out;
  }
};

inline std::string text(const std::vector<position_t>& positions) {
  std::string out = "[";
  for (const position_t p : positions) out += (out.size() > 1 ? "," : "") + std::to_string(p);
  return out + "]";
}

/// Returns how `kept` differs from the oracle's choice. Returns an empty string if it does not, or
/// if rounding explains the difference.
inline std::string disagreement(const std::vector<position_t>& kept, const choice& expected) {
  const auto wrong = [&](const std::string& what) {
    return what + ": kept " + text(kept) + ", oracle " + text(expected.positions());
  };
  const auto count = static_cast<index_t>(kept.size());
  if (count < expected.fewest || count > expected.most) {
    return wrong("keeps " + std::to_string(count) + " for " + std::to_string(expected.fewest) +
                 " to " + std::to_string(expected.most));
  }
  std::vector<bool> stays(expected.kept.size(), false);
  position_t last = -1;
  for (const position_t p : kept) {
    if (p <= last) return wrong("not ascending at " + std::to_string(p));
    if (p >= expected.tokens()) return wrong("no token " + std::to_string(p));
    stays[static_cast<size_t>(last = p)] = true;
  }
  for (size_t t = 0; t < stays.size(); ++t) {
    if (stays[t] && !expected.may[t]) return wrong("must not keep " + std::to_string(t));
    if (!stays[t] && expected.must[t]) return wrong("must keep " + std::to_string(t));
  }
  return "";
}

inline choice keep_all(index_t tokens) {
  const std::vector<bool> all(static_cast<size_t>(tokens), true);
  return {all, all, all, tokens, tokens};
}

inline bool any_nan(const std::vector<scores>& heads) {
  for (const scores& of_head : heads) {
    for (const double x : of_head) {
      if (std::isnan(x)) return true;
    }
  }
  return false;
}

/// Positions by score, highest first; equal scores by position, lowest first.
inline std::vector<index_t> descending(const scores& of_head) {
  std::vector<index_t> order(of_head.size());
  std::iota(order.begin(), order.end(), index_t{0});
  std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    return of_head[static_cast<size_t>(a)] > of_head[static_cast<size_t>(b)];
  });
  return order;
}

inline double tolerance(const scores& of_head, double near = near_tie) {
  double largest = 0;
  for (const double x : of_head) largest = std::max(largest, std::abs(x));
  return near * largest + smallest;
}

/// Keeps the `count` best tokens of the scored prefix, and all tokens after it.
inline choice top_k(const scores& prefix, index_t count, index_t tokens, double near = near_tie) {
  const auto ranked = static_cast<index_t>(prefix.size());
  count = std::clamp<index_t>(count, 0, ranked);
  choice out = keep_all(tokens);
  out.fewest = out.most = count + (tokens - ranked);
  const double tol = tolerance(prefix, near);
  const std::vector<index_t> order = descending(prefix);
  for (index_t i = 0; i < ranked; ++i) {
    const auto t = static_cast<size_t>(order[static_cast<size_t>(i)]);
    index_t surely_before = 0, maybe_before = 0;
    for (size_t u = 0; u < prefix.size(); ++u) {
      if (u == t) continue;
      const bool equal = prefix[u] == prefix[t];
      surely_before += equal ? u < t : prefix[u] > prefix[t] + tol;
      maybe_before += equal ? u < t : prefix[u] >= prefix[t] - tol;
    }
    out.kept[t] = i < count;
    out.must[t] = maybe_before < count;
    out.may[t] = surely_before < count;
  }
  return out;
}

/// top_k of each KV head. A NaN in any head keeps all tokens of all heads.
inline std::vector<choice> top_k(const std::vector<scores>& heads, index_t count, index_t tokens,
                                 double near = near_tie) {
  std::vector<choice> out;
  const bool all = any_nan(heads);
  for (const scores& prefix : heads) {
    out.push_back(all ? keep_all(tokens) : top_k(prefix, count, tokens, near));
  }
  return out;
}

/// top_k of each head with its own count: floor * count plus (1 - floor) times the number of its
/// tokens among the heads * count best of all heads. Equal scores rank by head, then by position.
inline std::vector<choice> shared_top_k(const std::vector<scores>& heads, index_t count,
                                        index_t tokens, double floor) {
  if (floor == 1 || any_nan(heads)) return top_k(heads, count, tokens);
  scores all;
  for (const scores& of_head : heads) all.insert(all.end(), of_head.begin(), of_head.end());
  const auto number = [](size_t n) { return static_cast<index_t>(n); };
  count = std::clamp<index_t>(count, 0, number(heads.front().size()));
  const choice best = top_k(all, count * number(heads.size()), number(all.size()));
  std::vector<choice> out;
  for (size_t h = 0; h < heads.size(); ++h) {
    const auto share = [&](const std::vector<bool>& taken) {
      const auto first = taken.begin() + number(h * heads[h].size());
      const auto own = std::count(first, first + number(heads[h].size()), true);
      return static_cast<index_t>(std::nearbyint(floor * static_cast<double>(count) +
                                                 (1 - floor) * static_cast<double>(own)));
    };
    const auto keep = [&](const std::vector<bool>& taken) {
      return top_k(heads[h], share(taken), tokens);
    };
    const choice least = keep(best.must), most = keep(best.may);
    out.push_back({keep(best.kept).kept, least.must, most.may, least.fewest, most.most});
  }
  return out;
}

inline std::vector<choice> keep_all_heads(index_t kv_heads, index_t tokens) {
  return {static_cast<size_t>(kv_heads), keep_all(tokens)};
}

/// Whether a row exists and has no NaN in any query head of a KV head.
inline bool is_usable(const attention_rows& rows, index_t kv_heads, index_t kv_head, index_t row) {
  const index_t group = rows.q_heads / kv_heads;
  bool numbers = rows.exists(row);
  for (index_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (index_t t = 0; t < rows.tokens; ++t) numbers = numbers && !std::isnan(rows.at(h, row, t));
  }
  return numbers;
}

/// The rows, with 0 in those that a KV head's scores leave out because they are not usable.
inline attention_rows usable_rows(attention_rows rows, index_t kv_heads) {
  const index_t group = rows.q_heads / kv_heads;
  for (index_t h = 0; h < rows.q_heads; ++h) {
    for (index_t r = 0; r < rows.window; ++r) {
      if (is_usable(rows, kv_heads, h / group, r)) continue;
      for (index_t t = 0; t < rows.tokens; ++t) {
        rows.values[static_cast<size_t>((h * rows.window + r) * rows.tokens + t)] = 0;
      }
    }
  }
  return rows;
}

/// How many of the last `window` rows exist, and whether any KV head leaves one of them out.
struct row_state {
  index_t there = 0;
  bool left_out = false;
};
inline row_state state_of(const attention_rows& rows, index_t kv_heads, index_t window) {
  row_state out;
  for (index_t r = rows.window - std::min(window, rows.window); r < rows.window; ++r) {
    if (!rows.exists(r)) continue;
    ++out.there;
    for (index_t g = 0; g < kv_heads; ++g) {
      out.left_out = out.left_out || !is_usable(rows, kv_heads, g, r);
    }
  }
  return out;
}

/// Sums the last `window` rows of one query head: [columns], for the first `columns` tokens.
inline scores column_sums(const attention_rows& rows, index_t head, index_t window,
                          index_t columns) {
  scores out(static_cast<size_t>(columns), 0.0);
  for (index_t r = rows.window - std::min(window, rows.window); r < rows.window; ++r) {
    for (index_t t = 0; t < columns; ++t) out[static_cast<size_t>(t)] += rows.at(head, r, t);
  }
  return out;
}

/// Scores of each KV head, [kv_head, token]: the mean over its query heads.
template <class ScoresOfHead>
std::vector<scores> group_means(index_t q_heads, index_t kv_heads, const ScoresOfHead& of_head) {
  const index_t group = q_heads / kv_heads;
  std::vector<scores> out;
  for (index_t g = 0; g < kv_heads; ++g) {
    scores mean = of_head(g * group);
    for (index_t h = g * group + 1; h < (g + 1) * group; ++h) {
      const scores other = of_head(h);
      for (size_t t = 0; t < mean.size(); ++t) mean[t] += other[t];
    }
    for (double& x : mean) x /= static_cast<double>(group);
    out.push_back(mean);
  }
  return out;
}

/// Mean column_sums of each KV head: [kv_head, columns].
inline std::vector<scores> votes(const attention_rows& rows, index_t kv_heads, index_t window,
                                 index_t columns) {
  return group_means(rows.q_heads, kv_heads,
                     [&](index_t h) { return column_sums(rows, h, window, columns); });
}

enum class pool { average, max };

/// Pools with stride 1. Requires an odd width. An average counts tokens outside as 0; a maximum
/// ignores them.
inline scores pooled(const scores& x, pool kind, index_t width) {
  const auto n = static_cast<index_t>(x.size());
  scores out;
  for (index_t t = 0; t < n; ++t) {
    double sum = 0, most = -std::numeric_limits<double>::infinity();
    for (index_t u = std::max<index_t>(0, t - width / 2); u < std::min(n, t + width / 2 + 1); ++u) {
      const double v = x[static_cast<size_t>(u)];
      sum += v;
      most = std::isnan(v) || v > most ? v : most;
    }
    out.push_back(std::isnan(sum)         ? sum
                  : kind == pool::average ? sum / static_cast<double>(width)
                                          : most);
  }
  return out;
}

inline std::vector<scores> pooled(std::vector<scores> heads, pool kind, index_t width) {
  for (scores& x : heads) x = pooled(x, kind, width);
  return heads;
}

inline scores first(const scores& x, index_t count) {
  return {x.begin(), x.begin() + std::clamp<index_t>(count, 0, static_cast<index_t>(x.size()))};
}

// H2O.

struct h2o_result {
  std::vector<choice> kept;  // [kv_head]
  std::vector<scores> sums;  // [kv_head] of all tokens, before tokens are dropped
};

/// Keeps the `recent` last tokens and, up to `budget` tokens in all, those before them with the
/// most attention. carried: [kv_head] of the tokens before the rows; empty for a prefill. Carried
/// scores leave out rows with NaN; such a step keeps all tokens.
inline h2o_result h2o(const attention_rows& rows, index_t kv_heads, index_t budget, index_t recent,
                      index_t window, const std::vector<scores>& carried = {}) {
  const index_t n = rows.tokens;
  if (budget == 0 && recent == 0) recent = 1;  // a cache is never emptied
  const bool carries = !carried.empty();
  h2o_result out{{}, votes(carries ? usable_rows(rows, kv_heads) : rows, kv_heads, window, n)};
  const row_state state = state_of(rows, kv_heads, window);
  for (size_t g = 0; g < carried.size(); ++g) {
    for (index_t t = 0; t < rows.first_new; ++t) {
      out.sums[g][static_cast<size_t>(t)] += carried[g][static_cast<size_t>(t)];
    }
  }
  if (n <= std::max(budget, recent) || any_nan(out.sums) ||
      (carries ? state.left_out : state.there == 0)) {
    out.kept = keep_all_heads(kv_heads, n);
    return out;
  }
  for (const auto& of_head : out.sums) {
    const index_t ranked = std::max<index_t>(0, budget - recent);
    out.kept.push_back(top_k(first(of_head, n - recent), ranked, n));
  }
  return out;
}

// SnapKV and PyramidKV.

/// Votes of the last `window` rows for the prefix, pooled: [kv_head, tokens before the window].
inline std::vector<scores> snapkv_scores(const attention_rows& rows, index_t kv_heads,
                                         index_t window, pool kind, index_t width) {
  const index_t prefix = std::max<index_t>(0, rows.tokens - window);
  return pooled(votes(rows, kv_heads, window, prefix), kind, width);
}

inline std::vector<choice> snapkv(const attention_rows& rows, index_t kv_heads, index_t budget,
                                  index_t window, pool kind, index_t width, double floor = 1) {
  if (rows.tokens <= budget || state_of(rows, kv_heads, window).there == 0) {
    return keep_all_heads(kv_heads, rows.tokens);
  }
  return shared_top_k(snapkv_scores(rows, kv_heads, window, kind, width), budget - window,
                      rows.tokens, floor);
}

enum class pyramid_divisor { layers_less_one, layers };

/// How many tokens a layer keeps besides the window; nullopt if it keeps all.
inline std::optional<index_t> pyramid_budget(index_t tokens, index_t layer, index_t layers,
                                             index_t budget, index_t window, index_t beta,
                                             pyramid_divisor divisor) {
  const index_t base = std::max<index_t>(0, budget - window);
  index_t least = base / beta, most = 2 * base - least;
  const index_t prefix = std::max<index_t>(0, tokens - window);
  if (most >= prefix) {
    most = prefix;
    least = 2 * base - most;
  }
  if (tokens < budget) return {};
  if (tokens < 2 * base) return base;
  const index_t steps = divisor == pyramid_divisor::layers ? layers : layers - 1;
  const index_t step = (most - least) / std::max<index_t>(steps, 1);
  return most - layer * step;
}

// TOVA.

/// Keeps the last token and, up to `budget` tokens in all, those with the most attention of its
/// row, averaged over all query heads.
inline std::vector<choice> tova(const attention_rows& rows, index_t kv_heads, index_t budget) {
  const index_t n = rows.tokens;
  if (n <= std::max<index_t>(budget, 1) || state_of(rows, kv_heads, 1).there == 0) {
    return keep_all_heads(kv_heads, n);
  }
  const std::vector<scores> mean =
      group_means(rows.q_heads, 1, [&](index_t h) { return column_sums(rows, h, 1, n - 1); });
  return {static_cast<size_t>(kv_heads), top_k(mean, budget - 1, n).front()};
}

// CAKE.

struct cake_layer {
  double entropy = 0, variance = 0;
  std::vector<scores> indicators;  // [kv_head] of the prefix
  bool undecided = false;          // a row is left out, or none exists
};

inline cake_layer cake_statistics(const attention_rows& all, index_t kv_heads, index_t window,
                                  double gamma, pool kind = pool::average, index_t width = 5) {
  const index_t w = std::min(window, all.window);
  const index_t prefix = std::max<index_t>(0, all.tokens - window);
  const attention_rows rows = usable_rows(all, kv_heads);
  const row_state state = state_of(all, kv_heads, window);
  cake_layer out;
  out.undecided = state.left_out || state.there == 0;
  out.indicators = group_means(rows.q_heads, kv_heads, [&](index_t h) {
    double count = 0;
    const auto is_used = [&](index_t r) {
      return is_usable(all, kv_heads, h / (rows.q_heads / kv_heads), r);
    };
    for (index_t r = rows.window - w; r < rows.window; ++r) count += is_used(r) ? 1 : 0;
    count = std::max(count, 1.0);
    scores indicator;
    for (index_t t = 0; t < prefix; ++t) {
      double sum = 0, squares = 0;
      for (index_t r = rows.window - w; r < rows.window; ++r) {
        const double a = rows.at(h, r, t);
        sum += a;
        out.entropy -= a * std::log(a + 1e-10);
      }
      const double mean = sum / count;
      for (index_t r = rows.window - w; r < rows.window; ++r) {
        squares += is_used(r) ? (rows.at(h, r, t) - mean) * (rows.at(h, r, t) - mean) : 0;
      }
      const double variance = count > 1 ? squares / (count - 1) : 0;
      out.variance += variance;
      indicator.push_back(mean + gamma * variance);
    }
    return indicator;
  });
  out.indicators = pooled(out.indicators, kind, width);
  return out;
}

/// Entropy counts as 0 if the 1e-10 in its formula makes it negative.
inline double cake_preference(double entropy, double variance, double tau1, double tau2) {
  const auto root = [](double x, double tau) { return std::pow(x < 0 ? 0 : x, 1 / tau); };
  return root(entropy, tau1) * root(variance, tau2);
}

inline double cake_preference(const cake_layer& layer, double tau1, double tau2) {
  return cake_preference(layer.entropy, layer.variance, tau1, tau2);
}

namespace detail {

/// Adds sign * `amount` evenly to the budgets of `layers`; the first ones get the remainder.
inline void spread(std::vector<index_t>& budgets, const std::vector<size_t>& layers, index_t amount,
                   index_t sign) {
  const auto count = static_cast<index_t>(layers.size());
  if (count == 0) return;
  for (index_t i = 0; i < count; ++i) {
    budgets[layers[static_cast<size_t>(i)]] += sign * (amount / count + (i < amount % count));
  }
}

template <class Condition>
std::vector<size_t> layers_where(const std::vector<index_t>& budgets, const Condition& holds) {
  std::vector<size_t> out;
  for (size_t l = 0; l < budgets.size(); ++l) {
    if (holds(budgets[l])) out.push_back(l);
  }
  return out;
}

}  // namespace detail

/// Rounds real budgets to integers; a result may still exceed `available`.
inline std::vector<index_t> cake_adjust(const std::vector<double>& raw, index_t total,
                                        index_t available) {
  std::vector<index_t> budgets;
  index_t excess = 0;
  for (const double x : raw) {
    const auto whole = static_cast<index_t>(x);
    excess += std::max<index_t>(0, whole - available);
    budgets.push_back(std::min(whole, available));
  }
  const auto has_room = [&](index_t b) { return b < available; };
  detail::spread(budgets, detail::layers_where(budgets, has_room), excess, 1);
  const index_t missing = total - std::accumulate(budgets.begin(), budgets.end(), index_t{0});
  if (missing > 0) {
    detail::spread(budgets, detail::layers_where(budgets, has_room), missing, 1);
  } else if (missing < 0) {
    const auto can_lose = [](index_t b) { return b > 1; };
    detail::spread(budgets, detail::layers_where(budgets, can_lose), -missing, -1);
  }
  return budgets;
}

/// Real shares of `total`, proportional to the preferences. Equal shares if a preference is
/// negative, or their sum is not positive and finite.
inline std::vector<double> cake_shares(const std::vector<double>& preferences, index_t total) {
  const double sum = std::accumulate(preferences.begin(), preferences.end(), 0.0);
  const bool negative = std::any_of(preferences.begin(), preferences.end(),
                                    [](double p) { return p < 0; });  // not known yet
  const bool uniform = negative || !(sum > 0) || std::isinf(sum);
  std::vector<double> raw;
  for (const double p : preferences) {
    raw.push_back((uniform ? 1 / static_cast<double>(preferences.size()) : p / sum) *
                  static_cast<double>(total));
  }
  return raw;
}

/// The budgets of the layers so far, without the window.
inline std::vector<index_t> cake_budgets(const std::vector<double>& preferences, index_t total,
                                         index_t available) {
  std::vector<index_t> budgets = cake_adjust(cake_shares(preferences, total), total, available);
  for (index_t& b : budgets) b = std::min(b, available);
  return budgets;
}

/// Decides one step of decoding from one query row, whose tokens are in the order of cache slots.
inline std::vector<choice> cake_decode(const attention_rows& rows, index_t kv_heads, index_t ranked,
                                       index_t window, pool kind = pool::average,
                                       index_t width = 5) {
  const index_t n = rows.tokens;
  if (n <= ranked + window || state_of(rows, kv_heads, 1).there == 0) {
    return keep_all_heads(kv_heads, n);
  }
  return top_k(pooled(votes(rows, kv_heads, 1, n - window), kind, width), ranked, n);
}

// ReFreeKV's ranking by attention.

struct attention_order {
  std::vector<scores> prefix;                // [kv_head]
  std::vector<std::vector<index_t>> orders;  // [kv_head], least important first
  std::vector<double> losses;                // [index]
  index_t tokens = 0, index = 0;             // index: the first kept one in each order
  index_t lowest = 0, highest = 0;           // range of `index` under rounding
  bool all = false;

  choice of(index_t kv_head, index_t count) const {
    if (all) return keep_all(tokens);
    const auto ranked = static_cast<index_t>(losses.size());
    choice out = top_k(prefix[static_cast<size_t>(kv_head)], count - (tokens - ranked), tokens);
    out.fewest = tokens - highest;
    out.most = tokens - lowest;
    return out;
  }
  choice of(index_t kv_head) const { return of(kv_head, tokens - index); }
};

namespace detail {

/// For each index, the norm of the attention in [index, end) of each order, summed over query
/// heads.
inline std::vector<double> suffix_norms(const attention_rows& rows,
                                        const std::vector<std::vector<index_t>>& orders) {
  const index_t group = rows.q_heads / static_cast<index_t>(orders.size());
  std::vector<double> norms(orders.front().size(), 0.0);
  for (index_t h = 0; h < rows.q_heads; ++h) {
    const std::vector<index_t>& order = orders[static_cast<size_t>(h / group)];
    double energy = 0;
    for (size_t i = order.size(); i-- > 0;) {
      const double a = rows.at(h, rows.window - 1, order[i]);
      norms[i] += std::sqrt(energy += a * a);
    }
  }
  return norms;
}

/// Whether rounding may swap the token before `index` with the one at it.
inline bool open_cut(const attention_order& a, size_t index) {
  for (size_t g = 0; g < a.orders.size() && index > 0; ++g) {
    const scores& s = a.prefix[g];
    const double below = s[static_cast<size_t>(a.orders[g][index - 1])];
    const double above = s[static_cast<size_t>(a.orders[g][index])];
    if (above != below && above - below <= tolerance(s)) return true;
  }
  return false;
}

/// Writes the index of a threshold, and its range if scores and losses are rounded.
inline void bound_index(attention_order& a, double threshold) {
  constexpr double off = 1e-6;
  const size_t n = a.losses.size();
  for (size_t i = 0; i < n; ++i) {
    size_t clean_below = i, clean_above = i;
    while (open_cut(a, clean_below)) --clean_below;
    while (clean_above + 1 < n && open_cut(a, clean_above)) ++clean_above;
    const auto index = static_cast<index_t>(i);
    if (a.losses[i] <= threshold) a.index = index;
    if (a.losses[clean_above] <= threshold - off) a.lowest = index;
    if (a.losses[clean_below] <= threshold + off) a.highest = index;
  }
}

}  // namespace detail

/// Ranks the tokens before the `recent` last ones by the last `window` rows. Drops as many of the
/// least important ones as the threshold on the loss of the last row's norm allows.
inline attention_order attention_ranked(const attention_rows& rows, index_t kv_heads,
                                        double threshold, index_t window, index_t recent) {
  attention_order out;
  out.tokens = rows.tokens;
  const index_t ranked = std::max<index_t>(0, rows.tokens - recent);
  out.prefix = votes(rows, kv_heads, window, ranked);
  out.all = ranked == 0 || any_nan(out.prefix);
  if (out.all) return out;
  for (const scores& s : out.prefix) {
    std::vector<index_t> order = descending(s);
    std::reverse(order.begin(), order.end());
    out.orders.push_back(order);
  }
  const std::vector<double> norms = detail::suffix_norms(rows, out.orders);
  const double baseline = norms.front();
  out.all = !(baseline > 0) || std::isinf(baseline);
  if (out.all) return out;
  for (const double norm : norms) out.losses.push_back((baseline - norm) / baseline);
  detail::bound_index(out, threshold);
  return out;
}

// Twilight.

/// Keeps the smallest set of the most probable tokens whose sum reaches `p`; at least one token.
inline choice top_p(const scores& probabilities, double p) {
  constexpr double off = 2e-6, least = 1e-300;  // at least one token for any p
  const auto n = static_cast<index_t>(probabilities.size());
  choice out = keep_all(n);
  const double tol = tolerance(probabilities);
  double before = 0;
  for (const index_t token : descending(probabilities)) {
    const auto t = static_cast<size_t>(token);
    double surely_before = 0, maybe_before = 0;
    for (size_t u = 0; u < probabilities.size(); ++u) {
      const double x = probabilities[u];
      if (u == t) continue;
      if (x == probabilities[t] ? u < t : x > probabilities[t] + tol) surely_before += x;
      if (x == probabilities[t] ? u < t : x >= probabilities[t] - tol) maybe_before += x;
    }
    out.kept[t] = before < std::max(p, least);
    out.must[t] = maybe_before < std::max(p - off, least);
    out.may[t] = surely_before < p + off;
    before += probabilities[t];
  }
  out.fewest = std::min<index_t>(n, 1);
  return out;
}

namespace detail {

/// The lower bound at which the bisection of Twilight's released kernel ends, in its own
/// arithmetic.
inline float kernel_bound(const std::vector<float>& x, float p, float high) {
  float low = 0;
  while (true) {
    const float middle = (low + high) / 2;
    float above = high, below = low, sum = 0;
    for (const float v : x) {
      if (v > low) above = std::min(above, v);
      if (v <= high) below = std::max(below, v);
      if (v > middle) sum += v;
    }
    if (sum >= p) {
      low = middle;
    } else {
      high = std::min(middle, below);
    }
    if (!(below - above > 1e-5f)) return low;
  }
}

}  // namespace detail

/// As the released kernel: a bisection that starts from the first token's probability or, with
/// `from_largest`, from the largest one.
inline choice top_p_kernel(const scores& probabilities, double p, bool from_largest = false) {
  const auto n = static_cast<index_t>(probabilities.size());
  choice out = keep_all(n);
  if (n == 0) return out;
  std::vector<float> x;
  for (const double v : probabilities) x.push_back(static_cast<float>(v));
  const float high = from_largest ? *std::max_element(x.begin(), x.end()) : x.front();
  const float bound = detail::kernel_bound(x, static_cast<float>(p), high);
  const float one = detail::kernel_bound(x, static_cast<float>(p - 2e-6), high);
  const float other = detail::kernel_bound(x, static_cast<float>(p + 2e-6), high);
  for (size_t t = 0; t < x.size(); ++t) {
    out.kept[t] = x[t] > bound;
    out.must[t] = x[t] > std::max({bound, one, other}) + 2e-5f;
    out.may[t] = x[t] > std::min({bound, one, other}) - 2e-5f;
  }
  out.fewest = 0;
  return out;
}

/// The union of the tokens that the query heads of a KV head keep.
inline choice unite(const std::vector<choice>& heads) {
  choice out = heads.front();
  for (const choice& other : heads) {
    for (size_t t = 0; t < out.kept.size(); ++t) {
      out.kept[t] = out.kept[t] || other.kept[t];
      out.must[t] = out.must[t] || other.must[t];
      out.may[t] = out.may[t] || other.may[t];
    }
    out.fewest = std::max(out.fewest, other.fewest);
  }
  out.most = out.tokens();
  return out;
}

/// The last attention row of one query head, [token].
inline scores last_row(const attention_rows& rows, index_t head) {
  return column_sums(rows, head, 1, rows.tokens);
}

inline scores softmax(scores logits) {
  double peak = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double x : logits) peak = std::max(peak, x);
  for (double& x : logits) sum += x = std::exp(x - peak);
  for (double& x : logits) x /= sum;
  return logits;
}

inline scores logits(const scores& query, const std::vector<scores>& keys, double scale) {
  scores out;
  for (const scores& key : keys) {
    out.push_back(scale * std::inner_product(query.begin(), query.end(), key.begin(), 0.0));
  }
  return out;
}

struct quantised {
  std::vector<int> codes;
  scores values;
};

/// Quantises one key: 2^bits - 1 steps from its smallest to its largest element, ties to even.
inline quantised quantise(const scores& key, int bits) {
  const auto [least, largest] = std::minmax_element(key.begin(), key.end());
  const int steps = (1 << bits) - 1;
  const double scale = std::max(*largest - *least, 1e-9) / steps;
  quantised out;
  for (const double x : key) {
    const auto code = static_cast<int>(std::nearbyint((x - *least) / scale));
    out.codes.push_back(std::clamp(code, 0, steps));
    out.values.push_back(out.codes.back() * scale + *least);
  }
  return out;
}

struct page_selection {
  scores bounds;               // [page]
  std::vector<index_t> pages;  // ascending
  std::vector<bool> tokens;    // [token]
  double margin = 0;           // between the bounds of the last selected page and the next one
};

/// Quest: selects the pages with the largest upper bounds on the query's logits, up to `budget`
/// tokens.
inline page_selection quest(const scores& query, const std::vector<scores>& keys,
                            index_t page_tokens, index_t budget) {
  const auto n = static_cast<index_t>(keys.size());
  page_selection out;
  for (index_t start = 0; start < n; start += page_tokens) {
    double score = 0;
    for (size_t d = 0; d < query.size(); ++d) {
      double most = -std::numeric_limits<double>::infinity();
      for (index_t t = start; t < std::min(n, start + page_tokens); ++t) {
        most = std::max(most, query[d] * keys[static_cast<size_t>(t)][d]);
      }
      score += most;
    }
    out.bounds.push_back(score);
  }
  const auto pages = static_cast<index_t>(out.bounds.size());
  const index_t wanted = std::max<index_t>(1, budget / page_tokens) + (budget % page_tokens != 0);
  out.pages = descending(out.bounds);
  out.margin = std::numeric_limits<double>::infinity();
  if (wanted < pages) {
    out.margin = out.bounds[static_cast<size_t>(out.pages[static_cast<size_t>(wanted - 1)])] -
                 out.bounds[static_cast<size_t>(out.pages[static_cast<size_t>(wanted)])];
    out.pages.resize(static_cast<size_t>(wanted));
  }
  std::sort(out.pages.begin(), out.pages.end());
  out.tokens.assign(static_cast<size_t>(n), false);
  for (const index_t page : out.pages) {
    for (index_t t = page * page_tokens; t < std::min(n, (page + 1) * page_tokens); ++t) {
      out.tokens[static_cast<size_t>(t)] = true;
    }
  }
  return out;
}

/// The softmax over the selected tokens alone; 0 elsewhere.
inline scores masked_softmax(scores logits, const std::vector<bool>& selected) {
  for (size_t t = 0; t < logits.size(); ++t) {
    if (!selected[t]) logits[t] = -std::numeric_limits<double>::infinity();
  }
  return softmax(logits);
}

}  // namespace reference
