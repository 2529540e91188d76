// SPDX-License-Identifier: Apache-2.0
// The oracle of policy::faithful: double precision, written as stated, without regard to speed.
#pragma once

#include "policy_reference.hpp"

namespace reference {

using refreekv::token_range;
using vectors = std::vector<scores>;  // [row, dim]

/// One sequence of a layer, decided by policy::faithful.
class faithful_layer {
 public:
  using rule_type = refreekv::policy::faithful;

  faithful_layer(const rule_type& policy, const problem& p, const plain_rows& values,
                 index_t sequence)
      : policy_(policy),
        p_(p),
        values_(values),
        s_(sequence),
        tokens_(p.lengths[static_cast<size_t>(sequence)]),
        attention_(attend(p, sequence)) {
    const index_t looked = std::max<index_t>(p.first_row(sequence),
                                             p.window - std::min<index_t>(policy.window, p.window));
    for (index_t r = looked; r < p.window; ++r) rows_.push_back(r);
    begin_ = tokens_;
    for (const index_t r : rows_) {
      for (index_t t = tokens_ - 1; t >= 0; --t)
        begin_ = p.sees(s_, r, t) ? std::min(begin_, t) : begin_;
    }
    const index_t last = std::max<index_t>(1, std::min<index_t>(policy.recent, tokens_ / 4));
    first_ = std::max<index_t>(policy.sinks, begin_);
    end_ = std::max(first_, tokens_ - last);
    undecided_ = tokens_ > 0 && rows_.empty();
    if (tokens_ == 0 || undecided_) return;
    find_scores();
  }

  bool undecided() const { return undecided_; }
  bool all_stay() const { return undecided_ || first_ == end_; }
  index_t candidates() const { return end_ - first_; }  // of a KV head
  index_t kv_heads() const { return p_.keys.kv_heads; }

  /// How many candidates a size keeps in one ranking: of all KV heads or, with cut_scope::layer,
  /// of each.
  index_t kept_by(index_t size) const {
    const index_t count = by_layer() ? candidates() : candidates() * kv_heads();
    return (count * size + policy_.sizes - 1) / policy_.sizes;
  }
  /// The candidates' scores of each ranking, head by head.
  vectors rankings() const {
    vectors out;
    for (index_t h = 0; h < kv_heads(); ++h) {
      const scores& of_head = scores_[static_cast<size_t>(h)];
      if (h == 0 || by_layer()) out.emplace_back();
      out.back().insert(out.back().end(), of_head.begin() + first_, of_head.begin() + end_);
    }
    return out;
  }
  /// Whether float rounding may swap a size's last token with the next one: their scores differ by
  /// at most 1e-6, relative to the last token's score.
  bool is_near_tie(index_t size) const {
    for (const scores& ranking : rankings()) {
      const std::vector<index_t> order = descending(ranking);
      const auto at = static_cast<size_t>(kept_by(size));
      if (at == 0 || at >= order.size()) continue;
      const double last = ranking[static_cast<size_t>(order[at - 1])];
      const double next = ranking[static_cast<size_t>(order[at])];
      if (last - next <= near_tie * last) return true;
    }
    return false;
  }
  /// Whether a size keeps each token: [kv_head, token].
  std::vector<std::vector<bool>> kept(index_t size) const {
    std::vector<std::vector<bool>> out(static_cast<size_t>(kv_heads()),
                                       std::vector<bool>(static_cast<size_t>(tokens_), true));
    if (all_stay()) return out;
    for (auto& head : out) {
      for (index_t t = policy_.sinks; t < end_; ++t) head[static_cast<size_t>(t)] = false;
    }
    index_t head = 0;
    for (const scores& ranking : rankings()) {
      const std::vector<index_t> order = descending(ranking);
      for (index_t i = 0; i < kept_by(size); ++i) {
        const index_t at = order[static_cast<size_t>(i)];
        out[static_cast<size_t>(head + at / candidates())]
           [static_cast<size_t>(first_ + at % candidates())] = true;
      }
      ++head;
    }
    return out;
  }

