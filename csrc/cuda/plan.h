// Which tier runs a layer, and how its blocks share it. Plain arithmetic on the facts of a device, so
// that it is tested without one.
#pragma once

#include <optional>
#include <string>

#include "cuda/recurrence.h"

namespace rnnfast::cuda {

struct Sizes;

// What the choice depends on.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block can have
  int most_cluster;  // blocks in a cluster; 1 where there are none
  bool cooperative;  // whether all blocks of a grid can be made resident
};

// What runs a product: how its tiles are shaped, how many a worker keeps, and the workers of a block.
struct EngineShape {
  int rows, depth, columns, lanes, most_tiles;
};

inline constexpr int block_threads = 256;

// A product of `rows` rows and `depth` terms on the workers of a block; nothing where its tiles do not
// fit their registers.
std::optional<Schedule> schedule(int rows, int depth, const EngineShape& engine, int tiles);

// A pass of a layer that needs a plan.
struct Problem {
  const CellInfo& cell;
  const Sizes& sizes;
  const EngineShape& engine;
  bool backward;
  int hidden, batch, directions;
};

// The best plan of the forced tier, or of the first tier that has one; nothing: no tier takes the
// layer.
std::optional<Plan> plan(const Device& device, const Problem& problem, std::optional<Tier> forced);

const char* name_of(Tier tier);
std::optional<Tier> tier_named(const std::string& name);

}  // namespace rnnfast::cuda
