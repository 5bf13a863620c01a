// Runs the core, every cell of one instruction set, on tensors of exactly the promised size and with
// threads of every number and partition, so that the address and thread sanitizers see all that it
// touches. Results must not depend on the threads. Prints how many problems there were, those that are
// wrong, and a digest of the results.
//
// driver [EVERY [GUARDS [DTYPE...]]]: every EVERY-th problem alone; where blocks of memory have a
// guard, "none", "at_end" or "at_start"; the types of numbers, by default all. With "outside" in the
// place of a type the driver touches a byte beside a block, where a guard must stop it.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/stack.h"
#include "cpu/plan.h"
#include "generation.h"
#include "guarded.h"

namespace rnnfast {
namespace {

struct Sizes {
  index steps, batch, inputs, hidden, outputs;  // outputs < hidden: h is projected
};

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 2   ? Dtype::bfloat16
                           : sizeof(T) == 4 ? Dtype::float32
                                            : Dtype::float64;

using Shape = std::vector<index>;

std::size_t count_of(const Shape& shape) {
  std::size_t count = 1;
  for (const index size : shape) count *= static_cast<std::size_t>(size);
  return count;
}

// A tensor that owns memory of exactly its size; of no dimension: there is none.
template <class T>
struct Tensor {
  Shape shape;
  Numbers<T> numbers;

  View view(const char* name, Dtype dtype = dtype_of<T>) {
    if (shape.empty()) return View(name);
    if (shape.size() == 1) return {name, numbers.data(), dtype, {shape[0]}};
    if (shape.size() == 2) return {name, numbers.data(), dtype, {shape[0], shape[1]}};
    return {name, numbers.data(), dtype, {shape[0], shape[1], shape[2]}};
  }
};

// How a problem is run.
struct Way {
  Partition partition;
  int threads;
  bool training = true, held = false;  // held: with packed weights
};

struct Options {
  int layers = 1, directions = 1;
  bool states = false;   // initial states, resets, biases, and the cell states of every step
  bool lengths = false;  // rows of different lengths
};

template <class T>
using Results = std::vector<Numbers<T>>;

template <class T>
class Problem {
 public:
  Problem(int cell, Sizes n, Options options) : n_(n), options_(options) {
    const bool has_c = cell_info(cell).cell_state;
    const bool projected = n.outputs < n.hidden, states = options.states;
    stack_ = {cell,  options.layers,  options.directions, false, false, states, projected,
              false, states && has_c, Precision::highest};
    const index numbers = options.layers * options.directions, width = options.directions * n.outputs;
    x_ = random({n.steps, n.batch, n.inputs});
    if (states) h0_ = random({numbers, n.batch, n.outputs});
    if (states && has_c) c0_ = random({numbers, n.batch, n.hidden});
    const index rows = cell_info(cell).weight_blocks * n.hidden;
    for (index number = 0; number < numbers; ++number) {
      weights_.push_back(random({rows, number < options.directions ? n.inputs : width}));
      weights_.push_back(random({rows, n.outputs}));
      for (int bias = 0; bias < (states ? 2 : 0); ++bias) weights_.push_back(random({rows}));
      if (projected) weights_.push_back(random({n.outputs, n.hidden}));
    }
    if (options.lengths) sizes_.shape = {n.batch};
    for (index b = 0; options.lengths && b < n.batch; ++b)
      sizes_.numbers.push_back(static_cast<std::int64_t>(random_()) % (n.steps + 1));
    if (states) reset_.shape = {n.steps, n.batch};
    reset_.numbers.resize(states ? count_of(reset_.shape) : 0);
    for (std::uint8_t& reset : reset_.numbers) reset = random_() % 4 == 0;
    dy_ = random({n.steps, n.batch, width});
    dh_n_ = random({numbers, n.batch, n.outputs});
    if (has_c) dc_n_ = random({numbers, n.batch, n.hidden});
    if (stack_.cell_states) dcell_states_ = random({n.steps, n.batch, options.directions * n.hidden});
  }

