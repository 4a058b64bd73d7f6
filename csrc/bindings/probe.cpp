// What bench/peak.py asks for.
#include "fastnn/probe.h"

#include <pybind11/pybind11.h>

namespace fastnn::bindings {

namespace py = pybind11;

void bind_probe(py::module_& m) {
  m.def(
      "probe_fma",
      [](bool float64, int threads) { return cpu::probe_fma(float64 ? DType::Float64 : DType::Float32, threads); },
      py::arg("float64"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("probe_bandwidth", &cpu::probe_bandwidth, py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastnn::bindings
