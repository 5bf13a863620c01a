#include "run.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "crowd.h"
#include "dispatch.h"
#include "memory.h"

namespace rnnfast {
namespace {

struct Plan {
  int threads;
  Split split;
  double seconds;
};

Crowd crowd;

// The cost model: seconds for one call, one thread against rows against units, from rough figures of a
// current core. Only their proportions matter, and a wrong guess costs time, never a bit.
// `products`: dependent products in a step.
Plan plan(index steps, index batch, index inputs, index hidden, index outputs, int weight_blocks,
          int products, index item, int threads) {
  constexpr double peak_bytes = 1e12;  // of operands per second: 250 GFLOP/s in float32
  constexpr double l2_bytes = 800e3, l2_rate = 200e9, l3_rate = 60e9;
  constexpr double near_bytes = 2.5e6, far_bytes = 16e6, near_rate = 120e9, far_rate = 40e9;
  constexpr double pack_rate = 40e9, barrier = 0.3e-6, region = 5e-6;
  constexpr double worth = 0.8;  // other processes may want the other cores
  const double gates = weight_blocks, lanes = 64.0 / static_cast<double>(item);
  const double projection = outputs < hidden ? static_cast<double>(outputs) / gates : 0;
  const double features = static_cast<double>(inputs + outputs) + projection;
  const auto seconds = [&](double rows, double units, double barriers) {
    const double flops = 2 * rows * gates * units * features;
    const double arithmetic = flops * static_cast<double>(item) / peak_bytes;
    const double bytes =
        gates * units * (static_cast<double>(outputs) + projection) * static_cast<double>(item);
    // Reading the weights hides behind the arithmetic until they come from far.
    const double step = bytes < near_bytes
                            ? std::max(arithmetic, bytes / (bytes < l2_bytes ? l2_rate : l3_rate))
                            : arithmetic + bytes / (bytes < far_bytes ? near_rate : far_rate);
    return static_cast<double>(steps) * (step + barriers * barrier);
  };
  const auto part = [&](double n) { return std::max(1.0, std::ceil(n / threads)); };
  const double b = static_cast<double>(batch), blocks = std::ceil(static_cast<double>(hidden) / lanes);
  const double pack = gates * static_cast<double>(hidden * item) * features / pack_rate;
  const double one = pack + seconds(b, blocks * lanes, 0);
  const double rows = pack / threads + seconds(part(b), blocks * lanes, 0) + region;
  const double units = 1.03 * (pack / threads + seconds(b, part(blocks) * lanes, products)) + region;
  if (threads == 1 || one * worth <= std::min(rows, units)) return {1, Split::rows, one};
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

template <class Work>
void run_team(const Plan& plan, Work work) {
  Barrier barrier[barriers]{};
  if (plan.threads == 1) {
    work(Team{0, 1, plan.split, barrier});
    return;
  }
  Crowd::Call call(plan.seconds > 50e-6);
  int size = 1;  // OpenMP may give fewer than were asked for
  run_where_openmp_works([&] {
#pragma omp parallel num_threads(plan.threads)
    {
      const Crowd::Share share(call);
      if (omp_get_thread_num() == 0) size = omp_get_num_threads();
      work(Team{omp_get_thread_num(), omp_get_num_threads(), plan.split, barrier});
    }
  });
  // Threads beyond the processors keep each other off.
  if (call.was_crowded() && size <= omp_get_num_procs()) crowd.learn(call, size);
}

constexpr std::size_t scratch_waste = 4;  // so that forward takes the block that backward left

std::size_t bytes_of(index size) { return static_cast<std::size_t>(size); }

// More threads than some multiple of the processors are never of use; far more cannot be started. To
// count the processors is a system call, and there is at least one.
int startable(int threads) {
  return threads <= 4 ? threads : std::min(threads, 4 * omp_get_num_procs());
}

template <class T>
Plan plan_of(int cell, const Layer<T>& layer, int threads) {
  const CellInfo& info = kernels().info[cell];
  threads = crowd.limit(startable(threads));
  return plan(layer.steps, layer.batch, layer.inputs, layer.hidden, layer.outputs, info.weight_blocks,
              info.stages + (layer.w_hr.data ? 1 : 0), sizeof(T), std::max(1, threads));
}

}  // namespace

int max_threads() { return omp_get_max_threads(); }

template <class T>
void run_forward(int cell, const Layer<T>& layer, int threads) {
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  const Memory scratch(bytes_of(kernel.forward_scratch(layer)), scratch_waste);
  run_team(plan_of(cell, layer, threads),
           [&](const Team& team) { kernel.forward(layer, team, scratch.data()); });
}

template <class T>
void run_backward(int cell, const Layer<T>& layer, const Gradients<T>& grads, int threads) {
  const CellKernels<T>& kernel = kernels().of<T>(cell);
  const Memory scratch(bytes_of(kernel.backward_scratch(layer, grads)), scratch_waste);
  run_team(plan_of(cell, layer, threads),
           [&](const Team& team) { kernel.backward(layer, grads, team, scratch.data()); });
}

template void run_forward(int, const Layer<float>&, int);
template void run_forward(int, const Layer<double>&, int);
template void run_backward(int, const Layer<float>&, const Gradients<float>&, int);
template void run_backward(int, const Layer<double>&, const Gradients<double>&, int);

double peak_flops(bool float64, int threads, double seconds) {
  threads = startable(threads);
  const auto run = float64 ? kernels().peak_float64 : kernels().peak_float32;
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
