// Launches kernels on the emulated device, for the thread sanitizer, which reports memory that two
// threads use with no barrier between them. Arguments: a tier and a pass, to launch no others. Prints a
// line for each launch. The build defines RNNFAST_NUMBER, RNNFAST_ENGINE (of product.h) and
// RNNFAST_CELLS.
#include <cmath>
#include <cstdio>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/instantiate.h"
#include "cuda/plan.cpp"  // one translation unit takes less time than three
#include "cuda/start.h"
#include "runtime.cpp"

namespace rnnfast::cuda {
namespace {

using T = RNNFAST_NUMBER;
using V = Real<T>;
using Engine = RNNFAST_ENGINE<T>;

struct Size {
  int steps, batch, hidden, directions;
  bool packed;
  int blocks;  // of a group, at least, where the tier has groups of several blocks
};

constexpr Size all_sizes[] = {
    {4, 9, 24, 1, false, 2}, {3, 9, 52, 2, true, 3}, {2, 20, 33, 2, false, 2}, {5, 1, 16, 1, true, 2}};

std::mt19937 random_bits(1);

template <class S>
std::vector<S> numbers(std::size_t count) {
  std::vector<S> made(count);
  for (S& number : made)
    number = rnnfast::narrow<S>(Real<S>(random_bits() % 2048) / 2048 - Real<S>(0.5));
  return made;
}

// The tensors of one direction of a layer, of random numbers, and of memory that the kernels write.
struct Tensors {
  std::vector<T> products, w_hh, b_hh, h0, c0, y, gates, h_n, c_n, dy, dcell_states, dh_n, dc_n, dgates,
      dh0, dc0;
  std::vector<V> cell_states;

  Tensors(const CellInfo& cell, const Size& size, std::size_t rows) {
    const std::size_t B = size.batch, H = size.hidden, G = cell.weight_blocks * H, S = cell.gates * H;
    products = numbers<T>(rows * G);
    w_hh = numbers<T>(G * H);
    b_hh = numbers<T>(G);
    for (auto* state : {&h0, &c0, &h_n, &c_n, &dh_n, &dc_n, &dh0, &dc0}) *state = numbers<T>(B * H);
    for (auto* sequence : {&y, &dy, &dcell_states}) *sequence = numbers<T>(rows * H);
    for (auto* sequence : {&gates, &dgates}) *sequence = numbers<T>(rows * S);
    cell_states = numbers<V>(rows * H);
  }

  Recurrence<T> recurrence(const CellInfo& cell, const Size& size) {
    const index B = size.batch, H = size.hidden, G = cell.weight_blocks * H, S = cell.gates * H;
    Recurrence<T> r{};
    r.steps = size.steps;
    r.batch = size.batch;
    r.hidden = size.hidden;
    r.products = {products.data(), B * G, G};
    r.w_hh = {w_hh.data(), H};
    r.b_hh = b_hh.data();
    r.h0 = {h0.data(), H};
    r.y = {y.data(), B * H, H};
    r.gates = {gates.data(), B * S, S};
    r.h_n = {h_n.data(), H};
    r.dy = {dy.data(), B * H, H};
    r.dh_n = {dh_n.data(), H};
    r.dgates = {dgates.data(), B * S, S};
    r.dh0 = {dh0.data(), H};
    if (!cell.cell_state) return r;
    r.c0 = {c0.data(), H};
    r.cell_states = {cell_states.data(), B * H, H};
    r.c_n = {c_n.data(), H};
    r.dcell_states = {dcell_states.data(), B * H, H};
    r.dc_n = {dc_n.data(), H};
    r.dc0 = {dc0.data(), H};
    return r;
  }
};

void require_finite(const std::vector<T>& found, const char* what) {
  for (const T number : found)
    if (!std::isfinite(widen(number))) throw std::runtime_error(std::string(what) + " is not finite");
}

// A plan for a device of few multiprocessors. Where a group can have several blocks, the blocks hold
// little: the grid's also of the rows of an operand.
std::optional<Plan> find_plan(const CellInfo& cell, const Size& size, Tier tier, bool backward) {
  constexpr Sizes bytes = sizes<T, Engine>();
  const Device device{90, 8, tier == Tier::grid ? 12 << 10 : 227 << 10};
  EngineShape engine{Engine::rows, Engine::depth, Engine::columns, Engine::lanes, Engine::most_tiles};
  for (; engine.most_tiles > 0; --engine.most_tiles) {
    const Problem problem{cell, bytes, engine, backward, size.hidden, size.batch, size.directions};
    const auto found = plan(device, nominal_residency(device), problem, tier);
    if (found && (tier == Tier::block || found->blocks >= size.blocks)) return found;
  }
  return {};
}

template <class Cell>
void run(const Size& size, Tier tier, bool backward) {
  constexpr CellInfo cell = info_of<Cell>();
  const auto found = find_plan(cell, size, tier, backward);
  if (!found) return;
  const Plan& plan = *found;
  std::vector<std::int64_t> step_begin{0};
  for (int t = 0; t < size.steps; ++t) {
    const int left = size.packed ? size.steps - t : size.steps;
    step_begin.push_back(step_begin.back() + (size.batch * left + size.steps - 1) / size.steps);
  }
  const auto rows = static_cast<std::size_t>(step_begin.back());
  std::vector<std::uint8_t> reset(rows);
  for (auto& flag : reset) flag = random_bits() % 4 == 0;
  std::vector<unsigned> counters(plan.groups * size.directions);
  std::vector<double> exchange(plan.exchange_bytes * size.directions / sizeof(double));
  std::vector<Tensors> tensors;
  Launch<T> launch{{}, size.directions, plan, counters.data(), exchange.data()};
  for (int d = 0; d < size.directions; ++d) tensors.emplace_back(cell, size, rows);
  for (int d = 0; d < size.directions; ++d) {
    Recurrence<T>& r = launch.direction[d] = tensors[d].recurrence(cell, size);
    r.reverse = d == 1;
    r.step_begin = size.packed ? step_begin.data() : nullptr;
    r.resets = {reset.data(), size.batch, 1};
  }
  const char* pass = backward ? "backward" : "forward";
  std::printf("%s %s %s blocks=%d rows=%d chunk=%d packed=%d\n", name_of(tier), pass, cell.name,
              plan.blocks, plan.rows, plan.chunk, size.packed);
  std::fflush(stdout);
  const auto kernel = backward ? backward_kernel<Cell, T, Engine> : forward_kernel<Cell, T, Engine>;
  allow_all(reinterpret_cast<const void*>(kernel), 0, facts(0));
  start(kernel, launch, {});
  for (const Tensors& t : tensors) {
    require_finite(backward ? t.dh0 : t.h_n, "a state");
    require_finite(backward ? t.dgates : t.y, "a result");
  }
}

template <class... Cell>
void run_all(CellList<Cell...>, const std::string& only_tier, const std::string& only_pass) {
  for (const Tier tier : {Tier::block, Tier::cluster, Tier::grid})
    for (const bool backward : {false, true})
      if ((only_tier.empty() || only_tier == name_of(tier)) &&
          (only_pass.empty() || backward == (only_pass == "backward")))
        for (const Size& size : all_sizes) (run<Cell>(size, tier, backward), ...);
}

}  // namespace
}  // namespace rnnfast::cuda

int main(int count, char** arguments) {
  using namespace rnnfast::cuda;
  run_all(CellList<RNNFAST_CELLS>{}, count > 1 ? arguments[1] : "", count > 2 ? arguments[2] : "");
}
