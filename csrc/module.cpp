// _C: a window into libtaut_cpu.so. No tensors cross it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "common/impl.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def(
      "list_impls",
      [] {
        py::dict all;
        for (const auto& op : taut::ops()) {
          if (std::string(op.device).starts_with("emulated")) continue;
          if (!all.contains(op.name)) all[op.name] = py::list();
          for (const auto& name : op.impls) all[op.name].cast<py::list>().append(name);
        }
        return all;
      },
      "Every op and its impls, in priority order.");
  m.def(
      "list_ops",
      [] {
        py::list rows;
        for (const auto& op : taut::ops()) rows.append(py::make_tuple(op.name, op.device, op.impls));
        return rows;
      },
      "Rows (op, device, impls in priority order) of everything that is loaded.");
  m.def("force_impl", &taut::force_impl, py::arg("op"), py::arg("impl"),
        "Let only `impl` (or its variants) run `op`; an empty string gives the choice back to the table.");
  m.def("batch_invariant", &taut::batch_invariant);
  m.def("set_batch_invariant", &taut::set_batch_invariant, py::arg("on"));
  m.def("forced_impl", [](const std::string& op) { return taut::forced_impl(op); }, py::arg("op"));
  m.def(
      "explain",
      [](const std::string& name, const std::map<std::string, int64_t>& sizes, const std::string& device) {
        for (const auto& op : taut::ops())
          if (op.name == name && op.device == device) {
            py::list rows;
            for (const auto& v : op.explain(sizes)) rows.append(py::make_tuple(v.impl, v.chosen, v.reason));
            return rows;
          }
        throw py::value_error("no op '" + name + "' on device '" + device + "'");
      },
      py::arg("op"), py::arg("sizes"), py::arg("device") = "cpu", "Rows (impl, chosen, reason) of the op's table for a call of these sizes.");
  m.def(
      "cpu_features",
      [] {
        const auto& f = taut::cpu_features();
        py::dict d;
        d["avx2"] = f.avx2;
        d["avxvnni"] = f.avxvnni;
        d["avx512bw"] = f.avx512bw;
        d["avx512vnni"] = f.avx512vnni;
        d["avx512bf16"] = f.avx512bf16;
        d["amx"] = f.amx;
        d["neon"] = f.neon;
        d["neondot"] = f.neondot;
        d["i8mm"] = f.i8mm;
        return d;
      },
      "What this processor and operating system can run.");
  m.def(
      "build_info",
      [] {
        py::dict d;
        d["version"] = TAUT_VERSION;
        d["compiler"] = TAUT_COMPILER;
        d["torch_target"] = "2.11";
        d["architecture"] = TAUT_ARCHITECTURE;
        d["cuda"] = sizeof(TAUT_CUDA_ARCHS_STRING) > 1 ? py::cast(TAUT_CUDA_ARCHS_STRING) : py::object(py::none());
        return d;
      },
      "How this build was made.");
}
