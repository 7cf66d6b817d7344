// The Python module: a table of contents. Besides native_step, tensor_table and flat_step no file knows pybind11.
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "flat_step.h"
#include "preconditioners.h"
#include "rank_agreement.h"
#include "step_cpu.h"
#include "tensor_table.h"

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
  m.attr("row_sums") = kLargestElement + 1;
  m.attr("row_signature") = static_cast<int>(kStepNumber);
  // A row of these values, which are at most row_signature, signed.
  m.def(
      "rank_row",
      [](const std::vector<double>& values, double step, const std::string& exchange, double digest) {
        if (values.size() > kStepNumber)
          throw std::invalid_argument(std::to_string(values.size()) + " values for a row");
        RankRow row = {};
        std::copy(values.begin(), values.end(), row.column);
        sign_row(row, step, named<ExchangeId>("exchange", kExchangeNames, exchange), digest);
        return std::vector<double>(std::begin(row.column), std::end(row.column));
      },
      "values"_a, "step"_a, "exchange"_a, "digest"_a);
  m.attr("block_elements") = kBlockElements;
  m.attr("most_pairs") = kMostPairs;
  m.attr("tile_elements") = kTile;
  // Whether two lists have the same objects, in the same order.
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

  // The steps, and what they are given.
  py::class_<DeviceScalar>(m, "DeviceScalar", py::module_local())
      .def(py::init([](std::uintptr_t address, const std::string& dtype) {
             if (address == 0) throw std::invalid_argument("address is 0, expected that of a scalar on the device");
             return DeviceScalar{reinterpret_cast<const void*>(address), dtype_named(dtype)};
           }),
           py::kw_only(), "address"_a, "dtype"_a);
  using Extents = std::vector<std::int64_t>;
  py::class_<SegmentSpec>(m, "SegmentSpec", py::module_local())
      .def(py::init([](std::int64_t offset, int group, std::uint32_t index, const std::string& dtype, Extents shape,
                       Extents strides, std::int64_t begin, std::int64_t run, std::int64_t skip) {
             return SegmentSpec{
                 offset, group, dtype_named(dtype), {std::move(shape), std::move(strides)}, {begin, run, skip, index}};
           }),
           py::kw_only(), "offset"_a, "group"_a, "index"_a, "dtype"_a, "shape"_a, "strides"_a, "begin"_a = 0,
           "run"_a = 0, "skip"_a = 0);
  using Key = std::optional<std::string>;
  py::class_<StateKeys>(m, "StateKeys", py::module_local())
      .def(py::init<Key, Key, Key, Key, Key>(), py::kw_only(), "grad_prev"_a = py::none(), "direction"_a = py::none(),
           "diagonal"_a = py::none(), "origin"_a = py::none(), "steps"_a = py::none());
  py::class_<Tensors>(m, "Tensors", py::module_local())
      .def(py::init<py::list, py::object, py::list, py::list, py::object, py::list, py::object, py::list>(),
           py::kw_only(), "params"_a = py::list(), "gradients"_a = py::none(), "entries"_a = py::list(),
           "inactive_params"_a = py::list(), "state"_a = py::none(), "expected_state"_a = py::list(),
           "scalars"_a = py::none(), "alpha_prev"_a = py::list());

  py::class_<Descent>(m, "DescentPass", py::module_local())
      .def(py::init([](const std::string& kind, double alpha, bool first, bool preconditioned, bool update,
                       double scale, double ys, double shs, double beta, bool maximize, int row, int count, int y_row,
                       double gamma, const std::vector<double>& coefficients) {
             if (coefficients.size() > kMostPairs)
               throw std::invalid_argument(std::to_string(coefficients.size()) + " coefficients");
             Descent pass{named<Descent::Kind>("pass", kDescentNames, kind),
                          alpha,
                          first,
                          preconditioned,
                          update,
                          scale,
                          ys,
                          shs,
                          beta,
                          maximize,
                          row,
                          count,
                          y_row,
                          gamma,
                          {}};
             std::copy(coefficients.begin(), coefficients.end(), pass.coefficient);
             return pass;
           }),
           "kind"_a, py::kw_only(), "alpha"_a = 0.0, "first"_a = false, "preconditioned"_a = true, "update"_a = false,
           "scale"_a = 1.0, "ys"_a = 0.0, "shs"_a = 0.0, "beta"_a = 0.0, "maximize"_a = false, "row"_a = 0,
           "count"_a = 0, "y_row"_a = 0, "gamma"_a = 1.0, "coefficients"_a = std::vector<double>{});

  py::class_<NativeStep>(m, "NativeStep", py::module_local())
      .def("set_options", &NativeStep::set_options, "options"_a)
      .def("set_launch", &NativeStep::set_launch, "form"_a, "blocks"_a = 0, "resident_tiles"_a = -1)
      .def_property_readonly("launches", &NativeStep::launches)
      .def_property("stream", &NativeStep::stream, &NativeStep::set_stream);
  const auto with_device = py::init<const std::string&, const std::string&, std::uintptr_t>();
  py::class_<TensorTable, NativeStep>(m, "TensorTable", py::module_local())
      .def(with_device, "state_dtype"_a, "device"_a = "cpu", "stream"_a = 0)
      .def("lay_out", &TensorTable::lay_out, "n"_a, "segments"_a, "groups"_a, "keys"_a, "dlpack_api"_a, "tensor_type"_a,
           "workspace"_a = nullptr, "matrix_groups"_a = std::vector<int>{})
      .def("set_exchange", &TensorTable::set_exchange, "mine"_a, "all"_a, "owned"_a, "elements"_a, "every_decision"_a,
           "replicas"_a, "gather"_a)
      .def(
          "step",
          [](TensorTable& self, const Tensors& at, std::vector<double> lr, std::vector<double> weight_decay,
             std::vector<bool> maximize, double active_set, double loss, int threads,
             const std::vector<std::optional<DeviceScalar>>& lr_on_device,
             const std::optional<DeviceScalar>& loss_on_device, const std::optional<DeviceScalar>& grad_scale,
             const std::optional<DeviceScalar>& found_inf, const std::optional<py::function>& complete) {
            StepInputs in{
                std::move(lr), std::move(weight_decay), std::move(maximize), active_set, loss, threads, {}, {}, {}, {}};
            for (const auto& rate : lr_on_device) in.lr_on_device.push_back(rate.value_or(DeviceScalar{}));
            in.loss_on_device = loss_on_device.value_or(DeviceScalar{});
            in.grad_scale = grad_scale.value_or(DeviceScalar{});
            in.found_inf = found_inf.value_or(DeviceScalar{});
            const std::optional<bool> moved = self.step(at, in);
            if (complete && moved.value_or(false)) complete_step(*complete);
            return moved;
          },
          "at"_a, "lr"_a, "weight_decay"_a, "maximize"_a, "active_set"_a, "loss"_a, "threads"_a,
          "lr_on_device"_a = std::vector<std::optional<DeviceScalar>>{}, "loss_on_device"_a = py::none(),
          "grad_scale"_a = py::none(), "found_inf"_a = py::none(), "complete"_a = py::none())
      .def("state_norms", &TensorTable::state_norms, "at"_a, "threads"_a)
      .def("set_origins", &TensorTable::set_origins, "workspace"_a, "parts"_a)
      .def(
          "matrix_pass",
          [](TensorTable& self, const std::string& kind, std::int64_t first_tile, std::int64_t last_tile, int threads) {
            self.matrix_pass(named<MatrixPass>("pass", kMatrixPassNames, kind), first_tile, last_tile, threads);
          },
          "kind"_a, "first_tile"_a, "last_tile"_a, "threads"_a)
      .def_property_readonly("matrices_pending", &TensorTable::matrices_pending)
      .def_property_readonly("matrix_moves", &TensorTable::matrix_moves)
      .def("end_matrices", &TensorTable::end_matrices)
      .def("last_move", &TensorTable::last_move, "at"_a, "threads"_a)
      .def("descend", &TensorTable::descend, "at"_a, "pass_"_a, "threads"_a)
      .def_readwrite("agreed", &TensorTable::agreed)
      .def("join_stream", &TensorTable::join_stream);

  m.def("normalize", &normalize, "x"_a, "count"_a, "n"_a, "threads"_a, "stream"_a = 0, "sums"_a = nullptr);
  m.def("normalize_doubles", &normalize_doubles, "count"_a, "n"_a);

  py::class_<FlatStep, NativeStep>(m, "FlatStep", py::module_local())
      .def(with_device, "state_dtype"_a, "device"_a = "cpu", "stream"_a = 0)
      .def(
          "bind",
          [](FlatStep& self, BufferPtr p, BufferPtr g, BufferPtr grad_prev, BufferPtr direction, BufferPtr diagonal,
             BufferPtr origin, BufferPtr rows, double steps, std::int64_t owned) {
            self.bind({std::move(p), std::move(g), std::move(grad_prev), std::move(direction), std::move(diagonal),
                       std::move(origin), std::move(rows)},
                      steps, owned);
          },
          py::kw_only(), "p"_a = nullptr, "g"_a = nullptr, "grad_prev"_a = nullptr, "direction"_a = nullptr,
          "diagonal"_a = nullptr, "origin"_a = nullptr, "rows"_a = nullptr, "steps"_a = 0.0, "owned"_a = -1)
      .def("step", &FlatStep::step, "scalars"_a, "lr"_a, "weight_decay"_a, "maximize"_a, "loss"_a, "threads"_a)
      .def("update_curvature", &FlatStep::update_curvature, "alpha_prev"_a, "threads"_a)
      .def("preconditioned_dots", &FlatStep::preconditioned_dots, "threads"_a)
      .def("update_direction", &FlatStep::update_direction, "alpha"_a, "weight_decay"_a, "beta"_a, "threads"_a)
      .def("descend", &FlatStep::descend, "pass_"_a, "threads"_a);
}
