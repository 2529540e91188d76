// SPDX-License-Identifier: Apache-2.0
// Layers that are split over processes by heads, by tokens or both are cut as on one: with MPI.
#include "comparison.hpp"
#include "host_device.hpp"
#include "mpi_group.hpp"

using namespace distributed;

int main(int argc, char** argv) {
  const mpi_session session(argc, argv);
  const mpi_group world;
  int exit_code = 0;
  const auto opts = parse(argc, argv, world.size(), world.rank() == 0, exit_code);
  if (!opts) return exit_code;
  try {
    const host_device device;
    return comparison(device, world, *opts).run() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "distributed: rank %td: %s\n", world.rank(), error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
}