  /// The share of the scores that a size drops, and its mean relative error of the outputs.
  struct cost {
    double lost, error;
  };
  cost cost_of(index_t size) const {
    const auto stays = kept(size);
    double lost = 0, total = 0, error = 0, measured = 0;
    for (index_t h = 0; h < kv_heads(); ++h) {
      for (index_t t = first_; t < end_; ++t) {
        const double score = scores_[static_cast<size_t>(h)][static_cast<size_t>(t)];
        total += score;
        if (!stays[static_cast<size_t>(h)][static_cast<size_t>(t)]) lost += score;
      }
      if (policy_.error_term) add_error(h, stays[static_cast<size_t>(h)], error, measured);
    }
    return {lost / total, error / measured};
  }

  /// The tokens of one KV head that each stand-in replaces: the dropped tokens of each block.
  std::vector<std::vector<index_t>> blocks(const std::vector<bool>& stays) const {
    std::vector<std::vector<index_t>> out;
    index_t dropped = 0;
    for (index_t t = begin_; t < tokens_; ++t) {
      if (stays[static_cast<size_t>(t)]) continue;
      if (out.empty() || out.back().back() / policy_.block != t / policy_.block) out.emplace_back();
      out.back().push_back(t);
      ++dropped;
    }
    if (!policy_.stand_ins || dropped < 2) out.clear();
    return out;
  }

  /// Keys and values of the stand-ins of one KV head: one per block that drops a token, or `count`
  /// if that is more.
  std::pair<vectors, vectors> stand_ins(index_t h, const std::vector<bool>& stays,
                                        size_t count = 0) const {
    std::pair<vectors, vectors> out;
    const auto lost = blocks(stays);
    if (lost.empty()) return out;
    const vectors map = correction(h);
    size_t spare = std::max(count, lost.size()) - lost.size();
    for (const auto& block : lost) {
      const size_t parts = std::min(block.size(), 1 + spare);
      spare -= parts - 1;
      for (size_t part = 0; part < parts; ++part) {
        std::vector<index_t> own;
        for (size_t i = 0; i < block.size(); ++i) {
          if (i * parts / block.size() == part) own.push_back(block[i]);
        }
        const auto [key, value] = stand_in(h, own, map);
        out.first.push_back(key);
        out.second.push_back(value);
      }
    }
    return out;
  }

 private:
  bool by_layer() const { return policy_.scope == refreekv::cut_scope::layer; }
  double scale() const {
    return p_.scale > 0 ? double{p_.scale} : 1 / std::sqrt(static_cast<double>(p_.head_dim));
  }
  double query(index_t q_head, index_t row, index_t d) const {
    return scale() * double{p_.query(s_, row, q_head, d)};
  }
  double capped(double x) const {
    return p_.soft_cap > 0 ? double{p_.soft_cap} * std::tanh(x / double{p_.soft_cap}) : x;
  }
  double logit(index_t q_head, index_t row, const scores& key) const {
    double dot = 0;
    for (index_t d = 0; d < p_.head_dim; ++d)
      dot += query(q_head, row, d) * key[static_cast<size_t>(d)];
    return capped(dot);
  }
  scores key(index_t h, index_t t) const {
    scores out;
    for (index_t d = 0; d < p_.head_dim; ++d) out.push_back(double{p_.key(s_, h, t, d)});
    return out;
  }
  scores value(index_t h, index_t t) const {
    scores out;
    for (index_t d = 0; d < values_.head_dim; ++d) out.push_back(double{values_.at(s_, h, t, d)});
    return out;
  }
  static double length(const scores& x) {
    double sum = 0;
    for (const double v : x) sum += v * v;
    return std::sqrt(sum);
  }
  /// Calls f(q_head, row) for all rows of a KV head's group.
  template <class F>
  void for_each_row(index_t h, const F& f) const {
    for (index_t g = 0; g < p_.group; ++g) {
      for (const index_t r : rows_) f(h * p_.group + g, r);
    }
  }

