// Runs the loops over tokens of a small random model with every cell, threads of several numbers and
// rows that end, and compares all results with those of one thread.
#pragma once

#include <array>
#include <cstdio>
#include <random>
#include <vector>

#include "core/generate.h"
#include "guarded.h"

namespace rnnfast {

template <class T>
class Generation {
 public:
  Generation(int cell, Dtype dtype, index batch, index hidden, index classes)
      : dtype_(dtype), batch_(batch), hidden_(hidden), classes_(classes) {
    stack_ = {cell, 2, 1, false, false, true, false, false, false, Precision::highest};
    has_c_ = cell_info(cell).cell_state;
    const index rows = cell_info(cell).weight_blocks * hidden;
    for (int layer = 0; layer < 2; ++layer)
      for (const index width : {layer == 0 ? inputs : hidden, hidden, index{1}, index{1}})
        weights_.push_back(random(rows * width));
    embedding_ = random(classes * inputs);
    head_ = random(classes * hidden);
    bias_ = random(classes);
    y_ = random(batch * hidden), h_ = random(2 * batch * hidden), c_ = random(2 * batch * hidden);
    std::uniform_real_distribution<double> uniform(0, 1);
    uniforms_.resize(static_cast<std::size_t>(steps * batch));
    for (double& number : uniforms_) number = uniform(random_);
  }

  // Tokens, lengths and log-probabilities, one after the other.
  std::vector<double> sample(const Sampling& sampling, int threads) {
    Numbers<T> y = y_, h = h_, c = c_;
    Numbers<std::int64_t> tokens(static_cast<std::size_t>(batch_ * steps)),
        lengths(static_cast<std::size_t>(batch_));
    Numbers<double> log_probs(lengths.size());
    generate(model(), sampling, state(y, h, c),
             View("uniforms", uniforms_.data(), Dtype::float64, {steps, batch_}),
             {View("tokens", tokens.data(), Dtype::int64, {batch_, steps}),
              View("lengths", lengths.data(), Dtype::int64, {batch_}),
              View("log_probs", log_probs.data(), Dtype::float64, {batch_})},
             threads, [] {});
    return joined(tokens, lengths, log_probs);
  }

  std::vector<double> search(index beams, int threads) {
    Numbers<T> y = y_, h = h_, c = c_;
    const index all = batch_ * beams;
    Numbers<std::int64_t> tokens(static_cast<std::size_t>(all * steps)),
        lengths(static_cast<std::size_t>(all));
    Numbers<double> scores(lengths.size());
    beam_search(model(), {beams, 1, 1.0}, state(y, h, c),
                {View("tokens", tokens.data(), Dtype::int64, {batch_, beams, steps}),
                 View("lengths", lengths.data(), Dtype::int64, {batch_, beams}),
                 View("scores", scores.data(), Dtype::float64, {batch_, beams})},
                threads, [] {});
    return joined(tokens, lengths, scores);
  }

 private:
  static constexpr index inputs = 6, steps = 7;

  Numbers<T> random(index count) {
    std::normal_distribution<Real<T>> normal;
    Numbers<T> numbers(static_cast<std::size_t>(count));
    for (T& number : numbers) number = narrow<T>(Real<T>(0.4) * normal(random_));
    return numbers;
  }

  View view(const char* name, Numbers<T>& numbers, std::initializer_list<std::int64_t> shape) {
    return {name, numbers.data(), dtype_, shape};
  }

  LanguageModel model() {
    std::vector<View> flat;
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      const index rows = cell_info(stack_.cell).weight_blocks * hidden_;
      const char* name = stack_.weight_name(k, false);
      flat.push_back(k % 4 > 1 ? view(name, weights_[k], {rows})
                               : view(name, weights_[k], {rows, k == 0 ? inputs : hidden_}));
    }
    return {stack_, all_weights(stack_, flat), view("embedding", embedding_, {classes_, inputs}),
            view("head_w", head_, {classes_, hidden_}), view("head_b", bias_, {classes_})};
  }

  ModelState state(Numbers<T>& y, Numbers<T>& h, Numbers<T>& c) {
    return {view("y", y, {batch_, hidden_}), view("h", h, {2, batch_, hidden_}),
            has_c_ ? view("c", c, {2, batch_, hidden_}) : View("c")};
  }

  static std::vector<double> joined(const Numbers<std::int64_t>& tokens,
                                    const Numbers<std::int64_t>& lengths,
                                    const Numbers<double>& scores) {
    std::vector<double> all(tokens.begin(), tokens.end());
    all.insert(all.end(), lengths.begin(), lengths.end());
    all.insert(all.end(), scores.begin(), scores.end());
    return all;
  }

  const Dtype dtype_;
  const index batch_, hidden_, classes_;
  Description stack_;
  bool has_c_ = false;
  std::mt19937 random_{7};
  std::vector<Numbers<T>> weights_;
  Numbers<T> embedding_, head_, bias_, y_, h_, c_;
  Numbers<double> uniforms_;
};

// The number of results that depend on the threads.
template <class T>
int check_generation(int cell, Dtype dtype) {
  int failures = 0;
  const Sampling samplings[] = {{1, 0, 1, 1}, {0, 0, 1, 1}, {0.7, 3, 1, -1}, {1.5, 0, 0.8, 1}};
  for (const auto& [batch, hidden, classes] :
       {std::array<index, 3>{1, 5, 2}, {9, 17, 33}, {4, 33, 1100}}) {
    Generation<T> problem(cell, dtype, batch, hidden, classes);
    for (const int threads : {2, 3}) {
      for (const Sampling& sampling : samplings)
        failures += problem.sample(sampling, threads) != problem.sample(sampling, 1);
      failures += problem.search(3, threads) != problem.search(3, 1);
    }
  }
  if (failures) std::printf("%s: %d generations differ\n", cell_info(cell).name, failures);
  return failures;
}

}  // namespace rnnfast
