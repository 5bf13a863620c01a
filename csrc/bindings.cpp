// The module _C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/run.h"
#include "stack.h"
#include "views.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = RNNFAST_COMPILER;
  info["isas"] = built_isas();
  info["openmp"] = std::to_string(_OPENMP);
  return info;
}

std::vector<std::string> cells() {
  std::vector<std::string> names;
  for (int cell = 0; cell < kernels().cells; ++cell) names.push_back(kernels().info[cell].name);
  return names;
}

std::unique_ptr<Memory> new_saved(const Stack& stack, const std::string& dtype, index rows,
                                  index hidden, index outputs) {
  return stack.new_saved(number_named(dtype), rows, hidden, outputs);
}

double measure_peak(const std::string& dtype, int threads, double seconds) {
  const auto peak = with_numbers(number_named(dtype),
                                 [](auto number) { return kernels().of<decltype(number)>().peak; });
  if (!(seconds >= 0)) throw py::value_error("seconds must not be negative");
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected >= 1");
  const py::gil_scoped_release release;
  return peak_flops(peak, threads, seconds);
}

}  // namespace
}  // namespace rnnfast

PYBIND11_MODULE(_C, m) {
  using namespace rnnfast;
  kernels();  // an instruction set that RNNFAST_ISA forces in vain fails here, at import
  py::class_<Memory>(m, "Block", py::buffer_protocol()).def_buffer([](Memory& memory) {
    return py::buffer_info(static_cast<unsigned char*>(memory.data()),
                           static_cast<py::ssize_t>(memory.size()));
  });
  py::class_<Packed>(m, "Packed");
  py::class_<Stack>(m, "Stack")
      .def(py::init([](int cell, int layers, int directions, bool single, bool reverse, bool bias,
                       bool projected, bool batch_first) {
        return Stack({cell, layers, directions, single, reverse, bias, projected, batch_first});
      }))
      .def("forward", &Stack::forward)
      .def("call", &Stack::call)
      .def("pack", &Stack::pack)
      .def("backward", &Stack::backward)
      .def("new_saved", &new_saved);
  m.def("release_memory", &release_memory);
  m.def("cells", &cells);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("supported_isas", &supported_isas);
  m.def("build_info", &build_info);
  m.def("max_threads", &max_threads);
  m.def("peak_flops", &measure_peak);
}