  Results<T> run(Way way) {
    force(way.partition, true);
    std::vector<View> flat;
    for (Tensor<T>& weight : weights_)
      flat.push_back(weight.view(stack_.weight_name(flat.size(), false)));
    Call call(stack_, {x_.view("x"), h0_.view("h0"), c0_.view("c0"), all_weights(stack_, flat),
                       sizes_.view("sizes", Dtype::int64), reset_.view("reset", Dtype::boolean)});
    call.check_input();
    call.check_weights();
    call.check_states();
    Tensor<T> y = unwritten(dy_), h_n = unwritten(dh_n_), c_n = unwritten(dc_n_);
    Tensor<T> cell_states = unwritten(dcell_states_);
    Tensor<std::uint8_t> saved;
    if (way.training) {
      saved.shape = {call.saved_bytes()};
      saved.numbers.assign(count_of(saved.shape), 0xff);
    }
    const Outputs out{y.view("y"), h_n.view("h_n"), c_n.view("c_n"), cell_states.view("cell_states"),
                      saved.view("saved", Dtype::uint8)};
    out.check(call);
    std::vector<std::unique_ptr<Memory>> packed;
    if (way.held) packed = pack(call);
    Panels panels;
    for (const auto& memory : packed) panels.push_back(memory->data());
    forward(call, out, way.held ? &panels : nullptr, way.threads);
    Results<T> results{y.numbers, h_n.numbers, c_n.numbers, cell_states.numbers};
    if (!way.training) return results;

    Tensor<T> dx = unwritten(x_), dh0 = unwritten(h0_), dc0 = unwritten(c0_);
    std::vector<Tensor<T>> dweights;
    for (const Tensor<T>& weight : weights_) dweights.push_back(unwritten(weight));
    std::vector<View> dflat;
    for (Tensor<T>& dweight : dweights)
      dflat.push_back(dweight.view(stack_.weight_name(dflat.size(), true)));
    GradientViews grads{
        dy_.view("dy"), dh_n_.view("dh_n"), dc_n_.view("dc_n"), dcell_states_.view("dcell_states"),
        dx.view("dx"),  dh0.view("dh0"),    dc0.view("dc0"),    all_weights(stack_, dflat)};
    Tensor<double> h_norms{{stack_.layers, stack_.directions, call.steps}, {}}, c_norms = h_norms;
    h_norms.numbers.resize(count_of(h_norms.shape));
    c_norms.numbers.resize(count_of(c_norms.shape));
    grads.dh_norms = h_norms.view("dh_norms");
    if (call.info.cell_state) grads.dc_norms = c_norms.view("dc_norms");
    grads.check(call);
    backward(call, out.y, out.saved, grads, way.threads);
    for (const Tensor<T>* gradient : {&dx, &dh0, &dc0}) results.push_back(gradient->numbers);
    for (const Tensor<T>& dweight : dweights) results.push_back(dweight.numbers);
    for (const Tensor<double>* norms : {&h_norms, &c_norms}) {
      results.emplace_back();
      for (const double norm : norms->numbers)
        results.back().push_back(narrow<T>(static_cast<Real<T>>(norm)));
    }
    return results;
  }

  std::string text() const {
    const index figures[] = {n_.steps, n_.batch, n_.inputs, n_.hidden, n_.outputs};
    std::string text = cell_info(stack_.cell).name;
    for (int k = 0; k < 5; ++k) text += std::string(" ") + "TBIHR"[k] + std::to_string(figures[k]);
    text += ", " + std::to_string(stack_.layers) + " layers, " + std::to_string(stack_.directions);
    return text + " directions" + (options_.states ? ", states" : "") +
           (options_.lengths ? ", lengths" : "");
  }

 private:
  Tensor<T> random(Shape shape) {
    std::normal_distribution<Real<T>> normal;
    Tensor<T> tensor{shape, Numbers<T>(count_of(shape))};
    for (T& number : tensor.numbers) number = narrow<T>(Real<T>(0.3) * normal(random_));
    return tensor;
  }

  static Tensor<T> unwritten(const Tensor<T>& like) {
    const T nan = narrow<T>(std::numeric_limits<Real<T>>::quiet_NaN());
    return {like.shape, Numbers<T>(like.numbers.size(), nan)};
  }

  const Sizes n_;
  const Options options_;
  std::mt19937 random_{42};
  Description stack_;
  Tensor<T> x_, h0_, c0_;
  std::vector<Tensor<T>> weights_;
  Tensor<std::int64_t> sizes_;
  Tensor<std::uint8_t> reset_;
  Tensor<T> dy_, dh_n_, dc_n_, dcell_states_;
};

int seen = 0, problems = 0, failures = 0, every = 1;
std::uint64_t digest = 0xcbf29ce484222325;  // of all results: FNV-1a

template <class T>
void add_to_digest(const Results<T>& results) {
  for (const Numbers<T>& numbers : results) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(numbers.data());
    for (std::size_t k = 0; k < numbers.size() * sizeof(T); ++k)
      digest = (digest ^ bytes[k]) * 0x100000001b3;
  }
}

// Whether all numbers have the same bits, and none is a NaN.
template <class T>
bool same(const Numbers<T>& a, const Numbers<T>& b) {
  if (a.size() != b.size()) return false;
  if (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) != 0) return false;
  for (const T number : a)
    if (widen(number) != widen(number)) return false;
  return true;
}

