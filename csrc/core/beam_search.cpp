#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "core/generate.h"

namespace rnnfast {
namespace {

// A beam with one more token.
struct Candidate {
  double log_prob;
  index parent;  // the beam, counted over all rows
  std::int64_t token;

  bool operator<(const Candidate& other) const {  // better ones first
    if (log_prob != other.log_prob) return log_prob > other.log_prob;
    return parent != other.parent ? parent < other.parent : token < other.token;
  }
};

// Adds the `count` best continuations of a beam, in any order.
template <class R>
void add_best(const R* scores, index classes, index count, Candidate start, double shift,
              std::vector<Candidate>& candidates) {
  const auto size = static_cast<index>(candidates.size());
  R least = -std::numeric_limits<R>::infinity();
  for (index token = 0; token < classes; ++token) {
    if (!(scores[token] > least)) continue;
    const double log_prob = start.log_prob + (static_cast<double>(scores[token]) - shift);
    candidates.push_back({log_prob, start.parent, token});
    // A heap of the beam's candidates, the worst first.
    const auto begin = candidates.begin() + size;
    std::push_heap(begin, candidates.end());
    if (candidates.end() - begin > count) {
      std::pop_heap(begin, candidates.end());
      candidates.pop_back();
    }
    if (candidates.end() - begin == count) least = scores[begin->token];
  }
}

// The search of one row of the batch.
struct RowSearch {
  struct Hypothesis {
    double score;
    index last_step, beam;  // the step of its last token, and the beam that had it or that `stop` ended
    bool stopped;
  };
  std::vector<Hypothesis> ended;
  std::vector<Candidate> candidates;
  bool is_done = false;
};

template <class T>
void search_with(const LanguageModel& model, const Search& search, const ModelState& state,
                 const Hypotheses& out, int threads, Pauses pause) {
  const index batch = out.tokens.size(0), beams = search.beams, steps = out.tokens.size(2);
  const index all_beams = batch * beams;
  Steps<T> stack(model, all_beams, threads);
  stack.check(state, batch);
  auto* const lengths = vector<std::int64_t>(out.lengths);
  auto* const scores_out = vector<double>(out.scores);
  std::fill_n(vector<std::int64_t>(out.tokens), all_beams * steps, search.stop);
  std::fill_n(lengths, all_beams, 0);
  std::fill_n(scores_out, all_beams, -std::numeric_limits<double>::infinity());
  if (all_beams == 0 || steps == 0) return;
  stack.read(state, beams);
  Scores<T> scores(model, stack.y(), all_beams, threads);
  const index classes = stack.classes();

  // The live beams of every step: log-probability, parent in the step before, last token.
  std::vector<std::vector<Candidate>> live(1);
  constexpr double impossible = -std::numeric_limits<double>::infinity();
  for (index n = 0; n < all_beams; ++n) live[0].push_back({n % beams ? impossible : 0, n, 0});
  std::vector<RowSearch> rows(static_cast<std::size_t>(batch));
  const auto normalized = [&](double log_prob, index length) {
    return log_prob / std::pow(static_cast<double>(length), search.length_penalty);
  };
  const double seconds = static_cast<double>(all_beams * scores.width()) * 2 * seconds_a_score;
  index taken = 0;  // steps
  std::atomic<index> bad_row{batch};
  for (index t = 0; t < steps; ++t) {
    live.emplace_back();
    const std::vector<Candidate>& now = live[static_cast<std::size_t>(t)];
    std::vector<Candidate>& next = live[static_cast<std::size_t>(t) + 1];
    for (index n = 0; n < all_beams; ++n) next.push_back({impossible, n, 0});
    scores.run();
    for_rows(batch, seconds, threads, [&](index b) {
      RowSearch& row = rows[static_cast<std::size_t>(b)];
      if (row.is_done) return;
      row.candidates.clear();
      for (index n = b * beams; n < (b + 1) * beams; ++n) {
        const double log_prob = now[static_cast<std::size_t>(n)].log_prob;
        if (log_prob == impossible) continue;
        const auto [highest, log_sum] = scores.normalizer(n);
        if (std::isnan(log_sum)) {
          index lowest = bad_row;
          while (b < lowest && !bad_row.compare_exchange_weak(lowest, b)) continue;
          return;
        }
        add_best(scores.row(n), classes, 2 * beams, {log_prob, n, 0},
                 static_cast<double>(highest) + log_sum, row.candidates);
      }
      std::sort(row.candidates.begin(), row.candidates.end());
      index rank = 0, survivors = 0;
      for (const Candidate& candidate : row.candidates) {
        if (candidate.token != search.stop && survivors < beams)
          next[static_cast<std::size_t>(b * beams + survivors++)] = candidate;
        else if (candidate.token == search.stop && rank < beams)
          row.ended.push_back({normalized(candidate.log_prob, t + 1), t, candidate.parent, true});
        ++rank;
      }
      row.is_done = survivors == 0 || static_cast<index>(row.ended.size()) >= beams;
    });
    if (bad_row < batch) throw BadScores(bad_row, t);
    taken = t + 1;
    const bool all_done =
        std::all_of(rows.begin(), rows.end(), [](const RowSearch& row) { return row.is_done; });
    if (all_done || t + 1 == steps) break;
    std::vector<index> parents;
    std::vector<std::int64_t> tokens;
    for (const Candidate& beam : next) {
      parents.push_back(beam.parent);
      tokens.push_back(beam.token);
    }
    stack.reorder(parents);
    stack.step(tokens.data(), nullptr);
    pause();
  }

  for (index b = 0; b < batch; ++b) {
    auto& ended = rows[static_cast<std::size_t>(b)].ended;
    if (static_cast<index>(ended.size()) < beams)
      for (index n = b * beams; n < (b + 1) * beams; ++n) {
        const double log_prob =
            live[static_cast<std::size_t>(taken)][static_cast<std::size_t>(n)].log_prob;
        if (log_prob != impossible) ended.push_back({normalized(log_prob, taken), taken - 1, n, false});
      }
    std::stable_sort(ended.begin(), ended.end(),
                     [](const auto& x, const auto& y) { return x.score > y.score; });
    for (index k = 0; k < std::min<index>(beams, static_cast<index>(ended.size())); ++k) {
      const RowSearch::Hypothesis& hypothesis = ended[static_cast<std::size_t>(k)];
      auto* const tokens = vector<std::int64_t>(out.tokens) + (b * beams + k) * steps;
      index beam = hypothesis.beam, t = hypothesis.last_step;
      lengths[b * beams + k] = t + 1;
      scores_out[b * beams + k] = hypothesis.score;
      if (hypothesis.stopped) tokens[t--] = search.stop;
      for (; t >= 0; --t) {
        const Candidate& link = live[static_cast<std::size_t>(t) + 1][static_cast<std::size_t>(beam)];
        tokens[t] = link.token;
        beam = link.parent;
      }
    }
  }
}

}  // namespace

void beam_search(const LanguageModel& model, const Search& search, const ModelState& state,
                 const Hypotheses& out, int threads, const std::function<void()>& pause) {
  if (out.tokens.dims() != 3) throw std::invalid_argument("tokens is not [B, beams, steps]");
  const index batch = out.tokens.size(0), beams = search.beams, steps = out.tokens.size(2);
  if (beams < 1)
    throw std::invalid_argument("beams is " + std::to_string(beams) + "; expected at least 1");
  require_dense(out.tokens, Dtype::int64, {batch, beams, steps});
  require_dense(out.lengths, Dtype::int64, {batch, beams});
  require_dense(out.scores, Dtype::float64, {batch, beams});
  with_numbers(state.y.dtype(), [&](auto number) {
    search_with<decltype(number)>(model, search, state, out, threads, Pauses(pause));
  });
}

}  // namespace rnnfast
