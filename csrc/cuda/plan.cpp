#include "cuda/plan.h"

#include <algorithm>

#include "cuda/layout.h"

namespace rnnfast::cuda {
namespace {

int divide_up(int a, int b) { return (a + b - 1) / b; }

constexpr Tier tiers[] = {Tier::block, Tier::cluster, Tier::grid};
constexpr const char* names[] = {"block", "cluster", "grid"};

// The plan with these blocks and units; nullopt where it does not fit.
std::optional<Plan> fitted(const Device& device, const Problem& problem, Tier tier, int blocks,
                           int units) {
  const CellInfo& cell = problem.cell;
  const EngineShape& engine = problem.engine;
  const bool backward = problem.backward;
  Plan plan{};
  plan.tier = tier;
  plan.blocks = blocks;
  plan.units = units;
  for (int stage = 0; stage < cell.stages; ++stage) {
    const int own = width(cell.recurrent[stage]) * units;
    const auto found = schedule(backward ? exchanged_width(plan) : own, backward ? own : problem.hidden,
                                engine, engine.most_tiles / cell.stages);
    if (!found) return {};
    plan.schedule[stage] = *found;
  }
  // Prefers as many groups as can be resident at once. The rows of a group are a multiple of the
  // columns of a tile. All groups of a grid must be resident; groups of other tiers may run one after
  // the other.
  const int resident = device.multiprocessors / (blocks * problem.directions);
  if (resident < 1 && tier == Tier::grid) return {};
  const int most = divide_up(problem.batch, engine.columns);
  for (int groups = std::clamp(resident, 1, most); groups <= most; ++groups) {
    plan.rows = round_up(divide_up(problem.batch, groups), engine.columns);
    plan.groups = divide_up(problem.batch, plan.rows);
    if (tier == Tier::grid && plan.groups > resident) return {};
    plan.chunk = plan.rows;
    const auto bytes = [&] {
      return backward ? BackwardLayout(plan, cell, problem.sizes).bytes
                      : ForwardLayout(plan, cell, problem.sizes, problem.hidden).bytes;
    };
    while (tier == Tier::grid && !backward && bytes() > device.shared_bytes &&
           plan.chunk > engine.columns)
      plan.chunk -= engine.columns;
    plan.shared_bytes = bytes();
    if (plan.shared_bytes > device.shared_bytes) continue;
    if (tier == Tier::grid) {
      const long own = long{plan.rows} * plan.units,
                 parcels = BackwardLayout(plan, cell, problem.sizes).parcels;
      plan.exchange_bytes =
          plan.groups * (backward ? 2 * plan.blocks * parcels * own * problem.sizes.sum
                                  : 2 * plan.blocks * own * problem.sizes.number);
    }
    return plan;
  }
  return {};
}

std::optional<Plan> of_tier(const Device& device, const Problem& problem, Tier tier) {
  const int hidden = problem.hidden;
  const auto fits = [&](int blocks, int units) { return fitted(device, problem, tier, blocks, units); };
  const int all = round_up(hidden, 8);
  if (tier == Tier::block) return fits(1, all);
  if (tier == Tier::cluster) {
    for (int blocks = 2; blocks <= device.most_cluster; blocks *= 2) {
      const int units = round_up(divide_up(hidden, blocks), 8);
      if (units * (blocks - 1) >= hidden) break;  // a block would have no units
      if (const auto plan = fits(blocks, units)) return plan;
    }
    return {};
  }
  if (!device.cooperative) return {};
  for (int units = all; units >= 8; units -= 8)
    if (const auto plan = fits(divide_up(hidden, units), units)) return plan;
  return {};
}

}  // namespace

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

std::optional<Plan> plan(const Device& device, const Problem& problem, std::optional<Tier> forced) {
  for (const Tier tier : tiers)
    if (!forced || *forced == tier)
      if (const auto plan = of_tier(device, problem, tier)) return plan;
  return {};
}

const char* name_of(Tier tier) { return names[static_cast<int>(tier)]; }

std::optional<Tier> tier_named(const std::string& name) {
  for (const Tier tier : tiers)
    if (name == name_of(tier)) return tier;
  return {};
}

}  // namespace rnnfast::cuda
