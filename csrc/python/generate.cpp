#include "python/generate.h"

#include "core/generate.h"
#include "python/stack.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

// The tensors of a model and its state. They keep buffers alive.
struct ModelTensors {
  ModelTensors(const Stack& stack, const py::tuple& model, const py::tuple& state)
      : description(stack.description()),
        embedding(model[1], "the embedding", false),
        head_w(model[2], "the head's weight", false),
        head_b(model[3], "the head's bias", false),
        y(state[0], "y", true),
        h(state[1], "h", true),
        c(state[2], "c", true) {
    for (py::handle weight : model[0])
      weights.emplace_back(weight, description.weight_name(weights.size(), false), false);
    for (const View* view : {static_cast<const View*>(&y), static_cast<const View*>(&h),
                             static_cast<const View*>(&head_w)})
      require(*view);
  }

  LanguageModel model() const {
    return {description, all_weights(description, weights), embedding, head_w, head_b};
  }
  ModelState state() const { return {y, h, c}; }

  const Description& description;
  std::vector<Tensor> weights;
  Tensor embedding, head_w, head_b, y, h, c;
};

// Lets Python handle signals, so that Ctrl-C ends a loop.
void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void generate_tokens(const Stack& stack, int threads, const py::tuple& model, const py::tuple& state,
                     const py::tuple& sampling, py::handle uniforms, const py::tuple& outputs) {
  const ModelTensors tensors(stack, model, state);
  const Sampling how{sampling[0].cast<double>(), sampling[1].cast<index>(), sampling[2].cast<double>(),
                     sampling[3].cast<std::int64_t>()};
  const Tensor numbers(uniforms, "uniforms", false), chosen(outputs[0], "tokens", true),
      lengths(outputs[1], "lengths", true), log_probs(outputs[2], "log_probs", true);
  const py::gil_scoped_release release;
  generate(tensors.model(), how, tensors.state(), numbers, {chosen, lengths, log_probs}, threads,
           check_signals);
}

void search_beams(const Stack& stack, int threads, const py::tuple& model, const py::tuple& state,
                  const py::tuple& search, const py::tuple& outputs) {
  const ModelTensors tensors(stack, model, state);
  const Search how{search[0].cast<index>(), search[1].cast<std::int64_t>(), search[2].cast<double>()};
  const Tensor tokens(outputs[0], "tokens", true), lengths(outputs[1], "lengths", true),
      scores(outputs[2], "scores", true);
  const py::gil_scoped_release release;
  beam_search(tensors.model(), how, tensors.state(), {tokens, lengths, scores}, threads, check_signals);
}

}  // namespace

void add_generate(py::module_& m) {
  m.def("generate", &generate_tokens);
  m.def("beam_search", &search_beams);
}

}  // namespace rnnfast
