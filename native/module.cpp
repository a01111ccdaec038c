// The Python module: a list of what is exported. No algorithm lives here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_attention(nb::module_&);
void bind_dropout(nb::module_&);
void bind_gaussian(nb::module_&);
void bind_sampling(nb::module_&);

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of twodice; each has a readable twin in twodice.kernels and twodice.random.";
    m.attr("sources") = TWODICE_SOURCES;  // their digest, by CMakeLists.txt
    bind_attention(m);
    bind_dropout(m);
    bind_gaussian(m);
    bind_sampling(m);
}
