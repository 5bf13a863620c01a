// The memory of a Python object: of a torch tensor, or, in CPU memory, of anything with the buffer
// protocol, such as a NumPy array. torch tensors are read through the DLPack C exchange API (dlpack.h
// 1.2, "DLPackExchangeAPI"), which costs nanoseconds, or through their Python methods where torch is
// too old for it.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "core/errors.h"
#include "core/layer.h"
#include "core/view.h"

namespace rnnfast {

// Throws std::invalid_argument for an object whose memory cannot be used. None makes an absent view.
class Tensor : public View {
 public:
  Tensor(pybind11::handle object, const char* name, bool writable, Place place = Place::cpu);
  Tensor(Tensor&&) = default;

 private:
  bool read_exchange_api(pybind11::handle object, Place place);
  bool read_torch_methods(pybind11::handle object, Place place);
  void read_buffer(pybind11::handle object, bool writable);
  void set_other_dtype(const std::string& name);
  [[noreturn]] void refuse(const std::string& why) const;

  struct Release {
    void operator()(Py_buffer* buffer) const {
      PyBuffer_Release(buffer);
      delete buffer;
    }
  };
  std::unique_ptr<Py_buffer, Release> buffer_;  // null for torch tensors
};

// Turns WrongType into a TypeError of Python. (pybind11 makes std::invalid_argument a ValueError.)
inline void translate_errors() {
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const WrongType& wrong) {
      PyErr_SetString(PyExc_TypeError, wrong.what());
    }
  });
}

}  // namespace rnnfast
