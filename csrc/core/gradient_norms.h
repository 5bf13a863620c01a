// The norms of the gradients of the states at every step, from the squares that
// the kernels write.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "core/call.h"
#include "cpu/memory.h"

namespace rnnfast {

template <class T>
class GradientNorms {
 public:
  // Absent views: no norms are wanted, and there are no squares.
  GradientNorms(const Call& call, const View& dh_norms, const View& dc_norms)
      : call_(call), h_(make(dh_norms, call.outputs)), c_(make(dc_norms, call.hidden)) {}

  // The squares of one direction of one layer.
  double* h_squares(int number) const { return of_direction(h_, number); }
  double* c_squares(int number) const { return of_direction(c_, number); }

  void write() const {
    write(h_);
    write(c_);
  }

 private:
  struct Squares {
    View norms;
    index blocks;
    std::unique_ptr<Memory> memory;
  };

  Squares make(const View& norms, index units) const {
    const index lanes = kernels().vector_bytes / index{sizeof(Real<T>)};
    Squares squares{norms, (units + lanes - 1) / lanes, nullptr};
    if (!norms) return squares;
    const auto count = static_cast<std::size_t>(call_.all_directions * call_.rows * squares.blocks);
    squares.memory = std::make_unique<Memory>(count * sizeof(double));
    return squares;
  }

  double* of_direction(const Squares& squares, int number) const {
    if (!squares.memory) return nullptr;
    return static_cast<double*>(squares.memory->data()) + number * call_.rows * squares.blocks;
  }

  void write(const Squares& squares) const {
    for (int number = 0; squares.memory && number < call_.all_directions; ++number) {
      const int direction = number % call_.stack.directions;
      const Ragged ragged = call_.lengths[direction].ragged();
      const double* square = of_direction(squares, number);
      double* const norms = vector<double>(squares.norms) + number * call_.steps;
      for (index t = 0; t < call_.steps; ++t) norms[t] = 0;
      for (index t = 0; t < call_.longest; ++t) {
        double sums[4] = {};  // four additions at once, since none waits for the others
        index left = (ragged.count ? ragged.count[t] : call_.batch) * squares.blocks;
        for (; left >= 4; left -= 4, square += 4)
          for (int i = 0; i < 4; ++i) sums[i] += square[i];
        for (; left > 0; --left) sums[0] += *square++;
        const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        norms[call_.reverses(direction) ? call_.longest - 1 - t : t] = std::sqrt(sum);
      }
    }
  }

  const Call& call_;
  const Squares h_, c_;
};

}  // namespace rnnfast
