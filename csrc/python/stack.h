// A stack of recurrent layers for Python: core/stack.h on torch tensors and buffers. The GIL is
// released while kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "core/stack.h"

namespace rnnfast {

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
  Panels panels() const;

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
