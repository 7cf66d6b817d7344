// The Python module: a table of contents. With native_step.{h,cpp} the only file that knows pybind11.
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <iterator>

#include "native_step.h"
#include "step_cpu.h"

PYBIND11_MODULE(FASTNLCG_MODULE, m) {
  using namespace fastnlcg;
  using namespace py::literals;

  py::register_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const PythonError&) {  // already set
    } catch (const BufferTypeError& error) {
      PyErr_SetString(PyExc_TypeError,
                      ("expected an array with the buffer protocol or DLPack, got " + error.type_name).c_str());
    }
  });

  m.attr("version") = FASTNLCG_VERSION;
#ifdef __clang__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.def("instruction_sets", [] {
    const char* names[kInstructionSets];
    const int count = cpu_instruction_sets(names);
    return std::vector<std::string>(names, names + count);
  });
  m.def("instruction_set", [] { return std::string(cpu_kernels().name); });
#ifdef _OPENMP
  m.attr("openmp") = true;
  m.def("max_threads", [] { return omp_get_max_threads(); });
#else
  m.attr("openmp") = false;
  m.def("max_threads", [] { return 1; });
#endif
  m.def("cuda_status", [] {
    const CudaStatus status = cuda_status();
    return py::dict("built"_a = status.built, "architectures"_a = status.architectures, "devices"_a = status.devices,
                    "runtime"_a = status.runtime_version, "driver"_a = status.driver_version,
                    "unavailable_reason"_a = status.unavailable_reason);
  });

  const auto names = [](auto& all) { return std::vector<std::string>(std::begin(all), std::end(all)); };
  m.attr("preconditioners") = names(kPreconditionerNames);
  m.attr("updates") = names(kUpdateRuleNames);
  py::list options;
  Options any;
  each_option(any, [&](const char* name, const auto&) { options.append(name); });
  m.attr("options") = options;
  py::dict scalars;
  each_scalar([&](const char* name, double start) { scalars[name] = start; });
  m.attr("scalars") = scalars;
  m.attr("row_doubles") = static_cast<int>(kColumns);
  m.attr("row_signature") = static_cast<int>(kStepNumber);
  m.attr("diagnostics_moment") = kDiagnostics;
  m.attr("block_elements") = kBlockElements;
  // Whether two lists hold the same objects.
  m.def(
      "same_objects",
      [](const py::list& a, const py::list& b) {
        const Py_ssize_t n = PyList_GET_SIZE(a.ptr());
        if (n != PyList_GET_SIZE(b.ptr())) return false;
        for (Py_ssize_t i = 0; i < n; ++i) {
          if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
        }
        return true;
      },
      "a"_a, "b"_a);
  m.def("chunk_elements", [](std::int64_t n) { return chunk_elements(n < 0 ? 0 : n); }, "n"_a);
  m.def("workspace_doubles", &workspace_doubles, "n"_a, "segments"_a, "groups"_a);
  static py::exception<RanksDisagree> ranks_disagree(m, "RanksDisagree", PyExc_RuntimeError);
  py::register_local_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const RanksDisagree&) {
      py::set_error(ranks_disagree, "the ranks are not about to take the same step");
    }
  });

  py::class_<Buffer, BufferPtr>(m, "Buffer", py::module_local())
      .def(py::init([](const py::object& owner) { return std::make_shared<Buffer>(owner.ptr()); }))
      .def_property_readonly("pointer", [](const Buffer& b) { return reinterpret_cast<std::uintptr_t>(b.data()); })
      .def_property_readonly("size", &Buffer::size)
      .def_property_readonly("dtype", &Buffer::dtype)
      .def_property_readonly("device", &Buffer::device)
      .def_property_readonly("readonly", &Buffer::readonly)
      .def_property_readonly("contiguous", &Buffer::contiguous)
      .def("advise_huge_pages", &Buffer::advise_huge_pages);

  using Number = NativeStep::Number;
  py::class_<NativeStep>(m, "Step", py::module_local())
      .def(py::init<const std::string&, const std::string&, std::uintptr_t>(), "state_dtype"_a, "device"_a = "cpu",
           "stream"_a = 0)
      .def("set_options", &NativeStep::set_options, "options"_a)
      .def("lay_out", &NativeStep::lay_out, "n"_a, "table"_a, "groups"_a, "keys"_a, "exchange"_a, "tensor_type"_a,
           "workspace"_a = nullptr)
      .def("set_exchange", &NativeStep::set_exchange, "mine"_a, "all"_a, "owned"_a, "elements"_a, "every_decision"_a,
           "gather"_a)
      .def(
          "step",
          [](NativeStep& self, const NativeStep::Tensors& at, std::vector<double> lr, std::vector<double> weight_decay,
             std::vector<bool> maximize, double active_set, double loss, int threads, std::vector<Number> lr_on_device,
             Number loss_on_device, Number grad_scale, Number found_inf) {
            return self.step(at, {std::move(lr), std::move(weight_decay), std::move(maximize), active_set, loss,
                                  threads, std::move(lr_on_device), loss_on_device, grad_scale, found_inf});
          },
          "at"_a, "lr"_a, "weight_decay"_a, "maximize"_a, "active_set"_a, "loss"_a, "threads"_a,
          "lr_on_device"_a = std::vector<Number>{}, "loss_on_device"_a = py::none(), "grad_scale"_a = py::none(),
          "found_inf"_a = py::none())
      .def("state_norms", &NativeStep::state_norms, "at"_a, "threads"_a)
      .def("last_move", &NativeStep::last_move, "at"_a, "threads"_a)
      .def(
          "descend",
          [](NativeStep& self, const std::optional<NativeStep::Tensors>& at, const std::string& kind, int threads,
             double alpha, bool first, bool preconditioned, bool update, double scale, double ys, double shs,
             double beta) {
            const auto found = std::find(std::begin(kDescentNames), std::end(kDescentNames), kind);
            if (found == std::end(kDescentNames)) throw std::invalid_argument("no pass '" + kind + "'");
            const auto number = static_cast<Descent::Kind>(found - std::begin(kDescentNames));
            return self.descend(at, {number, alpha, first, preconditioned, update, scale, ys, shs, beta}, threads);
          },
          "at"_a, "kind"_a, "threads"_a, "alpha"_a = 0.0, "first"_a = false, "preconditioned"_a = true,
          "update"_a = false, "scale"_a = 1.0, "ys"_a = 0.0, "shs"_a = 0.0, "beta"_a = 0.0)
      .def("bind", &NativeStep::bind, "p"_a, "g"_a, "grad_prev"_a, "direction"_a, "diagonal"_a, "origin"_a = nullptr,
           "steps"_a = 0.0)
      .def("flat_step", &NativeStep::flat_step, "scalars"_a, "lr"_a, "weight_decay"_a, "maximize"_a, "loss"_a,
           "threads"_a)
      .def("update_curvature", &NativeStep::update_curvature, "alpha_prev"_a, "threads"_a)
      .def("preconditioned_dots", &NativeStep::preconditioned_dots, "threads"_a)
      .def("update_direction", &NativeStep::update_direction, "alpha"_a, "weight_decay"_a, "beta"_a, "threads"_a)
      .def("set_launch", &NativeStep::set_launch, "form"_a, "blocks"_a = 0, "resident_tiles"_a = -1)
      .def_property_readonly("launches", &NativeStep::launches)
      .def_property_readonly("digest", &NativeStep::digest)
      .def_property("stream", &NativeStep::stream, &NativeStep::set_stream)
      .def("join_stream", &NativeStep::join_stream);

  py::class_<NativeStep::Tensors>(m, "Tensors", py::module_local())
      .def(py::init<py::list, py::object, py::list, py::list, py::object, py::object, py::object, py::list>(),
           "params"_a, "gradients"_a, "entries"_a, "resting"_a, "state"_a, "held"_a, "scalars"_a, "alpha_prev"_a);
}
