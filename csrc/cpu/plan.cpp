#include "cpu/plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/threads.h"

namespace rnnfast {
namespace {

constexpr auto relaxed = std::memory_order_relaxed;
std::atomic<Partition> forced{Partition::chosen}, last_partition{Partition::one};
std::atomic<int> last_threads{1};
std::atomic<bool> oversubscribed{false};

constexpr double l1_bytes = 80e3, l2_bytes = 800e3;

// The width of w_hh, plus that of a projection's weights as if they were part of w_hh.
double recurrent_width(const Work& w) {
  const double projection =
      w.outputs < w.hidden ? static_cast<double>(w.outputs) / static_cast<double>(w.weight_blocks) : 0;
  return static_cast<double>(w.outputs) + projection;
}

}  // namespace

void force(Partition partition, bool oversubscribe) {
  forced.store(partition, relaxed);
  oversubscribed.store(oversubscribe, relaxed);
}
Partition forced_partition() { return forced.load(relaxed); }

void note(Usage usage) {
  last_partition.store(usage.partition, relaxed);
  last_threads.store(usage.threads, relaxed);
}
Usage last_usage() { return {last_partition.load(relaxed), last_threads.load(relaxed)}; }

// More threads than processors would keep each other off their cores, and every barrier would wait for
// time slices. To count the processors is a system call, too slow for every small step.
int usable(int threads) {
  thread_local unsigned calls = 0;
  thread_local int count = 0;
  if (calls++ % 64 == 0) count = processors();
  const int most = oversubscribed.load(relaxed) ? std::max(8, 4 * count) : count;
  return std::max(1, std::min(threads, most));
}

// Compares the seconds of a call for one thread, for rows and for units, from rough figures of current
// cores (benchmarks/partition.py measures the choices). Only the proportions matter: a wrong figure
// costs time, and never changes a result.
Plan plan(const Work& w, int threads) {
  constexpr double peak_bytes = 0.7e12;  // of operands per second: 175 GFLOP/s in float32
  constexpr double matrix_peak = 2.5e12, formula = 1.4e-9;  // AMX; a unit of an LSTM
  constexpr double l1_rate = 250e9, l2_rate = 130e9, l3_rate = 60e9;
  constexpr double near_bytes = 2.5e6, far_bytes = 16e6, near_rate = 120e9, far_rate = 40e9;
  constexpr double pack_rate = 40e9, exchange_rate = 5e9;  // exchange: from other cores' caches
  constexpr double barrier = 0.3e-6;
  constexpr double one_row_excess = 1.1;  // one row leaves most of a tile unused: 2.1 times the time
  constexpr double imbalance = 1.04;      // units: a busy core delays barriers; rows: some end early
  constexpr double required_ratio = 0.8;  // sharing must save time: other processes may want the cores
  const double gates = w.weight_blocks, inputs = static_cast<double>(w.inputs);
  const double item = static_cast<double>(w.item_bytes), lanes = static_cast<double>(w.lanes);
  const double recurrent = recurrent_width(w);
  // On a matrix unit the products are so fast that the formula counts too.
  const auto arithmetic_of = [&](double rows, double units) {
    if (w.matrix_rows) {
      const double tile = w.matrix_rows, multiplied = std::ceil(rows / tile) * tile;
      return 2 * multiplied * gates * units * (inputs + recurrent) / matrix_peak +
             rows * units * formula;
    }
    const double few_rows = 1 + one_row_excess / (rows * rows);
    return 2 * rows * gates * units * (inputs + few_rows * recurrent) * item / peak_bytes;
  };
  const auto seconds = [&](double rows, double units, double waits) {
    const double arithmetic = arithmetic_of(rows, units);
    const double bytes = gates * units * recurrent * item;
    const double rate = bytes < l1_bytes ? l1_rate : bytes < l2_bytes ? l2_rate : l3_rate;
    // The arithmetic hides the reading of up to near_bytes of weights.
    const double step = bytes < near_bytes
                            ? std::max(arithmetic, bytes / rate)
                            : arithmetic + bytes / (bytes < far_bytes ? near_rate : far_rate);
    return static_cast<double>(w.steps) * (step + waits * barrier);
  };
  const auto part = [&](double n) { return std::max(1.0, std::ceil(n / threads)); };
  const bool ragged = w.rows < w.steps * w.batch;
  const double b = std::max(1.0, static_cast<double>(w.rows) / static_cast<double>(w.steps));
  const double blocks = std::ceil(static_cast<double>(w.hidden) / lanes);
  const double column_bytes = gates * static_cast<double>(w.hidden) * item;
  const double pack = w.packed ? column_bytes * inputs / l3_rate  // reads the packed weights once
                               : column_bytes * (inputs + recurrent) / pack_rate;
  // Threads that share rows read the weights that all other threads have packed.
  const double exchange =
      w.packed ? 0 : column_bytes * (inputs + recurrent) * (1 - 1.0 / threads) / exchange_rate;
  const double one = pack + seconds(b, blocks * lanes, 0);
  const double rows =
      (ragged ? imbalance : 1) * (pack / threads + exchange + seconds(part(b), blocks * lanes, 0)) +
      region_seconds;
  const double units =
      (ragged ? 1 : imbalance) * (pack / threads + seconds(b, part(blocks) * lanes, w.products)) +
      region_seconds;
  const Partition partition = forced_partition();
  if (threads > 1 && partition == Partition::rows) return {threads, Split::rows, rows};
  if (threads > 1 && partition == Partition::units) return {threads, Split::units, units};
  if (threads == 1 || partition == Partition::one || one * required_ratio <= std::min(rows, units))
    return {1, Split::rows, one};
  return {threads, rows <= units ? Split::rows : Split::units, std::min(rows, units)};
}

bool fits_cache(const Work& w, int threads) {
  const double bytes =
      static_cast<double>(w.weight_blocks * w.hidden * w.item_bytes) * recurrent_width(w);
  return bytes <= l2_bytes * threads;
}

}  // namespace rnnfast
