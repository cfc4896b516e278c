// nfkernels._C_cuda: a Python module under the limited API that registers the CUDA kernels when asked to. It is built
// with a CPU torch too, so nothing of libtorch_cuda is linked: the current stream is asked of it at run time.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>

#include <exception>

#include "../cuda/usable.h"
#include "register.h"
#include "run.h"

namespace nf {

using StreamGetter = int32_t (*)(int32_t device, void** stream);

// Null under a torch without CUDA.
StreamGetter stream_getter() {
  static const StreamGetter found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<StreamGetter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return found;
}

void* current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(stream_getter()(device, &stream) == 0, "nfkernels: torch does not tell its current CUDA stream");
  return stream;
}

int multiprocessors(int device) { return cuda::multiprocessors(device); }

}  // namespace nf

namespace {

PyObject* register_ops(PyObject*, PyObject*) {
  try {
    nf::register_ops("CUDA");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* why_unusable(PyObject*, PyObject* argument) {
  const long device = PyLong_AsLong(argument);
  if (device == -1 && PyErr_Occurred()) return nullptr;
  if (!nf::stream_getter()) return PyUnicode_FromString("this PyTorch does not tell its current CUDA stream");
  const std::string why = nf::cuda::why_unusable(static_cast<int>(device), NF_CUDA_ARCHITECTURES);
  if (why.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(why.c_str());
}

PyMethodDef methods[] = {
    {"register", register_ops, METH_NOARGS, "Registers the CUDA kernels with PyTorch's dispatcher."},
    {"why_unusable", why_unusable, METH_O, "Why the kernels cannot run on CUDA device n, or None when they can."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  PyObject* module = PyModule_Create(&definition);
  if (module && (PyModule_AddIntConstant(module, "schema_version", NF_SCHEMA_VERSION) < 0 ||
                 PyModule_AddStringConstant(module, "architectures", NF_CUDA_ARCHITECTURES) < 0 ||
                 PyModule_AddStringConstant(module, "compiler", nf::cuda::compiler()) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