template <class T>
void check(int cell, Sizes n, Options options, const std::vector<Way>& ways) {
  if (seen++ % every != 0) return;
  ++problems;
  Problem<T> problem(cell, n, options);
  doing = problem.text();
  const Results<T> expected = problem.run({Partition::one, 1});
  add_to_digest(expected);
  for (const Way& way : ways) {
    const Results<T> found = problem.run(way);
    for (std::size_t k = 0; k < found.size(); ++k)
      if (!same(found[k], expected[k])) {
        std::printf("%s: result %zu differs, partition %d, %d threads, %s%s\n", problem.text().c_str(),
                    k, static_cast<int>(way.partition), way.threads,
                    way.training ? "training" : "inference", way.held ? ", held weights" : "");
        ++failures;
      }
  }
}

template <class T>
void check_all(int cell, Sizes n) {
  std::vector<Way> ways{{Partition::one, 1, false}, {Partition::one, 1, false, true}};
  for (const int threads : {2, 3}) {
    ways.push_back({Partition::rows, threads});
    ways.push_back({Partition::units, threads});
    ways.push_back({Partition::units, threads, false});
    ways.push_back({Partition::units, threads, false, true});
  }
  for (const bool states : {false, true}) check<T>(cell, n, {.states = states}, ways);
  if (n.batch == 0 || n.steps * n.batch >= 512) return;
  check<T>(cell, n, {.states = true, .lengths = true}, ways);
  if (n.steps < 4) return;
  check<T>(cell, n, {.layers = 3, .states = true},
           {{Partition::wavefront, 2}, {Partition::wavefront, 3}, {Partition::wavefront, 6}});
  check<T>(cell, n, {.layers = 2, .directions = 2, .lengths = true},
           {{Partition::directions, 2}, {Partition::directions, 3}, {Partition::rows, 2}});
}

template <class T>
void check_cell(int cell) {
  force(Partition::chosen, true);
  doing = std::string("generation with ") + cell_info(cell).name;
  failures += check_generation<T>(cell, dtype_of<T>);
  const Sizes sizes[] = {{1, 1, 1, 1, 1},     {5, 3, 4, 3, 3},     {4, 2, 17, 65, 65},
                         {3, 1, 3, 257, 257}, {6, 33, 5, 17, 17},  {3, 40, 33, 48, 48},
                         {60, 2, 10, 20, 20}, {2, 300, 7, 40, 40}, {3, 0, 4, 5, 5},
                         {70, 9, 5, 18, 18},  {1, 2, 5, 37, 19},   {5, 3, 4, 20, 1},
                         {3, 33, 5, 70, 65},  {2, 300, 7, 40, 16}, {70, 9, 5, 18, 17},
                         {3, 0, 4, 5, 2},     {1, 40, 9, 33, 32},  {1, 13, 21, 37, 37}};
  for (const Sizes& n : sizes) {
    if (n.outputs < n.hidden && !cell_info(cell).projects) continue;
    check_all<T>(cell, n);
  }
}

template <class T>
void check_cells(const std::vector<std::string>& dtypes, const char* dtype) {
  if (!kernels().of<T>().cells) return;
  if (!dtypes.empty() && std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) return;
  for (int cell = 0; cell < kernels().cells; ++cell) check_cell<T>(cell);
}

}  // namespace
}  // namespace rnnfast

int main(int count, char** arguments) {
  using namespace rnnfast;
  if (count > 1) every = std::stoi(arguments[1]);
  const std::map<std::string, Guards> places{
      {"none", Guards::none}, {"at_end", Guards::at_end}, {"at_start", Guards::at_start}};
  const Guards guards = places.at(count > 2 ? arguments[2] : "none");
  use_guards(guards);
  const std::vector<std::string> dtypes(arguments + std::min(count, 3), arguments + count);
  if (dtypes == std::vector<std::string>{"outside"}) {
    doing = "a control";
    auto* block = static_cast<volatile char*>(allocate(64, 64));
    block[guards == Guards::at_start ? -1 : 64] = 0;
  }
  force_float32_parts(3);  // where there is a matrix unit
  check_cells<float>(dtypes, "float32");
  check_cells<double>(dtypes, "float64");
  check_cells<Bfloat16>(dtypes, "bfloat16");
  std::printf("%s: %d problems, %d failures\n", kernels().name, problems, failures);
  std::printf("digest %016llx\n", static_cast<unsigned long long>(digest));
  return failures != 0 || problems == 0;
}