  void find_scores() {
    for (index_t h = 0; h < kv_heads(); ++h) {
      scores anchor(static_cast<size_t>(p_.head_dim), 0.0);
      for (index_t t = begin_; t < tokens_; ++t) {
        const scores k = key(h, t);
        const double norm = length(k);
        for (size_t d = 0; d < anchor.size(); ++d) anchor[d] += norm == 0 ? 0 : k[d] / norm;
      }
      const double norm = length(anchor);
      const bool cancels = norm <= 1e-12 * static_cast<double>(tokens_);
      for (double& a : anchor) a = cancels ? 0 : a / norm;
      const double sigma = spread(h);
      scores_.emplace_back(static_cast<size_t>(tokens_), 0.0);
      for (index_t t = begin_; t < tokens_; ++t) {
        double peak = 0, along = 0;
        for (index_t g = 0; g < p_.group; ++g) {
          double most = 0;
          for (const index_t r : rows_) {
            const double a = attention_.at(h * p_.group + g, r, t);
            most = std::isnan(a) || a > most ? a : most;
          }
          const double last = attention_.at(h * p_.group + g, rows_.back(), t);
          peak += (most + policy_.last_row * last) / static_cast<double>(p_.group);
        }
        const scores k = key(h, t);
        for (size_t d = 0; d < anchor.size(); ++d) along += anchor[d] * k[d];
        const double distance = length(k) == 0 ? 1 : 1 - along / length(k);
        const double score =
            (peak + policy_.prior) * (distance < 0 ? 0 : distance) * length(value(h, t)) * sigma;
        scores_.back()[static_cast<size_t>(t)] = score;
        undecided_ = undecided_ || !std::isfinite(score);
      }
    }
    // A soft cap would turn an infinite query into a finite logit.
    for (index_t h = 0; h < kv_heads(); ++h) {
      for_each_row(h, [&](index_t q_head, index_t r) {
        for (index_t d = 0; d < p_.head_dim; ++d) {
          undecided_ = undecided_ || !std::isfinite(query(q_head, r, d));
        }
        // The logit of a token that the row does not see may also be infinite.
        for (index_t t = begin_; t < tokens_; ++t) {
          undecided_ = undecided_ || !(std::abs(logit(q_head, r, key(h, t))) <= 3e38);
        }
        // A row without a softmax has NaN for all tokens that it sees.
        for (index_t t = 0; t < tokens_; ++t) {
          undecided_ = undecided_ || std::isnan(attention_.at(q_head, r, t));
        }
      });
    }
  }

  double spread(index_t h) const {
    if (rows_.size() < 2) return 1;
    const index_t first = std::min(begin_ + 4, tokens_ - 1),
                  end = std::max(first + 1, tokens_ - 16);
    double squares = 0;
    for (index_t t = first; t < end; ++t) {
      const scores k = key(h, t);
      double of_heads = 0;
      for (index_t g = 0; g < p_.group; ++g) {
        double mean = 0, variance = 0;
        for (const index_t r : rows_) mean += logit(h * p_.group + g, r, k);
        mean /= static_cast<double>(rows_.size());
        for (const index_t r : rows_) variance += std::pow(logit(h * p_.group + g, r, k) - mean, 2);
        of_heads += std::sqrt(variance / static_cast<double>(rows_.size()));
      }
      squares += std::pow(of_heads / static_cast<double>(p_.group), 2);
    }
    return std::sqrt(squares / static_cast<double>(end - first));
  }

  /// (X^T X + ridge * tr / d * I)^-1 X^T, [dim, row], by Gauss and Jordan.
  vectors correction(index_t h) const {
    const auto dims = static_cast<size_t>(p_.head_dim);
    vectors x;
    for_each_row(h, [&](index_t q_head, index_t r) {
      x.emplace_back();
      for (index_t d = 0; d < p_.head_dim; ++d) x.back().push_back(query(q_head, r, d));
    });
    vectors system(dims, scores(dims + x.size(), 0.0));
    double trace = 0;
    for (size_t i = 0; i < dims; ++i) {
      for (size_t r = 0; r < x.size(); ++r) {
        for (size_t k = 0; k < dims; ++k) system[i][k] += x[r][i] * x[r][k];
        system[i][dims + r] = x[r][i];
      }
      trace += system[i][i];
    }
    vectors map(dims, scores(x.size(), 0.0));
    if (!(trace > 0)) return map;
    for (size_t i = 0; i < dims; ++i)
      system[i][i] += policy_.ridge * trace / static_cast<double>(dims);
    for (size_t i = 0; i < dims; ++i) {
      for (double& v : system[i]) v = &v == &system[i][i] ? v : v / system[i][i];
      system[i][i] = 1;
      for (size_t k = 0; k < dims; ++k) {
        const double factor = system[k][i];
        for (size_t c = 0; k != i && c < system[k].size(); ++c)
          system[k][c] -= factor * system[i][c];
      }
    }
    for (size_t i = 0; i < dims; ++i) {
      for (size_t r = 0; r < x.size(); ++r) map[i][r] = system[i][dims + r];
    }
    return map;
  }

