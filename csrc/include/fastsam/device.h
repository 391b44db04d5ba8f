// What the CUDA part was built for and what it finds on this machine. Nothing here fails where there is no driver.
#pragma once

namespace fastsam::cuda {

// Version of the CUDA runtime linked in, as 1000 * major + 10 * minor.
int runtime_version();

// Newest CUDA version the installed driver serves, in the same form; 0 without a driver.
int driver_version();

// Number of visible CUDA devices; 0 without a driver.
int device_count();

// Compute capability of a device; 0.0 when there is no such device.
void compute_capability(int device, int* major, int* minor);

// Compute capability, times ten, of the code that runs on the current device: that of the PTX of which its machine code
// was made, by nvcc or by the driver. 0 where nothing that was compiled runs there.
int code_capability();

// Bytes of shared memory that a block may have on a device, with opt-in; 0 where there is no such device.
int shared_bytes_of_block(int device);

}  // namespace fastsam::cuda
