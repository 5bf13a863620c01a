// Runs every cell of one instruction set, forward and backward, on buffers of exactly the promised size
// and with teams of plain threads, so that the address and thread sanitizers see all that a kernel
// touches. Outputs and gradients must not depend on the team.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace rnnfast::RNNFAST_TARGET {
extern const Kernels kernels;
}

namespace rnnfast {

bool operator==(Bfloat16 a, Bfloat16 b) { return widen(a) == widen(b); }  // a NaN is no result

namespace {

const Kernels& table = RNNFAST_TARGET::kernels;

template <class Work>
void run_team(int size, Split split, Work work) {
  Barrier barrier[barriers]{};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] { work(Team{rank, size, split, barrier}); });
  for (std::thread& thread : threads) thread.join();
}

struct Sizes {
  index steps, batch, inputs, hidden, outputs;  // outputs < hidden: h is projected
};

template <class T>
using Numbers = std::vector<T>;

std::unique_ptr<void, decltype(&std::free)> scratch(index bytes) {
  const std::size_t size = static_cast<std::size_t>((bytes + 63) / 64 * 64);
  std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, size), &std::free);
  std::memset(memory.get(), 0xff, size);  // NaN: what is read before it is written shows
  return memory;
}

template <class T>
std::vector<Numbers<T>> run(int cell, Sizes n, int team_size, Split split, bool states, bool save,
                            bool held = false) {
  std::mt19937 random(42);
  std::normal_distribution<Real<T>> normal;
  const auto numbers = [&](index count) {
    Numbers<T> v(static_cast<std::size_t>(count));
    for (T& x : v) x = narrow<T>(Real<T>(0.3) * normal(random));
    return v;
  };
  const CellInfo& info = table.info[cell];
  const CellKernels<T>& kernel = table.of<T>(cell);
  const index gates = info.weight_blocks * n.hidden, state = n.batch * n.hidden;
  const index h_state = n.batch * n.outputs;
  const bool projected = n.outputs < n.hidden;
  const index rows = n.steps * n.batch;
  Numbers<T> x = numbers(rows * n.inputs), h0 = numbers(h_state), c0 = numbers(state);
  Numbers<T> w_ih = numbers(gates * n.inputs), w_hh = numbers(gates * n.outputs);
  Numbers<T> b_ih = numbers(gates), b_hh = numbers(gates), w_hr = numbers(n.outputs * n.hidden);
  Numbers<T> dy = numbers(rows * n.outputs), dh_n = numbers(h_state), dc_n = numbers(state);
  const T nan = narrow<T>(std::numeric_limits<Real<T>>::quiet_NaN());
  const auto poisoned = [&](std::size_t count) { return Numbers<T>(count, nan); };
  Numbers<T> y = poisoned(dy.size()), h_n = poisoned(h0.size()), c_n(c0.size());
  Numbers<Real<T>> saved(static_cast<std::size_t>(rows * kernel.saved_row(n.hidden)), widen(nan));
  const bool c = info.cell_state;
  Numbers<T> cells(static_cast<std::size_t>(rows * n.hidden));
  std::vector<std::uint8_t> resets(static_cast<std::size_t>(rows));
  for (std::uint8_t& reset : resets) reset = random() % 4 == 0;
  Layer<T> layer{n.steps,
                 n.batch,
                 n.inputs,
                 n.hidden,
                 n.outputs,
                 {},
                 {states ? resets.data() : nullptr, n.batch, 1},
                 {x.data(), n.batch * n.inputs, n.inputs},
                 {states ? h0.data() : nullptr, n.outputs},
                 {states && c ? c0.data() : nullptr, n.hidden},
                 {w_ih.data(), n.inputs},
                 {w_hh.data(), n.outputs},
                 states ? b_ih.data() : nullptr,
                 b_hh.data(),
                 {projected ? w_hr.data() : nullptr, n.hidden},
                 {y.data(), n.batch * n.outputs, n.outputs},
                 {states && c ? cells.data() : nullptr, n.batch * n.hidden, n.hidden},
                 {h_n.data(), n.outputs},
                 {c ? c_n.data() : nullptr, n.hidden},
                 save ? saved.data() : nullptr,
                 nullptr};
  const auto panels = scratch(held ? kernel.panels_size(layer) * index{sizeof(T)} : 0);
  if (held) {
    layer.panels = static_cast<T*>(panels.get());
    kernel.pack(layer);
  }
  {
    const auto memory = scratch(kernel.forward_scratch(layer));
    run_team(team_size, split, [&](const Team& team) { kernel.forward(layer, team, memory.get()); });
  }
  std::vector<Numbers<T>> results{y, h_n, c_n, cells};
  if (!save) return results;
  Numbers<T> dx(x.size()), dh0 = poisoned(h0.size()), dc0(c0.size());
  Numbers<T> dw_ih = poisoned(w_ih.size()), dw_hh = poisoned(w_hh.size());
  Numbers<T> db_ih = poisoned(b_ih.size()), db_hh = poisoned(b_hh.size());
  Numbers<T> dw_hr(w_hr.size());
  const Gradients<T> grads{{dy.data(), n.batch * n.outputs, n.outputs},
                           {states && c ? cells.data() : nullptr, n.batch * n.hidden, n.hidden},
                           {dh_n.data(), n.outputs},
                           {c ? dc_n.data() : nullptr, n.hidden},
                           {dx.data(), n.batch * n.inputs, n.inputs},
                           true,
                           {dh0.data(), n.outputs},
                           {c ? dc0.data() : nullptr, n.hidden},
                           {dw_ih.data(), n.inputs},
                           {dw_hh.data(), n.outputs},
                           db_ih.data(),
                           db_hh.data(),
                           {projected ? dw_hr.data() : nullptr, n.hidden}};
  const auto memory = scratch(kernel.backward_scratch(layer, grads));
  run_team(team_size, split,
           [&](const Team& team) { kernel.backward(layer, grads, team, memory.get()); });
  for (const Numbers<T>& v : {dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr}) results.push_back(v);
  return results;
}