  std::pair<scores, scores> stand_in(index_t h, const std::vector<index_t>& block,
                                     const vectors& map) const {
    scores weights;
    double total = 0;
    for (const index_t t : block) {
      double sum = 0;
      for_each_row(h, [&](index_t q_head, index_t r) { sum += attention_.at(q_head, r, t); });
      weights.push_back(sum / static_cast<double>(p_.group * static_cast<index_t>(rows_.size())) +
                        1e-12);
      total += weights.back();
    }
    std::pair<scores, scores> out{scores(static_cast<size_t>(p_.head_dim), 0.0),
                                  scores(static_cast<size_t>(values_.head_dim), 0.0)};
    for (size_t i = 0; i < block.size(); ++i) {
      const scores k = key(h, block[i]), v = value(h, block[i]);
      for (size_t d = 0; d < k.size(); ++d) out.first[d] += weights[i] / total * k[d];
      for (size_t d = 0; d < v.size(); ++d) out.second[d] += weights[i] / total * v[d];
    }
    const scores start = out.first;
    size_t at = 0;
    for_each_row(h, [&](index_t q_head, index_t r) {
      double dot = 0, most = -std::numeric_limits<double>::infinity(), sum = 0;
      for (size_t d = 0; d < start.size(); ++d)
        dot += query(q_head, r, static_cast<index_t>(d)) * start[d];
      for (const index_t t : block) most = std::max(most, logit(q_head, r, key(h, t)));
      for (const index_t t : block) sum += std::exp(logit(q_head, r, key(h, t)) - most);
      double wanted = most + std::log(sum);
      if (p_.soft_cap > 0) {
        const double cap = double{p_.soft_cap};
        wanted = cap * std::atanh(std::clamp(wanted / cap, -0.9, 0.9));
      }
      for (size_t d = 0; d < start.size(); ++d) out.first[d] += map[d][at] * (wanted - dot);
      ++at;
    });
    return out;
  }

  void add_error(index_t h, const std::vector<bool>& stays, double& error, double& measured) const {
    const auto [keys, values] = stand_ins(h, stays);
    for (index_t g = 0; g < p_.group; ++g) {
      for (size_t i = 0; i < rows_.size(); ++i) {
        if ((rows_.size() - 1 - i) % policy_.error_rows != 0) continue;
        const index_t q_head = h * p_.group + g, row = rows_[i];
        const auto dims = static_cast<size_t>(values_.head_dim);
        scores whole(dims, 0.0), rest(dims, 0.0);
        double left = 0, all = 0, log_sum = 0;
        for (index_t t = 0; t < tokens_; ++t) {
          const double a = attention_.at(q_head, row, t);
          if (a == 0) continue;  // an unseen token's key or value may be NaN
          log_sum = logit(q_head, row, key(h, t)) + slope(q_head, row, t) - std::log(a);
          const scores v = value(h, t);
          for (size_t d = 0; d < dims; ++d) {
            whole[d] += a * v[d];
            if (stays[static_cast<size_t>(t)]) rest[d] += a * v[d];
          }
          all += a;
          if (stays[static_cast<size_t>(t)]) left += a;
        }
        for (size_t j = 0; j < keys.size(); ++j) {
          const double a = std::exp(logit(q_head, row, keys[j]) - log_sum);
          left += a;
          for (size_t d = 0; d < dims; ++d) rest[d] += a * values[j][d];
        }
        if (!p_.sink_logits.empty()) left += 1 - all;
        double distance = 0;
        for (size_t d = 0; d < dims; ++d) {
          distance += std::pow(rest[d] / left - whole[d], 2);
        }
        error += std::sqrt(distance) / (length(whole) + 1e-9);
        measured += 1;
      }
    }
  }
  double slope(index_t q_head, index_t row, index_t t) const {
    if (p_.alibi_slopes.empty()) return 0;
    return double{p_.alibi_slopes[static_cast<size_t>(q_head)]} *
           static_cast<double>(t - (tokens_ - p_.window + row));
  }

  const rule_type& policy_;
  const problem& p_;
  const plain_rows& values_;
  index_t s_, tokens_;
  attention_rows attention_;
  std::vector<index_t> rows_;  // existing rows of the window
  index_t begin_ = 0, first_ = 0, end_ = 0;
  bool undecided_ = false;
  std::vector<scores> scores_;  // [kv_head]
};

}  // namespace reference
