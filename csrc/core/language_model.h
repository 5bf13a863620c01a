// A language model that runs one token at a time: an embedding, a stack of layers, and a head that
// scores the classes (the tokens).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "core/stack.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/threads.h"

namespace rnnfast {

// The tensors of a model with V tokens. I is the width of the embedding, or V where there is none.
struct LanguageModel {
  Description stack;  // of one direction
  AllWeights weights;
  View embedding;  // [V, I]; absent: the input is one-hot
  View head_w;     // [V, R]
  View head_b;     // [V]; absent: zeros
};

// Where a loop over tokens begins, and where it leaves the states when it ends. L is the number of
// layers.
struct ModelState {
  View y;  // [B, R], the last output of the stack
  View h;  // [L, B, R]
  View c;  // [L, B, H]; absent for cells without a cell state
};

// How many threads share work that takes one of them `seconds` or so.
inline int sharers(double seconds, int threads) {
  constexpr double worth_sharing = 20e-6;
  return seconds < worth_sharing ? 1 : usable(threads);
}

// Calls f(row) for all rows, by several threads where the work takes long enough.
template <class F>
void for_rows(index rows, double seconds, int threads, F f) {
  const auto most = static_cast<int>(std::min<index>(rows, sharers(seconds, threads)));
  if (most < 2) {
    for (index row = 0; row < rows; ++row) f(row);
    return;
  }
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  run_parallel(most, [&](int rank, int count) {
    try {
      for (index row = rows * rank / count; row < rows * (rank + 1) / count; ++row) f(row);
    } catch (...) {  // an exception must not leave a parallel region
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The stack of a model, step by step. It holds the packed weights and the states.
template <class T>
class Steps {
 public:
  // The states of `batch` rows come later. Throws where the tensors of the model do not fit.
  Steps(const LanguageModel& model, index batch, int threads)
      : stack_(model.stack), weights_(model.weights), dtype_(model.head_w.dtype()), threads_(threads) {
    stack_.batch_first = stack_.cell_states = stack_.single = false;
    if (stack_.directions != 1 || stack_.reverse)
      throw std::invalid_argument("a stack that generates has one direction, forward in time");
    if (model.head_w.dims() != 2 || (model.embedding && model.embedding.dims() != 2))
      throw std::invalid_argument("the weights of the embedding and of the head have two dimensions");
    classes_ = model.head_w.size(0);
    inputs_ = model.embedding ? model.embedding.size(1) : classes_;
    x_.resize(static_cast<std::size_t>(batch * inputs_));
    batch_ = batch;
    Call call(stack_, {x_view(), View("h0"), View("c0"), weights_, View("sizes"), View("reset")});
    call.check_input();
    call.check_weights();
    hidden_ = call.hidden;
    outputs_ = call.outputs;
    const Checker check(call.x);
    if (model.embedding) check.shape(model.embedding, {classes_, inputs_});
    check.shape(model.head_w, {classes_, outputs_});
    check.shape(model.head_b, {classes_});
    embedding_ = matrix<const T>(model.embedding);
    has_c_ = call.info.cell_state;
    memory_ = pack(call);
    for (const auto& memory : memory_) panels_.push_back(memory->data());
    y_.resize(static_cast<std::size_t>(batch * outputs_));
    for (States& states : states_) {
      states.h.resize(static_cast<std::size_t>(stack_.layers * batch * outputs_));
      states.c.resize(static_cast<std::size_t>(has_c_ ? stack_.layers * batch * hidden_ : 0));
    }
  }

  index classes() const { return classes_; }
  T* y() { return y_.data(); }

  void check(const ModelState& state, index batch) const {
    const Checker check(state.y);
    check.shape(state.y, {batch, outputs_});
    state.h.require_shape({stack_.layers, batch, outputs_});
    if (has_c_) state.c.require_shape({stack_.layers, batch, hidden_});
    if (state.y.dtype() != dtype_ || state.h.dtype() != dtype_ || (has_c_ && state.c.dtype() != dtype_))
      throw WrongType("the states have another dtype than the model");
  }

  // Reads the states: row n of this loop is row n / copies of the tensors.
  void read(const ModelState& state, index copies) {
    copy_rows(state, [&](T* own, T* other, index width) { std::copy_n(other, width, own); }, copies);
  }
  void write(const ModelState& state) {
    copy_rows(state, [&](T* own, T* other, index width) { std::copy_n(own, width, other); }, 1);
  }

  // One step on the tokens of all rows. `lengths` [B] is null, or 0 for each row that has ended and
  // keeps its states, and 1 for the others.
  void step(const std::int64_t* tokens, std::int64_t* lengths) {
    for (index b = 0; b < batch_; ++b) embed(tokens[b], x_.data() + b * inputs_);
    const int next = 1 - now_;
    std::optional<Call> partial;
    std::optional<Call>& call = lengths ? partial : whole_[now_];
    if (!call) {
      const View sizes = lengths ? View("sizes", lengths, Dtype::int64, {batch_}) : View("sizes");
      call.emplace(stack_,
                   Call::Tensors{x_view(), h_view(now_), c_view(now_), weights_, sizes, View("reset")});
      call->check_input();
      call->check_weights();
      call->check_states();
    }
    forward(*call,
            {View("y", y_.data(), dtype_, {1, batch_, outputs_}), h_view(next), c_view(next),
             View("cell_states"), View("saved")},
            &panels_, threads_);
    now_ = next;
  }

  // Row n takes over the states of row parents[n].
  void reorder(const std::vector<index>& parents) {
    States &from = states_[now_], &to = states_[1 - now_];
    for (int layer = 0; layer < stack_.layers; ++layer)
      for (index n = 0; n < batch_; ++n) {
        const index source = layer * batch_ + parents[static_cast<std::size_t>(n)];
        const index target = layer * batch_ + n;
        std::copy_n(from.h.data() + source * outputs_, outputs_, to.h.data() + target * outputs_);
        if (has_c_)
          std::copy_n(from.c.data() + source * hidden_, hidden_, to.c.data() + target * hidden_);
      }
    now_ = 1 - now_;
  }

 private:
  struct States {
    std::vector<T> h, c;
  };

  View x_view() { return {"x", x_.data(), dtype_, {1, batch_, inputs_}}; }
  View h_view(int k) { return {"h0", states_[k].h.data(), dtype_, {stack_.layers, batch_, outputs_}}; }
  View c_view(int k) {
    return has_c_ ? View("c0", states_[k].c.data(), dtype_, {stack_.layers, batch_, hidden_})
                  : View("c0");
  }

  void embed(std::int64_t token, T* x) const {
    if (embedding_.data) {
      std::copy_n(embedding_.data + token * embedding_.row, inputs_, x);
    } else {
      std::fill_n(x, inputs_, T{});
      x[token] = narrow<T>(1);
    }
  }

  template <class Copy>
  void copy_rows(const ModelState& state, Copy copy, index copies) {
    States& own = states_[now_];
    const Matrix<T> y = matrix<T>(state.y);
    for (index n = 0; n < batch_; ++n) {
      copy(y_.data() + n * outputs_, y.data + n / copies * y.row, outputs_);
      for (int layer = 0; layer < stack_.layers; ++layer) {
        const index row = layer * batch_ + n;
        const Matrix<T> h = rnnfast::state<T>(state.h, layer), c = rnnfast::state<T>(state.c, layer);
        copy(own.h.data() + row * outputs_, h.data + n / copies * h.row, outputs_);
        if (has_c_) copy(own.c.data() + row * hidden_, c.data + n / copies * c.row, hidden_);
      }
    }
  }

  Description stack_;
  const AllWeights weights_;
  const Dtype dtype_;
  const int threads_;
  index batch_ = 0, classes_ = 0, inputs_ = 0, hidden_ = 0, outputs_ = 0;
  bool has_c_ = false;
  Matrix<const T> embedding_{};
  std::vector<std::unique_ptr<Memory>> memory_;
  Panels panels_;
  std::vector<T> x_, y_;
  States states_[2];  // a step reads one of them, and writes the other
  int now_ = 0;
  std::optional<Call> whole_[2];  // of all rows
};

// The head of a model: packed weights, and the scores of every row.
template <class T>
class Scores {
 public:
  using R = Real<T>;

  // Reads the rows y [rows, R] at every run, at first all of them.
  Scores(const LanguageModel& model, const T* y, index rows, int threads)
      : kernels_(kernels().of<T>().head), threads_(threads) {
    head_ = {rows,
             model.head_w.size(1),
             model.head_w.size(0),
             {y, model.head_w.size(1)},
             matrix<const T>(model.head_w),
             vector<const T>(model.head_b),
             nullptr,
             nullptr,
             nullptr};
    chosen_.resize(static_cast<std::size_t>(rows));
    std::iota(chosen_.begin(), chosen_.end(), index{0});
    choose(chosen_);
    packed_.emplace(static_cast<std::size_t>(kernels_.packed_bytes(head_)));
    head_.packed = static_cast<T*>(packed_->data());
    kernels_.pack(head_);
    const auto bytes = static_cast<std::size_t>(rows * width()) * sizeof(R);
    memory_.emplace(bytes);
    weights_.emplace(bytes);
    head_.scores = static_cast<R*>(memory_->data());
  }

  // Later runs score only these rows, at most as many as there were at first.
  void choose(std::vector<index> rows) {
    chosen_ = std::move(rows);
    head_.rows = static_cast<index>(chosen_.size());
    head_.chosen = chosen_.data();
  }

  index width() const { return kernels_.width(head_); }
  R* row(index r) const { return head_.scores + r * width(); }
  // Memory for the weights of a row.
  R* weights(index r) const { return static_cast<R*>(weights_->data()) + r * width(); }
  const HeadKernels<T>& kernel() const { return kernels_; }

  void run() {
    constexpr double flops = 50e9;
    const double seconds = 2.0 * static_cast<double>(head_.rows * head_.depth * head_.classes) / flops;
    const int parts = sharers(seconds, threads_);
    const std::size_t bytes = (static_cast<std::size_t>(kernels_.scratch(head_)) + 63) / 64 * 64;
    const std::size_t all_bytes = std::max<std::size_t>(1, bytes * static_cast<std::size_t>(parts));
    // A later run may have more threads, since the process may get more processors meanwhile.
    if (!scratch_ || scratch_->size() < all_bytes) scratch_.emplace(all_bytes);
    const auto part = [&](int rank, int count) {
      kernels_.multiply(head_, rank, count,
                        static_cast<char*>(scratch_->data()) + static_cast<std::size_t>(rank) * bytes);
    };
    parts == 1 ? part(0, 1) : run_parallel(parts, part);
  }

  // The highest score of a row, and the logarithm of the sum of exp(score - highest).
  struct Normalizer {
    R highest;
    double log_sum;  // NaN where a score is NaN or +infinity, or all are -infinity
  };
  Normalizer normalizer(index r) const {
    const R highest = kernels_.highest(row(r), width());
    const R sum = kernels_.weigh(row(r), width(), highest, 1, nullptr);
    return {highest, std::log(static_cast<double>(sum))};
  }

 private:
  const HeadKernels<T> kernels_;
  const int threads_;
  Head<T> head_{};
  std::vector<index> chosen_;
  std::optional<Memory> packed_, memory_, weights_, scratch_;
};

// Rough time of one score in a softmax and in a choice.
inline constexpr double seconds_a_score = 1e-9;

// Thrown where no token can be chosen.
struct BadScores : std::runtime_error {
  BadScores(index row, index step)
      : std::runtime_error("the scores of row " + std::to_string(row) + " at step " +
                           std::to_string(step) + " contain NaN or inf, or all of them are -inf") {}
};

// Calls `pause` from time to time.
class Pauses {
 public:
  explicit Pauses(const std::function<void()>& pause) : pause_(pause) {}
  void operator()() {
    constexpr auto period = std::chrono::milliseconds(50);
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < period) return;
    pause_();
    last_ = std::chrono::steady_clock::now();
  }

 private:
  const std::function<void()>& pause_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace rnnfast