// Three layers of n.hidden units, one after the other or each with a team that follows that of the one
// it reads. Returns the outputs and the gradients of the weights and of the input.
template <class T>
std::vector<Numbers<T>> run_stack(int cell, Sizes n, int team_size, Split split, bool wavefront) {
  constexpr int layers = 3;
  std::mt19937 random(7);
  std::normal_distribution<Real<T>> normal;
  const CellInfo& info = table.info[cell];
  const CellKernels<T>& kernel = table.of<T>(cell);
  const index H = n.hidden, gates = info.weight_blocks * H, rows = n.steps * n.batch;
  const auto numbers = [&](index count) {
    Numbers<T> v(static_cast<std::size_t>(count));
    for (T& x : v) x = narrow<T>(Real<T>(0.3) * normal(random));
    return v;
  };
  const auto sequence = [&](auto& v) { return Sequence<T>{v.data(), n.batch * H, H}; };
  const auto reading = [&](auto& v) { return Sequence<const T>{v.data(), n.batch * H, H}; };
  // Between layers: outputs and, from the last layer down, gradients.
  std::vector<Numbers<T>> y(layers + 1), dy(layers + 1), w_ih, w_hh, dw_ih, dw_hh;
  std::vector<Numbers<Real<T>>> saved;
  std::vector<Layer<T>> layer(layers);
  std::vector<Gradients<T>> grads(layers);
  for (auto& v : y) v.resize(static_cast<std::size_t>(rows * H));
  for (auto& v : dy) v.resize(static_cast<std::size_t>(rows * H));
  y[0] = numbers(rows * H);
  dy[layers] = numbers(rows * H);
  for (int k = 0; k < layers; ++k) {
    w_ih.push_back(numbers(gates * H));
    w_hh.push_back(numbers(gates * H));
    saved.emplace_back(static_cast<std::size_t>(rows * kernel.saved_row(H)));
  }
  dw_ih = w_ih, dw_hh = w_hh;
  for (std::size_t k = 0; k < layers; ++k) {
    layer[k] = {n.steps, n.batch, H, H, H};
    layer[k].x = reading(y[k]);
    layer[k].y = sequence(y[k + 1]);
    layer[k].w_ih = {w_ih[k].data(), H};
    layer[k].w_hh = {w_hh[k].data(), H};
    layer[k].saved = saved[k].data();
    grads[k].y = reading(dy[k + 1]);
    grads[k].x = sequence(dy[k]);
    grads[k].w_ih = {dw_ih[k].data(), H};
    grads[k].w_hh = {dw_hh[k].data(), H};
  }
  // Calls work(k, team, scratch) for the layers in the order 0, 1, 2 of `at`.
  const auto each = [&](auto at, auto bytes, auto work) {
    Barrier barrier[layers][barriers]{};
    std::vector<Progress> progress(layers * static_cast<std::size_t>(team_size));
    std::vector<std::unique_ptr<void, decltype(&std::free)>> memory;
    std::vector<std::thread> threads;
    for (int i = 0; i < layers; ++i) memory.push_back(scratch(bytes(at(i))));
    for (int i = 0; i < layers; ++i) {
      for (int rank = 0; rank < team_size; ++rank)
        threads.emplace_back([&, i, rank] {
          Team team{rank, team_size, split, barrier[i]};
          if (wavefront && i > 0)
            team.source = &progress[static_cast<std::size_t>((i - 1) * team_size)];
          if (wavefront && i + 1 < layers)
            team.own = &progress[static_cast<std::size_t>(i * team_size)];
          work(at(i), team, memory[static_cast<std::size_t>(i)].get());
        });
      if (!wavefront) {
        for (std::thread& thread : threads) thread.join();
        threads.clear();
      }
    }
    for (std::thread& thread : threads) thread.join();
  };
  const auto up = [](int i) { return static_cast<std::size_t>(i); };
  const auto down = [](int i) { return static_cast<std::size_t>(layers - 1 - i); };
  each(
      up, [&](std::size_t k) { return kernel.forward_scratch(layer[k]); },
      [&](std::size_t k, const Team& team, void* memory) { kernel.forward(layer[k], team, memory); });
  each(
      down, [&](std::size_t k) { return kernel.backward_scratch(layer[k], grads[k]); },
      [&](std::size_t k, const Team& team, void* memory) {
        kernel.backward(layer[k], grads[k], team, memory);
      });
  std::vector<Numbers<T>> results;
  for (const auto* all : {&y, &dy, &dw_ih, &dw_hh})
    results.insert(results.end(), all->begin(), all->end());
  return results;
}

