// Which tier runs a layer, and how its blocks share it. The plan is plain arithmetic on the properties
// of a device, so that tests need no device.
#pragma once

#include <iterator>
#include <optional>
#include <string>

#include "cuda/recurrence.h"

namespace rnnfast::cuda {

struct Sizes;

// The properties of a device that a plan depends on.
struct Device {
  int capability;  // ten times the major number of its compute capability, and the minor number
  int multiprocessors;
  int shared_bytes;  // the most that a block can have
};

// The blocks of a cluster in a plan. 8 are possible on every device with clusters.
inline constexpr int cluster_sizes[] = {2, 4, 8, 16};
inline constexpr int most_portable_cluster = 8;

// How many blocks and clusters of a kernel a device holds at once, if each block has the most shared
// memory. Groups of device memory need all their blocks at once, and so does a cluster.
struct Residency {
  int blocks;                              // of a grid; 0 where a launch cannot require it
  int clusters[std::size(cluster_sizes)];  // for each size; 0 where there are no such clusters
};

// The residency that the number of multiprocessors suggests. The device itself may hold fewer.
Residency nominal_residency(const Device& device);

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
std::optional<Plan> plan(const Device& device, const Residency& residency, const Problem& problem,
                         std::optional<Tier> forced);

const char* name_of(Tier tier);
std::optional<Tier> tier_named(const std::string& name);

}  // namespace rnnfast::cuda
