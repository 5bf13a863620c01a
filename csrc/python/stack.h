// A stack of recurrent layers for Python: core/stack.h on torch tensors and buffers. The GIL is
// released while kernels run, except in short forward calls.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "core/stack.h"

namespace rnnfast {

// What a call reads, in the order that every layer of the package uses.
struct Inputs {
  pybind11::handle x, h0, c0;
  pybind11::list weights;
  pybind11::handle sizes, reset;
};

// What a call writes; None is not wanted. `saved` is from new_saved, and keeps what backward needs.
struct WrittenTensors {
  pybind11::handle y, h_n, c_n, cell_states, saved;
};

// None means zeros.
struct GradientsOfOutputs {
  pybind11::handle y, h_n, c_n, cell_states;
};
// None is not wanted.
struct GradientsOfInputs {
  pybind11::handle x, h0, c0;
  pybind11::list weights;
  pybind11::handle h_norms, c_norms;  // GradientViews::dh_norms and dc_norms
};

// The packed weights of a stack, for calls without gradients while the weights do not change.
class Packed {
 public:
  Panels panels() const;

  // Whether these weights, biases aside, have the addresses, dtypes, shapes and strides of the packed
  // weights, and the instruction set is still the same. The caller must know whether the numbers are
  // still the same. Packed keeps the packed tensors alive: an address alone could be that of memory
  // that was freed and used again.
  bool is_of(const pybind11::list& weights) const;

 private:
  friend class Stack;
  const char* isa_ = nullptr;  // the instruction set whose kernels can read the panels
  pybind11::list weights_;     // None in the place of biases, which every call reads
  Description description_{};
  Dtype dtype_ = Dtype::other;
  index inputs_ = 0, hidden_ = 0, outputs_ = 0;
  std::vector<std::unique_ptr<Memory>> memory_;  // of every direction of every layer
};

// The memory that goes from forward to backward. Large memory is taken and freed without the GIL: to
// return it to the system costs tens of milliseconds a gigabyte.
struct FreeSaved {
  void operator()(Memory* memory) const;
};
using Saved = std::unique_ptr<Memory, FreeSaved>;

class Stack {
 public:
  explicit Stack(const Description& description);

  const Description& description() const { return description_; }

  // Raises ValueError for wrong shapes and TypeError for wrong dtypes.
  void forward(int threads, const Inputs& inputs, const WrittenTensors& outputs) const;

  // The same for torch tensors, with new outputs: returns (y, h_n, c_n, cell_states, saved), with None
  // for an output that does not exist; a step has no h_n. `save` is a function that makes a tensor of
  // the memory for backward, or None. `packed` is null, or from pack with the same weights. Returns
  // None where the kernels do not take the inputs: where x, a state or a weight has none of these exact
  // `types` or no memory that kernels read, or where x, sizes, a state or the number of weights does
  // not fit. The caller's slower path then handles the call or reports what is wrong. Every other error
  // raises.
  pybind11::object call(const pybind11::tuple& types, int threads, const Inputs& inputs,
                        pybind11::handle save, const Packed* packed) const;

  // The inputs of a module's call. `hx` has the states as the module's forward takes them. The weights
  // are the entries of `parameters` with these `names`. x must have `dims` dimensions, the last of size
  // `features`. `flat` is None, or the list of weights that torch.nn's own code would read.
  struct ModuleInputs {
    pybind11::handle x, hx;
    pybind11::dict parameters;
    pybind11::handle names, sizes, reset, flat;
    int dims;
    pybind11::handle features;
  };

  // The same as `call` for a module, without gradients. Returns what the module's forward returns.
  // Returns None also where a parameter is missing or is not the object in `flat`.
  pybind11::object call_module(const pybind11::tuple& types, int threads, const ModuleInputs& inputs,
                               const Packed* packed) const;

  // Reads the inputs of the forward call, and its outputs y and saved.
  void backward(int threads, const Inputs& inputs, pybind11::handle y, pybind11::handle saved,
                const GradientsOfOutputs& output_grads, const GradientsOfInputs& input_grads) const;

  // Packs the weights for `call`, which then reads only the biases. Of x only its dtype and features
  // matter.
  std::unique_ptr<Packed> pack(pybind11::handle x, const pybind11::list& weights) const;

  // Memory for `rows` rows of x of a dtype that kernels compute in, uninitialised.
  Saved new_saved(Dtype dtype, index rows, index hidden, index outputs) const;

 private:
  struct Results;
  struct Form;  // the form of x
  Results results(const pybind11::tuple& types, int threads, const Inputs& inputs, const Form* form,
                  pybind11::handle save, const Packed* packed) const;
  bool fits(const Packed& packed, const Call& call) const;

  const Description description_;
};

}  // namespace rnnfast
