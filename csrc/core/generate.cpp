#include "core/generate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace rnnfast {
namespace {

// Of the `kept` largest weights, how many it takes until their sum reaches top_p of that of all `kept`.
template <class R>
index nucleus(const R* weights, index classes, index kept, double top_p) {
  static thread_local std::vector<R> sorted;
  sorted.assign(weights, weights + classes);
  const auto end = sorted.begin() + kept;
  if (kept < classes) std::nth_element(sorted.begin(), end, sorted.end(), std::greater<>());
  double total = 0, sum = 0;
  for (auto weight = sorted.begin(); weight != end; ++weight) total += static_cast<double>(*weight);
  auto begin = sorted.begin();
  // Sorts only as many as are needed: 64, then four times as many.
  for (index count = 64; begin != end; count *= 4) {
    const auto middle = end - begin > count ? begin + count : end;
    if (middle != end) std::nth_element(begin, middle, end, std::greater<>());
    std::sort(begin, middle, std::greater<>());
    for (; begin != middle; ++begin)
      if ((sum += static_cast<double>(*begin)) >= top_p * total) return begin - sorted.begin() + 1;
  }
  return kept;
}

// The n-th highest score.
template <class R>
R nth_score(const R* scores, index classes, index n) {
  static thread_local std::vector<R> sorted;
  sorted.assign(scores, scores + classes);
  std::nth_element(sorted.begin(), sorted.begin() + (n - 1), sorted.end(), std::greater<>());
  return sorted[static_cast<std::size_t>(n - 1)];
}

// The lowest score of the tokens that stay. The scores decide and not the weights, since at a high
// temperature different scores have the same weight.
template <class R>
R least_score(const R* scores, const R* weights, index classes, const Sampling& sampling) {
  R least = -std::numeric_limits<R>::infinity();
  index kept = classes;
  if (sampling.top_k > 0 && sampling.top_k < classes) {
    least = nth_score(scores, classes, sampling.top_k);
    kept = std::count_if(scores, scores + classes, [&](R score) { return score >= least; });
  }
  if (sampling.top_p >= 1) return least;
  return nth_score(scores, classes, nucleus(weights, classes, kept, sampling.top_p));
}

struct Draw {
  std::int64_t token;
  double log_prob;  // NaN where the scores are not numbers
};

template <class T>
Draw draw(const Scores<T>& scores, index row, index classes, const Sampling& sampling, double uniform) {
  using R = Real<T>;
  const auto [highest, log_sum] = scores.normalizer(row);
  if (std::isnan(log_sum)) return {0, log_sum};
  const R* const score = scores.row(row);
  index token = 0;
  const auto scale = static_cast<R>(1 / sampling.temperature);
  if (!std::isfinite(scale)) {  // the temperature is 0, or too small to divide by
    while (token + 1 < classes && score[token] != highest) ++token;
  } else {
    R* const weights = scores.weights(row);
    // At a scale of 0, the score -infinity of an impossible token would become NaN.
    auto sum = static_cast<double>(scores.kernel().weigh(
        score, scores.width(), highest, std::max(scale, std::numeric_limits<R>::min()), weights));
    if (sampling.top_k > 0 || sampling.top_p < 1) {
      const R least = least_score(score, weights, classes, sampling);
      sum = 0;
      for (index k = 0; k < classes; ++k) {
        if (score[k] < least) weights[k] = 0;
        sum += static_cast<double>(weights[k]);
      }
    }
    const auto target = static_cast<R>(uniform * sum);
    token = scores.kernel().find(weights, scores.width(), target);
  }
  return {token, static_cast<double>(score[token]) - static_cast<double>(highest) - log_sum};
}

template <class T>
void generate_with(const LanguageModel& model, const Sampling& sampling, const ModelState& state,
                   const View& uniforms, const Generated& out, int threads, Pauses pause) {
  const index batch = out.tokens.size(0), steps = out.tokens.size(1);
  Steps<T> stack(model, batch, threads);
  stack.check(state, batch);
  if (batch == 0 || steps == 0) return;
  stack.read(state, 1);
  Scores<T> scores(model, stack.y(), batch, threads);
  const index classes = stack.classes();
  auto* const tokens = vector<std::int64_t>(out.tokens);
  auto* const lengths = vector<std::int64_t>(out.lengths);
  auto* const log_probs = vector<double>(out.log_probs);
  const auto* const uniform = vector<const double>(uniforms);
  std::vector<std::int64_t> latest(static_cast<std::size_t>(batch), 0), running(latest.size(), 1);
  std::vector<index> rows;  // those that run
  std::fill_n(lengths, batch, steps);
  std::fill_n(log_probs, batch, 0.0);
  const double seconds = static_cast<double>(batch * scores.width()) * seconds_a_score;
  for (index t = 0; t < steps; ++t) {
    scores.run();
    for_rows(batch, seconds, threads, [&](index b) {
      const auto row = static_cast<std::size_t>(b);
      if (!running[row]) {
        tokens[b * steps + t] = sampling.stop;
        return;
      }
      const Draw drawn = draw(scores, b, classes, sampling, uniform[t * batch + b]);
      tokens[b * steps + t] = latest[row] = drawn.token;
      log_probs[b] += drawn.log_prob;
    });
    rows.clear();
    for (index b = 0; b < batch; ++b) {
      std::int64_t& is_running = running[static_cast<std::size_t>(b)];
      if (is_running && std::isnan(log_probs[b])) throw BadScores(b, t);
      if (is_running && latest[static_cast<std::size_t>(b)] == sampling.stop) {
        is_running = 0;
        lengths[b] = t + 1;
      }
      if (is_running) rows.push_back(b);
    }
    if (rows.empty())
      for (index b = 0; b < batch; ++b)
        std::fill_n(tokens + b * steps + t + 1, steps - t - 1, sampling.stop);
    if (rows.empty() || t + 1 == steps) break;
    const bool all_run = static_cast<index>(rows.size()) == batch;
    if (!all_run) scores.choose(rows);
    stack.step(latest.data(), all_run ? nullptr : running.data());
    pause();
  }
  stack.write(state);
}

}  // namespace

void generate(const LanguageModel& model, const Sampling& sampling, const ModelState& state,
              const View& uniforms, const Generated& out, int threads,
              const std::function<void()>& pause) {
  if (out.tokens.dims() != 2) throw std::invalid_argument("tokens is not [B, steps]");
  const index batch = out.tokens.size(0), steps = out.tokens.size(1);
  require_dense(out.tokens, Dtype::int64, {batch, steps});
  require_dense(out.lengths, Dtype::int64, {batch});
  require_dense(out.log_probs, Dtype::float64, {batch});
  require_dense(uniforms, Dtype::float64, {steps, batch});
  if (!(sampling.temperature >= 0 && std::isfinite(sampling.temperature)))
    throw std::invalid_argument("temperature is " + std::to_string(sampling.temperature) +
                                "; expected a number of at least 0");
  if (sampling.top_k < 0 || !(sampling.top_p > 0))
    throw std::invalid_argument("top_k must be at least 1, and top_p must be above 0");
  with_numbers(state.y.dtype(), [&](auto number) {
    generate_with<decltype(number)>(model, sampling, state, uniforms, out, threads, Pauses(pause));
  });
}

}  // namespace rnnfast
