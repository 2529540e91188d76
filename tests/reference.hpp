// SPDX-License-Identifier: Apache-2.0
// The oracle: policy::refreekv in double precision, written as the paper states it, without regard
// to speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.hpp"

namespace reference {

using refreekv::index_t;

/// Attention of one sequence; 0 where a row does not see a token or does not exist.
struct attention_rows {
  index_t q_heads, window, tokens;
  std::vector<double> values;    // [q_head, window, token]
  std::vector<char> layer = {};  // [window, token]; empty: all rows exist and are causal
  index_t first_new =
      tokens - std::min(window, tokens);  // tokens from here on have no earlier score

  double at(index_t head, index_t row, index_t token) const {
    return values[static_cast<std::size_t>((head * window + row) * tokens + token)];
  }
  bool sees(index_t row, index_t token) const {
    return layer.empty() ? token <= tokens - window + row
                         : layer[static_cast<std::size_t>(row * tokens + token)] != 0;
  }
  bool exists(index_t row) const {
    for (index_t t = 0; t < tokens; ++t) {
      if (sees(row, t)) return true;
    }
    return false;
  }
};

inline attention_rows attend(const problem& p, index_t sequence) {
  const index_t n = p.lengths[static_cast<std::size_t>(sequence)], q_heads = p.q_heads();
  attention_rows out{q_heads, p.window, n, {}};
  const double scale =
      p.scale > 0 ? double{p.scale} : 1 / std::sqrt(static_cast<double>(p.head_dim));
  for (index_t h = 0; h < q_heads; ++h) {
    for (index_t r = 0; r < p.window; ++r) {
      std::vector<double> x(static_cast<std::size_t>(n), -std::numeric_limits<double>::infinity());
      double peak = p.sink_logits.empty() ? -std::numeric_limits<double>::infinity()
                                          : double{p.sink_logits[static_cast<std::size_t>(h)]};
      for (index_t t = 0; t < n; ++t) {
        if (!p.sees(sequence, r, t)) continue;
        double dot = 0;
        for (index_t d = 0; d < p.head_dim; ++d) {
          dot += double{p.query(sequence, r, h, d)} * double{p.key(sequence, h / p.group, t, d)};
        }
        dot *= scale;
        if (p.soft_cap > 0) dot = double{p.soft_cap} * std::tanh(dot / double{p.soft_cap});
        if (!p.alibi_slopes.empty()) {
          dot += double{p.alibi_slopes[static_cast<std::size_t>(h)]} *
                 static_cast<double>(t - (n - p.window + r));
        }
        x[static_cast<std::size_t>(t)] = dot;
        peak = std::max(peak, dot);
      }
      double sum = p.sink_logits.empty()
                       ? 0
                       : std::exp(double{p.sink_logits[static_cast<std::size_t>(h)]} - peak);
      for (double& v : x) sum += v = std::exp(v - peak);
      const bool exists = r >= p.first_row(sequence);
      for (double v : x) out.values.push_back(exists ? v / sum : 0);
    }
  }
  for (index_t r = 0; r < p.window; ++r) {
    for (index_t t = 0; t < n; ++t) out.layer.push_back(p.sees(sequence, r, t));
  }
  out.first_new = p.row_ends.empty() ? n - p.window + p.first_row(sequence) : n;
  return out;
}

struct decision {
  index_t sinks, cut;
  std::vector<double> losses;  // [token], from `sinks` on
  std::vector<double> masses;  // [token]: the largest attention of a row to [sinks, token)
};

/// The decision for query heads [first, last), from section 1 of the paper's statement.
inline decision decide(const attention_rows& rows, index_t first, index_t last,
                       const refreekv::policy::refreekv& policy) {
  const index_t n = rows.tokens, m = std::min<index_t>(policy.sinks, n);
  decision d{m, m, std::vector<double>(static_cast<std::size_t>(n), 0.0),
             std::vector<double>(static_cast<std::size_t>(n), 0.0)};
  const index_t window = std::min<index_t>(policy.window, rows.window);
  const index_t skipped = rows.window - window;
  std::vector<double> norms(static_cast<std::size_t>(n), 0.0);
  for (index_t h = first; h < last; ++h) {
    std::vector<double> energy(static_cast<std::size_t>(n), 0.0);
    for (index_t t = 0; t < n; ++t) {
      double sum = 0, squares = 0, layer = 0;
      for (index_t r = skipped; r < rows.window; ++r) {
        if (!rows.sees(r, t)) continue;
        sum += rows.at(h, r, t);
        squares += rows.at(h, r, t) * rows.at(h, r, t);
        layer += 1;
      }
      const double mean = layer > 0 ? sum / layer : 0;
      energy[static_cast<std::size_t>(t)] =
          policy.average == refreekv::row_average::mean ? mean * mean : squares;
    }
    double outside = 0;
    if (policy.norm == refreekv::norm_scope::full_row) {
      for (index_t t = 0; t < m; ++t) outside += energy[static_cast<std::size_t>(t)];
    }
    double suffix = outside;
    for (index_t t = n - 1; t >= m; --t) {
      suffix += energy[static_cast<std::size_t>(t)];
      norms[static_cast<std::size_t>(t)] += std::sqrt(suffix) / static_cast<double>(last - first);
    }
    for (index_t r = skipped; r < rows.window; ++r) {
      double mass = 0;
      for (index_t t = m; t < n; ++t) {
        double& most = d.masses[static_cast<std::size_t>(t)];
        most = std::max(most, mass);
        mass += rows.at(h, r, t);
      }
    }
  }
  if (n <= m) return d;
  const double baseline = norms[static_cast<std::size_t>(m)];
  if (!(baseline > 0) || std::isinf(baseline)) return d;
  for (index_t t = m; t < n; ++t) {
    const double loss = 1 - norms[static_cast<std::size_t>(t)] / baseline;
    d.losses[static_cast<std::size_t>(t)] = loss;
    if (loss <= policy.threshold) d.cut = t;
  }
  return d;
}

/// Returns how `kept` differs from the oracle's decision; empty if it does not. Cuts may differ
/// only where the loss is within 1e-6 of the threshold. Loss and dropped mass may differ by 1e-5.
inline std::string disagreement(const refreekv::kept_range& kept, const decision& d,
                                double threshold) {
  const auto text = [&](const std::string& what) {
    return what + ": kept sinks " + std::to_string(kept.sinks) + " cut " +
           std::to_string(kept.cut) + " loss " + std::to_string(kept.loss) + " mass " +
           std::to_string(kept.dropped_mass) + ", oracle cut " + std::to_string(d.cut);
  };
  const auto n = static_cast<index_t>(d.losses.size());
  if (kept.tokens != n || kept.sinks != d.sinks) return text("tokens or sinks");
  if (n <= d.sinks) return kept.cut == n ? "" : text("identity");
  if (kept.cut < kept.sinks || kept.cut >= n) return text("range");
  const auto loss = [&](index_t cut) { return d.losses[static_cast<std::size_t>(cut)]; };
  if (kept.cut > d.cut && loss(kept.cut) > threshold + 1e-6) return text("cut too far");
  if (kept.cut < d.cut && loss(kept.cut + 1) < threshold - 1e-6) return text("cut too early");
  if (!(std::abs(double{kept.loss} - loss(kept.cut)) <= 1e-5)) {
    return text("loss " + std::to_string(loss(kept.cut)));
  }
  const double mass = d.masses[static_cast<std::size_t>(kept.cut)];
  if (!(std::abs(double{kept.dropped_mass} - mass) <= 1e-5)) {
    return text("mass " + std::to_string(mass));
  }
  return "";
}

}  // namespace reference
