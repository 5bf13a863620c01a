// cpu/rates.h for Python, which names units and dtypes. The GIL is released while a rate is measured.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast {

// Adds `units`, `product_unit`, `peak_flops`, `formula_rate` and `read_rate`.
void add_rates(pybind11::module_& m);

}  // namespace rnnfast
