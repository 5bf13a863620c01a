// The layout of a block's shared memory: kernels use its offsets, and the plan its size.
#pragma once

#include "cuda/recurrence.h"

namespace rnnfast::cuda {

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out offsets in bytes, aligned for any access. Sizes are counted in 64 bits, since a plan asks
// for the layouts of batches that no device can hold. An offset of a layout that does fit is an int.
struct Arena {
  std::int64_t used = 0;
  constexpr int take(std::int64_t numbers, int bytes) {
    const std::int64_t offset = used;
    used += (numbers * bytes + 15) / 16 * 16;
    return static_cast<int>(offset);
  }
};

// What the layouts depend on beside the plan: bytes of a number and of a sum, and the engine's tiles.
struct Sizes {
  int number, sum;
  int tile_depth, tile_columns;
  constexpr int pad() const { return 16 / number; }  // puts the rows of an operand in different banks
};

constexpr int width(Gates gates) { return gates.end - gates.begin; }

// The width of an operand as a group exchanges it: the units of all blocks, padding included.
constexpr int exchanged_width(const Plan& plan) { return plan.blocks * plan.units; }

struct ForwardLayout {
  int stride, buffer;  // the sizes of an operand's row and of an operand, in numbers
  int operands;        // [2 or, where the tier is grid, 1][rows][stride]
  int partial;         // [pieces][gates of the window][units][columns]
  int columns;         // rows of a chunk, and one more to spread them over the banks
  int h, c;            // [rows][units], the states, of the type of sums
  int outgoing;        // [rows][units], the block's part of the next operand
  int bias;            // [gates][units]
  int kept;            // [slots][rows][units], the slots between two stages
  std::int64_t bytes;

  constexpr ForwardLayout(const Plan& plan, const CellInfo& cell, const Sizes& size, int hidden) {
    const int rows = round_up(plan.chunk, size.tile_columns);
    const int depth = round_up(hidden, 2 * size.tile_depth), width = exchanged_width(plan);
    stride = round_up(depth > width ? depth : width, 16) + size.pad();
    const std::int64_t operand = std::int64_t{rows} * stride;
    buffer = static_cast<int>(operand);
    columns = rows + 1;
    int pieces = 1;
    for (int i = 0; i < cell.stages; ++i)
      pieces = plan.schedule[i].pieces > pieces ? plan.schedule[i].pieces : pieces;
    const std::int64_t state_size = std::int64_t{plan.rows} * plan.units;
    Arena arena;
    operands = arena.take(operand * (plan.tier == Tier::grid ? 1 : 2), size.number);
    partial = arena.take(std::int64_t{pieces} * cell.widest * plan.units * columns, size.sum);
    h = arena.take(state_size, size.sum);
    c = arena.take(cell.cell_state ? state_size : 0, size.sum);
    outgoing = arena.take(state_size, size.number);
    bias = arena.take(cell.gates * plan.units, size.sum);
    kept = arena.take(cell.stages > 1 ? cell.slots * state_size : 0, size.sum);
    bytes = arena.used;
  }
};

struct BackwardLayout {
  int stride;   // the size of an operand's row, in numbers
  int operand;  // [rows][stride]: the gradients of the block's gates
  int inbox;    // [2][parcels][rows][units]; in device memory where the tier is grid
  int parcels;  // one for each block and piece
  int dh, dc;   // [rows][units], without the part that comes through the products
  std::int64_t bytes;

  constexpr BackwardLayout(const Plan& plan, const CellInfo& cell, const Sizes& size) {
    const int rows = round_up(plan.rows, size.tile_columns);
    stride = round_up(round_up(cell.widest * plan.units, 2 * size.tile_depth), 16) + size.pad();
    int pieces = 1;
    for (int i = 0; i < cell.stages; ++i)
      pieces = plan.schedule[i].pieces > pieces ? plan.schedule[i].pieces : pieces;
    parcels = plan.blocks * pieces;
    const std::int64_t state_size = std::int64_t{plan.rows} * plan.units;
    Arena arena;
    operand = arena.take(std::int64_t{rows} * stride, size.number);
    inbox = arena.take(plan.tier == Tier::grid ? 0 : 2 * parcels * state_size, size.sum);
    dh = arena.take(state_size, size.sum);
    dc = arena.take(cell.cell_state ? state_size : 0, size.sum);
    bytes = arena.used;
  }
};

}  // namespace rnnfast::cuda
