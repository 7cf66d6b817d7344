// The Python module: a table of contents. With native_step.h the only file that knows pybind11.
#include <omp.h>

#include "native_step.h"

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
  m.attr("compiler") = "gcc " __VERSION__;
  m.def("instruction_sets", [] {
    const char* names[3];
    const int count = cpu_instruction_sets(names);
    return std::vector<std::string>(names, names + count);
  });
  m.def("instruction_set", [] { return std::string(cpu_kernels().name); });
  m.def("max_threads", [] { return omp_get_max_threads(); });
  m.def("cuda_status", [] {
    const CudaStatus status = cuda_status();
    return py::dict("built"_a = status.built, "architectures"_a = status.architectures, "devices"_a = status.devices,
                    "runtime"_a = status.runtime_version, "driver"_a = status.driver_version,
                    "unavailable_reason"_a = status.unavailable_reason);
  });

  m.attr("row_doubles") = static_cast<int>(kColumns);
  m.def("chunk_elements", [](std::int64_t n) { return chunk_elements(n < 0 ? 0 : n); }, "n"_a);
  m.def("workspace_doubles", &workspace_doubles, "n"_a, "max_segments"_a, "groups"_a);

  py::class_<Buffer, BufferPtr>(m, "Buffer", py::module_local())
      .def(py::init([](const py::object& owner) { return std::make_shared<Buffer>(owner.ptr()); }))
      .def_property_readonly("pointer", [](const Buffer& b) { return reinterpret_cast<std::uintptr_t>(b.data()); })
      .def_property_readonly("size", &Buffer::size)
      .def_property_readonly("dtype", &Buffer::dtype)
      .def_property_readonly("device", &Buffer::device)
      .def_property_readonly("readonly", &Buffer::readonly)
      .def_property_readonly("contiguous", &Buffer::contiguous)
      .def("advise_huge_pages", &Buffer::advise_huge_pages);

  py::class_<NativeStep>(m, "Step", py::module_local())
      .def(py::init<const std::string&, std::int64_t, BufferPtr, BufferPtr, BufferPtr, BufferPtr, BufferPtr, int,
                    const std::string&, BufferPtr, std::uintptr_t>(),
           "state_dtype"_a, "n"_a, "grad_prev"_a, "direction"_a, "diagonal"_a, "param_steps"_a, "beta2_powers"_a,
           "groups"_a, "device"_a = "cpu", "workspace"_a = nullptr, "stream"_a = 0)
      .def("set_options", &NativeStep::set_options, "preconditioner"_a, "update"_a, "restart"_a, "restart_every"_a,
           "eps"_a, "curvature_eps"_a, "beta2"_a, "beta_max"_a, "skip_nonfinite"_a, "maximize"_a,
           "stochastic_rounding"_a, "line_search"_a)
      .def("set_exchange", &NativeStep::set_exchange, "mine"_a, "all"_a, "counted"_a, "elements"_a, "every_decision"_a,
           "gather"_a)
      .def("set_segments", &NativeStep::set_segments)
      .def("point", py::overload_cast<const py::list&, const py::list&>(&NativeStep::point), "p"_a, "g"_a)
      .def("refresh", &NativeStep::refresh, "exchange"_a, "moving"_a, "resting"_a, "tensor_type"_a)
      .def("step", &NativeStep::step, "lr"_a, "weight_decay"_a, "maximize"_a, "set"_a, "loss"_a, "threads"_a,
           "lr_on_device"_a = std::vector<NativeStep::Number>{}, "loss_on_device"_a = py::none(),
           "grad_scale"_a = py::none(), "found_inf"_a = py::none())
      .def("set_launch", &NativeStep::set_launch, "form"_a, "blocks"_a = 0, "resident_tiles"_a = -1)
      .def_property_readonly("launches", &NativeStep::launches)
      .def_property("stream", &NativeStep::stream, &NativeStep::set_stream)
      .def("state_norms", &NativeStep::state_norms, "threads"_a)
      .def("last_move", &NativeStep::last_move, "threads"_a)
      .def_property("scalars", &NativeStep::scalars, &NativeStep::set_scalars)
      .def_property("alpha_prev", &NativeStep::alpha_prev, &NativeStep::set_alpha_prev)
      .def_property("beta2_power", &NativeStep::beta2_power, &NativeStep::set_beta2_power)
      .def("update_curvature", &NativeStep::update_curvature, "g"_a, "alpha_prev"_a, "threads"_a)
      .def("preconditioned_dots", &NativeStep::preconditioned_dots, "g"_a, "threads"_a)
      .def("update_direction", &NativeStep::update_direction, "p"_a, "g"_a, "alpha"_a, "weight_decay"_a, "beta"_a,
           "threads"_a);
}
