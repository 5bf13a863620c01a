#include "core/stack.h"

#include <algorithm>
#include <map>
#include <memory>

#include "core/gradient_norms.h"
#include "core/padding.h"
#include "cpu/memory.h"
#include "cpu/run.h"

namespace rnnfast {

void Description::check() const {
  const CellInfo& info = cell_info(cell);
  if (layers < 1 || layers > 1 << 20)
    throw std::invalid_argument("layers is " + std::to_string(layers) + "; expected at least 1");
  if (directions < 1 || directions > 2)
    throw std::invalid_argument("directions is " + std::to_string(directions) + "; expected 1 or 2");
  if ((single && layers * directions > 1) || (reverse && directions > 1))
    throw std::invalid_argument(
        "single needs 1 layer and 1 direction, and reverse needs 1 direction; got " +
        std::to_string(layers) + " layers and " + std::to_string(directions) + " directions");
  if (projected && !info.projects)
    throw std::invalid_argument(std::string("the cell ") + info.name + " has no projection w_hr");
  if (cell_states && !info.cell_state)
    throw std::invalid_argument(std::string("the cell ") + info.name + " has no cell states");
}

const char* Description::weight_name(std::size_t number, bool gradient) const {
  static constexpr const char* names[2][5] = {{"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"},
                                              {"dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr"}};
  const std::size_t k = number % weights_per_direction();
  return names[gradient][k < 2 || bias ? k : 4];
}

void Outputs::check(const Call& call) const {
  require(y);
  const Checker check(call.x);
  call.check_sequence(check, y, call.width);
  call.check_states(check, h_n, c_n);
  call.check_cell_states(check, cell_states);
  if (saved && (saved.dtype() != Dtype::uint8 || saved.dims() != 1 ||
                saved.size(0) != call.saved_bytes() || !saved.has_contiguous_rows()))
    throw std::invalid_argument("saved has shape " + saved.shape_text() + " and dtype " +
                                saved.dtype_name() + "; expected (" +
                                std::to_string(call.saved_bytes()) + ",) and uint8");
}

void GradientViews::check(const Call& call) const {
  const Checker check(call.x);
  call.check_sequence(check, dy, call.width);
  call.check_sequence(check, dx, call.inputs);
  call.check_states(check, dh_n, dc_n);
  call.check_cell_states(check, dcell_states);
  call.check_states(check, dh0, dc0);
  call.check_weights(check, weights);
  for (const View* norms : {&dh_norms, &dc_norms})
    if (*norms)
      require_dense(*norms, Dtype::float64, {call.stack.layers, call.stack.directions, call.steps});
  if (dc_norms && !dh_norms) throw std::invalid_argument("dc_norms needs dh_norms");
  if (dc_norms && !call.info.cell_state)
    throw std::invalid_argument(std::string("the cell ") + call.info.name + " has no cell states");
}

namespace {

// Memory for what only the next layer reads: outputs, or gradients of inputs. Layers that run one after
// the other share two buffers. Every layer of a wavefront has its own buffer.
template <class T>
class LayerBuffers {
 public:
  LayerBuffers(const Call& call, bool wavefront) : call_(call), wavefront_(wavefront) {}

  Sequence<T> buffer(int layer) {
    auto& memory = memory_[wavefront_ ? layer : layer % 2];
    if (!memory) memory = std::make_unique<Memory>(bytes(call_, 1));
    return call_.dense(static_cast<T*>(memory->data()), call_.width);
  }

  // Whether the buffers of a wavefront over `layers` layers are small.
  static bool is_small(const Call& call, int layers) {
    constexpr std::size_t most_bytes = std::size_t{32} << 20;
    return bytes(call, layers) <= most_bytes;
  }

 private:
  static std::size_t bytes(const Call& call, int layers) {
    return static_cast<std::size_t>(layers * call.rows * call.width) * sizeof(T);
  }

