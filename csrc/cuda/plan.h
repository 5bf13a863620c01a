// Which tier runs a layer, and how its blocks share it. The plan is plain arithmetic on the properties
// of a device, so that tests need no device.
#pragma once

#include <optional>
#include <string>

#include "cuda/recurrence.h"

namespace rnnfast::cuda {

struct Sizes;

// The properties of a device that a plan depends on.
struct Device {
  int multiprocessors;
  int shared_bytes;  // the most that a block can have
  int most_cluster;  // the most blocks of a cluster; 1 where there are no clusters
  bool cooperative;  // whether a launch can require all blocks of a grid to be resident
};

// An engine of product.h: the shape of its tiles, the threads of a worker, and the tiles that a worker
// keeps.
struct EngineShape {
  int rows, depth, columns, lanes, most_tiles;
};

inline constexpr int block_threads = 256;

// Schedules a product of `rows` rows and `depth` terms on the workers of a block; nullopt where a
// worker would need more than `tiles` tiles.
std::optional<Schedule> schedule(int rows, int depth, const EngineShape& engine, int tiles);

// A pass of a layer that needs a plan.
struct Problem {
  const CellInfo& cell;
  const Sizes& sizes;
  const EngineShape& engine;
  bool backward;
  int hidden, batch, directions;
};

// The best plan of the forced tier, or of the first tier that has one; nullopt where no tier has one.
std::optional<Plan> plan(const Device& device, const Problem& problem, std::optional<Tier> forced);

const char* name_of(Tier tier);
std::optional<Tier> tier_named(const std::string& name);

}  // namespace rnnfast::cuda
