// One attention call, from its arguments to its results: what is done for which rows, in what order.
#pragma once

#include "internal.h"

namespace loki {

enum class Work { kScore, kAttend, kDense, kStep };

// The arguments are checked before; returns a loki_status.
int run(const loki_call& call, Work work);
int run_choose(const loki_choose_call& call);
int run_append(const loki_append_call& call);

// How many of the best rows reach `mass` of all weights, forced ones first. `scratch`: count floats.
int64_t mass_count(const float* weights, int64_t count, const uint8_t* forced, double mass,
                   float* scratch);

}  // namespace loki
