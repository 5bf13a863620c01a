#include "cuda/plan.h"

#include <algorithm>

#include "cuda/layout.h"

namespace rnnfast::cuda {
namespace {

constexpr Tier tiers[] = {Tier::block, Tier::cluster, Tier::grid};
constexpr const char* names[] = {"block", "cluster", "grid"};

// Kernels count rows in 32 bits. No device has memory for the outputs of so many.
constexpr int most_rows = 1 << 30;

template <class Integer>
constexpr Integer divide_up(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// The largest n from 1 to `most` for which fits(n); 0 where 1 does not fit. What fits for n fits for
// less.
template <class Fits>
int largest(int most, const Fits& fits) {
  int below = 0, above = most + 1;
  while (above - below > 1) {
    const int n = below + (above - below) / 2;
    (fits(n) ? below : above) = n;
  }
  return below;
}

std::int64_t bytes_of(const Plan& plan, const Problem& problem) {
  return problem.backward ? BackwardLayout(plan, problem.cell, problem.sizes).bytes
                          : ForwardLayout(plan, problem.cell, problem.sizes, problem.hidden).bytes;
}

// Divides the rows of the batch among groups, of which a device holds `resident` for each direction at
// once; false where a group of one row does not fit. A group has as few rows as possible while all
// groups are resident: the products of a step take as long for one row as for the columns of a tile,
// and all else grows with the rows. Where the rows of so many groups do not fit the shared memory,
// groups of blocks and clusters run one after the other.
bool divide_rows(Plan& plan, const Device& device, const Problem& problem, int resident) {
  const auto fits = [&](int rows, int chunk) {
    Plan tried = plan;
    tried.rows = rows;
    tried.chunk = chunk;
    return bytes_of(tried, problem) <= device.shared_bytes;
  };
  const int batch = problem.batch, columns = problem.engine.columns;
  plan.rows = plan.chunk = divide_up(batch, std::min(batch, resident));
  if (!fits(plan.rows, plan.chunk)) {
    if (plan.tier != Tier::grid) {
      const int most = largest(plan.rows - 1, [&](int rows) { return fits(rows, rows); });
      if (most < 1) return false;
      plan.rows = plan.chunk = divide_up(batch, divide_up(batch, most));
    } else {
      if (problem.backward) return false;
      plan.chunk = columns * largest((plan.rows - 1) / columns,
                                     [&](int tiles) { return fits(plan.rows, tiles * columns); });
      if (plan.chunk < 1) return false;
    }
  }
  plan.groups = divide_up(batch, plan.rows);
  return true;
}

// A group's blocks, the units of each, and how many groups of each direction a device holds at once.
struct Groups {
  Tier tier;
  int blocks, units, resident;
};

// The plan with such groups; nullopt where it does not fit.
std::optional<Plan> fitted(const Device& device, const Problem& problem, const Groups& groups) {
  const CellInfo& cell = problem.cell;
  const EngineShape& engine = problem.engine;
  const bool backward = problem.backward;
  Plan plan{};
  plan.tier = groups.tier;
  plan.blocks = groups.blocks;
  plan.units = groups.units;
  for (int stage = 0; stage < cell.stages; ++stage) {
    const int own = width(cell.recurrent[stage]) * plan.units;
    const auto found = schedule(backward ? exchanged_width(plan) : own, backward ? own : problem.hidden,
                                engine, engine.most_tiles / cell.stages);
    if (!found) return {};
    plan.schedule[stage] = *found;
  }
  if (!divide_rows(plan, device, problem, groups.resident)) return {};
  plan.shared_bytes = static_cast<int>(bytes_of(plan, problem));
  if (plan.tier == Tier::grid) {
    const long own = long{plan.rows} * plan.units,
               parcels = BackwardLayout(plan, cell, problem.sizes).parcels;
    plan.exchange_bytes = plan.groups * (backward ? 2 * plan.blocks * parcels * own * problem.sizes.sum
                                                  : 2 * plan.blocks * own * problem.sizes.number);
  }
  return plan;
}

// The cycles of a step of a group of a cluster, without its barrier. They only rank the sizes of
// clusters. All constants are estimates for an H100: none was measured.
double cycles_of(const Plan& plan, const Problem& problem) {
  const EngineShape& engine = problem.engine;
  const int workers = block_threads / engine.lanes;
  // Multiply-adds a cycle: tensor cores reach 1270 of 2048 in bfloat16 and half of that in TF32, where
  // a tile has half the depth; a multiprocessor has 128 others.
  const double rate = engine.lanes == 1 ? 128 : 1270.0 * engine.depth / 16;
  const double tile = 1.0 * engine.rows * engine.depth * engine.columns * workers / rate;
  constexpr double formula = 130;  // of a cell, for as many elements as a block has threads
  constexpr double load = 8;       // from shared memory by all eight warps, one after the other
  constexpr double bytes = 32;     // that a multiprocessor sends to others in a cycle
  double tiles = 0;
  int pieces = 1;
  for (int stage = 0; stage < problem.cell.stages; ++stage) {
    const Schedule& s = plan.schedule[stage];
    tiles += divide_up(s.row_tiles * s.pieces, workers) * s.piece_tiles;
    pieces = std::max(pieces, s.pieces);
  }
  const int loads = (problem.backward ? plan.blocks : problem.cell.widest) * pieces;
  const double sent = 1.0 * plan.rows * exchanged_width(plan) *
                      (problem.backward ? pieces * problem.sizes.sum : problem.sizes.number);
  return tiles * tile * divide_up(plan.rows, engine.columns) +
         divide_up(plan.rows * plan.units, block_threads) * (formula + load * loads) + sent / bytes;
}

// The size of a cluster with the least time. Larger clusters win where multiprocessors would be idle;
// smaller ones where the batch gives work to all.
std::optional<Plan> of_clusters(const Device& device, const Residency& residency,
                                const Problem& problem) {
  std::optional<Plan> best;
  double least = 0;
  for (std::size_t i = 0; i < std::size(cluster_sizes); ++i) {
    const int blocks = cluster_sizes[i], resident = residency.clusters[i];
    const int units = round_up(divide_up(problem.hidden, blocks), 8);
    if (units * (blocks - 1) >= problem.hidden) break;  // a block would have no units
    if (resident < 1) continue;
    const auto plan = fitted(
        device, problem, {Tier::cluster, blocks, units, std::max(1, resident / problem.directions)});
    if (!plan) continue;
    const int waves = divide_up(plan->groups * problem.directions, resident);
    const double time = waves * cycles_of(*plan, problem);
    if (best && time >= least) continue;
    best = plan;
    least = time;
  }
  return best;
}

std::optional<Plan> of_tier(const Device& device, const Residency& residency, const Problem& problem,
                            Tier tier) {
  const int all = round_up(problem.hidden, 8);
  if (tier == Tier::block)
    return fitted(device, problem,
                  {tier, 1, all, std::max(1, device.multiprocessors / problem.directions)});
  if (tier == Tier::cluster) return of_clusters(device, residency, problem);
  for (int units = all; units >= 8; units -= 8) {
    const int blocks = divide_up(problem.hidden, units);
    const int resident = residency.blocks / (blocks * problem.directions);
    if (resident < 1) return {};  // and narrower blocks are more
    if (const auto plan = fitted(device, problem, {tier, blocks, units, resident})) return plan;
  }
  return {};
}

}  // namespace

Residency nominal_residency(const Device& device) {
  Residency residency{};
  residency.blocks = device.multiprocessors;
  if (device.capability >= 90)
    for (std::size_t i = 0; i < std::size(cluster_sizes); ++i)
      residency.clusters[i] = device.multiprocessors / cluster_sizes[i];
  return residency;
}

std::optional<Schedule> schedule(int rows, int depth, const EngineShape& engine, int tiles) {
  const int row_tiles = divide_up(rows, engine.rows);
  const int depth_tiles = round_up(divide_up(depth, engine.depth), 2);
  const int workers = block_threads / engine.lanes;
  std::optional<Schedule> best;
  int least = tiles + 1;
  // More pieces than give every worker an item only add sums of pieces.
  for (int pieces = 1; pieces <= depth_tiles; ++pieces) {
    const int each = round_up(divide_up(depth_tiles, pieces), 2);
    if (divide_up(depth_tiles, each) != pieces) continue;
    const int held = divide_up(row_tiles * pieces, workers) * each;
    if (held < least) {
      least = held;
      best = Schedule{row_tiles, depth_tiles, pieces, each};
    }
    if (row_tiles * pieces >= workers && best) break;
  }
  return best;
}

std::optional<Plan> plan(const Device& device, const Residency& residency, const Problem& problem,
                         std::optional<Tier> forced) {
  if (problem.batch > most_rows) return {};
  for (const Tier tier : tiers)
    if (!forced || *forced == tier)
      if (const auto plan = of_tier(device, residency, problem, tier)) return plan;
  return {};
}

const char* name_of(Tier tier) { return names[static_cast<int>(tier)]; }

std::optional<Tier> tier_named(const std::string& name) {
  for (const Tier tier : tiers)
    if (name == name_of(tier)) return tier;
  return {};
}

}  // namespace rnnfast::cuda
