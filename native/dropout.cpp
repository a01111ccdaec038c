// Philox and dropout.
#include <nanobind/nanobind.h>
void bind_dropout(nanobind::module_&) {}
