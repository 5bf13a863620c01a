// What Python, and code that is compiled once for all instruction sets, know of a cell: all but its
// formulas.
#pragma once

namespace rnnfast {

// The operator of ONNX that computes a cell.
struct Onnx {
  const char* op;
  int blocks;
  int order[4];  // torch's gate block for each block of the operator; ~k: block k negated
  // The operator's attributes that select the cell. Null or negative: the attribute does not exist.
  const char* activation = nullptr;
  int linear_before_reset = -1;
};

inline constexpr int most_stages = 2, most_gates = 4;

// A range of gates.
struct Gates {
  int begin, end;
};

// cells.h says what each field of a cell is.
struct CellInfo {
  const char* name;
  int slots, gates;
  int weight_blocks;  // G: the gate blocks in torch's weights
  int stages;         // dependent products with the recurrent weights in a step
  bool cell_state, projects;
  int weight_block[most_gates];
  const char* block_names;  // a letter for each gate block
  Gates input, recurrent[most_stages];
  int widest;  // the most gates that one stage's product feeds
  Onnx onnx;
};

}  // namespace rnnfast
