#include "cpu/run.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/contention.h"
#include "cpu/denormals.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace rnnfast {
namespace {

Contention contention;

// How the directions of a layer run: together, each with its direction_grads plan, or one after the
// other with the first plan.
struct Plans {
  Plan direction[2];
  bool together;
};

// Runs `work` as run_parallel does, and lets the contention model learn from the call.
template <class F>
void run_region(Partition partition, int threads, double seconds, F work) {
  Contention::Call call(seconds > 50e-6);
  int size = 1;
  const auto measured = [&](int rank, int count) {
    const Contention::Share share(call);
    if (rank == 0) size = count;
    work(rank, count);
  };
  run_parallel(threads, std::cref(measured));  // std::function would copy `measured` to the heap
  // Threads beyond the processors keep each other off their cores: that is no contention.
  if (call.was_contended() && size <= processors()) contention.learn(call, size);
  note({partition, size});
}

// Calls work(direction, team) on every thread of the team of `direction`, or, where `plans.together`,
// on every thread of the teams of both directions.
template <class F>
void run_teams(const Plans& plans, int direction, F work) {
  Barrier barrier[2][barriers]{};
  const Plan &first = plans.direction[0], &second = plans.direction[1];
  const int threads = first.threads + (plans.together ? second.threads : 0);
  if (threads == 1) {
    work(direction, Team{0, 1, first.split, barrier[0]});
    note({Partition::one, 1});
    return;
  }
  const Partition partition = plans.together               ? Partition::directions
                              : first.split == Split::rows ? Partition::rows
                                                           : Partition::units;
  run_region(partition, threads, first.seconds, [&](int rank, int count) {
    if (!plans.together) {
      work(direction, Team{rank, count, first.split, barrier[0]});
    } else if (count < threads) {
      work(0, Team{rank, count, first.split, barrier[0]});
      work(1, Team{rank, count, second.split, barrier[1]});
    } else if (rank < first.threads) {
      work(0, Team{rank, first.threads, first.split, barrier[0]});
    } else {
      work(1, Team{rank - first.threads, second.threads, second.split, barrier[1]});
    }
  });
}

constexpr std::size_t scratch_waste = 4;  // so that forward takes the block that backward left

// A forced partition must not depend on the load of the machine.
int threads_now(int threads) {
  threads = usable(threads);
  return forced_partition() == Partition::chosen ? contention.limit(threads) : threads;
}

template <class T>
index rows_of(const Layer<T>& layer) {
  return layer.ragged.count ? layer.ragged.rows_before[layer.steps] : layer.steps * layer.batch;
}

template <class T>
Work work_of(int cell, const Layer<T>& layer) {
  const CellInfo& info = kernels().info[cell];
  return {layer.steps,
          layer.batch,
          rows_of(layer),
          layer.inputs,
          layer.hidden,
          layer.outputs,
          info.weight_blocks,
          info.stages + (layer.w_hr.data ? 1 : 0),
          layer.panels != nullptr,
          sizeof(T),
          64 / sizeof(Real<T>),
          kernels().of(layer).matrix_rows};
}

template <class T>
Plans plans_of(int cell, const Layer<T>* layers, int directions, int threads) {
  threads = threads_now(threads);
  const Work work = work_of(cell, layers[0]);
  const Plan all_threads = plan(work, threads);
  const Partition partition = forced_partition();
  if (directions == 2 && threads > 1 &&
      (partition == Partition::chosen || partition == Partition::directions)) {
    const Plan half = plan(work, threads / 2);
    constexpr double required_ratio = 0.95;  // directions one after the other share the caches
    if (partition == Partition::directions || half.seconds < required_ratio * 2 * all_threads.seconds)
      return {{half, plan(work_of(cell, layers[1]), threads - threads / 2)}, true};
  }
  return {{all_threads, {}}, false};
}

// Calls work(direction, team, scratch) for all directions. bytes(direction) is the size of the scratch.
template <class Bytes, class F>
void run_directions(const Plans& plans, int directions, Bytes bytes, F work) {
  const std::size_t size[2] = {static_cast<std::size_t>(bytes(0)),
                               static_cast<std::size_t>(bytes(directions - 1))};
  if (plans.together) {
    const Memory first(size[0], scratch_waste), second(size[1], scratch_waste);
    run_teams(plans, 0,
              [&](int d, const Team& team) { work(d, team, (d == 0 ? first : second).data()); });
  } else {
    const Memory scratch(std::max(size[0], size[1]), scratch_waste);
    for (int direction = 0; direction < directions; ++direction)
      run_teams(plans, direction, [&](int d, const Team& team) { work(d, team, scratch.data()); });
  }
}

// Calls work(layer, team, scratch) for all layers of a wavefront. bytes(layer) is the size of the
// scratch. A thread takes the layers of its column in order, and a layer waits only for the layer
// before it. So the first layer that is not done can always go on, however many threads there are.
template <class Bytes, class F>
void run_columns(const Wavefront& plan, int layer_count, Bytes bytes, F work) {
  const auto layers = static_cast<std::size_t>(layer_count), team = static_cast<std::size_t>(plan.team);
  std::vector<std::unique_ptr<Memory>> scratch;
  for (int k = 0; k < layer_count; ++k)
    scratch.push_back(std::make_unique<Memory>(static_cast<std::size_t>(bytes(k)), scratch_waste));
  struct Meeting {
    Barrier barrier[barriers]{};
  };
  std::vector<Meeting> meetings(layers);
  std::vector<Progress> progress(layers * team);
  run_region(Partition::wavefront, plan.columns * plan.team, plan.seconds, [&](int rank, int count) {
    const bool complete = count == plan.columns * plan.team;
    const int columns = complete ? plan.columns : count, size = complete ? plan.team : 1;
    for (int k = rank / size; k < layer_count; k += columns) {
      const auto layer = static_cast<std::size_t>(k);
      work(k,
           Team{rank % size, size, plan.split, meetings[layer].barrier,
                k > 0 ? &progress[(layer - 1) * team] : nullptr,
                k + 1 < layer_count ? &progress[layer * team] : nullptr},
           scratch[layer]->data());
    }
  });
}

// to += from. Both are gradients of x, from one direction of the layer each.
template <class T>
void add(const Layer<T>& layer, Sequence<T> to, Sequence<const T> from) {
  const FlushDenormals guard;  // as in the kernels, which add where the directions take turns
  for (index t = 0; t < layer.steps; ++t)
    for (index b = 0; b < (layer.ragged.count ? layer.ragged.count[t] : layer.batch); ++b) {
      T* const row = layer.ragged.row(to, t, b);
      const T* const other = layer.ragged.row(from, t, b);
      for (index k = 0; k < layer.inputs; ++k) row[k] = narrow<T>(widen(row[k]) + widen(other[k]));
    }
}

}  // namespace

