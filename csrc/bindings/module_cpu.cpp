// nfkernels._C: a Python module under the limited API that registers the CPU kernels when asked to.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "../cpu/processor.h"
#include "register.h"

namespace {

PyObject* register_ops(PyObject*, PyObject*) {
  try {
    nf::register_ops("CPU");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(nf::processor().isa); }

// elementary(which, x_address, y_address, n): the kernels' exp, log, log1p, tanh, atan, for the accuracy tests.
PyObject* elementary(PyObject*, PyObject* args) {
  int which;
  unsigned long long x, y;
  Py_ssize_t n;
  if (!PyArg_ParseTuple(args, "iKKn", &which, &x, &y, &n)) return nullptr;
  nf::processor().elementary(which, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"register", register_ops, METH_NOARGS, "Registers the CPU kernels with PyTorch's dispatcher."},
    {"isa", isa, METH_NOARGS, "The instruction set in use: avx512, avx2 or baseline."},
    {"elementary", elementary, METH_VARARGS, "Applies one elementary function to n floats (tests)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "schema_version", NF_SCHEMA_VERSION) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
