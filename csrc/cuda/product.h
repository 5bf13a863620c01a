// Rows of weights, held in registers for a whole sequence, times the columns of an operand in shared
// memory: out[m][b] = sum over k of weight(m, k) operand[b][k].
//
// An engine multiplies one tile. A worker is a thread or a warp, as the engine needs.
//
// Short code compiles fast. Pieces of an even number of tiles, multiplications by 1 / units instead of
// divisions, one address for the neighbouring sums of a row, and a loop that loads the weights: the
// last two reduce the compilation of bfloat16 for sm_90 from 33 to 8 s. Their effect on speed is not
// measured.
#pragma once

#include "cuda/numbers.h"

namespace rnnfast::cuda {

// One thread and its multiply-adds, in the type of the sums.
template <class T>
struct Scalars {
  static constexpr int lanes = 1, rows = 1, depth = 64 / sizeof(T), columns = 16 / sizeof(T);
  static constexpr int most_tiles = 8;                // in registers
  static constexpr int loaded_tiles = sizeof(T) / 4;  // in one turn of the loop that loads

  struct Tile {
    T weights[depth];
  };
  struct Sum {
    T value[columns];
  };

  template <class Weight>
  static RNNFAST_INLINE Tile load(int m, int k, int, const Weight& weight) {
    Tile tile;
#pragma unroll
    for (int i = 0; i < depth; ++i) tile.weights[i] = weight(m, k + i);
    return tile;
  }

  static RNNFAST_INLINE void multiply(Sum& sum, const Tile& tile, const T* operand, int stride, int) {
#pragma unroll
    for (int b = 0; b < columns; ++b)
#pragma unroll
      for (int i = 0; i < depth; ++i)
        sum.value[b] = fma(tile.weights[i], operand[b * stride + i], sum.value[b]);
  }

  // Calls put(row, column, values) for this lane's elements of a tile: in every row those of
  // neighbouring columns.
  template <class Put>
  static RNNFAST_INLINE void put(const Sum& a, const Sum& b, int, const Put& put) {
    T sums[columns];
#pragma unroll
    for (int i = 0; i < columns; ++i) sums[i] = a.value[i] + b.value[i];
    put(0, 0, sums);
  }
};

// A warp on its tensor cores: bfloat16 and float16 with float32 sums, float32 as TF32.
template <class T>
struct TensorCores {
  static constexpr int lanes = 32, rows = 16, depth = 32 / sizeof(T), columns = 8;
  static constexpr int most_tiles = 40, loaded_tiles = sizeof(T);

  struct Tile {
    unsigned words[4];
  };
  struct Sum {
    float value[4];
  };
  static constexpr int pair = 4 / sizeof(T);  // numbers in a word

  template <class Weight>
  static RNNFAST_INLINE unsigned word(int m, int k, const Weight& weight) {
    if constexpr (pair == 2)
      return weight(m, k).bits | static_cast<unsigned>(weight(m, k + 1).bits) << 16;
    else
      return to_tf32(weight(m, k));
  }

  template <class Weight>
  static RNNFAST_INLINE Tile load(int m, int k, int lane, const Weight& weight) {
    const int row = m + lane / 4, column = k + lane % 4 * pair;
    return {{word(row, column, weight), word(row + 8, column, weight),
             word(row, column + depth / 2, weight), word(row + 8, column + depth / 2, weight)}};
  }

  static RNNFAST_INLINE void multiply(Sum& sum, const Tile& tile, const T* operand, int stride,
                                      int lane) {
    const T* from = operand + lane / 4 * stride + lane % 4 * pair;
    unsigned words[2];
    if constexpr (pair == 2) {
      words[0] = *reinterpret_cast<const unsigned*>(from);
      words[1] = *reinterpret_cast<const unsigned*>(from + depth / 2);
    } else {
      words[0] = to_tf32(from[0]);
      words[1] = to_tf32(from[depth / 2]);
    }
    multiply_tile(sum.value, tile.words, words, T{});
  }