template <class T>
void run_forward(int cell, const Layer<T>* layers, int directions, int threads) {
  const CellKernels<T>& kernel = kernels().of(cell, layers[0]);
  run_directions(
      plans_of(cell, layers, directions, threads), directions,
      [&](int d) { return kernel.forward_scratch(layers[d]); },
      [&](int d, const Team& team, void* scratch) { kernel.forward(layers[d], team, scratch); });
}

template <class T>
void run_backward(int cell, const Layer<T>* layers, const Gradients<T>* grads, int directions,
                  int threads) {
  const CellKernels<T>& kernel = kernels().of(cell, layers[0]);
  const Plans plans = plans_of(cell, layers, directions, threads);
  const Layer<T>& layer = layers[directions - 1];
  Gradients<T> direction_grads[2] = {grads[0], grads[directions - 1]};
  std::optional<Memory> second_dx;  // the second direction's gradient of x
  if (directions == 2 && direction_grads[1].x.data) {
    direction_grads[1].x_accumulate = !plans.together;
    if (plans.together) {
      const index rows = layer.ragged.packed ? rows_of(layer) : layer.steps * layer.batch;
      second_dx.emplace(static_cast<std::size_t>(rows * layer.inputs) * sizeof(T));
      direction_grads[1].x = {static_cast<T*>(second_dx->data()), layer.batch * layer.inputs,
                              layer.inputs};
    }
  }
  run_directions(
      plans, directions, [&](int d) { return kernel.backward_scratch(layers[d], direction_grads[d]); },
      [&](int d, const Team& team, void* scratch) {
        kernel.backward(layers[d], direction_grads[d], team, scratch);
      });
  if (second_dx)
    add(layer, grads[1].x,
        {direction_grads[1].x.data, direction_grads[1].x.step, direction_grads[1].x.row});
}

template <class T>
Wavefront wavefront(int cell, const Layer<T>* layers, int count, bool backward, int threads) {
  if (count < 2 || layers[0].steps < 2 || layers[0].batch == 0) return {};
  const bool forced = forced_partition() == Partition::wavefront;
  if (!forced && forced_partition() != Partition::chosen) return {};
  threads = threads_now(threads);
  if (threads < 2) return {};
  Wavefront candidate{std::min(count, threads), threads / std::min(count, threads)};
  candidate.split = layers[0].batch > 1 ? Split::rows : Split::units;
  // Groups of rows that run one after the other cannot stay a few steps behind the layer that they
  // read.
  for (int k = 0; backward && k < count; ++k)
    if (kernels().of(cell, layers[k]).backward_groups(layers[k]) > 1) return {};
  if (forced) return candidate;

  for (int k = 0; k < count; ++k)
    if (plan(work_of(cell, layers[k]), candidate.team).threads == 1) candidate.team = 1;
  double in_turn = 0, longest = 0;  // seconds
  for (int k = 0; k < count; ++k) {
    const Work work = work_of(cell, layers[k]);
    // Without a wavefront all threads share these weights, and more of them stay in the caches.
    if (!fits_cache(work, candidate.team)) return {};
    const Plan team_plan = plan(work, candidate.team);
    if (team_plan.seconds > longest) {
      longest = team_plan.seconds;
      candidate.split = team_plan.split;
    }
    in_turn += plan(work, threads).seconds;
  }
  const index steps = layers[0].steps, piece = wavefront_steps(steps, layers[0].batch);
  const auto pieces = static_cast<double>((steps + piece - 1) / piece);
  const int rounds = (count + candidate.columns - 1) / candidate.columns;
  candidate.seconds = longest * (rounds + (candidate.columns - 1) / pieces) + region_seconds;
  constexpr double required_ratio = 0.95;
  return candidate.seconds <= required_ratio * in_turn ? candidate : Wavefront{};
}

template <class T>
void run_forward(int cell, const Wavefront& plan, const Layer<T>* layers, int count) {
  const CellKernels<T>& kernel = kernels().of(cell, layers[0]);
  run_columns(
      plan, count, [&](int k) { return kernel.forward_scratch(layers[k]); },
      [&](int k, const Team& team, void* scratch) { kernel.forward(layers[k], team, scratch); });
}

template <class T>
void run_backward(int cell, const Wavefront& plan, const Layer<T>* layers, const Gradients<T>* grads,
                  int count) {
  const CellKernels<T>& kernel = kernels().of(cell, layers[0]);
  run_columns(
      plan, count, [&](int k) { return kernel.backward_scratch(layers[k], grads[k]); },
      [&](int k, const Team& team, void* scratch) {
        kernel.backward(layers[k], grads[k], team, scratch);
      });
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

}  // namespace rnnfast
