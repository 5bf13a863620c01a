// The module _cuda. It checks sizes against a plan before any address is used.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "core/row_lengths.h"
#include "python/tensor.h"
#include "cuda/kernels.h"
#include "cuda/start.h"

namespace py = pybind11;

namespace rnnfast::cuda {
namespace {

// Calls f(kernels) with the kernels of a number type and an engine.
template <class F>
auto with_kernels(Dtype dtype, bool tf32, F f) {
  switch (dtype) {
    case Dtype::float64:
      return f(kernels<double, Scalars<double>>());
    case Dtype::bfloat16:
      return f(kernels<Bfloat16, TensorCores<Bfloat16>>());
    case Dtype::float16:
      return f(kernels<Float16, TensorCores<Float16>>());
    case Dtype::float32:
      return tf32 ? f(kernels<float, TensorCores<float>>()) : f(kernels<float, Scalars<float>>());
    default:
      throw py::type_error("dtype must be float32, float64, bfloat16 or float16");
  }
}

// The plan for the launches of one layer, and what the plan was made for.
struct Choice {
  int device, cell;
  std::string dtype_name;
  Dtype dtype;
  bool tf32, backward;
  int hidden, batch, directions;
  CellInfo info;
  Sizes sizes;
  Plan plan;

  long counters_bytes() const {
    return plan.tier == Tier::grid ? (4L * plan.groups * directions + 255) / 256 * 256 : 0;
  }
  long workspace_bytes() const { return counters_bytes() + directions * plan.exchange_bytes; }
};

void require_cell(int cell) {
  const int cells = kernels<float, Scalars<float>>().count;
  if (cell < 0 || cell >= cells)
    throw py::value_error("cell " + std::to_string(cell) + " is not in the table of " +
                          std::to_string(cells) + " cells");
}

std::string too_few_resident(const Device& device, const Residency& residency) {
  std::string text = "its " + std::to_string(device.multiprocessors) + " multiprocessors hold " +
                     std::to_string(residency.blocks) + " blocks of a grid at once";
  for (std::size_t i = 0; i < std::size(cluster_sizes); ++i)
    text += ", " + std::to_string(residency.clusters[i]) + " clusters of " +
            std::to_string(cluster_sizes[i]);
  return text + "; the layer needs more";
}

std::unique_ptr<Choice> choose(int device_number, int cell, const std::string& dtype, bool tf32,
                               bool backward, const std::array<int, 3>& sizes,
                               const std::optional<std::string>& tier) {
  require_cell(cell);
  const auto [hidden, batch, directions] = sizes;
  if (hidden < 1 || batch < 1 || directions < 1 || directions > 2)
    throw py::value_error("hidden is " + std::to_string(hidden) + ", batch " + std::to_string(batch) +
                          ", directions " + std::to_string(directions) +
                          "; expected at least 1 each, and at most 2 directions");
  std::optional<Tier> forced;
  if (tier && !(forced = tier_named(*tier)))
    throw py::value_error("tier is '" + *tier + "'; expected 'block', 'cluster' or 'grid'");
  auto choice = std::make_unique<Choice>();
  choice->device = device_number;
  choice->cell = cell;
  choice->dtype_name = dtype;
  choice->dtype = dtype_named(dtype);
  choice->tf32 = tf32;
  choice->backward = backward;
  choice->hidden = hidden;
  choice->batch = batch;
  choice->directions = directions;
  const Device device = facts(device_number);
  require_capability(device);
  require_current(device_number);
  const bool has_plan = with_kernels(choice->dtype, tf32, [&](const auto& kernels) {
    const auto& of_cell = kernels.cells[cell];
    choice->info = of_cell.info;
    choice->sizes = kernels.sizes;
    const Problem problem{choice->info,   kernels.sizes, kernels.engine,    backward,
                          choice->hidden, choice->batch, choice->directions};
    const auto* kernel = reinterpret_cast<const void*>(backward ? of_cell.backward : of_cell.forward);
    allow_all(kernel, device_number, device);
    const Residency residency = residency_of(kernel, device_number, device);
    const auto plan = cuda::plan(device, residency, problem, forced);
    if (plan) choice->plan = *plan;
    if (!plan && cuda::plan(device, nominal_residency(device), problem, forced))
      throw Refused(too_few_resident(device, residency));
    return plan.has_value();
  });
  return has_plan ? std::move(choice) : nullptr;
}

// Checks a layer's tensors and turns them into the structs of a Recurrence.
class Arguments {
 public:
  Arguments(const Choice& choice, std::int64_t steps, std::int64_t rows)
      : choice_(choice), steps_(steps), rows_(rows) {}

  // [T, B, width], or packed [rows, width].
  template <class T>
  Sequence<T> sequence(py::handle object, const char* name, std::int64_t width, bool required,
                       Dtype dtype) const {
    const Tensor view = tensor_of(object, name, !std::is_const_v<T>, required);
    if (!view) return {};
    if (rows_ >= 0) {
      expect(view, dtype, {rows_, width});
      return {static_cast<T*>(view.data()), 0, view.stride(0)};
    }
    expect(view, dtype, {steps_, choice_.batch, width});
    return {static_cast<T*>(view.data()), view.stride(0), view.stride(1)};
  }

