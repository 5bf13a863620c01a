#include "run.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "crowd.h"
#include "dispatch.h"
#include "memory.h"

namespace rnnfast {
namespace {

constexpr double region = 5e-6;  // seconds, of several threads

struct Plan {
  int threads;
  Split split;
  double seconds;
};

Crowd crowd;

std::atomic<Partition> forced{Partition::chosen};
std::atomic<bool> oversubscribed{false};

// The cost model: seconds for one call, one thread against rows against units, from rough figures of a
// current core. Only their proportions matter, and a wrong guess costs time, never a bit.
// `products`: dependent products in a step; `held`: whether the weights are packed already; `item`: the
// bytes of a number, `lanes_of` how many of them one vector computes.
Plan plan(index steps, index batch, index inputs, index hidden, index outputs, int weight_blocks,
          int products, bool held, index item, index lanes_of, int threads) {
  constexpr double peak_bytes = 1e12;  // of operands per second: 250 GFLOP/s in float32
  constexpr double l1_bytes = 80e3, l2_bytes = 800e3;
  constexpr double l1_rate = 250e9, l2_rate = 130e9, l3_rate = 60e9;
  constexpr double near_bytes = 2.5e6, far_bytes = 16e6, near_rate = 120e9, far_rate = 40e9;
  constexpr double pack_rate = 40e9, exchange_rate = 10e9;  // the latter from other cores' caches
  constexpr double barrier = 0.3e-6;
  constexpr double worth = 0.8;  // other processes may want the other cores
  const double gates = weight_blocks, lanes = static_cast<double>(lanes_of);
  const double projection = outputs < hidden ? static_cast<double>(outputs) / gates : 0;
  const double features = static_cast<double>(inputs + outputs) + projection;
  const auto seconds = [&](double rows, double units, double barriers) {
    const double flops = 2 * rows * gates * units * features;
    const double few_rows = 1 + 0.55 / (rows * rows);  // what they leave unused of a tile
    const double arithmetic = few_rows * flops * static_cast<double>(item) / peak_bytes;
    const double bytes =
        gates * units * (static_cast<double>(outputs) + projection) * static_cast<double>(item);
    const double rate = bytes < l1_bytes ? l1_rate : bytes < l2_bytes ? l2_rate : l3_rate;
    // Reading the weights hides behind the arithmetic until they come from far.
    const double step = bytes < near_bytes
                            ? std::max(arithmetic, bytes / rate)
                            : arithmetic + bytes / (bytes < far_bytes ? near_rate : far_rate);
    return static_cast<double>(steps) * (step + barriers * barrier);
  };
  const auto part = [&](double n) { return std::max(1.0, std::ceil(n / threads)); };
  const double b = static_cast<double>(batch), blocks = std::ceil(static_cast<double>(hidden) / lanes);
  const double rows_of_weights = gates * static_cast<double>(hidden * item);
  const double pack =
      held ? rows_of_weights * static_cast<double>(inputs) / l3_rate  // reading them once
           : rows_of_weights * features / pack_rate;
  // Threads that share rows need what all others have packed.
  const double exchange = held ? 0 : rows_of_weights * features * (1 - 1.0 / threads) / exchange_rate;
  const double one = pack + seconds(b, blocks * lanes, 0);
  const double rows = pack / threads + exchange + seconds(part(b), blocks * lanes, 0) + region;
  const double units = 1.08 * (pack / threads + seconds(b, part(blocks) * lanes, products)) + region;
  const Partition asked = forced.load(std::memory_order_relaxed);
  if (threads > 1 && asked == Partition::rows) return {threads, Split::rows, rows};
  if (threads > 1 && asked == Partition::units) return {threads, Split::units, units};
  if (threads == 1 || asked == Partition::one || one * worth <= std::min(rows, units))
    return {1, Split::rows, one};
  return {threads, rows <= units ? Split::rows : Split::units, std::min(rows, units)};
}

// OpenMP's threads do not survive a fork, and a parallel region in the child would wait for them for
// ever. A thread that the child starts has none yet, and can have a team of its own.
bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class Region>
void run_where_openmp_works(Region region) {
  if (forked)
    std::thread(region).join();
  else
    region();
}

// How the directions of a layer run: side by side, each with a plan of its own, or one after the other
// with the first plan.
struct Plans {
  Plan of[2];
  bool together;
};

// Calls work(rank, threads there) on each of so many threads, or as many as OpenMP gives, and learns
// what kept them.
template <class Work>
void run_region(int threads, double seconds, Work work) {
  Crowd::Call call(seconds > 50e-6);
  int size = 1;
  run_where_openmp_works([&] {
#pragma omp parallel num_threads(threads)
    {
      const Crowd::Share share(call);
      const int rank = omp_get_thread_num(), there = omp_get_num_threads();
      if (rank == 0) size = there;
      work(rank, there);
    }
  });
  // Threads beyond the processors keep each other off.
  if (call.was_crowded() && size <= omp_get_num_procs()) crowd.learn(call, size);
}

// Calls work(direction, team) on every thread of the team of `direction`, or where `plans.together` on
// those of both directions' teams.
template <class Work>
void run_teams(const Plans& plans, int direction, Work work) {
  Barrier barrier[2][barriers]{};
  const Plan &first = plans.of[0], &second = plans.of[1];
  const int threads = first.threads + (plans.together ? second.threads : 0);
  if (threads == 1) {
    work(direction, Team{0, 1, first.split, barrier[0]});
    return;
  }
  run_region(threads, first.seconds, [&](int rank, int there) {
    if (!plans.together) {
      work(direction, Team{rank, there, first.split, barrier[0]});
    } else if (there < threads) {
      work(0, Team{rank, there, first.split, barrier[0]});
      work(1, Team{rank, there, second.split, barrier[1]});
    } else if (rank < first.threads) {
      work(0, Team{rank, first.threads, first.split, barrier[0]});
    } else {
      work(1, Team{rank - first.threads, second.threads, second.split, barrier[1]});
    }
  });
}

constexpr std::size_t scratch_waste = 4;  // so that forward takes the block that backward left

// How many of so many threads are of use. Beyond the processors they would keep each other off, and
// each barrier would wait out time slices; tests want them nevertheless, as far as they can be started.
// To count the processors is a system call, too much for every small step.
int usable(int threads) {
  thread_local unsigned calls = 0;
  thread_local int processors = 0;
  if (calls++ % 64 == 0) processors = omp_get_num_procs();
  return std::min(threads,
                  oversubscribed.load(std::memory_order_relaxed) ? 4 * processors : processors);
}

template <class T>
Plan plan_of(int cell, const Layer<T>& layer, int threads) {
  const CellInfo& info = kernels().info[cell];
  return plan(layer.steps, layer.batch, layer.inputs, layer.hidden, layer.outputs, info.weight_blocks,
              info.stages + (layer.w_hr.data ? 1 : 0), layer.panels != nullptr, sizeof(T),
              64 / sizeof(Real<T>), std::max(1, threads));
}

template <class T>
Plans plans_of(int cell, const Layer<T>* layers, int directions, int threads) {
  threads = std::max(1, crowd.limit(usable(threads)));
  const Plan whole = plan_of(cell, layers[0], threads);
  if (directions == 2 && threads > 1) {
    const Plan half = plan_of(cell, layers[0], threads / 2);
    constexpr double worth = 0.95;  // one after the other they share what the caches hold
    if (half.seconds < worth * 2 * whole.seconds)
      return {{half, plan_of(cell, layers[1], threads - threads / 2)}, true};
  }
  return {{whole, {}}, false};
}

// Calls work(direction, team, scratch) for all directions; bytes(direction) is what it needs.
template <class Bytes, class Work>
void run_directions(const Plans& plans, int directions, Bytes bytes, Work work) {
  const std::size_t need[2] = {static_cast<std::size_t>(bytes(0)),
                               static_cast<std::size_t>(bytes(directions - 1))};
  if (plans.together) {
    const Memory first(need[0], scratch_waste), second(need[1], scratch_waste);
    run_teams(plans, 0,
              [&](int d, const Team& team) { work(d, team, (d == 0 ? first : second).data()); });
  } else {
    const Memory scratch(std::max(need[0], need[1]), scratch_waste);
    for (int direction = 0; direction < directions; ++direction)
      run_teams(plans, direction, [&](int d, const Team& team) { work(d, team, scratch.data()); });
  }
}

// Calls work(layer, team, scratch) for all layers of a wavefront; bytes(layer) is what it needs. A
// thread takes the layers of its column in order, and a layer waits only for the one before: whichever
// threads there are, the first layer that is not done can go on.
template <class Bytes, class Work>
void run_columns(const Wavefront& plan, int count, Bytes bytes, Work work) {
  const auto layers = static_cast<std::size_t>(count), team = static_cast<std::size_t>(plan.team);
  std::vector<std::unique_ptr<Memory>> scratch;
  for (int k = 0; k < count; ++k)
    scratch.push_back(std::make_unique<Memory>(static_cast<std::size_t>(bytes(k)), scratch_waste));
  struct Meeting {
    Barrier barrier[barriers]{};
  };
  std::vector<Meeting> meetings(layers);
  std::vector<Progress> progress(layers * team);
  run_region(plan.columns * plan.team, plan.seconds, [&](int rank, int there) {
    const bool all = there == plan.columns * plan.team;
    const int columns = all ? plan.columns : there, size = all ? plan.team : 1;
    for (int k = rank / size; k < count; k += columns) {
      const auto at = static_cast<std::size_t>(k);
      work(k,
           Team{rank % size, size, plan.split, meetings[at].barrier,
                k > 0 ? &progress[(at - 1) * team] : nullptr,
                k + 1 < count ? &progress[at * team] : nullptr},
           scratch[at]->data());
    }
  });
}

// to += from, the gradients of x that a direction of the layer found.
template <class T>
void add(const Layer<T>& layer, Sequence<T> to, const T* from) {
  const bool packed = layer.packed.count != nullptr;
  const index steps = packed ? 1 : layer.steps;
  const index rows = packed ? layer.packed.before[layer.steps] : layer.batch;
  for (index t = 0; t < steps; ++t)
    for (index b = 0; b < rows; ++b, from += layer.inputs) {
      T* row = to.data + t * to.step + b * to.row;
      for (index k = 0; k < layer.inputs; ++k) row[k] = narrow<T>(widen(row[k]) + widen(from[k]));
    }
}

}  // namespace

int max_threads() { return omp_get_max_threads(); }

template <class T>
void run_forward(int cell, const Layer<T>* layers, int directions, int threads) {
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  run_directions(
      plans_of(cell, layers, directions, threads), directions,
      [&](int d) { return kernel.forward_scratch(layers[d]); },
      [&](int d, const Team& team, void* scratch) { kernel.forward(layers[d], team, scratch); });
}

template <class T>
void run_backward(int cell, const Layer<T>* layers, const Gradients<T>* grads, int directions,
                  int threads) {
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  const Plans plans = plans_of(cell, layers, directions, threads);
  const Layer<T>& layer = layers[directions - 1];
  Gradients<T> own[2] = {grads[0], grads[directions - 1]};
  std::optional<Memory> apart;  // the second direction's gradient of x
  if (directions == 2 && own[1].x.data) {
    own[1].x_accumulate = !plans.together;
    if (plans.together) {
      const index rows =
          layer.packed.count ? layer.packed.before[layer.steps] : layer.steps * layer.batch;
      apart.emplace(static_cast<std::size_t>(rows * layer.inputs) * sizeof(T));
      own[1].x = {static_cast<T*>(apart->data()), layer.batch * layer.inputs, layer.inputs};
    }
  }
  run_directions(
      plans, directions, [&](int d) { return kernel.backward_scratch(layers[d], own[d]); },
      [&](int d, const Team& team, void* scratch) {
        kernel.backward(layers[d], own[d], team, scratch);
      });
  if (apart) add(layer, grads[1].x, static_cast<const T*>(apart->data()));
}

template <class T>
Wavefront wavefront(int cell, const Layer<T>* layers, int count, bool backward, int threads) {
  if (count < 2 || layers[0].steps < 2) return {};
  threads = std::max(1, crowd.limit(usable(threads)));
  const Partition asked = forced.load(std::memory_order_relaxed);
  if (threads < 2 || (asked != Partition::chosen && asked != Partition::wavefront)) return {};
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  Wavefront found{std::min(count, threads), threads / std::min(count, threads)};
  double in_turn = 0, longest = 0;
  for (int k = 0; k < count; ++k) {
    // A group of rows that begins when another has ended could not follow the layer that it reads.
    if (backward && kernel.backward_groups(layers[k]) > 1) return {};
    in_turn += plan_of(cell, layers[k], threads).seconds;
    const Plan alone = plan_of(cell, layers[k], found.team);
    if (alone.seconds > longest) longest = alone.seconds;
    if (alone.threads == 1) found.team = 1;
    found.split = alone.split;
  }
  const index steps = layers[0].steps, piece = wavefront_steps(steps, layers[0].batch);
  const auto pieces = static_cast<double>((steps + piece - 1) / piece);
  const int rounds = (count + found.columns - 1) / found.columns;
  found.seconds = longest * (rounds + (found.columns - 1) / pieces) + region;
  constexpr double worth = 0.95;
  if (asked != Partition::wavefront && found.seconds > worth * in_turn) return {};
  return found;
}

template <class T>
void run_forward(int cell, const Wavefront& plan, const Layer<T>* layers, int count) {
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  run_columns(
      plan, count, [&](int k) { return kernel.forward_scratch(layers[k]); },
      [&](int k, const Team& team, void* scratch) { kernel.forward(layers[k], team, scratch); });
}

template <class T>
void run_backward(int cell, const Wavefront& plan, const Layer<T>* layers, const Gradients<T>* grads,
                  int count) {
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  run_columns(
      plan, count, [&](int k) { return kernel.backward_scratch(layers[k], grads[k]); },
      [&](int k, const Team& team, void* scratch) {
        kernel.backward(layers[k], grads[k], team, scratch);
      });
}

void force(Partition partition, bool oversubscribe) {
  forced.store(partition, std::memory_order_relaxed);
  oversubscribed.store(oversubscribe, std::memory_order_relaxed);
}

template void run_forward(int, const Layer<float>*, int, int);
template void run_backward(int, const Layer<float>*, const Gradients<float>*, int, int);
template Wavefront wavefront(int, const Layer<float>*, int, bool, int);
template void run_forward(int, const Wavefront&, const Layer<float>*, int);
template void run_backward(int, const Wavefront&, const Layer<float>*, const Gradients<float>*, int);
template void run_forward(int, const Layer<double>*, int, int);
template void run_backward(int, const Layer<double>*, const Gradients<double>*, int, int);
template Wavefront wavefront(int, const Layer<double>*, int, bool, int);
template void run_forward(int, const Wavefront&, const Layer<double>*, int);
template void run_backward(int, const Wavefront&, const Layer<double>*, const Gradients<double>*, int);
template void run_forward(int, const Layer<Bfloat16>*, int, int);
template void run_backward(int, const Layer<Bfloat16>*, const Gradients<Bfloat16>*, int, int);
template Wavefront wavefront(int, const Layer<Bfloat16>*, int, bool, int);
template void run_forward(int, const Wavefront&, const Layer<Bfloat16>*, int);
template void run_backward(int, const Wavefront&, const Layer<Bfloat16>*, const Gradients<Bfloat16>*,
                           int);

double peak_flops(double (*run)(long rounds), int threads, double seconds) {
  threads = usable(threads);
  double flops = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  run_where_openmp_works([&] {
#pragma omp parallel num_threads(threads) reduction(+ : flops)
    while (elapsed() < seconds) flops += run(2000);
  });
  return flops / elapsed();
}

}  // namespace rnnfast
