// A stack of recurrent layers on tensors: every size is checked here, before any address is used, and
// nothing is written when a check fails. The GIL is released while kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "cpu/memory.h"
#include "layer.h"
#include "tensor.h"

namespace rnnfast {

// Describes a stack; holds no tensor. Sequences are x [T, B, I] ([B, T, I] where batch_first), packed
// [rows, I], or for one step of a single layer [B, I]. `sizes`, int64, are None where every row has
// every step, torch's batch_sizes [T] of a packed x, or the length of each row [B] of a padded one:
// steps past a row's length are neither read nor computed, and their outputs are zero. States are [L *
// D, B, H] for L layers and D directions, h with R in the place of H where it is projected (see
// layer.h), or [B, H] for a step and where the stack is `single`, one direction of one layer. Weights
// are a flat list in torch's order: for each layer and direction w_ih, w_hh, then b_ih and b_hh where
// there is `bias`, then w_hr where h is `projected`. A state or bias that is None means zeros (an
// input) or is not wanted (an output). `reset` is bool, x's shape without its features: where it is
// true, a row's states are zero before that step in each direction's own order, in every layer.
// `cell_states` are those of the last layer at every step, [T, B, D * H] or as x is.
struct Description {
  int cell, layers, directions;
  bool single;
  bool reverse;  // the only direction runs from the last step to the first
  bool bias, projected, batch_first;
  bool cell_states;  // whether to return them; for Stack::call
};

// What a call reads, in the order in which it travels everywhere.
struct Inputs {
  pybind11::handle x, h0, c0;
  pybind11::list weights;
  pybind11::handle sizes, reset;
};

// What a call writes; None: not wanted. `saved`, from new_saved, keeps what backward needs.
struct Written {
  pybind11::handle y, h_n, c_n, cell_states, saved;
};

// Gradients: of the outputs, None means zeros; of the inputs, None means not wanted.
struct GradientsOfOutputs {
  pybind11::handle y, h_n, c_n, cell_states;
};
struct GradientsOfInputs {
  pybind11::handle x, h0, c0;
  pybind11::list weights;
};

// The packed weights of a stack, for calls without gradients while the weights stay as they are.
class Packed {
 public:
  template <class T>
  T* panels(int number) const {
    return static_cast<T*>(memory_[static_cast<std::size_t>(number)]->data());
  }

  // Whether these weights lie where the packed ones lie, with the same dtypes, shapes and strides,
  // other than biases, and the instruction set is still the same. Whether the numbers there are still
  // the same is for the caller to know. The packed weights are kept: an address alone could be that of
  // memory that was freed and used again.
  bool is_of(const pybind11::list& weights) const;

 private:
  friend class Stack;
  const char* isa_ = nullptr;  // whose kernels can read them
  pybind11::list weights_;     // None in the place of biases, which every call reads
  Description of_{};
  Dtype dtype_ = Dtype::other;
  index inputs_ = 0, hidden_ = 0, outputs_ = 0;
  std::vector<std::unique_ptr<Memory>> memory_;  // of every direction of every layer
};

// What goes from forward to backward. Large memory is taken and freed without the GIL: what the system
// takes back costs tens of milliseconds a gigabyte.
struct FreeSaved {
  void operator()(Memory* memory) const;
};
using Saved = std::unique_ptr<Memory, FreeSaved>;

struct Call;

class Stack {
 public:
  explicit Stack(const Description& description);

  // Raises ValueError for shapes and TypeError for dtypes that do not fit.
  void forward(int threads, const Inputs& inputs, const Written& outputs) const;

  // The same on torch tensors, with outputs of its own: (y, h_n, c_n, cell_states, saved), None for
  // those that there are not; h_n is not for a step. `save` is a function that makes a tensor of memory
  // for what backward needs, or None. `packed` is null or from pack, with the same weights. Returns
  // None where the kernels do not take the inputs: where x, a state or a weight is not of one of these
  // exact `types` or has not the memory that they read, or where x, sizes, a state or the number of
  // weights does not fit. The caller's slower path then handles it or says what is wrong. Everything
  // else raises.
  pybind11::object call(const pybind11::tuple& types, int threads, const Inputs& inputs,
                        pybind11::handle save, const Packed* packed) const;

  // What a module's call has in the place of Inputs: the states `hx` as its forward has them, and as
  // weights those of its `parameters` that have these `names`. x must have `dims` dimensions, the last
  // of size `features`.
  struct ModuleInputs {
    pybind11::handle x, hx;
    pybind11::dict parameters;
    pybind11::handle names, sizes, reset;
    int dims;
    pybind11::handle features;
  };

  // call for a module whose stack it is, without gradients. Returns what the module's forward returns;
  // None also where a parameter is missing.
  pybind11::object call_module(const pybind11::tuple& types, int threads, const ModuleInputs& inputs,
                               const Packed* packed) const;

  // Reads what forward read and left.
  void backward(int threads, const Inputs& inputs, pybind11::handle y, pybind11::handle saved,
                const GradientsOfOutputs& given, const GradientsOfInputs& wanted) const;

  // For call, which then reads no weights but the biases. Of x only its dtype and features matter.
  std::unique_ptr<Packed> pack(pybind11::handle x, const pybind11::list& weights) const;

  // Memory for `rows` rows of x of a dtype that kernels compute in, uninitialised.
  Saved new_saved(Dtype dtype, index rows, index hidden, index outputs) const;

 private:
  struct Results;
  struct Form;  // of x
  Results results(const pybind11::tuple& types, int threads, const Inputs& inputs, const Form* form,
                  pybind11::handle save, const Packed* packed) const;
  bool fits(const Packed& packed, const Call& call) const;

  const Description description_;
};

}  // namespace rnnfast