  template <class T>
  Matrix<T> matrix(py::handle object, const char* name, std::int64_t height, std::int64_t width,
                   bool required) const {
    const Tensor view = tensor_of(object, name, !std::is_const_v<T>, required);
    if (!view) return {};
    expect(view, choice_.dtype, {height, width});
    return {static_cast<T*>(view.data()), view.stride(0)};
  }

  template <class T>
  const T* vector(py::handle object, const char* name, std::int64_t size) const {
    const Tensor view = tensor_of(object, name, false, false);
    if (!view) return nullptr;
    expect(view, choice_.dtype, {size});
    return static_cast<const T*>(view.data());
  }

  Resets resets(py::handle object) const {
    const Tensor view = tensor_of(object, "reset", false, false);
    if (!view) return {};
    if (rows_ >= 0) {
      expect(view, Dtype::boolean, {rows_}, false);
      return {static_cast<const std::uint8_t*>(view.data()), 0, view.stride(0)};
    }
    expect(view, Dtype::boolean, {steps_, choice_.batch}, false);
    return {static_cast<const std::uint8_t*>(view.data()), view.stride(0), view.stride(1)};
  }

  // Contiguous int64.
  const std::int64_t* table(py::handle object, const char* name, std::int64_t size) const {
    const Tensor view = tensor_of(object, name, false, true);
    expect(view, Dtype::int64, {size});
    return static_cast<const std::int64_t*>(view.data());
  }

  // At least `bytes` bytes of device memory; null for no bytes.
  void* memory(py::handle object, const char* name, std::int64_t bytes) const {
    if (bytes == 0) return nullptr;
    const Tensor view = tensor_of(object, name, true, true);
    if (view.dtype() != Dtype::uint8 || view.dims() != 1 || view.size(0) < bytes ||
        !view.has_contiguous_rows() || reinterpret_cast<std::uintptr_t>(view.data()) % 16 != 0)
      throw py::value_error(std::string(name) + " must be " + std::to_string(bytes) +
                            " contiguous bytes or more, aligned to 16; got " + view.dtype_name() + " " +
                            view.shape_text());
    return view.data();
  }

 private:
  Tensor tensor_of(py::handle object, const char* name, bool writable, bool required) const {
    if (required && object.is_none()) throw py::type_error(std::string(name) + " must not be None");
    return Tensor(object, name, writable, memory_place);
  }

  void expect(const View& view, Dtype dtype, std::initializer_list<std::int64_t> shape,
              bool contiguous = true) const {
    const std::string name = view.name();
    if (view.dtype() != dtype)
      throw py::type_error(name + " has dtype " + view.dtype_name() + "; expected " +
                           (dtype == choice_.dtype    ? choice_.dtype_name
                            : dtype == Dtype::boolean ? "bool"
                            : dtype == Dtype::int64   ? "int64"
                                                      : "float32"));
    if (view.device() != choice_.device)
      throw py::value_error(name + " is on device " + std::to_string(view.device()) + "; expected " +
                            std::to_string(choice_.device));
    view.require_shape(shape, contiguous);
  }

