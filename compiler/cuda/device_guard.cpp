// A CPU build of torch knows no CUDA device guard, and indexing a fake CUDA tensor asks for one. This one does nothing:
// no CUDA tensor that exists here has memory. A CUDA build brings its own.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
struct NoDevice final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {};
C10_REGISTER_GUARD_IMPL(CUDA, NoDevice)
}  // namespace
