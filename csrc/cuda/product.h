// Rows of weights, held in registers for a whole sequence, times the columns of an operand in shared
// memory: out[m][b] = sum over k of weight(m, k) operand[b][k].
//
// An engine says how one tile is multiplied. Its worker is who does it together: a thread or a warp.
//
// Kept: pieces of an even number of tiles, and a multiplication by 1 / units in the place of a
// division, bring the compilation of bfloat16 from 53 to 38 s. The effect on the speed is not measured.
#pragma once

#include "cuda/numbers.h"

namespace rnnfast::cuda {

// One thread and its multiply-adds, in the type of the sums.
template <class T>
struct Scalars {
  static constexpr int lanes = 1, rows = 1, depth = 16, columns = 4;
  static constexpr int most_tiles = sizeof(T) == 8 ? 4 : 8;  // in registers

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

  // Calls put(row, column, value) for what this lane has of a tile.
  template <class Put>
  static RNNFAST_INLINE void put(const Sum& a, const Sum& b, int, const Put& put) {
#pragma unroll
    for (int i = 0; i < columns; ++i) put(0, i, a.value[i] + b.value[i]);
  }
};

// A warp on its tensor cores: bfloat16 and float16 with float32 sums, float32 as TF32.
template <class T>
struct TensorCores {
  static constexpr int lanes = 32, rows = 16, depth = 32 / sizeof(T), columns = 8;
  static constexpr int most_tiles = 40;

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
    const int row = m + lane / 4, at = k + lane % 4 * pair;
    return {{word(row, at, weight), word(row + 8, at, weight), word(row, at + depth / 2, weight),
             word(row + 8, at + depth / 2, weight)}};
  }

  static RNNFAST_INLINE void multiply(Sum& sum, const Tile& tile, const T* operand, int stride,
                                      int lane) {
    const T* at = operand + lane / 4 * stride + lane % 4 * pair;
    unsigned words[2];
    if constexpr (pair == 2) {
      words[0] = *reinterpret_cast<const unsigned*>(at);
      words[1] = *reinterpret_cast<const unsigned*>(at + depth / 2);
    } else {
      words[0] = to_tf32(at[0]);
      words[1] = to_tf32(at[depth / 2]);
    }
    multiply_tile(sum.value, tile.words, words, T{});
  }

  template <class Put>
  static RNNFAST_INLINE void put(const Sum& a, const Sum& b, int lane, const Put& put) {
    const int row = lane / 4, column = lane % 4 * 2;
    put(row, column, a.value[0] + b.value[0]);
    put(row, column + 1, a.value[1] + b.value[1]);
    put(row + 8, column, a.value[2] + b.value[2]);
    put(row + 8, column + 1, a.value[3] + b.value[3]);
  }
};

template <class Engine, int most_tiles>
class Product {
 public:
  // weight(m, k) may be asked beyond the last row and column, and is zero there.
  template <class Weight>
  RNNFAST_INLINE void load(const Schedule& schedule, const Weight& weight) {
    schedule_ = schedule;
    first_.item = thread() / Engine::lanes;
    find(first_);
    Place at = first_;
#pragma unroll
    for (int i = 0; i < most_tiles; ++i) {
      if (!at.there) continue;
      tiles_[i] = Engine::load(at.row, at.k * Engine::depth, lane(), weight);
      if (++at.k == at.end) next(at);
    }
  }

  // For the columns below `columns`; more of the operand are read, up to a multiple of Engine::columns.
  // Calls put(piece, m, column, sum), also for rows and columns beyond the last.
  template <class T, class Put>
  RNNFAST_INLINE void multiply(const T* operand, int stride, int columns, const Put& put) const {
    for (int column = 0; column < columns; column += Engine::columns) {
      Place at = first_;
      const T* from = operand + column * stride;
      typename Engine::Sum even{}, odd{};  // two chains, for latency
#pragma unroll
      for (int i = 0; i < most_tiles; ++i) {
        if (!at.there) break;
        Engine::multiply(i % 2 ? odd : even, tiles_[i], from + at.k * Engine::depth, stride, lane());
        // Pieces are of an even number of tiles: half the code that stores sums.
        if (++at.k < at.end || i % 2 == 0) continue;
        Engine::put(even, odd, lane(),
                    [&](int m, int b, auto sum) { put(at.piece, at.row + m, column + b, sum); });
        even = odd = {};
        next(at);
      }
    }
  }

 private:
  // Where a worker is: a tile of rows, a piece of its sum, and the tiles of depth in that.
  struct Place {
    int item, row, piece, k, end;
    bool there;
  };

  static RNNFAST_INLINE int lane() { return thread() % Engine::lanes; }

  RNNFAST_INLINE void next(Place& at) const {
    at.item += threads() / Engine::lanes;
    find(at);
  }
  RNNFAST_INLINE void find(Place& at) const {
    at.piece = at.item / schedule_.row_tiles;
    at.row = (at.item - at.piece * schedule_.row_tiles) * Engine::rows;
    at.k = at.piece * schedule_.piece_tiles;
    at.end = at.k + schedule_.piece_tiles;
    if (at.end > schedule_.depth_tiles) at.end = schedule_.depth_tiles;
    at.there = at.piece < schedule_.pieces;
  }

  Schedule schedule_;
  Place first_;
  typename Engine::Tile tiles_[most_tiles];
};

}  // namespace rnnfast::cuda