  const Choice& choice_;
  const std::int64_t steps_, rows_;
};

// The tensors of one direction, in the order of _cuda.pyi.
template <class T>
Recurrence<T> recurrence(const Choice& choice, const Arguments& checked, const py::tuple& tensors) {
  const std::int64_t B = choice.batch, H = choice.hidden, G = choice.info.weight_blocks * H,
                     S = choice.info.gates * H;
  const bool has_c = choice.info.cell_state, backward = choice.backward;
  const Dtype dtype = choice.dtype, real = sizeof(Real<T>) == 8 ? Dtype::float64 : Dtype::float32;
  constexpr std::size_t forward_tensors = 10, all_tensors = 17;
  if (tensors.size() != (backward ? all_tensors : forward_tensors))
    throw py::value_error("a direction has " + std::to_string(tensors.size()) + " tensors; expected " +
                          std::to_string(backward ? all_tensors : forward_tensors));
  Recurrence<T> r{};
  r.hidden = choice.hidden;
  r.batch = choice.batch;
  if (!backward) r.products = checked.sequence<const T>(tensors[0], "products", G, true, dtype);
  r.w_hh = checked.matrix<const T>(tensors[1], "w_hh", G, H, true);
  r.b_hh = checked.vector<T>(tensors[2], "b_hh", G);
  r.h0 = checked.matrix<const T>(tensors[3], "h0", B, H, false);
  if (has_c) r.c0 = checked.matrix<const T>(tensors[4], "c0", B, H, false);
  r.y = checked.sequence<T>(tensors[5], "y", H, true, dtype);
  if (has_c) r.cell_states = checked.sequence<Real<T>>(tensors[6], "cell_states", H, backward, real);
  r.gates = checked.sequence<T>(tensors[7], "gates", S, backward, dtype);
  r.h_n = checked.matrix<T>(tensors[8], "h_n", B, H, false);
  if (has_c) r.c_n = checked.matrix<T>(tensors[9], "c_n", B, H, false);
  if (!backward) return r;
  r.dy = checked.sequence<const T>(tensors[10], "dy", H, false, dtype);
  if (has_c) r.dcell_states = checked.sequence<const T>(tensors[11], "dcell_states", H, false, dtype);
  r.dh_n = checked.matrix<const T>(tensors[12], "dh_n", B, H, false);
  if (has_c) r.dc_n = checked.matrix<const T>(tensors[13], "dc_n", B, H, false);
  r.dgates = checked.sequence<T>(tensors[14], "dgates", S, true, dtype);
  r.dh0 = checked.matrix<T>(tensors[15], "dh0", B, H, false);
  if (has_c) r.dc0 = checked.matrix<T>(tensors[16], "dc0", B, H, false);
  return r;
}

// Runs a layer on the caller's stream. For packed sequences `first` [T + 1] is, in device memory, how
// many rows come before each step of `batch_sizes`; its values are not checked.
void run(const Choice& choice, std::uintptr_t stream_handle, std::int64_t steps, py::handle batch_sizes,
         py::handle first, py::handle reset, const py::list& directions, py::handle workspace) {
  if (static_cast<int>(directions.size()) != choice.directions)
    throw py::value_error("got " + std::to_string(directions.size()) + " directions; the plan is for " +
                          std::to_string(choice.directions));
  const Tensor sizes(batch_sizes, "batch_sizes", false);
  const bool packed = static_cast<bool>(sizes);
  const RowLengths packing = packed ? RowLengths::of_batch_sizes(sizes) : RowLengths();
  if (packed && packing.batch() != choice.batch)
    throw py::value_error("batch_sizes begin with " + std::to_string(packing.batch()) +
                          "; the plan is for " + std::to_string(choice.batch) + " rows");
  if (packed) steps = packing.steps();
  if (steps < 1 || steps > most_steps)
    throw py::value_error("there are " + std::to_string(steps) + " steps; expected 1 to " +
                          std::to_string(most_steps));
  const Arguments checked(choice, steps, packed ? packing.rows() : -1);
  const std::int64_t* step_begin = packed ? checked.table(first, "first", steps + 1) : nullptr;
  const Resets resets = checked.resets(reset);
  auto* space =
      static_cast<unsigned char*>(checked.memory(workspace, "workspace", choice.workspace_bytes()));
  const Stream stream{choice.device, reinterpret_cast<void*>(stream_handle)};
  require_current(choice.device);
  with_kernels(choice.dtype, choice.tf32, [&]<class T>(const NumberKernels<T>& kernels) {
    Launch<T> launch{};
    launch.directions = choice.directions;
    launch.plan = choice.plan;
    for (int d = 0; d < choice.directions; ++d) {
      const py::tuple tensors = directions[static_cast<std::size_t>(d)];
      Recurrence<T>& r = launch.direction[d];
      r = recurrence<T>(choice, checked, tensors);
      r.steps = static_cast<int>(steps);
      r.reverse = d == 1;
      r.step_begin = step_begin;
      r.resets = resets;
    }
    if (space) {
      launch.counters = reinterpret_cast<unsigned*>(space);
      launch.exchange = space + choice.counters_bytes();
      zero(space, choice.counters_bytes(), stream);
    }
    const auto& cell = kernels.cells[choice.cell];
    start(choice.backward ? cell.backward : cell.forward, launch, stream);
  });
}

}  // namespace
}  // namespace rnnfast::cuda

PYBIND11_MODULE(_cuda, m) {
  rnnfast::translate_errors();
  using namespace rnnfast::cuda;
  py::register_local_exception<Refused>(m, "RefusedError", PyExc_RuntimeError);
  py::class_<Choice>(m, "Plan")
      .def_property_readonly("tier", [](const Choice& c) { return name_of(c.plan.tier); })
      .def_property_readonly("groups", [](const Choice& c) { return c.plan.groups; })
      .def_property_readonly("blocks", [](const Choice& c) { return c.plan.blocks; })
      .def_property_readonly("rows", [](const Choice& c) { return c.plan.rows; })
      .def_property_readonly("chunk", [](const Choice& c) { return c.plan.chunk; })
      .def_property_readonly("units", [](const Choice& c) { return c.plan.units; })
      .def_property_readonly("shared_bytes", [](const Choice& c) { return c.plan.shared_bytes; })
      .def_property_readonly("workspace_bytes", &Choice::workspace_bytes)
      .def("run", &run);
  m.def("plan", &choose);
  m.def("device", [](int number) {
    const Device device = facts(number);
    py::dict properties;
    properties["capability"] = device.capability;
    properties["multiprocessors"] = device.multiprocessors;
    properties["shared_bytes"] = device.shared_bytes;
    return properties;
  });
}
