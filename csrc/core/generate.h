// Loops over the tokens that a language model chooses.
#pragma once

#include <functional>

#include "core/language_model.h"

namespace rnnfast {

// How a token is drawn.
struct Sampling {
  double temperature;  // of the scores, before the softmax; 0: the likeliest token
  index top_k;         // only the k likeliest tokens, and those as likely as the last of them; 0: all
  double top_p;        // only the likeliest tokens whose probabilities reach p; 1: all
  std::int64_t stop;   // the token that ends a row; below 0: none
};

// What generate writes.
struct Generated {
  View tokens;     // int64 [B, steps]; after `stop` only stops
  View lengths;    // int64 [B], with the stop
  View log_probs;  // float64 [B], the sum over the row's tokens at temperature 1
};

// Draws a token for each row from `uniforms` (float64 [steps, B], from 0 to 1) and feeds it to the
// model, until all rows have ended. Begins with the output `state.y`. Leaves the states that all tokens
// but the last led to; those of a row that has ended do not include its `stop`. Calls `pause` between
// steps; what it throws ends the loop. Throws BadScores where scores are not numbers.
void generate(const LanguageModel& model, const Sampling& sampling, const ModelState& state,
              const View& uniforms, const Generated& out, int threads,
              const std::function<void()>& pause);

// How beams are searched.
struct Search {
  index beams;
  std::int64_t stop;  // as in Sampling
  double length_penalty;
};

// What beam_search writes: for each row the hypotheses with the highest scores, the best first.
struct Hypotheses {
  View tokens;   // int64 [B, beams, steps]; after `stop` only stops
  View lengths;  // int64 [B, beams], with the stop; 0: there are fewer hypotheses
  View scores;   // float64 [B, beams]: the log-probability / length^length_penalty
};

void beam_search(const LanguageModel& model, const Search& search, const ModelState& state,
                 const Hypotheses& out, int threads, const std::function<void()>& pause);

}  // namespace rnnfast