template <class T>
int check_stack(int cell, Sizes n) {
  const auto expected = run_stack<T>(cell, n, 1, Split::rows, false);
  int failures = 0;
  const std::pair<int, Split> teams[] = {{1, Split::rows}, {2, Split::rows}, {2, Split::units}};
  for (const auto& [team, split] : teams)
    if (run_stack<T>(cell, n, team, split, true) != expected) {
      std::printf("%s T=%td B=%td H=%td: a wavefront differs with teams of %d\n", table.info[cell].name,
                  n.steps, n.batch, n.hidden, team);
      ++failures;
    }
  return failures;
}

template <class T>
int check(int cell, Sizes n) {
  int failures = 0;
  for (const bool states : {false, true}) {
    const auto expected = run<T>(cell, n, 1, Split::rows, states, true);
    const auto differ = [&](const std::vector<Numbers<T>>& found, int team, const char* what) {
      for (std::size_t k = 0; k < found.size(); ++k)
        if (found[k] != expected[k]) {
          std::printf("%s T=%td B=%td I=%td H=%td R=%td: result %zu differs with %d threads by %s\n",
                      table.info[cell].name, n.steps, n.batch, n.inputs, n.hidden, n.outputs, k, team,
                      what);
          ++failures;
        }
    };
    differ(run<T>(cell, n, 1, Split::rows, states, false), 1, "rows, inference");
    differ(run<T>(cell, n, 1, Split::rows, states, false, true), 1, "rows, held weights");
    for (const int team : {2, 3}) {
      differ(run<T>(cell, n, team, Split::rows, states, true), team, "rows");
      differ(run<T>(cell, n, team, Split::units, states, true), team, "units");
      differ(run<T>(cell, n, team, Split::units, states, false), team, "units, inference");
      differ(run<T>(cell, n, team, Split::units, states, false, true), team, "units, held weights");
    }
  }
  return failures;
}

}  // namespace
}  // namespace rnnfast

int main() {
  using namespace rnnfast;
  int failures = 0, calls = 0;
  const Sizes sizes[] = {{1, 1, 1, 1, 1},     {5, 3, 4, 3, 3},     {4, 2, 17, 65, 65},
                         {3, 1, 3, 257, 257}, {6, 33, 5, 17, 17},  {3, 40, 33, 48, 48},
                         {60, 2, 10, 20, 20}, {2, 300, 7, 40, 40}, {3, 0, 4, 5, 5},
                         {70, 9, 5, 18, 18},  {1, 2, 5, 37, 19},   {5, 3, 4, 20, 1},
                         {3, 33, 5, 70, 65},  {2, 300, 7, 40, 16}, {70, 9, 5, 18, 17},
                         {3, 0, 4, 5, 2},     {1, 40, 9, 33, 32},  {1, 13, 21, 37, 37}};
  for (int cell = 0; cell < table.cells; ++cell)
    for (const Sizes& n : sizes) {
      if (n.outputs < n.hidden && !table.info[cell].projects) continue;
      const bool stacked = n.steps > 3 && n.outputs == n.hidden && n.steps * n.batch < 512;
      failures += check<Bfloat16>(cell, n);
      ++calls;
      if (stacked) failures += check_stack<Bfloat16>(cell, n);
      if (!table.float32.cells) continue;  // an instruction set that has nothing of its own for them
      failures += check<float>(cell, n);
      ++calls;
      if (stacked) failures += check_stack<float>(cell, n);
#if !defined(__SANITIZE_THREAD__)  // who computes what does not depend on the type
      failures += check<double>(cell, n);
      ++calls;
#endif
    }
  std::printf("%s: %d problems, %d failures\n", table.name, calls, failures);
  return failures != 0;
}