  template <class Put>
  static RNNFAST_INLINE void put(const Sum& a, const Sum& b, int lane, const Put& put) {
    const int row = lane / 4, column = lane % 4 * 2;
    const float upper[] = {a.value[0] + b.value[0], a.value[1] + b.value[1]};
    const float lower[] = {a.value[2] + b.value[2], a.value[3] + b.value[3]};
    put(row, column, upper);
    put(row + 8, column, lower);
  }
};

template <class Engine, int most_tiles>
class Product {
 public:
  // weight(m, k) must be zero beyond the last row and column.
  template <class Weight>
  RNNFAST_INLINE void load(const Schedule& schedule, const Weight& weight) {
    schedule_ = schedule;
    first_.item = thread() / Engine::lanes;
    find(first_);
    Position position = first_;
    // The number of a register is a constant. So the tiles of a turn enter at the end, and the next
    // turns move them to their places. With code for every tile the loads are three quarters of a
    // kernel. A position past the last item is past the last k too: its weights are zero.
    constexpr int entering = Engine::loaded_tiles, staying = most_tiles - entering;
    static_assert(most_tiles % entering == 0);
#pragma unroll 1
    for (int turn = 0; turn < most_tiles / entering; ++turn) {
#pragma unroll
      for (int i = 0; i < staying; ++i) tiles_[i] = tiles_[i + entering];
#pragma unroll
      for (int i = staying; i < most_tiles; ++i) {
        tiles_[i] = Engine::load(position.row, position.k * Engine::depth, lane(), weight);
        if (++position.k == position.end) next(position);
      }
    }
  }

  // Multiplies by the columns below `columns`, and reads columns of the operand up to a multiple of
  // Engine::columns. Calls put(piece, m, column, sums) for the sums of row m from `column` on, also for
  // rows and columns beyond the last.
  template <class T, class Put>
  RNNFAST_INLINE void multiply(const T* operand, int stride, int columns, const Put& put) const {
    for (int column = 0; column < columns; column += Engine::columns) {
      Position position = first_;
      const T* from = operand + column * stride;
      typename Engine::Sum even{}, odd{};  // two chains, for latency
#pragma unroll
      for (int i = 0; i < most_tiles; ++i) {
        if (!position.valid) break;
        Engine::multiply(i % 2 ? odd : even, tiles_[i], from + position.k * Engine::depth, stride,
                         lane());
        // A piece has an even number of tiles: this halves the code that stores sums.
        if (++position.k < position.end || i % 2 == 0) continue;
        Engine::put(even, odd, lane(), [&](int m, int b, const auto& sums) {
          put(position.piece, position.row + m, column + b, sums);
        });
        even = odd = {};
        next(position);
      }
    }
  }

 private:
  // The position of a worker: item `item`, which is piece `piece` of the sums of the tile at
  // `row`, and tile k of the depth tiles before `end`. Not valid past the last item.
  struct Position {
    int item, row, piece, k, end;
    bool valid;
  };

  static RNNFAST_INLINE int lane() { return thread() % Engine::lanes; }

  RNNFAST_INLINE void next(Position& position) const {
    position.item += threads() / Engine::lanes;
    find(position);
  }
  // A step from item to item without a division needs registers that float32 does not have.
  RNNFAST_INLINE void find(Position& position) const {
    position.piece = position.item / schedule_.row_tiles;
    position.row = (position.item - position.piece * schedule_.row_tiles) * Engine::rows;
    position.k = position.piece * schedule_.piece_tiles;
    position.end = position.k + schedule_.piece_tiles;
    if (position.end > schedule_.depth_tiles) position.end = schedule_.depth_tiles;
    position.valid = position.piece < schedule_.pieces;
  }

  Schedule schedule_;
  Position first_;
  typename Engine::Tile tiles_[most_tiles] = {};
};

}  // namespace rnnfast::cuda