  const Call& call_;
  const bool wavefront_;
  std::map<int, std::unique_ptr<Memory>> memory_;
};

template <class T>
void run_layers(const Call& call, const Outputs& out, const Panels* panels, int threads) {
  const int layers = call.stack.layers, directions = call.stack.directions;
  clear_past_ends<T>(call, out.y, call.width);
  clear_past_ends<T>(call, out.cell_states, directions * call.hidden);
  keep_states<T>(call, out.h_n, call.h0, call.outputs);
  keep_states<T>(call, out.c_n, call.c0, call.hidden);
  std::vector<Layer<T>> jobs;
  jobs.reserve(static_cast<std::size_t>(call.all_directions));
  for (int number = 0; number < call.all_directions; ++number)
    jobs.push_back(
        call.layer<T>(number / directions, number % directions, out.cell_states, out.h_n, out.c_n,
                      out.saved ? call.saved_of<T>(out.saved, number) : nullptr,
                      panels ? static_cast<T*>((*panels)[static_cast<std::size_t>(number)]) : nullptr));
  Wavefront plan;
  if (directions == 1 && LayerBuffers<T>::is_small(call, layers))
    plan = wavefront(call.stack.cell, jobs.data(), layers, false, threads);
  LayerBuffers<T> buffers(call, static_cast<bool>(plan));
  Sequence<const T> x = call.sequence<const T>(call.x);
  for (int k = 0; k < layers; ++k) {
    Sequence<T> y = k == layers - 1 ? call.sequence<T>(out.y)
                    : out.saved     ? call.dense(call.saved_output<T>(out.saved, k), call.width)
                                    : buffers.buffer(k);
    Layer<T>* const layer = &jobs[static_cast<std::size_t>(k * directions)];
    for (int d = 0; d < directions; ++d) {
      layer[d].x = call.directed(x, d);
      layer[d].y = call.direction_part(y, d);
    }
    if (!plan) run_forward(call.stack.cell, layer, directions, threads);
    x = {y.data, y.step, y.row};
  }
  if (plan) run_forward(call.stack.cell, plan, jobs.data(), layers);
}

template <class T>
void run_back(const Call& call, const View& y, const View& saved, const GradientViews& grads,
              int threads) {
  const int layers = call.stack.layers, directions = call.stack.directions;
  clear_past_ends<T>(call, grads.dx, call.inputs);
  const auto weight_grads = [&](int k, int d) -> const Weights& {
    return grads.weights[static_cast<std::size_t>(k * directions + d)];
  };
  int lowest = 0;  // the lowest layer of which a gradient is wanted
  if (!grads.dx && !grads.dh0 && !grads.dc0 && !grads.dh_norms)
    while (lowest < layers && !weight_grads(lowest, 0).any() &&
           !weight_grads(lowest, directions - 1).any())
      ++lowest;
  const auto output = [&](int k) {
    return k == layers - 1 ? call.sequence<T>(y)
                           : call.dense(call.saved_output<T>(saved, k), call.width);
  };
  const View none("");
  std::vector<Layer<T>> jobs;  // from the last layer to the lowest
  jobs.reserve(static_cast<std::size_t>(call.all_directions));
  for (int k = layers - 1; k >= lowest; --k)
    for (int d = 0; d < directions; ++d)
      jobs.push_back(
          call.layer<T>(k, d, none, none, none, call.saved_of<T>(saved, k * directions + d), nullptr));
  Wavefront plan;
  if (directions == 1 && LayerBuffers<T>::is_small(call, layers - lowest))
    plan = wavefront(call.stack.cell, jobs.data(), layers - lowest, true, threads);
  LayerBuffers<T> buffers(call, static_cast<bool>(plan));
  GradientNorms<T> norms(call, grads.dh_norms, grads.dc_norms);
  std::vector<Gradients<T>> job_grads(jobs.size());
  Sequence<const T> dy = call.sequence<const T>(grads.dy);
  for (int k = layers - 1; k >= lowest; --k) {
    Sequence<const T> x = call.sequence<const T>(call.x);
    Sequence<T> dx = call.sequence<T>(grads.dx);
    if (k > 0) {
      const Sequence<T> below = output(k - 1);
      x = {below.data, below.step, below.row};
      dx = {};
    }
    if (k > lowest) dx = buffers.buffer(k);
    const auto first_job = static_cast<std::size_t>((layers - 1 - k) * directions);
    for (int d = 0; d < directions; ++d) {
      const int number = k * directions + d;
      const Weights& w = weight_grads(k, d);
      const std::size_t job = first_job + static_cast<std::size_t>(d);
      jobs[job].x = call.directed(x, d);
      jobs[job].y = call.direction_part(output(k), d);
      job_grads[job] = {call.direction_part(dy, d),
                        call.cell_states_of<const T>(grads.dcell_states, k, d),
                        state<const T>(grads.dh_n, number),
                        state<const T>(grads.dc_n, number),
                        call.directed(dx, d),
                        false,
                        state<T>(grads.dh0, number),
                        state<T>(grads.dc0, number),
                        matrix<T>(w.w_ih),
                        matrix<T>(w.w_hh),
                        vector<T>(w.b_ih),
                        vector<T>(w.b_hh),
                        matrix<T>(w.w_hr),
                        norms.h_squares(number),
                        norms.c_squares(number)};
    }
    if (!plan)
      run_backward(call.stack.cell, &jobs[first_job], &job_grads[first_job], directions, threads);
    dy = {dx.data, dx.step, dx.row};
  }
  if (plan) run_backward(call.stack.cell, plan, jobs.data(), job_grads.data(), layers - lowest);
  norms.write();
}

template <class T>
std::unique_ptr<Memory> pack_direction(const Call& call, int k, int direction) {
  const View none("");
  Layer<T> layer = call.layer<T>(k, direction, none, none, none, nullptr, nullptr);
  const CellKernels<T>& kernel = kernels().of(call.stack.cell, layer);
  auto memory =
      std::make_unique<Memory>(static_cast<std::size_t>(kernel.panels_size(layer)) * sizeof(T));
  layer.panels = static_cast<T*>(memory->data());
  kernel.pack(layer);
  return memory;
}

}  // namespace

void forward(const Call& call, const Outputs& out, const Panels* panels, int threads) {
  with_numbers(call.x.dtype(),
               [&](auto number) { run_layers<decltype(number)>(call, out, panels, threads); });
}

void backward(const Call& call, const View& y, const View& saved, const GradientViews& grads,
              int threads) {
  with_numbers(call.x.dtype(),
               [&](auto number) { run_back<decltype(number)>(call, y, saved, grads, threads); });
}

std::vector<std::unique_ptr<Memory>> pack(const Call& call) {
  std::vector<std::unique_ptr<Memory>> memory;
  for (int k = 0; k < call.stack.layers; ++k)
    for (int d = 0; d < call.stack.directions; ++d)
      memory.push_back(with_numbers(
          call.x.dtype(), [&](auto number) { return pack_direction<decltype(number)>(call, k, d); }));
  return memory;
}

std::optional<std::size_t> saved_bytes(const Description& stack, Dtype dtype, index rows, index hidden,
                                       index outputs) {
  constexpr index most_features = index{1} << 40;
  const index layers = stack.layers, directions = stack.directions;
  if (rows < 0 || hidden < 0 || hidden > most_features || outputs < 0 || outputs > most_features)
    return {};
  return with_numbers(dtype, [&](auto number) -> std::optional<std::size_t> {
    using T = decltype(number);
    const index row = kernels().of<T>().cells[stack.cell].saved_row(hidden) * index{sizeof(Real<T>)};
    index part, layer_outputs, bytes;  // as in Call::saved_bytes
    if (__builtin_mul_overflow(rows, row, &part) ||
        __builtin_mul_overflow(part, layers * directions, &part) ||
        __builtin_mul_overflow(rows, outputs * directions, &layer_outputs) ||
        __builtin_mul_overflow(layer_outputs, (layers - 1) * index{sizeof(T)}, &layer_outputs) ||
        __builtin_add_overflow(part, layer_outputs, &bytes))
      return {};
    return static_cast<std::size_t>(bytes);
  });
}

}  // namespace rnnfast
